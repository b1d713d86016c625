//! One host of the cluster as a single sans-IO state machine.
//!
//! [`Node`] composes the leases, locks, membership, coordinator, fencing and HA of one host. The agent
//! daemon and the simulator drive the very same code: they carry out its [`NodeOutput`]s and feed the
//! results back as [`NodeInput`]s.

mod io;
mod roles;
#[cfg(test)]
mod tests;
mod vms;
mod volumes;

pub use io::{Config, FenceTarget, Message, NodeInput, NodeOutput, StoreRequest, VmAction, VmEvent};
pub use vms::LocalVm;

use std::collections::BTreeMap;

use crate::fence::{Fencer, LocalMonitor, MonitorConfig};
use crate::ha::{HaManager, HaOutput, Request, RequestError};
use crate::lease::{LeaseHolder, LeaseObserver, LeaseOutput, LeaseStatus};
use crate::lock::Locker;
use crate::membership::{CoordOutput, Coordinator, CoordinatorConfig, Membership, MembershipOutput, Verdict};
use crate::types::{
    Generation, HostId, HostSet, Incarnation, LockspaceId, ResourceId, Resources, Time, VmId,
};

/// A lockspace as this host sees it.
#[derive(Debug)]
struct Volume {
    lease: LeaseHolder,
    wake: Time,
    observer: LeaseObserver,
    next_scan: Time,
    scan: Option<(u64, Time)>,
}

#[derive(Debug)]
struct Fencing {
    serial: u64,
    fencer: Fencer,
    wake: Time,
    /// The lease generations known when the power state was last asked for.
    generations: Vec<Generation>,
    /// "Off" was sent: there is no way back, and the host is to be switched on again afterwards.
    switched_off: bool,
}

/// One host of the cluster.
#[derive(Debug)]
pub struct Node {
    config: Config,
    me: Incarnation,
    volumes: Vec<Volume>,
    /// Each with when it is due.
    locks: Vec<(ResourceId, Locker, Time)>,
    /// When the first of them is.
    locks_wake: Time,
    gone: BTreeMap<(LockspaceId, HostId), Generation>,
    watchdogs: HostSet,
    membership: Membership,
    membership_wake: Time,
    witness_wanted: bool,
    witness_wake: Time,
    coordinator: Coordinator,
    coordinator_wake: Time,
    ha: HaManager,
    ha_wake: Time,
    fencings: Vec<Fencing>,
    fence_serial: u64,
    monitor: LocalMonitor,
    monitor_wake: Time,
    vms: BTreeMap<VmId, LocalVm>,
    ended: BTreeMap<VmId, vms::Ended>,
    moved: Vec<vms::Moved>,
    next_report: Time,
    report_seq: u64,
    max_token: u64,
    leaving: bool,
    stopping_all: bool,
    op: u64,
    buffers: Buffers,
}

/// What the parts of a node say, kept from step to step so that it is not allocated each time. Empty between steps.
#[derive(Debug, Default)]
struct Buffers {
    membership: Vec<MembershipOutput>,
    coordinator: Vec<CoordOutput>,
    ha: Vec<HaOutput>,
    lease: Vec<LeaseOutput>,
}

impl Node {
    /// A host that boots at `now`; `boot` must be higher than in any former life of the host.
    pub fn new(now: Time, config: Config, boot: u64) -> Self {
        let me = Incarnation { host: config.host, generation: boot };
        let volume = |_: usize| Volume {
            lease: LeaseHolder::new(config.lease()),
            wake: now,
            observer: LeaseObserver::new(config.timing),
            next_scan: now,
            scan: None,
        };
        let watchdog = if config.watchdog { config.timing.watchdog() } else { 0 };
        Node {
            me,
            volumes: (0..usize::from(config.lockspaces)).map(volume).collect(),
            locks: Vec::new(),
            locks_wake: Time(u64::MAX),
            gone: BTreeMap::new(),
            watchdogs: HostSet::default(),
            membership: Membership::new(now, config.membership.clone(), boot, config.watchdog),
            membership_wake: now,
            witness_wanted: false,
            witness_wake: Time(u64::MAX),
            coordinator: Coordinator::new(now, CoordinatorConfig::new(me)),
            coordinator_wake: now,
            ha: HaManager::new(config.ha.clone()),
            ha_wake: now,
            fencings: Vec::new(),
            fence_serial: 0,
            monitor: LocalMonitor::new(MonitorConfig { watchdog }),
            monitor_wake: now,
            vms: BTreeMap::new(),
            ended: BTreeMap::new(),
            moved: Vec::new(),
            next_report: now,
            report_seq: 0,
            max_token: 0,
            leaving: false,
            stopping_all: false,
            op: 0,
            buffers: Buffers::default(),
            config,
        }
    }

    /// The host and its boot number.
    pub fn me(&self) -> Incarnation {
        self.me
    }

    /// The coordinator's token while this host coordinates.
    pub fn token(&self) -> Option<u64> {
        self.coordinator.token()
    }

    /// The host that coordinates, as far as this one knows.
    pub fn coordinator(&self) -> Option<HostId> {
        self.coordinator.holder().map(|h| h.host.host)
    }

    /// The verdict on a host.
    pub fn verdict(&self, host: HostId) -> Verdict {
        self.membership.verdict(host)
    }

    /// Whether this host's partition is quorate.
    pub fn is_quorate(&self) -> bool {
        self.membership.is_quorate()
    }

    /// The manager; it knows the cluster's state on the coordinator.
    pub fn ha(&self) -> &HaManager {
        &self.ha
    }

    /// The VMs on this host.
    pub fn vms(&self) -> impl Iterator<Item = (VmId, &LocalVm)> {
        self.vms.iter().map(|(id, vm)| (*id, vm))
    }

    /// The locks that this host holds.
    pub fn locks(&self) -> impl Iterator<Item = (ResourceId, crate::types::Token)> + '_ {
        self.locks.iter().filter_map(|(id, l, _)| l.held().map(|(_, t)| (*id, t)))
    }

    /// The own delta lease in each lockspace.
    pub fn leases(&self) -> impl Iterator<Item = LeaseStatus> + '_ {
        self.volumes.iter().map(|v| v.lease.status())
    }

    /// The hosts that may take VMs now, on the coordinator.
    pub fn usable_hosts(&self, now: Time) -> Vec<HostId> {
        let view = roles::View { membership: &self.membership };
        self.ha.candidates(now, &view).into_iter().map(|h| h.host).collect()
    }

    /// Carries out a request of an operator; only the coordinator can. Step with [`NodeInput::Tick`] next.
    pub fn request(&mut self, now: Time, request: Request) -> Result<(), RequestError> {
        let view = roles::View { membership: &self.membership };
        let result = self.ha.request(now, request, &view);
        self.ha_wake = now;
        result
    }

    /// Notes what VMs of this host use; the next report carries it.
    pub fn note_usage(&mut self, usage: &[(VmId, Resources)]) {
        for (id, used) in usage {
            if let Some(vm) = self.vms.get_mut(id) {
                vm.usage = Some(*used);
            }
        }
    }

    /// An operator confirms that a host is off; false when it is not being fenced by this host.
    pub fn confirm_off(&mut self, now: Time, host: HostId, out: &mut Vec<NodeOutput>) -> bool {
        let Some(serial) = self.fencings.iter().find(|f| f.fencer.target().host == host).map(|f| f.serial)
        else {
            return false;
        };
        let input = crate::fence::FenceInput::Confirmed;
        self.step(now, NodeInput::Fence { serial, input }, out);
        true
    }

    /// Advances the host by one input. Step again at [`Self::next_wake`] at the latest.
    pub fn step(&mut self, now: Time, input: NodeInput, out: &mut Vec<NodeOutput>) {
        match input {
            NodeInput::Tick => {}
            NodeInput::DeltaRead { lockspace, op, result } => {
                self.lease_input(now, lockspace, crate::lease::LeaseInput::Read { op, result }, out);
            }
            NodeInput::DeltaWrote { lockspace, op, result } => {
                self.lease_input(now, lockspace, crate::lease::LeaseInput::Wrote { op, result }, out);
            }
            NodeInput::SpaceRead { lockspace, op, result } => self.on_space(now, lockspace, op, result),
            NodeInput::Lock { resource, input } => self.lock_input(now, resource, input, out),
            NodeInput::Message(message) => self.on_message(now, message, out),
            NodeInput::Coordinator(input) => self.coordinator_input(now, input, out),
            NodeInput::Ha(input) => self.ha_input(now, input, out),
            NodeInput::Fence { serial, input } => self.fence_input(now, serial, input, out),
            NodeInput::Vm { vm, epoch, event } => self.on_vm_event(now, vm, epoch, event, out),
            NodeInput::Signs(signs) => self.on_signs(now, &signs, out),
            NodeInput::Leave => self.leave(),
        }
        self.run_due(now, out);
    }

    fn run_due(&mut self, now: Time, out: &mut Vec<NodeOutput>) {
        self.run_volumes(now, out);
        self.run_roles(now, out);
        self.run_vms(now, out);
        if now >= self.monitor_wake {
            self.run_monitor(now, crate::fence::MonitorInput::Tick, out);
        }
    }

    /// When the host has something to do by itself: step it with [`NodeInput::Tick`] then.
    pub fn next_wake(&self, now: Time) -> Time {
        let mut wake = self
            .membership_wake
            .min(self.witness_wake)
            .min(self.coordinator_wake)
            .min(self.ha_wake)
            .min(self.monitor_wake)
            .min(self.next_report)
            .min(self.locks_wake)
            .min(self.vms_wake());
        for v in &self.volumes {
            wake = wake.min(v.wake).min(v.next_scan);
        }
        for f in &self.fencings {
            wake = wake.min(f.wake);
        }
        wake.max(now + 1)
    }
}
