//! A queue of an export and the thread that serves it.

use super::device::Device;
use super::flights::{Ended, Flights};
use super::request::{Chain, Request};
use super::ring::{Ring, RingError};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Most requests that are left to the queue of the disk before it begins them.
const BATCH: usize = 32;

/// What a front-end has set up.
#[derive(Default)]
pub struct State {
    pub ring: Option<Ring>,
    /// How the driver notifies.
    kick: Option<Arc<File>>,
    /// How the driver is notified.
    call: Option<File>,
    pub enabled: bool,
    /// Requests that were taken and have not ended.
    under_way: usize,
    /// Only requests that were in flight before are taken.
    draining: bool,
    /// The thread ends, or has ended.
    ended: bool,
}

impl State {
    /// Whether requests that have to be done before the queue stops are not done.
    fn is_occupied(&self) -> bool {
        let old = self.enabled && !self.ended && self.ring.as_ref().is_some_and(Ring::has_old);
        self.under_way > 0 || old
    }

    /// Does something with the ring if it may be served now. One that is malformed is given up: only its driver suffers,
    /// until it resets the device.
    fn act<T>(&mut self, act: impl FnOnce(&mut Ring) -> Result<T, RingError>) -> Option<T> {
        let allowed = self.enabled && !self.ended;
        let ring = self.ring.as_mut().filter(|ring| allowed && (!self.draining || ring.has_old()))?;
        act(ring).map_err(|error| self.give_up(&error)).ok()
    }

    /// Takes a request if it may be served now; tells too whether others wait.
    fn take(&mut self) -> Option<(Chain, bool)> {
        let (chain, more) = self.act(|ring| Ok(ring.take()?.map(|chain| (chain, ring.has_more()))))??;
        self.under_way += 1;
        Some((chain, more))
    }

    /// Tells the driver that requests are done, and notifies it if it wants that.
    fn complete(&mut self, list: impl IntoIterator<Item = Ended>) {
        let mut notify = false;
        for (chain, written) in list {
            self.under_way -= 1;
            match self.ring.as_mut().map(|ring| ring.complete(&chain, written)) {
                Some(Ok(wanted)) => notify |= wanted,
                Some(Err(error)) => self.give_up(&error),
                None => {}
            }
        }
        if notify && let Some(mut call) = self.call.as_ref() {
            let _ = call.write(&1u64.to_ne_bytes()); // a counter that is full says the same
        }
    }

    fn give_up(&mut self, error: &RingError) {
        tracing::warn!(%error, "A queue is malformed");
        self.ring = None;
    }
}

/// A notifier of a front-end, which may be any descriptor: neither reading nor writing it may wait.
fn notifier(file: Option<File>) -> io::Result<Option<File>> {
    if let Some(file) = &file {
        let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
        fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    Ok(file)
}

struct Shared {
    device: Arc<Device>,
    state: Mutex<State>,
    /// Everything that may be served was.
    completed: Condvar,
    /// Wakes the thread, which has the other end.
    wake: UnixStream,
    woken: UnixStream,
}

/// A queue with its thread, which ends when this is dropped.
pub struct Queue {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Queue {
    pub fn start(device: Arc<Device>, number: u16) -> io::Result<Self> {
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let state = Mutex::default();
        let shared = Arc::new(Shared { device, state, completed: Condvar::new(), wake, woken });
        let ours = shared.clone();
        let run = move || {
            let mut flights = Flights::new();
            if let Err(error) = ours.run(&mut flights) {
                tracing::warn!(%error, "A queue is not served any more");
            }
            drop(flights); // nothing uses the guest's memory any more
            let mut state = ours.state.lock();
            (state.ended, state.under_way) = (true, 0);
            ours.completed.notify_all();
        };
        let thread = std::thread::Builder::new().name(format!("vhost-queue-{number}")).spawn(run)?;
        Ok(Queue { shared, thread: Some(thread) })
    }

    /// Changes what is set up, between two steps of the thread, which looks at it again then.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.shared.state.lock());
        self.shared.wake();
        result
    }

    /// Takes no more requests. The thread ends when those that were taken have ended.
    pub fn end(&self) {
        self.change(|state| state.ended = true);
    }

    pub fn set_kick(&self, file: Option<File>) -> io::Result<()> {
        let kick = notifier(file)?.map(Arc::new);
        self.change(|state| state.kick = kick);
        Ok(())
    }

    pub fn set_call(&self, file: Option<File>) -> io::Result<()> {
        let call = notifier(file)?;
        self.change(|state| state.call = call);
        Ok(())
    }

    /// Waits until nothing is under way, also of a ring that was given up.
    pub fn settle(&self) {
        let mut state = self.shared.state.lock();
        self.shared.completed.wait_while(&mut state, |state| state.under_way > 0);
    }

    /// Stops the queue when the requests that were taken are done. Returns the index of the next one, if it ran.
    pub fn stop(&self) -> Option<u16> {
        self.change(|state| state.draining = true);
        let mut state = self.shared.state.lock();
        self.shared.completed.wait_while(&mut state, |state| state.is_occupied());
        state.draining = false;
        (state.kick, state.call) = (None, None);
        state.ring.take().map(|ring| ring.base())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.end();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn wake(&self) {
        let _ = (&self.wake).write(&[1]); // when it is full, the thread is about to wake
    }

    fn run(&self, flights: &mut Flights) -> io::Result<()> {
        let mut ended = Vec::new();
        loop {
            self.serve(flights, &mut ended);
            let kick = {
                let state = self.state.lock();
                if state.ended && flights.is_empty() {
                    return Ok(());
                }
                state.kick.clone()
            };
            self.wait(kick.as_deref(), flights)?;
        }
    }

    /// Waits for the driver, for the end of a request or for a change.
    fn wait(&self, kick: Option<&File>, flights: &Flights) -> io::Result<()> {
        let mut list = vec![PollFd::new(self.woken.as_fd(), PollFlags::POLLIN)];
        list.extend(kick.map(|kick| PollFd::new(kick.as_fd(), PollFlags::POLLIN)));
        list.extend(flights.event().map(|event| PollFd::new(event, PollFlags::POLLIN)));
        match poll(&mut list, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => return Ok(()),
            result => result?,
        };
        if list[0].any().unwrap_or(true) {
            let _ = (&self.woken).read(&mut [0; 64]); // what is left wakes us again
        }
        if let Some(mut kick) = kick
            && list[1].any().unwrap_or(true)
        {
            let broken = match kick.read(&mut [0; 8]) {
                Ok(len) => len == 0,
                Err(error) => error.kind() != io::ErrorKind::WouldBlock,
            };
            if broken {
                // It would wake us for ever.
                self.state.lock().kick = None;
            }
        }
        Ok(())
    }

    /// Serves everything that is in the queue, and what has ended.
    fn serve(&self, flights: &mut Flights, ended: &mut Vec<Ended>) {
        let mut state = self.state.lock();
        loop {
            self.collect(&mut state, flights, ended);
            // What the driver makes available from here on is seen without being told of.
            if state.act(Ring::ignore_driver).is_none() {
                break;
            }
            while let Some((chain, more)) = state.take() {
                let run = || flights.run(&self.device, Request::new(&self.device, chain), more);
                let done = MutexGuard::unlocked(&mut state, run);
                let direct = done.is_some();
                state.complete(done);
                if direct || flights.staged() == BATCH {
                    self.collect(&mut state, flights, ended);
                }
            }
            self.collect(&mut state, flights, ended);
            let full = |ring: &mut Ring| Ok(ring.is_full());
            // The driver need not tell of requests that have to wait.
            if state.act(full) == Some(true) || state.act(Ring::listen_to_driver) != Some(true) {
                break;
            }
        }
        self.completed.notify_all();
    }

    /// Begins what was left to the queue of the disk, and tells the driver what has ended.
    fn collect(&self, state: &mut MutexGuard<'_, State>, flights: &mut Flights, ended: &mut Vec<Ended>) {
        if !flights.is_empty() {
            MutexGuard::unlocked(state, || flights.collect(ended));
            state.complete(ended.drain(..));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::inflight::Record;
    use super::super::ring::RingSetup;
    use super::*;
    use blockfmt::storage::MemoryStorage;
    use blockfmt::{Format, OpenOptions};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    const SETUP: RingSetup =
        RingSetup { size: 4, descriptors: 0, available: 0x100, used: 0x200, base: 0, event_idx: false };

    /// A queue, and memory with a flush in its first descriptors, which is available.
    fn queue() -> (Queue, Arc<GuestMemoryMmap>) {
        let storage = Arc::new(MemoryStorage::from_bytes(&[0; 4096]));
        let disk = OpenOptions::new(Format::Raw).open_storage(storage, "disk").unwrap();
        let device = Arc::new(Device::new(disk, "disk", false, 1).unwrap());
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        for (n, (address, len, flags)) in [(0x300u64, 16u32, 1u16), (0x310, 1, 2)].into_iter().enumerate() {
            let at = n as u64 * 16;
            memory.write_obj(address, GuestAddress(at)).unwrap();
            memory.write_obj(len, GuestAddress(at + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
            memory.write_obj(1u16, GuestAddress(at + 14)).unwrap();
        }
        memory.write_obj(4u32, GuestAddress(0x300)).unwrap();
        memory.write_obj(0xffu8, GuestAddress(0x310)).unwrap();
        memory.write_obj(1u16, GuestAddress(0x102)).unwrap();
        (Queue::start(device, 0).unwrap(), Arc::new(memory))
    }

    /// A record with requests in flight.
    fn record(heads: &[usize]) -> Record {
        let mut bytes = [0; 80];
        bytes[8] = 1;
        heads.iter().for_each(|head| bytes[16 + 16 * head] = 1);
        Record::with_bytes(4, &bytes).unwrap()
    }

    #[test]
    fn what_was_in_flight_is_done_before_a_queue_stops_and_nothing_else() {
        for heads in [&[0][..], &[]] {
            let (queue, memory) = queue();
            let ring = Ring::start(&SETUP, memory.clone(), Some(record(heads))).unwrap();
            queue.change(|state| (state.ring, state.enabled, state.draining) = (Some(ring), true, true));
            assert_eq!(queue.stop(), Some(heads.len() as u16));
            let used: u16 = memory.read_obj(GuestAddress(0x202)).unwrap();
            assert_eq!(usize::from(used), heads.len());
        }
    }

    #[test]
    fn a_queue_stops_whose_ring_turns_out_malformed() {
        let (queue, memory) = queue();
        let ring = Ring::start(&SETUP, memory, Some(record(&[0, 1]))).unwrap();
        queue.change(|state| {
            (state.ring, state.enabled, state.draining) = (Some(ring), true, true);
            let gone = Arc::new(GuestMemoryMmap::new());
            state.ring.as_mut().unwrap().set_memory(gone);
        });
        assert_eq!(queue.stop(), None);
    }
}
