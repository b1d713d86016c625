//! The invariants.

use core::fmt;

use super::exec::index;
use super::schedule::{END, VMS};
use super::state::{ProcState, SimHost};
use super::world::{TIMING, WITNESS, World};
use crate::fence::{Evidence, FenceAction};
use crate::ha::{ClusterState, VmPhase};
use crate::lease::LeaseStatus;
use crate::membership::MembershipConfig;
use crate::node::Node;
use crate::types::{HostId, Incarnation, ResourceId, Time, Token, VmId};

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// Two processes of one VM (and of its disks) may write at the same time.
    TwoWriters(VmId, HostId, HostId),
    /// A host was declared gone while it could still write.
    FencedAlive(Incarnation),
    /// A lock was given with a token that is not higher than the last one.
    TokenNotRising(ResourceId, Token),
    /// A VM that should run does not, long after the last fault.
    NotRestarted(VmId),
    /// A host without quorum switched another one off.
    MinorityFenced(HostId, HostId),
    /// A life of a host was fenced before anything of it could have been missed.
    FencedYoung(Incarnation),
    /// A healthy host of the majority was reset.
    HealthyReset(HostId),
    /// A VM was admitted into the reserve.
    ReserveEaten(HostId),
    /// A VM was given a host although the cluster is shut down.
    PlacedWhileHalted(VmId),
    /// A VM was killed although its guest was well.
    HealthyKilled(VmId, HostId),
    /// A VM whose guest does nothing was left alone for too long.
    SickKept(VmId),
    /// A VM was started too often.
    RestartStorm(VmId, u32),
    /// Too many VMs start on one host at once.
    StartStorm(HostId),
    /// A host counts its lease longer than its last write on disk allows.
    LeaseOverrated(HostId),
    /// A host's lease has a generation that an earlier lease of it had: what is known to be over would go on.
    GenerationReused(HostId),
    /// A host coordinates although another one, or none, holds the key.
    Usurper(HostId),
    /// The stored state went back in time.
    StateRegressed(VmId),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::TwoWriters(vm, a, b) => write!(f, "VM {} runs on {a} and {b}", vm.0),
            Violation::FencedAlive(i) => {
                write!(f, "{} boot {} was declared gone but could write", i.host, i.generation)
            }
            Violation::TokenNotRising(r, t) => {
                write!(f, "token of {r:?} did not rise: version {} of {}", t.lver, t.owner.host)
            }
            Violation::NotRestarted(vm) => write!(f, "VM {} was not restarted in time", vm.0),
            Violation::MinorityFenced(a, b) => write!(f, "{a} fenced {b} without quorum"),
            Violation::FencedYoung(i) => {
                write!(f, "{} boot {} was fenced as soon as it came", i.host, i.generation)
            }
            Violation::HealthyReset(h) => write!(f, "{h} was reset although it was healthy"),
            Violation::ReserveEaten(h) => write!(f, "the VMs of {h} no longer fit on the other hosts"),
            Violation::PlacedWhileHalted(vm) => write!(f, "VM {} was started in a halted cluster", vm.0),
            Violation::HealthyKilled(vm, h) => {
                write!(f, "VM {} was killed on {h} although it was well", vm.0)
            }
            Violation::SickKept(vm) => write!(f, "VM {} hangs and nobody does anything", vm.0),
            Violation::RestartStorm(vm, n) => write!(f, "VM {} was started {n} times", vm.0),
            Violation::StartStorm(h) => write!(f, "too many VMs start at once on {h}"),
            Violation::LeaseOverrated(h) => {
                write!(f, "{h} counts its lease from a later time than its write")
            }
            Violation::GenerationReused(h) => write!(f, "{h} took its lease with an old generation"),
            Violation::Usurper(h) => write!(f, "{h} coordinates without holding the key"),
            Violation::StateRegressed(vm) => write!(f, "the record of VM {} went back in time", vm.0),
        }
    }
}

/// Whether a second process of `vm` that may write exists beside the one on host `at`.
pub(super) fn two_writers(hosts: &[SimHost], vm: VmId, at: usize) -> Option<Violation> {
    let writers = |h: &SimHost| h.procs.iter().filter(|p| p.vm == vm && p.state == ProcState::Live).count();
    for (i, h) in hosts.iter().enumerate() {
        let allowed = usize::from(i == at);
        if h.powered && writers(h) > allowed {
            let id = |n: usize| HostId(n as u16 + 1);
            return Some(Violation::TwoWriters(vm, id(at), id(i)));
        }
    }
    None
}

/// Whether the demand of some host's VMs is more than what all others have free.
pub(super) fn reserve_eaten(state: &ClusterState, usable: &[HostId]) -> Option<HostId> {
    let used = |h: HostId| -> u64 {
        let here = |p: &Option<Incarnation>| p.is_some_and(|p| p.host == h);
        state.vms.values().filter(|v| here(&v.place)).map(|v| v.spec.demand.memory).sum()
    };
    let waiting: u64 =
        state.vms.values().filter(|v| v.wanted && v.place.is_none()).map(|v| v.spec.demand.memory).sum();
    let free = |h: HostId| state.hosts.get(&h).map_or(0, |r| r.capacity.memory.saturating_sub(used(h)));
    let total: u64 = usable.iter().map(|h| free(*h)).sum();
    usable.iter().copied().find(|h| total - free(*h) < used(*h) + waiting)
}

/// Whether a VM counts for the liveness check at the end.
pub(super) fn should_run(phase: VmPhase, wanted: bool) -> bool {
    wanted && phase != VmPhase::Failed
}

impl World {
    /// Looks at a host's leases after a renewal that was submitted at this local time.
    pub(super) fn check_lease(&mut self, host: usize, submitted: Time) {
        let local = self.hosts[host].local(self.now);
        let h = &mut self.hosts[host];
        let Some(node) = &h.node else { return };
        let (mut overrated, mut reused) = (false, false);
        for (lease, (seen, over)) in node.leases().zip(&mut h.generations) {
            let LeaseStatus::Held { generation, expires } = lease else { continue };
            // Of two volumes only the one just written can count from this moment.
            overrated |= expires == local + TIMING.fail() && local > submitted;
            reused |= generation <= *over;
            *seen = generation;
        }
        let id = HostId(host as u16 + 1);
        if overrated {
            self.violate(Violation::LeaseOverrated(id));
        }
        if reused {
            self.violate(Violation::GenerationReused(id));
        }
    }

    pub(super) fn check_usurpers(&mut self) {
        self.store.expire(self.now);
        let key = self.store.key.map(|k| k.token);
        for host in 0..self.hosts.len() {
            let now = self.now;
            let h = &mut self.hosts[host];
            let stopped = now < h.paused_until.max(h.agent_paused_until) + 2000;
            let token = h.node.as_ref().and_then(Node::token);
            if stopped || token.is_none() || token == key {
                h.usurper_since = None;
                continue;
            }
            let since = *h.usurper_since.get_or_insert(now);
            if now - since > 15_000 {
                self.violate(Violation::Usurper(HostId(host as u16 + 1)));
            }
        }
    }

    /// Whether half of the hosts are silent for good and one of them, which nobody may presume dead because it
    /// has no watchdog, holds the witness: the other half must not act, so nothing can be asked of it.
    fn is_tied_for_good(&self) -> bool {
        let silent = |h: &SimHost| h.dead || h.paused_until > END;
        let witness = self.volumes[usize::from(WITNESS.lockspace.0)].areas[WITNESS.index as usize].leader;
        let owner = self.hosts.get(usize::from(witness.owner.host.0).wrapping_sub(1));
        let held = !witness.is_free() && owner.is_some_and(|h| silent(h) && !h.has_watchdog);
        held && 2 * self.hosts.iter().filter(|h| silent(h)).count() >= self.hosts.len()
    }

    /// Long after the last fault every VM that should run runs.
    pub(super) fn check_end(&mut self) {
        if self.is_tied_for_good() || self.store.state.halted {
            return;
        }
        let missing = self.store.state.vms.iter().find(|(id, v)| {
            let running = self.hosts.iter().any(|h| {
                h.procs.iter().any(|p| p.vm == **id && p.state == ProcState::Live && !p.guest.is_missed(END))
            });
            // Nobody can know that a host without watchdog is off when its power controller is dead too.
            let lost = |host: HostId| {
                self.hosts.get(usize::from(host.0) - 1).is_some_and(|h| h.dead && !h.has_watchdog)
            };
            let locked = v.spec.disks.iter().any(|d| {
                let leader = self.volumes[usize::from(d.lockspace.0)].areas[d.index as usize].leader;
                !leader.is_free() && lost(leader.owner.host)
            });
            let hopeless = locked || v.place.is_some_and(|p| lost(p.host));
            let waits = v.place.is_none()
                && v.spec
                    .depends_on
                    .iter()
                    .any(|d| self.store.state.vms.get(d).is_some_and(|d| d.phase != VmPhase::Running));
            should_run(v.phase, v.wanted) && !waits && !running && !hopeless
        });
        if let Some((id, _)) = missing {
            self.violate(Violation::NotRestarted(*id));
        }
        if (1..=u32::from(VMS)).any(|vm| !self.store.state.vms.contains_key(&VmId(vm))) {
            self.violate(Violation::NotRestarted(VmId(0)));
        }
    }

    pub(super) fn check_quorum(&mut self, host: usize, target: HostId, action: FenceAction) {
        let quorate = self.hosts[host].node.as_ref().is_some_and(|n| n.is_quorate());
        if action == FenceAction::Off && !quorate {
            self.violate(Violation::MinorityFenced(HostId(host as u16 + 1), target));
        }
    }

    /// Nothing is known against a life that is younger than the time after which a silent host is suspect.
    pub(super) fn check_age(&mut self, target: Incarnation) {
        let h = &self.hosts[index(target.host)];
        let silence = MembershipConfig::new(target.host, Vec::new()).timeout();
        // The clocks of two hosts differ by less than a tenth.
        if h.powered && h.boot == target.generation && self.now - h.booted_at < silence - silence / 10 {
            self.violate(Violation::FencedYoung(target));
        }
    }

    pub(super) fn check_fenced(&mut self, target: Incarnation, evidence: Evidence) {
        let h = &self.hosts[index(target.host)];
        let same_life = h.powered && h.boot <= target.generation;
        let writes = h.procs.iter().any(|p| p.state == ProcState::Live);
        if same_life && (evidence == Evidence::PowerOff || writes) {
            self.violate(Violation::FencedAlive(target));
        }
    }

    pub(super) fn check_token(&mut self, resource: ResourceId, token: Token) {
        let per_volume = self.volumes[0].areas.len();
        let last = &mut self.tokens[usize::from(resource.lockspace.0) * per_volume + resource.index as usize];
        if token.lver <= *last {
            self.violate(Violation::TokenNotRising(resource, token));
        } else {
            *last = token.lver;
        }
    }
}
