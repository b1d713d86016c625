//! Whether the guest of a VM whose process is there still does anything.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::mutants::{self, Mutant};
use crate::types::{Millis, Time};

/// When a VM counts as failed although its process is there; times in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HealthConfig {
    /// Signs of life are looked at this often.
    pub interval: Millis,
    /// A guest that sends heartbeats has failed when it has sent none, and its disks have completed nothing, for this
    /// long. 0: never.
    pub heartbeat: Millis,
    /// A VM has failed when requests to its disks were under way, and none was completed, for this long. 0: never.
    pub stall: Millis,
}

impl Default for HealthConfig {
    fn default() -> Self {
        HealthConfig { interval: 5000, heartbeat: 60_000, stall: 120_000 }
    }
}

/// What a VM's process shows of its guest. All counters may begin anew when the guest reboots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signs {
    /// Heartbeats since the guest booted. None is missed before the first.
    pub beats: u64,
    /// Requests to its disks that were completed.
    pub completed: u64,
    /// Requests to its disks that are under way.
    pub pending: u64,
}

/// What is wrong with a VM whose process is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ailment {
    /// Its guest sends no heartbeats any more.
    HeartbeatLost,
    /// Its disks complete nothing any more.
    IoStalled,
}

/// Watches one VM from the start of its process on.
///
/// Only spans between two looks count that are as short as they should be: who was stopped for a minute has not seen
/// a minute of silence.
#[derive(Clone, Copy, Debug, Default)]
pub struct Health {
    last: Option<(Time, Signs)>,
    silent: Millis,
    stalled: Millis,
}

impl Health {
    /// Takes the next look; gives what is wrong, if anything is.
    pub fn observe(&mut self, now: Time, signs: Signs, config: &HealthConfig) -> Option<Ailment> {
        let (at, last) = self.last.replace((now, signs))?;
        let gap = match now.since(at) {
            gap if mutants::active(Mutant::ObserverPauseCounts) => gap,
            gap => gap.min(config.interval),
        };
        let progress = signs.completed != last.completed;
        let lives = signs.beats == 0
            || signs.beats != last.beats
            || progress && !mutants::active(Mutant::ProgressIgnored);
        self.silent = if lives { 0 } else { self.silent + gap };
        self.stalled = if progress || signs.pending == 0 { 0 } else { self.stalled + gap };
        let over = |span, limit| limit > 0 && span >= limit;
        if over(self.stalled, config.stall) && !mutants::active(Mutant::StallIgnored) {
            Some(Ailment::IoStalled)
        } else if over(self.silent, config.heartbeat) && !mutants::active(Mutant::HeartbeatLossIgnored) {
            Some(Ailment::HeartbeatLost)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: HealthConfig = HealthConfig { interval: 5000, heartbeat: 20_000, stall: 30_000 };

    /// Looks every 5 s; gives when what was found.
    fn watch(signs: impl Fn(u64) -> Signs) -> Option<(u64, Ailment)> {
        let mut health = Health::default();
        (0..100).map(|n| n * 5).find_map(|s| Some((s, health.observe(Time(s * 1000), signs(s), &CONFIG)?)))
    }

    #[test]
    fn a_guest_without_heartbeats_is_never_missed_and_one_with_them_is_after_the_hold_time() {
        let idle = Signs::default();
        assert_eq!(watch(|_| idle), None);
        assert_eq!(watch(|s| Signs { beats: s, ..idle }), None);
        let ends = |s: u64| Signs { beats: s.min(100), ..idle };
        assert_eq!(watch(ends), Some((120, Ailment::HeartbeatLost)));
        // Whoever works lives, and a reboot begins anew.
        assert_eq!(watch(|s| Signs { completed: s, ..ends(s) }), None);
        assert_eq!(watch(|s| if s > 110 { idle } else { ends(s) }), None);
    }

    #[test]
    fn requests_that_are_never_completed_are_a_stall_and_slow_ones_are_not() {
        let signs = |completed| Signs { beats: 0, completed, pending: 1 };
        assert_eq!(watch(|s| signs(s.min(50))), Some((80, Ailment::IoStalled)));
        assert_eq!(watch(|s| signs(s / 25)), None);
        assert_eq!(watch(|s| Signs { pending: 0, ..signs(s.min(50)) }), None);
    }

    #[test]
    fn an_observer_that_was_stopped_saw_nothing_and_a_zero_turns_a_check_off() {
        let mut health = Health::default();
        let signs = Signs { beats: 1, completed: 0, pending: 1 };
        for (now, off) in [(0, false), (100_000, false), (105_000, false), (110_000, false), (300_000, true)]
        {
            let config = if off { HealthConfig { heartbeat: 0, stall: 0, ..CONFIG } } else { CONFIG };
            assert_eq!(health.observe(Time(now), signs, &config), None, "at {now}");
        }
        assert_eq!(health.observe(Time(305_000), signs, &CONFIG), Some(Ailment::HeartbeatLost));
    }
}
