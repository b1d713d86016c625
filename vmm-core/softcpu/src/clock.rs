//! Guest time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The time source that all processors and devices of one machine share: a time-stamp counter of fixed
/// frequency that starts at zero when the clock is made.
#[derive(Debug)]
pub struct Clock {
    khz: u64,
    source: Source,
    /// The paravirtual clock minus nanoseconds since the clock was made.
    system: AtomicU64,
}

#[derive(Debug)]
enum Source {
    /// Follows the host's monotonic clock.
    Host(Instant),
    /// Counts executed instructions; moved by the one processor of a deterministic machine.
    Virtual(AtomicU64),
}

impl Clock {
    /// A clock that follows the host's monotonic clock; the counter advances at `khz` kHz.
    pub fn host(khz: u32) -> Self {
        Self::new(khz, Source::Host(Instant::now()))
    }

    /// A clock that advances by one tick for each executed instruction and, while the processor is
    /// halted, jumps to the next timer deadline: two runs of the same guest see the same time. Only for
    /// machines with one processor.
    pub fn deterministic(khz: u32) -> Self {
        Self::new(khz, Source::Virtual(AtomicU64::new(0)))
    }

    fn new(khz: u32, source: Source) -> Self {
        Self { khz: u64::from(khz.max(1)), source, system: AtomicU64::new(0) }
    }

    /// Frequency of the time-stamp counter in kHz.
    pub fn khz(&self) -> u32 {
        self.khz as u32
    }

    /// Whether time is virtual.
    pub fn is_deterministic(&self) -> bool {
        matches!(self.source, Source::Virtual(_))
    }

    /// The time-stamp counter without any processor's offset.
    pub fn tsc(&self) -> u64 {
        match &self.source {
            Source::Host(epoch) => self.ns_to_tsc(epoch.elapsed().as_nanos() as u64),
            Source::Virtual(ticks) => ticks.load(Ordering::Relaxed),
        }
    }

    /// Nanoseconds since the clock was made.
    pub fn now_ns(&self) -> u64 {
        match &self.source {
            Source::Host(epoch) => epoch.elapsed().as_nanos() as u64,
            Source::Virtual(ticks) => self.tsc_to_ns(ticks.load(Ordering::Relaxed)),
        }
    }

    /// Nanoseconds of the paravirtual clock (kvmclock) that guests see.
    pub fn system_time(&self) -> u64 {
        self.now_ns().wrapping_add(self.system.load(Ordering::Relaxed))
    }

    /// Lets the paravirtual clock go on from a time, as a guest that comes from another machine expects. Processors tell
    /// the guest with their next run after [`Cpu::set_state`](crate::Cpu::set_state).
    pub fn set_system_time(&self, ns: u64) {
        self.system.store(ns.wrapping_sub(self.now_ns()), Ordering::Relaxed);
    }

    /// What [`Clock::system_time`] is when [`Clock::tsc`] is `ticks`.
    pub(crate) fn system_time_at(&self, ticks: u64) -> u64 {
        self.tsc_to_ns(ticks).wrapping_add(self.system.load(Ordering::Relaxed))
    }

    /// Converts ticks to nanoseconds.
    pub fn tsc_to_ns(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1_000_000 / u128::from(self.khz)) as u64
    }

    /// Converts nanoseconds to ticks.
    pub fn ns_to_tsc(&self, ns: u64) -> u64 {
        (u128::from(ns) * u128::from(self.khz) / 1_000_000) as u64
    }

    /// How long a host thread has to wait until the counter reaches `tsc`.
    pub fn until(&self, tsc: u64) -> Duration {
        let ticks = u128::from(tsc.saturating_sub(self.tsc()));
        let ns = (ticks * 1_000_000).div_ceil(u128::from(self.khz));
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// Moves virtual time forward to `tsc`; the host's clock cannot be moved.
    pub(crate) fn advance_to(&self, tsc: u64) {
        if let Source::Virtual(ticks) = &self.source {
            ticks.fetch_max(tsc, Ordering::Relaxed);
        }
    }
}
