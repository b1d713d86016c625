//! The keeper's thread: drives the lease and the locks of one lockspace.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use super::{KeeperConfig, KeeperError, KeeperEvent, Resource, Shared};
use crate::adapters::{LeaseVolume, VolumeIo, VolumeReply, VolumeRequest, Watchdog};
use crate::fence::{LocalMonitor, MonitorConfig, MonitorInput, MonitorOutput, VolumeUse};
use crate::lease::{
    DiskLife, IoFailed, LeaseConfig, LeaseHolder, LeaseInput, LeaseObserver, LeaseOutput, LeaseStatus,
    LossReason, OpId,
};
use crate::lock::{DenyReason, LockContext, LockInput, LockMode, LockOutput, Locker, OwnerState};
use crate::types::{Generation, HostId, Incarnation, LockspaceId, Millis, Time, Token};

/// Tells the locks of one keeper apart.
pub(super) type LockId = u64;

/// Whom an I/O request belongs to.
#[derive(Debug)]
pub(super) enum Tag {
    Delta(OpId),
    Scan(Time),
    Lock(LockId, OpId),
}

pub(super) type Reply<T> = Sender<Result<T, KeeperError>>;

/// What the thread waits for.
#[derive(Debug)]
pub(super) enum Input {
    Io(Tag, Result<VolumeReply, IoFailed>),
    WaitHeld { end: Time, reply: Reply<Generation> },
    Lock { resource: Resource, mode: LockMode, end: Time, reply: Reply<(LockId, Token)> },
    Release { id: LockId, reply: Option<Reply<()>> },
    HandOver { id: LockId, to: HostId, reply: Reply<Token> },
    Gone(HostId),
    Shutdown,
}

/// What a caller waits for, with the time to try again and the time to give up.
#[derive(Debug)]
enum Waiter {
    None,
    Lock { mode: LockMode, end: Time, retry: Option<Time>, reply: Reply<(LockId, Token)> },
    Release(Option<Reply<()>>),
    HandOver(Reply<Token>),
}

#[derive(Debug)]
struct Slot {
    resource: Resource,
    locker: Locker,
    wake: Time,
    waiter: Waiter,
}

/// What the locks may know of the lockspace, at one moment.
struct Context<'a> {
    now: Time,
    me: HostId,
    watchdogs: bool,
    lease: &'a LeaseHolder,
    observer: &'a LeaseObserver,
    gone: &'a BTreeMap<HostId, Generation>,
}

impl LockContext for Context<'_> {
    fn owner(&self, owner: Incarnation) -> OwnerState {
        if owner.host == self.me {
            let same = self.fresh_generation() == Some(owner.generation);
            return if same { OwnerState::Alive } else { OwnerState::Gone };
        }
        let fenced = self.gone.get(&owner.host).is_some_and(|g| *g >= owner.generation);
        let restarted = self.observer.generation(owner.host) > owner.generation;
        let silent = match self.observer.life(owner.host) {
            DiskLife::Free => true,
            DiskLife::Dead => self.watchdogs,
            _ => false,
        };
        if fenced || restarted || silent { OwnerState::Gone } else { OwnerState::Alive }
    }

    fn fresh_generation(&self) -> Option<Generation> {
        match self.lease.status() {
            LeaseStatus::Held { generation, .. } if self.lease.is_fresh(self.now) => Some(generation),
            _ => None,
        }
    }
}

pub(super) struct Engine {
    config: KeeperConfig,
    shared: Arc<Shared>,
    io: VolumeIo<Tag>,
    lease: LeaseHolder,
    lease_wake: Time,
    observer: LeaseObserver,
    next_scan: Time,
    gone: BTreeMap<HostId, Generation>,
    monitor: LocalMonitor,
    monitor_wake: Time,
    watchdog: Option<Watchdog>,
    slots: BTreeMap<LockId, Slot>,
    /// Lockers that are not in use: they remember that a late write of theirs may still land.
    idle: BTreeMap<u32, Locker>,
    last_id: LockId,
    waiting: Vec<(Time, Reply<Generation>)>,
    /// The number is another host's: do not try again.
    refused: bool,
    /// Give everything back, and end at this time at the latest.
    ending: Option<Time>,
}

impl Engine {
    pub(super) fn new(
        config: KeeperConfig,
        volume: LeaseVolume,
        watchdog: Option<Watchdog>,
        shared: Arc<Shared>,
    ) -> std::io::Result<Self> {
        let commands = shared.commands.clone();
        let io = VolumeIo::start(volume, shared.clock, move |tag, result| {
            // After the thread has ended nobody waits for the outcome.
            let _ = commands.send(Input::Io(tag, result));
        })?;
        let lease =
            LeaseHolder::new(LeaseConfig { host: config.host, name: config.name, timing: config.timing });
        let timeout = if watchdog.is_some() { config.timing.watchdog() } else { 0 };
        let now = shared.clock.now();
        Ok(Engine {
            shared,
            io,
            lease,
            lease_wake: now,
            observer: LeaseObserver::new(config.timing),
            next_scan: now,
            gone: BTreeMap::new(),
            monitor: LocalMonitor::new(MonitorConfig { watchdog: timeout }),
            monitor_wake: now,
            watchdog,
            slots: BTreeMap::new(),
            idle: BTreeMap::new(),
            last_id: 0,
            waiting: Vec::new(),
            refused: false,
            ending: None,
            config,
        })
    }

    pub(super) fn run(mut self, inputs: &Receiver<Input>) {
        let now = self.shared.clock.now();
        self.lease_input(now, LeaseInput::Acquire);
        loop {
            let now = self.shared.clock.now();
            let wait = Duration::from_millis(self.next_wake().since(now).min(60_000));
            let input = inputs.recv_timeout(wait);
            let now = self.shared.clock.now();
            match input {
                Ok(input) => self.handle(now, input),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.run_due(now);
            if self.ended(now) {
                return;
            }
        }
    }

    fn next_wake(&self) -> Time {
        let mut wake = self.lease_wake.min(self.next_scan).min(self.monitor_wake);
        for slot in self.slots.values() {
            wake = wake.min(slot.wake);
            if let Waiter::Lock { retry: Some(at), .. } = slot.waiter {
                wake = wake.min(at);
            }
        }
        for (end, _) in &self.waiting {
            wake = wake.min(*end);
        }
        self.ending.map_or(wake, |end| wake.min(end))
    }

    fn handle(&mut self, now: Time, input: Input) {
        match input {
            Input::Io(Tag::Delta(op), result) => {
                let input = match result {
                    Ok(VolumeReply::Delta(record)) => LeaseInput::Read { op, result: Ok(record) },
                    Ok(_) => LeaseInput::Wrote { op, result: Ok(()) },
                    // A failed read and a failed write are one to the holder.
                    Err(IoFailed) => LeaseInput::Wrote { op, result: Err(IoFailed) },
                };
                self.lease_input(now, input);
            }
            Input::Io(Tag::Scan(started), Ok(VolumeReply::Space(records))) => {
                for (n, record) in (1u16..).zip(records) {
                    self.observer.observe(started, now, HostId(n), record);
                }
            }
            Input::Io(Tag::Scan(_), _) => {}
            Input::Io(Tag::Lock(id, op), result) => {
                let input = match result {
                    Ok(VolumeReply::Leader(leader)) => LockInput::LeaderRead { op, result: Ok(leader) },
                    Ok(VolumeReply::Blocks(blocks)) => LockInput::BlocksRead { op, result: Ok(blocks) },
                    Ok(_) => LockInput::Wrote { op, result: Ok(()) },
                    Err(IoFailed) => LockInput::Wrote { op, result: Err(IoFailed) },
                };
                self.lock_input(now, id, input);
            }
            Input::WaitHeld { end, reply } => self.waiting.push((end, reply)),
            Input::Lock { resource, mode, end, reply } => self.take(now, resource, mode, end, reply),
            Input::Release { id, reply } => self.give_back(now, id, reply),
            Input::HandOver { id, to, reply } => self.hand_over(now, id, to, reply),
            Input::Gone(host) => {
                let seen = self.observer.generation(host);
                let known = self.gone.entry(host).or_default();
                *known = seen.max(*known);
            }
            Input::Shutdown => self.ending = Some(now + 4 * self.config.timing.io()),
        }
    }

    fn take(
        &mut self,
        now: Time,
        resource: Resource,
        mode: LockMode,
        end: Time,
        reply: Reply<(LockId, Token)>,
    ) {
        if self.slots.values().any(|s| s.resource.index == resource.index) {
            // The caller waits for the answer: it has not gone away.
            let _ = reply.send(Err(KeeperError::Denied(DenyReason::Busy)));
            return;
        }
        self.last_id += 1;
        let locker = self.idle.remove(&resource.index);
        let locker = locker.unwrap_or_else(|| Locker::new(self.config.host, self.config.timing));
        let waiter = Waiter::Lock { mode, end, retry: Some(now), reply };
        self.slots.insert(self.last_id, Slot { resource, locker, wake: Time(u64::MAX), waiter });
    }

    fn forget(&mut self, id: LockId) {
        if let Some(slot) = self.slots.remove(&id) {
            self.idle.insert(slot.resource.index, slot.locker);
        }
    }

    /// How many locks are, or were, in somebody's hands and not given back.
    fn users(&self) -> usize {
        self.slots.values().filter(|s| !matches!(s.waiter, Waiter::Lock { .. })).count()
    }

    fn give_back(&mut self, now: Time, id: LockId, reply: Option<Reply<()>>) {
        let Some(slot) = self.slots.get_mut(&id) else {
            if let Some(reply) = reply {
                let _ = reply.send(Ok(()));
            }
            return;
        };
        if slot.locker.held().is_none() {
            // The lease was lost meanwhile, and the lock with it.
            self.forget(id);
            if let Some(reply) = reply {
                let _ = reply.send(Err(KeeperError::Lost(LossReason::Expired)));
            }
            return;
        }
        slot.waiter = Waiter::Release(reply);
        self.lock_input(now, id, LockInput::Release);
    }

    fn hand_over(&mut self, now: Time, id: LockId, to: HostId, reply: Reply<Token>) {
        let generation = self.observer.generation(to);
        let Some(slot) = self.slots.get_mut(&id).filter(|s| s.locker.held().is_some()) else {
            let _ = reply.send(Err(KeeperError::Lost(LossReason::Expired)));
            return;
        };
        if generation == 0 || self.observer.life(to) == DiskLife::Free || to == self.config.host {
            let _ = reply.send(Err(KeeperError::BadHost(to)));
            return;
        }
        if !matches!(slot.locker.held(), Some((LockMode::Exclusive, _))) {
            let _ = reply.send(Err(KeeperError::Denied(DenyReason::Busy)));
            return;
        }
        slot.waiter = Waiter::HandOver(reply);
        self.lock_input(now, id, LockInput::HandOver(Incarnation { host: to, generation }));
    }

    fn lease_input(&mut self, now: Time, input: LeaseInput) {
        let mut out = Vec::new();
        self.lease_wake = Time(u64::MAX);
        self.lease.step(now, input, &mut out);
        let deadline = now + self.config.timing.io();
        for output in out {
            match output {
                LeaseOutput::Read { op } => {
                    self.io.submit(Tag::Delta(op), VolumeRequest::ReadDelta(self.config.host), deadline);
                }
                LeaseOutput::Write { op, record } => {
                    let request = VolumeRequest::WriteDelta(self.config.host, record);
                    self.io.submit(Tag::Delta(op), request, deadline);
                }
                LeaseOutput::Acquired { generation } => {
                    self.publish(None);
                    self.shared.events.push(KeeperEvent::Acquired(generation));
                }
                LeaseOutput::Renewed => {
                    self.publish(None);
                    self.shared.events.push(KeeperEvent::Renewed);
                }
                LeaseOutput::Warning => self.shared.events.push(KeeperEvent::Warning),
                LeaseOutput::Lost(reason) => {
                    self.refused = reason == LossReason::NumberInUse;
                    self.publish(Some(reason));
                    let ids: Vec<LockId> = self.slots.keys().copied().collect();
                    for id in ids {
                        self.lock_input(now, id, LockInput::Abandon);
                    }
                    self.shared.events.push(KeeperEvent::Lost(reason));
                    self.monitor_wake = now;
                }
                LeaseOutput::Released => self.publish(None),
                LeaseOutput::WakeAt(at) => self.lease_wake = self.lease_wake.min(at),
            }
        }
    }

    /// Lets other threads see the lease as it is now.
    fn publish(&self, lost: Option<LossReason>) {
        let mut status = self.shared.status();
        (status.generation, status.trusted_until) = match self.lease.status() {
            LeaseStatus::Held { generation, expires } => {
                (Some(generation), expires - self.config.timing.margin())
            }
            LeaseStatus::None => (None, Time(0)),
        };
        status.lost = lost;
    }

    fn lock_input(&mut self, now: Time, id: LockId, input: LockInput) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let context = Context {
            now,
            me: self.config.host,
            watchdogs: self.config.watchdogs,
            lease: &self.lease,
            observer: &self.observer,
            gone: &self.gone,
        };
        let mut out = Vec::new();
        slot.wake = Time(u64::MAX);
        slot.locker.step(now, input, &context, &mut out);
        let Resource { index, name } = slot.resource;
        let (host, hosts) = (self.config.host, self.config.hosts);
        let deadline = now + self.config.timing.io();
        for output in out {
            let (op, request) = match output {
                LockOutput::ReadLeader { op } => (op, VolumeRequest::ReadLeader(index, name)),
                LockOutput::ReadBlocks { op } => (op, VolumeRequest::ReadBlocks(index, hosts)),
                LockOutput::WriteBlock { op, block } => (op, VolumeRequest::WriteBlock(index, host, block)),
                LockOutput::WriteLeader { op, leader } => {
                    (op, VolumeRequest::WriteLeader(index, name, leader))
                }
                LockOutput::WakeAt(at) => {
                    if let Some(slot) = self.slots.get_mut(&id) {
                        slot.wake = slot.wake.min(at);
                    }
                    continue;
                }
                event => {
                    self.on_lock(now, id, event);
                    continue;
                }
            };
            self.io.submit(Tag::Lock(id, op), request, deadline);
        }
    }

    /// Hands a lock's announcement to whoever waits for it.
    fn on_lock(&mut self, now: Time, id: LockId, event: LockOutput) {
        let retry = self.retry();
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let waiter = core::mem::replace(&mut slot.waiter, Waiter::None);
        match (waiter, event) {
            (Waiter::Lock { reply, .. }, LockOutput::Acquired(token)) => {
                self.monitor_wake = now;
                if reply.send(Ok((id, token))).is_err() {
                    self.give_back(now, id, None);
                }
            }
            (Waiter::Lock { mode, end, reply, .. }, LockOutput::Denied(reason)) => {
                let at = now + retry;
                if reason == DenyReason::Busy || at > end {
                    self.forget(id);
                    let _ = reply.send(Err(KeeperError::Denied(reason)));
                } else {
                    slot.waiter = Waiter::Lock { mode, end, retry: Some(at), reply };
                }
            }
            (Waiter::Release(reply), LockOutput::Released | LockOutput::Denied(_)) => {
                self.forget(id);
                if let Some(reply) = reply {
                    let lost = KeeperError::Lost(LossReason::Expired);
                    let _ = reply.send(if event == LockOutput::Released { Ok(()) } else { Err(lost) });
                }
            }
            (Waiter::HandOver(reply), LockOutput::HandedOver(token)) => {
                self.forget(id);
                let _ = reply.send(Ok(token));
            }
            (Waiter::HandOver(reply), LockOutput::HandOverFailed { still_ours }) => {
                let error = if still_ours {
                    KeeperError::Denied(DenyReason::Io)
                } else {
                    self.forget(id);
                    KeeperError::HandOver
                };
                let _ = reply.send(Err(error));
            }
            (waiter, _) => slot.waiter = waiter,
        }
    }

    /// How soon a lock that another host holds is tried again.
    fn retry(&self) -> Millis {
        (self.config.timing.io() / 20).clamp(50, 1000)
    }

    fn run_due(&mut self, now: Time) {
        if now >= self.lease_wake {
            self.lease_input(now, LeaseInput::Tick);
        }
        if self.ending.is_none() && self.lease.is_idle() && !self.refused && self.users() == 0 {
            // Taken again once nothing of the former generation is left.
            self.lease_input(now, LeaseInput::Acquire);
        }
        if now >= self.next_scan {
            self.next_scan = now + self.config.timing.io();
            let request = VolumeRequest::ReadSpace(self.config.hosts);
            self.io.submit(Tag::Scan(now), request, self.next_scan);
        }
        self.answer_waiting(now);
        let due: Vec<LockId> = self.slots.iter().filter(|(_, s)| now >= s.wake).map(|(id, _)| *id).collect();
        for id in due {
            self.lock_input(now, id, LockInput::Tick);
        }
        self.retry_locks(now);
        if now >= self.monitor_wake {
            self.run_monitor(now, MonitorInput::Tick);
        }
    }

    fn retry_locks(&mut self, now: Time) {
        let ids: Vec<LockId> = self.slots.keys().copied().collect();
        for id in ids {
            let Some(slot) = self.slots.get_mut(&id) else { continue };
            if let Waiter::Lock { mode, retry: retry @ Some(_), .. } = &mut slot.waiter
                && retry.is_some_and(|at| now >= at)
            {
                *retry = None;
                let mode = *mode;
                self.lock_input(now, id, LockInput::Acquire(mode));
            }
        }
    }

    fn answer_waiting(&mut self, now: Time) {
        let (generation, lost) = {
            let status = self.shared.status();
            (status.generation, status.lost)
        };
        let refused = lost.filter(|_| self.refused);
        self.waiting.retain(|(end, reply)| {
            let answer = match (generation, refused) {
                (Some(generation), _) => Ok(generation),
                (None, Some(reason)) => Err(KeeperError::Lost(reason)),
                (None, None) if now >= *end => Err(KeeperError::TimedOut),
                (None, None) => return true,
            };
            let _ = reply.send(answer);
            false
        });
    }

    fn run_monitor(&mut self, now: Time, input: MonitorInput) {
        let trusted_until = match self.lease.status() {
            LeaseStatus::Held { expires, .. } => Some(expires - self.config.timing.margin()),
            LeaseStatus::None => None,
        };
        let volume = VolumeUse { lockspace: LockspaceId(0), trusted_until, users: self.users() as u32 };
        let mut out = Vec::new();
        self.monitor_wake = now + self.monitor.interval();
        self.monitor.step(now, input, &[volume], &mut out);
        for output in out {
            let fed = match (&mut self.watchdog, output) {
                (Some(watchdog), MonitorOutput::Feed) => watchdog.feed(),
                (Some(watchdog), MonitorOutput::Disarm) => watchdog.disarm(),
                (_, MonitorOutput::WakeAt(at)) => {
                    self.monitor_wake = self.monitor_wake.min(at);
                    continue;
                }
                // The users were told by `Lost`; the watchdog stands behind that.
                _ => continue,
            };
            if let Err(error) = fed {
                tracing::error!(%error, "the watchdog does not answer");
            }
        }
    }

    /// Gives everything back, locks first; true when nothing is left or the time is over.
    fn ended(&mut self, now: Time) -> bool {
        let Some(end) = self.ending else { return false };
        if now >= end {
            return true;
        }
        if !self.slots.is_empty() {
            return false;
        }
        if self.lease.is_wanted() {
            self.lease_input(now, LeaseInput::Release);
        }
        if !self.lease.is_idle() {
            return false;
        }
        self.run_monitor(now, MonitorInput::Disarm);
        true
    }
}
