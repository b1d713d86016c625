//! Requests that complete later: what a device needs.
//!
//! A [`Queue`] takes requests with a tag of the caller's and returns their completions, in whatever order they end.
//! Reads, and direct writes to space that is allocated, go to the kernel by `io_uring` where the bytes are in a file as
//! they are; short writes of this kind to the page cache `submit` makes itself. Everything else (allocation, copy on
//! write, discards, flushes, compressed or encrypted data, storages that are no files, disks that are mirrored or
//! limited) is done by threads of the queue, with the methods of [`Disk`]. To find the place of a request, `submit` may
//! have to read metadata.
//!
//! Requests in flight are not ordered, as those of several threads are not: a caller waits for the completion of one
//! before it makes another that relies on it. A flush covers writes that were completed before.
//!
//! A thread that may wait does better without a queue as long as the bytes are in the host's memory, by calling the
//! methods of [`Disk`]: each request then costs one system call and no hand-over. A queue is for an owner that must not
//! wait, an event loop for example, or that keeps many requests of one thread at storage whose answers take time. A
//! [`Pace`] tells a thread which of both is better; so work the devices of this project, with a thread for each of a
//! device's queues. The rows `queue:` of the benchmark `qemu` compare both.
//!
//! ```
//! use blockfmt::queue::{Queue, QueueOptions, Request};
//! # use blockfmt::{CreateOptions, Format, OpenOptions};
//! # fn main() -> Result<(), blockfmt::Error> {
//! # let dir = tempfile::tempdir().expect("temporary directory");
//! # let path = dir.path().join("disk.raw");
//! # CreateOptions::new(Format::Raw, 1 << 20).create(&path)?;
//! # let disk = OpenOptions::new(Format::Raw).open(&path)?;
//! let mut queue = Queue::new(&disk, QueueOptions::default())?;
//! queue.push(1, Request::Write { offset: 4096, from: vec![7; 512].into() })?;
//! queue.push(2, Request::Read { offset: 8192, into: vec![0; 512].into() })?;
//! queue.submit();
//! let mut completions = Vec::new();
//! while completions.len() < 2 {
//!     queue.wait(&mut completions); // or poll `queue.event()`
//! }
//! assert!(completions.iter().all(|c| c.result.is_ok()));
//! # Ok(()) }
//! ```

mod event;
mod pace;
mod ring;
mod workers;

use crate::{Disk, Error, Memory, Result};
pub use pace::Pace;
use ring::Ring;
use std::os::fd::{AsFd, BorrowedFd};
use workers::Workers;

/// What moves the bytes of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The kernel, and threads for what it cannot do.
    IoUring,
    /// Threads only.
    Threads,
}

/// How a queue works.
#[derive(Clone, Copy, Debug)]
pub struct QueueOptions {
    /// Most requests that are in the queue at a time, from 1 to 4096.
    pub depth: u16,
    /// Most threads, at least 1. They are started as they are needed and end with the queue.
    pub threads: u16,
    /// The engine; `None` for `io_uring` where the host has it.
    pub engine: Option<Engine>,
}

impl Default for QueueOptions {
    fn default() -> Self {
        QueueOptions { depth: 128, threads: 16, engine: None }
    }
}

/// What a queue is asked to do.
#[derive(Debug)]
pub enum Request {
    /// Fill `into` with what is at `offset`.
    Read {
        /// First byte.
        offset: u64,
        /// Where to put the bytes.
        into: Memory,
    },
    /// Write all of `from` at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        from: Memory,
    },
    /// [`Disk::write_zeroes`].
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Whether space may be released.
        unmap: bool,
    },
    /// [`Disk::discard`].
    Discard {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// [`Disk::flush`].
    Flush,
}

/// The end of a request.
#[derive(Debug)]
pub struct Completion {
    /// The tag that the request was made with.
    pub tag: u64,
    /// How it ended.
    pub result: Result<()>,
    /// The memory of a read or write.
    pub memory: Option<Memory>,
}

/// A request on its way.
struct Job {
    tag: u64,
    request: Request,
}

impl Job {
    fn end(self, result: Result<()>) -> Completion {
        let memory = match self.request {
            Request::Read { into: memory, .. } | Request::Write { from: memory, .. } => Some(memory),
            Request::WriteZeroes { .. } | Request::Discard { .. } | Request::Flush => None,
        };
        Completion { tag: self.tag, result, memory }
    }
}

/// A queue of requests of one disk.
///
/// Dropping it gives up requests that have not begun and waits for the others: their memory is not used any more
/// afterwards.
pub struct Queue {
    // Dropped first: what it cannot do any more goes to the threads.
    ring: Option<Ring>,
    workers: Workers,
    depth: usize,
    /// Pushed and not submitted.
    staged: Vec<Job>,
    /// Pushed and not returned as completed.
    held: usize,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("engine", &self.engine())
            .field("requests", &self.held)
            .finish_non_exhaustive()
    }
}

impl Queue {
    /// A queue of `disk`, which stays open as long as the queue lives.
    pub fn new(disk: &Disk, options: QueueOptions) -> Result<Self> {
        if !(1..=4096).contains(&options.depth) || options.threads == 0 {
            return Err(Error::InvalidOption(
                "A queue has a depth of 1 to 4096 and at least one thread".into(),
            ));
        }
        let fail = |error| Error::io("make a queue of", disk.layers()[0].storage().name(), error);
        let workers = Workers::new(disk, options.threads.into()).map_err(fail)?;
        let ring = match options.engine {
            Some(Engine::Threads) => None,
            wanted => match Ring::new(&workers, options.depth.into()) {
                Ok(ring) => Some(ring),
                Err(error) if wanted.is_some() => return Err(fail(error)),
                Err(error) => {
                    tracing::debug!(%error, "The host has no io_uring for us");
                    None
                }
            },
        };
        Ok(Queue { ring, workers, depth: options.depth.into(), staged: Vec::new(), held: 0 })
    }

    /// The engine.
    pub fn engine(&self) -> Engine {
        if self.ring.is_some() { Engine::IoUring } else { Engine::Threads }
    }

    /// A descriptor that is readable while there are completions, except for those that [`submit`](Self::submit) or
    /// [`cancel`](Self::cancel) made or found: ask for [`completions`](Self::completions) after these.
    ///
    /// An owner that watches it gets what the kernel completed without another thread in between. One that does not look
    /// for a while keeps nobody waiting.
    pub fn event(&self) -> BorrowedFd<'_> {
        match &self.ring {
            Some(ring) => ring.event(),
            None => self.workers.board().event.as_fd(),
        }
    }

    /// Requests that the kernel was given so far.
    pub fn by_kernel(&self) -> u64 {
        self.ring.as_ref().map_or(0, Ring::begun)
    }

    /// Requests that are not returned as completed.
    pub fn len(&self) -> usize {
        self.held
    }

    /// Whether no request is on its way.
    pub fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Takes a request; [`submit`](Self::submit) begins it. Fails with [`Error::QueueFull`] if as many as the depth of
    /// the queue are not returned yet.
    pub fn push(&mut self, tag: u64, request: Request) -> Result<()> {
        if self.held == self.depth {
            return Err(Error::QueueFull);
        }
        self.held += 1;
        self.staged.push(Job { tag, request });
        Ok(())
    }

    /// Begins all requests that were pushed. Some may be complete when this returns.
    pub fn submit(&mut self) {
        self.begin();
        if let Some(ring) = &mut self.ring {
            ring.submit();
        }
    }

    /// Gives everything that was pushed to those who do it. The kernel has to be told then.
    fn begin(&mut self) {
        let jobs = self.staged.drain(..);
        match &mut self.ring {
            Some(ring) => ring.push(jobs),
            None => jobs.for_each(|job| self.workers.board().give(job)),
        }
    }

    /// Moves the completions to `out` and returns their number.
    pub fn completions(&mut self, out: &mut Vec<Completion>) -> usize {
        if let Some(ring) = &mut self.ring {
            ring.collect();
        }
        self.take(out)
    }

    fn take(&mut self, out: &mut Vec<Completion>) -> usize {
        let count = self.workers.board().take(out);
        self.held -= count;
        count
    }

    /// Like [`completions`](Self::completions) after [`submit`](Self::submit), but waits until there is one, unless
    /// the queue is empty.
    pub fn wait(&mut self, out: &mut Vec<Completion>) -> usize {
        self.begin();
        loop {
            let waited = self.ring.as_mut().is_some_and(|ring| ring.wait(self.held));
            let count = self.take(out);
            if count > 0 || self.held == 0 {
                return count;
            }
            if !waited {
                event::wait_for(self.event());
            }
        }
    }

    /// Ends requests with this tag with [`Error::Cancelled`], as far as they have not begun. Others complete as if
    /// nothing had happened.
    pub fn cancel(&mut self, tag: u64) {
        let board = self.workers.board();
        let staged = self.staged.extract_if(.., |job| job.tag == tag);
        staged.for_each(|job| board.complete(job.end(Err(Error::Cancelled)), true));
        board.cancel(tag);
        if let Some(ring) = &mut self.ring {
            ring.cancel(tag);
        }
    }
}
