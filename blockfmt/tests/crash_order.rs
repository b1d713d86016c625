//! Orders of events that only several threads bring about, made on purpose, and the crashes after them.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::LayerOptions;
use blockfmt::format::qcow2::{Qcow2, Qcow2Options, Repair};
use blockfmt::storage::{Fault, FaultStorage, MemoryStorage, Operation, RecordingStorage};
use blockfmt::{BackingRef, CreateOptions, Disk, Format, Layer, Storage};
use common::crash::{corruptions, each_loss, own_corruptions};
use common::wait_until_blocked;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

type Action = Box<dyn FnOnce() + Send>;

/// A qcow2 image whose next write can be made to wait for something else.
struct Rig {
    inner: Arc<MemoryStorage>,
    record: Arc<RecordingStorage>,
    before_write: Arc<Mutex<Option<Action>>>,
    layer: Arc<Qcow2>,
    disk: Disk,
}

impl Rig {
    fn new(size: u64, cluster_size: u64, below: Option<Arc<dyn Layer>>) -> Self {
        let inner = Arc::new(MemoryStorage::new());
        let options = Qcow2Options { cluster_size: Some(cluster_size), ..Qcow2Options::default() };
        let mut create = CreateOptions::new(Format::Qcow2, size).qcow2(options);
        if below.is_some() {
            create = create.backing("below", Format::Qcow2);
        }
        create.create_on(inner.clone()).unwrap();
        let inner = Arc::new(MemoryStorage::clone(&inner));
        let record = Arc::new(RecordingStorage::new(inner.clone()));
        let before_write: Arc<Mutex<Option<Action>>> = Arc::default();
        let armed = before_write.clone();
        let plan = move |operation, _| {
            if operation == Operation::Write {
                let action = armed.lock().unwrap().take();
                action.into_iter().for_each(|action| action());
            }
            Fault::Pass
        };
        let storage = Arc::new(FaultStorage::new(record.clone(), plan));
        let layer = Arc::new(Qcow2::open(storage, &LayerOptions::default()).unwrap());
        let layers = std::iter::once(layer.clone() as Arc<dyn Layer>).chain(below).collect();
        let disk = Disk::from_layers(layers, false).unwrap();
        Rig { inner, record, before_write, layer, disk }
    }

    /// Before the next write of the storage, `f` runs in another thread, to its end or until it has to wait for that
    /// write.
    fn race(&self, f: impl FnOnce(Disk) + Send + 'static) -> Arc<Mutex<Option<JoinHandle<()>>>> {
        let thread: Arc<Mutex<Option<JoinHandle<()>>>> = Arc::default();
        let (out, disk) = (thread.clone(), self.disk.clone());
        let action = move || {
            let (begun, begins) = mpsc::channel();
            let other = std::thread::spawn(move || {
                begun.send(std::fs::read_link("/proc/thread-self").unwrap()).unwrap();
                f(disk);
            });
            wait_until_blocked(&other, &begins.recv().unwrap());
            *out.lock().unwrap() = Some(other);
        };
        *self.before_write.lock().unwrap() = Some(Box::new(action));
        thread
    }

    fn table_offset(&self) -> [u8; 8] {
        self.inner.to_vec()[48..56].try_into().unwrap()
    }

    /// What is on the disk now is what `model` says, and consistent.
    fn check(&self, model: &[u8]) {
        let image = MemoryStorage::clone(&self.inner);
        assert_eq!(own_corruptions(&image), [""; 0]);
        assert_eq!(corruptions(&image, tempfile::tempdir().unwrap().path()), None);
        let layer = Qcow2::open(Arc::new(image), &LayerOptions::default()).unwrap();
        common::assert_same(&Disk::from_layers(vec![Arc::new(layer)], false).unwrap(), model);
    }
}

fn join(thread: &Mutex<Option<JoinHandle<()>>>) {
    thread.lock().unwrap().take().expect("there was a write").join().unwrap();
}

#[test]
fn payload_is_durable_before_its_entry_even_if_a_flush_came_between() {
    let size = 1 << 20;
    let base = Rig::new(size, 65536, None);
    base.disk.write_at(&vec![7; size as usize], 0).unwrap();
    base.disk.flush().unwrap();
    let top = Rig::new(size, 65536, Some(base.layer.clone()));
    let start = MemoryStorage::clone(&top.inner);
    top.disk.write_at(&[1; 512], 0).unwrap();
    top.disk.flush().unwrap();
    // The flush falls between the decision that the payload needs a barrier and the payload.
    let flush = top.race(|disk| disk.flush().unwrap());
    top.disk.write_at(&[2; 512], 65536).unwrap();
    join(&flush);
    top.disk.flush().unwrap();
    let mut crashes = 0;
    each_loss(&start, &top.record.group_events(), |image, lost, at| {
        crashes += 1;
        let layer = Qcow2::open(Arc::new(image), &LayerOptions::default()).unwrap();
        let disk = Disk::from_layers(vec![Arc::new(layer), base.layer.clone()], false).unwrap();
        let mut seen = vec![0; 65536];
        disk.read_at(&mut seen, 65536).unwrap();
        let (head, tail) = seen.split_at(512);
        assert!(head == [2; 512] || head == [7; 512], "crash at {at} without {lost}");
        assert!(tail.iter().all(|b| *b == 7), "crash at {at} without {lost}: what lies below is gone");
    });
    assert!(crashes > 3, "{crashes}");
}

#[test]
fn compressed_bytes_are_durable_before_their_entry_even_if_a_flush_came_between() {
    let rig = Rig::new(1 << 20, 65536, None);
    let mut compressor = rig.layer.compressor().unwrap();
    // The other one finds room behind this, without more of the file.
    rig.layer.write_compressed(0, compressor.compress(&[1; 65536]).unwrap()).unwrap();
    rig.disk.flush().unwrap();
    let start = MemoryStorage::clone(&rig.inner);
    let before = rig.record.group_events().len();
    let flush = rig.race(|disk| disk.flush().unwrap());
    rig.layer.write_compressed(65536, compressor.compress(&[2; 65536]).unwrap()).unwrap();
    join(&flush);
    rig.disk.flush().unwrap();
    let mut crashes = 0;
    each_loss(&start, &rig.record.group_events()[before..], |image, lost, at| {
        crashes += 1;
        let layer = Qcow2::open(Arc::new(image), &LayerOptions::default()).unwrap();
        let disk = Disk::from_layers(vec![Arc::new(layer)], false).unwrap();
        let mut seen = vec![0xa5; 65536];
        disk.read_at(&mut seen, 65536).unwrap_or_else(|e| panic!("crash at {at} without {lost}: {e}"));
        assert!(seen == [0; 65536] || seen == [2; 65536], "crash at {at} without {lost}");
    });
    assert!(crashes > 1, "{crashes}");
}

#[test]
fn references_beyond_the_end_of_the_file_are_found_and_repaired() {
    let rig = Rig::new(1 << 20, 65536, None);
    let mut model = vec![0; 1 << 20];
    model[..5 * 65536].fill(6);
    rig.disk.write_at(&model[..5 * 65536], 0).unwrap();
    rig.disk.close().unwrap();
    let image: Arc<dyn Storage> = Arc::new(MemoryStorage::clone(&rig.inner));
    // Two clusters were never written; what is left of a third one reads as zeros from its middle on.
    image.truncate(image.length().unwrap() - 5 * 32768).unwrap();
    model[5 * 32768..5 * 65536].fill(0);
    let layer = Qcow2::open(image.clone(), &LayerOptions::default()).unwrap();
    let found = layer.check(Repair::Nothing).unwrap();
    assert_eq!((found.corruptions, found.corruptions_fixed), (2, 0), "{:?}", found.findings);
    let repaired = layer.check(Repair::All).unwrap();
    assert_eq!((repaired.corruptions, repaired.corruptions_fixed), (0, 2), "{:?}", repaired.findings);
    common::assert_same(&Disk::from_layers(vec![Arc::new(layer)], false).unwrap(), &model);
}

/// A disk whose refcount table is nearly full, and what it holds.
fn nearly_full() -> (Rig, Vec<u8>) {
    let size = 16 << 20;
    let rig = Rig::new(size, 512, None);
    let mut model = vec![0; size as usize];
    model[..7600 << 10].fill(3);
    rig.disk.write_at(&model[..7600 << 10], 0).unwrap();
    rig.disk.flush().unwrap();
    (rig, model)
}

const MORE: (usize, usize) = (8 << 20, 12 << 20);

fn write_more(disk: &Disk) {
    disk.write_at(&vec![5; MORE.1 - MORE.0], MORE.0 as u64).unwrap();
}

#[test]
fn a_refcount_table_that_moves_during_a_flush_keeps_the_newest_counts() {
    let (rig, mut model) = nearly_full();
    // Clusters that become free in the middle are used again by the other thread, and there is a new block.
    rig.disk.discard(1 << 20, 1 << 20).unwrap();
    model[1 << 20..2 << 20].fill(0);
    rig.disk.flush().unwrap();
    rig.disk.write_at(&[4; 8192], 7600 << 10).unwrap();
    model[7600 << 10..(7600 << 10) + 8192].fill(4);
    let before = rig.table_offset();
    let writer = rig.race(|disk| write_more(&disk));
    rig.disk.flush().unwrap();
    join(&writer);
    model[MORE.0..MORE.1].fill(5);
    rig.disk.flush().unwrap();
    rig.check(&model);
    assert_ne!(rig.table_offset(), before, "the table has to move for this test");
}

#[test]
fn a_refcount_table_that_moves_during_a_change_of_the_header_is_found() {
    let (rig, mut model) = nearly_full();
    let before = rig.table_offset();
    let writer = rig.race(|disk| write_more(&disk));
    rig.layer.set_backing(Some(&BackingRef { path: "x".repeat(100), format: None })).unwrap();
    join(&writer);
    model[MORE.0..MORE.1].fill(5);
    rig.disk.flush().unwrap();
    rig.layer.set_backing(None).unwrap();
    rig.check(&model);
    assert_ne!(rig.table_offset(), before, "the table has to move for this test");
}
