//! Images that are put on top of others while a disk is used.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::disk::Preallocation;
use blockfmt::format::qcow2::Qcow2Options;
use blockfmt::{CreateOptions, Disk, Error, Format, OpenOptions, Source};
use common::{Rng, assert_same, qemu_ok, text};
use std::path::Path;

const SIZE: u64 = 8 << 20;

fn qcow2() -> CreateOptions {
    CreateOptions::new(Format::Qcow2, 0)
}

/// A raw image with random contents, and what they are.
fn base(dir: &Path) -> (Disk, Vec<u8>) {
    let bytes = Rng(7).bytes(SIZE as usize);
    std::fs::write(dir.join("base"), &bytes).unwrap();
    (OpenOptions::new(Format::Raw).open(dir.join("base")).unwrap(), bytes)
}

/// Cluster size of the active layer, and whether it has subclusters.
fn shape(disk: &Disk) -> (u64, bool) {
    let info = disk.layers()[0].info().unwrap();
    (info.cluster_size.unwrap(), info.format_specific["data"]["extended-l2"].as_bool().unwrap())
}

/// Offset, length and source of everything that the active layer holds.
fn held(disk: &Disk) -> Vec<(u64, u64, Source)> {
    let (layer, mut out, mut at) = (disk.layers().remove(0), Vec::new(), 0);
    while at < SIZE {
        let extent = layer.map(at, SIZE - at).unwrap();
        if extent.source != Source::Below {
            out.push((at, extent.len, extent.source));
        }
        at += extent.len;
    }
    out
}

#[test]
fn overlays_have_subclusters_unless_options_say_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (disk, _) = base(dir.path());
    disk.snapshot(&at("1"), &qcow2()).unwrap();
    assert_eq!(shape(&disk), (128 << 10, true));
    disk.snapshot(&at("2"), &qcow2()).unwrap();
    disk.roll_back(1, &at("3"), &qcow2()).unwrap();
    assert_eq!(shape(&disk), (128 << 10, true));
    let child = disk.create_child(&at("4"), &qcow2()).unwrap();
    Disk::push_layers(&[(disk.clone(), child)]).unwrap();
    assert_eq!(shape(&disk), (128 << 10, true));

    for (n, (list, expected)) in [
        ("extended_l2=off", (64 << 10, false)),
        ("cluster_size=16k", (16 << 10, false)),
        ("cluster_size=64k,extended_l2=on", (64 << 10, true)),
        ("compat=0.10", (64 << 10, false)),
    ]
    .into_iter()
    .enumerate()
    {
        let mut options = qcow2();
        options.apply(list).unwrap();
        disk.snapshot(&at(&format!("option{n}")), &options).unwrap();
        assert_eq!(shape(&disk), expected, "{list}");
    }
    drop(disk);
    let open = OpenOptions::new(Format::Qcow2).non_persistent(dir.path());
    assert_eq!(shape(&open.open(at("4")).unwrap()), (128 << 10, true));
    // An image of its own has what qemu-img gives it, with a parent, too.
    let image = at("plain");
    CreateOptions::new(Format::Qcow2, SIZE).backing("base", Format::Raw).create(&image).unwrap();
    assert_eq!(shape(&OpenOptions::new(Format::Qcow2).open(&image).unwrap()), (64 << 10, false));
}

#[test]
fn requests_of_pages_copy_nothing_from_below() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (disk, mut model) = base(dir.path());
    let top = dir.path().join("top");
    disk.snapshot(&top, &qcow2()).unwrap();
    let empty = disk.layers()[0].info().unwrap().actual_size;
    assert!(empty <= 8 * 4096, "an empty overlay takes {empty} bytes");
    for n in 0..8 {
        let offset = n * (1 << 20) + n * 4096;
        disk.write_at(&[n as u8; 4096], offset).unwrap();
        model[offset as usize..offset as usize + 4096].fill(n as u8);
    }
    // A part of a page takes the rest of it along, and no more.
    disk.write_at(&[9; 100], 300_000).unwrap();
    model[300_000..300_100].fill(9);
    let data: Vec<_> = held(&disk).iter().map(|(at, len, _)| (*at, *len)).collect();
    let mut expected: Vec<_> = (0..8).map(|n| (n * (1 << 20) + n * 4096, 4096)).collect();
    expected.insert(1, (300_000 / 4096 * 4096, 4096));
    assert_eq!(data, expected);

    // Zeros and discards go by pages as well, and take no space.
    for (offset, zero) in [(5 << 20, true), (6 << 20, false), ((1 << 20) + 4096, true), (300_000, true)] {
        let len = 12288;
        match zero {
            true => disk.write_zeroes(offset, len, true).unwrap(),
            false => disk.discard(offset, len).unwrap(),
        }
        model[offset as usize..(offset + len) as usize].fill(0);
    }
    let found = held(&disk);
    let zeros: Vec<_> = found.iter().filter(|(.., source)| matches!(source, Source::Zero { .. })).collect();
    let start = 300_000u64.next_multiple_of(4096);
    let zeros: Vec<_> = zeros.iter().map(|(at, len, _)| (*at, *len)).collect();
    assert_eq!(zeros, [(start, 8192), ((1 << 20) + 4096, 12288), (5 << 20, 12288), (6 << 20, 12288)]);
    disk.flush().unwrap();
    assert_same(&disk, &model);
    let taken = disk.layers()[0].info().unwrap().actual_size - empty;
    // Eight pages less the one that was zeroed, two at the ends of a range of zeros; an L2 table and refcounts.
    assert!(taken <= 9 * 4096 + 2 * (128 << 10), "{taken} bytes");
    drop(disk);
    qemu_ok("qemu-img", &["check", "-f", "qcow2", text(&top)]);
    let raw = dir.path().join("view");
    qemu_ok("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&top), text(&raw)]);
    assert!(std::fs::read(raw).unwrap() == model, "QEMU sees something else");
}

#[test]
fn a_cluster_that_is_zeroed_piece_by_piece_is_released() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (disk, mut model) = base(dir.path());
    let top = dir.path().join("top");
    disk.snapshot(&top, &qcow2()).unwrap();
    let cluster = 128 << 10;
    disk.write_at(&vec![5; cluster], 0).unwrap();
    for offset in (0..cluster as u64).step_by(4096) {
        disk.discard(offset, 4096).unwrap();
    }
    model[..cluster].fill(0);
    assert_eq!(held(&disk), [(0, cluster as u64, Source::Zero { allocated: false })]);
    // What is written to it next shows zeros around.
    disk.write_at(&[6; 100], 5000).unwrap();
    model[5000..5100].fill(6);
    disk.close().unwrap();
    assert_same(&disk, &model);
    drop(disk);
    qemu_ok("qemu-img", &["check", "-f", "qcow2", text(&top)]);
}

#[test]
fn preallocated_children_show_their_parents() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (disk, mut model) = base(dir.path());
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        let path = dir.path().join(format!("{preallocation:?}"));
        let options = qcow2().preallocation(preallocation);
        disk.snapshot(&path, &options).unwrap();
        assert_same(&disk, &model);
        assert_eq!(held(&disk), []);
        disk.write_at(&[3; 5000], 777_777).unwrap();
        model[777_777..782_777].fill(3);
        disk.close().unwrap();
        assert_same(&disk, &model);
        qemu_ok("qemu-img", &["check", "-U", "-f", "qcow2", text(&path)]);
    }
    let plain = Qcow2Options { extended_l2: Some(false), ..Qcow2Options::default() };
    let refused = disk
        .snapshot(&dir.path().join("hides"), &qcow2().qcow2(plain).preallocation(Preallocation::Metadata));
    assert!(matches!(refused, Err(Error::InvalidOption(_))), "{refused:?}");
}
