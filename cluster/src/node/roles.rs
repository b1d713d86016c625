//! Membership, coordinator, HA and fencing of a node.

use super::volumes::note_watchdog;
use super::{Fencing, Message, Node, NodeOutput, StoreRequest};
use crate::fence::{Evidence, FenceAction, FenceConfig, FenceInput, FenceOutput, Fencer};
use crate::ha::{ClusterView, HaInput, HaOutput, Report};
use crate::lease::DiskLife;
use crate::membership::{CoordInput, CoordOutput, Membership, MembershipInput, MembershipOutput, Verdict};
use crate::mutants::{self, Mutant};
use crate::types::{Generation, HostId, Incarnation, LockspaceId, Time};

/// The membership as the HA manager sees it.
pub(super) struct View<'a> {
    pub(super) membership: &'a Membership,
}

impl ClusterView for View<'_> {
    fn verdict(&self, host: HostId) -> Verdict {
        self.membership.verdict(host)
    }
    fn is_mutual(&self, host: HostId) -> bool {
        self.membership.is_mutual(host)
    }
    fn boot(&self, host: HostId) -> u64 {
        self.membership.generation(host)
    }
    fn is_quorate(&self) -> bool {
        self.membership.is_quorate()
    }
}

impl Node {
    pub(super) fn on_message(&mut self, now: Time, message: Message, out: &mut Vec<NodeOutput>) {
        match message {
            Message::Heartbeat(beat) => {
                let host = beat.from.host;
                self.membership_input(now, MembershipInput::Heard(beat), out);
                note_watchdog(&self.membership, &mut self.watchdogs, host);
            }
            Message::Report(report) => self.ha_input(now, HaInput::Report(report), out),
            Message::Command { token, to, command } => {
                // What was sent to a former life of this host may come late: its VM is placed anew.
                if token >= self.max_token && to == self.me {
                    self.max_token = token;
                    self.on_command(now, command, out);
                }
            }
            Message::Moved { vm, epoch, from } => self.on_moved(now, vm, epoch, from, out),
            Message::Unused { resource } => self.on_unused(now, resource, out),
            Message::MovedAck { vm, epoch } => self.moved.retain(|m| (m.vm, m.epoch) != (vm, epoch)),
        }
    }

    pub(super) fn membership_input(&mut self, now: Time, input: MembershipInput, out: &mut Vec<NodeOutput>) {
        let mut events = core::mem::take(&mut self.buffers.membership);
        let volumes = &self.volumes;
        self.membership.step(now, input, &|host| Self::disk_life(volumes, host), &mut events);
        for e in events.drain(..) {
            match e {
                MembershipOutput::Send(beat) => out.push(NodeOutput::Broadcast(Message::Heartbeat(beat))),
                MembershipOutput::Changed { host, verdict } => {
                    out.push(NodeOutput::HostChanged(host, verdict));
                    self.ha_wake = now;
                }
                MembershipOutput::Quorum(quorate) => {
                    if quorate {
                        self.stopping_all = false;
                    }
                    let eligible = quorate || mutants::active(Mutant::FenceWithoutQuorum);
                    self.coordinator_input(now, CoordInput::Eligible(eligible && !self.leaving), out);
                }
                MembershipOutput::WantWitness(wanted) => self.want_witness(now, wanted, out),
                MembershipOutput::StopVms => {
                    self.stopping_all = true;
                    self.stop_all(now, out);
                }
                MembershipOutput::StopOverdue => {
                    if self.vms.values().any(super::LocalVm::has_process) {
                        self.run_monitor(now, crate::fence::MonitorInput::Condemned, out);
                    }
                }
                MembershipOutput::WakeAt(at) => self.membership_wake = at,
            }
        }
        self.buffers.membership = events;
    }

    pub(super) fn coordinator_input(&mut self, now: Time, input: CoordInput, out: &mut Vec<NodeOutput>) {
        let mut events = core::mem::take(&mut self.buffers.coordinator);
        self.coordinator.step(now, input, &mut events);
        for e in events.drain(..) {
            match e {
                CoordOutput::WakeAt(at) => self.coordinator_wake = at,
                CoordOutput::Elected { token } => {
                    out.push(NodeOutput::Coordinating(true));
                    self.max_token = self.max_token.max(token);
                    self.ha_input(now, HaInput::Elected { token }, out);
                }
                CoordOutput::SteppedDown => {
                    out.push(NodeOutput::Coordinating(false));
                    self.fencings.clear();
                    self.ha_input(now, HaInput::SteppedDown, out);
                }
                CoordOutput::Following(_) => self.next_report = now,
                request => out.push(NodeOutput::Store(StoreRequest::Election(request))),
            }
        }
        self.buffers.coordinator = events;
    }

    pub(super) fn ha_input(&mut self, now: Time, input: HaInput, out: &mut Vec<NodeOutput>) {
        let mut events = core::mem::take(&mut self.buffers.ha);
        let leads = self.coordinator.token();
        self.ha.step(now, input, &View { membership: &self.membership }, &mut events);
        self.ha_wake = if leads.is_some() { now + 1000 } else { Time(u64::MAX) };
        for e in events.drain(..) {
            match e {
                HaOutput::Load { op } => out.push(NodeOutput::Store(StoreRequest::Load { op })),
                HaOutput::Write { op, token, updates } => {
                    out.push(NodeOutput::Store(StoreRequest::Write { op, token, updates }));
                }
                HaOutput::Fence(target) => self.start_fencing(now, target, out),
                HaOutput::CancelFence(host) => {
                    self.fencings.retain(|f| f.fencer.target().host != host || f.switched_off);
                }
                HaOutput::Send(to, command) => {
                    let token = leads.unwrap_or(0);
                    if to == self.me {
                        self.on_command(now, command, out);
                    } else if to.host != self.me.host {
                        out.push(NodeOutput::Send(to.host, Message::Command { token, to, command }));
                    }
                }
                HaOutput::GaveUp(vm) => out.push(NodeOutput::GaveUp(vm)),
            }
        }
        self.buffers.ha = events;
    }

    fn start_fencing(&mut self, now: Time, target: Incarnation, out: &mut Vec<NodeOutput>) {
        if target.host == self.me.host || self.fencings.iter().any(|f| f.fencer.target() == target) {
            return;
        }
        let config = self.config.fencing.iter().find(|f| f.host == target.host);
        let config = config.map_or_else(FenceConfig::default, |f| f.config.clone());
        self.fencings.retain(|f| f.fencer.target().host != target.host);
        self.fence_serial += 1;
        let serial = self.fence_serial;
        self.fencings.push(Fencing {
            serial,
            fencer: Fencer::new(now, target, config),
            wake: now,
            generations: Vec::new(),
            switched_off: false,
        });
        out.push(NodeOutput::FencingStarted(target));
        self.fence_input(now, serial, FenceInput::Tick, out);
    }

    /// The lease generations of a host that are known now; what is switched off after this covers them.
    fn known_generations(&self, host: HostId) -> Vec<Generation> {
        let reported = self.ha.reported_leases(host);
        (0..self.volumes.len())
            .map(|i| self.volumes[i].observer.generation(host).max(reported.get(i).copied().unwrap_or(0)))
            .collect()
    }

    pub(super) fn fence_input(
        &mut self,
        now: Time,
        serial: u64,
        input: FenceInput,
        out: &mut Vec<NodeOutput>,
    ) {
        let Some(at) = self.fencings.iter().position(|f| f.serial == serial) else { return };
        let mut events = Vec::new();
        let fencing = &mut self.fencings[at];
        fencing.wake = Time(u64::MAX);
        fencing.fencer.step(now, input, &mut events);
        let target = fencing.fencer.target();
        for e in events {
            match e {
                FenceOutput::Run { op, device, action } => {
                    match action {
                        FenceAction::Status => {
                            self.fencings[at].generations = self.known_generations(target.host);
                        }
                        FenceAction::Off => self.fencings[at].switched_off = true,
                        FenceAction::On => {}
                    }
                    out.push(NodeOutput::Fence { serial, target, op, device, action });
                }
                FenceOutput::WakeAt(t) => self.fencings[at].wake = self.fencings[at].wake.min(t),
                FenceOutput::LevelFailed { .. } => {}
                FenceOutput::Exhausted => out.push(NodeOutput::FenceStuck(target)),
                FenceOutput::Fenced(evidence) => {
                    let fencing = self.fencings.remove(at);
                    self.on_fenced(now, fencing, evidence, out);
                    return;
                }
            }
        }
    }

    fn on_fenced(&mut self, now: Time, fencing: Fencing, evidence: Evidence, out: &mut Vec<NodeOutput>) {
        let target = fencing.fencer.target();
        let generations = match evidence {
            Evidence::PowerOff => fencing.generations.clone(),
            Evidence::DeadTime | Evidence::Operator => self.known_generations(target.host),
        };
        for (n, generation) in (0u8..).zip(&generations) {
            self.note_gone(target.host, LockspaceId(n), *generation);
        }
        out.push(NodeOutput::Fenced(target, evidence));
        self.ha_input(now, HaInput::Gone { target, generations }, out);
        if evidence == Evidence::PowerOff && fencing.switched_off {
            let config = self.config.fencing.iter().find(|f| f.host == target.host);
            let first = config.and_then(|f| f.config.levels.first());
            for device in first.cloned().unwrap_or_default() {
                let (serial, action) = (fencing.serial, FenceAction::On);
                out.push(NodeOutput::Fence { serial, target, op: 0, device, action });
            }
        }
    }

    pub(super) fn note_gone(&mut self, host: HostId, lockspace: LockspaceId, generation: Generation) {
        let known = self.gone.entry((lockspace, host)).or_insert(0);
        *known = (*known).max(generation);
    }

    fn check_dead_times(&mut self, now: Time, out: &mut Vec<NodeOutput>) {
        let targets: Vec<(u64, HostId)> =
            self.fencings.iter().map(|f| (f.serial, f.fencer.target().host)).collect();
        for (serial, host) in targets {
            let recorded = self.ha.state().and_then(|s| s.hosts.get(&host)).is_some_and(|h| h.watchdog);
            let watchdog = recorded
                || self.watchdogs.contains(host)
                || mutants::active(Mutant::DeadTimeWithoutWatchdogDevice);
            if watchdog && Self::disk_life(&self.volumes, host) == DiskLife::Dead {
                self.fence_input(now, serial, FenceInput::DeadTimePassed, out);
            }
        }
    }

    pub(super) fn run_roles(&mut self, now: Time, out: &mut Vec<NodeOutput>) {
        if now >= self.membership_wake {
            self.membership_input(now, MembershipInput::Tick, out);
        }
        if now >= self.coordinator_wake {
            self.coordinator_input(now, CoordInput::Tick, out);
        }
        if now >= self.ha_wake {
            self.check_dead_times(now, out);
            self.ha_input(now, HaInput::Tick, out);
        }
        let due: Vec<u64> = self.fencings.iter().filter(|f| now >= f.wake).map(|f| f.serial).collect();
        for serial in due {
            self.fence_input(now, serial, FenceInput::Tick, out);
        }
        if now >= self.next_report {
            self.next_report = now + self.config.ha.repeat;
            let report = Box::new(self.report(now));
            match self.coordinator() {
                Some(host) if host == self.me.host => self.ha_input(now, HaInput::Report(report), out),
                Some(host) => out.push(NodeOutput::Send(host, Message::Report(report))),
                None => {}
            }
        }
    }

    fn report(&mut self, now: Time) -> Report {
        self.report_seq += 1;
        let leases = (0..self.volumes.len())
            .map(|i| self.fresh_generation(now, LockspaceId(i as u8)).unwrap_or(0))
            .collect();
        Report {
            from: self.me,
            seq: self.report_seq,
            capacity: self.config.capacity,
            watchdog: self.config.watchdog,
            leases,
            vms: self.vm_reports(now),
        }
    }

    pub(super) fn leave(&mut self) {
        self.leaving = true;
        self.membership.leave();
        self.coordinator_wake = Time(0);
    }
}
