//! VHDX: against a model, against QEMU in both directions, and differencing disks against libvhdi.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::check::Repair;
use blockfmt::format::vhdx::{VhdxKind, VhdxOptions};
use blockfmt::storage::{Event, MemoryStorage, RecordingStorage};
use blockfmt::{CreateOptions, Disk, Error, Format, OpenOptions, Preallocation, Storage};
use common::differencing::{Family, libvhdi_view};
use common::{Rng, assert_same, exercise, qemu, qemu_ok, text};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

const SIZE: u64 = (9 << 20) + 512 * 5;

fn vhdx(kind: VhdxKind) -> CreateOptions {
    let vhdx = VhdxOptions { kind, block_size: Some(1 << 20), ..VhdxOptions::default() };
    CreateOptions::new(Format::Vhdx, SIZE).vhdx(vhdx)
}

fn open(path: &Path) -> Disk {
    OpenOptions::new(Format::Vhdx).open(path).unwrap()
}

fn assert_qemu_sees(path: &Path, model: &[u8]) {
    let raw = path.with_extension("model");
    std::fs::write(&raw, model).unwrap();
    qemu_ok("qemu-img", &["check", "-f", "vhdx", text(path)]);
    let info = qemu_ok("qemu-img", &["info", "--output=json", "-f", "vhdx", text(path)]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], model.len() as u64);
    qemu_ok("qemu-img", &["compare", "-f", "vhdx", "-F", "raw", text(path), text(&raw)]);
}

fn assert_clean(disk: &Disk) {
    let report = disk.layers()[0].check(Repair::Nothing).unwrap();
    assert!(report.corruptions == 0, "{report:?}");
}

#[test]
fn images_follow_a_model_and_qemu_reads_them() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let blocks = [(VhdxKind::Fixed, 1 << 20), (VhdxKind::Dynamic, 1 << 20), (VhdxKind::Dynamic, 4 << 20)];
    for (n, (kind, block)) in blocks.into_iter().enumerate() {
        let path = dir.path().join(format!("{n}.vhdx"));
        let mut create = vhdx(kind);
        create.vhdx.block_size = Some(block);
        create.vhdx.zero_blocks = n == 2;
        create.create(&path).unwrap();
        let mut model = vec![0; SIZE as usize];
        let mut rng = Rng(50 + n as u64);
        for _ in 0..4 {
            let disk = open(&path);
            exercise(&disk, &mut model, &mut rng, 60);
            assert_same(&disk, &model);
            assert_clean(&disk);
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
    let options = [
        "subformat=dynamic",
        "subformat=dynamic,block_size=1M,block_state_zero=off",
        "subformat=dynamic,block_size=256M,log_size=4M",
        "subformat=fixed",
        "subformat=fixed,block_size=2M",
    ];
    for (n, options) in options.into_iter().enumerate() {
        let (raw, path) = (dir.path().join("src.raw"), dir.path().join(format!("{n}.vhdx")));
        let mut model = rng.bytes(SIZE as usize);
        model[1 << 20..7 << 20].fill(0);
        std::fs::write(&raw, &model).unwrap();
        let args = ["convert", "-f", "raw", "-O", "vhdx", "-o", options, text(&raw), text(&path)];
        qemu_ok("qemu-img", &args);
        let disk = open(&path);
        assert_eq!(disk.size(), SIZE, "{options}");
        assert_same(&disk, &model);
        exercise(&disk, &mut model, &mut rng, 100);
        assert_clean(&disk);
        drop(disk);
        assert_qemu_sees(&path, &model);
        qemu_ok("qemu-io", &["-f", "vhdx", "-c", "write -P 7 3M 100k", text(&path)]);
        model[3 << 20..(3 << 20) + (100 << 10)].fill(7);
        assert_same(&open(&path), &model);
    }
}

#[test]
fn a_log_that_qemu_left_is_replayed() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (path, copy) = (dir.path().join("dirty.vhdx"), dir.path().join("copy.vhdx"));
    let options = "block_size=1M,block_state_zero=off";
    qemu_ok("qemu-img", &["create", "-f", "vhdx", "-o", options, text(&path), "9M"]);
    qemu_ok("qemu-io", &["-f", "vhdx", "-c", "write -P 5 0 1M", text(&path)]);
    // The sector of the table that the next write changes, as the region table says.
    let bytes = std::fs::read(&path).unwrap();
    let bat = [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42];
    let at = (192 << 10) + bytes[192 << 10..].windows(8).position(|w| w == bat).unwrap();
    let table = u64::from_le_bytes(bytes[at + 16..at + 24].try_into().unwrap());
    let image = format!(
        "driver=vhdx,file.driver=blkdebug,file.image.driver=file,file.image.filename={},\
         file.inject-error.0.event=none,file.inject-error.0.iotype=write,file.inject-error.0.sector={}",
        text(&path),
        table / 512
    );
    let out = qemu("qemu-io", &["--image-opts", "-c", "write -P 6 4M 1M", &image]);
    let out = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.contains("rror"), "the fault did not happen: {out}");
    std::fs::copy(&path, &copy).unwrap();
    let mut model = vec![0; 9 << 20];
    model[..1 << 20].fill(5);
    model[4 << 20..5 << 20].fill(6);
    // In memory, if the image may not change.
    let disk = OpenOptions::new(Format::Vhdx).read_only(true).open(&path).unwrap();
    assert!(disk.layers()[0].info().unwrap().dirty_flag);
    assert_same(&disk, &model);
    drop(disk);
    assert!(std::fs::read(&path).unwrap() == std::fs::read(&copy).unwrap(), "a read-only image changed");
    assert_same(&open(&path), &model);
    assert!(!open(&path).layers()[0].info().unwrap().dirty_flag);
    assert_qemu_sees(&path, &model);
}

#[test]
fn qemu_replays_our_log() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("dirty.vhdx");
    let record = Arc::new(RecordingStorage::new(Arc::new(MemoryStorage::new())));
    vhdx(VhdxKind::Dynamic).create_on(record.clone()).unwrap();
    let disk = OpenOptions::new(Format::Vhdx).open_storage(record.clone(), "x").unwrap();
    let mut model = vec![0; SIZE as usize];
    let mut rng = Rng(65);
    for n in 0..6 {
        let data = rng.bytes(70_000);
        let at = (n * 1_500_000) as usize;
        disk.write_at(&data, at as u64).unwrap();
        model[at..at + 70_000].copy_from_slice(&data);
        disk.flush().unwrap();
        // After the last flush, before the pages are in their places: those writes are lost.
        let events = record.events();
        let durable = events.iter().rposition(|e| *e == Event::Flush).unwrap();
        let image = MemoryStorage::new();
        let storage: &dyn Storage = &image;
        for event in &events[..durable] {
            match event {
                Event::Write { offset, data } => storage.write_at(data, *offset).unwrap(),
                Event::Zero { offset, len } => storage.zero(*offset, *len, true).unwrap(),
                Event::SetLen(len) => storage.truncate(*len).unwrap(),
                Event::Flush | Event::Mark(_) => {}
            }
        }
        std::fs::write(&path, image.to_vec()).unwrap();
        let out = qemu("qemu-img", &["check", "-r", "all", "-f", "vhdx", text(&path)]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_qemu_sees(&path, &model);
        assert_same(&open(&path), &model);
    }
}

const FAMILY: Family =
    Family { format: Format::Vhdx, create: || vhdx(VhdxKind::Dynamic), assert_qemu_sees, assert_clean };

#[test]
fn differencing_disks_agree_with_libvhdi() {
    FAMILY.agrees_with_libvhdi();
}

#[test]
#[ignore = "needs a Python with the package dissect.hypervisor; tests/stages/disk-readers brings one"]
fn differencing_disks_agree_with_dissect() {
    let python =
        std::env::var_os("NACRE_DISSECT").expect("NACRE_DISSECT names the Python with dissect.hypervisor");
    let script = "\
import sys, pathlib, dissect.hypervisor.disk.vhdx as vhdx
disk = vhdx.VHDX(pathlib.Path(sys.argv[1]))
sys.stdout.buffer.write(disk.read(disk.size))";
    FAMILY.agrees_with(false, |chain| {
        // It finds the parents itself.
        let output = Command::new(&python).args(["-c", script]).arg(chain[0]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    });
}

#[test]
fn chains_mix_formats_and_merge() {
    FAMILY.mixes_and_merges();
}

#[test]
fn a_changed_parent_is_noticed() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let at = |name: &str| dir.path().join(name);
    vhdx(VhdxKind::Dynamic).create(&at("base.vhdx")).unwrap();
    vhdx(VhdxKind::Dynamic).backing("base.vhdx", Format::Vhdx).create(&at("child.vhdx")).unwrap();
    drop(open(&at("child.vhdx")));
    drop(open(&at("base.vhdx")));
    drop(open(&at("child.vhdx")));
    open(&at("base.vhdx")).write_at(&[1; 512], 0).unwrap();
    let error = OpenOptions::new(Format::Vhdx).open(at("child.vhdx")).unwrap_err();
    assert!(matches!(error, Error::ParentChanged { .. }), "{error}");
}

#[test]
fn sizes_grow_and_limits_hold() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (n, kind) in [VhdxKind::Fixed, VhdxKind::Dynamic].into_iter().enumerate() {
        let path = dir.path().join(format!("{n}.vhdx"));
        vhdx(kind).create(&path).unwrap();
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
    // A table that has to move: 2^17 blocks of 1 MiB fill its first mebibyte.
    let path = dir.path().join("large.vhdx");
    CreateOptions { size: 8 << 30, ..vhdx(VhdxKind::Dynamic) }.create(&path).unwrap();
    let disk = open(&path);
    disk.write_at(&[5; 4096], (8 << 30) - 4096).unwrap();
    disk.resize(1 << 40).unwrap();
    disk.write_at(&[6; 4096], (1 << 40) - 4096).unwrap();
    assert_clean(&disk);
    drop(disk);
    let read =
        ["-c", "read -P 5 8589930496 4096", "-c", "read -P 6 1099511623680 4096", "-c", "read -P 0 100G 1M"];
    let out = qemu_ok("qemu-io", &[&["-f", "vhdx"], &read[..], &[text(&path)]].concat());
    assert!(!out.contains("failed"), "{out}");
    qemu_ok("qemu-img", &["check", "-f", "vhdx", text(&path)]);
    // A child that was smaller than its parent does not show it when it grows.
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("base.raw"), vec![7; 8 << 20]).unwrap();
    let small = CreateOptions { size: 3 << 19, ..vhdx(VhdxKind::Dynamic) };
    small.backing("base.raw", Format::Raw).create(&at("child.vhdx")).unwrap();
    let disk = open(&at("child.vhdx"));
    disk.resize(5 << 20).unwrap();
    let mut model = vec![0; 5 << 20];
    model[..3 << 19].fill(7);
    assert_same(&disk, &model);
    drop(disk);
    assert_same(&open(&at("child.vhdx")), &model);
    for bad in [(64 << 40) + 512, 1000] {
        assert!(CreateOptions::new(Format::Vhdx, bad).create(&at("x")).is_err());
    }
    for how in [Preallocation::Falloc, Preallocation::Full] {
        vhdx(VhdxKind::Fixed).preallocation(how).create(&at("x")).unwrap();
        assert!(open(&at("x")).layers()[0].storage().allocated().unwrap() >= SIZE);
        std::fs::remove_file(at("x")).unwrap();
    }
    CreateOptions::new(Format::Vhdx, 64 << 40).create(&at("x")).unwrap();
    open(&at("x")).write_at(&[1; 512], (64 << 40) - 512).unwrap();
}

#[test]
fn hostile_images_are_refused_and_repaired() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("h.vhdx");
    vhdx(VhdxKind::Dynamic).create(&path).unwrap();
    open(&path).write_at(&[1; 6 << 20], 0).unwrap();
    let good = std::fs::read(&path).unwrap();
    const TABLE: usize = 3 << 20;
    let seal = |bytes: &mut [u8]| {
        bytes[4..8].fill(0);
        let sum = crc32c::crc32c(bytes);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    };
    let write = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = good.clone();
        change(&mut bytes);
        for (at, len) in [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 65536), (256 << 10, 65536)] {
            seal(&mut bytes[at..at + len]);
        }
        std::fs::write(&path, &bytes).unwrap();
    };
    let both = |b: &mut [u8], first: usize, distance: usize, at: usize, value: &[u8]| {
        for copy in [first, first + distance] {
            b[copy + at..copy + at + value.len()].copy_from_slice(value);
        }
    };
    let header = |b: &mut [u8], at, value: &[u8]| both(b, 64 << 10, 64 << 10, at, value);
    let regions = |b: &mut [u8], at, value: &[u8]| both(b, 192 << 10, 64 << 10, at, value);
    let refused = |what: &str, change: &dyn Fn(&mut [u8])| {
        write(change);
        let error = OpenOptions::new(Format::Vhdx).open(&path).expect_err(what);
        assert!(matches!(error, Error::Unsupported { .. } | Error::Corrupt { .. }), "{what}: {error}");
    };
    write(&|b| b[0] = 0);
    assert!(matches!(OpenOptions::new(Format::Vhdx).open(&path), Err(Error::WrongFormat { .. })));
    refused("version", &|b| header(b, 66, &[9]));
    refused("log version", &|b| header(b, 48, &[1; 17]));
    refused("log offset", &|b| header(b, 72, &[0; 8]));
    refused("log beyond the end", &|b| header(b, 72, &(1u64 << 40).to_le_bytes()));
    refused("log length", &|b| header(b, 68, &0xfff0_0000u32.to_le_bytes()));
    refused("region count", &|b| regions(b, 8, &[0xff; 4]));
    refused("unknown region", &|b| regions(b, 16, &[0xff; 16]));
    refused("region offset", &|b| regions(b, 32, &[0; 8]));
    refused("overlapping regions", &|b| regions(b, 32, &(2u64 << 20).to_le_bytes()));
    refused("metadata signature", &|b| b[2 << 20] = 0);
    refused("metadata count", &|b| b[(2 << 20) + 10..(2 << 20) + 12].fill(0xff));
    refused("metadata item beyond the end", &|b| b[(2 << 20) + 32 + 17..(2 << 20) + 32 + 20].fill(0xff));
    refused("block size", &|b| b[(2 << 20) + 65536..(2 << 20) + 65540].fill(0x7e));
    refused("parent without a locator", &|b| b[(2 << 20) + 65540] |= 2);
    refused("disk size", &|b| b[(2 << 20) + 65544..(2 << 20) + 65552].fill(0x7e));
    refused("table too small", &|b| b[(2 << 20) + 65550] = 0x10);
    refused("state", &|b| b[TABLE] = b[TABLE] & !7 | 4);
    refused("partial without a parent", &|b| b[TABLE] |= 7);
    refused("overlap", &|b| b.copy_within(TABLE..TABLE + 8, TABLE + 8));
    refused("block in the headers", &|b| b[TABLE..TABLE + 8].copy_from_slice(&6u64.to_le_bytes()));
    refused("block beyond the end", &|b| b[TABLE + 5] = 0x70);
    // An entry that contradicts another can be removed.
    write(&|b| b.copy_within(TABLE..TABLE + 8, TABLE + 8));
    let disk = OpenOptions::new(Format::Vhdx).repair(true).open(&path).unwrap();
    let report = disk.layers()[0].check(Repair::All).unwrap();
    assert!(report.corruptions == 0 && report.corruptions_fixed == 1, "{report:?}");
    drop(disk);
    assert_clean(&open(&path));
    qemu_ok("qemu-img", &["check", "-f", "vhdx", text(&path)]);
    // One damaged copy of anything is survived, found and repaired; space at the end is given back.
    let mut bytes = good.clone();
    bytes[(64 << 10) + 100] ^= 1;
    bytes[(192 << 10) + 100] ^= 1;
    bytes.resize(bytes.len() + (5 << 20), 9);
    std::fs::write(&path, &bytes).unwrap();
    let disk = open(&path);
    let report = disk.layers()[0].check(Repair::Nothing).unwrap();
    assert_eq!((report.corruptions, report.leaks), (2, 5), "{report:?}");
    let report = disk.layers()[0].check(Repair::All).unwrap();
    assert!(report.is_clean(), "{report:?}");
    // What lay there is not read when the space is used again.
    disk.write_at(&[3; 512], 8 << 20).unwrap();
    let mut seen = vec![1; 4096];
    disk.read_at(&mut seen, (8 << 20) + 512).unwrap();
    assert!(seen.iter().all(|b| *b == 0));
}
