//! Requests through queues, with both engines.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::qcow2::Qcow2Options;
use blockfmt::job::{self, JobControl, Mirror, MirrorMode};
use blockfmt::queue::{Completion, Engine, Queue, QueueOptions, Request};
use blockfmt::storage::{Fault, FaultStorage, FileOptions, FileStorage, LockMode, MemoryStorage, Operation};
use blockfmt::{CreateOptions, Disk, Error, Format, Memory, OpenOptions, Storage};
use common::{Rng, assert_same, qemu_ok, text};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

const SIZE: u64 = 4 << 20;
const ENGINES: [Engine; 2] = [Engine::IoUring, Engine::Threads];

fn queue(disk: &Disk, engine: Engine, depth: u16) -> Queue {
    let queue = Queue::new(disk, QueueOptions { depth, threads: 3, engine: Some(engine) }).unwrap();
    assert_eq!(queue.engine(), engine);
    queue
}

/// Memory that is aligned for direct I/O.
#[derive(Clone, Copy)]
#[repr(align(4096))]
struct Page([u8; 4096]);

struct Pages(Vec<Page>);

impl Pages {
    fn new(bytes: &[u8]) -> Self {
        let page = |part: &[u8]| {
            let mut page = Page([0xa5; 4096]);
            page.0[..part.len()].copy_from_slice(part);
            page
        };
        Pages(bytes.chunks(4096).map(page).collect())
    }

    fn bytes(&self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.len() * 4096);
        self.0.iter().for_each(|page| bytes.extend_from_slice(&page.0));
        bytes.truncate(len);
        bytes
    }

    /// `len` bytes in a few segments of whole sectors, or in one.
    fn memory(&mut self, len: usize, rng: &mut Rng) -> Memory {
        let mut segments = Vec::new();
        let mut at = 0;
        while at < len {
            let n = match segments.len() < 3 {
                true => (512 * (1 + rng.below(2 * len as u64 / 512) as usize)).min(len - at),
                false => len - at,
            };
            let start = self.0.as_mut_ptr().cast::<u8>().wrapping_add(at);
            segments.push(libc::iovec { iov_base: start.cast(), iov_len: n });
            at += n;
        }
        // SAFETY: the pages are kept, and not looked at, until the request is complete.
        unsafe { Memory::from_iovecs(segments) }
    }
}

/// A request in flight: the range that it owns, and what it does.
struct Pending {
    from: usize,
    to: usize,
    effect: Effect,
    pages: Pages,
}

enum Effect {
    Read,
    Become(Vec<u8>),
    Discard,
    Flush,
}

/// Random requests, many at a time, on ranges that do not overlap, and the same ones on a plain array.
struct Driver<'a> {
    /// The disk and the engine, for messages.
    what: String,
    queue: Queue,
    model: &'a mut Vec<u8>,
    pending: HashMap<u64, Pending>,
    tag: u64,
}

impl Driver<'_> {
    fn check(&mut self, Completion { tag, result, .. }: Completion) {
        result.unwrap();
        let Pending { from, to, effect, pages } =
            self.pending.remove(&tag).expect("each request completes once");
        match effect {
            Effect::Read => {
                let seen = pages.bytes(to - from);
                if seen != self.model[from..to] {
                    let at = seen.iter().zip(&self.model[from..to]).position(|(a, b)| a != b).unwrap();
                    panic!(
                        "{}: {} bytes at {from} differ from byte {at} on, which is {:#x}",
                        self.what,
                        to - from,
                        seen[at]
                    );
                }
            }
            Effect::Become(bytes) => self.model[from..to].copy_from_slice(&bytes),
            Effect::Discard | Effect::Flush => {}
        }
    }

    fn reap(&mut self, wait: bool) {
        let mut done = Vec::new();
        match wait {
            true => self.queue.wait(&mut done),
            false => self.queue.completions(&mut done),
        };
        done.into_iter().for_each(|completion| self.check(completion));
    }

    fn run(&mut self, disk: &Disk, rng: &mut Rng, requests: usize) {
        for n in 0..requests {
            let limit = [512, 4096, 70_000, 300_000][rng.below(4) as usize];
            // Direct I/O without a detour needs whole blocks of 4096 bytes.
            let unit = if rng.below(2) == 0 { 4096 } else { 512 };
            let from = rng.below(SIZE) as usize / unit * unit;
            let to = (from + 1 + rng.below(limit) as usize).next_multiple_of(unit).min(SIZE as usize);
            while self.queue.len() == 24 || self.pending.values().any(|p| p.from < to && from < p.to) {
                self.reap(true);
            }
            let (offset, len) = (from as u64, (to - from) as u64);
            let bytes = rng.bytes(to - from);
            let mut pages = Pages::new(&bytes);
            let memory = pages.memory(to - from, rng);
            let (request, effect) = match rng.below(8) {
                0..=2 => (Request::Write { offset, from: memory }, Effect::Become(bytes)),
                3 => {
                    let unmap = rng.below(2) == 0;
                    (Request::WriteZeroes { offset, len, unmap }, Effect::Become(vec![0; to - from]))
                }
                4 => (Request::Discard { offset, len }, Effect::Discard),
                5 => (Request::Flush, Effect::Flush),
                _ => (Request::Read { offset, into: memory }, Effect::Read),
            };
            self.tag += 1;
            if matches!(effect, Effect::Discard) {
                // Zeros or what was there: make it one of them.
                disk.discard(offset, len).unwrap();
                disk.read_at(&mut self.model[from..to], offset).unwrap();
                continue;
            }
            let (from, to) = if matches!(effect, Effect::Flush) { (0, 0) } else { (from, to) };
            self.pending.insert(self.tag, Pending { from, to, effect, pages });
            self.queue.push(self.tag, request).unwrap();
            if rng.below(3) == 0 {
                self.queue.submit();
                self.reap(false);
            }
            if n % 100 == 50 {
                disk.flush().unwrap(); // with requests in flight, by their owner
            }
        }
        while !self.queue.is_empty() {
            self.reap(true);
        }
        assert!(self.pending.is_empty());
    }
}

fn exercise(disk: &Disk, engine: Engine, model: &mut Vec<u8>, seed: u64, requests: usize) {
    let what = format!("{disk:?} with {engine:?}");
    let mut driver = Driver { what, queue: queue(disk, engine, 24), model, pending: HashMap::new(), tag: 0 };
    driver.run(disk, &mut Rng(seed), requests);
    let file = disk.layers()[0].storage().fd().is_some();
    assert_eq!(driver.queue.by_kernel() > 0, file && engine == Engine::IoUring, "{disk:?}, {engine:?}");
}

#[test]
fn queues_are_disks() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let base = dir.path().join("base.raw");
    let content = Rng(3).bytes(SIZE as usize);
    std::fs::write(&base, &content).unwrap();
    let qcow2 = |cluster_size, extended_l2| {
        let options = Qcow2Options {
            cluster_size: Some(cluster_size),
            extended_l2: Some(extended_l2),
            ..Qcow2Options::default()
        };
        CreateOptions::new(Format::Qcow2, SIZE).qcow2(options)
    };
    let kinds = [
        ("raw", CreateOptions::new(Format::Raw, SIZE), false),
        ("qcow2", qcow2(65536, false), false),
        ("child", qcow2(4096, false).backing("base.raw", Format::Raw), true),
        ("extended", qcow2(65536, true).backing("base.raw", Format::Raw), true),
        ("vhdx", CreateOptions::new(Format::Vhdx, SIZE), false),
    ];
    for engine in ENGINES {
        for (name, create, child) in &kinds {
            for direct in [false, true] {
                let path = dir.path().join(format!("{name}-{engine:?}-{direct}"));
                create.create(&path).unwrap();
                let mut model = if *child { content.clone() } else { vec![0; SIZE as usize] };
                let disk = OpenOptions::new(create.format).direct(direct).open(&path).unwrap();
                exercise(&disk, engine, &mut model, 7, 600);
                assert_same(&disk, &model);
                drop(disk);
                assert_same(&OpenOptions::new(create.format).open(&path).unwrap(), &model);
                if create.format == Format::Qcow2 {
                    qemu_ok("qemu-img", &["check", "-f", "qcow2", text(&path)]);
                }
            }
        }
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        storage.set_len(SIZE).unwrap();
        let disk = OpenOptions::new(Format::Raw).open_storage(storage, Path::new("memory")).unwrap();
        exercise(&disk, engine, &mut vec![0; SIZE as usize], 11, 600);
    }
}

#[test]
fn snapshots_jobs_and_sizes_change_beside_a_queue() {
    for engine in ENGINES {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let options = CreateOptions::new(Format::Qcow2, SIZE);
        let first = dir.path().join("0.qcow2");
        options.create(&first).unwrap();
        let disk = OpenOptions::new(Format::Qcow2).open(&first).unwrap();
        let mut model = vec![0; SIZE as usize];
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let control = JobControl::new();
                let mut n = 0;
                while !done.load(Ordering::Acquire) || n < 4 {
                    n += 1;
                    disk.snapshot(&dir.path().join(format!("{n}.qcow2")), &options).unwrap();
                    let target = dir.path().join(format!("copy{n}.qcow2"));
                    options.create(&target).unwrap();
                    let target = OpenOptions::new(Format::Qcow2).open(&target).unwrap();
                    let mirror = Mirror::start(&disk, &target, MirrorMode::WriteBlocking, None).unwrap();
                    let mirror = mirror.run(&control).unwrap();
                    match n % 2 {
                        0 => mirror.finish(&control).unwrap(),
                        _ => mirror.pivot(&control).unwrap(),
                    }
                    drop(target);
                    match disk.layers().len() > 1 {
                        true => job::commit(&disk, 0, &control).unwrap(),
                        false => disk.resize(SIZE).unwrap(),
                    }
                    let used: Vec<_> = disk.layers().iter().map(|layer| layer.storage().name()).collect();
                    for entry in std::fs::read_dir(dir.path()).unwrap() {
                        let path = entry.unwrap().path();
                        if !used.contains(&path.display().to_string()) {
                            std::fs::remove_file(path).unwrap();
                        }
                    }
                }
            });
            exercise(&disk, engine, &mut model, 5, 2000);
            done.store(true, Ordering::Release);
        });
        assert_same(&disk, &model);
        let path = disk.layers()[0].storage().name();
        drop(disk);
        assert_same(&OpenOptions::new(Format::Qcow2).open(&path).unwrap(), &model);
        qemu_ok("qemu-img", &["check", "-f", "qcow2", &path]);
    }
}

/// Waits for all completions, by their tags.
fn all(queue: &mut Queue) -> HashMap<u64, Completion> {
    let mut done = Vec::new();
    while !queue.is_empty() {
        queue.wait(&mut done);
    }
    done.into_iter().map(|completion| (completion.tag, completion)).collect()
}

fn read(offset: u64, len: usize) -> Request {
    Request::Read { offset, into: vec![0xa5; len].into() }
}

fn write(offset: u64, byte: u8, len: usize) -> Request {
    Request::Write { offset, from: vec![byte; len].into() }
}

#[test]
fn errors_belong_to_their_requests() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for engine in ENGINES {
        // Every third operation of the storage fails.
        let inner: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        inner.set_len(SIZE).unwrap();
        let plan = |operation, n| match operation {
            Operation::Write if n % 3 == 0 => Fault::Half(libc::ENOSPC),
            _ => Fault::Pass,
        };
        let storage = Arc::new(FaultStorage::new(inner.clone(), plan));
        let disk = OpenOptions::new(Format::Raw).open_storage(storage, Path::new("memory")).unwrap();
        let mut faulty = queue(&disk, engine, 64);
        for n in 0..60 {
            faulty.push(n, write(n * 4096, n as u8 + 1, 4096)).unwrap();
        }
        let done = all(&mut faulty);
        let failed = done.values().filter(|completion| completion.result.is_err()).count();
        assert!((20..60).contains(&failed) && done.len() == 60, "{failed} of {}", done.len());
        for (tag, completion) in &done {
            let mut last = [0];
            inner.read_at(&mut last, tag * 4096 + 4095).unwrap();
            match &completion.result {
                Ok(()) => assert_eq!(last[0], *tag as u8 + 1),
                Err(error) => assert!(error.is_no_space() && last[0] == 0, "{error}"),
            }
        }
        // A file that the kernel does not let us write, shorter than the disk.
        let path = dir.path().join(format!("{engine:?}"));
        File::create(&path).unwrap().set_len(8192).unwrap();
        let options = FileOptions { lock: LockMode::None, ..FileOptions::default() };
        let file = FileStorage::from_file(File::open(&path).unwrap(), &path, options, None).unwrap();
        let disk = OpenOptions::new(Format::Raw).open_storage(Arc::new(file), &path).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(5000).unwrap();
        let mut queue = queue(&disk, engine, 8);
        queue.push(1, write(0, 1, 512)).unwrap();
        queue.push(2, read(4096, 4096)).unwrap();
        queue.push(3, read(4096, 8192)).unwrap();
        queue.push(4, read(u64::MAX, 512)).unwrap();
        queue.push(5, read(0, 0)).unwrap();
        let mut done = all(&mut queue);
        assert_eq!(done[&1].result.as_ref().unwrap_err().errno(), libc::EBADF);
        assert!(matches!(done[&3].result, Err(Error::OutOfRange { .. })));
        assert!(matches!(done[&4].result, Err(Error::OutOfRange { .. })));
        assert!(done[&5].result.is_ok());
        let short = done.remove(&2).unwrap();
        short.result.unwrap();
        assert!(short.memory.unwrap().into_vec().unwrap() == [0; 4096], "beyond the end are zeros");
    }
}

/// A storage whose writes wait for a door to open.
#[derive(Default)]
struct Door {
    open: Mutex<bool>,
    waiting: Mutex<u32>,
    changed: Condvar,
}

impl Door {
    fn storage(self: &Arc<Self>) -> (Arc<dyn Storage>, Disk) {
        let inner: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        inner.set_len(SIZE).unwrap();
        let door = self.clone();
        let plan = move |operation, _| {
            if operation == Operation::Write {
                *door.waiting.lock().unwrap() += 1;
                door.changed.notify_all();
                drop(door.changed.wait_while(door.open.lock().unwrap(), |open| !*open).unwrap());
            }
            Fault::Pass
        };
        let storage = Arc::new(FaultStorage::new(inner.clone(), plan));
        let disk = OpenOptions::new(Format::Raw).open_storage(storage, Path::new("memory")).unwrap();
        (inner, disk)
    }

    /// Waits until a request is at the door.
    fn wait_for_one(&self) {
        while *self.waiting.lock().unwrap() == 0 {
            std::thread::yield_now();
        }
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

fn byte(storage: &Arc<dyn Storage>, offset: u64) -> u8 {
    let mut byte = [0];
    storage.read_at(&mut byte, offset).unwrap();
    byte[0]
}

/// A queue of one thread with two writes: the first waits at the door.
fn two_submitted(disk: &Disk, engine: Engine) -> Queue {
    let options = QueueOptions { depth: 8, threads: 1, engine: Some(engine) };
    let mut queue = Queue::new(disk, options).unwrap();
    queue.push(1, write(0, 1, 512)).unwrap();
    queue.push(2, write(512, 2, 512)).unwrap();
    queue.submit();
    queue
}

#[test]
fn what_has_not_begun_is_cancelled() {
    for engine in ENGINES {
        let door = Arc::new(Door::default());
        let (inner, disk) = door.storage();
        let mut queue = two_submitted(&disk, engine);
        door.wait_for_one();
        queue.push(3, write(1024, 3, 512)).unwrap();
        for tag in [1, 2, 3, 99] {
            queue.cancel(tag);
        }
        let mut done = Vec::new();
        assert_eq!(queue.completions(&mut done), 2);
        for completion in &done {
            assert!(matches!(completion.result, Err(Error::Cancelled)) && completion.tag >= 2);
            assert_eq!(completion.memory.as_ref().map(Memory::len), Some(512));
        }
        door.open();
        all(&mut queue)[&1].result.as_ref().unwrap();
        assert_eq!([byte(&inner, 0), byte(&inner, 512), byte(&inner, 1024)], [1, 0, 0]);
    }
}

#[test]
fn dropping_a_queue_waits_for_what_has_begun() {
    for engine in ENGINES {
        let door = Arc::new(Door::default());
        let (inner, disk) = door.storage();
        let mut queue = two_submitted(&disk, engine);
        queue.push(3, write(1024, 3, 512)).unwrap();
        door.wait_for_one();
        let dropped = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                drop(queue);
                dropped.store(true, Ordering::Release);
            });
            assert!(!dropped.load(Ordering::Acquire));
            door.open();
        });
        // The thread may have begun the second one before it was told to end; the third one was never submitted.
        assert_eq!([byte(&inner, 0), byte(&inner, 1024)], [1, 0]);
    }
}

#[test]
fn the_kernel_is_done_with_memory_when_a_queue_is_dropped() {
    // Not in memory, where every request would complete at once.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, Rng(9).bytes(SIZE as usize)).unwrap();
    File::open(&path).unwrap().sync_all().unwrap();
    let mut pool = vec![0u8; SIZE as usize + 4096];
    let start = pool.as_ptr().align_offset(4096);
    for round in 0..8 {
        let disk = OpenOptions::new(Format::Raw).direct(true).open(&path).unwrap();
        let mut queue = queue(&disk, Engine::IoUring, 64);
        for (n, part) in pool[start..start + SIZE as usize].chunks_mut(65536).enumerate() {
            let segment = libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() };
            // SAFETY: the pool outlives the queue and is not used before it is dropped.
            let into = unsafe { Memory::from_iovecs(vec![segment]) };
            queue.push(n as u64, Request::Read { offset: n as u64 * 65536, into }).unwrap();
        }
        queue.submit();
        assert_eq!(queue.by_kernel(), 64);
        if round % 2 == 1 {
            (0..64).for_each(|tag| queue.cancel(tag));
        }
        drop(queue);
        pool.fill(0xee);
        let mut copy = vec![0; SIZE as usize];
        disk.read_at(&mut copy, 0).unwrap();
        assert!(pool.iter().all(|b| *b == 0xee), "a request that was given up wrote to memory");
    }
}

#[test]
fn a_full_queue_says_so_and_the_event_tells_of_completions() {
    let readable = |queue: &Queue| {
        let mut poll =
            libc::pollfd { fd: queue.event().as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure, which lives during the call.
        unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
    };
    for engine in ENGINES {
        let door = Arc::new(Door::default());
        let (_, disk) = door.storage();
        let mut queue = queue(&disk, engine, 2);
        queue.push(1, write(0, 1, 512)).unwrap();
        queue.push(2, write(512, 2, 512)).unwrap();
        assert!(matches!(queue.push(3, read(0, 512)), Err(Error::QueueFull)));
        queue.submit();
        door.wait_for_one();
        assert!(!readable(&queue));
        assert_eq!(queue.completions(&mut Vec::new()), 0);
        door.open();
        while !readable(&queue) {
            std::thread::yield_now();
        }
        assert_eq!(all(&mut queue).len(), 2);
        assert!(!readable(&queue));
        queue.push(3, read(512, 512)).unwrap();
        assert!(all(&mut queue)[&3].result.is_ok());
        let none = QueueOptions { depth: 0, ..QueueOptions::default() };
        assert!(matches!(Queue::new(&disk, none), Err(Error::InvalidOption(_))));
    }
}
