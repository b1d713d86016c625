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

    /// Drops a ring that is malformed. Only its driver suffers, until it resets the device.
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
    /// A request was completed.
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
            if !self.step(&mut state, Ring::ignore_driver) {
                return;
            }
            while let Some(chain) = self.take(&mut state) {
                let written = MutexGuard::unlocked(&mut state, || self.device.execute(&chain));
                state.busy = false;
                let wanted = self.complete(&mut state, &chain, written);
                self.completed.notify_all();
                if wanted && let Some(mut call) = state.call.as_ref() {
                    let _ = call.write(&1u64.to_ne_bytes()); // a counter that is full says the same
                }
            }
            let mut more = false;
            let listen = |ring: &mut Ring| ring.listen_to_driver().map(|found| more = found);
            if !self.step(&mut state, listen) || !more {
                return;
            }
        }
    }

    /// Does something with the ring if it may be served; gives it up when it is malformed.
    fn step(&self, state: &mut State, act: impl FnOnce(&mut Ring) -> Result<(), RingError>) -> bool {
        let Some(ring) = state.ring.as_mut().filter(|_| state.enabled && !state.draining && !state.ended)
        else {
            return false;
        };
        match act(ring) {
            Ok(()) => true,
            Err(error) => {
                state.give_up(&error);
                false
            }
        }
    }

    fn take(&self, state: &mut State) -> Option<Chain> {
        let allowed = state.enabled && !state.ended;
        let ring = state.ring.as_mut().filter(|ring| allowed && (!state.draining || ring.has_old()))?;
        match ring.take() {
            Ok(chain) => {
                state.busy = chain.is_some();
                chain
            }
            Err(error) => {
                state.give_up(&error);
                None
            }
        }
    }

    /// Tells the driver that a request is done; whether it wants to be notified.
    fn complete(&self, state: &mut State, chain: &Chain, written: u32) -> bool {
        let Some(ring) = &mut state.ring else { return false };
        ring.complete(chain.head(), written).unwrap_or_else(|error| {
            state.give_up(&error);
            false
        })
    }
}
