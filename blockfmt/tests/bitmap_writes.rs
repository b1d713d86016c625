//! Bitmaps that are changed while the disk is written, closed and copied: none may lack a change that was acknowledged.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::qcow2::{Qcow2, Repair};
use blockfmt::job::{self, DirtyMap, JobControl};
use blockfmt::queue::{Engine, Queue, QueueOptions, Request};
use blockfmt::storage::{Event, Fault, FaultStorage, MemoryStorage, RecordingStorage};
use blockfmt::{CreateOptions, Disk, Error, Format, Layer, OpenOptions, Storage};
use common::{Rng, qemu_ok, text};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const SIZE: u64 = 4 << 20;
const GRANULE: u64 = 4096;
const GRANULES: u64 = SIZE / GRANULE;

fn create(path: &Path) -> Disk {
    CreateOptions::new(Format::Qcow2, SIZE).create(path).unwrap();
    OpenOptions::new(Format::Qcow2).open(path).unwrap()
}

fn open_on(storage: Arc<dyn Storage>) -> Result<(Disk, Arc<dyn Layer>), Error> {
    let disk = OpenOptions::new(Format::Qcow2).open_storage(storage, "memory")?;
    let layer = disk.layers().remove(0);
    Ok((disk, layer))
}

fn image(layer: &Arc<dyn Layer>) -> &Qcow2 {
    layer.as_qcow2().unwrap()
}

/// When granules were last written: by the number of the write, as it began.
struct Writes {
    clock: AtomicU64,
    /// Acknowledged ones only.
    last: Vec<AtomicU64>,
    stop: AtomicBool,
}

impl Writes {
    fn new() -> Self {
        Writes {
            clock: AtomicU64::new(1),
            last: (0..GRANULES).map(|_| AtomicU64::new(0)).collect(),
            stop: AtomicBool::new(false),
        }
    }

    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn acknowledged(&self, granule: u64, began: u64) {
        self.last[granule as usize].fetch_max(began, Ordering::SeqCst);
    }

    /// Changes granules with the methods of the disk until it is told to stop.
    fn run(&self, disk: &Disk, seed: u64) {
        let mut rng = Rng(seed);
        while !self.stop.load(Ordering::SeqCst) {
            let began = self.now();
            let granule = rng.below(GRANULES);
            let offset = granule * GRANULE;
            match rng.below(8) {
                0 => disk.write_zeroes(offset, GRANULE, true).unwrap(),
                1 => disk.discard(offset, GRANULE).unwrap(),
                _ => disk.write_at(&rng.bytes(512), offset + rng.below(8) * 512).unwrap(),
            }
            self.acknowledged(granule, began);
        }
    }

    /// Writes granules with a queue until it is told to stop.
    fn run_queue(&self, disk: &Disk, seed: u64, engine: Option<Engine>) {
        let mut rng = Rng(seed);
        let mut queue = Queue::new(disk, QueueOptions { depth: 16, threads: 2, engine }).unwrap();
        let mut flights = vec![None; 16];
        let mut completions = Vec::new();
        loop {
            let stop = self.stop.load(Ordering::SeqCst);
            for (tag, flight) in flights.iter_mut().enumerate().filter(|(_, f)| f.is_none() && !stop) {
                let granule = rng.below(GRANULES);
                *flight = Some((granule, self.now()));
                let from = rng.bytes(GRANULE as usize).into();
                queue.push(tag as u64, Request::Write { offset: granule * GRANULE, from }).unwrap();
            }
            if queue.wait(&mut completions) == 0 {
                return;
            }
            for completion in completions.drain(..) {
                completion.result.unwrap();
                let (granule, began) = flights[completion.tag as usize].take().unwrap();
                self.acknowledged(granule, began);
            }
        }
    }

    /// Panics unless a bitmap has marked what was written since `since`.
    fn check(&self, image: &Qcow2, name: &str, since: u64) {
        // First what was acknowledged, then the bitmap.
        let last: Vec<u64> = self.last.iter().map(|last| last.load(Ordering::SeqCst)).collect();
        let map = image.bitmap(name).unwrap();
        for (granule, written) in last.iter().enumerate().filter(|(_, written)| **written > since) {
            let what = format!("{name:?} lacks granule {granule} of write {written}, since {since}");
            assert!(map.get(granule as u64), "{what}");
        }
    }
}

/// Tells other threads to stop, even if this one panics.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The contents of a whole disk.
fn contents(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Calls `f` while several threads write.
fn while_written(disk: &Disk, writes: &Writes, f: impl FnOnce()) {
    std::thread::scope(|scope| {
        for seed in [3, 5] {
            scope.spawn(move || writes.run(disk, seed));
        }
        for (seed, engine) in [(7, None), (9, Some(Engine::Threads))] {
            scope.spawn(move || writes.run_queue(disk, seed, engine));
        }
        let _stop = SetOnDrop(&writes.stop);
        f();
    });
}

#[test]
fn what_was_written_since_a_bitmap_was_enabled_or_cleared_is_in_it() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("b.qcow2");
    let disk = create(&path);
    let layer = disk.layers().remove(0);
    let image = image(&layer);
    let writes = Writes::new();
    let names = ["a", "b", "c"];
    // Since when each records, as far as it does.
    let mut since: [Option<u64>; 3] = [None; 3];
    while_written(&disk, &writes, || {
        let mut rng = Rng(11);
        for step in 0..400 {
            let n = rng.below(3) as usize;
            let (name, exists) = (names[n], image.bitmap(names[n]).is_ok());
            match rng.below(8) {
                _ if !exists => {
                    image.add_bitmap(name, GRANULE).unwrap();
                    since[n] = Some(writes.now());
                }
                0 => {
                    image.remove_bitmap(name).unwrap();
                    since[n] = None;
                }
                1 => {
                    image.clear_bitmap(name).unwrap();
                    since[n] = since[n].map(|_| writes.now());
                }
                2 => {
                    image.enable_bitmap(name, false).unwrap();
                    since[n] = None;
                }
                3 | 4 => {
                    image.enable_bitmap(name, true).unwrap();
                    since[n] = since[n].or_else(|| Some(writes.now()));
                }
                5 => {
                    // Now this one has what the other one has.
                    let other = (n + 1) % 3;
                    if let Ok(map) = image.bitmap(names[other]) {
                        image.merge_bitmap(name, &map).unwrap();
                        since[n] = since[n].map(|n| n.min(since[other].unwrap_or(u64::MAX)));
                    }
                }
                _ => match step % 2 {
                    0 => disk.close().unwrap(),
                    _ => layer.close().unwrap(), // which does not keep requests out
                },
            }
            for (name, since) in names.iter().zip(since) {
                if let Some(since) = since {
                    writes.check(image, name, since);
                }
            }
        }
    });
    for (name, since) in names.iter().zip(since) {
        image.bitmap(name).is_err().then(|| image.add_bitmap(name, GRANULE).unwrap());
        if let Some(since) = since {
            writes.check(image, name, since);
        }
    }
    drop(disk);
    layer.close().unwrap();
    drop(layer);
    qemu_ok("qemu-img", &["check", "-f", "qcow2", text(&path)]);
    let disk = OpenOptions::new(Format::Qcow2).open(&path).unwrap();
    let layer = disk.layers().remove(0);
    for (name, since) in names.iter().zip(since) {
        if let Some(since) = since {
            writes.check(layer.as_qcow2().unwrap(), name, since);
        }
    }
}

#[test]
fn incremental_backups_of_a_disk_that_is_written_miss_nothing() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let disk = create(&dir.path().join("b.qcow2"));
    let layer = disk.layers().remove(0);
    let image = image(&layer);
    let target = dir.path().join("copy.raw");
    CreateOptions::new(Format::Raw, SIZE).create(&target).unwrap();
    let copy = OpenOptions::new(Format::Raw).open(&target).unwrap();
    image.add_bitmap("daily", GRANULE).unwrap();
    image.add_bitmap("other", 65536).unwrap();
    let changes = image.bitmap("daily").unwrap();
    let writes = Writes::new();
    let done = AtomicBool::new(false);
    while_written(&disk, &writes, || {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _done = SetOnDrop(&done);
                for round in 0..60 {
                    let control = JobControl::new();
                    if round % 3 == 1 {
                        control.cancel(); // the marks are put back
                    }
                    match job::backup_changes(&disk, &copy, &changes, &control) {
                        Ok(()) => {}
                        Err(Error::Cancelled) if round % 3 == 1 => {}
                        Err(error) => panic!("round {round}: {error}"),
                    }
                }
            });
            // What happens to others meanwhile, and to the image, does not matter.
            let mut rng = Rng(13);
            while !done.load(Ordering::SeqCst) {
                match rng.below(6) {
                    0 => image.clear_bitmap("other").unwrap(),
                    1 => image.enable_bitmap("other", false).unwrap(),
                    2 => image.enable_bitmap("other", true).unwrap(),
                    3 => image.merge_bitmap("other", &changes).unwrap(),
                    4 => disk.close().unwrap(),
                    _ => {
                        image.add_bitmap("short-lived", 65536).unwrap();
                        image.remove_bitmap("short-lived").unwrap();
                    }
                }
            }
        });
    });
    job::backup_changes(&disk, &copy, &changes, &JobControl::new()).unwrap();
    assert!(contents(&disk) == contents(&copy), "the backups miss something");
    // Cleared and copied, one after the other.
    image.clear_bitmap("daily").unwrap();
    assert_eq!(changes.count(), 0);
}

#[test]
fn a_backup_needs_a_bitmap_that_records_and_has_it_alone() {
    let storage = Arc::new(MemoryStorage::new());
    CreateOptions::new(Format::Qcow2, SIZE).create_on(storage.clone()).unwrap();
    let (disk, layer) = open_on(storage.clone()).unwrap();
    let image = image(&layer);
    image.add_bitmap("b", GRANULE).unwrap();
    disk.write_at(&[1; 512], 0).unwrap();
    let changes = image.bitmap("b").unwrap();
    let memory = Arc::new(MemoryStorage::new());
    memory.set_len(SIZE).unwrap();
    // The target's first write looks at what can be done to the bitmap meanwhile.
    let (busy, after_close) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(None)));
    let target = {
        let (layer, busy, after_close) = (layer.clone(), busy.clone(), after_close.clone());
        FaultStorage::new(memory, move |operation, _| {
            if operation == blockfmt::storage::Operation::Write && after_close.lock().unwrap().is_none() {
                let image = layer.as_qcow2().unwrap();
                let attempts = [
                    image.clear_bitmap("b"),
                    image.remove_bitmap("b"),
                    image.enable_bitmap("b", false),
                    image.merge_bitmap("b", &image.bitmap("b").unwrap()),
                ];
                busy.lock().unwrap().extend(attempts);
                layer.close().unwrap();
                *after_close.lock().unwrap() = Some(storage.to_vec());
                return Fault::Fail(libc::EIO);
            }
            Fault::Pass
        })
    };
    let target = OpenOptions::new(Format::Raw).open_storage(Arc::new(target), "memory").unwrap();
    assert!(matches!(
        job::backup_changes(&disk, &target, &changes, &JobControl::new()),
        Err(Error::Io { .. })
    ));
    let busy = std::mem::take(&mut *busy.lock().unwrap());
    assert!(busy.len() == 4 && busy.iter().all(|b| matches!(b, Err(Error::Busy(_)))), "{busy:?}");
    assert!(changes.get(0), "the marks of a failed backup were lost");
    // An image that was closed before the backup was complete has the marks.
    let bytes = after_close.lock().unwrap().take().unwrap();
    let (_closed, layer) = open_on(Arc::new(MemoryStorage::from_bytes(&bytes))).unwrap();
    assert!(layer.as_qcow2().unwrap().bitmap("b").unwrap().get(0));
    // One that records nothing, or what happens to another disk, is no base of a backup.
    let refused = |map: Arc<DirtyMap>| {
        let result = job::backup_changes(&disk, &target, &map, &JobControl::new());
        assert!(matches!(result, Err(Error::InvalidOption(_))), "{result:?}");
    };
    refused(layer.as_qcow2().unwrap().bitmap("b").unwrap());
    image.enable_bitmap("b", false).unwrap();
    refused(image.bitmap("b").unwrap());
    refused(changes);
}

/// A bitmap that the disk calls complete has everything that was acknowledged, whenever the host crashes.
#[test]
fn a_bitmap_that_is_complete_after_a_crash_lacks_nothing() {
    let inner = Arc::new(MemoryStorage::new());
    CreateOptions::new(Format::Qcow2, SIZE).create_on(inner.clone()).unwrap();
    let (disk, layer) = open_on(inner.clone()).unwrap();
    image(&layer).add_bitmap("b", GRANULE).unwrap();
    disk.write_at(&vec![1; SIZE as usize], 0).unwrap(); // so that later writes are in place
    image(&layer).clear_bitmap("b").unwrap();
    disk.close().unwrap();
    drop((disk, layer));
    let start = MemoryStorage::clone(&inner);
    let record = Arc::new(RecordingStorage::new(inner));
    // Writes that last keep others waiting where they should.
    let stall = |_, count| if count % 3 == 0 { Fault::Stall(100) } else { Fault::Pass };
    let (disk, layer) = open_on(Arc::new(FaultStorage::new(record.clone(), stall))).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 21..29 {
            let (disk, record, stop) = (&disk, &record, &stop);
            scope.spawn(move || {
                let mut rng = Rng(seed);
                while !stop.load(Ordering::SeqCst) {
                    let granule = rng.below(GRANULES);
                    disk.write_at(&[2; 512], granule * GRANULE).unwrap();
                    record.mark(granule);
                }
            });
        }
        let _stop = SetOnDrop(&stop);
        for round in 0..40 {
            layer.close().unwrap();
            match round % 4 {
                0 => image(&layer).add_bitmap("other", 65536).unwrap(),
                2 => image(&layer).remove_bitmap("other").unwrap(),
                _ => {}
            }
        }
    });
    drop((disk, layer));
    let (mut written, mut complete) = (vec![false; GRANULES as usize], 0);
    let (now, mut looking) = (start, true);
    for (at, event) in record.events().iter().enumerate() {
        let storage: &dyn Storage = &now;
        match event {
            Event::Write { offset, data } => storage.write_at(data, *offset).unwrap(),
            Event::Zero { offset, len } => storage.zero(*offset, *len, true).unwrap(),
            Event::SetLen(len) => storage.truncate(*len).unwrap(),
            Event::Mark(granule) => written[*granule as usize] = true,
            Event::Flush => {}
        }
        // A new directory counts from the write of the header on, until the bitmap is marked as in use.
        looking |= matches!(event, Event::Write { offset: 0, .. });
        if !looking {
            continue;
        }
        let options = OpenOptions::new(Format::Qcow2).read_only(true);
        let disk = options.open_storage(Arc::new(now.clone()), "memory").unwrap();
        let layer = disk.layers().remove(0);
        let Ok(map) = image(&layer).bitmap("b") else {
            looking = false;
            continue;
        };
        complete += 1;
        for granule in (0..GRANULES).filter(|granule| written[*granule as usize]) {
            assert!(map.get(granule), "event {at}: the bitmap lacks granule {granule}");
        }
    }
    assert!(complete > 0, "the bitmap was never complete");
}

/// An operation on bitmaps that fails anywhere leaves them as they were, in memory and for whoever opens the image after
/// a crash; or it has happened.
#[test]
fn bitmaps_survive_operations_that_fail() {
    type Change = fn(&Arc<dyn Layer>) -> Result<(), Error>;
    let changes: [(&str, Change); 7] = [
        ("close", |layer| layer.close()),
        ("add", |layer| image(layer).add_bitmap("new", GRANULE)),
        ("remove", |layer| image(layer).remove_bitmap("disabled")),
        ("clear", |layer| image(layer).clear_bitmap("disabled")),
        ("merge", |layer| image(layer).merge_bitmap("disabled", &*image(layer).bitmap("b")?)),
        ("enable", |layer| image(layer).enable_bitmap("disabled", true)),
        ("disable", |layer| image(layer).enable_bitmap("b", false)),
    ];
    for (what, change) in changes {
        let mut failed = 0;
        for at in 0.. {
            let inner = Arc::new(MemoryStorage::new());
            CreateOptions::new(Format::Qcow2, SIZE).create_on(inner.clone()).unwrap();
            let countdown = Arc::new(AtomicU64::new(u64::MAX));
            let left = countdown.clone();
            let faulty = FaultStorage::new(inner.clone(), move |_, _| match left.load(Ordering::SeqCst) {
                u64::MAX => Fault::Pass,
                0 => {
                    left.store(u64::MAX, Ordering::SeqCst);
                    Fault::Fail(libc::EIO)
                }
                n => {
                    left.store(n - 1, Ordering::SeqCst);
                    Fault::Pass
                }
            });
            let (disk, layer) = open_on(Arc::new(faulty)).unwrap();
            image(&layer).add_bitmap("b", GRANULE).unwrap();
            image(&layer).add_bitmap("disabled", GRANULE).unwrap();
            disk.write_at(&[1; 512], 3 * GRANULE).unwrap();
            image(&layer).enable_bitmap("disabled", false).unwrap();
            disk.write_at(&[1; 512], 5 * GRANULE).unwrap();
            disk.flush().unwrap();
            countdown.store(at, Ordering::SeqCst);
            let result = change(&layer);
            let happened = countdown.swap(u64::MAX, Ordering::SeqCst) != u64::MAX;
            let what = format!("{what}, failure of operation {at}: {result:?}");
            assert!(result.is_err() || what.starts_with("disable") || happened || failed > 0, "{what}");
            let enabled = !(result.is_ok() && what.starts_with("disable"));
            disk.write_at(&[1; 512], 9 * GRANULE).unwrap();
            // A crash now: no bitmap that was enabled claims to be complete without the last write.
            let crashed = open_on(Arc::new(MemoryStorage::clone(&inner))).unwrap().1;
            if let Ok(map) = image(&crashed).bitmap("b") {
                let seen: Vec<_> = map.marked().collect();
                assert!(!enabled && seen == [3, 5], "{what}: {seen:?}");
            }
            drop(crashed);
            let expected: &[u64] = if enabled { &[3, 5, 9] } else { &[3, 5] };
            assert!(image(&layer).bitmap("b").unwrap().marked().eq(expected.iter().copied()), "{what}");
            layer.close().unwrap();
            drop((disk, layer));
            let (_disk, layer) = open_on(inner).unwrap();
            assert!(image(&layer).bitmap("b").unwrap().marked().eq(expected.iter().copied()), "{what}");
            if result.is_err() {
                let disabled = image(&layer).bitmap("disabled").unwrap();
                assert!(disabled.marked().eq([3]), "{what}");
                assert_eq!(image(&layer).bitmaps().unwrap().len(), 2, "{what}");
            }
            assert_eq!(image(&layer).check(Repair::Nothing).unwrap().corruptions, 0, "{what}");
            failed += u64::from(result.is_err());
            if happened {
                assert!(failed > 3, "{what}: only {failed} failures");
                break;
            }
        }
    }
}
