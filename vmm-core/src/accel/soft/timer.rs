//! The machine's timer thread: started when a deadline is first set, asleep while there is none.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use softcpu::Clock;

const STACK_SIZE: usize = 64 << 10;

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    deadline: Option<u64>,
    /// Counts calls of `set`, so that an expiry does not overwrite a newer deadline.
    version: u64,
    stop: bool,
}

type Expire = Box<dyn Fn() -> Option<u64> + Send + Sync>;

/// Calls a function at a deadline.
pub(super) struct TimerThread {
    shared: Arc<Shared>,
    clock: Arc<Clock>,
    expire: Arc<Expire>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl TimerThread {
    /// A timer that calls `expire` at each deadline; its result is the next one, in nanoseconds of the clock.
    pub(super) fn new(clock: Arc<Clock>, expire: impl Fn() -> Option<u64> + Send + Sync + 'static) -> Self {
        Self { shared: Arc::default(), clock, expire: Arc::new(Box::new(expire)), thread: Mutex::new(None) }
    }

    /// Sets or clears the deadline, in nanoseconds of the clock.
    pub(super) fn set(&self, deadline: Option<u64>) {
        {
            let mut s = self.shared.state.lock();
            s.deadline = deadline;
            s.version += 1;
        }
        self.shared.changed.notify_one();
        let mut thread = self.thread.lock();
        if deadline.is_some() && thread.is_none() {
            let (shared, clock, expire) = (self.shared.clone(), self.clock.clone(), self.expire.clone());
            let spawned = std::thread::Builder::new()
                .name("timer".into())
                .stack_size(STACK_SIZE)
                .spawn(move || run(&shared, &clock, &expire));
            match spawned {
                Ok(handle) => *thread = Some(handle),
                Err(error) => {
                    tracing::error!(%error, "No thread for the interval timer; the guest gets no ticks")
                }
            }
        }
    }
}

fn run(shared: &Shared, clock: &Clock, expire: &Expire) {
    let mut s = shared.state.lock();
    while !s.stop {
        let Some(deadline) = s.deadline else {
            shared.changed.wait(&mut s);
            continue;
        };
        let now = clock.now_ns();
        if now < deadline {
            shared.changed.wait_for(&mut s, Duration::from_nanos(deadline - now));
            continue;
        }
        s.deadline = None;
        let version = s.version;
        drop(s);
        let next = expire();
        s = shared.state.lock();
        if s.version == version {
            s.deadline = next;
        }
    }
}

impl Drop for TimerThread {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.get_mut().take()
            && thread.thread().id() != std::thread::current().id()
        {
            // It only panics when `expire` does, which has been reported then.
            let _ = thread.join();
        }
    }
}
