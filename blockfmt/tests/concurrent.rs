//! Many threads on one disk, with and without jobs and failing storage.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::LayerOptions;
use blockfmt::format::qcow2::{Qcow2, Qcow2Options};
use blockfmt::job::{self, JobControl, Migration, Mirror, MirrorMode};
use blockfmt::storage::{Fault, FaultStorage, FileOptions, FileStorage, Operation};
use blockfmt::{CreateOptions, Disk, Error, Format, Layer, OpenOptions, Storage};
use common::{Rng, qemu, text};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

const THREADS: u64 = 4;
const SECTOR: u64 = 512;
const SIZE: u64 = 8 << 20;
const OPERATIONS: usize = 1500;
/// Jobs beside the operations, at most.
const JOBS: usize = 400;

/// A thread's view of one sector: the values it may hold.
type Allowed = Vec<u64>;

fn sector(tag: u64) -> Vec<u8> {
    match tag {
        0 => vec![0; SECTOR as usize],
        _ => tag.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes().repeat(SECTOR as usize / 8),
    }
}

/// Requests hold it shared; who wants a moment without any takes it alone.
type Pause = RwLock<()>;

/// One thread: random requests on the sectors that it owns, in the first half of the disk single sectors in
/// clusters shared with other threads, in the second half whole areas.
fn worker(disk: &Disk, pause: &Pause, me: u64, cluster: u64) -> Vec<(u64, Allowed)> {
    let mut rng = Rng(me * 77 + 5);
    let mut tag = me << 40;
    let half = SIZE / 2 / SECTOR;
    let area = (cluster * 4).max(65536) / SECTOR;
    let mut known = std::collections::BTreeMap::<u64, Allowed>::new();
    for _ in 0..OPERATIONS {
        let (first, count) = if rng.below(2) == 0 {
            (rng.below(half / THREADS) * THREADS + me, 1)
        } else {
            let areas = half / area;
            let mine = rng.below(areas / THREADS) * THREADS + me;
            let skip = rng.below(area / 2);
            (half + mine * area + skip, 1 + rng.below(area - skip))
        };
        let (offset, len) = (first * SECTOR, count * SECTOR);
        let note = |known: &mut std::collections::BTreeMap<u64, Allowed>, s, value, ok| {
            let allowed = known.entry(s).or_insert_with(|| vec![0]);
            if ok {
                allowed.clear();
            }
            allowed.push(value);
        };
        let _running = pause.read().unwrap();
        match rng.below(6) {
            0..=2 => {
                tag += 1;
                let data: Vec<u8> = (0..count).flat_map(|_| sector(tag)).collect();
                let ok = disk.write_at(&data, offset).is_ok();
                (first..first + count).for_each(|s| note(&mut known, s, tag, ok));
            }
            3 => {
                let ok = disk.write_zeroes(offset, len, rng.below(2) == 0).is_ok();
                (first..first + count).for_each(|s| note(&mut known, s, 0, ok));
            }
            4 => {
                // Whether it succeeds or not: old value or zero.
                let _ = disk.discard(offset, len);
                (first..first + count).for_each(|s| note(&mut known, s, 0, false));
            }
            _ => {
                let mut seen = vec![0; len as usize];
                if disk.read_at(&mut seen, offset).is_ok() {
                    for s in first..first + count {
                        let at = ((s - first) * SECTOR) as usize;
                        let zero = vec![0];
                        let allowed = known.get(&s).unwrap_or(&zero);
                        let seen = &seen[at..at + SECTOR as usize];
                        assert!(
                            allowed.iter().any(|t| seen == sector(*t)),
                            "thread {me}, sector {s}: {allowed:x?}"
                        );
                    }
                }
            }
        }
    }
    known.into_iter().collect()
}

/// Many threads make requests, one flushes, and one runs `beside` until it is told to end.
fn torture(
    disk: &Disk,
    cluster: u64,
    beside: impl FnOnce(&AtomicBool, &Pause) + Send,
    calm: impl FnOnce(),
) -> Vec<(u64, Allowed)> {
    let (done, pause) = (AtomicBool::new(false), Pause::default());
    let known: Vec<_> = std::thread::scope(|scope| {
        let pause = &pause;
        let beside = scope.spawn(|| beside(&done, pause));
        let flusher = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                let _ = disk.flush(); // a failure is repaired by a later flush
                std::thread::yield_now();
            }
        });
        let workers: Vec<_> =
            (0..THREADS).map(|me| scope.spawn(move || worker(disk, pause, me, cluster))).collect();
        let known = workers.into_iter().flat_map(|w| w.join().unwrap()).collect();
        done.store(true, Ordering::Release);
        flusher.join().unwrap();
        beside.join().unwrap();
        known
    });
    calm();
    known
}

fn verify(disk: &Disk, known: &[(u64, Allowed)]) {
    let mut seen = vec![0; SECTOR as usize];
    for (s, allowed) in known {
        disk.read_at(&mut seen, s * SECTOR).unwrap();
        assert!(allowed.iter().any(|t| seen == sector(*t)), "sector {s} at the end: {allowed:x?}");
    }
}

fn check(path: &Path) {
    let output = qemu("qemu-img", &["check", "-f", "qcow2", text(path)]);
    assert!(matches!(output.status.code(), Some(0 | 3)), "{output:?}");
}

fn variants() -> Vec<(u64, bool)> {
    vec![(65536, false), (4096, false), (512, false), (65536, true)]
}

#[test]
fn threads_do_not_disturb_each_other() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (cluster_size, extended_l2) in variants() {
        let path = dir.path().join(format!("{cluster_size}-{extended_l2}.qcow2"));
        let qcow2 = Qcow2Options {
            cluster_size: Some(cluster_size),
            extended_l2: Some(extended_l2),
            ..Qcow2Options::default()
        };
        CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).create(&path).unwrap();
        let disk = OpenOptions::new(Format::Qcow2).open(&path).unwrap();
        let known = torture(&disk, cluster_size, |_, _| (), || ());
        verify(&disk, &known);
        drop(disk);
        verify(&OpenOptions::new(Format::Qcow2).open(&path).unwrap(), &known);
        let output = qemu("qemu-img", &["check", "-f", "qcow2", text(&path)]);
        assert!(output.status.success(), "{output:?}");
    }
}

/// A file that fails as long as `failing` says so.
fn failing_file(path: &Path, failing: &Arc<AtomicBool>) -> Arc<dyn Storage> {
    let on = failing.clone();
    let plan = move |operation, n: u64| {
        if !on.load(Ordering::Acquire) {
            return Fault::Pass;
        }
        match (operation, n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57) {
            (Operation::Read, 0) => Fault::Fail(libc::EIO),
            (Operation::Write, 0) => Fault::Fail(libc::ENOSPC),
            (Operation::Write, 1) => Fault::Half(libc::EIO),
            (Operation::Flush, 0..=8) => Fault::Fail(libc::EIO),
            (_, 9) => Fault::Stall(50),
            _ => Fault::Pass,
        }
    };
    // The disk below stays sound: what failed is reported once and works when it is tried again.
    let file: Arc<dyn Storage> = Arc::new(FileStorage::open(path, FileOptions::default()).unwrap());
    Arc::new(FaultStorage::new(file, plan))
}

#[test]
fn failing_storage_loses_nothing_that_was_acknowledged() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (cluster_size, extended_l2) in variants() {
        let path = dir.path().join(format!("f{cluster_size}-{extended_l2}.qcow2"));
        let qcow2 = Qcow2Options {
            cluster_size: Some(cluster_size),
            extended_l2: Some(extended_l2),
            ..Qcow2Options::default()
        };
        CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).create(&path).unwrap();
        let failing = Arc::new(AtomicBool::new(false));
        let storage = failing_file(&path, &failing);
        let disk = OpenOptions::new(Format::Qcow2).open_storage(storage, &path).unwrap();
        failing.store(true, Ordering::Release);
        let known = torture(&disk, cluster_size, |_, _| (), || failing.store(false, Ordering::Release));
        verify(&disk, &known);
        disk.close().unwrap();
        drop(disk);
        check(&path);
        verify(&OpenOptions::new(Format::Qcow2).open(&path).unwrap(), &known);
    }
}

/// Snapshots and jobs on a disk, one after the other, until `done`.
struct Jobs<'a> {
    dir: &'a Path,
    qcow2: Qcow2Options,
    failing: Option<&'a Arc<AtomicBool>>,
    images: u64,
    /// The kind of the last job.
    next: usize,
    /// How many jobs of each kind ended well.
    completed: [u64; KINDS],
}

const KINDS: usize = 9;

impl Jobs<'_> {
    /// A new image, perhaps on top of a layer.
    fn image(&mut self, disk: &Disk, parent: Option<usize>) -> Arc<dyn Layer> {
        self.images += 1;
        let path = self.dir.join(format!("{}.qcow2", self.images));
        let mut create = CreateOptions::new(Format::Qcow2, disk.size()).qcow2(self.qcow2.clone());
        if let Some(layer) = parent {
            create = create.backing(disk.layers()[layer].storage().name(), Format::Qcow2);
        }
        create.create(&path).unwrap();
        let storage: Arc<dyn Storage> = match self.failing {
            Some(failing) => failing_file(&path, failing),
            None => Arc::new(FileStorage::open(&path, FileOptions::default()).unwrap()),
        };
        // An image that cannot be opened is one that a fault hit: once more.
        loop {
            match Qcow2::open(storage.clone(), &LayerOptions::default()) {
                Ok(layer) => return Arc::new(layer),
                Err(error) => assert!(self.failing.is_some(), "{error}"),
            }
        }
    }

    /// Tries a job again if a fault hit it, at last without faults: there are too many for a long job to end.
    fn persist(&self, mut job: impl FnMut() -> blockfmt::Result<()>) -> blockfmt::Result<()> {
        let Some(failing) = self.failing else { return job() };
        for _ in 0..2 {
            match job() {
                Err(Error::InvalidOption(_)) | Ok(()) => return Ok(()),
                Err(_) => {}
            }
        }
        failing.store(false, Ordering::Release);
        let result = job();
        failing.store(true, Ordering::Release);
        result
    }

    fn one(&mut self, disk: &Disk, rng: &mut Rng, pause: &Pause) -> blockfmt::Result<usize> {
        let control = JobControl::new();
        self.next = (self.next + 1) % KINDS;
        let kind = self.next;
        if disk.layers().len() > 4 {
            self.persist(|| job::stream(disk, 0, None, &control))?;
        }
        if matches!(kind, 1 | 5) && disk.layers().len() == 1 {
            let child = self.image(disk, Some(0));
            disk.push_layer(child)?;
        }
        let layers = disk.layers().len() as u64;
        match kind {
            0 => {
                let child = self.image(disk, Some(0));
                disk.push_layer(child)?;
            }
            // The active layer or one in the middle.
            1 => {
                let index = rng.below(layers - 1) as usize;
                self.persist(|| job::commit(disk, index, &control))?;
            }
            2 => self.persist(|| job::stream(disk, 0, None, &control))?,
            3 | 4 => {
                let child = self.image(disk, Some(0));
                drop(Migration::start(disk, child, None)?);
                self.persist(|| {
                    let migration = Migration::resume(disk, None)?;
                    if kind == 3 { migration.run(&control) } else { migration.undo(&control) }
                })?;
            }
            5 => {
                let index = 1 + rng.below(layers - 1) as usize;
                self.persist(|| job::remove(disk, index, &control).map(drop))?;
            }
            6 => disk.resize(SIZE + rng.below(16) * 65536)?,
            7 => {
                let _alone = pause.write().unwrap();
                let child = self.image(disk, Some(0));
                disk.push_layer(child)?;
                for _ in 0..20 {
                    // What is taken back need not succeed.
                    let _ = disk.write_at(&rng.bytes(70_000), rng.below(SIZE - 70_000));
                }
                let back = self.image(disk, Some(1));
                self.persist(|| disk.roll_back_to(1, back.clone()))?;
            }
            _ => {
                let mode = [MirrorMode::Background, MirrorMode::WriteBlocking][rng.below(2) as usize];
                let target = self.image(disk, None);
                self.persist(|| {
                    let target = Disk::from_layers(vec![target.clone()], false)?;
                    let mirror = Mirror::start(disk, &target, mode, None)?;
                    mirror.run(&control)?.pivot(&control)
                })?;
            }
        }
        Ok(kind)
    }

    /// Removes the images that the disk no longer uses: the files of all jobs together would fill the memory.
    fn tidy(&self, disk: &Disk) {
        let used: Vec<_> = disk.layers().iter().map(|layer| layer.storage().name().into()).collect();
        for entry in std::fs::read_dir(self.dir).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "qcow2") && !used.contains(&path) {
                std::fs::remove_file(path).unwrap();
            }
        }
    }

    fn run(&mut self, disk: &Disk, done: &AtomicBool, pause: &Pause) {
        let mut rng = Rng(4711);
        for n in 0..JOBS {
            // Each kind has its turns, however fast the requests were.
            if done.load(Ordering::Acquire) && n >= 2 * KINDS {
                break;
            }
            match self.one(disk, &mut rng, pause) {
                Ok(kind) => self.completed[kind] += 1,
                Err(error) => assert!(self.failing.is_some(), "{error}"),
            }
            self.tidy(disk);
        }
    }
}

/// Requests, snapshots and jobs at the same time; afterwards the disk is what its chain of files says.
fn jobs_and_requests(faults: bool) {
    let mut completed = [0; KINDS];
    for (n, (cluster_size, extended_l2)) in variants().into_iter().enumerate() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let qcow2 = Qcow2Options {
            cluster_size: Some(cluster_size),
            extended_l2: Some(extended_l2),
            ..Qcow2Options::default()
        };
        let failing = Arc::new(AtomicBool::new(false));
        let failing_if_wanted = faults.then_some(&failing);
        let mut jobs = Jobs {
            dir: dir.path(),
            qcow2,
            failing: failing_if_wanted,
            images: 0,
            next: 3 * n,
            completed: [0; KINDS],
        };
        let first = dir.path().join("first.qcow2");
        CreateOptions::new(Format::Qcow2, SIZE).create(&first).unwrap();
        let disk = OpenOptions::new(Format::Qcow2).open(&first).unwrap();
        let top = jobs.image(&disk, Some(0));
        disk.push_layer(top).unwrap();
        failing.store(faults, Ordering::Release);
        let calm = || failing.store(false, Ordering::Release);
        let known = torture(&disk, cluster_size, |done, pause| jobs.run(&disk, done, pause), calm);
        verify(&disk, &known);
        disk.close().unwrap();
        let path = disk.layers()[0].storage().name();
        drop(disk);
        check(Path::new(&path));
        verify(&OpenOptions::new(Format::Qcow2).open(&path).unwrap(), &known);
        (0..KINDS).for_each(|kind| completed[kind] += jobs.completed[kind]);
    }
    assert!(completed.iter().all(|count| *count > 0), "every kind of job has to end well: {completed:?}");
}

#[test]
fn jobs_do_not_disturb_requests() {
    jobs_and_requests(false);
}

#[test]
fn jobs_on_failing_storage_lose_nothing() {
    jobs_and_requests(true);
}
