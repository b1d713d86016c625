//! The time source of a switch: the host's monotonic clock, or a virtual one that only the owner advances.
//!
//! Everything that ages, limits a rate or runs a timer (MAC ageing, meters, LACP, conntrack, DHCP leases) reads
//! this clock, so tests move hours in a microsecond and always see the same result.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Nanoseconds since the clock's own epoch.
pub type Nanos = u64;

/// One second in [`Nanos`].
pub const SECOND: Nanos = 1_000_000_000;
/// One millisecond in [`Nanos`].
pub const MILLISECOND: Nanos = 1_000_000;
/// What a new clock shows.
const START: Nanos = 3600 * SECOND;

/// A time source; clones share the same time.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    /// When it was made, and the wall-clock time then, in nanoseconds since 1970.
    Monotonic(Instant, u64),
    Virtual(Arc<AtomicU64>),
}

impl Clock {
    /// The host's monotonic clock. Its epoch lies one hour in the past, so that no timestamp is near zero.
    pub fn monotonic() -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        Self(Source::Monotonic(Instant::now(), wall))
    }

    /// A clock that stands still until [`Clock::advance`].
    pub fn manual() -> Self {
        Self(Source::Virtual(Arc::new(AtomicU64::new(START))))
    }

    /// The present time.
    #[inline]
    pub fn now(&self) -> Nanos {
        match &self.0 {
            Source::Monotonic(start, _) => START + start.elapsed().as_nanos() as u64,
            Source::Virtual(t) => t.load(Ordering::Relaxed),
        }
    }

    /// The date that belongs to a time of this clock, in nanoseconds since 1970. A virtual clock starts in 2001.
    pub fn date(&self, at: Nanos) -> u64 {
        let wall = match &self.0 {
            Source::Monotonic(_, wall) => *wall,
            Source::Virtual(_) => 1_000_000_000 * SECOND,
        };
        (wall + at).saturating_sub(START)
    }

    /// Moves a virtual clock forward; a monotonic clock ignores it.
    pub fn advance(&self, by: Duration) {
        if let Source::Virtual(t) = &self.0 {
            t.fetch_add(by.as_nanos() as u64, Ordering::Relaxed);
        }
    }

    /// Whether the clock only moves by [`Clock::advance`].
    pub fn is_manual(&self) -> bool {
        matches!(self.0, Source::Virtual(_))
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::monotonic()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let c = Clock::manual();
        let t = c.now();
        assert_eq!(c.now(), t);
        c.clone().advance(Duration::from_secs(3));
        assert_eq!(c.now(), t + 3 * SECOND);
        assert_eq!(c.date(c.now()), 1_000_000_003 * SECOND);
    }
}
