//! The event loop: hosts boot, faults come and go, nodes are stepped.

use std::sync::Arc;

use super::Outcome;
use super::check::{self, Violation};
use super::exec::{DiskOp, ProcEvent};
use super::queue::Queue;
use super::schedule::{END, Fault, FaultKind, Rng, Schedule, VMS, VOLUMES};
use super::state::{Area, Bmc, IoFaults, Network, ProcState, SimHost, Store, Volume};
use crate::fence::{FenceAction, FenceConfig};
use crate::ha::{ClusterState, HaConfig, Request, VmPhase, VmSpec};
use crate::lease::{DeltaRecord, LeaseStatus, Timing};
use crate::lock::Leader;
use crate::membership::MembershipConfig;
use crate::node::{Config, FenceTarget, Message, Node, NodeInput, NodeOutput, StoreRequest};
use crate::ondisk::{HostBlock, Name};
use crate::types::{HostId, LockspaceId, ResourceId, Resources, Time, VmId};

pub(super) const TIMING: Timing = Timing { io_timeout: 5, watchdog: 30 };
/// Lock areas on each volume.
const AREAS: u32 = 48;
/// The VMs of `StartMany` have numbers from here.
const EXTRA: u32 = 20;
const VM_MEMORY: u64 = 4096;
/// The lock that decides a tie.
const WITNESS: ResourceId = ResourceId { lockspace: LockspaceId(0), index: 0 };

#[derive(Debug)]
pub(super) enum Event {
    Wake {
        host: usize,
        boot: u64,
    },
    /// `boot` 0 stands for any life.
    Node {
        host: usize,
        boot: u64,
        input: NodeInput,
    },
    /// A write of the delta lease ended well; it was submitted at this local time.
    Renewed {
        host: usize,
        boot: u64,
        input: NodeInput,
        submitted: Time,
    },
    Disk(DiskOp),
    Store {
        host: usize,
        boot: u64,
        request: StoreRequest,
    },
    Fence {
        from: usize,
        boot: u64,
        serial: u64,
        op: u64,
        target: usize,
        action: FenceAction,
    },
    Proc {
        host: usize,
        boot: u64,
        serial: u64,
        event: ProcEvent,
    },
    Watchdog {
        host: usize,
        boot: u64,
    },
    Boot {
        host: usize,
    },
    Begin(usize),
    End(usize),
    Operator {
        request: Request,
        tries: u32,
    },
    Check,
}

pub(super) struct World {
    pub(super) now: u64,
    pub(super) rng: Rng,
    queue: Queue<Event>,
    pub(super) hosts: Vec<SimHost>,
    pub(super) volumes: Vec<Volume>,
    pub(super) store: Store,
    pub(super) network: Network,
    faults: Vec<Fault>,
    pub(super) crash_loops: u64,
    pub(super) serial: u64,
    pub(super) violation: Option<(u64, Violation)>,
    pub(super) tokens: Vec<u64>,
    pub(super) starts: Vec<u32>,
    pub(super) outcome: Outcome,
    outputs: Vec<NodeOutput>,
    /// One line for each interesting event, when asked for.
    pub(super) trace: Option<Vec<String>>,
}

impl World {
    pub(super) fn new(schedule: &Schedule) -> Self {
        let mut rng = Rng::new(schedule.seed.wrapping_add(1));
        let n = usize::from(schedule.hosts);
        let mut host = |i: usize| SimHost {
            node: None,
            boot: 0,
            booted_at: 0,
            powered: false,
            dead: false,
            drift: rng.range(0, 20_001) as i64 - 10_000,
            has_watchdog: schedule.no_watchdog >> (i + 1) & 1 == 0,
            watchdog_late: rng.range(0, 1000),
            watchdog_at: None,
            watchdog_event: false,
            paused_until: 0,
            agent_paused_until: 0,
            procs: Vec::new(),
            wake_at: u64::MAX,
            bmc: Bmc::Good,
            unkillable: false,
            generations: Default::default(),
            usurper_since: None,
        };
        let hosts: Vec<SimHost> = (0..n).map(&mut host).collect();
        let volume = || Volume {
            deltas: vec![DeltaRecord::default(); n],
            areas: vec![
                Area { leader: Leader::default(), blocks: vec![HostBlock::default(); n] };
                AREAS as usize
            ],
            faults: vec![IoFaults::default(); n],
        };
        let mut world = World {
            now: 0,
            rng,
            queue: Queue::new(END),
            hosts,
            volumes: (0..VOLUMES).map(|_| volume()).collect(),
            store: Store {
                state: ClusterState::default(),
                key: None,
                revision: 0,
                leases: Default::default(),
                next_lease: 0,
                ambiguous: false,
                late: false,
            },
            network: Network { cut: vec![vec![0; n + 1]; n + 1], loss: vec![0; n] },
            faults: schedule.faults.clone(),
            crash_loops: 0,
            serial: 0,
            violation: None,
            tokens: vec![0; usize::from(VOLUMES) * AREAS as usize],
            starts: vec![0; 64],
            outcome: Outcome { violation: None, events: 0, starts: 0, fenced: 0, moves: 0, digest: 0 },
            outputs: Vec::new(),
            trace: None,
        };
        for host in 0..n {
            let at = world.rng.range(0, 2000);
            world.push(at, Event::Boot { host });
        }
        for (i, fault) in world.faults.clone().iter().enumerate() {
            world.push(fault.at, Event::Begin(i));
            world.push(fault.at + fault.length, Event::End(i));
        }
        for vm in 1..=u32::from(VMS) {
            let request = Request::Start(Arc::new(spec(vm)));
            world.push(30_000 + u64::from(vm) * 300, Event::Operator { request, tries: 60 });
        }
        world.push(5000, Event::Check);
        world
    }

    pub(super) fn push(&mut self, at: u64, event: Event) {
        self.queue.push(at, event);
    }

    pub(super) fn violate(&mut self, violation: Violation) {
        if self.violation.is_none() {
            self.violation = Some((self.now, violation));
        }
    }

    /// Notes a line of the trace, if one is kept.
    pub(super) fn note(&mut self, line: impl FnOnce() -> String) {
        let now = self.now as f64 / 1000.0;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{now:9.3} {}", line()));
        }
    }

    pub(super) fn run(mut self) -> Outcome {
        self.run_events();
        self.outcome.violation = self.violation;
        self.outcome
    }

    pub(super) fn run_traced(mut self) -> Vec<String> {
        self.run_events();
        if let Some((_, violation)) = self.violation.clone() {
            self.note(|| format!("FAILED: {violation}"));
        }
        self.trace.unwrap_or_default()
    }

    fn run_events(&mut self) {
        while self.violation.is_none()
            && let Some((at, order, event)) = self.queue.pop()
        {
            self.now = at;
            self.outcome.events += 1;
            self.outcome.digest = (self.outcome.digest ^ at ^ u64::from(order) << 32)
                .wrapping_mul(0x0100_0000_01b3)
                .rotate_left(5);
            self.handle(event);
        }
        if self.violation.is_none() {
            self.check_end();
        }
    }

    /// Whether the host is in the life that an event belongs to.
    fn lives(&self, host: usize, boot: u64) -> bool {
        let h = &self.hosts[host];
        h.node.is_some() && (boot == 0 || h.boot == boot)
    }

    fn handle(&mut self, event: Event) {
        // What a stopped host or agent would have seen, it sees later.
        let agent = match &event {
            Event::Wake { host, boot }
            | Event::Node { host, boot, .. }
            | Event::Renewed { host, boot, .. } => Some((*host, *boot, true)),
            Event::Proc { host, boot, .. } => Some((*host, *boot, false)),
            _ => None,
        };
        if let Some((host, boot, agent)) = agent {
            if !self.lives(host, boot) {
                return;
            }
            let h = &self.hosts[host];
            let until = h.paused_until.max(if agent { h.agent_paused_until } else { 0 });
            if self.now < until {
                return self.push(until, event);
            }
        }
        match event {
            Event::Wake { host, .. } => {
                if self.hosts[host].wake_at <= self.now {
                    self.hosts[host].wake_at = u64::MAX;
                    self.step(host, NodeInput::Tick);
                }
            }
            Event::Node { host, input, .. } => self.step(host, input),
            Event::Renewed { host, input, submitted, .. } => {
                self.step(host, input);
                self.check_lease(host, submitted);
            }
            Event::Disk(op) => self.disk(op),
            Event::Store { host, boot, request } => self.store_request(host, boot, request),
            Event::Fence { from, boot, serial, op, target, action } => {
                self.fence(from, boot, serial, op, target, action);
            }
            Event::Proc { host, serial, event, .. } => self.proc_event(host, serial, event),
            Event::Watchdog { host, boot } => self.watchdog(host, boot),
            Event::Boot { host } => self.boot(host),
            Event::Begin(i) => self.fault(self.faults[i], true),
            Event::End(i) => self.fault(self.faults[i], false),
            Event::Operator { request, tries } => self.operator(request, tries),
            Event::Check => {
                self.check_usurpers();
                self.push(self.now + 5000, Event::Check);
            }
        }
    }

    pub(super) fn step(&mut self, host: usize, input: NodeInput) {
        let mut outputs = core::mem::take(&mut self.outputs);
        let h = &mut self.hosts[host];
        let local = h.local(self.now);
        if let Some(node) = &mut h.node {
            node.step(local, input, &mut outputs);
        }
        for output in outputs.drain(..) {
            if self.trace.is_some() {
                self.note_output(host, &output);
            }
            self.carry_out(host, output);
        }
        self.outputs = outputs;
    }

    fn note_output(&mut self, host: usize, output: &NodeOutput) {
        let routine = matches!(
            output,
            NodeOutput::WakeAt(_)
                | NodeOutput::ReadDelta { .. }
                | NodeOutput::ReadSpace { .. }
                | NodeOutput::WriteDelta { .. }
                | NodeOutput::FeedWatchdog
                | NodeOutput::Broadcast(_)
                | NodeOutput::Store(StoreRequest::Election(_))
                | NodeOutput::Send(_, Message::Report(_))
        );
        if !routine {
            self.note(|| format!("host {}: {output:?}", host + 1));
        }
    }

    pub(super) fn wake(&mut self, host: usize, local: Time) {
        let h = &mut self.hosts[host];
        let at = h.global(local).max(self.now + 1);
        if at < h.wake_at {
            h.wake_at = at;
            let boot = h.boot;
            self.push(at, Event::Wake { host, boot });
        }
    }

    fn boot(&mut self, host: usize) {
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
        h.wake_at = u64::MAX;
        h.usurper_since = None;
        h.node = Some(Node::new(h.local(now), config, h.boot));
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
            ha: HaConfig::default(),
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

    fn watchdog(&mut self, host: usize, boot: u64) {
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

    fn fault(&mut self, fault: Fault, on: bool) {
        self.note(|| format!("fault {} {:?}", if on { "begins" } else { "ends" }, fault.kind));
        let n = self.hosts.len();
        let ix = |h: u8| usize::from(h) - 1;
        let until = fault.at + fault.length;
        let io = |world: &mut World, h: u8, v: u8, set: &dyn Fn(&mut IoFaults)| {
            set(&mut world.volumes[usize::from(v)].faults[ix(h)]);
        };
        match fault.kind {
            FaultKind::Isolate(h) => {
                self.cut_from(usize::from(h), on);
                self.cut_to(usize::from(h), on);
            }
            FaultKind::Deaf(h) => self.cut_to(usize::from(h), on),
            FaultKind::Mute(h) => self.cut_from(usize::from(h), on),
            FaultKind::CutOneWay(a, b) => self.cut(usize::from(a), usize::from(b), on),
            FaultKind::Split(at) => {
                for low in 1..=usize::from(at) {
                    for high in (usize::from(at) + 1..=n).chain([0]) {
                        self.cut(low, high, on);
                        self.cut(high, low, on);
                    }
                }
            }
            FaultKind::Lossy(h, percent) => {
                self.network.loss[ix(h)] = if on { u64::from(percent) } else { 0 };
            }
            FaultKind::PauseHost(h) if on => {
                let h = &mut self.hosts[ix(h)];
                h.paused_until = h.paused_until.max(until);
            }
            FaultKind::Hang(h) if on => self.hosts[ix(h)].paused_until = END + 1,
            FaultKind::PauseAgent(h) if on => {
                let h = &mut self.hosts[ix(h)];
                h.agent_paused_until = h.agent_paused_until.max(until);
            }
            FaultKind::Reset(h) if on => self.reset(ix(h)),
            FaultKind::PowerLoss(h) if on => {
                self.power_off(ix(h));
                self.hosts[ix(h)].dead = true;
                self.hosts[ix(h)].bmc = Bmc::Dead;
            }
            FaultKind::PauseHost(_)
            | FaultKind::Hang(_)
            | FaultKind::PauseAgent(_)
            | FaultKind::Reset(_)
            | FaultKind::PowerLoss(_) => {}
            FaultKind::VolumeFails(h, v) => {
                io(self, h, v, &|f| f.fails = if on { f.fails + 1 } else { f.fails - 1 });
            }
            FaultKind::VolumeLost(v) => {
                for h in 1..=n as u8 {
                    io(self, h, v, &|f| f.fails = if on { f.fails + 1 } else { f.fails - 1 });
                }
            }
            FaultKind::StorageFails(h) => {
                for v in 0..VOLUMES {
                    io(self, h, v, &|f| f.fails = if on { f.fails + 1 } else { f.fails - 1 });
                }
            }
            FaultKind::VolumeSlow(h, v) => io(self, h, v, &|f| f.slow = on),
            FaultKind::CompletionLost(h, v) => io(self, h, v, &|f| f.completion_lost = on),
            FaultKind::CompletionLate(h, v) => io(self, h, v, &|f| f.completion_late = on),
            FaultKind::WritesLate(h, v) => io(self, h, v, &|f| f.writes_late = on),
            FaultKind::BmcDead(h) => self.set_bmc(ix(h), if on { Bmc::Dead } else { Bmc::Good }),
            FaultKind::BmcSlow(h) => self.set_bmc(ix(h), if on { Bmc::Slow } else { Bmc::Good }),
            FaultKind::BmcLies(h) => self.set_bmc(ix(h), if on { Bmc::Lies } else { Bmc::Good }),
            FaultKind::Unkillable(h) => {
                self.hosts[ix(h)].unkillable = on;
                if !on {
                    self.reap(ix(h));
                }
            }
            FaultKind::CrashLoop(vm) => {
                self.crash_loops =
                    if on { self.crash_loops | 1 << vm } else { self.crash_loops & !(1 << vm) };
                if on {
                    self.crash(VmId(u32::from(vm)));
                }
            }
            FaultKind::CrashVm(vm) if on => self.crash(VmId(u32::from(vm))),
            FaultKind::CrashVm(_) => {}
            FaultKind::StoreCut(h) => {
                self.cut(usize::from(h), 0, on);
                self.cut(0, usize::from(h), on);
            }
            FaultKind::StoreAmbiguous => self.store.ambiguous = on,
            FaultKind::LeaseLate => self.store.late = on,
            FaultKind::LeaseRevoked => {
                if on {
                    self.store.leases.clear();
                    self.store.key = None;
                }
            }
            FaultKind::Move(vm, h) => {
                if on {
                    let request = Request::Move(VmId(u32::from(vm)), HostId(u16::from(h)));
                    self.operator(request, 5);
                }
            }
            FaultKind::Maintenance(h) => {
                self.operator(Request::Maintenance(HostId(u16::from(h)), on), 30);
            }
            FaultKind::StartMany => {
                for vm in EXTRA..EXTRA + 16 {
                    if on {
                        self.operator(Request::Start(Arc::new(spec(vm))), 3);
                    }
                }
            }
        }
    }

    fn set_bmc(&mut self, host: usize, bmc: Bmc) {
        if !self.hosts[host].dead {
            self.hosts[host].bmc = bmc;
        }
    }

    fn cut(&mut self, from: usize, to: usize, on: bool) {
        if from != to {
            let c = &mut self.network.cut[from][to];
            *c = if on { *c + 1 } else { c.saturating_sub(1) };
        }
    }

    fn cut_from(&mut self, host: usize, on: bool) {
        for other in 0..=self.hosts.len() {
            self.cut(host, other, on);
        }
    }

    fn cut_to(&mut self, host: usize, on: bool) {
        for other in 0..=self.hosts.len() {
            self.cut(other, host, on);
        }
    }

    /// An operator asks whoever coordinates, and again when nobody does.
    fn operator(&mut self, request: Request, tries: u32) {
        let leader = self.hosts.iter().position(|h| {
            h.node.as_ref().is_some_and(|n| n.token().is_some() && n.ha().state().is_some())
                && self.now >= h.paused_until.max(h.agent_paused_until)
        });
        let done = leader.is_some_and(|host| {
            let local = self.hosts[host].local(self.now);
            let Some(node) = &mut self.hosts[host].node else { return false };
            let done = node.request(local, request.clone());
            let started = done.is_ok() && matches!(request, Request::Start(_));
            let eaten = node.ha().state().and_then(|s| {
                let usable = node.usable_hosts(local);
                if started { check::reserve_eaten(s, &usable) } else { None }
            });
            if let Some(h) = eaten {
                self.violate(Violation::ReserveEaten(h));
            }
            self.step(host, NodeInput::Tick);
            done.is_ok()
        });
        if !done && tries > 1 {
            self.push(self.now + 1500, Event::Operator { request, tries: tries - 1 });
        }
    }

    /// Looks at a host's leases after a renewal that was submitted at this local time.
    fn check_lease(&mut self, host: usize, submitted: Time) {
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

    fn check_usurpers(&mut self) {
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
    fn check_end(&mut self) {
        if self.is_tied_for_good() {
            return;
        }
        let missing = self.store.state.vms.iter().find(|(id, v)| {
            let running =
                self.hosts.iter().any(|h| h.procs.iter().any(|p| p.vm == **id && p.state == ProcState::Live));
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
            check::should_run(v.phase, v.wanted) && !waits && !running && !hopeless
        });
        if let Some((id, _)) = missing {
            self.violate(Violation::NotRestarted(*id));
        }
        if (1..=u32::from(VMS)).any(|vm| !self.store.state.vms.contains_key(&VmId(vm))) {
            self.violate(Violation::NotRestarted(VmId(0)));
        }
    }
}

fn spec(vm: u32) -> VmSpec {
    let disk = |v: u8| ResourceId { lockspace: LockspaceId(v), index: vm };
    let disks = if vm.is_multiple_of(3) { vec![disk(0), disk(1)] } else { vec![disk((vm % 2) as u8)] };
    VmSpec {
        id: VmId(vm),
        priority: (vm % 3) as u8,
        depends_on: if vm == 5 { vec![VmId(4)] } else { Vec::new() },
        demand: Resources { cpu: 2000, memory: VM_MEMORY },
        disks,
        definition: String::new(),
    }
}
