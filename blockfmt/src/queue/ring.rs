//! Requests that the kernel executes.
//!
//! # Who ends them
//! What the kernel has completed lies in the completion queue until a thread takes it from there and *ends* it: only then
//! the request gives back the gates of the disk and of a layer that it holds ([`Held`]). As a rule the owner of the queue
//! does that itself, since the descriptor that it watches is readable while the completion queue is not empty, or since
//! it waits in the kernel. No other thread runs in between.
//!
//! Who may wait for whom:
//! - Whoever closes a gate (a snapshot, a job, a change of size) waits until all requests that hold it have ended, and
//!   may have locks of the disk meanwhile.
//! - Between two looks at its queue the owner may wait for anything: for a client that takes no replies, for a lock, for
//!   a gate that somebody closes, or for one that it closes itself. It could wait for its own requests that way.
//! - Therefore a thread, the watcher, looks at the completion queue every [`INTERVAL`] while requests are under way, and
//!   ends what is still there at its next look if the owner did not look meanwhile. It tells the owner by the event of
//!   the threads. So a request ends at most two intervals after the kernel completed it, whatever the owner does.
//! - The watcher waits only for the lock of the flights. Under that lock nobody waits for a gate or for storage: the
//!   place of a request is looked up, and a write to the page cache is made, without it. The lock of the board may be
//!   taken under it, never the other way round.
//! - The owner waits in the kernel only if the kernel has all requests of the queue: nobody else could end one. While it
//!   does, the watcher keeps away, for the owner would wait for another completion than the one that was taken away.
//!
//! The kernel does its part of a completion in the thread that submitted the request, and interrupts it for that, also
//! when it sleeps.

use super::event::AnyOf;
use super::workers::Board;
use super::{Job, Request, Workers};
use crate::disk::{Held, Place};
use crate::{Error, Memory};
use io_uring::types::{CancelBuilder, Fd};
use io_uring::{IoUring, opcode, squeue};
use libc::iovec;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Identifies requests to the kernel that are none of the caller's.
const CONTROL: u64 = u64::MAX;
/// Most segments of a transfer (`IOV_MAX`), and most bytes.
const LIMITS: (usize, usize) = (1024, 1 << 30);
/// Longest write to the page cache that the call that submits makes itself, in bytes.
const AT_ONCE: usize = 256 << 10;
/// Time between two looks of the watcher.
const INTERVAL: Duration = Duration::from_millis(1);

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
    /// The owner waits in the kernel and ends what is completed.
    owner_waits: bool,
    /// The watcher saw completions, and the owner did not look since.
    overlooked: bool,
    /// The watcher looks now and then; otherwise it has to be told of requests.
    watched: bool,
    ended: bool,
}

struct Shared {
    uring: IoUring,
    flights: Mutex<Flights>,
    /// Requests are under way that the watcher does not know of, or none will come.
    left: Condvar,
    board: Arc<Board>,
}

/// An instance of `io_uring` with its watcher.
pub(super) struct Ring {
    shared: Arc<Shared>,
    /// Readable while there are completions of the kernel, or of the threads.
    event: AnyOf,
    /// Empty; kept for its allocation.
    ready: Vec<(squeue::Entry, Flight)>,
    watcher: Option<JoinHandle<()>>,
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
        // SAFETY: the descriptor stays open during the call.
        let completions = unsafe { BorrowedFd::borrow_raw(uring.as_raw_fd()) };
        let event = AnyOf::new([board.event.as_fd(), completions])?;
        let shared = Arc::new(Shared { uring, flights, left: Condvar::new(), board });
        let watching = shared.clone();
        let watcher = std::thread::Builder::new().name("disk-ring".into()).spawn(move || watching.watch())?;
        Ok(Ring { shared, event, ready: Vec::new(), watcher: Some(watcher) })
    }

    /// A descriptor that is readable while there are completions of the kernel or of the threads.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Requests that the kernel was given so far.
    pub fn begun(&self) -> u64 {
        self.shared.flights.lock().begun
    }

    /// Takes requests for the kernel; those that it cannot do go to the threads. [`submit`](Self::submit) or
    /// [`wait`](Self::wait) begins them.
    pub fn push(&mut self, jobs: impl Iterator<Item = Job>) {
        let Ring { shared, ready, .. } = self;
        ready.extend(jobs.filter_map(|job| shared.prepare(job)));
        if ready.is_empty() {
            return;
        }
        let mut flights = shared.flights.lock();
        for (entry, flight) in ready.drain(..) {
            match flights.free.pop() {
                Some(slot) => {
                    flights.slots[slot] = Some(flight);
                    flights.active += 1;
                    flights.begun += 1;
                    shared.push(&mut flights, &entry.user_data(slot as u64));
                }
                // Not with as many slots as the queue has requests.
                None => shared.give(flight),
            }
        }
    }

    /// Begins what was pushed, and ends what the kernel has completed.
    pub fn submit(&mut self) {
        let mut flights = self.shared.flights.lock();
        self.shared.submit(&flights);
        self.shared.collect_as_owner(&mut flights);
    }

    /// Ends what the kernel has completed.
    pub fn collect(&mut self) {
        self.shared.collect_as_owner(&mut self.shared.flights.lock());
    }

    /// Begins what was pushed. Then, if the kernel has all `held` requests of the queue, waits for one to end and returns
    /// true; it may be that none did.
    pub fn wait(&mut self, held: usize) -> bool {
        let shared = &*self.shared;
        let mut flights = shared.flights.lock();
        let alone = held > 0 && flights.active == held;
        match alone {
            true => shared.wait(&mut flights),
            false => shared.submit(&flights),
        }
        shared.collect_as_owner(&mut flights);
        alone
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
        shared.collect_as_owner(&mut flights);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let shared = &*self.shared;
        let mut flights = shared.flights.lock();
        flights.ended = true;
        shared.cancel(&mut flights, CancelBuilder::any());
        while flights.active > 0 {
            shared.wait(&mut flights);
            shared.collect_as_owner(&mut flights);
        }
        drop(flights);
        shared.left.notify_one();
        if let Some(watcher) = self.watcher.take() {
            // A panic was reported by its thread.
            let _ = watcher.join();
        }
    }
}

impl Shared {
    /// The kernel's form of a request, if the kernel can do it; otherwise deals with it elsehow.
    fn prepare(&self, mut job: Job) -> Option<(squeue::Entry, Flight)> {
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
                drop(held);
                self.board.complete(job.end(result), true);
            }
            (Place::File(held), request) if (1..=LIMITS.1).contains(&len) => {
                match entry(request, &held, len) {
                    Some(entry) => return Some((entry, Flight { job, held, len })),
                    None => self.give(Flight { job, held, len }),
                }
            }
            (Place::Zero, Request::Read { into, .. }) => {
                into.scatter().zero();
                self.board.complete(job.end(Ok(())), true);
            }
            _ => self.board.give(job),
        }
        None
    }

    /// Leaves a request to the threads.
    fn give(&self, Flight { job, held, .. }: Flight) {
        drop(held); // whoever waits for this request must not be waited for by a thread
        self.board.give(job);
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
            self.collect(flights, true);
        }
    }

    /// Whether the kernel has yet to be given something.
    fn is_staged(&self, _flights: &Flights) -> bool {
        // SAFETY: the lock, which `_flights` proves, keeps others from the submission queue.
        unsafe { !self.uring.submission_shared().is_empty() }
    }

    /// Whether the kernel has completed something.
    fn is_complete(&self, _flights: &Flights) -> bool {
        // SAFETY: the lock, which `_flights` proves, keeps others from the completion queue.
        unsafe { !self.uring.completion_shared().is_empty() }
    }

    /// Gives the kernel what is in the submission queue. What it does not take now, the next call tries again.
    fn submit(&self, flights: &Flights) {
        while self.is_staged(flights) {
            match self.uring.submit() {
                Ok(_) => return,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => {
                    tracing::debug!(%error, "The kernel does not take requests now");
                    return;
                }
            }
        }
    }

    fn cancel(&self, flights: &mut Flights, what: CancelBuilder) {
        self.push(flights, &opcode::AsyncCancel2::new(what).build().user_data(CONTROL));
        self.submit(flights);
    }

    /// Submits, and waits until something is complete, without the lock meanwhile. For the owner.
    fn wait(&self, flights: &mut MutexGuard<'_, Flights>) {
        if self.is_complete(flights) && !self.is_staged(flights) {
            return;
        }
        flights.owner_waits = true;
        let waited = MutexGuard::unlocked(flights, || self.uring.submitter().submit_and_wait(1));
        if let Err(error) = waited
            && error.raw_os_error() != Some(libc::EINTR)
        {
            // Requests are in flight, and the kernel uses their memory: there is nothing to do but to wait.
            tracing::debug!(%error, "Waiting for requests failed");
            MutexGuard::unlocked(flights, || std::thread::sleep(Duration::from_millis(1)));
        }
        flights.owner_waits = false;
    }

    /// Ends what is complete, and leaves the rest to be watched.
    fn collect_as_owner(&self, flights: &mut Flights) {
        self.collect(flights, true);
        flights.overlooked = false;
        if flights.active > 0 && !flights.watched {
            flights.watched = true;
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
        let Flight { job, held, len } = &flight;
        let (op, write) = match job.request {
            Request::Write { .. } => ("write", true),
            _ => ("read", false),
        };
        if write {
            held.written(*len as u64);
        }
        let result = match usize::try_from(result) {
            Ok(moved) if moved == *len => Ok(()),
            Err(_) if result == -libc::ECANCELED => Err(Error::Cancelled),
            Err(_) if !matches!(-result, libc::EAGAIN | libc::EINTR) => {
                Err(Error::io(op, held.name(), io::Error::from_raw_os_error(-result)))
            }
            // Only a part was moved, or nothing for now: the disk knows how to go on, and what lies beyond an end.
            _ => return self.give(flight),
        };
        let Flight { job, held, .. } = flight;
        drop(held);
        self.board.complete(job.end(result), noticed);
    }

    /// Looks after requests of an owner who does not.
    fn watch(&self) {
        let mut flights = self.flights.lock();
        while !flights.ended {
            if flights.active == 0 {
                flights.watched = false;
                self.left.wait(&mut flights);
            } else {
                self.left.wait_for(&mut flights, INTERVAL);
                self.look(&mut flights);
            }
        }
    }

    fn look(&self, flights: &mut Flights) {
        if flights.owner_waits {
            return;
        }
        self.submit(flights); // what the kernel did not take before
        let found = self.is_complete(flights);
        if found && flights.overlooked {
            self.collect(flights, false);
        }
        flights.overlooked = found && !flights.overlooked;
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

#[cfg(test)]
mod tests {
    use super::super::{Engine, Queue, QueueOptions};
    use super::*;
    use crate::storage::FileStorage;
    use crate::{Format, OpenOptions, Storage};
    use std::io::{PipeReader, PipeWriter, Write};

    const LEN: usize = 512;

    /// A queue with a read that the kernel completes when [`LEN`] bytes are written to the pipe.
    fn queue() -> (Queue, PipeReader, PipeWriter) {
        let storage = Arc::new(FileStorage::temporary(&std::env::temp_dir()).unwrap());
        storage.set_len(LEN as u64).unwrap();
        let disk = OpenOptions::new(Format::Raw).open_storage(storage, "file").unwrap();
        let options = QueueOptions { engine: Some(Engine::IoUring), ..QueueOptions::default() };
        let mut queue = Queue::new(&disk, options).unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let Place::File(held) = disk.place_to_read(0, LEN as u64) else { panic!("it is a file") };
        let mut into = Memory::from(vec![0; LEN]);
        let start = into.segments().1.unwrap().iov_base;
        let entry = opcode::Read::new(Fd(reader.as_raw_fd()), start.cast(), LEN as u32).build();
        let job = Job { tag: 1, request: Request::Read { offset: 0, into } };
        queue.held = 1;
        queue.ring.as_mut().unwrap().ready.push((entry, Flight { job, held, len: LEN }));
        queue.submit();
        assert_eq!(queue.by_kernel(), 1);
        (queue, reader, writer)
    }

    /// Whether a descriptor becomes readable.
    fn readable(descriptor: BorrowedFd<'_>, milliseconds: i32) -> bool {
        let mut poll = libc::pollfd { fd: descriptor.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure, which lives during the call.
        unsafe { libc::poll(&raw mut poll, 1, milliseconds) > 0 }
    }

    #[test]
    fn no_thread_is_between_the_kernel_and_the_owner() {
        let (mut queue, _reader, mut writer) = queue();
        let shared = queue.ring.as_ref().unwrap().shared.clone();
        let flights = shared.flights.lock(); // the watcher can do nothing
        assert!(!readable(queue.event(), 0));
        writer.write_all(&[1; LEN]).unwrap();
        assert!(readable(queue.event(), 60_000));
        drop(flights);
        let mut done = Vec::new();
        assert_eq!(queue.completions(&mut done), 1);
        assert!(done[0].result.is_ok());
    }

    #[test]
    fn the_watcher_ends_what_the_owner_overlooked_unless_it_waits_in_the_kernel() {
        let (queue, _reader, mut writer) = queue();
        let shared = &queue.ring.as_ref().unwrap().shared;
        let mut flights = shared.flights.lock();
        writer.write_all(&[1; LEN]).unwrap();
        assert!(readable(queue.event(), 60_000));
        flights.owner_waits = true;
        (0..3).for_each(|_| shared.look(&mut flights));
        assert!(shared.is_complete(&flights));
        flights.owner_waits = false;
        flights.overlooked = false;
        shared.look(&mut flights);
        assert!(shared.is_complete(&flights) && flights.overlooked, "the owner may be about to look");
        shared.look(&mut flights);
        assert!(!shared.is_complete(&flights) && flights.active == 0);
        assert!(readable(shared.board.event.as_fd(), 0), "it is told");
    }
}
