//! Worker threads: one for each handler of a device, from the time its driver is ready until reset, pause or drop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{DeviceError, Interrupt, QueueHandler};
use super::queue::{Queue, QueueError};
use super::state::Shared;
use crate::memory::GuestMemory;

/// Address space of a worker's stack; only the pages it touches become resident.
const STACK_SIZE: usize = 192 << 10;
const STOP: u64 = u64::MAX;
const QUEUE: u64 = 1 << 32;

/// What a handler works with.
pub struct Context {
    /// Guest RAM.
    pub memory: GuestMemory,
    /// The device's queues, by index; only the handler's own that the driver enabled are present.
    pub queues: Vec<Option<Queue>>,
    /// When [`QueueHandler::timer`] is to be called. It is cleared before the call.
    pub deadline: Option<Instant>,
    interrupt: Arc<dyn Interrupt>,
    epoll: Epoll,
    stopping: Arc<AtomicBool>,
}

impl Context {
    /// A context without a worker thread, for programs (and tests) that call a [`QueueHandler`] themselves, with what
    /// [`Context::ready`] returns and when [`Context::deadline`] comes.
    ///
    /// # Errors
    /// Fails when the host gives no descriptor.
    pub fn detached(
        memory: GuestMemory,
        queues: Vec<Option<Queue>>,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let stopping = Arc::default();
        Ok(Self { memory, queues, deadline: None, interrupt, epoll: Epoll::new()?, stopping })
    }

    /// The tokens and events of the watched descriptors that are ready now. A worker thread calls the handler by itself.
    ///
    /// # Errors
    /// Fails when the host cannot tell.
    pub fn ready(&self) -> io::Result<Vec<(u32, EventSet)>> {
        let mut events = [EpollEvent::default(); 16];
        let n = self.epoll.wait(0, &mut events)?;
        // Tokens of watched descriptors have 32 bits.
        let watched = events[..n].iter().filter(|e| e.data() < QUEUE);
        Ok(watched.map(|e| (e.data() as u32, e.event_set())).collect())
    }

    /// Whether the worker is asked to stop: a handler that finds ever more work returns then. Every queue is served
    /// again after the next start.
    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Interrupts the guest for queue `index` when its driver wants that.
    ///
    /// # Errors
    /// Fails when the ring is not RAM.
    pub fn signal(&mut self, index: usize) -> Result<(), QueueError> {
        if let Some(queue) = self.queues.get_mut(index).and_then(Option::as_mut)
            && queue.needs_interrupt()?
        {
            self.interrupt.queue(index);
        }
        Ok(())
    }

    /// How to interrupt the guest unconditionally.
    pub fn interrupt(&self) -> &Arc<dyn Interrupt> {
        &self.interrupt
    }

    /// Calls [`QueueHandler::event`] with `token` while `fd` is ready for `events` (level-triggered unless `events`
    /// says otherwise). A second call for the same descriptor changes what it is watched for.
    ///
    /// # Errors
    /// Fails when the host refuses to watch it.
    pub fn watch(&self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        let event = EpollEvent::new(events, u64::from(token));
        match self.epoll.ctl(ControlOperation::Add, fd, event) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                self.epoll.ctl(ControlOperation::Modify, fd, event)
            }
            other => other,
        }
    }

    /// Stops watching `fd`; closing it has the same effect.
    pub fn unwatch(&self, fd: RawFd) {
        // A descriptor that is not watched is what the caller wants.
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }
}

/// A handler that is not running: before its start, and during a pause.
pub(super) struct Parked {
    pub(super) handler: Box<dyn QueueHandler>,
    pub(super) queues: Vec<Option<Queue>>,
    pub(super) owned: Vec<usize>,
    pub(super) external: bool,
}

/// What a worker shares with its device.
pub(super) struct Environment {
    pub(super) memory: GuestMemory,
    pub(super) shared: Arc<Shared>,
    pub(super) kicks: Arc<Vec<EventFd>>,
    pub(super) name: &'static str,
    /// What the device's workers log belongs to: the span that it was made in.
    pub(super) span: tracing::Span,
}

/// A running handler.
pub(super) struct Worker {
    stop: EventFd,
    stopping: Arc<AtomicBool>,
    thread: JoinHandle<Parked>,
}

impl Worker {
    pub(super) fn spawn(parked: Parked, env: &Environment) -> Result<Self, (io::Error, Option<Parked>)> {
        let prepare = || -> io::Result<(EventFd, EventFd, Epoll)> {
            let stop = EventFd::new(EFD_NONBLOCK)?;
            let epoll = Epoll::new()?;
            let watch =
                |fd, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token));
            watch(stop.as_raw_fd(), STOP)?;
            if !parked.external {
                for (index, _) in parked.queues.iter().enumerate().filter(|(_, q)| q.is_some()) {
                    watch(env.kicks[index].as_raw_fd(), QUEUE | index as u64)?;
                }
            }
            Ok((stop.try_clone()?, stop, epoll))
        };
        let (ours, stop, epoll) = match prepare() {
            Ok(prepared) => prepared,
            Err(error) => return Err((error, Some(parked))),
        };
        let stopping = Arc::new(AtomicBool::new(false));
        let interrupt = Arc::clone(env.shared.interrupt());
        let Parked { handler, queues, owned, external } = parked;
        let context = Context {
            memory: env.memory.clone(),
            queues,
            deadline: None,
            interrupt,
            epoll,
            stopping: Arc::clone(&stopping),
        };
        let run = Run {
            handler,
            context,
            owned,
            external,
            shared: Arc::clone(&env.shared),
            kicks: Arc::clone(&env.kicks),
            _stop: stop,
        };
        let thread = std::thread::Builder::new().name(env.name.into()).stack_size(STACK_SIZE);
        let span = tracing::info_span!(parent: &env.span, "device", name = env.name);
        let thread = thread.spawn(move || span.in_scope(|| run.run())).map_err(|e| (e, None))?;
        Ok(Self { stop: ours, stopping, thread })
    }

    /// Asks the worker to stop without waiting for it.
    pub(super) fn request_stop(&self) {
        self.stopping.store(true, Ordering::Release);
        // The counter cannot overflow: it is written once.
        let _ = self.stop.write(1);
    }

    /// Stops the worker; its handler completed what was in flight. `None` when it panicked.
    pub(super) fn stop(self) -> Option<Parked> {
        self.request_stop();
        self.thread.join().ok()
    }
}

struct Run {
    handler: Box<dyn QueueHandler>,
    context: Context,
    owned: Vec<usize>,
    external: bool,
    shared: Arc<Shared>,
    kicks: Arc<Vec<EventFd>>,
    _stop: EventFd,
}

impl Run {
    fn run(mut self) -> Parked {
        if let Err(error) = self.serve() {
            let name = std::thread::current();
            tracing::warn!(device = name.name(), error = %Chain(&error), "Device needs a reset");
            self.shared.fail();
        }
        self.handler.stop(&mut self.context);
        let Self { handler, context, owned, external, .. } = self;
        Parked { handler, queues: context.queues, owned, external }
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        self.handler.start(&mut self.context)?;
        if !self.external {
            for index in self.owned.clone() {
                if self.context.queues[index].is_some() {
                    self.handler.queue(index, &mut self.context)?;
                }
            }
        }
        let mut events = [EpollEvent::default(); 16];
        loop {
            let timeout = self.context.deadline.map_or(-1, |at| {
                let left = at.saturating_duration_since(Instant::now());
                // Rounded up: waking early would spin.
                i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
            });
            let n = match self.context.epoll.wait(timeout, &mut events) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e.into()),
            };
            // A request to stop goes before work, of which there may always be more.
            if events[..n].iter().any(|e| e.data() == STOP) {
                return Ok(());
            }
            for event in &events[..n] {
                if event.data() & QUEUE != 0 {
                    let index = event.data() as u32 as usize;
                    // Nothing to read is fine: the descriptor does not block.
                    let _ = self.kicks[index].read();
                    self.handler.queue(index, &mut self.context)?;
                } else {
                    self.handler.event(event.data() as u32, event.event_set(), &mut self.context)?;
                }
            }
            if self.context.deadline.is_some_and(|at| at <= Instant::now()) {
                self.context.deadline = None;
                self.handler.timer(&mut self.context)?;
            }
        }
    }
}

/// An error with its sources on one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
