//! The agent's thread: steps the node and carries out what it asks for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use super::api::{ApiReply, ApiRequest, HostEntry, LeaseEntry, LocalEntry, LockEntry, Status, VmEntry};
use super::balance::Balance;
use super::config::{AgentConfig, resource_name};
use super::guard::Guard;
use super::runner::VmRunner;
use super::workers::{EventWriter, FenceCall, FenceCalls, Receivers, StoreJob, StoreWorker};
use super::{AgentEnd, AgentError, event};
use crate::adapters::{
    Clock, Journal, LeaseDisk, LeaseVolume, Links, Severity, VolumeIo, VolumeReply, VolumeRequest,
};
use crate::fence::Evidence;
use crate::ha::{Ailment, ClusterState, Request, RequestError};
use crate::lease::{IoFailed, LeaseStatus, OpId};
use crate::lock::LockInput;
use crate::membership::Verdict;
use crate::node::{Message, Node, NodeInput, NodeOutput, VmEvent};
use crate::types::{HostId, LockspaceId, ResourceId, Time, VmId};

/// How long a request may wait for the coordinator to be ready.
const REQUEST_PATIENCE: u64 = 5000;
/// The load of the VMs is looked at this often.
const USAGE_INTERVAL: u64 = 10_000;

/// What the thread waits for.
#[derive(Debug)]
pub(super) enum Input {
    Node(NodeInput),
    Message(Message),
    Vm { input: NodeInput, vm: VmId, why: Option<String> },
    Call(ApiRequest, Sender<ApiReply>),
    Leave,
    Shutdown,
}

/// Whom a volume's answer belongs to.
#[derive(Clone, Copy, Debug)]
enum Tag {
    Delta(LockspaceId, OpId),
    Space(LockspaceId, OpId),
    Lock(ResourceId, OpId),
}

fn answer(tag: Tag, result: Result<VolumeReply, IoFailed>) -> NodeInput {
    let read = |r| match r {
        VolumeReply::Delta(record) => Ok(record),
        _ => Err(IoFailed),
    };
    match tag {
        Tag::Delta(lockspace, op) => match result {
            Ok(VolumeReply::Written) => NodeInput::DeltaWrote { lockspace, op, result: Ok(()) },
            result => NodeInput::DeltaRead { lockspace, op, result: result.and_then(read) },
        },
        Tag::Space(lockspace, op) => {
            let records = result.and_then(|r| match r {
                VolumeReply::Space(records) => Ok(records),
                _ => Err(IoFailed),
            });
            NodeInput::SpaceRead { lockspace, op, result: records }
        }
        Tag::Lock(resource, op) => {
            let input = match result {
                Ok(VolumeReply::Leader(leader)) => LockInput::LeaderRead { op, result: Ok(leader) },
                Ok(VolumeReply::Blocks(blocks)) => LockInput::BlocksRead { op, result: Ok(blocks) },
                Ok(_) => LockInput::Wrote { op, result: Ok(()) },
                // A failed read and a failed write are one to the lock.
                Err(IoFailed) => LockInput::Wrote { op, result: Err(IoFailed) },
            };
            NodeInput::Lock { resource, input }
        }
    }
}

/// A request that waits for the coordinator to be ready.
struct Waiting {
    request: Request,
    until: Time,
    reply: Sender<ApiReply>,
}

pub(super) struct Driver {
    /// Dropped first: it kills the VMs before anything else goes.
    runner: Box<dyn VmRunner>,
    config: AgentConfig,
    inputs: Sender<Input>,
    node: Node,
    wake: Time,
    out: Vec<NodeOutput>,
    volumes: Vec<VolumeIo<Tag>>,
    links: Arc<Links>,
    /// Held for its threads.
    _receivers: Receivers,
    waiting_messages: Arc<AtomicUsize>,
    store: StoreWorker,
    fences: FenceCalls,
    events: EventWriter,
    guard: Guard,
    balance: Balance,
    next_usage: Time,
    next_look: Time,
    waiting: Vec<Waiting>,
    end: Option<AgentEnd>,
}

impl Driver {
    pub(super) fn new(
        config: AgentConfig,
        boot: u64,
        key: &[u8],
        journal: Journal,
        runner: Box<dyn VmRunner>,
        inputs: Sender<Input>,
    ) -> Result<Self, AgentError> {
        let now = Clock.now();
        let node = Node::new(now, config.node(), boot);
        let mut volumes = Vec::new();
        for (n, v) in (0u8..).zip(&config.volumes) {
            let (space, geometry) = v.layout()?;
            let disk = LeaseDisk::open(&v.path, geometry).map_err(AgentError::Volume)?;
            let volume = LeaseVolume::new(disk, space, v.offset);
            volume.read_delta(config.host).map_err(AgentError::Volume)?;
            let inputs = inputs.clone();
            let done = move |tag, result| {
                let _ = inputs.send(Input::Node(answer(tag, result)));
            };
            tracing::debug!(volume = n, path = %v.path.display(), "lease volume opened");
            volumes.push(VolumeIo::start(volume, Clock, done).map_err(AgentError::Thread)?);
        }
        let locals: Vec<_> = config.links.iter().map(|l| l.local).collect();
        let peers = config.hosts.iter().filter(|h| h.id != config.host);
        let peers = peers.map(|h| (h.id, h.addresses.clone())).collect();
        let mut links = Links::open(config.host, key, &locals, peers).map_err(AgentError::Link)?;
        for (n, group) in config.links.iter().enumerate() {
            if let Some(group) = group.group {
                links.join(n, group).map_err(AgentError::Link)?;
            }
        }
        let links = Arc::new(links);
        let waiting_messages = Arc::new(AtomicUsize::new(0));
        let receivers = Receivers::start(&links, &inputs, &waiting_messages).map_err(AgentError::Thread)?;
        let store = StoreWorker::start(config.store.clone(), config.state.clone(), node.me(), inputs.clone());
        let events = EventWriter::start(journal, config.rules.clone()).map_err(AgentError::Thread)?;
        let guard = Guard::open(config.watchdog.as_ref(), config.timing.watchdog);
        let driver = Driver {
            inputs,
            node,
            wake: now,
            out: Vec::new(),
            volumes,
            links,
            _receivers: receivers,
            waiting_messages,
            store: store.map_err(AgentError::Thread)?,
            fences: FenceCalls::default(),
            events,
            guard: guard.map_err(AgentError::Watchdog)?,
            runner,
            balance: Balance::new(now, config.balance.clone()),
            next_usage: now,
            next_look: now,
            waiting: Vec::new(),
            end: None,
            config,
        };
        driver.note(Severity::Info, "agent.started", driver.config.host, format!("Boot {boot}"));
        if driver.config.watchdog.is_none() {
            let text = "Runs without a watchdog: others take its VMs only after it was seen off".into();
            driver.note(Severity::Warning, "agent.no-watchdog", driver.config.host, text);
        }
        Ok(driver)
    }

    fn note(&self, severity: Severity, kind: &str, subject: impl ToString, message: String) {
        tracing::info!(kind, subject = subject.to_string(), "{message}");
        self.events.note(event(severity, kind, subject.to_string(), message));
    }

    pub(super) fn run(mut self, queue: &Receiver<Input>) -> AgentEnd {
        self.step(Clock.now(), NodeInput::Tick);
        loop {
            if let Some(end) = self.end {
                return end;
            }
            let now = Clock.now();
            let mut wake = self.wake.min(self.balance.wake()).min(self.next_usage).min(self.next_look);
            if !self.waiting.is_empty() {
                wake = wake.min(now + 100);
            }
            let input = queue.recv_timeout(Duration::from_millis(wake.since(now)));
            let now = Clock.now();
            match input {
                Ok(Input::Node(input)) => self.step(now, input),
                Ok(Input::Message(message)) => {
                    self.waiting_messages.fetch_sub(1, Ordering::Relaxed);
                    self.step(now, NodeInput::Message(message));
                }
                Ok(Input::Vm { input, vm, why }) => self.vm_event(now, input, vm, why),
                Ok(Input::Call(request, reply)) => self.call(now, request, reply),
                Ok(Input::Leave) => self.step(now, NodeInput::Leave),
                Ok(Input::Shutdown) => self.end = Some(AgentEnd::Dropped),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.end = Some(AgentEnd::Dropped),
            }
            if now >= self.wake {
                self.step(now, NodeInput::Tick);
            }
            self.run_due(now);
        }
    }

    fn run_due(&mut self, now: Time) {
        self.try_requests(now);
        if now >= self.next_usage {
            self.next_usage = now + USAGE_INTERVAL;
            let usage = self.runner.usage();
            self.node.note_usage(&usage);
        }
        if now >= self.next_look {
            self.next_look = now + self.config.ha.health.interval;
            let signs = self.runner.signs();
            self.step(now, NodeInput::Signs(signs));
        }
        if let Some(plan) = self.balance.step(now, &mut self.node) {
            let text = format!("{} moves, {} GiB", plan.moves.len(), plan.size() / 1024);
            self.note(Severity::Info, "balance.plan", "cluster", text);
            self.step(now, NodeInput::Tick);
        }
    }

    fn vm_event(&mut self, now: Time, input: NodeInput, vm: VmId, why: Option<String>) {
        if let NodeInput::Vm { event, .. } = &input {
            let (severity, kind) = match event {
                VmEvent::Started => (Severity::Info, "vm.started"),
                VmEvent::Exited => (Severity::Warning, "vm.exited"),
                VmEvent::Quiesced => (Severity::Info, "vm.quiesced"),
                VmEvent::MoveFailed => (Severity::Warning, "vm.move-failed"),
            };
            self.note(severity, kind, format!("vm {}", vm.0), why.unwrap_or_default());
        }
        self.step(now, input);
    }

    fn step(&mut self, now: Time, input: NodeInput) {
        self.with_node(now, |node, out| node.step(now, input, out));
    }

    /// Does something with the node, and carries out what it asks for.
    fn with_node<T>(&mut self, now: Time, f: impl FnOnce(&mut Node, &mut Vec<NodeOutput>) -> T) -> T {
        let mut out = core::mem::take(&mut self.out);
        let result = f(&mut self.node, &mut out);
        self.wake = self.node.next_wake(now);
        for output in out.drain(..) {
            self.carry_out(now, output);
        }
        self.out = out;
        result
    }

    fn volume(&self, now: Time, lockspace: LockspaceId, tag: Tag, request: VolumeRequest) {
        if let Some(volume) = self.volumes.get(usize::from(lockspace.0)) {
            volume.submit(tag, request, now + self.config.timing.io());
        }
    }

    fn lock_io(&self, now: Time, resource: ResourceId, op: OpId, request: VolumeRequest) {
        self.volume(now, resource.lockspace, Tag::Lock(resource, op), request);
    }

    fn carry_out(&mut self, now: Time, output: NodeOutput) {
        let host = self.config.host;
        let hosts = self.config.top_host();
        match output {
            NodeOutput::ReadDelta { lockspace, op } => {
                self.volume(now, lockspace, Tag::Delta(lockspace, op), VolumeRequest::ReadDelta(host));
            }
            NodeOutput::WriteDelta { lockspace, op, record } => {
                let request = VolumeRequest::WriteDelta(host, record);
                self.volume(now, lockspace, Tag::Delta(lockspace, op), request);
            }
            NodeOutput::ReadSpace { lockspace, op } => {
                self.volume(now, lockspace, Tag::Space(lockspace, op), VolumeRequest::ReadSpace(hosts));
            }
            NodeOutput::ReadLeader { resource: r, op } => {
                self.lock_io(now, r, op, VolumeRequest::ReadLeader(r.index, resource_name(r.index)));
            }
            NodeOutput::ReadBlocks { resource: r, op } => {
                self.lock_io(now, r, op, VolumeRequest::ReadBlocks(r.index, hosts));
            }
            NodeOutput::WriteBlock { resource: r, op, block } => {
                self.lock_io(now, r, op, VolumeRequest::WriteBlock(r.index, host, block));
            }
            NodeOutput::WriteLeader { resource: r, op, leader } => {
                let name = resource_name(r.index);
                self.lock_io(now, r, op, VolumeRequest::WriteLeader(r.index, name, leader));
            }
            NodeOutput::Broadcast(message) => report(self.links.broadcast(&message)),
            NodeOutput::Send(to, message) => report(self.links.send(to, &message)),
            // The node's own deadline for the store is a second.
            NodeOutput::Store(request) => self.store.submit(StoreJob::Serve(request, now + 1000)),
            NodeOutput::Fence { serial, target, op, device, action } => {
                let Some(agent) = self.config.fence_device(target.host, device) else { return };
                let call = FenceCall { serial, op, action, deadline: self.config.fencing.deadline };
                self.fences.call(agent.clone(), call, self.inputs.clone());
            }
            NodeOutput::FeedWatchdog => guarded(self.guard.feed()),
            NodeOutput::DisarmWatchdog => guarded(self.guard.disarm()),
            NodeOutput::Vm { vm, epoch, action } => self.runner.act(vm, epoch, action),
            NodeOutput::Reset => {
                self.note(Severity::Error, "host.reset", host, "This host resets itself".into());
                self.runner.reset();
                self.end = Some(AgentEnd::Reset);
            }
            NodeOutput::Left => {
                self.note(Severity::Info, "host.left", host, "This host has left the cluster".into());
                self.end.get_or_insert(AgentEnd::Left);
            }
            announcement => self.announce(announcement),
        }
    }

    /// Notes what happened in the journal.
    fn announce(&self, output: NodeOutput) {
        use Severity::{Error, Info, Warning};
        match output {
            NodeOutput::HostChanged(host, verdict) => {
                let severity = if verdict == Verdict::Online { Info } else { Warning };
                self.note(severity, "host.verdict", host, format!("It is {verdict:?} now"));
            }
            NodeOutput::Coordinating(true) => {
                self.note(Info, "coordinator.elected", self.config.host, "It coordinates now".into());
            }
            NodeOutput::Coordinating(false) => {
                let text = "It does not coordinate any more".into();
                self.note(Info, "coordinator.stepped-down", self.config.host, text);
            }
            NodeOutput::FencingStarted(target) => {
                let text = format!("Fencing of boot {} begins", target.generation);
                self.note(Warning, "host.fencing", target.host, text);
            }
            NodeOutput::Fenced(target, evidence) => {
                let why = match evidence {
                    Evidence::PowerOff => "its power was seen off",
                    Evidence::DeadTime => "its dead-time has passed and it has a watchdog",
                    Evidence::Operator => "an operator said so",
                };
                self.note(Error, "host.fenced", target.host, format!("It is gone: {why}"));
            }
            NodeOutput::FenceStuck(target) => {
                let text = "No fence level worked; look at it, then confirm that it is off".into();
                self.note(Error, "host.fence-stuck", target.host, text);
            }
            NodeOutput::Locked(resource, token) => {
                let subject = format!("lock {}:{}", resource.lockspace.0, resource.index);
                self.note(Info, "lock.taken", subject, format!("Its token is {}", token.lver));
            }
            NodeOutput::LeaseLost(lockspace) => {
                let space = self.config.volume(lockspace).map_or("", |v| v.space.as_str());
                let text = "Its lease is lost; the VMs on this volume are killed".into();
                self.note(Error, "lease.lost", format!("volume {space}"), text);
            }
            NodeOutput::Ailing { vm, ailment, .. } => {
                let (kind, text) = match ailment {
                    Ailment::HeartbeatLost => ("vm.hung", "Its guest sends no heartbeats any more"),
                    Ailment::IoStalled => ("vm.stalled", "Its disks complete nothing any more"),
                };
                self.note(Error, kind, format!("vm {}", vm.0), format!("{text}; it is killed"));
            }
            NodeOutput::GaveUp(vm) => {
                let text = "It failed too often; look at it, then retry".into();
                self.note(Error, "vm.gave-up", format!("vm {}", vm.0), text);
            }
            _ => {}
        }
    }

    fn call(&mut self, now: Time, request: ApiRequest, reply: Sender<ApiReply>) {
        let request = match request {
            ApiRequest::Start { spec } => Request::Start(spec),
            ApiRequest::Stop { vm } => Request::Stop(vm),
            ApiRequest::Remove { vm } => Request::Remove(vm),
            ApiRequest::Move { vm, host } => Request::Move(vm, host),
            ApiRequest::Retry { vm } => Request::Retry(vm),
            ApiRequest::Maintenance { host, on } => Request::Maintenance(host, on),
            ApiRequest::Halt { on } => Request::Halt(on),
            query => return self.query(now, query, reply),
        };
        self.waiting.push(Waiting { request, until: now + REQUEST_PATIENCE, reply });
    }

    /// Carries out the requests that wait; the coordinator is not ready while a write is under way.
    fn try_requests(&mut self, now: Time) {
        for waiting in core::mem::take(&mut self.waiting) {
            let leads = self.node.token().is_some();
            let answer = match self.node.request(now, waiting.request.clone()) {
                Ok(()) => {
                    self.step(now, NodeInput::Tick);
                    ApiReply::Done
                }
                Err(RequestError::NotCoordinator) if leads && now < waiting.until => {
                    self.waiting.push(waiting);
                    continue;
                }
                Err(error) => self.refusal(&error),
            };
            // The asker may have gone away.
            let _ = waiting.reply.send(answer);
        }
    }

    fn refusal(&self, error: &dyn std::error::Error) -> ApiReply {
        let source = error.source().map(|s| format!(": {s}")).unwrap_or_default();
        ApiReply::Error { message: format!("{error}{source}"), coordinator: self.node.coordinator() }
    }

    fn query(&mut self, now: Time, request: ApiRequest, reply: Sender<ApiReply>) {
        let answer = match request {
            ApiRequest::Status => ApiReply::Status(self.status(now)),
            ApiRequest::Locks => {
                let locks = self.node.locks().map(|(resource, token)| LockEntry { resource, token });
                ApiReply::Locks(locks.collect())
            }
            ApiRequest::Plan => match self.balance.plan(&self.node) {
                Some(plan) => ApiReply::Plan(plan),
                None => self.refusal(&RequestError::NotCoordinator),
            },
            ApiRequest::ConfirmOff { host } => {
                let known = self.with_node(now, |node, out| node.confirm_off(now, host, out));
                if known { ApiReply::Done } else { self.refusal(&RequestError::BadHost(host)) }
            }
            ApiRequest::Leave => {
                self.step(now, NodeInput::Leave);
                ApiReply::Done
            }
            ApiRequest::Events { after, limit } => {
                let path = self.config.state.join("events");
                match Journal::read(&path, after, limit) {
                    Ok(events) => ApiReply::Events(events),
                    Err(error) => self.refusal(&error),
                }
            }
            ApiRequest::Hosts | ApiRequest::Vms => return self.query_state(request, reply),
            _ => return,
        };
        let _ = reply.send(answer);
    }

    /// Answers from the coordinator's state, or from the store on the other hosts.
    fn query_state(&self, request: ApiRequest, reply: Sender<ApiReply>) {
        let verdicts: Vec<(HostId, Verdict)> =
            self.config.hosts.iter().map(|h| (h.id, self.node.verdict(h.id))).collect();
        let make = move |state: &ClusterState, usage: &dyn Fn(VmId) -> Option<crate::types::Resources>| {
            if request == ApiRequest::Hosts {
                let entry = |(host, verdict): &(HostId, Verdict)| HostEntry {
                    host: *host,
                    verdict: *verdict,
                    record: state.hosts.get(host).cloned(),
                };
                return ApiReply::Hosts(verdicts.iter().map(entry).collect());
            }
            let vms = state.vms.values().cloned();
            ApiReply::Vms(vms.map(|v| VmEntry { usage: usage(v.spec.id), record: v }).collect())
        };
        if let Some(state) = self.node.ha().state() {
            let _ = reply.send(make(state, &|vm| self.node.ha().usage(vm)));
            return;
        }
        self.store.submit(StoreJob::Load(Box::new(move |state| {
            let message = "The cluster store did not answer; look at its members".into();
            let answer = match state {
                Some(state) => make(&state, &|_| None),
                None => ApiReply::Error { message, coordinator: None },
            };
            let _ = reply.send(answer);
        })));
    }

    fn status(&self, now: Time) -> Status {
        let leases = self.config.volumes.iter().zip(self.node.leases());
        let lease = |(v, status): (&super::config::VolumeConfig, LeaseStatus)| match status {
            LeaseStatus::Held { generation, expires } => LeaseEntry {
                space: v.space.clone(),
                generation: Some(generation),
                expires_in: expires.since(now),
            },
            LeaseStatus::None => LeaseEntry { space: v.space.clone(), generation: None, expires_in: 0 },
        };
        let vms = self.node.vms();
        let vms = vms.map(|(vm, v)| LocalEntry { vm, epoch: v.epoch(), status: v.status() });
        Status {
            host: self.node.me(),
            name: self.config.name.clone(),
            quorate: self.node.is_quorate(),
            coordinator: self.node.coordinator(),
            halted: self.node.ha().state().map(|s| s.halted),
            leases: leases.map(lease).collect(),
            watchdog: self.config.watchdog.is_some(),
            vms: vms.collect(),
        }
    }
}

/// A message that cannot be sent is as good as lost; heartbeats show it.
fn report(result: Result<(), crate::adapters::NetError>) {
    if let Err(error) = result {
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        tracing::debug!(%error, source, "a message was not sent");
    }
}

/// A watchdog that cannot be fed resets the host; there is nothing better to do than to say so.
fn guarded(result: Result<(), super::guard::GuardError>) {
    if let Err(error) = result {
        tracing::error!(%error, "the watchdog does not answer");
    }
}
