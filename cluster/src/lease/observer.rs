//! What a host knows of the other hosts' delta leases.

use super::{DeltaRecord, Timing};
use crate::types::{Generation, HostId, Time};

/// What a host's sector says about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskLife {
    /// Not looked at yet, or not long enough.
    #[default]
    Unknown,
    /// The host gave its lease back: none of its VMs uses this volume.
    Free,
    /// The sector changed within `8 * io_timeout`.
    Live,
    /// The sector did not change for `8 * io_timeout`: the host is stopping its VMs, or is gone.
    Failing,
    /// The dead-time has passed.
    Dead,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    record: DeltaRecord,
    /// The highest generation seen; a late write cannot lower it.
    generation: Generation,
    /// End of the read that saw the sector change.
    changed: Time,
    /// Start of the last read that saw it unchanged.
    checked: Time,
    known: bool,
    /// The sector changed while we watched.
    moved: bool,
}

/// Judges other hosts by their sectors of one lockspace, on the own clock.
#[derive(Clone, Debug)]
pub struct LeaseObserver {
    timing: Timing,
    seen: Vec<Seen>,
}

impl LeaseObserver {
    /// An observer that has seen nothing. `timing` gives the watchdog timeout; the I/O timeout is read
    /// from each host's record.
    pub fn new(timing: Timing) -> Self {
        LeaseObserver { timing, seen: Vec::new() }
    }

    /// Notes what a read between `started` and `ended` found in `host`'s sector.
    pub fn observe(&mut self, started: Time, ended: Time, host: HostId, record: DeltaRecord) {
        let at = usize::from(host.0);
        if at > usize::from(crate::types::MAX_HOSTS) {
            return;
        }
        if self.seen.len() <= at {
            self.seen.resize(at + 1, Seen::default());
        }
        let seen = &mut self.seen[at];
        seen.generation = seen.generation.max(record.generation);
        if !seen.known || seen.record != record {
            seen.moved = seen.known;
            seen.known = true;
            seen.record = record;
            seen.changed = ended;
        }
        seen.checked = started;
    }

    /// Forgets everything: after the own host was not looking for a while, nothing is known.
    pub fn forget(&mut self) {
        self.seen.clear();
    }

    /// The highest generation seen of `host`; zero when none.
    pub fn generation(&self, host: HostId) -> Generation {
        self.seen.get(usize::from(host.0)).map_or(0, |s| s.generation)
    }

    /// What `host`'s sector says about it.
    pub fn life(&self, host: HostId) -> DiskLife {
        let Some(seen) = self.seen.get(usize::from(host.0)).filter(|s| s.known) else {
            return DiskLife::Unknown;
        };
        if seen.record.is_free() {
            // A sector that was never used says nothing about its host.
            return if seen.record.generation == 0 { DiskLife::Unknown } else { DiskLife::Free };
        }
        let timing = Timing { io_timeout: seen.record.io_timeout.max(1), ..self.timing };
        let unchanged = seen.checked.since(seen.changed);
        if unchanged >= timing.dead() {
            DiskLife::Dead
        } else if unchanged >= timing.fail() {
            DiskLife::Failing
        } else if seen.moved {
            DiskLife::Live
        } else {
            DiskLife::Unknown
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(timestamp: u64, generation: u64) -> DeltaRecord {
        DeltaRecord { owner: HostId(2), generation, timestamp, io_timeout: 10, ..Default::default() }
    }

    #[test]
    fn a_host_is_dead_only_when_a_read_that_started_after_the_dead_time_saw_no_change() {
        let mut o = LeaseObserver::new(Timing::default());
        let h = HostId(2);
        assert_eq!(o.life(h), DiskLife::Unknown);
        o.observe(Time(0), Time(1000), h, record(5, 1));
        assert_eq!(o.life(h), DiskLife::Unknown);
        o.observe(Time(20_000), Time(20_001), h, record(6, 1));
        assert_eq!(o.life(h), DiskLife::Live);
        o.observe(Time(100_001), Time(100_002), h, record(6, 1));
        assert_eq!(o.life(h), DiskLife::Failing);
        o.observe(Time(160_000), Time(170_000), h, record(6, 1));
        assert_eq!(o.life(h), DiskLife::Failing);
        o.observe(Time(160_001), Time(170_000), h, record(6, 1));
        assert_eq!(o.life(h), DiskLife::Dead);
        o.observe(Time(180_000), Time(180_001), h, record(7, 2));
        assert_eq!((o.life(h), o.generation(h)), (DiskLife::Live, 2));
        o.observe(Time(190_000), Time(190_001), h, record(6, 1));
        assert_eq!(o.generation(h), 2);
        o.observe(Time(200_000), Time(200_001), h, record(0, 2));
        assert_eq!(o.life(h), DiskLife::Free);
    }

    #[test]
    fn absurd_host_numbers_are_ignored() {
        let mut o = LeaseObserver::new(Timing::default());
        o.observe(Time(0), Time(0), HostId(u16::MAX), record(1, 1));
        assert_eq!(o.life(HostId(u16::MAX)), DiskLife::Unknown);
    }
}
