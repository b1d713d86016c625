//! The host's clock for leases.

use nix::time::{ClockId, clock_gettime};

use crate::types::Time;

/// Milliseconds since the host's boot, time spent in suspend included: a host that slept must not believe
/// that its lease is young.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock;

impl Clock {
    /// The present time.
    pub fn now(self) -> Time {
        // CLOCK_BOOTTIME exists since Linux 2.6.39 and cannot fail; the end of time expires every lease.
        clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Time(u64::MAX), |t| {
            Time(t.tv_sec().unsigned_abs() * 1000 + t.tv_nsec().unsigned_abs() / 1_000_000)
        })
    }
}
