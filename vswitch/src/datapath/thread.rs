//! A worker's thread: adaptive polling. A queue is polled while packets come; when it stays empty it is armed and
//! watched through its descriptor, so an idle switch sleeps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::worker::Forwarder;
use crate::clock::{MILLISECOND, Nanos};
use crate::error::{Error, Result};
use crate::shared::{PortEntry, Shared};
use crate::sys::{Epoll, EventFd};

/// Empty polls after which a queue in shared memory goes to sleep again that slept long. What comes alone is not polled
/// after: the guest that waits for an answer may need this core to see it, and at a few hundred packets a second it would
/// cost much of a core.
const IDLE_POLLS_ALONE: u32 = 16;
/// The same when it slept less than [`SHORT_SLEEP`], which is about as long as so many polls take.
const IDLE_POLLS_FIRST: u32 = 1000;
const SHORT_SLEEP: Nanos = MILLISECOND / 10;
/// So many more for each poll that was not empty, up to a most.
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
    /// Whether the port may have been asked for a wake-up: one that is asleep was, one that just woke up still is.
    armed: bool,
    /// When it went to sleep last.
    since: Nanos,
    /// Empty polls after which it goes to sleep.
    idle_limit: u32,
    idle_limit_most: u32,
}

impl Queue {
    /// As [`crate::port::Port::arm`].
    fn arm(&mut self, on: bool) -> bool {
        self.armed = on;
        self.entry.port.arm(self.queue, on)
    }

    /// Has it polled for a while if it woke up soon.
    fn woke_up(&mut self, now: Nanos) {
        let slept = now.saturating_sub(self.since);
        let limit = if slept < SHORT_SLEEP { IDLE_POLLS_FIRST } else { IDLE_POLLS_ALONE };
        self.idle_limit = limit.min(self.idle_limit_most);
    }
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
            self.look_at_all();
        }
        if n > 0 || self.slept >= SLEEP_MS {
            self.slept = 0;
        }
        Ok(())
    }

    /// Wakes every queue for one look: polling them all for long would cost an idle switch with many ports much of a core.
    fn look_at_all(&mut self) {
        for q in &mut self.queues {
            wake(q, &mut self.awake);
            q.idle = q.idle_limit;
        }
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
                let limit = if entry.port.is_cheap_to_poll() { IDLE_POLLS_MOST } else { IDLE_POLLS_SYSCALL };
                self.queues.push(Queue {
                    entry: entry.clone(),
                    queue,
                    idle: 0,
                    asleep: false,
                    armed: true,
                    since: 0,
                    idle_limit: limit.min(IDLE_POLLS_ALONE),
                    idle_limit_most: limit,
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
            } else {
                q.idle += 1;
                std::hint::spin_loop();
            }
            if q.idle >= q.idle_limit {
                let was_looked_at = q.armed;
                if !q.arm(true) {
                    q.asleep = true;
                    self.awake -= 1;
                    if !was_looked_at {
                        q.since = self.forwarder.now();
                    }
                    continue;
                }
                q.idle = 0;
            }
            if q.armed {
                // Only now: to take back the request for a wake-up costs system calls, which are slow in a thread that
                // just woke up, and who waits for what it woke up for may sleep as well.
                self.forwarder.notify();
                q.arm(false);
                q.woke_up(self.forwarder.now());
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

/// Has a queue polled again that is asleep.
fn wake(q: &mut Queue, awake: &mut usize) {
    if q.asleep {
        q.asleep = false;
        q.idle = 0;
        *awake += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::RawFd;
    use std::sync::atomic::AtomicUsize;

    use parking_lot::Mutex;

    use super::*;
    use crate::packet::Burst;
    use crate::port::{Batch, Port};
    use crate::{Clock, PortConfig, Switch};

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
        /// What the switch did to all lines.
        log: Arc<Mutex<Vec<&'static str>>>,
    }

    impl Port for LinePort {
        fn kind(&self) -> &'static str {
            "line"
        }

        fn receive(&self, _queue: usize, burst: &mut Burst) {
            let mut frame = [0xff; 60];
            frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
            let n = self.line.waiting.load(Ordering::Relaxed).min(burst.room());
            for _ in 0..n {
                burst.push_frame(&frame);
            }
            if n > 0 {
                self.line.waiting.fetch_sub(n, Ordering::Relaxed);
                self.line.received.fetch_add(n, Ordering::Relaxed);
                self.log.lock().push("receive");
            }
        }

        fn transmit(&self, _queue: usize, batch: &Batch<'_>) -> usize {
            self.line.sent.fetch_add(batch.len(), Ordering::Relaxed);
            self.log.lock().push("transmit");
            batch.len()
        }

        fn notify(&self, _queue: usize) {
            self.line.told.store(self.line.sent.load(Ordering::Relaxed), Ordering::Relaxed);
            self.log.lock().push("notify");
        }

        fn ready_fd(&self, _queue: usize) -> Option<RawFd> {
            None
        }

        fn arm(&self, _queue: usize, on: bool) -> bool {
            self.log.lock().push(if on { "arm" } else { "disarm" });
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
    struct Bench {
        switch: Switch,
        lines: [Arc<Line>; 2],
        log: Arc<Mutex<Vec<&'static str>>>,
        worker: Loop,
    }

    impl Bench {
        fn new(cheap: bool) -> Self {
            let switch = Switch::builder().workers(0).clock(Clock::manual()).build().unwrap();
            let (lines, log) = ([0, 1].map(|_| Arc::new(Line::default())), Arc::default());
            for (n, line) in lines.iter().enumerate() {
                let port = LinePort { line: line.clone(), cheap, log: Arc::clone(&log) };
                switch.add_port(&n.to_string(), port, PortConfig::default()).unwrap();
            }
            let control = Control {
                stop: AtomicBool::new(false),
                wake: EventFd::new().unwrap(),
                requested: AtomicU64::new(0),
                answered: AtomicU64::new(0),
            };
            let worker = Loop::new(switch.shared.clone(), 0, Arc::new(control)).unwrap();
            Self { switch, lines, log, worker }
        }

        /// Turns until every queue is asleep; returns how many it took.
        fn turns(&mut self) -> u32 {
            for n in 1..100_000 {
                self.worker.turn().unwrap();
                if self.worker.awake == 0 {
                    return n;
                }
            }
            panic!("the worker does not go to sleep");
        }

        /// Wakes the first queue `after` a sleep for `bursts` frames, one a turn, and turns until it is asleep again.
        fn wake_for(&mut self, after: Duration, bursts: usize) -> u32 {
            self.switch.clock().advance(after);
            wake(&mut self.worker.queues[0], &mut self.worker.awake);
            for _ in 1..bursts {
                self.lines[0].waiting.store(1, Ordering::Relaxed);
                self.worker.turn().unwrap();
            }
            self.lines[0].waiting.store(1, Ordering::Relaxed);
            self.turns() - 1
        }
    }

    /// A frame that came between the last look at a queue and the request for a wake-up is not slept over.
    #[test]
    fn a_worker_goes_to_sleep_with_nothing_left_to_do() {
        let mut b = Bench::new(false);
        b.lines[0].late.store(3, Ordering::Relaxed);
        b.turns();
        assert_eq!(b.lines[0].received.load(Ordering::Relaxed), 3);
        assert_eq!(b.lines[1].told.load(Ordering::Relaxed), 3);
        assert!(b.lines.iter().all(|l| l.armed.load(Ordering::Relaxed)));
    }

    /// What a shaper lets out while every queue is asleep is followed by no look at a queue.
    #[test]
    fn a_worker_does_not_sleep_over_a_notification() {
        let mut b = Bench::new(false);
        let slow = PortConfig {
            shaping: Some(serde_json::from_str(r#"{"kbps":8,"burst_kb":8}"#).unwrap()),
            ..PortConfig::default()
        };
        b.switch.set_port_config(b.switch.port_id("1").unwrap(), slow).unwrap();
        b.lines[0].waiting.store(30, Ordering::Relaxed);
        b.turns();
        let sent = |b: &Bench| b.lines[1].sent.load(Ordering::Relaxed);
        let before = sent(&b);
        assert!(before < 30, "{before}");
        b.switch.clock().advance(Duration::from_secs(1));
        assert_eq!(b.turns(), 1);
        assert!(sent(&b) > before);
        assert_eq!(b.lines[1].told.load(Ordering::Relaxed), sent(&b));
    }

    #[test]
    fn what_a_worker_woke_up_for_goes_before_all_else() {
        let mut b = Bench::new(true);
        b.turns();
        b.log.lock().clear();
        b.lines[0].waiting.store(1, Ordering::Relaxed);
        wake(&mut b.worker.queues[0], &mut b.worker.awake);
        b.worker.turn().unwrap();
        assert_eq!(*b.log.lock(), ["receive", "transmit", "notify", "disarm"]);
        assert_eq!(b.worker.awake, 1);
    }

    /// One look at a queue that nobody woke, as once in a while, costs no more than to go back to sleep.
    #[test]
    fn a_look_at_a_sleeping_queue_leaves_it_asleep() {
        let mut b = Bench::new(true);
        b.turns();
        b.log.lock().clear();
        b.worker.look_at_all();
        assert_eq!(b.turns(), 1);
        assert_eq!(*b.log.lock(), ["arm", "arm"]);
    }

    #[test]
    fn a_queue_is_polled_the_longer_the_more_came() {
        const LONG: Duration = Duration::from_nanos(SHORT_SLEEP);
        const SHORT: Duration = Duration::from_nanos(SHORT_SLEEP - 1);
        let mut b = Bench::new(true);
        b.turns();
        assert_eq!(b.wake_for(LONG, 1), IDLE_POLLS_ALONE);
        assert_eq!(b.wake_for(SHORT, 1), IDLE_POLLS_FIRST);
        assert_eq!(b.wake_for(LONG, 2), IDLE_POLLS_ALONE + IDLE_POLLS_GAIN);
        assert_eq!(b.wake_for(SHORT, 1000), IDLE_POLLS_MOST);
        assert_eq!(
            b.wake_for(LONG, 1),
            IDLE_POLLS_ALONE,
            "a busy time is forgotten with the next long sleep"
        );
        // A look in between is no wake-up.
        b.switch.clock().advance(LONG);
        b.worker.look_at_all();
        b.turns();
        assert_eq!(b.wake_for(SHORT, 1), IDLE_POLLS_ALONE);
        assert_eq!(b.lines[1].told.load(Ordering::Relaxed), 1006);
    }
}
