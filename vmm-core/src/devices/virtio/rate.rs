//! Token-bucket rate limits, in bytes and in operations a second.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Units (bytes or operations) a second; 0 for no limit.
    pub per_second: u64,
    /// Units that may be used at once after an idle time.
    pub burst: u64,
}

/// The limits of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes a second.
    pub bytes: Option<Rate>,
    /// Operations a second.
    pub operations: Option<Rate>,
}

struct Bucket {
    rate: Rate,
    /// Billionths of a unit; negative after a request larger than what was left.
    tokens: i128,
    filled: Instant,
}

const NANO: i128 = 1_000_000_000;

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, tokens: i128::from(rate.burst.max(1)) * NANO, filled: now }
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled).as_nanos() as i128;
        let full = i128::from(self.rate.burst.max(1)) * NANO;
        self.tokens = (self.tokens + elapsed * i128::from(self.rate.per_second)).min(full);
        self.filled = now;
    }

    /// When the bucket is no longer empty; `None` when it is not.
    fn ready_at(&self, now: Instant) -> Option<Instant> {
        if self.tokens > 0 {
            return None;
        }
        let nanos = (1 - self.tokens).div_euclid(i128::from(self.rate.per_second)) + 1;
        now.checked_add(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))).or(Some(now))
    }
}

/// Applies [`Limits`]. A request passes while no bucket is empty and may overdraw it: what it used beyond the tokens
/// is paid back before the next one, so that a request larger than the burst is slow but not stuck.
pub struct RateLimiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl RateLimiter {
    /// A limiter with full buckets.
    pub fn new(limits: &Limits, now: Instant) -> Self {
        let bucket = |rate: Option<Rate>| rate.filter(|r| r.per_second != 0).map(|r| Bucket::new(r, now));
        Self { bytes: bucket(limits.bytes), operations: bucket(limits.operations) }
    }

    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.bytes.is_none() && self.operations.is_none()
    }

    /// Charges one operation of `bytes` bytes.
    ///
    /// # Errors
    /// Returns when to try again; nothing is charged then.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Instant> {
        let mut wait = None;
        for bucket in [&mut self.bytes, &mut self.operations].into_iter().flatten() {
            bucket.fill(now);
            wait = wait.max(bucket.ready_at(now));
        }
        if let Some(at) = wait {
            return Err(at);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.tokens -= i128::from(bytes) * NANO;
        }
        if let Some(bucket) = &mut self.operations {
            bucket.tokens -= NANO;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests that pass within `seconds` when each waits exactly as long as it is told.
    fn passed(limits: Limits, bytes: u64, seconds: u64) -> u64 {
        let start = Instant::now();
        let mut limiter = RateLimiter::new(&limits, start);
        let mut now = start;
        let mut count = 0;
        while now < start + Duration::from_secs(seconds) {
            match limiter.take(bytes, now) {
                Ok(()) => count += 1,
                Err(at) => {
                    assert!(at > now);
                    now = at;
                }
            }
        }
        count
    }

    #[test]
    fn rates_hold_over_time() {
        let rate = |per_second, burst| Some(Rate { per_second, burst });
        let ops = passed(Limits { bytes: None, operations: rate(100, 10) }, 1 << 20, 10);
        assert!((1009..=1011).contains(&ops), "{ops}");
        let bytes = passed(Limits { bytes: rate(1 << 20, 4096), operations: None }, 4096, 10);
        assert!((2560..=2563).contains(&bytes), "{bytes}");
        let large = passed(Limits { bytes: rate(1 << 20, 4096), operations: None }, 1 << 20, 10);
        assert!((10..=11).contains(&large), "{large}");
        let both = passed(Limits { bytes: rate(1 << 20, 1), operations: rate(7, 1) }, 4096, 10);
        assert!((70..=72).contains(&both), "{both}");
    }

    #[test]
    fn no_limits_limit_nothing() {
        let now = Instant::now();
        let zero = Rate { per_second: 0, burst: 0 };
        let mut limiter = RateLimiter::new(&Limits { bytes: Some(zero), operations: None }, now);
        assert!(limiter.is_unlimited());
        for _ in 0..1000 {
            limiter.take(u64::MAX, now).unwrap();
        }
    }
}
