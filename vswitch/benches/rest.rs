//! What a switch at rest costs, and how fast it wakes up.
//!
//! `cargo bench -p vswitch --bench rest` prints the share of a core that a switch of 64 idle ports uses, and one that
//! passes a frame now and then. Then the time from giving a frame to a sleeping switch to its coming out of another port,
//! in turns with the time in which this machine wakes any thread that waits with epoll for an eventfd, and which
//! answers in the same way: what is between them is the switch's. Once from one core to another, where the one that asks
//! polls for the answer; once on one core, where it sleeps until the answer wakes it, so that two wake-ups are in it.

#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

#[path = "../tests/common/worker_time.rs"]
mod worker_time;

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vswitch::{Endpoint, OffloadCaps, PortConfig, Switch};
use worker_time::worker_time;

const PORTS: usize = 64;
const REST: Duration = Duration::from_secs(5);
const ROUNDS: usize = 300;
/// Longer than a worker polls an empty queue.
const PAUSE: Duration = Duration::from_millis(20);
/// Between the frames of a switch that is hardly used.
const NOW_AND_THEN: Duration = Duration::from_millis(2);

fn port(switch: &Switch, name: &str) -> Endpoint {
    let (port, end) = Endpoint::pair(64, OffloadCaps::empty()).unwrap();
    switch.add_port(name, port, PortConfig::default()).unwrap();
    end
}

fn broadcast() -> Vec<u8> {
    let mut frame = vec![0xff; 60];
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    frame
}

/// Prints the share of a core that workers use while `meanwhile` runs.
fn share(name: &str, meanwhile: impl FnOnce()) {
    std::thread::sleep(Duration::from_secs(1));
    let (before, start) = (worker_time(), Instant::now());
    meanwhile();
    let share = (worker_time() - before).as_secs_f64() / start.elapsed().as_secs_f64();
    println!("{name:40} {:6.2} % of a core", share * 100.0);
}

fn at_rest(workers: usize) {
    let switch = Switch::builder().workers(workers).build().unwrap();
    let _ends: Vec<_> = (0..PORTS).map(|n| port(&switch, &n.to_string())).collect();
    share(&format!("at rest, {PORTS} ports, {workers} workers"), || std::thread::sleep(REST));
}

fn hardly_used() {
    let switch = Switch::builder().workers(1).build().unwrap();
    let (a, b) = (port(&switch, "a"), port(&switch, "b"));
    let frame = broadcast();
    share(&format!("a frame each {NOW_AND_THEN:?}"), || {
        let start = Instant::now();
        while start.elapsed() < REST {
            assert!(a.send(&frame));
            std::thread::sleep(NOW_AND_THEN);
            while b.recv().is_some() {}
        }
    });
}

/// How the one that asks and those that answer are placed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// On different cores; the one that asks polls for the answer.
    Apart,
    /// On one core; the one that asks sleeps until the answer comes.
    Together,
}

impl Place {
    /// The core of those that answer. Who asks is on the first.
    fn core(self) -> usize {
        usize::from(self == Self::Apart)
    }
}

fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).expect("this measurement wants cores 0 and 1");
}

/// A thread that waits for an eventfd, and answers in memory or by another one.
struct Waiter {
    shared: Arc<Shared>,
    place: Place,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    wake: EventFd,
    answers: AtomicU64,
    answer: EventFd,
}

impl Waiter {
    const END: u64 = 1 << 32;

    fn start(place: Place) -> Self {
        let shared = Arc::new(Shared {
            wake: EventFd::new(0).unwrap(),
            answers: AtomicU64::new(0),
            answer: EventFd::new(0).unwrap(),
        });
        let s = shared.clone();
        let thread = std::thread::spawn(move || {
            pin(place.core());
            let set = Epoll::new().unwrap();
            let event = EpollEvent::new(EventSet::IN, 0);
            set.ctl(ControlOperation::Add, s.wake.as_raw_fd(), event).unwrap();
            loop {
                set.wait(-1, &mut [EpollEvent::default()]).unwrap();
                match place {
                    Place::Apart => _ = s.answers.fetch_add(1, Ordering::Release),
                    Place::Together => s.answer.write(1).unwrap(),
                }
                if s.wake.read().unwrap() >= Self::END {
                    return;
                }
            }
        });
        Self { shared, place, thread: Some(thread) }
    }

    fn round(&self) -> Duration {
        let s = &self.shared;
        let before = s.answers.load(Ordering::Acquire);
        let start = Instant::now();
        s.wake.write(1).unwrap();
        match self.place {
            Place::Apart => {
                while s.answers.load(Ordering::Acquire) == before {
                    std::hint::spin_loop();
                }
            }
            Place::Together => _ = s.answer.read().unwrap(),
        }
        start.elapsed()
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.shared.wake.write(Self::END).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn frame_through(place: Place, a: &Endpoint, b: &Endpoint, frame: &[u8]) -> Duration {
    if place == Place::Together {
        assert!(!b.arm());
    }
    let start = Instant::now();
    assert!(a.send(frame));
    if place == Place::Together {
        poll(&mut [PollFd::new(b.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
    }
    while b.recv().is_none() {
        std::hint::spin_loop();
    }
    start.elapsed()
}

/// Prints a row of sorted times; returns the median in microseconds.
fn row(name: &str, times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    println!(
        "  {name:38} median {:6.1} us, 1 in 10 below {:6.1} us, 9 in 10 below {:6.1} us",
        at(0.5),
        at(0.1),
        at(0.9)
    );
    at(0.5)
}

fn wake_up(place: Place) {
    let switch = Switch::builder().workers(1).cores(vec![place.core()]).build().unwrap();
    let (a, b) = (port(&switch, "a"), port(&switch, "b"));
    let frame = broadcast();
    let waiter = Waiter::start(place);
    pin(0);
    let (mut floor, mut through) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        std::thread::sleep(PAUSE);
        floor.push(waiter.round());
        std::thread::sleep(PAUSE);
        through.push(frame_through(place, &a, &b, &frame));
    }
    match place {
        Place::Apart => println!("asleep on another core, asked by one that polls"),
        Place::Together => {
            println!("asleep on the core of the one that asks, which sleeps until it is answered")
        }
    }
    let floor = row("a thread that waits for an eventfd", &mut floor);
    let through = row("a frame through a sleeping switch", &mut through);
    println!("  {:38} {:+.1} us, ratio {:.2}", "of which the switch's own", through - floor, through / floor);
}

fn main() {
    at_rest(1);
    at_rest(2);
    hardly_used();
    wake_up(Place::Apart);
    wake_up(Place::Together);
}
