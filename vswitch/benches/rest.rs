//! What a switch at rest costs, and how fast it wakes up.
//!
//! `cargo bench -p vswitch --bench rest` prints the share of a core that a switch of 64 idle ports uses, and the time
//! from giving a frame to a sleeping switch to its coming out of another port. Beside that stands the time in which this
//! machine wakes any thread that waits for an eventfd, measured in turns with it: what is between them is the switch's.
//! Once with the threads where the scheduler puts them, once on cores of their own.

#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

#[path = "../tests/common/worker_time.rs"]
mod worker_time;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use vmm_sys_util::eventfd::EventFd;
use vswitch::{Endpoint, OffloadCaps, PortConfig, Switch};
use worker_time::worker_time;

const PORTS: usize = 64;
const REST: Duration = Duration::from_secs(5);
const ROUNDS: usize = 300;
/// Longer than a worker polls an empty queue.
const PAUSE: Duration = Duration::from_millis(20);

fn idle(workers: usize) {
    let switch = Switch::builder().workers(workers).build().unwrap();
    let _ends: Vec<_> = (0..PORTS).map(|n| port(&switch, &n.to_string())).collect();
    std::thread::sleep(Duration::from_secs(1));
    let before = worker_time();
    std::thread::sleep(REST);
    let share = (worker_time() - before).as_secs_f64() / REST.as_secs_f64();
    println!("at rest, {PORTS} ports, {workers} workers   {:6.2} % of a core", share * 100.0);
}

fn port(switch: &Switch, name: &str) -> Endpoint {
    let (port, end) = Endpoint::pair(64, OffloadCaps::empty()).unwrap();
    switch.add_port(name, port, PortConfig::default()).unwrap();
    end
}

/// A thread that waits for an eventfd and answers in memory.
struct Waiter {
    wake: Arc<EventFd>,
    answers: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Waiter {
    const END: u64 = 1 << 32;

    fn start(cores: Cores) -> Self {
        let (wake, answers) = (Arc::new(EventFd::new(0).unwrap()), Arc::new(AtomicU64::new(0)));
        let (w, a) = (wake.clone(), answers.clone());
        let thread = std::thread::spawn(move || {
            cores.pin(1);
            while w.read().unwrap() < Self::END {
                a.fetch_add(1, Ordering::Release);
            }
        });
        Self { wake, answers, thread: Some(thread) }
    }

    fn round(&self) -> Duration {
        let before = self.answers.load(Ordering::Acquire);
        let start = Instant::now();
        self.wake.write(1).unwrap();
        while self.answers.load(Ordering::Acquire) == before {
            std::hint::spin_loop();
        }
        start.elapsed()
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.wake.write(Self::END).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn row(name: &str, times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    println!("  {name:38} median {:6.1} us, 99 in 100 below {:6.1} us", at(0.5), at(0.99));
    at(0.5)
}

/// Where the threads of a measurement run.
#[derive(Clone, Copy)]
enum Cores {
    /// Where the scheduler puts them, which on a virtual machine with few cores may be one and the same.
    Any,
    /// The one that asks on the first core, those that answer on the second.
    Own,
}

impl Cores {
    fn pin(self, core: usize) {
        if matches!(self, Self::Own) {
            let mut set = CpuSet::new();
            set.set(core).unwrap();
            sched_setaffinity(Pid::from_raw(0), &set).expect("this measurement wants cores 0 and 1");
        }
    }
}

fn wake_up(cores: Cores) {
    let builder = Switch::builder().workers(1);
    let switch = match cores {
        Cores::Any => builder.build(),
        Cores::Own => builder.cores(vec![1]).build(),
    };
    let switch = switch.unwrap();
    let (a, b) = (port(&switch, "a"), port(&switch, "b"));
    let mut frame = vec![0xff; 60];
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    let waiter = Waiter::start(cores);
    cores.pin(0);
    let (mut floor, mut through) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        std::thread::sleep(PAUSE);
        floor.push(waiter.round());
        std::thread::sleep(PAUSE);
        let start = Instant::now();
        assert!(a.send(&frame));
        while b.recv().is_none() {
            std::hint::spin_loop();
        }
        through.push(start.elapsed());
    }
    println!(
        "{}",
        if matches!(cores, Cores::Any) {
            "on any core"
        } else {
            "asking and answering on cores of their own"
        }
    );
    let floor = row("a thread that waits for an eventfd", &mut floor);
    let through = row("a frame through a sleeping switch", &mut through);
    println!("  {:38} {:+.1} us, ratio {:.2}", "of which the switch's own", through - floor, through / floor);
}

fn main() {
    idle(1);
    idle(2);
    wake_up(Cores::Any);
    wake_up(Cores::Own);
}
