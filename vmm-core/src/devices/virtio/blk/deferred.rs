//! Requests that are under way while the thread of their queue serves others.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use blockfmt::queue::{Completion, Queue, QueueOptions, Request};

use super::super::chain::Segment;
use super::super::iov::IoVectors;
use super::backend::BlockBackend;
use super::request::{Erase, How, Reply, Transfer};
use crate::memory::GuestMemory;

/// Most requests under way, which is what a queue takes.
const MAX_DEPTH: u16 = 4096;
/// Most threads for what the kernel cannot do by itself.
const MAX_THREADS: u16 = 32;
/// Buffers of requests under way, in segments, at which no more are begun: a chain may have over a thousand.
const MAX_SEGMENTS: usize = 1 << 16;

/// A request under way.
pub(super) struct Flight {
    pub(super) reply: Reply,
    pub(super) step: Step,
    /// Segments of its buffers.
    segments: usize,
}

/// What is being done for a request.
pub(super) enum Step {
    /// A transfer, and the buffers that a read fills.
    Transfer(Transfer, Vec<Segment>),
    /// One range after the other; these come next.
    Erase(std::vec::IntoIter<Erase>),
    Flush,
}

/// Requests of one virtqueue that were left to a queue of the back-end.
pub(super) struct Deferred {
    // Dropped before the memory that its requests use: it waits for what is under way.
    queue: Queue,
    memory: GuestMemory,
    /// By the tag of their requests in `queue`, each of which has one there at a time.
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    segments: usize,
    /// Whether requests wait for [`Self::submit`].
    staged: bool,
    /// Empty; kept for its allocation.
    completions: Vec<Completion>,
}

impl Deferred {
    /// For a virtqueue of `size` entries; `None` if the back-end has no queues.
    pub(super) fn new(
        backend: &dyn BlockBackend,
        memory: &GuestMemory,
        size: u16,
    ) -> io::Result<Option<Self>> {
        let depth = size.clamp(1, MAX_DEPTH);
        let options = QueueOptions { depth, threads: depth.min(MAX_THREADS), engine: None };
        let depth = usize::from(depth);
        Ok(backend.queue(options)?.map(|queue| Self {
            queue,
            memory: memory.clone(),
            flights: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            segments: 0,
            staged: false,
            completions: Vec::new(),
        }))
    }

    /// A descriptor that is readable when requests have ended.
    pub(super) fn event(&self) -> RawFd {
        self.queue.event().as_raw_fd()
    }

    /// Whether nothing is under way.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.flights.len()
    }

    /// Whether no more can be begun until something has ended.
    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty() || self.segments >= MAX_SEGMENTS
    }

    /// Begins a transfer from or to `parts`, which are RAM.
    pub(super) fn transfer(&mut self, reply: Reply, transfer: Transfer, parts: &[Segment]) -> io::Result<()> {
        let Transfer { read, offset, .. } = transfer;
        let mut vectors = IoVectors::default();
        let vectors = vectors.resolve(&self.memory, parts).map_err(io::Error::other)?;
        // SAFETY: the memory goes into the queue and is dropped as soon as it comes out of it. The queue belongs to us
        // and is dropped before our reference to guest memory, which keeps that mapped.
        let memory = unsafe { vectors.into_memory() };
        let (request, filled) = match read {
            true => (Request::Read { offset, into: memory }, parts.to_vec()),
            false => (Request::Write { offset, from: memory }, Vec::new()),
        };
        let step = Step::Transfer(transfer, filled);
        self.begin(Flight { reply, step, segments: parts.len() }, request)
    }

    /// Begins a flush.
    pub(super) fn flush(&mut self, reply: Reply) -> io::Result<()> {
        self.begin(Flight { reply, step: Step::Flush, segments: 0 }, Request::Flush)
    }

    /// Begins to erase `first` and then the others.
    pub(super) fn erase(
        &mut self,
        reply: Reply,
        first: Erase,
        others: std::vec::IntoIter<Erase>,
    ) -> io::Result<()> {
        self.begin(Flight { reply, step: Step::Erase(others), segments: 0 }, erasing(first))
    }

    fn begin(&mut self, flight: Flight, request: Request) -> io::Result<()> {
        let Some(&tag) = self.free.last() else {
            return Err(io::Error::other("More requests than the queue takes"));
        };
        self.queue.push(tag as u64, request).map_err(io::Error::other)?;
        self.staged = true;
        self.free.pop();
        self.segments += flight.segments;
        self.flights[tag] = Some(flight);
        Ok(())
    }

    /// Gives what was begun to the queue.
    pub(super) fn submit(&mut self) {
        if std::mem::take(&mut self.staged) {
            self.queue.submit();
        }
    }

    /// Moves what has ended to `out`, and tells whether there was something. With `wait`, waits for it if something is
    /// under way.
    pub(super) fn ended(&mut self, wait: bool, out: &mut Vec<(Flight, io::Result<()>)>) -> bool {
        self.submit();
        let mut completions = std::mem::take(&mut self.completions);
        match wait {
            true => self.queue.wait(&mut completions),
            false => self.queue.completions(&mut completions),
        };
        for Completion { tag, result, memory } in completions.drain(..) {
            drop(memory);
            if let Some(flight) = self.flights.get_mut(tag as usize).and_then(Option::take) {
                self.free.push(tag as usize);
                self.segments -= flight.segments;
                out.push((flight, result.map_err(io::Error::other)));
            }
        }
        self.completions = completions;
        !out.is_empty()
    }
}

fn erasing(Erase { offset, len, how }: Erase) -> Request {
    match how {
        How::Discard => Request::Discard { offset, len },
        How::Zero { unmap } => Request::WriteZeroes { offset, len, unmap },
    }
}
