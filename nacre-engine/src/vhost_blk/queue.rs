//! A queue of an export and the thread that serves it.

use super::device::Device;
use super::request::Chain;
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

/// What a front-end has set up.
#[derive(Default)]
pub struct State {
    pub ring: Option<Ring>,
    /// How the driver notifies.
    kick: Option<Arc<File>>,
    /// How the driver is notified.
    call: Option<File>,
    pub enabled: bool,
    /// A request is being executed.
    busy: bool,
    /// Only requests that were in flight before are taken.
    draining: bool,
    /// The thread ends, or has ended.
    ended: bool,
}

impl State {
    /// Whether requests that have to be done before the queue stops are not done.
    fn is_occupied(&self) -> bool {
        let old = self.enabled && !self.ended && self.ring.as_ref().is_some_and(Ring::has_old);
        self.busy || old
    }

    /// Does something with the ring if it may be served now. One that is malformed is given up: only its driver suffers,
    /// until it resets the device.
    fn act<T>(&mut self, act: impl FnOnce(&mut Ring) -> Result<T, RingError>) -> Option<T> {
        let allowed = self.enabled && !self.ended;
        let ring = self.ring.as_mut().filter(|ring| allowed && (!self.draining || ring.has_old()))?;
        act(ring).map_err(|error| self.give_up(&error)).ok()
    }

    /// Tells the driver that a request is done, and notifies it if it wants that.
    fn complete(&mut self, chain: &Chain, written: u32) {
        let Some(ring) = &mut self.ring else { return };
        match ring.complete(chain.head(), written) {
            Ok(true) => {
                if let Some(mut call) = self.call.as_ref() {
                    let _ = call.write(&1u64.to_ne_bytes()); // a counter that is full says the same
                }
            }
            Ok(false) => {}
            Err(error) => self.give_up(&error),
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
            if let Err(error) = ours.run() {
                tracing::warn!(%error, "A queue is not served any more");
            }
            ours.state.lock().ended = true;
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

    /// Stops the queue when the requests that were taken are done. Returns the index of the next one, if it ran.
    pub fn stop(&self) -> Option<u16> {
        self.change(|state| state.draining = true);
        let mut state = self.shared.state.lock();
        while state.is_occupied() {
            self.shared.completed.wait(&mut state);
        }
        state.draining = false;
        (state.kick, state.call) = (None, None);
        state.ring.take().map(|ring| ring.base())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.change(|state| state.ended = true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn wake(&self) {
        let _ = (&self.wake).write(&[1]); // when it is full, the thread is about to wake
    }

    fn run(&self) -> io::Result<()> {
        loop {
            self.serve();
            let kick = {
                let state = self.state.lock();
                if state.ended {
                    return Ok(());
                }
                state.kick.clone()
            };
            self.wait(kick.as_deref())?;
        }
    }

    /// Waits for the driver or for a change.
    fn wait(&self, kick: Option<&File>) -> io::Result<()> {
        let mut list = vec![PollFd::new(self.woken.as_fd(), PollFlags::POLLIN)];
        list.extend(kick.map(|kick| PollFd::new(kick.as_fd(), PollFlags::POLLIN)));
        match poll(&mut list, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => return Ok(()),
            result => result?,
        };
        let _ = (&self.woken).read(&mut [0; 64]); // nothing to read when the driver woke us
        if list.len() > 1 && list[1].any().unwrap_or(true) {
            let read = kick.map_or(Ok(0), |mut kick| kick.read(&mut [0; 8]));
            let broken = match read {
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

    /// Serves everything that is in the queue.
    fn serve(&self) {
        let mut state = self.state.lock();
        loop {
            // What the driver makes available from here on is seen without being told of.
            if state.act(Ring::ignore_driver).is_none() {
                break;
            }
            while let Some(chain) = state.act(Ring::take).flatten() {
                state.busy = true;
                let written = MutexGuard::unlocked(&mut state, || self.device.execute(&chain));
                state.busy = false;
                state.complete(&chain, written);
            }
            if state.act(Ring::listen_to_driver) != Some(true) {
                break;
            }
        }
        self.completed.notify_all();
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
