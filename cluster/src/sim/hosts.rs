//! Hosts boot, lose power, and are reset.

use super::check::Violation;
use super::schedule::VOLUMES;
use super::world::{Event, HEALTH, TIMING, VM_MEMORY, WITNESS, World};
use crate::fence::FenceConfig;
use crate::ha::HaConfig;
use crate::lease::LeaseStatus;
use crate::membership::MembershipConfig;
use crate::node::{Config, FenceTarget, Node, NodeInput};
use crate::ondisk::Name;
use crate::types::{HostId, Resources};

impl World {
    pub(super) fn boot(&mut self, host: usize) {
        if self.hosts[host].powered || self.hosts[host].dead {
            return;
        }
        self.note(|| format!("host {} boots", host + 1));
        let config = self.config(host);
        let now = self.now;
        let h = &mut self.hosts[host];
        h.powered = true;
        h.boot += 1;
        h.booted_at = now;
        h.watchdog_at = None;
        h.watchdog_event = false;
        h.paused_until = 0;
        h.agent_paused_until = 0;
        h.forget_wake();
        h.usurper_since = None;
        h.node = Some(Node::new(h.local(now), config, h.boot));
        let boot = h.boot;
        self.push(now + HEALTH.interval, Event::Look { host, boot });
        self.step(host, NodeInput::Tick);
    }

    fn config(&self, host: usize) -> Config {
        let id = |i: usize| HostId(i as u16 + 1);
        let members: Vec<HostId> = (0..self.hosts.len()).map(id).collect();
        let fencing = members
            .iter()
            .map(|h| FenceTarget {
                host: *h,
                config: FenceConfig { levels: vec![vec![h.0]], ..FenceConfig::default() },
            })
            .collect();
        Config {
            host: id(host),
            name: Name::new(["a", "b", "c", "d", "e"][host % 5]).unwrap_or_default(),
            timing: TIMING,
            lockspaces: VOLUMES,
            watchdog: self.hosts[host].has_watchdog,
            capacity: Resources { cpu: 16_000, memory: 4 * VM_MEMORY },
            membership: MembershipConfig::new(id(host), members),
            ha: HaConfig { health: HEALTH, ..HaConfig::default() },
            fencing,
            witness: Some(WITNESS),
            stop_grace: 20_000,
        }
    }

    /// The host loses everything that is not on disk.
    pub(super) fn power_off(&mut self, host: usize) {
        self.note(|| format!("host {} is off", host + 1));
        let h = &mut self.hosts[host];
        h.powered = false;
        h.node = None;
        for volume in 0..usize::from(VOLUMES) {
            h.lease_over(volume);
        }
        h.procs.clear();
        h.watchdog_at = None;
    }

    pub(super) fn reset(&mut self, host: usize) {
        if self.hosts[host].powered {
            self.power_off(host);
            let at = self.now + self.rng.range(15_000, 45_000);
            self.push(at, Event::Boot { host });
        }
    }

    pub(super) fn watchdog(&mut self, host: usize, boot: u64) {
        if !self.lives(host, boot) {
            return;
        }
        self.hosts[host].watchdog_event = false;
        match self.hosts[host].watchdog_at {
            Some(at) if self.now >= at => {
                let h = &self.hosts[host];
                let excused = self.now < h.paused_until.max(h.agent_paused_until) + 60_000 || h.unkillable;
                let healthy = h.node.as_ref().is_some_and(|n| {
                    n.is_quorate() && n.leases().all(|l| matches!(l, LeaseStatus::Held { .. }))
                });
                if healthy && !excused {
                    self.violate(Violation::HealthyReset(HostId(host as u16 + 1)));
                }
                self.reset(host);
            }
            Some(at) => {
                self.hosts[host].watchdog_event = true;
                self.push(at, Event::Watchdog { host, boot });
            }
            None => {}
        }
    }
}
