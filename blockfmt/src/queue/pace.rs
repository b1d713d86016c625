//! Whether a thread does a request itself.

use crate::usage::sleeps;

/// Requests that are looked at together, of a kind that ends soon as a rule.
const SAMPLE: u32 = 4;
/// Requests between two looks.
const INTERVAL: u32 = 64;
/// Requests that are left to the queue before one is done directly to see whether that is better by now.
const TRIAL_INTERVAL: u32 = 1024;

/// Decides whether the thread that serves a device does a request itself or leaves it to a [`Queue`](super::Queue).
///
/// A request whose bytes are in the host's memory is done soonest by the thread itself: one system call, no hand-over.
/// One that makes the thread sleep, because its storage answers late, keeps all others waiting meanwhile, and a queue
/// has many of them under way at once. So the thread begins by doing requests itself and now and then looks how often
/// the kernel let it sleep while others waited. Keep one of these for each kind of request that takes a time of its
/// own, flushes for example.
#[derive(Debug)]
pub struct Pace {
    sample: u32,
    deferring: bool,
    /// Requests until the next look or trial.
    left: u32,
    /// While deferring: whether there ever was more than one request at a time.
    overlap: bool,
    /// The look that is under way: requests, and how many of them slept.
    seen: u32,
    slept: u32,
}

impl Pace {
    /// For reads and writes.
    pub fn new() -> Self {
        Pace { sample: SAMPLE, deferring: false, left: 0, overlap: false, seen: 0, slept: 0 }
    }

    /// For requests that may take long each: one that slept is enough to leave the next to the queue.
    pub fn of_long_requests() -> Self {
        Pace { sample: 1, ..Pace::new() }
    }

    /// Does a request with `run`, or returns `None` if it is better left to the queue. `more` tells whether others
    /// wait or are under way.
    pub fn run<T>(&mut self, more: bool, run: impl FnOnce() -> T) -> Option<T> {
        self.run_watched(more, run, sleeps)
    }

    fn run_watched<T>(&mut self, more: bool, run: impl FnOnce() -> T, sleeps: impl Fn() -> i64) -> Option<T> {
        if self.deferring {
            self.overlap |= more;
            self.left = self.left.saturating_sub(1);
            if self.left > 0 {
                return None;
            }
            if !self.overlap {
                // Nobody would have waited: there is nothing to gain from a queue.
                self.look_again(false);
                return Some(run());
            }
        } else {
            self.left = self.left.saturating_sub(1);
            if self.left > 0 || !more {
                return Some(run());
            }
        }
        let before = sleeps();
        let result = run();
        self.seen += 1;
        self.slept += u32::from(sleeps() > before);
        let enough = if self.deferring { 1 } else { self.sample };
        if self.seen >= enough {
            self.look_again(2 * self.slept >= self.seen);
        }
        Some(result)
    }

    fn look_again(&mut self, deferring: bool) {
        let left = match (deferring, self.sample) {
            (true, _) => TRIAL_INTERVAL,
            (false, 1) => 0,
            (false, _) => INTERVAL,
        };
        *self = Pace { sample: self.sample, deferring, left, overlap: false, seen: 0, slept: 0 };
    }
}

impl Default for Pace {
    fn default() -> Self {
        Pace::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// Serves `count` requests, of which each sleeps or not, and returns how many were done directly.
    fn serve(pace: &mut Pace, count: u32, more: bool, sleeping: bool) -> u32 {
        let clock = Cell::new(0);
        let run = || clock.set(clock.get() + i64::from(sleeping));
        (0..count).filter(|_| pace.run_watched(more, run, || clock.get()).is_some()).count() as u32
    }

    #[test]
    fn requests_that_sleep_while_others_wait_are_left_to_the_queue() {
        let mut pace = Pace::new();
        assert_eq!(serve(&mut pace, 1000, true, false), 1000);
        assert_eq!(serve(&mut pace, 1000, false, true), 1000, "nobody waits");
        let direct = serve(&mut pace, 10_000, true, true);
        assert!(direct < INTERVAL + SAMPLE + 10_000 / TRIAL_INTERVAL + 1, "{direct}");
    }

    #[test]
    fn storage_that_has_become_fast_is_noticed() {
        let mut pace = Pace::new();
        serve(&mut pace, 10, true, true);
        let direct = serve(&mut pace, 10_000, true, false);
        assert!(direct > 10_000 - TRIAL_INTERVAL - SAMPLE, "{direct}");
    }

    #[test]
    fn single_requests_return_to_the_thread() {
        let mut pace = Pace::new();
        serve(&mut pace, 10, true, true);
        let direct = serve(&mut pace, 10_000, false, true);
        assert!(direct > 10_000 - 2 * TRIAL_INTERVAL, "{direct}");
    }

    #[test]
    fn the_first_long_request_that_slept_decides() {
        let mut pace = Pace::of_long_requests();
        assert_eq!(serve(&mut pace, 5, true, false), 5);
        assert_eq!(serve(&mut pace, 5, true, true), 1);
    }
}
