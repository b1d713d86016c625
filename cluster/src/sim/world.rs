//! The event loop: hosts boot, faults come and go, nodes are stepped.

use std::sync::Arc;

use super::Outcome;
use super::check::{self, Violation};
use super::exec::{DiskOp, ProcEvent};
use super::guests::Stall;
use super::queue::Queue;
use super::schedule::{END, Fault, Rng, Schedule, VMS, VOLUMES};
use super::state::{Area, Bmc, IoFaults, Network, SimHost, Store, Volume};
use crate::fence::FenceAction;
use crate::ha::{ClusterState, HealthConfig, Request, VmSpec};
use crate::lease::{DeltaRecord, Timing};
use crate::lock::Leader;
use crate::node::{Message, NodeInput, NodeOutput, StoreRequest};
use crate::ondisk::HostBlock;
use crate::types::{LockspaceId, ResourceId, Resources, Time, VmId};

pub(super) const TIMING: Timing = Timing { io_timeout: 5, watchdog: 30 };
pub(super) const HEALTH: HealthConfig = HealthConfig { interval: 5000, heartbeat: 20_000, stall: 40_000 };
/// Lock areas on each volume.
const AREAS: u32 = 48;
/// The VMs of `StartMany` have numbers from here.
pub(super) const EXTRA: u32 = 20;
pub(super) const VM_MEMORY: u64 = 4096;
/// The lock that decides a tie.
pub(super) const WITNESS: ResourceId = ResourceId { lockspace: LockspaceId(0), index: 0 };

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
    /// The agent looks at its guests.
    Look {
        host: usize,
        boot: u64,
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
            wake_local: Time(u64::MAX),
            bmc: Bmc::Good,
            unkillable: false,
            stall: Stall::default(),
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
    pub(super) fn lives(&self, host: usize, boot: u64) -> bool {
        let h = &self.hosts[host];
        h.node.is_some() && (boot == 0 || h.boot == boot)
    }

    fn handle(&mut self, event: Event) {
        // What a stopped host or agent would have seen, it sees later.
        let agent = match &event {
            Event::Wake { host, boot }
            | Event::Node { host, boot, .. }
            | Event::Renewed { host, boot, .. }
            | Event::Look { host, boot } => Some((*host, *boot, true)),
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
                    self.hosts[host].forget_wake();
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
            Event::Look { host, .. } => self.look(host),
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
        let wake = h.node.as_mut().map(|node| {
            node.step(local, input, &mut outputs);
            node.next_wake(local)
        });
        for output in outputs.drain(..) {
            if self.trace.is_some() {
                self.note_output(host, &output);
            }
            self.carry_out(host, output);
        }
        self.outputs = outputs;
        if let Some(wake) = wake {
            self.wake(host, wake);
        }
    }

    fn note_output(&mut self, host: usize, output: &NodeOutput) {
        let routine = matches!(
            output,
            NodeOutput::ReadDelta { .. }
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
        if local >= h.wake_local {
            return;
        }
        let at = h.global(local).max(self.now + 1);
        if at < h.wake_at {
            (h.wake_at, h.wake_local) = (at, local);
            let boot = h.boot;
            self.push(at, Event::Wake { host, boot });
        }
    }

    /// An operator asks whoever coordinates, and again when nobody does.
    pub(super) fn operator(&mut self, request: Request, tries: u32) {
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
}

pub(super) fn spec(vm: u32) -> VmSpec {
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
