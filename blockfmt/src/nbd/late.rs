//! Requests that are left to a queue, because the storage answers late.

use super::budget::{Budget, Share};
use super::transmission::Request;
use crate::iobuf::AlignedBuf;
use crate::queue::{self, Completion, Queue, QueueOptions};
use crate::{Disk, Memory, Result};
use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Most requests of a connection that are under way.
const DEPTH: u16 = 64;
/// What any direct I/O is content with, in bytes.
const ALIGNMENT: usize = 4096;
/// Memory for payload that a connection keeps between requests.
const KEEP_BYTES: usize = 1 << 20;

/// A request that is complete, how it ended, the bytes that it has of the budget, and its memory.
pub(super) type Completed = (Request, Result<()>, u64, Option<AlignedBuf>);

/// The queue of a connection, made once it is needed.
pub(super) struct Late {
    // Dropped before its threads are given back.
    queue: Option<Queue>,
    share: Share,
    /// Whether there is no queue to be had.
    refused: bool,
    /// Requests under way by their tags, and the bytes that each has of the budget.
    requests: HashMap<u64, (Request, u64)>,
    next_tag: u64,
    /// Whether requests were pushed and not submitted.
    staged: bool,
    completions: Vec<Completion>,
    spare: Vec<AlignedBuf>,
    spare_bytes: usize,
}

impl Late {
    /// Nothing is under way.
    pub fn new(budget: &Arc<Budget>) -> Self {
        Late {
            queue: None,
            share: Share::new(budget),
            refused: false,
            requests: HashMap::new(),
            next_tag: 0,
            staged: false,
            completions: Vec::new(),
            spare: Vec::new(),
            spare_bytes: 0,
        }
    }

    /// Whether requests must be done without a queue.
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// Makes the queue unless it is there; returns whether it is.
    pub fn prepare(&mut self, disk: &Disk) -> bool {
        if self.queue.is_none() && !self.refused {
            let options = QueueOptions { depth: DEPTH, threads: self.share.take_threads(), engine: None };
            match Queue::new(disk, options) {
                Ok(queue) => self.queue = Some(queue),
                Err(error) => {
                    tracing::warn!(%error, "An NBD connection has to do one request after the other");
                    self.refused = true;
                    self.share.give_threads();
                }
            }
        }
        self.queue.is_some()
    }

    /// Requests under way.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Takes bytes of the budget for the payload of a request, unless others have to end before it may begin.
    pub fn reserve(&mut self, bytes: u64) -> bool {
        self.requests.len() < DEPTH.into() && self.share.take(bytes, self.requests.is_empty())
    }

    /// Gives bytes of the budget back: nothing is left of a payload.
    pub fn release(&mut self, bytes: u64) {
        self.share.give(bytes);
    }

    /// Takes what is to be done for a request that has reserved `bytes`; [`submit`](Self::submit) begins it.
    pub fn push(&mut self, request: Request, work: queue::Request, bytes: u64) -> Result<()> {
        let Some(queue) = &mut self.queue else { return Err(crate::Error::QueueFull) };
        let tag = self.next_tag;
        queue.push(tag, work)?;
        self.next_tag += 1;
        self.requests.insert(tag, (request, bytes));
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

    /// The next request that is complete. The caller releases its bytes.
    pub fn completed(&mut self) -> Option<Completed> {
        let Completion { tag, result, memory } = self.completions.pop()?;
        let (request, bytes) = self.requests.remove(&tag)?;
        Some((request, result, bytes, memory.and_then(Memory::into_aligned)))
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
