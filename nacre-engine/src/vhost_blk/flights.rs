//! Requests that a thread executes, and those that it leaves to a queue of the disk.
#![expect(unsafe_code, reason = "the memory of requests that are under way is the guest's")]

use super::device::Device;
use super::request::{Chain, Request};
use blockfmt::queue::{Completion, Pace, Queue, QueueOptions};
use std::os::fd::BorrowedFd;

/// Most threads that do requests for the queues of a device, and the least for each.
const THREADS: (u16, u16) = (64, 8);

/// A request that has ended: its chain, and the number of bytes that were written to its buffers.
pub type Ended = (Chain, u32);

/// Executes requests one by one as long as their bytes are at hand; many at once while storage answers late.
pub struct Flights {
    /// Made when it is needed. Dropped before the requests whose memory it uses.
    queue: Option<Queue>,
    /// Most requests of that queue.
    depth: u16,
    /// What is under way, at the place that is its tag.
    requests: Vec<Option<Request>>,
    free: Vec<usize>,
    completions: Vec<Completion>,
    /// Requests that were left to the queue and are not begun.
    staged: usize,
    /// The host does not let us make a queue.
    refused: bool,
    transfers: Pace,
    long: Pace,
}

impl Default for Flights {
    fn default() -> Self {
        Self::new()
    }
}

impl Flights {
    /// Nothing is under way.
    pub fn new() -> Self {
        Flights {
            queue: None,
            depth: 0,
            requests: Vec::new(),
            free: Vec::new(),
            completions: Vec::new(),
            staged: 0,
            refused: false,
            transfers: Pace::new(),
            long: Pace::of_long_requests(),
        }
    }

    /// Whether nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.requests.len()
    }

    /// Requests that were left to the queue and are not begun.
    pub fn staged(&self) -> usize {
        self.staged
    }

    /// Readable when requests that are under way have ended.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        self.queue.as_ref().filter(|_| !self.is_empty()).map(Queue::event)
    }

    /// Executes a request, or leaves it to the queue: then `None`, and [`collect`](Self::collect) begins it. `more` tells
    /// whether others wait.
    pub fn run(&mut self, device: &Device, mut request: Request, more: bool) -> Option<Ended> {
        if request.is_done() {
            return Some(ended(request));
        }
        if self.refused {
            request.execute(device);
            return Some(ended(request));
        }
        let more = more || !self.is_empty();
        let Flights { queue, staged, transfers, long, .. } = self;
        let pace = if request.is_long() { long } else { transfers };
        let execute = || {
            // It may take a while: what waits for the kernel does not have to wait for it.
            begin(queue, staged);
            request.execute(device);
        };
        match pace.run(more, execute) {
            Some(()) => Some(ended(request)),
            None => self.leave(device, request),
        }
    }

    /// Leaves a request to the queue; executes it if that is impossible.
    pub fn leave(&mut self, device: &Device, mut request: Request) -> Option<Ended> {
        if request.is_done() || !self.has_room(device, request.chain.size) {
            request.execute(device);
            return Some(ended(request));
        }
        let tag = self.free.pop().unwrap_or_else(|| {
            self.requests.push(None);
            self.requests.len() - 1
        });
        self.requests[tag] = Some(request);
        self.go_on(tag)
    }

    /// Makes the queue, for a ring of a size, unless there is one. Returns whether it takes a request.
    fn has_room(&mut self, device: &Device, size: u16) -> bool {
        if self.depth < size && self.is_empty() {
            self.queue = None; // the ring is another one than before
        }
        if self.queue.is_none() && !self.refused {
            let threads = (THREADS.0 / device.queues).max(THREADS.1);
            let options = QueueOptions { depth: size, threads, ..QueueOptions::default() };
            match Queue::new(&device.disk, options) {
                Ok(queue) => (self.queue, self.depth) = (Some(queue), size),
                Err(error) => {
                    tracing::warn!(%error, "Requests of a virtual machine are executed one by one");
                    self.refused = true;
                }
            }
        }
        self.queue.as_ref().is_some_and(|queue| queue.len() < usize::from(self.depth))
    }

    /// Gives the next step of a request to the queue. Returns the request if there is none.
    fn go_on(&mut self, tag: usize) -> Option<Ended> {
        let place = &mut self.requests[tag];
        // SAFETY: the request stays where it is until the queue has returned the completion, or is dropped.
        let step = place.as_mut().and_then(|request| unsafe { request.next() });
        if let (Some(step), Some(queue)) = (step, &mut self.queue) {
            match queue.push(tag as u64, step) {
                Ok(()) => {
                    self.staged += 1;
                    return None;
                }
                // Not with as many requests as the queue has places: each has one step at a time.
                Err(error) => {
                    if let Some(request) = place {
                        request.note(Err(error));
                    }
                }
            }
        }
        self.free.push(tag);
        place.take().map(ended)
    }

    /// Begins what was left to the queue, and moves the requests that have ended to `out`.
    pub fn collect(&mut self, out: &mut Vec<Ended>) {
        self.collect_with(out, Queue::completions);
    }

    /// Like [`collect`](Self::collect), but waits until there is one or nothing is under way.
    pub fn wait(&mut self, out: &mut Vec<Ended>) {
        let before = out.len();
        while out.len() == before && !self.is_empty() {
            self.collect_with(out, Queue::wait);
        }
    }

    fn collect_with(
        &mut self,
        out: &mut Vec<Ended>,
        take: impl Fn(&mut Queue, &mut Vec<Completion>) -> usize,
    ) {
        let mut completions = std::mem::take(&mut self.completions);
        loop {
            begin(&mut self.queue, &mut self.staged);
            let Some(queue) = &mut self.queue else { break };
            take(queue, &mut completions);
            for Completion { tag, result, .. } in completions.drain(..) {
                let tag = tag as usize;
                if let Some(request) = self.requests.get_mut(tag).and_then(Option::as_mut) {
                    request.note(result);
                    out.extend(self.go_on(tag));
                }
            }
            if self.staged == 0 {
                break;
            }
        }
        self.completions = completions;
    }
}

/// Begins what was left to a queue.
fn begin(queue: &mut Option<Queue>, staged: &mut usize) {
    if *staged > 0
        && let Some(queue) = queue
    {
        queue.submit();
        *staged = 0;
    }
}

fn ended(request: Request) -> Ended {
    let written = request.answer();
    (request.chain, written)
}
