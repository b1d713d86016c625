//! Limits on the rate of requests.

use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// Longest time that one request is made to wait.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// Rates per second; 0 means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Bytes read and written.
    pub bytes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Requests.
    pub operations: u64,
    /// Read requests.
    pub read_operations: u64,
    /// Write requests.
    pub write_operations: u64,
    /// After a pause, this many milliseconds' worth of requests pass without waiting.
    pub burst_ms: u64,
}

/// A limit, for one disk or shared by a group of them.
#[derive(Debug)]
pub struct Throttle(Mutex<State>);

#[derive(Debug)]
struct State {
    limits: Limits,
    /// Per limit, when what was admitted so far is paid for: all, read, write bytes; then operations.
    paid: [Option<Instant>; 6],
}

impl Throttle {
    /// A throttle with these limits.
    pub fn new(limits: Limits) -> Self {
        Throttle(Mutex::new(State { limits, paid: [None; 6] }))
    }

    /// Changes the limits.
    pub fn set(&self, limits: Limits) {
        *self.0.lock() = State { limits, paid: [None; 6] };
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.0.lock().limits
    }

    /// How long a request that arrives now has to wait; it counts as admitted.
    fn admit(&self, write: bool, bytes: u64, now: Instant) -> Duration {
        let mut state = self.0.lock();
        let l = state.limits;
        let directed = |read, written| if write { [0, written] } else { [read, 0] };
        let [read_bytes, write_bytes] = directed(l.read_bytes, l.write_bytes);
        let [read_ops, write_ops] = directed(l.read_operations, l.write_operations);
        let rates = [l.bytes, read_bytes, write_bytes, l.operations, read_ops, write_ops];
        let burst = Duration::from_millis(l.burst_ms);
        let mut wait = Duration::ZERO;
        for (i, (rate, paid)) in rates.into_iter().zip(&mut state.paid).enumerate() {
            if rate == 0 {
                continue;
            }
            let amount = if i < 3 { bytes } else { 1 };
            let earliest = now.checked_sub(burst).unwrap_or(now);
            let start = paid.unwrap_or(earliest).max(earliest);
            wait = wait.max(start.saturating_duration_since(now));
            let cost = Duration::from_secs_f64(amount as f64 / rate as f64).min(MAX_WAIT);
            *paid = Some(start + cost);
        }
        wait.min(MAX_WAIT)
    }

    /// Waits until a request may proceed.
    pub(crate) fn wait(&self, write: bool, bytes: u64) {
        let wait = self.admit(write, bytes, Instant::now());
        if !wait.is_zero() {
            std::thread::sleep(wait);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_wait_for_their_turn_after_the_burst() {
        let limits = Limits { write_bytes: 1000, operations: 100, burst_ms: 500, ..Limits::default() };
        let throttle = Throttle::new(limits);
        let now = Instant::now();
        // 500 bytes of burst, then one second per 1000 bytes.
        assert_eq!(throttle.admit(true, 500, now), Duration::ZERO);
        assert_eq!(throttle.admit(true, 1000, now), Duration::ZERO);
        assert_eq!(throttle.admit(true, 1, now), Duration::from_secs(1));
        // Reads count as operations only.
        assert_eq!(throttle.admit(false, 1 << 30, now), Duration::ZERO);
        // Later, the debt is gone and the burst is back.
        let later = now + Duration::from_secs(60);
        assert_eq!(throttle.admit(true, 400, later), Duration::ZERO);
    }
}
