//! A worker's thread: adaptive polling. A queue is polled while packets come; when it stays empty it is armed and
//! watched through its descriptor, so an idle switch sleeps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::worker::Forwarder;
use crate::clock::{MILLISECOND, Nanos};
use crate::error::{Error, Result};
use crate::port::Port;
use crate::shared::{PortEntry, Shared};
use crate::sys::{Epoll, EventFd};

/// Empty polls after which a queue in shared memory goes to sleep: so many when it just woke up, more for each poll that
/// was not empty, up to a most. To poll long after single packets would cost much of a core at a few hundred packets a
/// second, and a thread that used its share of a core is woken late by the scheduler.
const IDLE_POLLS_FIRST: u32 = 500;
const IDLE_POLLS_GAIN: u32 = 500;
const IDLE_POLLS_MOST: u32 = 20_000;
/// Empty polls after which a queue that costs a system call goes to sleep.
const IDLE_POLLS_SYSCALL: u32 = 2;
/// Rounds over the polled queues between two looks at the sleeping ones.
const ROUNDS_PER_EVENT_CHECK: u32 = 32;
/// Longest sleep, so that ports without a descriptor (a peer that does not notify) are looked at.
const SLEEP_MS: i32 = 100;
const CONTROL_TOKEN: u64 = u64::MAX;

/// What the control side uses to reach a worker.
pub(crate) struct WorkerHandle {
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

struct Control {
    stop: AtomicBool,
    wake: EventFd,
    /// Number of requests for a quiet point, and how many the worker has answered.
    requested: AtomicU64,
    answered: AtomicU64,
}

impl WorkerHandle {
    /// Starts worker `id`, on core `core` if one is given.
    pub fn start(shared: Arc<Shared>, id: usize, core: Option<usize>) -> Result<Self> {
        let fail = |e| Error::io("start a worker thread", e);
        let control = Arc::new(Control {
            stop: AtomicBool::new(false),
            wake: EventFd::new().map_err(fail)?,
            requested: AtomicU64::new(0),
            answered: AtomicU64::new(0),
        });
        let c = control.clone();
        let thread = thread::Builder::new()
            .name(format!("nacre-switch-{id}"))
            .spawn(move || {
                if let Some(core) = core
                    && let Err(e) = crate::sys::pin_to_core(core)
                {
                    tracing::warn!(core, error = %e, "cannot pin a worker");
                }
                if let Err(e) = Loop::new(shared, id, c).and_then(|mut l| l.run()) {
                    tracing::error!(worker = id, error = %e, "worker failed");
                }
            })
            .map_err(fail)?;
        Ok(Self { control, thread: Some(thread) })
    }

    /// Asks for a quiet point; see [`WorkerHandle::wait_quiet`].
    pub fn request_quiet(&self) -> u64 {
        let n = self.control.requested.fetch_add(1, Ordering::AcqRel) + 1;
        self.control.wake.signal();
        n
    }

    /// Waits until the worker has finished the burst that was under way and has collected its counters.
    pub fn wait_quiet(&self, request: u64) {
        let end = Instant::now() + Duration::from_secs(2);
        while self.control.answered.load(Ordering::Acquire) < request && Instant::now() < end {
            thread::sleep(Duration::from_micros(20));
        }
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        self.control.stop.store(true, Ordering::Release);
        self.control.wake.signal();
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

struct Queue {
    entry: Arc<PortEntry>,
    queue: usize,
    idle: u32,
    asleep: bool,
    /// Empty polls after which it goes to sleep.
    idle_limit: u32,
    idle_limit_most: u32,
}

struct Loop {
    forwarder: Forwarder,
    id: usize,
    workers: usize,
    control: Arc<Control>,
    epoll: Epoll,
    queues: Vec<Queue>,
    awake: usize,
    /// Milliseconds slept without an event.
    slept: i32,
}

impl Loop {
    fn new(shared: Arc<Shared>, id: usize, control: Arc<Control>) -> std::io::Result<Self> {
        let workers = shared.workers;
        Ok(Self {
            forwarder: Forwarder::new(shared, id),
            id,
            workers: workers.max(1),
            control,
            epoll: Epoll::new()?,
            queues: Vec::new(),
            awake: 0,
            slept: 0,
        })
    }

    fn run(&mut self) -> std::io::Result<()> {
        let mut rounds = 0u32;
        self.rebuild()?;
        while !self.control.stop.load(Ordering::Relaxed) {
            let due = self.turn()?;
            rounds = rounds.saturating_add(1);
            if self.awake == 0 {
                self.sleep(due)?;
            } else if rounds >= ROUNDS_PER_EVENT_CHECK && self.awake < self.queues.len() {
                rounds = 0;
                self.wait(0)?;
            }
        }
        self.forwarder.notify();
        Ok(())
    }

    /// Serves every queue that is awake once. When none is any more, nothing is left to do and every peer knows what was
    /// sent to it; the time returned is then that of a shaper's next packet.
    fn turn(&mut self) -> std::io::Result<Option<Nanos>> {
        if self.forwarder.refresh() {
            self.rebuild()?;
        }
        self.answer();
        self.round();
        let (_, due) = self.forwarder.release();
        if self.awake == 0 {
            self.forwarder.notify();
        }
        Ok(due)
    }

    /// Sleeps until a queue has something to receive, or a shaper may have something to send.
    fn sleep(&mut self, due: Option<Nanos>) -> std::io::Result<()> {
        // A shaper's bucket holds several milliseconds' worth, so waking up late costs no throughput.
        let due = due.map_or(u64::MAX, |at| at.saturating_sub(self.forwarder.now()) / MILLISECOND);
        let rest = SLEEP_MS - self.slept;
        let timeout = i32::try_from(due).map_or(rest, |due| rest.min(due.saturating_add(1)));
        let n = self.wait(timeout)?;
        self.slept += timeout;
        if n == 0 && self.slept >= SLEEP_MS {
            // One look each: polling them all for long would cost an idle switch with many ports much of a core.
            for q in &mut self.queues {
                wake(q, &mut self.awake);
                q.idle = q.idle_limit;
            }
        }
        if n > 0 || self.slept >= SLEEP_MS {
            self.slept = 0;
        }
        Ok(())
    }

    fn answer(&mut self) {
        let requested = self.control.requested.load(Ordering::Acquire);
        if self.control.answered.load(Ordering::Relaxed) != requested {
            self.forwarder.collect_stats();
            self.control.answered.store(requested, Ordering::Release);
        }
    }

    /// Lists the queues that this worker serves after the ports changed. All start awake.
    fn rebuild(&mut self) -> std::io::Result<()> {
        self.epoll = Epoll::new()?;
        {
            use std::os::fd::AsRawFd;
            self.epoll.add(self.control.wake.as_raw_fd(), CONTROL_TOKEN)?;
        }
        self.queues.clear();
        for entry in self.forwarder.ports().iter() {
            for queue in 0..entry.port.rx_queues() {
                if (entry.id as usize + queue) % self.workers != self.id {
                    continue;
                }
                if let Some(fd) = entry.port.ready_fd(queue) {
                    self.epoll.add(fd, self.queues.len() as u64)?;
                }
                entry.port.arm(queue, false);
                let cheap = entry.port.is_cheap_to_poll();
                self.queues.push(Queue {
                    entry: entry.clone(),
                    queue,
                    idle: 0,
                    asleep: false,
                    idle_limit: if cheap { IDLE_POLLS_FIRST } else { IDLE_POLLS_SYSCALL },
                    idle_limit_most: if cheap { IDLE_POLLS_MOST } else { IDLE_POLLS_SYSCALL },
                });
            }
        }
        self.awake = self.queues.len();
        Ok(())
    }

    /// Polls every queue that is awake once.
    fn round(&mut self) {
        for q in self.queues.iter_mut().filter(|q| !q.asleep) {
            if self.forwarder.run_queue(&q.entry, q.queue) > 0 {
                q.idle = 0;
                q.idle_limit = (q.idle_limit + IDLE_POLLS_GAIN).min(q.idle_limit_most);
                continue;
            }
            q.idle += 1;
            if q.idle < q.idle_limit {
                std::hint::spin_loop();
            } else if !q.entry.port.arm(q.queue, true) {
                q.asleep = true;
                q.idle_limit = q.idle_limit_most.min(IDLE_POLLS_FIRST);
                self.awake -= 1;
            } else {
                q.entry.port.arm(q.queue, false);
                q.idle = 0;
            }
        }
    }

    /// Looks for sleeping queues with work, waiting up to `timeout_ms`.
    fn wait(&mut self, timeout_ms: i32) -> std::io::Result<usize> {
        let (queues, awake, control) = (&mut self.queues, &mut self.awake, &self.control);
        self.epoll.wait(timeout_ms, |token| {
            if token == CONTROL_TOKEN {
                control.wake.clear();
            } else if let Some(q) = queues.get_mut(token as usize) {
                wake(q, awake);
            }
        })
    }
}

fn wake(q: &mut Queue, awake: &mut usize) {
    if q.asleep {
        let port: &dyn Port = &*q.entry.port;
        port.arm(q.queue, false);
        q.asleep = false;
        q.idle = 0;
        *awake += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::RawFd;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::packet::Burst;
    use crate::port::Batch;
    use crate::{PortConfig, Switch};

    /// What is on a line, seen from its far end.
    #[derive(Default)]
    struct Line {
        /// Frames for the switch.
        waiting: AtomicUsize,
        /// Frames that come right after the switch asked to be woken up, one each time.
        late: AtomicUsize,
        armed: AtomicBool,
        received: AtomicUsize,
        sent: AtomicUsize,
        /// Of those sent, how many the far end was told of.
        told: AtomicUsize,
    }

    struct LinePort {
        line: Arc<Line>,
        cheap: bool,
    }

    impl Port for LinePort {
        fn kind(&self) -> &'static str {
            "line"
        }

        fn receive(&self, _queue: usize, burst: &mut Burst) {
            let mut frame = [0xff; 60];
            frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
            for _ in 0..self.line.waiting.swap(0, Ordering::Relaxed) {
                burst.push_frame(&frame);
                self.line.received.fetch_add(1, Ordering::Relaxed);
            }
        }

        fn transmit(&self, _queue: usize, batch: &Batch<'_>) -> usize {
            self.line.sent.fetch_add(batch.len(), Ordering::Relaxed);
            batch.len()
        }

        fn notify(&self, _queue: usize) {
            self.line.told.store(self.line.sent.load(Ordering::Relaxed), Ordering::Relaxed);
        }

        fn ready_fd(&self, _queue: usize) -> Option<RawFd> {
            None
        }

        fn arm(&self, _queue: usize, on: bool) -> bool {
            self.line.armed.store(on, Ordering::Relaxed);
            if on && self.line.late.load(Ordering::Relaxed) > 0 {
                self.line.late.fetch_sub(1, Ordering::Relaxed);
                self.line.waiting.fetch_add(1, Ordering::Relaxed);
            }
            on && self.line.waiting.load(Ordering::Relaxed) > 0
        }

        fn is_cheap_to_poll(&self) -> bool {
            self.cheap
        }
    }

    /// A switch with two lines, and a worker that does what it is told.
    fn worker(cheap: bool) -> (Switch, [Arc<Line>; 2], Loop) {
        let s = Switch::builder().workers(0).build().unwrap();
        let lines = [0, 1].map(|_| Arc::new(Line::default()));
        for (n, line) in lines.iter().enumerate() {
            let port = LinePort { line: line.clone(), cheap };
            s.add_port(&n.to_string(), port, PortConfig::default()).unwrap();
        }
        let control = Control {
            stop: AtomicBool::new(false),
            wake: EventFd::new().unwrap(),
            requested: AtomicU64::new(0),
            answered: AtomicU64::new(0),
        };
        let worker = Loop::new(s.shared.clone(), 0, Arc::new(control)).unwrap();
        (s, lines, worker)
    }

    /// Turns until every queue is asleep.
    fn turns(worker: &mut Loop) -> u32 {
        for n in 1..100_000 {
            worker.turn().unwrap();
            if worker.awake == 0 {
                return n;
            }
        }
        panic!("the worker does not go to sleep");
    }

    /// A frame that came between the last look at a queue and the request for a wake-up is not slept over, nor is the
    /// notification of a peer.
    #[test]
    fn a_worker_goes_to_sleep_with_nothing_left_to_do() {
        let (_switch, lines, mut worker) = worker(false);
        lines[0].late.store(3, Ordering::Relaxed);
        turns(&mut worker);
        assert_eq!(lines[0].received.load(Ordering::Relaxed), 3);
        assert_eq!(lines[1].told.load(Ordering::Relaxed), 3);
        assert!(lines.iter().all(|l| l.armed.load(Ordering::Relaxed)));
    }

    #[test]
    fn a_queue_is_polled_the_longer_the_more_came() {
        let (_switch, lines, mut worker) = worker(true);
        turns(&mut worker);
        let wake_with = |frames: usize, worker: &mut Loop| {
            wake(&mut worker.queues[0], &mut worker.awake);
            for _ in 0..frames {
                lines[0].waiting.store(1, Ordering::Relaxed);
                worker.turn().unwrap();
            }
            turns(worker)
        };
        let single = wake_with(1, &mut worker);
        assert!(single <= IDLE_POLLS_FIRST + IDLE_POLLS_GAIN, "{single}");
        assert_eq!(wake_with(1000, &mut worker), IDLE_POLLS_MOST);
        assert_eq!(wake_with(1, &mut worker), single, "a busy time is forgotten with the next sleep");
        assert_eq!(lines[1].told.load(Ordering::Relaxed), 1002);
    }
}
