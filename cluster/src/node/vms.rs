//! The VMs of a node: locks before the disks open, locks back after they are closed.

use std::sync::Arc;

use super::{Message, Node, NodeOutput, VmAction, VmEvent};
use crate::ha::{Ailment, Command, Health, Signs, VmReport, VmSpec, VmStatus};
use crate::lock::{DenyReason, LockInput, LockMode, LockOutput};
use crate::mutants::{self, Mutant};
use crate::types::{HostId, Incarnation, LockspaceId, Millis, ResourceId, Resources, Time, VmId};

/// How soon a lock that another host holds is tried again.
pub(super) const LOCK_RETRY: Millis = 3000;
/// How long a migration target waits for its source.
const INCOMING_PATIENCE: Millis = 120_000;
/// How long a source repeats that the locks are handed over.
const MOVED_REPEAT: Millis = 30_000;
/// How long the end of a placement is reported. A move that ended may be tried again after that, when nothing
/// of the first try is on its way any more.
const ENDED_REPORT: Millis = 2 * MOVED_REPEAT;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Taking the locks, one by one; `next` is under way unless it waits until `retry`.
    Locking {
        next: usize,
        retry: Option<Time>,
        until: Time,
    },
    /// A process was asked for.
    Starting,
    Running,
    /// A migration source that still runs.
    MovingOut {
        to: Incarnation,
    },
    /// Paused; handing over the locks one by one.
    HandingOver {
        next: usize,
        to: Incarnation,
    },
    /// A migration target that waits for its memory and its locks.
    Incoming {
        until: Time,
    },
    /// Asked to stop; killed at `until`.
    Stopping {
        until: Time,
    },
    /// Told to die.
    Killing,
    /// The process is gone; giving back the locks one by one.
    Releasing {
        next: usize,
        end: VmStatus,
    },
}

/// How the last placement of a VM on this host ended. Commands are repeated until a report shows their effect,
/// and the coordinator may be deaf: the same placement must not be started twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    epoch: u64,
    end: VmStatus,
    reported_until: Time,
}

/// A source keeps telling its target that the locks are handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moved {
    pub(super) vm: VmId,
    pub(super) epoch: u64,
    to: HostId,
    next: Time,
    until: Time,
}

/// A VM on this host.
#[derive(Clone, Debug)]
pub struct LocalVm {
    spec: Arc<VmSpec>,
    epoch: u64,
    stage: Stage,
    /// A process exists, or was asked for.
    process: bool,
    /// The process is a migration target.
    incoming: bool,
    health: Health,
    /// It was killed since its disks completed nothing.
    stalled: bool,
    /// What it uses, for the balancer.
    pub(super) usage: Option<Resources>,
}

impl LocalVm {
    /// The VM's description.
    pub fn spec(&self) -> &Arc<VmSpec> {
        &self.spec
    }

    /// The placement.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether a process of the VM exists.
    pub fn has_process(&self) -> bool {
        self.process
    }

    /// What the VM does, for reports.
    pub fn status(&self) -> VmStatus {
        match self.stage {
            Stage::Locking { .. } if self.incoming => VmStatus::Incoming,
            Stage::Incoming { .. } => VmStatus::Incoming,
            Stage::Locking { .. } | Stage::Starting => VmStatus::Starting,
            Stage::Running | Stage::MovingOut { .. } | Stage::HandingOver { .. } => VmStatus::Running,
            Stage::Stopping { .. } | Stage::Killing | Stage::Releasing { .. } => VmStatus::Stopping,
        }
    }

    /// Whether signs of life are expected of it. A guest on the move may be paused.
    pub(crate) fn is_watched(&self) -> bool {
        self.stage == Stage::Running
    }

    fn uses(&self, lockspace: LockspaceId) -> bool {
        self.spec.disks.iter().any(|d| d.lockspace == lockspace)
    }
}

impl Node {
    pub(super) fn users(&self, lockspace: LockspaceId) -> u32 {
        self.vms.values().filter(|v| v.process && v.uses(lockspace)).count() as u32
    }

    pub(super) fn vm_reports(&self, now: Time) -> Vec<VmReport> {
        let present = self.vms.iter().map(|(id, v)| VmReport {
            vm: *id,
            epoch: v.epoch,
            status: v.status(),
            usage: v.usage,
        });
        let ended = |(id, e): (&VmId, &Ended)| {
            let report = VmReport { vm: *id, epoch: e.epoch, status: e.end, usage: None };
            (now < e.reported_until && !self.vms.contains_key(id)).then_some(report)
        };
        present.chain(self.ended.iter().filter_map(ended)).collect()
    }

    pub(super) fn vms_wake(&self) -> Time {
        let mut wake = Time(u64::MAX);
        for v in self.vms.values() {
            let at = match v.stage {
                Stage::Locking { retry: Some(at), until, .. } => at.min(until),
                Stage::Locking { until, .. } | Stage::Incoming { until } | Stage::Stopping { until } => until,
                _ => continue,
            };
            wake = wake.min(at);
        }
        for m in &self.moved {
            wake = wake.min(m.next);
        }
        wake
    }

    pub(super) fn on_command(&mut self, now: Time, command: Command, out: &mut Vec<NodeOutput>) {
        match command {
            Command::Start { spec, epoch, gone } => {
                for (host, lockspace, generation) in gone {
                    self.note_gone(host, lockspace, generation);
                }
                let id = spec.id;
                if let Some(ended) = self.ended.get_mut(&id).filter(|e| e.epoch == epoch) {
                    ended.reported_until = now + ENDED_REPORT;
                }
                if self.may_take(id) && !self.has_ended(id, epoch) {
                    let stage =
                        Stage::Locking { next: 0, retry: None, until: now + self.config.ha.patience / 2 };
                    self.insert(spec, epoch, stage, false);
                    self.next_lock(now, id, out);
                }
            }
            Command::Stop { vm, epoch } => {
                if self.vms.get(&vm).is_some_and(|v| v.epoch <= epoch) {
                    self.stop_vm(now, vm, out);
                }
            }
            Command::Migrate { vm, epoch, to } => {
                let Some(v) = self.vms.get_mut(&vm) else { return };
                if v.epoch == epoch && v.stage == Stage::Running {
                    v.stage = Stage::MovingOut { to };
                    out.push(NodeOutput::Vm { vm, epoch, action: VmAction::MoveTo(to.host) });
                }
            }
            Command::Receive { spec, epoch, from } => {
                let id = spec.id;
                let tried = self.ended.get(&id).is_some_and(|e| e.epoch == epoch && now < e.reported_until);
                if self.may_take(id) && !self.has_ended(id, epoch) && !tried {
                    self.insert(
                        spec.clone(),
                        epoch,
                        Stage::Incoming { until: now + INCOMING_PATIENCE },
                        true,
                    );
                    let action = VmAction::Receive { spec, from: from.host };
                    out.push(NodeOutput::Vm { vm: id, epoch, action });
                    if mutants::active(Mutant::TargetRunsBeforeHandOver) {
                        out.push(NodeOutput::Vm { vm: id, epoch, action: VmAction::Resume });
                    }
                }
            }
        }
    }

    fn may_take(&self, vm: VmId) -> bool {
        !self.leaving && !self.stopping_all && !self.vms.contains_key(&vm)
    }

    /// Whether this placement, or a later one, was here already. A move that failed was none yet.
    fn has_ended(&self, vm: VmId, epoch: u64) -> bool {
        self.ended
            .get(&vm)
            .is_some_and(|e| epoch < e.epoch || epoch == e.epoch && e.end != VmStatus::NotReceived)
    }

    fn insert(&mut self, spec: Arc<VmSpec>, epoch: u64, stage: Stage, incoming: bool) {
        let id = spec.id;
        self.ended.remove(&id);
        let health = Health::default();
        let vm =
            LocalVm { spec, epoch, stage, process: incoming, incoming, health, stalled: false, usage: None };
        self.vms.insert(id, vm);
        self.next_report = Time(0);
    }

    /// Goes on with the next lock, or starts the VM when it has all of them.
    fn next_lock(&mut self, now: Time, id: VmId, out: &mut Vec<NodeOutput>) {
        let Some(v) = self.vms.get_mut(&id) else { return };
        let Stage::Locking { next, until, .. } = v.stage else { return };
        if let Some(resource) = v.spec.disks.get(next).copied() {
            v.stage = Stage::Locking { next, retry: None, until };
            self.lock_input(now, resource, LockInput::Acquire(LockMode::Exclusive), out);
            return;
        }
        let epoch = v.epoch;
        v.stage = Stage::Starting;
        v.process = true;
        let action = if v.incoming { VmAction::Resume } else { VmAction::Start(v.spec.clone()) };
        self.monitor_wake = now;
        out.push(NodeOutput::Vm { vm: id, epoch, action });
    }

    pub(super) fn on_lock_event(
        &mut self,
        now: Time,
        resource: ResourceId,
        event: LockOutput,
        out: &mut Vec<NodeOutput>,
    ) {
        let user = self.vms.iter().find(|(_, v)| v.spec.disks.contains(&resource)).map(|(id, _)| *id);
        let Some(id) = user else {
            if matches!(event, LockOutput::Acquired(_)) {
                self.lock_input(now, resource, LockInput::Release, out);
            }
            return;
        };
        let Some(v) = self.vms.get_mut(&id) else { return };
        let this = |n: usize| v.spec.disks.get(n) == Some(&resource);
        match (v.stage, event) {
            (Stage::Locking { next, until, .. }, LockOutput::Acquired(_)) if this(next) => {
                v.stage = Stage::Locking { next: next + 1, retry: None, until };
                self.next_lock(now, id, out);
            }
            (Stage::Locking { next, until, .. }, LockOutput::Denied(reason)) if this(next) => {
                v.stage = Stage::Locking { next, retry: Some(now + LOCK_RETRY), until };
                if let DenyReason::Held(owner) = reason {
                    out.push(NodeOutput::Send(owner.host, Message::Unused { resource }));
                }
            }
            (Stage::HandingOver { next, to }, LockOutput::HandedOver(_)) if this(next) => {
                v.stage = Stage::HandingOver { next: next + 1, to };
                self.hand_over_next(now, id, out);
            }
            (Stage::HandingOver { next, .. }, LockOutput::HandOverFailed { still_ours }) if this(next) => {
                let epoch = v.epoch;
                let action = if still_ours && next == 0 {
                    v.stage = Stage::Running;
                    VmAction::Resume
                } else {
                    // Some locks may be the target's already: this copy must never write again.
                    v.stage = Stage::Killing;
                    VmAction::Kill
                };
                out.push(NodeOutput::Vm { vm: id, epoch, action });
            }
            (Stage::Releasing { next, .. }, LockOutput::Released | LockOutput::Denied(_)) if this(next) => {
                self.release_next(now, id, next + 1, out);
            }
            _ => {}
        }
    }

    /// Another host waits for a lock that names this one. If nothing here uses it (a hand-over or a
    /// release was cut short), it is taken, which is safe at any time, and given back.
    pub(super) fn on_unused(&mut self, now: Time, resource: ResourceId, out: &mut Vec<NodeOutput>) {
        let used = self.vms.values().any(|v| v.spec.disks.contains(&resource));
        let busy = self.locks.iter().any(|l| l.0 == resource && !l.1.is_idle());
        if !used && !busy && Some(resource) != self.config.witness {
            self.lock_input(now, resource, LockInput::Acquire(LockMode::Exclusive), out);
        }
    }

    fn hand_over_next(&mut self, now: Time, id: VmId, out: &mut Vec<NodeOutput>) {
        let Some(v) = self.vms.get_mut(&id) else { return };
        let Stage::HandingOver { next, to } = v.stage else { return };
        let epoch = v.epoch;
        let Some(resource) = v.spec.disks.get(next).copied() else {
            // All locks are the target's. The paused copy here is of no use any more.
            v.stage = Stage::Killing;
            out.push(NodeOutput::Vm { vm: id, epoch, action: VmAction::Kill });
            let until = now + MOVED_REPEAT;
            self.moved.push(Moved { vm: id, epoch: epoch.saturating_add(1), to: to.host, next: now, until });
            return;
        };
        // The lock names the target's lease, not its boot: its sector tells the generation.
        let volume = self.volumes.get(usize::from(resource.lockspace.0));
        let generation = volume.map_or(0, |v| v.observer.generation(to.host));
        let owner = Incarnation { host: to.host, generation };
        self.lock_input(now, resource, LockInput::HandOver(owner), out);
    }

    pub(super) fn on_moved(
        &mut self,
        now: Time,
        vm: VmId,
        epoch: u64,
        from: HostId,
        out: &mut Vec<NodeOutput>,
    ) {
        out.push(NodeOutput::Send(from, Message::MovedAck { vm, epoch }));
        let Some(v) = self.vms.get_mut(&vm) else { return };
        if v.epoch == epoch && matches!(v.stage, Stage::Incoming { .. }) {
            v.stage = Stage::Locking { next: 0, retry: None, until: now + INCOMING_PATIENCE };
            self.next_lock(now, vm, out);
        }
    }

    pub(super) fn on_vm_event(
        &mut self,
        now: Time,
        vm: VmId,
        epoch: u64,
        event: VmEvent,
        out: &mut Vec<NodeOutput>,
    ) {
        let Some(v) = self.vms.get_mut(&vm).filter(|v| v.epoch == epoch) else { return };
        match (event, v.stage) {
            (VmEvent::Started, Stage::Starting) => {
                v.stage = Stage::Running;
                v.incoming = false;
            }
            (VmEvent::Quiesced, Stage::MovingOut { to }) => {
                v.stage = Stage::HandingOver { next: 0, to };
                self.hand_over_next(now, vm, out);
            }
            (VmEvent::MoveFailed, Stage::MovingOut { .. }) => v.stage = Stage::Running,
            (VmEvent::Exited, _) => {
                v.process = false;
                let end = match (v.incoming, v.stalled) {
                    (true, _) => VmStatus::NotReceived,
                    (false, true) => VmStatus::Stalled,
                    (false, false) => VmStatus::Failed,
                };
                v.stage = Stage::Releasing { next: 0, end };
                self.release_next(now, vm, 0, out);
                self.monitor_wake = now;
            }
            _ => {}
        }
        self.next_report = now;
    }

    /// Kills the VMs whose guests do nothing any more; the coordinator restarts them as after any failure.
    pub(super) fn on_signs(&mut self, now: Time, signs: &[(VmId, u64, Signs)], out: &mut Vec<NodeOutput>) {
        for &(vm, epoch, signs) in signs {
            let Some(v) = self.vms.get_mut(&vm).filter(|v| v.epoch == epoch) else { continue };
            if !v.is_watched() {
                v.health = Health::default();
            } else if let Some(ailment) = v.health.observe(now, signs, &self.config.ha.health) {
                v.stage = Stage::Killing;
                v.stalled = ailment == Ailment::IoStalled;
                out.push(NodeOutput::Ailing { vm, epoch, ailment });
                out.push(NodeOutput::Vm { vm, epoch, action: VmAction::Kill });
            }
        }
    }

    /// Gives back the locks from `next` on; locks of a lost lease are already forgotten.
    fn release_next(&mut self, now: Time, id: VmId, next: usize, out: &mut Vec<NodeOutput>) {
        let Some(v) = self.vms.get_mut(&id) else { return };
        let Stage::Releasing { end, .. } = v.stage else { return };
        for n in next..v.spec.disks.len() {
            let resource = v.spec.disks[n];
            if self.locks.iter().any(|l| l.0 == resource && !l.1.is_idle()) {
                v.stage = Stage::Releasing { next: n, end };
                self.lock_input(now, resource, LockInput::Release, out);
                return;
            }
        }
        self.ended.insert(id, Ended { epoch: v.epoch, end, reported_until: now + ENDED_REPORT });
        self.vms.remove(&id);
        self.next_report = now;
    }

    fn stop_vm(&mut self, now: Time, id: VmId, out: &mut Vec<NodeOutput>) {
        let Some(v) = self.vms.get_mut(&id) else { return };
        let epoch = v.epoch;
        match v.stage {
            Stage::Running | Stage::Starting | Stage::MovingOut { .. } => {
                v.stage = Stage::Stopping { until: now + self.config.stop_grace };
                out.push(NodeOutput::Vm { vm: id, epoch, action: VmAction::Stop });
            }
            Stage::Incoming { .. } => {
                v.stage = Stage::Killing;
                out.push(NodeOutput::Vm { vm: id, epoch, action: VmAction::Kill });
            }
            Stage::Locking { .. } if v.process => {
                v.stage = Stage::Killing;
                out.push(NodeOutput::Vm { vm: id, epoch, action: VmAction::Kill });
            }
            Stage::Locking { .. } => {
                v.stage = Stage::Releasing { next: 0, end: VmStatus::Refused };
                self.release_next(now, id, 0, out);
            }
            Stage::HandingOver { .. } | Stage::Stopping { .. } | Stage::Killing | Stage::Releasing { .. } => {
            }
        }
    }

    pub(super) fn stop_all(&mut self, now: Time, out: &mut Vec<NodeOutput>) {
        let ids: Vec<VmId> = self.vms.keys().copied().collect();
        for id in ids {
            self.stop_vm(now, id, out);
        }
    }

    /// Kills every VM on a volume whose lease is lost.
    pub(super) fn kill_users(&mut self, lockspace: LockspaceId, out: &mut Vec<NodeOutput>) {
        for (id, v) in &mut self.vms {
            if v.process && v.uses(lockspace) {
                v.stage = Stage::Killing;
                out.push(NodeOutput::Vm { vm: *id, epoch: v.epoch, action: VmAction::Kill });
            }
        }
    }

    pub(super) fn run_vms(&mut self, now: Time, out: &mut Vec<NodeOutput>) {
        if now >= self.vms_wake() {
            let ids: Vec<VmId> = self.vms.keys().copied().collect();
            for id in ids {
                self.run_vm(now, id, out);
            }
            for m in &mut self.moved {
                if now >= m.next {
                    m.next = now + 1000;
                    let (vm, epoch, from) = (m.vm, m.epoch, self.config.host);
                    out.push(NodeOutput::Send(m.to, Message::Moved { vm, epoch, from }));
                }
            }
            self.moved.retain(|m| now < m.until);
        }
        if self.leaving {
            self.run_leave(now, out);
        }
    }

    fn run_vm(&mut self, now: Time, id: VmId, out: &mut Vec<NodeOutput>) {
        let Some(v) = self.vms.get_mut(&id) else { return };
        let epoch = v.epoch;
        match v.stage {
            Stage::Locking { until, .. } if now >= until => self.stop_vm(now, id, out),
            Stage::Locking { retry: Some(at), .. } if now >= at => self.next_lock(now, id, out),
            Stage::Incoming { until } if now >= until => {
                v.stage = Stage::Killing;
                out.push(NodeOutput::Vm { vm: id, epoch, action: VmAction::Kill });
            }
            Stage::Stopping { until } if now >= until => {
                v.stage = Stage::Killing;
                out.push(NodeOutput::Vm { vm: id, epoch, action: VmAction::Kill });
            }
            _ => {}
        }
    }

    /// Leaves step by step: VMs first, then locks (with them), leases and the watchdog last.
    fn run_leave(&mut self, now: Time, out: &mut Vec<NodeOutput>) {
        if !self.vms.is_empty() {
            return self.stop_all(now, out);
        }
        let idle = |v: &super::Volume| v.lease.is_idle();
        if self.volumes.iter().all(idle) {
            self.run_monitor(now, crate::fence::MonitorInput::Disarm, out);
            out.push(NodeOutput::Left);
            return;
        }
        for i in 0..self.volumes.len() {
            if self.volumes[i].lease.is_wanted() {
                self.lease_input(now, LockspaceId(i as u8), crate::lease::LeaseInput::Release, out);
            }
        }
    }
}
