//! VHD: against a model, against QEMU in both directions, and differencing disks against libvhdi.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::vhd::{VhdKind, VhdOptions};
use blockfmt::job::{self, JobControl};
use blockfmt::{CreateOptions, Error, Format, OpenOptions, Preallocation};
use common::differencing::{Family, libvhdi_view};
use common::{Rng, assert_same, exercise, qemu_ok, text};
use std::path::Path;

const SIZE: u64 = (9 << 20) + 512 * 5;

fn vhd(kind: VhdKind) -> CreateOptions {
    CreateOptions::new(Format::Vhd, SIZE).vhd(VhdOptions { kind, ..VhdOptions::default() })
}

fn open(path: &Path) -> blockfmt::Disk {
    OpenOptions::new(Format::Vhd).open(path).unwrap()
}

fn assert_qemu_sees(path: &Path, model: &[u8]) {
    let raw = path.with_extension("model");
    std::fs::write(&raw, model).unwrap();
    let info = qemu_ok("qemu-img", &["info", "--output=json", "-f", "vpc", text(path)]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], model.len() as u64);
    qemu_ok("qemu-img", &["compare", "-f", "vpc", "-F", "raw", text(path), text(&raw)]);
}

#[test]
fn images_follow_a_model_and_qemu_reads_them() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (n, kind) in [VhdKind::Fixed, VhdKind::Dynamic].into_iter().enumerate() {
        let path = dir.path().join(format!("{n}.vhd"));
        vhd(kind).create(&path).unwrap();
        let mut model = vec![0; SIZE as usize];
        let mut rng = Rng(50 + n as u64);
        for _ in 0..4 {
            let disk = open(&path);
            exercise(&disk, &mut model, &mut rng, 60);
            assert_same(&disk, &model);
            disk.close().unwrap();
            drop(disk);
            assert_same(&open(&path), &model);
            assert_qemu_sees(&path, &model);
        }
        assert!(libvhdi_view(&[&path]) == model, "libvhdi sees something else");
    }
}

#[test]
fn images_of_qemu_are_read_and_changed() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut rng = Rng(60);
    for (n, options) in [
        "subformat=dynamic",
        "subformat=dynamic,force_size=on",
        "subformat=fixed",
        "subformat=fixed,force_size=on",
    ]
    .into_iter()
    .enumerate()
    {
        let (raw, path) = (dir.path().join("src.raw"), dir.path().join(format!("{n}.vhd")));
        let mut model = rng.bytes(SIZE as usize);
        model[1 << 20..7 << 20].fill(0);
        std::fs::write(&raw, &model).unwrap();
        let args = ["convert", "-f", "raw", "-O", "vpc", "-o", options, text(&raw), text(&path)];
        qemu_ok("qemu-img", &args);
        let disk = open(&path);
        // Without force_size, QEMU rounds up to whole cylinders.
        assert!(disk.size() >= SIZE && (n % 2 == 0 || disk.size() == SIZE), "{options}: {}", disk.size());
        model.resize(disk.size() as usize, 0);
        assert_same(&disk, &model);
        exercise(&disk, &mut model, &mut rng, 100);
        drop(disk);
        assert_qemu_sees(&path, &model);
        qemu_ok("qemu-io", &["-f", "vpc", "-c", "write -P 7 3M 100k", text(&path)]);
        model[3 << 20..(3 << 20) + (100 << 10)].fill(7);
        assert_same(&open(&path), &model);
    }
}

const FAMILY: Family = Family {
    format: Format::Vhd,
    create: || vhd(VhdKind::Dynamic),
    assert_qemu_sees,
    assert_clean: |_| {}, // the format has no check
};

#[test]
fn differencing_disks_agree_with_libvhdi() {
    FAMILY.agrees_with_libvhdi();
}

#[test]
fn chains_mix_formats_and_merge() {
    FAMILY.mixes_and_merges();
}

#[test]
fn a_disk_that_lost_its_parent_shows_nothing_of_a_crash_to_readers_without_bitmaps() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (base, child) = (dir.path().join("base"), dir.path().join("child"));
    vhd(VhdKind::Dynamic).create(&base).unwrap();
    vhd(VhdKind::Dynamic).backing("base", Format::Vhd).create(&child).unwrap();
    let mut model = vec![0; open(&child).size() as usize];
    model[..512].fill(0xa5);
    open(&child).write_at(&model[..512], 0).unwrap();
    // A write of the next sector that was not flushed.
    let mut file = std::fs::read(&child).unwrap();
    let payload = file.windows(512).position(|sector| *sector == model[..512]).unwrap();
    file[payload + 512..payload + 1024].fill(0x5a);
    std::fs::write(&child, file).unwrap();
    let disk = open(&child);
    assert_same(&disk, &model);
    job::stream(&disk, 0, None, &JobControl::new()).unwrap();
    assert_same(&disk, &model);
    drop(disk);
    assert_qemu_sees(&child, &model);
}

#[test]
fn a_changed_parent_is_noticed() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["base.vhd", "other.vhd"] {
        vhd(VhdKind::Dynamic).create(&at(name)).unwrap();
    }
    vhd(VhdKind::Dynamic).backing("base.vhd", Format::Vhd).create(&at("child.vhd")).unwrap();
    drop(open(&at("child.vhd")));
    let base = std::fs::File::options().write(true).open(at("base.vhd")).unwrap();
    let time = base.metadata().unwrap().modified().unwrap();
    base.set_modified(time + std::time::Duration::from_secs(2)).unwrap();
    let error = OpenOptions::new(Format::Vhd).open(at("child.vhd")).unwrap_err();
    assert!(matches!(error, Error::ParentChanged { .. }), "{error}");
    base.set_modified(time).unwrap();
    drop(open(&at("child.vhd")));
    std::fs::rename(at("other.vhd"), at("base.vhd")).unwrap();
    let error = OpenOptions::new(Format::Vhd).open(at("child.vhd")).unwrap_err();
    assert!(matches!(error, Error::ParentChanged { .. }), "{error}");
}

#[test]
fn sizes_grow_and_limits_hold() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (n, kind) in [VhdKind::Fixed, VhdKind::Dynamic].into_iter().enumerate() {
        let path = dir.path().join(format!("{n}.vhd"));
        vhd(kind).create(&path).unwrap();
        let mut model = vec![0; SIZE as usize];
        let disk = open(&path);
        exercise(&disk, &mut model, &mut Rng(90), 30);
        disk.resize(40 << 20).unwrap();
        model.resize(40 << 20, 0);
        exercise(&disk, &mut model, &mut Rng(91), 30);
        assert!(disk.resize(1 << 20).is_err());
        drop(disk);
        assert_same(&open(&path), &model);
        assert_qemu_sees(&path, &model);
    }
    let path = dir.path().join("x.vhd");
    for bad in [(2040 << 30) + 512, 1000] {
        assert!(CreateOptions::new(Format::Vhd, bad).create(&path).is_err());
    }
    CreateOptions::new(Format::Vhd, 2040 << 30).create(&path).unwrap();
    let disk = open(&path);
    disk.write_at(&[5; 4096], (2040 << 30) - 4096).unwrap();
    drop(disk);
    qemu_ok("qemu-io", &["-f", "vpc", "-c", "read -P 5 2190433316864 4096", text(&path)]);
    for how in [Preallocation::Falloc, Preallocation::Full] {
        std::fs::remove_file(&path).unwrap();
        vhd(VhdKind::Fixed).preallocation(how).create(&path).unwrap();
        assert!(open(&path).layers()[0].storage().allocated().unwrap() >= SIZE);
    }
}

#[test]
fn hostile_headers_are_refused() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("h.vhd");
    vhd(VhdKind::Dynamic).create(&path).unwrap();
    open(&path).write_at(&[1; 6 << 20], 0).unwrap();
    let good = std::fs::read(&path).unwrap();
    let seal = |bytes: &mut [u8], field: usize| {
        bytes[field..field + 4].fill(0);
        let sum: u32 = bytes.iter().map(|b| u32::from(*b)).sum();
        bytes[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
    };
    let refused = |what: &str, change: &dyn Fn(&mut [u8])| {
        let mut bytes = good.clone();
        change(&mut bytes);
        seal(&mut bytes[..512], 64);
        seal(&mut bytes[512..1536], 36);
        std::fs::write(&path, &bytes).unwrap();
        let error = OpenOptions::new(Format::Vhd).open(&path).expect_err(what);
        assert!(matches!(error, Error::Unsupported { .. } | Error::Corrupt { .. }), "{what}: {error}");
    };
    refused("version", &|b| b[12] = 9);
    refused("type", &|b| b[63] = 6);
    refused("size", &|b| b[48..56].fill(0x7e));
    refused("header offset", &|b| b[16] = 0x70);
    refused("table offset", &|b| b[512 + 16] = 0x70);
    refused("table in the footer", &|b| b[512 + 16..512 + 24].fill(0));
    refused("block size", &|b| b[512 + 32..512 + 36].fill(0));
    refused("small table", &|b| b[512 + 28..512 + 32].copy_from_slice(&[0, 0, 0, 2]));
    refused("overlap", &|b| b.copy_within(1536..1540, 1540));
    refused("block in the table", &|b| b[1536..1540].copy_from_slice(&[0, 0, 0, 3]));
    refused("block beyond the end", &|b| b[1536..1540].copy_from_slice(&[0x7f, 0, 0, 3]));
    refused("differencing without a parent", &|b| b[63] = 4);
    // One damaged footer is survived, and a guest's first sector is never a header.
    let mut bytes = good.clone();
    let len = bytes.len();
    bytes[len - 512..].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    open(&path).write_at(&[2; 512], 8 << 20).unwrap();
    std::fs::remove_file(&path).unwrap();
    vhd(VhdKind::Fixed).create(&path).unwrap();
    open(&path).write_at(&good[..4096], 0).unwrap();
    let error = OpenOptions::new(Format::Vhd).open(&path).expect_err("an ambiguous image");
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
}
