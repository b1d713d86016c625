//! The host's guard over itself: it feeds the watchdog only while every volume in use has a fresh lease.

use crate::mutants::{self, Mutant};
use crate::types::{LockspaceId, Millis, Time};

/// The watchdog's timers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MonitorConfig {
    /// The watchdog resets the host this long after its last feeding; zero without a watchdog.
    pub watchdog: Millis,
}

/// How a volume is used on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeUse {
    /// The volume.
    pub lockspace: LockspaceId,
    /// Until when its lease may be trusted (the expiry less the safety margin); `None` without a lease.
    pub trusted_until: Option<Time>,
    /// How many VM processes that use the volume exist.
    pub users: u32,
}

/// What happens to a [`LocalMonitor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MonitorInput {
    /// Time has passed.
    Tick,
    /// The host must reset itself: it lost the arbitration and could not stop its VMs in time.
    Condemned,
    /// The watchdog is to be stopped in an orderly manner; only without users.
    Disarm,
}

/// What a [`LocalMonitor`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MonitorOutput {
    /// Feed the watchdog (the first feeding arms it).
    Feed,
    /// Stop the watchdog.
    Disarm,
    /// Kill the VMs that use the volume, without waiting for them.
    Kill(LockspaceId),
    /// Reset the host now; a watchdog that is not fed any more stands behind this.
    Reset,
    /// Call with [`MonitorInput::Tick`] at this time at the latest.
    WakeAt(Time),
}

/// Decides whether this host may go on.
#[derive(Clone, Debug)]
pub struct LocalMonitor {
    config: MonitorConfig,
    last_feed: Option<Time>,
    condemned: bool,
    killing: Vec<(LockspaceId, Time)>,
}

impl LocalMonitor {
    /// A monitor whose watchdog is not armed yet.
    pub fn new(config: MonitorConfig) -> Self {
        LocalMonitor { config, last_feed: None, condemned: false, killing: Vec::new() }
    }

    /// The watchdog is fed this often: six times in its timeout.
    pub fn interval(&self) -> Millis {
        if self.config.watchdog == 0 { 5000 } else { (self.config.watchdog / 6).max(1000) }
    }

    /// Advances by one input, with the present use of each volume.
    pub fn step(
        &mut self,
        now: Time,
        input: MonitorInput,
        volumes: &[VolumeUse],
        out: &mut Vec<MonitorOutput>,
    ) {
        match input {
            MonitorInput::Condemned => self.condemned = true,
            MonitorInput::Disarm if volumes.iter().all(|v| v.users == 0) && self.config.watchdog > 0 => {
                self.last_feed = None;
                out.push(MonitorOutput::Disarm);
                return;
            }
            MonitorInput::Tick | MonitorInput::Disarm => {}
        }
        let mut wake = now + self.interval();
        let mut trusted = true;
        for v in volumes {
            let fresh = v.trusted_until.is_some_and(|t| now < t);
            if fresh || v.users == 0 || mutants::active(Mutant::NoKillOnExpiry) {
                self.killing.retain(|k| k.0 != v.lockspace);
                if let Some(t) = v.trusted_until.filter(|t| v.users > 0 && *t > now) {
                    wake = wake.min(t);
                }
                continue;
            }
            trusted = false;
            match self.killing.iter().find(|k| k.0 == v.lockspace) {
                None => {
                    self.killing.push((v.lockspace, now));
                    out.push(MonitorOutput::Kill(v.lockspace));
                }
                // Without a watchdog nobody else will end this: reset after a while.
                Some((_, since)) if self.config.watchdog == 0 && now >= *since + 30_000 => {
                    self.condemned = true;
                }
                Some(_) => out.push(MonitorOutput::Kill(v.lockspace)),
            }
        }
        if self.condemned {
            out.push(MonitorOutput::Reset);
            return;
        }
        let due = self.last_feed.is_none_or(|at| now >= at + self.interval());
        if self.config.watchdog > 0 && (trusted || mutants::active(Mutant::WatchdogAlwaysFed)) && due {
            self.last_feed = Some(now);
            out.push(MonitorOutput::Feed);
        }
        out.push(MonitorOutput::WakeAt(wake));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(until: Option<u64>, users: u32) -> VolumeUse {
        VolumeUse { lockspace: LockspaceId(0), trusted_until: until.map(Time), users }
    }

    fn step(m: &mut LocalMonitor, now: u64, v: VolumeUse) -> Vec<MonitorOutput> {
        let mut out = vec![];
        m.step(Time(now), MonitorInput::Tick, &[v], &mut out);
        out.retain(|o| !matches!(o, MonitorOutput::WakeAt(_)));
        out
    }

    #[test]
    fn the_watchdog_is_fed_only_while_leases_with_users_are_fresh() {
        let mut m = LocalMonitor::new(MonitorConfig { watchdog: 60_000 });
        assert_eq!(step(&mut m, 0, volume(Some(100_000), 1)), [MonitorOutput::Feed]);
        assert_eq!(step(&mut m, 5000, volume(Some(100_000), 1)), []);
        assert_eq!(step(&mut m, 10_000, volume(Some(100_000), 1)), [MonitorOutput::Feed]);
        assert_eq!(step(&mut m, 100_000, volume(Some(100_000), 1)), [MonitorOutput::Kill(LockspaceId(0))]);
        assert!(!step(&mut m, 130_000, volume(None, 1)).contains(&MonitorOutput::Feed));
        // The VMs are gone: a bad volume does not reboot a healthy host.
        assert_eq!(step(&mut m, 131_000, volume(None, 0)), [MonitorOutput::Feed]);
    }

    #[test]
    fn a_condemned_host_resets_and_one_without_watchdog_resets_when_its_vms_do_not_die() {
        let mut m = LocalMonitor::new(MonitorConfig { watchdog: 0 });
        step(&mut m, 0, volume(None, 1));
        assert!(!step(&mut m, 29_999, volume(None, 1)).contains(&MonitorOutput::Reset));
        assert!(step(&mut m, 30_000, volume(None, 1)).contains(&MonitorOutput::Reset));
        let mut m = LocalMonitor::new(MonitorConfig { watchdog: 60_000 });
        let mut out = vec![];
        m.step(Time(0), MonitorInput::Condemned, &[volume(Some(9), 1)], &mut out);
        assert_eq!(out, [MonitorOutput::Reset]);
    }
}
