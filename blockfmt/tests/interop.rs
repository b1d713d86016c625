//! Images cross between QEMU and us in both directions, in every variant of qcow2.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::qcow2::{Compression, Qcow2Options};
use blockfmt::{CreateOptions, Format, OpenOptions, Preallocation};
use common::{Rng, assert_same, exercise, qemu_ok, text};
use std::path::Path;

const SIZE: u64 = (3 << 20) + 512 * 5;

/// What QEMU sees in an image.
fn qemu_view(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("view");
    qemu_ok("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(path), text(&raw)]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    bytes
}

fn qemu_check(path: &Path) {
    qemu_ok("qemu-img", &["check", "-f", "qcow2", text(path)]);
}

fn assert_qemu_sees(path: &Path, model: &[u8], what: &str) {
    let view = qemu_view(path);
    assert_eq!(view.len(), model.len(), "{what}");
    if let Some(at) = view.iter().zip(model).position(|(a, b)| a != b) {
        panic!("{what}: QEMU sees {} instead of {} at byte {at}", view[at], model[at]);
    }
}

/// Every valid combination of the options that shape metadata.
fn variants() -> Vec<Qcow2Options> {
    let mut out = Vec::new();
    for cluster_bits in 9..=21 {
        for refcount_bits in [1, 2, 4, 8, 16, 32, 64] {
            // All pairs with the extremes of either option; the middle ones once each.
            if ![9, 16, 21].contains(&cluster_bits) && ![1, 16, 64].contains(&refcount_bits) {
                continue;
            }
            for extended_l2 in [false, true] {
                if extended_l2 && cluster_bits < 14 {
                    continue;
                }
                let compression = if cluster_bits % 2 == 0 { Compression::Zlib } else { Compression::Zstd };
                let cluster_size = 1 << cluster_bits;
                out.push(Qcow2Options {
                    cluster_size: Some(cluster_size),
                    refcount_bits,
                    extended_l2: Some(extended_l2),
                    compression,
                    ..Qcow2Options::default()
                });
            }
        }
        out.push(Qcow2Options {
            version: 2,
            cluster_size: Some(1 << cluster_bits),
            ..Qcow2Options::default()
        });
    }
    out
}

fn qemu_options(o: &Qcow2Options) -> String {
    let mut text = format!(
        "cluster_size={},refcount_bits={},compat={}",
        o.cluster_size.unwrap(),
        o.refcount_bits,
        if o.version == 2 { "0.10" } else { "1.1" }
    );
    if o.version == 3 {
        text += &format!(",extended_l2={}", if o.extended_l2 == Some(true) { "on" } else { "off" });
        text += if o.compression == Compression::Zstd { ",compression_type=zstd" } else { "" };
    }
    text
}

#[test]
fn written_here_and_read_there() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (n, options) in variants().into_iter().enumerate() {
        let what = format!("{options:?}");
        let path = dir.path().join(format!("{n}.qcow2"));
        CreateOptions::new(Format::Qcow2, SIZE).qcow2(options).create(&path).expect(&what);
        let mut model = vec![0; SIZE as usize];
        let mut rng = Rng(1000 + n as u64);
        for _ in 0..2 {
            let disk = OpenOptions::new(Format::Qcow2).open(&path).expect(&what);
            exercise(&disk, &mut model, &mut rng, 60);
            assert_same(&disk, &model);
            disk.close().expect(&what);
        }
        qemu_check(&path);
        assert_qemu_sees(&path, &model, &what);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn written_there_and_read_and_changed_here() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (n, options) in variants().into_iter().enumerate() {
        let what = format!("{options:?}");
        let mut rng = Rng(7000 + n as u64);
        let mut model = rng.bytes(SIZE as usize);
        // Runs of zeros and repetitions make sparse and compressible areas.
        for _ in 0..6 {
            let at = rng.below(SIZE - 400_000) as usize;
            model[at..at + 300_000].fill((rng.below(3) * 7) as u8);
        }
        let (raw, path) = (dir.path().join("src.raw"), dir.path().join(format!("{n}.qcow2")));
        std::fs::write(&raw, &model).unwrap();
        let o = qemu_options(&options);
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", &o];
        if n % 2 == 0 {
            args.push("-c");
        }
        args.extend([text(&raw), text(&path)]);
        qemu_ok("qemu-img", &args);
        let disk = OpenOptions::new(Format::Qcow2).open(&path).expect(&what);
        assert_same(&disk, &model);
        exercise(&disk, &mut model, &mut rng, 60);
        disk.close().expect(&what);
        drop(disk);
        qemu_check(&path);
        assert_qemu_sees(&path, &model, &what);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn chains_cross_too() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let at = |name: &str| dir.path().join(name);
    for (n, (version, extended_l2)) in [(2, false), (3, false), (3, true)].into_iter().enumerate() {
        let mut rng = Rng(31 + n as u64);
        // A raw base that is shorter than its child, a child by QEMU, a child by us.
        let base = rng.bytes(1 << 20);
        std::fs::write(at("base.raw"), &base).unwrap();
        let _ = std::fs::remove_file(at("mid.qcow2"));
        let compat = if version == 2 { "compat=0.10" } else { "compat=1.1" };
        let size = SIZE.to_string();
        let args = ["create", "-q", "-f", "qcow2", "-o", compat, "-b", "base.raw", "-F", "raw"];
        qemu_ok("qemu-img", &[&args[..], &[text(&at("mid.qcow2")), &size]].concat());
        qemu_ok("qemu-io", &["-f", "qcow2", "-c", "write -P 5 900k 300k", text(&at("mid.qcow2"))]);
        let mut model = base;
        model.resize(SIZE as usize, 0);
        model[900 << 10..1200 << 10].fill(5);

        let _ = std::fs::remove_file(at("top.qcow2"));
        let qcow2 = Qcow2Options { version, extended_l2: Some(extended_l2), ..Qcow2Options::default() };
        let options =
            CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).backing("mid.qcow2", Format::Qcow2);
        options.create(&at("top.qcow2")).unwrap();
        let disk = OpenOptions::new(Format::Qcow2).open(at("top.qcow2")).unwrap();
        assert_same(&disk, &model);
        exercise(&disk, &mut model, &mut rng, 150);
        assert_same(&disk, &model);
        drop(disk);
        qemu_check(&at("top.qcow2"));
        assert_qemu_sees(&at("top.qcow2"), &model, compat);
    }
}

#[test]
fn preallocation_and_data_files() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut rng = Rng(99);
    for how in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for (raw, external, extended_l2) in [
            (false, false, false),
            (false, false, true),
            (false, true, false),
            (true, true, false),
            (true, true, true),
        ] {
            let path = dir.path().join("p.qcow2");
            let qcow2 = Qcow2Options {
                data_file: external.then(|| text(&dir.path().join("p.data")).into()),
                data_file_raw: raw,
                extended_l2: Some(extended_l2),
                ..Qcow2Options::default()
            };
            let options = CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).preallocation(how);
            options.create(&path).unwrap();
            let what = format!("{options:?}");
            qemu_check(&path);
            let mut model = vec![0; SIZE as usize];
            assert_qemu_sees(&path, &model, &what);
            let disk = OpenOptions::new(Format::Qcow2).open(&path).unwrap();
            exercise(&disk, &mut model, &mut rng, 80);
            assert_same(&disk, &model);
            drop(disk);
            qemu_check(&path);
            assert_qemu_sees(&path, &model, &what);
            if raw {
                let data = std::fs::read(dir.path().join("p.data")).unwrap();
                assert!(data[..SIZE as usize] == model, "{what}: the raw data file differs");
            }
            std::fs::remove_file(&path).unwrap();
            let _ = std::fs::remove_file(dir.path().join("p.data"));
        }
    }
}

#[test]
fn preallocated_clusters_show_nothing_of_tables_that_moved() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for how in [Preallocation::Metadata, Preallocation::Falloc] {
        let path = dir.path().join(format!("{how:?}"));
        // Small enough clusters that the refcount table has to grow.
        let qcow2 = Qcow2Options { cluster_size: Some(512), ..Qcow2Options::default() };
        CreateOptions::new(Format::Qcow2, 16 << 20).qcow2(qcow2).preallocation(how).create(&path).unwrap();
        let disk = OpenOptions::new(Format::Qcow2).read_only(true).open(&path).unwrap();
        assert_same(&disk, &vec![0; 16 << 20]);
        qemu_check(&path);
    }
}

#[test]
fn sizes_change_both_ways() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut rng = Rng(5);
    for cluster_size in [512, 4096, 65536, 1 << 21] {
        let path = dir.path().join("r.qcow2");
        let qcow2 = Qcow2Options { cluster_size: Some(cluster_size), ..Qcow2Options::default() };
        CreateOptions::new(Format::Qcow2, 1 << 20).qcow2(qcow2).create(&path).unwrap();
        let disk = OpenOptions::new(Format::Qcow2).open(&path).unwrap();
        let mut model = vec![0; 1 << 20];
        for _ in 0..12 {
            exercise(&disk, &mut model, &mut rng, 20);
            let size = 512 * (1 + rng.below(8 << 11));
            disk.resize(size).unwrap();
            model.resize(size as usize, 0);
            assert_same(&disk, &model);
        }
        drop(disk);
        qemu_check(&path);
        assert_qemu_sees(&path, &model, "resized");
        std::fs::remove_file(&path).unwrap();
    }
}
