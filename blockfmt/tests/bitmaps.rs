//! Persistent bitmaps, shared with QEMU.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::qcow2::Repair;
use blockfmt::storage::MemoryStorage;
use blockfmt::{CreateOptions, Disk, Error, Format, Layer, OpenOptions};
use common::{Rng, exercise, qemu_ok, text};
use std::path::Path;
use std::sync::Arc;

const SIZE: u64 = 8 << 20;
const GRANULE: u64 = 65536;

fn open(path: &Path) -> (Disk, Arc<dyn Layer>) {
    let disk = OpenOptions::new(Format::Qcow2).open(path).unwrap();
    let layer = disk.layers().remove(0);
    (disk, layer)
}

/// The granules that a bitmap marks.
fn marked(layer: &Arc<dyn Layer>, name: &str) -> Vec<u64> {
    let map = layer.as_qcow2().unwrap().bitmap(name).unwrap();
    (0..map.granules()).filter(|g| map.get(*g)).collect()
}

#[test]
fn bitmaps_record_across_opens_and_programs() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("b.qcow2");
    CreateOptions::new(Format::Qcow2, SIZE).create(&path).unwrap();
    let (disk, layer) = open(&path);
    disk.write_at(&[1; 4096], 0).unwrap();
    layer.as_qcow2().unwrap().add_bitmap("ours", GRANULE).unwrap();
    assert!(matches!(layer.as_qcow2().unwrap().add_bitmap("ours", GRANULE), Err(Error::Exists { .. })));
    disk.write_at(&[1; 10], 3 * GRANULE + 5).unwrap();
    disk.discard(7 * GRANULE, 2 * GRANULE).unwrap();
    assert_eq!(marked(&layer, "ours"), [3, 7, 8]);
    disk.close().unwrap();
    // A closed disk that is written again is recorded again.
    disk.write_zeroes(20 * GRANULE, 100, true).unwrap();
    drop((disk, layer));
    qemu_ok("qemu-img", &["check", "-f", "qcow2", text(&path)]);

    let info = qemu_ok("qemu-img", &["info", "-f", "qcow2", text(&path)]);
    assert!(info.contains("name: ours") && !info.contains("in-use"), "{info}");
    qemu_ok("qemu-img", &["bitmap", "-f", "qcow2", "--add", "-g", "64k", text(&path), "theirs"]);
    qemu_ok("qemu-io", &["-f", "qcow2", "-c", "write -P 9 2M 128k", text(&path)]);

    let (disk, layer) = open(&path);
    assert_eq!(marked(&layer, "ours"), [3, 7, 8, 20, 32, 33]);
    assert_eq!(marked(&layer, "theirs"), [32, 33]);
    let mut model = vec![0; SIZE as usize];
    disk.read_at(&mut model, 0).unwrap();
    exercise(&disk, &mut model, &mut Rng(8), 50);
    layer.as_qcow2().unwrap().remove_bitmap("ours").unwrap();
    let names: Vec<_> = layer.as_qcow2().unwrap().bitmaps().unwrap().into_iter().map(|b| b.name).collect();
    assert_eq!(names, ["theirs"]);
    let before = marked(&layer, "theirs");
    drop((disk, layer));
    let (disk, layer) = open(&path);
    assert_eq!(marked(&layer, "theirs"), before);
    layer.as_qcow2().unwrap().remove_bitmap("theirs").unwrap();
    drop((disk, layer));
    qemu_ok("qemu-img", &["check", "-f", "qcow2", text(&path)]);
}

#[test]
fn bitmaps_are_cleared_merged_and_stopped_as_by_qemu() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (ours, theirs) = (dir.path().join("ours.qcow2"), dir.path().join("theirs.qcow2"));
    for path in [&ours, &theirs] {
        let path = text(path);
        qemu_ok("qemu-img", &["create", "-q", "-f", "qcow2", path, "8M"]);
        qemu_ok("qemu-img", &["bitmap", "--add", "-g", "64k", path, "fine"]);
        qemu_ok("qemu-img", &["bitmap", "--add", "-g", "1M", path, "coarse"]);
        qemu_ok("qemu-io", &["-f", "qcow2", "-c", "write 192k 64k", "-c", "write 3M 1M", path]);
        qemu_ok("qemu-img", &["bitmap", "--clear", path, "coarse"]);
        qemu_ok("qemu-io", &["-f", "qcow2", "-c", "write 5M 4k", path]);
    }
    let path = text(&theirs);
    qemu_ok("qemu-img", &["bitmap", "--merge", "coarse", path, "fine"]);
    qemu_ok("qemu-img", &["bitmap", "--merge", "fine", path, "coarse"]);
    qemu_ok("qemu-img", &["bitmap", "--disable", path, "coarse"]);
    let (disk, layer) = open(&ours);
    let image = layer.as_qcow2().unwrap();
    image.merge_bitmap("fine", &image.bitmap("coarse").unwrap()).unwrap();
    image.merge_bitmap("coarse", &image.bitmap("fine").unwrap()).unwrap();
    image.enable_bitmap("coarse", false).unwrap();
    assert!(matches!(image.enable_bitmap("medium", true), Err(Error::NotFound { .. })));
    assert_eq!(marked(&layer, "coarse"), [0, 3, 5]);
    disk.write_at(&[1; 512], 7 << 20).unwrap();
    drop((disk, layer));
    qemu_ok("qemu-io", &["-f", "qcow2", "-c", "write 7M 4k", path]);
    let ((first, left), (_, right)) = (open(&ours), open(&theirs));
    for name in ["fine", "coarse"] {
        assert_eq!(marked(&left, name), marked(&right, name), "{name}");
    }
    assert_eq!(left.as_qcow2().unwrap().bitmaps().unwrap(), right.as_qcow2().unwrap().bitmaps().unwrap());
    left.as_qcow2().unwrap().enable_bitmap("coarse", true).unwrap();
    left.as_qcow2().unwrap().clear_bitmap("fine").unwrap();
    first.write_at(&[1; 512], 6 << 20).unwrap();
    assert_eq!((marked(&left, "fine"), marked(&left, "coarse")), (vec![96], vec![0, 3, 5, 6]));
    drop((first, left));
    qemu_ok("qemu-img", &["check", "-f", "qcow2", text(&ours)]);
}

#[test]
fn a_bitmap_that_was_not_stored_is_not_trusted() {
    let storage = Arc::new(MemoryStorage::new());
    CreateOptions::new(Format::Qcow2, SIZE).create_on(storage.clone()).unwrap();
    let open = |storage: &Arc<MemoryStorage>| {
        OpenOptions::new(Format::Qcow2).open_storage(storage.clone(), "memory").unwrap()
    };
    let disk = open(&storage);
    disk.layers()[0].as_qcow2().unwrap().add_bitmap("b", GRANULE).unwrap();
    disk.write_at(&[1; 512], 0).unwrap();
    disk.flush().unwrap();
    // A crash now.
    let crashed = Arc::new(MemoryStorage::clone(&storage));
    let after = open(&crashed);
    let layer = after.layers().remove(0);
    let image = layer.as_qcow2().unwrap();
    assert!(image.bitmaps().unwrap()[0].inconsistent);
    assert!(matches!(image.bitmap("b"), Err(Error::Corrupt { .. })));
    assert!(matches!(image.clear_bitmap("b"), Err(Error::Corrupt { .. })));
    image.remove_bitmap("b").unwrap();
    assert_eq!(image.check(Repair::Nothing).unwrap().corruptions, 0);
}

#[test]
fn a_damaged_bitmap_is_not_enabled() {
    let mut storage = Arc::new(MemoryStorage::new());
    CreateOptions::new(Format::Qcow2, SIZE).create_on(storage.clone()).unwrap();
    let open = |storage: &Arc<MemoryStorage>| {
        OpenOptions::new(Format::Qcow2).open_storage(storage.clone(), "memory").unwrap()
    };
    let disk = open(&storage);
    let layer = disk.layers().remove(0);
    layer.as_qcow2().unwrap().add_bitmap("b", GRANULE).unwrap();
    layer.as_qcow2().unwrap().enable_bitmap("b", false).unwrap();
    disk.close().unwrap();
    drop((disk, layer));
    // Its entry in the directory: entries of the table, flags, type, granularity, lengths, name.
    let mut bytes = storage.to_vec();
    let entry = [0, 0, 0, 1, 0, 0, 0, 0, 1, 16, 0, 1, 0, 0, 0, 0, b'b'];
    let places: Vec<_> = (0..bytes.len() - 17).filter(|at| bytes[*at..].starts_with(&entry)).collect();
    assert!(!places.is_empty());
    places.iter().for_each(|at| bytes[at + 3] = 2);
    storage = Arc::new(MemoryStorage::from_bytes(&bytes));
    let layer = open(&storage).layers().remove(0);
    assert!(matches!(layer.as_qcow2().unwrap().enable_bitmap("b", true), Err(Error::Corrupt { .. })));
    drop(layer);
    open(&storage).write_at(&[1; 512], 0).unwrap();
}
