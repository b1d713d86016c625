//! Internal snapshots and repair, cross-checked with QEMU.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::qcow2::{Qcow2Options, Repair};
use blockfmt::{CreateOptions, Disk, Error, Format, OpenOptions};
use common::{Rng, assert_same, exercise, qemu, qemu_ok, text};
use std::path::Path;

const SIZE: u64 = 3 << 20;

fn open(path: &Path) -> Disk {
    OpenOptions::new(Format::Qcow2).open(path).unwrap()
}

fn check(path: &Path) {
    qemu_ok("qemu-img", &["check", "-f", "qcow2", text(path)]);
}

#[test]
fn snapshots_keep_and_bring_back_contents() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (n, (version, cluster_size, extended_l2)) in
        [(3, 65536, false), (3, 512, false), (2, 4096, false), (3, 65536, true)].into_iter().enumerate()
    {
        let path = dir.path().join(format!("{n}.qcow2"));
        let qcow2 = Qcow2Options {
            version,
            cluster_size: Some(cluster_size),
            extended_l2: Some(extended_l2),
            ..Qcow2Options::default()
        };
        CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).create(&path).unwrap();
        let mut rng = Rng(40 + n as u64);
        let mut model = vec![0; SIZE as usize];
        let mut saved = Vec::new();
        let disk = open(&path);
        for i in 0..4 {
            exercise(&disk, &mut model, &mut rng, 40);
            let layer = &disk.layers()[0];
            layer.as_qcow2().unwrap().create_snapshot(&format!("s{i}")).unwrap();
            saved.push(model.clone());
        }
        exercise(&disk, &mut model, &mut rng, 40);
        assert_same(&disk, &model);
        let layer = disk.layers().remove(0);
        let image = layer.as_qcow2().unwrap();
        assert!(matches!(image.create_snapshot("s1"), Err(Error::Exists { .. })));
        assert!(image.check(Repair::Nothing).unwrap().is_clean());
        disk.close().unwrap();
        drop((disk, layer));
        check(&path);

        // QEMU reads our snapshots and takes one.
        let out = dir.path().join("out.raw");
        let args = ["convert", "-f", "qcow2", "-l", "snapshot.name=s2", "-O", "raw", text(&path), text(&out)];
        qemu_ok("qemu-img", &args);
        assert!(std::fs::read(&out).unwrap() == saved[2]);
        qemu_ok("qemu-img", &["snapshot", "-c", "theirs", text(&path)]);

        let disk = open(&path);
        let layer = disk.layers().remove(0);
        let image = layer.as_qcow2().unwrap();
        let names: Vec<_> = image.snapshots().unwrap().into_iter().map(|s| s.name).collect();
        assert_eq!(names, ["s0", "s1", "s2", "s3", "theirs"]);
        image.delete_snapshot("s1").unwrap();
        image.revert_to_snapshot("s0").unwrap();
        assert_same(&disk, &saved[0]);
        let mut now = saved[0].clone();
        exercise(&disk, &mut now, &mut rng, 40);
        image.revert_to_snapshot("theirs").unwrap();
        assert_same(&disk, &model);
        for name in ["s0", "theirs", "s2"] {
            image.delete_snapshot(name).unwrap();
        }
        assert!(matches!(image.delete_snapshot("s0"), Err(Error::NotFound { .. })));
        assert_same(&disk, &model);
        assert!(image.check(Repair::Nothing).unwrap().is_clean());
        drop((disk, layer));
        check(&path);
        qemu_ok("qemu-img", &["snapshot", "-a", "s3", text(&path)]);
        assert_same(&open(&path), &saved[3]);
    }
}

/// The offset of the refcount table and of the first refcount block.
fn refcount_places(bytes: &[u8]) -> (usize, usize) {
    let at = |o: usize| u64::from_be_bytes(bytes[o..o + 8].try_into().unwrap()) as usize;
    (at(48), at(at(48)))
}

#[test]
fn damaged_refcounts_are_found_and_repaired() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("d.qcow2");
    let mut rng = Rng(3);
    for damage in 0..4 {
        let _ = std::fs::remove_file(&path);
        let qcow2 = Qcow2Options { cluster_size: Some(4096), ..Qcow2Options::default() };
        CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).create(&path).unwrap();
        let mut model = vec![0; SIZE as usize];
        let disk = open(&path);
        exercise(&disk, &mut model, &mut rng, 100);
        drop(disk);
        let mut bytes = std::fs::read(&path).unwrap();
        let (table, block) = refcount_places(&bytes);
        match damage {
            0 => bytes[block + 2 * 40..block + 2 * 60].fill(0), // too low
            1 => bytes[block + 2 * 1500 + 1] = 1,               // a leak
            2 => bytes[table..table + 8].copy_from_slice(&(1u64 << 40).to_be_bytes()), // no block
            _ => bytes[79] |= 1,                                // the dirty bit, with
        }
        if damage == 3 {
            bytes[block + 2 * 4..block + 2 * 300].fill(0); // stale refcounts
        }
        std::fs::write(&path, &bytes).unwrap();
        if damage != 3 {
            let disk = OpenOptions::new(Format::Qcow2).repair(true).open(&path).unwrap();
            let layer = disk.layers().remove(0);
            let report = layer.as_qcow2().unwrap().check(Repair::Nothing).unwrap();
            assert!(!report.is_clean(), "damage {damage} was not found");
            assert_eq!(report.leaks > 0, damage == 1);
            let report = layer.as_qcow2().unwrap().check(Repair::All).unwrap();
            assert!(report.is_clean(), "damage {damage}: {report:?}");
            assert!(report.corruptions_fixed + report.leaks_fixed > 0);
        }
        let disk = open(&path); // repairs a dirty image by itself
        assert_same(&disk, &model);
        exercise(&disk, &mut model, &mut rng, 50);
        drop(disk);
        check(&path);
        assert_same(&open(&path), &model);
    }
}

#[test]
fn lazy_images_that_qemu_left_dirty_are_repaired() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("lazy.qcow2");
    qemu_ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", text(&path), "3M"]);
    // "abort" kills qemu-io as a crash would.
    qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 7 64k 300k", "-c", "flush", "-c", "abort", text(&path)]);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes[79] & 1, 1, "qemu-io did not leave the image dirty");
    let mut model = vec![0; SIZE as usize];
    model[65536..65536 + 300 * 1024].fill(7);
    assert_same(&open(&path), &model);
    check(&path);
}

#[test]
fn a_faulty_entry_keeps_what_it_refers_to() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("f.qcow2");
    let qcow2 =
        Qcow2Options { cluster_size: Some(16384), extended_l2: Some(true), ..Qcow2Options::default() };
    CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).create(&path).unwrap();
    open(&path).write_at(&[7; 16384], 0).unwrap();
    let intact = std::fs::read(&path).unwrap();
    let at = |bytes: &[u8], o: usize| u64::from_be_bytes(bytes[o..o + 8].try_into().unwrap());
    let l2 = (at(&intact, at(&intact, 40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    // Subcluster 31 is zero, too; a reserved bit is set; the cluster after it, which has no place, has data.
    for (byte, bit) in [(8, 0x80), (7, 0x10), (16 + 15, 1)] {
        let mut bytes = intact.clone();
        bytes[l2 + byte] |= bit;
        std::fs::write(&path, &bytes).unwrap();
        let disk = OpenOptions::new(Format::Qcow2).repair(true).open(&path).unwrap();
        let layer = disk.layers().remove(0);
        for repair in [Repair::Nothing, Repair::All] {
            let report = layer.as_qcow2().unwrap().check(repair).unwrap();
            assert_eq!((report.corruptions, report.leaks), (1, 0), "byte {byte}: {report:?}");
        }
        disk.write_at(&[8; 1 << 20], 1 << 20).unwrap();
        let mut seen = [0; 512];
        disk.read_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [7; 512], "byte {byte}: the cluster was given to others");
    }
}

#[test]
fn a_snapshot_that_narrow_refcounts_do_not_allow_changes_nothing() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("n.qcow2");
    for (refcount_bits, snapshots) in [(1, 0), (2, 2)] {
        let qcow2 = Qcow2Options { refcount_bits, cluster_size: Some(4096), ..Qcow2Options::default() };
        CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).create(&path).unwrap();
        let disk = open(&path);
        let mut model = vec![0; SIZE as usize];
        exercise(&disk, &mut model, &mut Rng(8), 60);
        let layer = disk.layers().remove(0);
        let image = layer.as_qcow2().unwrap();
        for n in 0..snapshots {
            image.create_snapshot(&format!("{n}")).unwrap();
        }
        let refused = image.create_snapshot("more");
        assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
        if snapshots > 0 {
            let refused = image.revert_to_snapshot("0");
            assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
        }
        assert_eq!(image.snapshots().unwrap().len(), snapshots);
        assert_same(&disk, &model);
        drop((disk, layer));
        check(&path);
        std::fs::remove_file(&path).unwrap();
    }
}
