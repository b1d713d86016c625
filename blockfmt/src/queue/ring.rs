//! Requests that the kernel executes.
//!
//! The submission and the completion queue are used under one lock. What completes at once (from the page cache, for
//! example) is collected by the call that submits; only for what is left after that a thread waits in the kernel. It
//! ends requests whether or not the owner of the queue looks, so that whoever waits until no request of a disk is in
//! flight never waits for the owner.

use super::workers::Board;
use super::{Job, Request, Workers};
use crate::disk::{Held, Place};
use crate::{Error, Memory};
use io_uring::types::{CancelBuilder, Fd};
use io_uring::{IoUring, opcode, squeue};
use libc::iovec;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Identifies requests to the kernel that are none of the caller's.
const CONTROL: u64 = u64::MAX;
/// Most segments of a transfer (`IOV_MAX`), and most bytes.
const LIMITS: (usize, usize) = (1024, 1 << 30);
/// Longest write to the page cache that the call that submits makes itself, in bytes.
const AT_ONCE: usize = 256 << 10;

/// A request in the kernel.
struct Flight {
    job: Job,
    held: Held,
    len: usize,
}

/// What has been begun.
#[derive(Default)]
struct Flights {
    slots: Vec<Option<Flight>>,
    free: Vec<usize>,
    active: usize,
    /// How many there were.
    begun: u64,
    /// Whether the thread looks for completions.
    reaping: bool,
    ended: bool,
}

struct Shared {
    uring: IoUring,
    flights: Mutex<Flights>,
    /// Something is left for the thread.
    left: Condvar,
    board: Arc<Board>,
}

/// An instance of `io_uring` with the thread that waits for it.
pub(super) struct Ring {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Ring {
    pub fn new(workers: &Workers, depth: usize) -> io::Result<Self> {
        // One more for cancellations; the completion queue is twice as long.
        let uring = IoUring::new((depth + 1).next_power_of_two() as u32)?;
        let flights = Flights {
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).collect(),
            ..Flights::default()
        };
        let flights = Mutex::new(flights);
        let board = workers.board().clone();
        let shared = Arc::new(Shared { uring, flights, left: Condvar::new(), board });
        let reaper = shared.clone();
        let thread = std::thread::Builder::new().name("disk-ring".into()).spawn(move || reaper.reap())?;
        Ok(Ring { shared, thread: Some(thread) })
    }

    /// Requests that the kernel was given so far.
    pub fn begun(&self) -> u64 {
        self.shared.flights.lock().begun
    }

    /// Begins requests; those that the kernel cannot do go to the threads.
    pub fn start(&mut self, jobs: impl Iterator<Item = Job>) {
        let shared = &*self.shared;
        let mut flights = shared.flights.lock();
        let mut queued = false;
        for job in jobs {
            queued |= shared.start_one(&mut flights, job);
        }
        if queued {
            shared.submit(&mut flights);
            shared.collect(&mut flights, true);
            shared.leave_rest(&flights);
        }
    }

    /// Asks the kernel to give up requests with this tag.
    pub fn cancel(&mut self, tag: u64) {
        let shared = &*self.shared;
        let mut flights = shared.flights.lock();
        let with_tag = |slot: &Option<Flight>| slot.as_ref().is_some_and(|flight| flight.job.tag == tag);
        let found: Vec<_> = (0..flights.slots.len()).filter(|n| with_tag(&flights.slots[*n])).collect();
        for slot in found {
            shared.cancel(&mut flights, CancelBuilder::user_data(slot as u64));
        }
        shared.collect(&mut flights, true);
        shared.leave_rest(&flights);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut flights = self.shared.flights.lock();
        flights.ended = true;
        // Its completion also wakes a thread that waits in the kernel.
        self.shared.cancel(&mut flights, CancelBuilder::any());
        drop(flights);
        self.shared.left.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic was reported by its thread.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Puts a request into the submission queue if the kernel can do it; otherwise deals with it elsehow.
    fn start_one(&self, flights: &mut Flights, mut job: Job) -> bool {
        let disk = &self.board.disk;
        let (place, len) = match &job.request {
            Request::Read { offset, into } => (disk.place_to_read(*offset, into.len() as u64), into.len()),
            Request::Write { offset, from } => (disk.place_to_write(*offset, from.len() as u64), from.len()),
            _ => (Place::Elsewhere, 0),
        };
        match (place, &mut job.request) {
            (Place::File(held), Request::Write { from, .. }) if held.alignment() == 1 && len <= AT_ONCE => {
                // A copy into the page cache. The kernel would leave it to a thread, which takes longer.
                let result = held.write(from.gather());
                held.written(len as u64);
                self.board.complete(job.end(result), true);
            }
            (Place::File(held), _) if (1..=LIMITS.1).contains(&len) => {
                if let Some(slot) = flights.free.last().copied()
                    && let Some(entry) = entry(&mut job.request, &held, len)
                {
                    flights.free.pop();
                    flights.slots[slot] = Some(Flight { job, held, len });
                    flights.active += 1;
                    flights.begun += 1;
                    self.push(flights, &entry.user_data(slot as u64));
                    return true;
                }
                drop(held);
                self.board.give(job);
            }
            (Place::Zero, Request::Read { into, .. }) => {
                into.scatter().zero();
                self.board.complete(job.end(Ok(())), true);
            }
            _ => self.board.give(job),
        }
        false
    }

    /// Adds an entry to the submission queue, which holds all flights and one more.
    fn push(&self, flights: &mut Flights, entry: &squeue::Entry) {
        loop {
            // SAFETY: the lock, which `flights` proves, keeps others from the submission queue. What the entry refers
            // to lives in its slot until its completion was seen.
            let pushed = unsafe { self.uring.submission_shared().push(entry) };
            if pushed.is_ok() {
                return;
            }
            self.submit(flights);
        }
    }

    /// Gives the kernel what is in the submission queue. What it does not take now, the thread tries again.
    fn submit(&self, flights: &mut Flights) {
        loop {
            match self.uring.submit() {
                Ok(_) => return,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => {
                    tracing::debug!(%error, "The kernel does not take requests now");
                    self.collect(flights, true);
                    return;
                }
            }
        }
    }

    fn cancel(&self, flights: &mut Flights, what: CancelBuilder) {
        self.push(flights, &opcode::AsyncCancel2::new(what).build().user_data(CONTROL));
        self.submit(flights);
    }

    /// Makes the thread wait for what is not complete.
    fn leave_rest(&self, flights: &Flights) {
        if flights.active > 0 && !flights.reaping {
            self.left.notify_one();
        }
    }

    /// Ends the requests that the kernel has completed.
    fn collect(&self, flights: &mut Flights, noticed: bool) {
        // SAFETY: the lock, which `flights` proves, keeps others from the completion queue.
        for entry in unsafe { self.uring.completion_shared() } {
            if entry.user_data() == CONTROL {
                continue;
            }
            let slot = entry.user_data() as usize;
            let Some(flight) = flights.slots[slot].take() else { continue };
            flights.free.push(slot);
            flights.active -= 1;
            self.finish(flight, entry.result(), noticed);
        }
    }

    fn finish(&self, flight: Flight, result: i32, noticed: bool) {
        let Flight { job, held, len } = flight;
        let (op, write) = match job.request {
            Request::Write { .. } => ("write", true),
            _ => ("read", false),
        };
        if write {
            held.written(len as u64);
        }
        let result = match usize::try_from(result) {
            Ok(moved) if moved == len => Ok(()),
            Err(_) if result == -libc::ECANCELED => Err(Error::Cancelled),
            Err(_) if !matches!(-result, libc::EAGAIN | libc::EINTR) => {
                Err(Error::io(op, held.name(), io::Error::from_raw_os_error(-result)))
            }
            // Only a part was moved, or nothing for now: the disk knows how to go on, and what lies beyond an end.
            _ => {
                drop(held); // whoever waits for this request must not be waited for by a thread
                return self.board.give(job);
            }
        };
        drop(held);
        self.board.complete(job.end(result), noticed);
    }

    /// Waits for completions as long as requests are in flight.
    fn reap(&self) {
        let mut flights = self.flights.lock();
        loop {
            if flights.active > 0 {
                flights.reaping = true;
                let waited = MutexGuard::unlocked(&mut flights, || self.uring.submitter().submit_and_wait(1));
                if let Err(error) = waited
                    && error.raw_os_error() != Some(libc::EINTR)
                {
                    // Requests are in flight, and the kernel uses their memory: there is nothing to do but to wait.
                    tracing::debug!(%error, "Waiting for requests failed");
                    MutexGuard::unlocked(&mut flights, || std::thread::sleep(Duration::from_millis(1)));
                }
                self.collect(&mut flights, false);
            } else if flights.ended {
                return;
            } else {
                flights.reaping = false;
                self.left.wait(&mut flights);
            }
        }
    }
}

/// The kernel's form of a request; `None` if it cannot be put so.
fn entry(request: &mut Request, held: &Held, len: usize) -> Option<squeue::Entry> {
    let (fd, offset) = held.file();
    let (write, memory): (_, &mut Memory) = match request {
        Request::Read { into, .. } => (false, into),
        Request::Write { from, .. } => (true, from),
        _ => return None,
    };
    let align = held.alignment();
    if align > 1
        && !(offset.is_multiple_of(align)
            && (len as u64).is_multiple_of(align)
            && memory.gather().aligned(512))
    {
        return None;
    }
    let (list, single) = memory.segments();
    if list.len() > LIMITS.0 {
        return None;
    }
    let (start, count) = (list.as_ptr(), list.len() as u32);
    Some(match (single, write) {
        (Some(iovec { iov_base, .. }), false) => {
            opcode::Read::new(Fd(fd), iov_base.cast(), len as u32).offset(offset).build()
        }
        (Some(iovec { iov_base, .. }), true) => {
            opcode::Write::new(Fd(fd), iov_base.cast(), len as u32).offset(offset).build()
        }
        (None, false) => opcode::Readv::new(Fd(fd), start, count).offset(offset).build(),
        (None, true) => opcode::Writev::new(Fd(fd), start, count).offset(offset).build(),
    })
}
