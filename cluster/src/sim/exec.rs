//! Carrying out what nodes ask for.

use super::check::{self, Violation};
use super::guests::Guest;
use super::schedule::Rng;
use super::state::{Bmc, Proc, ProcState};
use super::world::{Event, World};
use crate::fence::{AgentReply, FenceAction, FenceInput};
use crate::ha::{HaInput, Update, WriteResult};
use crate::lease::{DeltaRecord, IoFailed};
use crate::lock::{Leader, LockInput};
use crate::membership::{CoordInput, CoordOutput, KeyHolder, StoreUnavailable};
use crate::mutants::{self, Mutant};
use crate::node::{Message, NodeInput, NodeOutput, StoreRequest, VmAction, VmEvent};
use crate::ondisk::HostBlock;
use crate::types::{HostId, Incarnation, LockspaceId, ResourceId, Time, VmId};

/// What is written is boxed, so that events are small: they move several times.
#[derive(Clone, Debug)]
pub(super) enum DiskKind {
    ReadDelta,
    WriteDelta(Box<DeltaRecord>),
    ReadSpace,
    ReadLeader(u32),
    ReadBlocks(u32),
    WriteBlock(u32, Box<HostBlock>),
    WriteLeader(u32, Box<Leader>),
}

impl DiskKind {
    fn is_write(&self) -> bool {
        matches!(self, DiskKind::WriteDelta(_) | DiskKind::WriteBlock(..) | DiskKind::WriteLeader(..))
    }
}

/// An I/O on its way to the volume.
#[derive(Clone, Debug)]
pub(super) struct DiskOp {
    host: usize,
    boot: u64,
    volume: LockspaceId,
    op: u64,
    kind: DiskKind,
    submitted: Time,
    /// How long after the execution the host sees it; `None`: never.
    seen: Option<u64>,
    fails: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum ProcEvent {
    Up,
    Exit,
    Crash,
    Quiesce(HostId),
}

pub(super) fn index(host: HostId) -> usize {
    usize::from(host.0) - 1
}

impl World {
    pub(super) fn carry_out(&mut self, host: usize, output: NodeOutput) {
        match output {
            NodeOutput::ReadDelta { lockspace, op } => self.submit(host, lockspace, op, DiskKind::ReadDelta),
            NodeOutput::WriteDelta { lockspace, op, record } => {
                self.submit(host, lockspace, op, DiskKind::WriteDelta(Box::new(record)));
            }
            NodeOutput::ReadSpace { lockspace, op } => self.submit(host, lockspace, op, DiskKind::ReadSpace),
            NodeOutput::ReadLeader { resource: r, op } => {
                self.submit(host, r.lockspace, op, DiskKind::ReadLeader(r.index));
            }
            NodeOutput::ReadBlocks { resource: r, op } => {
                self.submit(host, r.lockspace, op, DiskKind::ReadBlocks(r.index));
            }
            NodeOutput::WriteBlock { resource: r, op, block } => {
                self.submit(host, r.lockspace, op, DiskKind::WriteBlock(r.index, Box::new(block)));
            }
            NodeOutput::WriteLeader { resource: r, op, leader } => {
                self.submit(host, r.lockspace, op, DiskKind::WriteLeader(r.index, Box::new(leader)));
            }
            NodeOutput::Broadcast(message) => {
                for to in 0..self.hosts.len() {
                    if to != host {
                        self.transmit(host, to, message.clone());
                    }
                }
            }
            NodeOutput::Send(to, message) => {
                if index(to) < self.hosts.len() {
                    self.transmit(host, index(to), message);
                }
            }
            NodeOutput::Store(request) => {
                let at = self.now + self.rng.range(1, 6);
                let boot = self.hosts[host].boot;
                self.push(at, Event::Store { host, boot, request });
            }
            NodeOutput::Fence { serial, target, op, action, .. } => {
                self.check_quorum(host, target.host, action);
                let slow = self.hosts[index(target.host)].bmc == Bmc::Slow;
                let delay = if slow { self.rng.range(2000, 30_000) } else { self.rng.range(200, 1500) };
                let boot = self.hosts[host].boot;
                let (from, target) = (host, index(target.host));
                self.push(self.now + delay, Event::Fence { from, boot, serial, op, target, action });
            }
            NodeOutput::FeedWatchdog => self.feed(host),
            NodeOutput::DisarmWatchdog => self.hosts[host].watchdog_at = None,
            NodeOutput::Reset => self.reset(host),
            NodeOutput::Vm { vm, epoch, action } => self.vm_action(host, vm, epoch, action),
            NodeOutput::FencingStarted(target) => self.check_age(target),
            NodeOutput::Fenced(target, evidence) => self.check_fenced(target, evidence),
            NodeOutput::Locked(resource, token) => self.check_token(resource, token),
            NodeOutput::Ailing { vm, epoch, ailment } => self.check_ailing(host, vm, epoch, ailment),
            NodeOutput::LeaseLost(volume) => self.hosts[host].lease_over(usize::from(volume.0)),
            NodeOutput::HostChanged(..)
            | NodeOutput::Coordinating(_)
            | NodeOutput::FenceStuck(_)
            | NodeOutput::GaveUp(_)
            | NodeOutput::Left => {}
        }
    }

    fn submit(&mut self, host: usize, volume: LockspaceId, op: u64, kind: DiskKind) {
        let faults = self.volumes[usize::from(volume.0)].faults[host];
        let write = kind.is_write();
        let mut delay = self.rng.range(1, 8);
        let mut seen = Some(0);
        let mut fails = false;
        if faults.fails > 0 {
            fails = true;
            // Some I/O fails at once, some hangs for ever.
            seen = if self.rng.chance(70) { Some(0) } else { None };
        }
        if faults.slow {
            delay = self.rng.range(300, 6500);
        }
        if write && faults.completion_lost && self.rng.chance(50) {
            seen = None;
        }
        if write && faults.completion_late {
            seen = seen.map(|_| 1000).map(|low| low + self.rng.range(0, 3900));
        }
        if write && faults.writes_late {
            delay = self.rng.range(300, 9900);
            seen = if self.rng.chance(50) { seen } else { None };
        }
        let h = &self.hosts[host];
        let (boot, submitted) = (h.boot, h.local(self.now));
        self.push(
            self.now + delay,
            Event::Disk(DiskOp { host, boot, volume, op, kind, submitted, seen, fails }),
        );
    }

    /// The volume carries out an I/O; a write lands whether its host still lives or not.
    pub(super) fn disk(&mut self, d: DiskOp) {
        let (host, lockspace, op) = (d.host, d.volume, d.op);
        let volume = &mut self.volumes[usize::from(lockspace.0)];
        let resource = |index: u32| ResourceId { lockspace, index };
        let fails = d.fails;
        let done = |_: ()| if fails { Err(IoFailed) } else { Ok(()) };
        let input = match d.kind {
            DiskKind::ReadDelta => {
                let result = if fails { Err(IoFailed) } else { Ok(volume.deltas[host]) };
                NodeInput::DeltaRead { lockspace, op, result }
            }
            DiskKind::WriteDelta(record) => {
                if !fails {
                    volume.deltas[host] = *record;
                }
                NodeInput::DeltaWrote { lockspace, op, result: done(()) }
            }
            DiskKind::ReadSpace => {
                let result = if fails { Err(IoFailed) } else { Ok(volume.deltas.clone()) };
                NodeInput::SpaceRead { lockspace, op, result }
            }
            DiskKind::ReadLeader(i) => {
                let leader = volume.areas[i as usize].leader;
                let result = if fails { Err(IoFailed) } else { Ok(leader) };
                NodeInput::Lock { resource: resource(i), input: LockInput::LeaderRead { op, result } }
            }
            DiskKind::ReadBlocks(i) => {
                let result = if fails { Err(IoFailed) } else { Ok(volume.areas[i as usize].blocks.clone()) };
                NodeInput::Lock { resource: resource(i), input: LockInput::BlocksRead { op, result } }
            }
            DiskKind::WriteBlock(i, block) => {
                if !fails {
                    volume.areas[i as usize].blocks[host] = *block;
                }
                NodeInput::Lock { resource: resource(i), input: LockInput::Wrote { op, result: done(()) } }
            }
            DiskKind::WriteLeader(i, leader) => {
                if !fails {
                    volume.areas[i as usize].leader = *leader;
                }
                NodeInput::Lock { resource: resource(i), input: LockInput::Wrote { op, result: done(()) } }
            }
        };
        let Some(after) = d.seen else { return };
        let renewed = matches!(input, NodeInput::DeltaWrote { result: Ok(()), .. });
        let (boot, submitted) = (d.boot, d.submitted);
        let event = if renewed {
            Event::Renewed { host, boot, input, submitted }
        } else {
            Event::Node { host, boot, input }
        };
        self.push(self.now + after, event);
    }

    fn transmit(&mut self, from: usize, to: usize, message: Message) {
        if self.network.cut[from + 1][to + 1] > 0 {
            return;
        }
        let loss = self.network.loss[from].max(self.network.loss[to]);
        let mut twice = false;
        if loss > 0 {
            if self.rng.chance(loss) {
                return;
            }
            twice = self.rng.chance(20);
        }
        let delay = |rng: &mut Rng| if loss > 0 { rng.range(1, 800) } else { rng.range(1, 5) };
        let node = |input| Event::Node { host: to, boot: 0, input };
        if twice {
            let at = self.now + delay(&mut self.rng);
            self.push(at, node(NodeInput::Message(message.clone())));
        }
        let at = self.now + delay(&mut self.rng);
        self.push(at, node(NodeInput::Message(message)));
    }

    pub(super) fn store_request(&mut self, host: usize, boot: u64, request: StoreRequest) {
        self.store.expire(self.now);
        // A request that arrives is carried out, even when its answer does not.
        let (arrives, returns) = (self.network.cut[host + 1][0] == 0, self.network.cut[0][host + 1] == 0);
        let lost = self.store.ambiguous && self.rng.chance(30);
        let executed = arrives && (!lost || self.rng.chance(50));
        let answered = arrives && returns && !lost;
        let input = match request {
            StoreRequest::Election(request) => {
                let Some(input) = self.elect(host, request, executed, answered) else { return };
                NodeInput::Coordinator(input)
            }
            StoreRequest::Load { op } => {
                let state = answered.then(|| self.store.state.clone());
                NodeInput::Ha(HaInput::Loaded { op, state })
            }
            StoreRequest::Write { op, token, updates } => {
                let result = if executed { self.write_state(token, updates) } else { WriteResult::Unknown };
                let result = if answered { result } else { WriteResult::Unknown };
                NodeInput::Ha(HaInput::Written { op, result })
            }
        };
        let delay = if arrives && returns { self.rng.range(1, 5) } else { 600 };
        self.push(self.now + delay, Event::Node { host, boot, input });
    }

    fn write_state(&mut self, token: u64, updates: Vec<Update>) -> WriteResult {
        let valid = self.store.key.is_some_and(|k| k.token == token);
        if !valid && !mutants::active(Mutant::WriteWithoutToken) {
            return WriteResult::Outdated;
        }
        for update in updates {
            if let Update::Vm(new) = &update {
                let id = new.spec.id;
                let old = self.store.state.vms.get(&id);
                let placed = new.place.is_some() && old.is_none_or(|v| v.place.is_none());
                if new.epoch < old.map_or(0, |v| v.epoch) {
                    self.violate(Violation::StateRegressed(id));
                }
                if placed && self.store.state.halted {
                    self.violate(Violation::PlacedWhileHalted(id));
                }
            }
            if !valid {
                self.violate(Violation::StateRegressed(VmId(0)));
            }
            self.store.state.apply(update);
        }
        WriteResult::Done
    }

    fn elect(
        &mut self,
        host: usize,
        request: CoordOutput,
        executed: bool,
        answered: bool,
    ) -> Option<CoordInput> {
        let late = if self.store.late { 5000 } else { 0 };
        let store = &mut self.store;
        let answer = |key: Option<KeyHolder>| if answered { Ok(key) } else { Err(StoreUnavailable) };
        Some(match request {
            CoordOutput::Observe { op } => CoordInput::Holder { op, result: answer(store.key) },
            CoordOutput::Grant { op, ttl } => {
                let mut result = Err(StoreUnavailable);
                if executed {
                    store.next_lease += 1;
                    store.leases.insert(store.next_lease, self.now + ttl + late);
                    if answered {
                        result = Ok(store.next_lease);
                    }
                }
                CoordInput::Granted { op, result }
            }
            CoordOutput::Campaign { op, lease } => {
                if executed && store.key.is_none() && store.leases.contains_key(&lease) {
                    store.revision += 1;
                    let host =
                        Incarnation { host: HostId(host as u16 + 1), generation: self.hosts[host].boot };
                    store.key = Some(KeyHolder { host, token: store.revision, lease });
                }
                CoordInput::Holder { op, result: answer(store.key) }
            }
            CoordOutput::Renew { op, lease } => {
                let mut result = Err(StoreUnavailable);
                if executed {
                    let known = store.leases.get_mut(&lease).map(|until| *until = self.now + 10_000 + late);
                    if answered {
                        result = Ok(known.is_some());
                    }
                }
                CoordInput::Renewed { op, result }
            }
            CoordOutput::Resign { lease } => {
                if executed {
                    store.leases.remove(&lease);
                    store.expire(self.now);
                }
                return None;
            }
            _ => return None,
        })
    }

    pub(super) fn fence(
        &mut self,
        from: usize,
        boot: u64,
        serial: u64,
        op: u64,
        target: usize,
        action: FenceAction,
    ) {
        let bmc = self.hosts[target].bmc;
        if bmc == Bmc::Dead {
            return;
        }
        let reply = match action {
            FenceAction::Status if self.hosts[target].powered => AgentReply::PowerOn,
            FenceAction::Status => AgentReply::PowerOff,
            FenceAction::Off => {
                if bmc != Bmc::Lies && self.hosts[target].powered {
                    self.outcome.fenced += 1;
                    self.power_off(target);
                }
                AgentReply::Accepted
            }
            FenceAction::On => {
                if !self.hosts[target].powered {
                    let at = self.now + self.rng.range(15_000, 30_000);
                    self.push(at, Event::Boot { host: target });
                }
                AgentReply::Accepted
            }
        };
        let input = NodeInput::Fence { serial, input: FenceInput::Done { op, result: Ok(reply) } };
        self.push(self.now + 50, Event::Node { host: from, boot, input });
    }

    fn feed(&mut self, host: usize) {
        let h = &mut self.hosts[host];
        if !h.has_watchdog {
            return;
        }
        let at = self.now + super::world::TIMING.watchdog() + h.watchdog_late;
        h.watchdog_at = Some(at);
        if !h.watchdog_event {
            h.watchdog_event = true;
            let boot = h.boot;
            self.push(at, Event::Watchdog { host, boot });
        }
    }

    fn vm_action(&mut self, host: usize, vm: VmId, epoch: u64, action: VmAction) {
        let found = self.hosts[host].procs.iter().position(|p| p.vm == vm && p.epoch == epoch);
        let (quick, slow, stop, travel) = (
            self.rng.range(500, 2000),
            self.rng.range(1000, 5000),
            self.rng.range(1000, 8000),
            self.rng.range(2000, 8000),
        );
        match (action, found) {
            (VmAction::Start(_), _) => {
                self.outcome.starts += 1;
                let serial = self.spawn(host, vm, epoch, ProcState::Booting);
                let looping = self.crash_loops >> vm.0 & 1 == 1;
                self.later(host, serial, if looping { quick } else { slow }, ProcEvent::Up);
                let count = &mut self.starts[vm.0 as usize];
                *count += 1;
                if *count > 14 {
                    let n = *count;
                    self.violate(Violation::RestartStorm(vm, n));
                }
                let booting = self.hosts[host].procs.iter().filter(|p| p.state == ProcState::Booting).count();
                if booting > 2 {
                    self.violate(Violation::StartStorm(HostId(host as u16 + 1)));
                }
            }
            (VmAction::Receive { .. }, _) => {
                self.spawn(host, vm, epoch, ProcState::Incoming);
            }
            (VmAction::Stop, Some(i)) => {
                let serial = self.hosts[host].procs[i].serial;
                self.later(host, serial, stop, ProcEvent::Exit);
            }
            (VmAction::Kill, Some(i)) => {
                let serial = self.hosts[host].procs[i].serial;
                self.later(host, serial, quick / 5, ProcEvent::Exit);
            }
            (VmAction::MoveTo(to), Some(i)) => {
                let serial = self.hosts[host].procs[i].serial;
                self.later(host, serial, travel, ProcEvent::Quiesce(to));
            }
            (VmAction::Resume, Some(i)) => {
                let p = &mut self.hosts[host].procs[i];
                if p.state == ProcState::Incoming {
                    self.outcome.moves += 1;
                }
                p.state = ProcState::Live;
                self.went_live(host, vm);
                self.tell(host, vm, epoch, VmEvent::Started);
            }
            // The process is gone already; its exit has been, or will be, told.
            (_, None) => {}
        }
    }

    fn spawn(&mut self, host: usize, vm: VmId, epoch: u64, state: ProcState) -> u64 {
        self.serial += 1;
        let serial = self.serial;
        self.hosts[host].procs.push(Proc { vm, epoch, state, serial, guest: Guest::default() });
        serial
    }

    pub(super) fn later(&mut self, host: usize, serial: u64, delay: u64, event: ProcEvent) {
        let boot = self.hosts[host].boot;
        self.push(self.now + delay, Event::Proc { host, boot, serial, event });
    }

    fn tell(&mut self, host: usize, vm: VmId, epoch: u64, event: VmEvent) {
        self.note(|| format!("host {}: VM {} epoch {epoch}: {event:?}", host + 1, vm.0));
        let boot = self.hosts[host].boot;
        self.push(self.now + 1, Event::Node { host, boot, input: NodeInput::Vm { vm, epoch, event } });
    }

    fn went_live(&mut self, host: usize, vm: VmId) {
        if let Some(v) = check::two_writers(&self.hosts, vm, host) {
            self.violate(v);
        }
    }

    pub(super) fn proc_event(&mut self, host: usize, serial: u64, event: ProcEvent) {
        let Some(i) = self.hosts[host].procs.iter().position(|p| p.serial == serial) else { return };
        let Proc { vm, epoch, state, .. } = self.hosts[host].procs[i];
        match event {
            ProcEvent::Up if state == ProcState::Booting => {
                self.hosts[host].procs[i].state = ProcState::Live;
                self.went_live(host, vm);
                self.tell(host, vm, epoch, VmEvent::Started);
                if self.crash_loops >> vm.0 & 1 == 1 {
                    let delay = self.rng.range(500, 2000);
                    self.later(host, serial, delay, ProcEvent::Crash);
                }
            }
            ProcEvent::Up => {}
            ProcEvent::Exit if self.hosts[host].unkillable => {
                // It dies when it can.
                self.later(host, serial, 5000, ProcEvent::Exit);
            }
            ProcEvent::Exit | ProcEvent::Crash => {
                self.hosts[host].procs.swap_remove(i);
                self.tell(host, vm, epoch, VmEvent::Exited);
            }
            ProcEvent::Quiesce(to) => {
                let ready = self.network.cut[host + 1][usize::from(to.0)] == 0
                    && self.hosts[index(to)]
                        .procs
                        .iter()
                        .any(|p| p.vm == vm && p.epoch == epoch + 1 && p.state == ProcState::Incoming);
                if ready && state == ProcState::Live {
                    self.hosts[host].procs[i].state = ProcState::Paused;
                    self.tell(host, vm, epoch, VmEvent::Quiesced);
                } else {
                    self.tell(host, vm, epoch, VmEvent::MoveFailed);
                }
            }
        }
    }
}
