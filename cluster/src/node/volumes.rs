//! Leases, locks and the local monitor of a node.

use super::vms::LOCK_RETRY;
use super::{Node, NodeOutput};
use crate::fence::{MonitorInput, MonitorOutput, VolumeUse};
use crate::lease::{DeltaRecord, DiskLife, IoFailed, LeaseInput, LeaseOutput, LeaseStatus, OpId};
use crate::lock::{LockContext, LockInput, LockMode, LockOutput, Locker, OwnerState};
use crate::membership::{Membership, MembershipInput};
use crate::mutants::{self, Mutant};
use crate::types::{Generation, HostId, HostSet, Incarnation, LockspaceId, ResourceId, Time};

/// What a lock of one lockspace may know, at one moment.
struct Context<'a> {
    now: Time,
    me: HostId,
    lockspace: LockspaceId,
    volume: &'a super::Volume,
    gone: &'a std::collections::BTreeMap<(LockspaceId, HostId), Generation>,
    watchdogs: &'a HostSet,
}

impl LockContext for Context<'_> {
    fn owner(&self, owner: Incarnation) -> OwnerState {
        if owner.host == self.me {
            let same = self.fresh_generation() == Some(owner.generation);
            return if same { OwnerState::Alive } else { OwnerState::Gone };
        }
        let observer = &self.volume.observer;
        let fenced = self.gone.get(&(self.lockspace, owner.host)).is_some_and(|g| *g >= owner.generation);
        let restarted = observer.generation(owner.host) > owner.generation;
        let dead_time_counts =
            self.watchdogs.contains(owner.host) || mutants::active(Mutant::DeadTimeWithoutWatchdogDevice);
        let silent = match observer.life(owner.host) {
            DiskLife::Free => true,
            DiskLife::Dead => dead_time_counts,
            _ => false,
        };
        if fenced || restarted || silent { OwnerState::Gone } else { OwnerState::Alive }
    }

    fn fresh_generation(&self) -> Option<Generation> {
        match self.volume.lease.status() {
            LeaseStatus::Held { generation, .. } if self.volume.lease.is_fresh(self.now) => Some(generation),
            _ => None,
        }
    }
}

impl Node {
    /// What all lockspaces together say about a host: any sign of life counts.
    pub(super) fn disk_life(volumes: &[super::Volume], host: HostId) -> DiskLife {
        let mut result = DiskLife::Unknown;
        let (mut dead, mut free, mut other) = (0, 0, 0);
        for v in volumes {
            match v.observer.life(host) {
                DiskLife::Live => return DiskLife::Live,
                DiskLife::Dead => dead += 1,
                DiskLife::Free => free += 1,
                life => {
                    other += 1;
                    result = life;
                }
            }
        }
        match (dead, free, other) {
            (1.., _, 0) => DiskLife::Dead,
            (0, 1.., 0) => DiskLife::Free,
            _ => result,
        }
    }

    pub(super) fn fresh_generation(&self, now: Time, lockspace: LockspaceId) -> Option<Generation> {
        let v = self.volumes.get(usize::from(lockspace.0))?;
        match v.lease.status() {
            LeaseStatus::Held { generation, .. } if v.lease.is_fresh(now) => Some(generation),
            _ => None,
        }
    }

    pub(super) fn lease_input(
        &mut self,
        now: Time,
        lockspace: LockspaceId,
        input: LeaseInput,
        out: &mut Vec<NodeOutput>,
    ) {
        let Some(v) = self.volumes.get_mut(usize::from(lockspace.0)) else { return };
        let mut events = core::mem::take(&mut self.buffers.lease);
        v.wake = Time(u64::MAX);
        v.lease.step(now, input, &mut events);
        for e in events.drain(..) {
            match e {
                LeaseOutput::Read { op } => out.push(NodeOutput::ReadDelta { lockspace, op }),
                LeaseOutput::Write { op, record } => {
                    out.push(NodeOutput::WriteDelta { lockspace, op, record });
                }
                LeaseOutput::WakeAt(at) => {
                    let v = &mut self.volumes[usize::from(lockspace.0)];
                    v.wake = v.wake.min(at);
                }
                LeaseOutput::Acquired { .. } => {
                    self.monitor_wake = now;
                    self.next_report = now;
                }
                LeaseOutput::Lost(_) => {
                    out.push(NodeOutput::LeaseLost(lockspace));
                    self.on_lease_lost(now, lockspace, out);
                }
                LeaseOutput::Renewed | LeaseOutput::Warning => {}
                LeaseOutput::Released => self.next_report = now,
            }
        }
        self.buffers.lease = events;
        let v = &mut self.volumes[usize::from(lockspace.0)];
        if v.lease.is_idle() && !self.leaving {
            v.wake = now + self.config.timing.io();
        }
    }

    fn on_lease_lost(&mut self, now: Time, lockspace: LockspaceId, out: &mut Vec<NodeOutput>) {
        for i in 0..self.locks.len() {
            if self.locks[i].0.lockspace == lockspace {
                let resource = self.locks[i].0;
                self.lock_input(now, resource, LockInput::Abandon, out);
                if Some(resource) == self.config.witness {
                    self.membership_input(now, MembershipInput::Witness(false), out);
                    self.witness_wake = now + LOCK_RETRY;
                }
            }
        }
        self.run_monitor(now, MonitorInput::Tick, out);
    }

    pub(super) fn on_space(
        &mut self,
        now: Time,
        lockspace: LockspaceId,
        op: OpId,
        result: Result<Vec<DeltaRecord>, IoFailed>,
    ) {
        let Some(v) = self.volumes.get_mut(usize::from(lockspace.0)) else { return };
        let Some((_, started)) = v.scan.filter(|s| s.0 == op) else { return };
        v.scan = None;
        if let Ok(records) = result {
            for (n, record) in (1u16..).zip(records) {
                v.observer.observe(started, now, HostId(n), record);
            }
        }
    }

    pub(super) fn run_volumes(&mut self, now: Time, out: &mut Vec<NodeOutput>) {
        for i in 0..self.volumes.len() {
            let lockspace = LockspaceId(i as u8);
            if now >= self.volumes[i].wake {
                // A lost lease is taken again once nothing of its former generation is left.
                let lost = self.volumes[i].lease.is_idle() && !self.leaving;
                let idle = lost && self.users(lockspace) == 0;
                let input = if idle { LeaseInput::Acquire } else { LeaseInput::Tick };
                self.lease_input(now, lockspace, input, out);
            }
            let v = &mut self.volumes[i];
            if now >= v.next_scan {
                self.op += 1;
                v.next_scan = now + self.config.timing.io();
                v.scan = Some((self.op, now));
                out.push(NodeOutput::ReadSpace { lockspace, op: self.op });
            }
        }
        if now >= self.witness_wake {
            self.seek_witness(now, out);
        }
        if now >= self.locks_wake {
            for i in 0..self.locks.len() {
                if now >= self.locks[i].2 {
                    let resource = self.locks[i].0;
                    self.lock_input(now, resource, LockInput::Tick, out);
                }
            }
        }
    }

    /// Steps one lock and hands its announcements to its user.
    pub(super) fn lock_input(
        &mut self,
        now: Time,
        resource: ResourceId,
        input: LockInput,
        out: &mut Vec<NodeOutput>,
    ) {
        let Some(volume) = self.volumes.get(usize::from(resource.lockspace.0)) else { return };
        let at = match self.locks.iter().position(|l| l.0 == resource) {
            Some(at) => at,
            None if matches!(input, LockInput::Acquire(_)) => {
                let locker = Locker::new(self.config.host, self.config.timing);
                self.locks.push((resource, locker, Time(u64::MAX)));
                self.locks.len() - 1
            }
            None => return,
        };
        let context = Context {
            now,
            me: self.config.host,
            lockspace: resource.lockspace,
            volume,
            gone: &self.gone,
            watchdogs: &self.watchdogs,
        };
        let mut events = Vec::new();
        let (_, locker, wake) = &mut self.locks[at];
        *wake = Time(u64::MAX);
        locker.step(now, input, &context, &mut events);
        for e in events {
            match e {
                LockOutput::ReadLeader { op } => out.push(NodeOutput::ReadLeader { resource, op }),
                LockOutput::ReadBlocks { op } => out.push(NodeOutput::ReadBlocks { resource, op }),
                LockOutput::WriteBlock { op, block } => {
                    out.push(NodeOutput::WriteBlock { resource, op, block });
                }
                LockOutput::WriteLeader { op, leader } => {
                    out.push(NodeOutput::WriteLeader { resource, op, leader });
                }
                LockOutput::WakeAt(at_time) => self.locks[at].2 = self.locks[at].2.min(at_time),
                event => {
                    if let LockOutput::Acquired(token) = event {
                        out.push(NodeOutput::Locked(resource, token));
                    }
                    if Some(resource) == self.config.witness {
                        let held = matches!(event, LockOutput::Acquired(_));
                        self.membership_input(now, MembershipInput::Witness(held), out);
                        self.witness_wake = now + LOCK_RETRY;
                    } else {
                        self.on_lock_event(now, resource, event, out);
                    }
                }
            }
        }
        self.locks_wake = self.locks.iter().map(|l| l.2).min().unwrap_or(Time(u64::MAX));
    }

    pub(super) fn want_witness(&mut self, now: Time, wanted: bool, out: &mut Vec<NodeOutput>) {
        self.witness_wanted = wanted;
        self.seek_witness(now, out);
    }

    /// Takes the tie-break witness, or lets go of it, as wanted; again and again until it is so: the own lease
    /// may not be fresh yet, the former holder not gone, or the lock busy.
    pub(super) fn seek_witness(&mut self, now: Time, out: &mut Vec<NodeOutput>) {
        self.witness_wake = Time(u64::MAX);
        let Some(witness) = self.config.witness else { return };
        let locker = self.locks.iter().find(|l| l.0 == witness).map(|l| &l.1);
        let idle = locker.is_none_or(Locker::is_idle);
        let held = locker.is_some_and(|l| l.held().is_some());
        let settled = if self.witness_wanted { held } else { idle };
        if settled {
            return;
        }
        self.witness_wake = now + LOCK_RETRY;
        if !self.witness_wanted {
            self.lock_input(now, witness, LockInput::Release, out);
        } else if idle {
            self.lock_input(now, witness, LockInput::Acquire(LockMode::Exclusive), out);
        }
    }

    pub(super) fn run_monitor(&mut self, now: Time, input: MonitorInput, out: &mut Vec<NodeOutput>) {
        let margin = self.config.timing.margin();
        let uses: Vec<VolumeUse> = (0..self.volumes.len())
            .map(|i| {
                let lockspace = LockspaceId(i as u8);
                let trusted_until = match self.volumes[i].lease.status() {
                    LeaseStatus::Held { expires, .. } => Some(expires - margin),
                    LeaseStatus::None => None,
                };
                VolumeUse { lockspace, trusted_until, users: self.users(lockspace) }
            })
            .collect();
        let mut events = Vec::new();
        self.monitor_wake = now + self.monitor.interval();
        self.monitor.step(now, input, &uses, &mut events);
        for e in events {
            match e {
                MonitorOutput::Feed => out.push(NodeOutput::FeedWatchdog),
                MonitorOutput::Disarm => out.push(NodeOutput::DisarmWatchdog),
                MonitorOutput::Kill(lockspace) => self.kill_users(lockspace, out),
                MonitorOutput::Reset => out.push(NodeOutput::Reset),
                MonitorOutput::WakeAt(at) => self.monitor_wake = self.monitor_wake.min(at),
            }
        }
    }
}

/// What the HA manager and the locks look up in the membership.
pub(super) fn note_watchdog(membership: &Membership, watchdogs: &mut HostSet, host: HostId) {
    if membership.has_watchdog(host) {
        watchdogs.insert(host);
    }
}
