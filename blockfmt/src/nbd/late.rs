//! Requests that are left to a queue, because the storage answers late.

use super::transmission::Request;
use crate::iobuf::AlignedBuf;
use crate::queue::{self, Completion, Queue, QueueOptions};
use crate::{Disk, Memory, Result};
use std::collections::HashMap;
use std::os::fd::BorrowedFd;

/// Most requests of a connection that are under way, and most bytes of their payload unless it is one request.
const LIMITS: (u16, u64) = (64, 64 << 20);
/// Most threads that do what the kernel cannot.
const THREADS: u16 = 32;
/// What any direct I/O is content with, in bytes.
const ALIGNMENT: usize = 4096;
/// Memory for payload that a connection keeps between requests.
const KEEP_BYTES: usize = 1 << 20;

/// The queue of a connection, made once it is needed.
#[derive(Default)]
pub(super) struct Late {
    queue: Option<Queue>,
    /// Whether there is no queue to be had.
    refused: bool,
    /// Requests under way by their tags, and the bytes of each.
    requests: HashMap<u64, (Request, u64)>,
    bytes: u64,
    next_tag: u64,
    /// Whether requests were pushed and not submitted.
    staged: bool,
    completions: Vec<Completion>,
    spare: Vec<AlignedBuf>,
    spare_bytes: usize,
}

impl Late {
    /// Whether requests must be done without a queue.
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// Makes the queue unless it is there; returns whether it is.
    pub fn prepare(&mut self, disk: &Disk) -> bool {
        if self.queue.is_none() && !self.refused {
            let options = QueueOptions { depth: LIMITS.0, threads: THREADS, engine: None };
            match Queue::new(disk, options) {
                Ok(queue) => self.queue = Some(queue),
                Err(error) => {
                    tracing::warn!(%error, "An NBD connection has to do one request after the other");
                    self.refused = true;
                }
            }
        }
        self.queue.is_some()
    }

    /// Requests under way.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether a request with so many bytes of payload may be added.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.requests.is_empty()
            || (self.requests.len() < LIMITS.0.into() && self.bytes.saturating_add(bytes) <= LIMITS.1)
    }

    /// Takes what is to be done for a request; [`submit`](Self::submit) begins it.
    pub fn push(&mut self, request: Request, work: queue::Request) -> Result<()> {
        let Some(queue) = &mut self.queue else { return Err(crate::Error::QueueFull) };
        let bytes = match &work {
            queue::Request::Read { into: memory, .. } | queue::Request::Write { from: memory, .. } => {
                memory.len()
            }
            _ => 0,
        };
        let tag = self.next_tag;
        queue.push(tag, work)?;
        self.next_tag += 1;
        self.requests.insert(tag, (request, bytes as u64));
        self.bytes += bytes as u64;
        self.staged = true;
        Ok(())
    }

    /// Whether something was pushed and not begun.
    pub fn is_staged(&self) -> bool {
        self.staged
    }

    /// Begins what was pushed, and looks for completions.
    pub fn submit(&mut self) {
        let Some(queue) = &mut self.queue else { return };
        if std::mem::take(&mut self.staged) {
            queue.submit();
        }
        if self.completions.is_empty() && !self.requests.is_empty() {
            queue.completions(&mut self.completions);
            self.completions.reverse();
        }
    }

    /// A request that is complete, how it ended, and its memory.
    pub fn completed(&mut self) -> Option<(Request, Result<()>, Option<AlignedBuf>)> {
        let Completion { tag, result, memory } = self.completions.pop()?;
        let (request, bytes) = self.requests.remove(&tag)?;
        self.bytes -= bytes;
        Some((request, result, memory.and_then(Memory::into_aligned)))
    }

    /// What tells of completions, if any are to come.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        self.queue.as_ref().filter(|_| !self.requests.is_empty()).map(Queue::event)
    }

    /// Waits for a completion, if any are to come.
    pub fn wait(&mut self) {
        if let Some(queue) = &mut self.queue
            && self.completions.is_empty()
        {
            self.staged = false;
            queue.wait(&mut self.completions);
            self.completions.reverse();
        }
    }

    /// Waits until nothing is under way, whatever becomes of it.
    pub fn drain(&mut self) {
        if let Some(queue) = &mut self.queue {
            while queue.wait(&mut self.completions) > 0 {
                self.completions.clear();
            }
        }
        self.requests.clear();
    }

    /// Memory for payload, with arbitrary old contents.
    pub fn buffer(&mut self, len: usize) -> AlignedBuf {
        match self.spare.pop() {
            Some(spare) => {
                self.spare_bytes -= spare.capacity();
                if spare.capacity() >= len { spare.with_len(len) } else { AlignedBuf::new(len, ALIGNMENT) }
            }
            None => AlignedBuf::new(len, ALIGNMENT),
        }
    }

    /// Keeps memory for other requests.
    pub fn keep(&mut self, buffer: Option<AlignedBuf>) {
        if let Some(buffer) = buffer
            && self.spare_bytes + buffer.capacity() <= KEEP_BYTES
        {
            self.spare_bytes += buffer.capacity();
            self.spare.push(buffer);
        }
    }
}
