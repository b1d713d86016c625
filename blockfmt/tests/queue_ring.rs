//! Who ends requests that the kernel has completed: the owner of a queue, or somebody else while it is busy.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::queue::{Completion, Engine, Queue, QueueOptions, Request};
use blockfmt::{Disk, Format, Gather, OpenOptions, Scatter, Storage};
use common::late::{Kind, LateStorage, PATIENCE};
use common::wait_until_blocked;
use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;

const SIZE: u64 = 1 << 20;
const LEN: usize = 512;

/// A storage whose bytes the kernel reads from a pipe: it completes a request when a test writes them.
#[derive(Debug)]
struct PipeStorage {
    /// Everything else.
    late: Arc<LateStorage>,
    pipe: PipeReader,
}

impl Storage for PipeStorage {
    fn name(&self) -> String {
        "pipe".into()
    }

    fn len(&self) -> io::Result<u64> {
        self.late.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.late.set_len(len)
    }

    fn readv(&self, dst: Scatter<'_>, offset: u64) -> io::Result<()> {
        self.late.readv(dst, offset)
    }

    fn writev(&self, src: Gather<'_>, offset: u64) -> io::Result<()> {
        self.late.writev(src, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.late.flush()
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.late.write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.late.discard(offset, len)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.late.allocate(offset, len)
    }

    fn fd(&self) -> Option<RawFd> {
        Some(self.pipe.as_raw_fd())
    }
}

struct Setup {
    disk: Disk,
    queue: Queue,
    /// What the kernel reads.
    pipe: PipeWriter,
    late: Arc<LateStorage>,
}

/// A queue with so many reads, tagged from 0 on, that wait for the pipe.
fn with_reads(count: u64) -> Setup {
    let late = LateStorage::new(SIZE);
    let (reader, pipe) = io::pipe().unwrap();
    let storage = Arc::new(PipeStorage { late: late.clone(), pipe: reader });
    let disk = OpenOptions::new(Format::Raw).open_storage(storage, "pipe").unwrap();
    let options = QueueOptions { depth: 8, threads: 2, engine: Some(Engine::IoUring) };
    let mut queue = Queue::new(&disk, options).unwrap();
    for tag in 0..count {
        queue.push(tag, Request::Read { offset: 0, into: vec![0xa5; LEN].into() }).unwrap();
    }
    queue.submit();
    assert_eq!(queue.by_kernel(), count);
    Setup { disk, queue, pipe, late }
}

fn readable(queue: &Queue, milliseconds: i32) -> bool {
    let mut poll = libc::pollfd { fd: queue.event().as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure, which lives during the call.
    unsafe { libc::poll(&raw mut poll, 1, milliseconds) > 0 }
}

fn becomes_readable(queue: &Queue) -> bool {
    readable(queue, PATIENCE.as_millis() as i32)
}

/// The tag and the first byte of the only completion there is.
fn only(done: Vec<Completion>) -> (u64, u8) {
    let [Completion { tag, result, memory }] = <[_; 1]>::try_from(done).unwrap();
    result.unwrap();
    (tag, memory.map_or(0, |memory| memory.into_vec().unwrap()[0]))
}

fn completion(queue: &mut Queue) -> (u64, u8) {
    let mut done = Vec::new();
    queue.completions(&mut done);
    only(done)
}

/// Runs something in a thread and returns when it is blocked, or over. Its result follows.
fn start<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> (JoinHandle<()>, Receiver<T>) {
    let (task, told) = mpsc::channel();
    let (result, over) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        task.send(std::fs::read_link("/proc/thread-self").unwrap()).unwrap();
        let _ = result.send(run());
    });
    let task: PathBuf = told.recv().unwrap();
    wait_until_blocked(&thread, &task);
    (thread, over)
}

#[test]
fn the_event_tells_of_what_the_kernel_completed_until_it_is_taken() {
    let Setup { mut queue, mut pipe, late, .. } = with_reads(2);
    assert!(!readable(&queue, 0));
    assert_eq!(queue.completions(&mut Vec::new()), 0);
    for byte in 1..3 {
        pipe.write_all(&[byte; LEN]).unwrap();
        assert!(becomes_readable(&queue) && readable(&queue, 0));
        assert_eq!(completion(&mut queue).1, byte);
        assert!(!readable(&queue, 0), "nobody has to clear it");
    }
    // The same descriptor tells of the threads.
    let closed = late.close();
    queue.push(7, Request::Flush).unwrap();
    queue.submit();
    late.wait_for(1);
    assert!(!readable(&queue, 0));
    drop(closed);
    assert!(becomes_readable(&queue));
    assert_eq!(completion(&mut queue), (7, 0));
    assert!(!readable(&queue, 0) && queue.is_empty());
}

#[test]
fn an_owner_that_does_not_look_keeps_nobody_waiting() {
    let Setup { disk, mut queue, mut pipe, .. } = with_reads(2);
    for byte in 1..3 {
        let resized = disk.clone();
        // The size cannot change while a request is under way.
        let (thread, over) = start(move || resized.resize(SIZE + 4096 * u64::from(byte)));
        assert!(over.try_recv().is_err());
        // The last one to end lets it go on.
        (byte..3).for_each(|byte| pipe.write_all(&[byte; LEN]).unwrap());
        over.recv_timeout(PATIENCE).unwrap().unwrap();
        thread.join().unwrap();
        // The owner is told of what somebody else took from the kernel.
        assert!(becomes_readable(&queue));
        let mut done = Vec::new();
        assert_eq!(queue.completions(&mut done), if byte == 1 { 2 } else { 1 });
        assert!(!readable(&queue, 0) && queue.is_empty());
        queue.push(9, Request::Read { offset: 0, into: vec![0; LEN].into() }).unwrap();
        queue.submit();
    }
    pipe.write_all(&[9; LEN]).unwrap();
    assert_eq!(queue.wait(&mut Vec::new()), 1);
}

#[test]
fn an_owner_does_not_wait_for_itself() {
    let Setup { disk, mut queue, mut pipe, .. } = with_reads(1);
    let (thread, over) = start(move || {
        disk.resize(SIZE / 2).unwrap();
        completion(&mut queue)
    });
    assert!(over.try_recv().is_err());
    pipe.write_all(&[1; LEN]).unwrap();
    assert_eq!(over.recv_timeout(PATIENCE).unwrap(), (0, 1));
    thread.join().unwrap();
}

/// Waits in a thread, lets something happen when it does, and returns what it got, and the queue.
fn wait_for(mut queue: Queue, happen: impl FnOnce()) -> ((u64, u8), Queue) {
    let (thread, over) = start(move || {
        let mut done = Vec::new();
        assert_eq!(queue.wait(&mut done), 1);
        (only(done), queue)
    });
    assert!(over.try_recv().is_err());
    happen();
    let result = over.recv_timeout(PATIENCE).unwrap();
    thread.join().unwrap();
    result
}

#[test]
fn waiting_ends_with_the_first_completion_whoever_made_it() {
    for kernel_first in [true, false] {
        let Setup { mut queue, mut pipe, late, .. } = with_reads(1);
        let _closed = late.close();
        queue.push(7, Request::Flush).unwrap();
        queue.submit();
        late.wait_for(1);
        for kernel in [kernel_first, !kernel_first] {
            let happen = || match kernel {
                true => pipe.write_all(&[1; LEN]).unwrap(),
                false => late.let_go((Kind::Flush, 0), None),
            };
            let (seen, back) = wait_for(queue, happen);
            assert_eq!(seen, if kernel { (0, 1) } else { (7, 0) });
            queue = back;
        }
        assert!(queue.is_empty());
    }
}

#[test]
fn a_wait_in_the_kernel_goes_on_when_threads_do_the_rest() {
    let Setup { queue, mut pipe, late, .. } = with_reads(1);
    late.writev(Gather::new(&[3; LEN]), 0).unwrap();
    // The kernel moves a part only, and the disk reads it all again.
    let (seen, queue) = wait_for(queue, || pipe.write_all(&[1; LEN / 2]).unwrap());
    assert_eq!(seen, (0, 3));
    assert!(queue.is_empty());
}
