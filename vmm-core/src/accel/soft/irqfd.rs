//! Event descriptors that send a message-signalled interrupt, for back-ends in other processes.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::SoftMsi;
use crate::interrupt::MsiVector;

const STACK_SIZE: usize = 64 << 10;
/// Token of the descriptor that stops the thread.
const STOP: u64 = u64::MAX;

struct Watched {
    event: EventFd,
    vector: Weak<SoftMsi>,
}

struct Shared {
    epoll: Epoll,
    stop: EventFd,
    watched: Mutex<(u64, HashMap<u64, Watched>)>,
}

struct Running {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

/// Waits for event descriptors on one thread, which starts with the first of them.
#[derive(Default)]
pub(super) struct IrqFds {
    running: Mutex<Option<Running>>,
}

impl IrqFds {
    /// A descriptor that triggers `vector` until the vector is dropped.
    pub(super) fn add(&self, vector: &Arc<SoftMsi>) -> io::Result<OwnedFd> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let given = event.try_clone()?;
        let mut running = self.running.lock();
        if running.is_none() {
            *running = Some(start()?);
        }
        let Some(Running { shared, .. }) = &*running else { return Err(io::ErrorKind::NotConnected.into()) };
        let mut watched = shared.watched.lock();
        let token = watched.0;
        let interest = EpollEvent::new(EventSet::IN, token);
        shared.epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest)?;
        watched.0 += 1;
        // Vectors that are gone are removed here; nobody triggers them any more.
        watched.1.retain(|_, w| w.vector.strong_count() > 0);
        watched.1.insert(token, Watched { event, vector: Arc::downgrade(vector) });
        // SAFETY: `into_raw_fd` hands over the only owner of the descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(given.into_raw_fd()) })
    }
}

fn start() -> io::Result<Running> {
    let shared = Arc::new(Shared {
        epoll: Epoll::new()?,
        stop: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        watched: Mutex::default(),
    });
    shared.epoll.ctl(ControlOperation::Add, shared.stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
    let inner = shared.clone();
    let thread =
        std::thread::Builder::new().name("irqfd".into()).stack_size(STACK_SIZE).spawn(move || run(&inner))?;
    Ok(Running { shared, thread })
}

fn run(shared: &Shared) {
    let mut events = [EpollEvent::default(); 16];
    loop {
        let n = match shared.epoll.wait(-1, &mut events) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return tracing::error!(%error, "Interrupt descriptors stopped working"),
        };
        for event in &events[..n] {
            if event.data() == STOP {
                return;
            }
            let vector = {
                let watched = shared.watched.lock();
                watched.1.get(&event.data()).and_then(|w| w.event.read().ok().and(w.vector.upgrade()))
            };
            if let Some(vector) = vector {
                vector.trigger();
            }
        }
    }
}

impl Drop for IrqFds {
    fn drop(&mut self) {
        if let Some(Running { shared, thread }) = self.running.get_mut().take()
            && shared.stop.write(1).is_ok()
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}
