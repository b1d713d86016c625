//! What the guests of the VMs do, as their hosts see it.

use super::check::Violation;
use super::state::{ProcState, SimHost};
use super::world::{Event, HEALTH, World};
use crate::ha::{Ailment, Signs};
use crate::node::NodeInput;
use crate::types::{HostId, VmId};

/// The guest of a VM process.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Guest {
    signs: Signs,
    /// When it last stopped doing anything, and until when that lasts.
    frozen: Option<(u64, u64)>,
    /// The program that sends heartbeats has ended.
    pub(super) beats_ended: bool,
    /// How many looks in a row have found it frozen, or without I/O.
    sick: [u64; 2],
}

impl Guest {
    pub(super) fn freeze(&mut self, now: u64, until: u64) {
        self.frozen = Some((now, until));
    }

    fn is_frozen(&self, now: u64) -> bool {
        self.frozen.is_some_and(|(_, until)| now < until)
    }

    /// Whether it does nothing any more, and its host can know that: one that never sent a heartbeat may be idle.
    pub(super) fn is_missed(&self, now: u64) -> bool {
        self.is_frozen(now) && self.signs.beats > 0
    }
}

/// Until when, from when on, and for how many overlapping reasons the VMs of a host have no I/O.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stall {
    reasons: u32,
    since: u64,
}

impl Stall {
    pub(super) fn set(&mut self, now: u64, on: bool) {
        if on && self.reasons == 0 {
            self.since = now;
        }
        self.reasons = if on { self.reasons + 1 } else { self.reasons - 1 };
    }
}

impl World {
    /// The agent of a host looks at its guests.
    pub(super) fn look(&mut self, host: usize) {
        let now = self.now;
        let h = &mut self.hosts[host];
        let stalled = h.stall.reasons > 0;
        let mut looks = Vec::new();
        for p in h.procs.iter_mut().filter(|p| p.state == ProcState::Live) {
            let runs = !p.guest.is_frozen(now);
            let signs = &mut p.guest.signs;
            signs.beats += u64::from(runs && !p.guest.beats_ended);
            signs.completed += u64::from(runs && !stalled);
            signs.pending = u64::from(stalled);
            looks.push((p.vm, p.epoch, *signs));
        }
        self.step(host, NodeInput::Signs(looks));
        self.check_sick(host);
        let boot = self.hosts[host].boot;
        self.push(now + HEALTH.interval, Event::Look { host, boot });
    }

    /// Whether a guest that does nothing is left alone for too long. Only looks count: who does not look is fenced.
    fn check_sick(&mut self, host: usize) {
        let now = self.now;
        let SimHost { node: Some(node), procs, stall, .. } = &mut self.hosts[host] else { return };
        let mut missed = None;
        for p in procs.iter_mut() {
            let watched = node.vms().any(|(id, vm)| id == p.vm && vm.epoch() == p.epoch && vm.is_watched());
            let limits = [(p.guest.is_missed(now), HEALTH.heartbeat), (stall.reasons > 0, HEALTH.stall)];
            for (looks, (sick, limit)) in p.guest.sick.iter_mut().zip(limits) {
                *looks = if sick && watched { *looks + 1 } else { 0 };
                if *looks > limit / HEALTH.interval + 3 {
                    missed = Some(p.vm);
                }
            }
        }
        if let Some(vm) = missed {
            self.violate(Violation::SickKept(vm));
        }
    }

    /// Whether a VM is killed whose guest was well.
    pub(super) fn check_ailing(&mut self, host: usize, vm: VmId, epoch: u64, ailment: Ailment) {
        let h = &self.hosts[host];
        let Some(p) = h.procs.iter().find(|p| p.vm == vm && p.epoch == epoch) else { return };
        // A look that comes right after the beginning counts as if it had begun at the look before.
        let for_long = |since: u64, limit| self.now - since + 2 * HEALTH.interval >= limit;
        let stalled = |limit| h.stall.reasons > 0 && for_long(h.stall.since, limit);
        let sick = match ailment {
            Ailment::IoStalled => stalled(HEALTH.stall),
            Ailment::HeartbeatLost => {
                let frozen = p
                    .guest
                    .frozen
                    .is_some_and(|(since, until)| self.now < until && for_long(since, HEALTH.heartbeat));
                frozen || p.guest.beats_ended && stalled(HEALTH.heartbeat)
            }
        };
        if !sick {
            self.violate(Violation::HealthyKilled(vm, HostId(host as u16 + 1)));
        }
    }

    /// Does something to the guest of a VM.
    pub(super) fn with_guest(&mut self, vm: u8, action: impl Fn(&mut Guest)) {
        let live = self.hosts.iter_mut().flat_map(|h| &mut h.procs);
        live.filter(|p| p.vm == VmId(u32::from(vm)) && p.state == ProcState::Live)
            .for_each(|p| action(&mut p.guest));
    }
}
