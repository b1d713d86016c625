//! The invariants.

use core::fmt;

use super::state::{ProcState, SimHost};
use crate::ha::{ClusterState, VmPhase};
use crate::types::{HostId, Incarnation, ResourceId, Token, VmId};

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
    /// A healthy host of the majority was reset.
    HealthyReset(HostId),
    /// A VM was admitted into the reserve.
    ReserveEaten(HostId),
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
            Violation::HealthyReset(h) => write!(f, "{h} was reset although it was healthy"),
            Violation::ReserveEaten(h) => write!(f, "the VMs of {h} no longer fit on the other hosts"),
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
