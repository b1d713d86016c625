//! The coordinator's decisions.

use std::collections::BTreeMap;

use super::admission::{self, HostCapacity, Refusal};
use super::io::{ClusterView, HaConfig, HaInput, HaOutput, Request, RequestError, WriteResult};
use super::records::{
    ClusterState, Command, Evidences, HostRecord, Report, Update, VmPhase, VmRecord, VmSpec, VmStatus,
};
use super::restart::RestartHistory;
use crate::lease::OpId;
use crate::membership::Verdict;
use crate::mutants::{self, Mutant};
use crate::types::{HostId, Incarnation, LockspaceId, Millis, Resources, Time, VmId};

/// How long a VM is kept off a host that it failed on.
const AVOIDANCE: Millis = 30_000;
/// A write carries at most so many updates: etcd refuses more than 128 in a transaction.
const MAX_UPDATES: usize = 100;

#[derive(Clone, Debug)]
pub(super) struct HostInfo {
    pub(super) report: Box<Report>,
    pub(super) at: Time,
}

/// Keeps every VM that should run running, on the coordinator.
#[derive(Clone, Debug)]
pub struct HaManager {
    pub(super) config: HaConfig,
    token: Option<u64>,
    pub(super) state: ClusterState,
    pub(super) loaded: bool,
    since: Time,
    op: OpId,
    pub(super) pending: Option<(OpId, Time, Vec<Update>)>,
    dirty: Vec<Update>,
    pub(super) reports: BTreeMap<HostId, HostInfo>,
    history: RestartHistory,
    /// The life that is isolated, and since when.
    pub(super) isolated_since: BTreeMap<HostId, (u64, Time)>,
    sent: BTreeMap<VmId, Time>,
    changed: BTreeMap<VmId, Time>,
    avoid: BTreeMap<VmId, (HostId, Time)>,
    /// Moves whose source has nothing left while the target still waits.
    orphaned: BTreeMap<VmId, Time>,
}

impl HaManager {
    /// A manager that does nothing until it is elected.
    pub fn new(config: HaConfig) -> Self {
        HaManager {
            config,
            token: None,
            state: ClusterState::default(),
            loaded: false,
            since: Time(0),
            op: 0,
            pending: None,
            dirty: Vec::new(),
            reports: BTreeMap::new(),
            history: RestartHistory::default(),
            isolated_since: BTreeMap::new(),
            sent: BTreeMap::new(),
            changed: BTreeMap::new(),
            avoid: BTreeMap::new(),
            orphaned: BTreeMap::new(),
        }
    }

    /// The state as last written, while this host coordinates.
    pub fn state(&self) -> Option<&ClusterState> {
        self.loaded.then_some(&self.state)
    }

    /// Advances by one input.
    pub fn step(&mut self, now: Time, input: HaInput, view: &dyn ClusterView, out: &mut Vec<HaOutput>) {
        match input {
            HaInput::Elected { token } => {
                *self = HaManager { op: self.op, ..HaManager::new(self.config.clone()) };
                self.token = Some(token);
                self.since = now;
                self.load(now, out);
            }
            HaInput::SteppedDown => {
                self.token = None;
                self.loaded = false;
            }
            HaInput::Loaded { op, state } if self.awaits(op) => {
                if let Some(state) = state {
                    self.pending = None;
                    self.state = state;
                    self.loaded = true;
                }
            }
            HaInput::Written { op, result } if self.awaits(op) => match (result, self.pending.take()) {
                (WriteResult::Done, Some((_, _, updates))) => {
                    for u in updates {
                        self.state.apply(u);
                    }
                }
                (WriteResult::Outdated, _) => {
                    self.token = None;
                    self.loaded = false;
                }
                _ => self.load(now, out),
            },
            HaInput::Report(report) => self.on_report(now, report),
            HaInput::Gone { target, generations } => self.on_gone(target, &generations),
            HaInput::Loaded { .. } | HaInput::Written { .. } | HaInput::Tick => {}
        }
        let Some(token) = self.token else { return };
        if let Some((_, at, _)) = &self.pending {
            if now >= *at + self.config.deadline {
                self.load(now, out);
            }
            return;
        }
        if !self.loaded {
            return;
        }
        // What is left of the last decisions is written before anything is made of it.
        if self.dirty.is_empty() {
            self.judge_hosts(now, view, out);
            self.judge_vms(now, view, out);
            self.place_waiting(now, view);
            self.evacuate(now, view);
        }
        if !self.dirty.is_empty() {
            let updates: Vec<Update> = self.dirty.drain(..self.dirty.len().min(MAX_UPDATES)).collect();
            self.op += 1;
            self.pending = Some((self.op, now, updates.clone()));
            out.push(HaOutput::Write { op: self.op, token, updates });
        }
    }

    fn awaits(&self, op: OpId) -> bool {
        self.token.is_some() && self.pending.as_ref().is_some_and(|p| p.0 == op)
    }

    /// Reads the state anew; what was not written is decided again.
    fn load(&mut self, now: Time, out: &mut Vec<HaOutput>) {
        self.op += 1;
        self.loaded = false;
        self.dirty.clear();
        self.pending = Some((self.op, now, Vec::new()));
        out.push(HaOutput::Load { op: self.op });
    }

    pub(super) fn host_mut(&mut self, host: HostId) -> &mut HostRecord {
        self.state.hosts.entry(host).or_default()
    }

    pub(super) fn write_host(&mut self, host: HostId, record: HostRecord) {
        self.state.hosts.insert(host, record.clone());
        self.dirty.push(Update::Host(host, record));
    }

    pub(super) fn write_vm(&mut self, now: Time, record: VmRecord) {
        let id = record.spec.id;
        self.changed.insert(id, now);
        self.sent.remove(&id);
        self.state.vms.insert(id, record.clone());
        self.dirty.push(Update::Vm(record));
    }

    /// Whether the life that a VM was given to is over.
    fn life_over(&self, place: Incarnation, view: &dyn ClusterView) -> bool {
        if mutants::active(Mutant::FailureIgnored) {
            return false;
        }
        let gone = self.state.hosts.get(&place.host).is_some_and(|h| h.gone_boot >= place.generation);
        gone || view.boot(place.host) > place.generation
            || self.state.hosts.get(&place.host).is_some_and(|h| h.boot > place.generation)
            || view.verdict(place.host) == Verdict::Left
    }

    fn reported(&self, place: Incarnation, vm: VmId, epoch: u64) -> Option<Option<VmStatus>> {
        let info = self.reports.get(&place.host).filter(|i| i.report.from == place)?;
        Some(info.report.vms.iter().find(|r| r.vm == vm && r.epoch == epoch).map(|r| r.status))
    }

    fn judge_vms(&mut self, now: Time, view: &dyn ClusterView, out: &mut Vec<HaOutput>) {
        let ids: Vec<VmId> =
            self.state.vms.iter().filter(|(_, v)| v.place.is_some()).map(|(id, _)| *id).collect();
        for id in ids {
            let record = self.state.vms[&id].clone();
            let Some(place) = record.place else { continue };
            if let VmPhase::Moving { to } = record.phase {
                self.judge_move(now, &record, place, to, view, out);
                continue;
            }
            if self.life_over(place, view) {
                self.lost(now, record, out);
                continue;
            }
            // A move that failed left nothing on its target, which may be the place now.
            let here = |status: &VmStatus| *status != VmStatus::NotReceived;
            let status = self.reported(place, id, record.epoch).map(|s| s.filter(here));
            let since = now.since(*self.changed.entry(id).or_insert(now));
            let wanted = record.wanted && !self.state.halted;
            match (wanted, record.phase, status) {
                // Stopping: repeat until the host has nothing of it.
                (false, _, Some(status))
                    if status.is_none_or(VmStatus::is_over) && since > self.config.repeat =>
                {
                    let phase = VmPhase::Waiting;
                    self.write_vm(now, VmRecord { place: None, phase, ..record });
                }
                // Whoever depends on it stops first.
                (false, ..) if record.wanted && self.is_needed(id) => {}
                (false, ..) => {
                    let epoch = record.epoch;
                    self.send(now, id, place, Command::Stop { vm: id, epoch }, out);
                }
                (true, VmPhase::Starting, Some(Some(VmStatus::Running))) => {
                    self.write_vm(now, VmRecord { phase: VmPhase::Running, ..record });
                }
                (true, _, Some(Some(VmStatus::Refused))) => {
                    self.avoid(now, id, place.host);
                    let phase = VmPhase::Waiting;
                    self.write_vm(now, VmRecord { place: None, phase, ..record });
                }
                (true, phase, Some(Some(end @ (VmStatus::Failed | VmStatus::Stalled)))) => {
                    // Another host may reach the storage.
                    if phase == VmPhase::Starting || end == VmStatus::Stalled {
                        self.avoid(now, id, place.host);
                    }
                    self.lost(now, record, out);
                }
                (true, VmPhase::Starting, None | Some(None)) => {
                    let command = Command::Start {
                        spec: record.spec.clone(),
                        epoch: record.epoch,
                        gone: self.evidences(),
                    };
                    self.send(now, id, place, command, out);
                }
                // The host has no trace of a VM that ran there: it failed.
                (true, VmPhase::Running, Some(None)) if since > self.config.repeat => {
                    self.lost(now, record, out);
                }
                _ => {}
            }
        }
    }

    /// Whether a VM that depends on this one has a host.
    fn is_needed(&self, vm: VmId) -> bool {
        self.state.vms.values().any(|v| v.place.is_some() && v.spec.depends_on.contains(&vm))
    }

    fn judge_move(
        &mut self,
        now: Time,
        record: &VmRecord,
        from: Incarnation,
        to: Incarnation,
        view: &dyn ClusterView,
        out: &mut Vec<HaOutput>,
    ) {
        let (id, epoch, next) = (record.spec.id, record.epoch, record.next_epoch());
        let present = |status: &VmStatus| !status.is_over();
        let at_source = self.reported(from, id, epoch).flatten().filter(present);
        let reported = self.reported(to, id, next);
        let at_target = reported.flatten().filter(present);
        let target_failed = reported.flatten().is_some_and(VmStatus::is_over);
        let source_over = self.life_over(from, view);
        let target_over = self.life_over(to, view);
        let since = now.since(*self.changed.entry(id).or_insert(now));
        let arrived = VmRecord { place: Some(to), epoch: next, ..record.clone() };
        if at_target == Some(VmStatus::Running) && !target_over {
            self.write_vm(now, VmRecord { phase: VmPhase::Running, ..arrived });
        } else if source_over && target_over {
            self.lost(now, record.clone(), out);
        } else if source_over {
            // Whatever the target holds has to go before the VM starts anew.
            self.write_vm(now, VmRecord { phase: VmPhase::Starting, ..arrived });
        } else if target_over || target_failed && at_source.is_some() || since > self.config.patience {
            self.avoid(now, id, to.host);
            self.write_vm(now, VmRecord { phase: VmPhase::Running, ..record.clone() });
        } else if at_source.is_some() || self.reported(from, id, epoch).is_none() {
            if self.due(now, id) {
                let spec = record.spec.clone();
                out.push(HaOutput::Send(to, Command::Receive { spec, epoch: next, from }));
                self.send(now, id, from, Command::Migrate { vm: id, epoch, to }, out);
            }
        } else if at_target.is_none() && reported.is_some() && since > 10_000 {
            // Neither has it.
            self.lost(now, record.clone(), out);
        } else if at_target == Some(VmStatus::Incoming) {
            let orphan = *self.orphaned.entry(id).or_insert(now);
            if now.since(orphan) > 15_000 {
                self.send(now, id, to, Command::Stop { vm: id, epoch: next }, out);
            }
            return;
        }
        self.orphaned.remove(&id);
    }

    /// Keeps a VM off a host that it failed on, for a while.
    fn avoid(&mut self, now: Time, vm: VmId, host: HostId) {
        self.avoid.insert(vm, (host, now + AVOIDANCE));
    }

    /// Whether a VM is kept off a host.
    pub(super) fn avoids(&self, now: Time, vm: VmId, host: HostId) -> bool {
        self.avoid.get(&vm).is_some_and(|(avoided, until)| *avoided == host && now < *until)
    }

    /// Whether a VM has been left alone for a while: a failed move is not tried again at once.
    pub(super) fn may_move(&self, now: Time, vm: VmId) -> bool {
        self.changed.get(&vm).is_none_or(|at| now.since(*at) >= self.config.repeat.saturating_mul(2))
    }

    /// The lease generations that a host's last report named.
    pub fn reported_leases(&self, host: HostId) -> &[u64] {
        self.reports.get(&host).map_or(&[], |i| &i.report.leases)
    }

    /// What a VM uses, as its host last reported it.
    pub fn usage(&self, vm: VmId) -> Option<Resources> {
        let host = self.state.vms.get(&vm)?.place?.host;
        self.reports.get(&host)?.report.vms.iter().find(|r| r.vm == vm)?.usage
    }

    fn due(&self, now: Time, vm: VmId) -> bool {
        self.sent.get(&vm).is_none_or(|at| now >= *at + self.config.repeat)
    }

    fn send(&mut self, now: Time, vm: VmId, to: Incarnation, command: Command, out: &mut Vec<HaOutput>) {
        if self.due(now, vm) {
            self.sent.insert(vm, now);
            out.push(HaOutput::Send(to, command));
        }
    }

    fn lost(&mut self, now: Time, record: VmRecord, out: &mut Vec<HaOutput>) {
        let id = record.spec.id;
        let again = self.history.note(now, id, &self.config.restart);
        let phase = if again { VmPhase::Waiting } else { VmPhase::Failed };
        if !again {
            out.push(HaOutput::GaveUp(id));
        }
        self.write_vm(now, VmRecord { place: None, phase, ..record });
    }

    fn evidences(&self) -> Evidences {
        let mut list = Evidences::new();
        for (host, record) in &self.state.hosts {
            for (n, generation) in (0u8..).zip(&record.gone) {
                if *generation > 0 {
                    list.push((*host, LockspaceId(n), *generation));
                }
            }
        }
        list
    }

    /// The hosts that may take VMs, with what they carry.
    pub(crate) fn candidates(&self, now: Time, view: &dyn ClusterView) -> Vec<HostCapacity> {
        let mut list = Vec::new();
        for (host, record) in &self.state.hosts {
            let Some(info) = self.reports.get(host) else { continue };
            let alive = view.is_mutual(*host)
                && info.report.from.generation == record.boot
                && record.boot > record.gone_boot
                && now.since(info.at) < 30_000;
            if !alive || record.maintenance {
                continue;
            }
            let vms = self.state.vms.values().filter(|v| involves(v, *host)).map(|v| v.spec.demand).collect();
            list.push(HostCapacity { host: *host, capacity: record.capacity, vms, spare: record.spare });
        }
        list
    }

    pub(super) fn sees_volumes(&self, host: HostId, spec: &VmSpec) -> bool {
        let Some(info) = self.reports.get(&host) else { return false };
        spec.disks.iter().all(|d| info.report.leases.get(usize::from(d.lockspace.0)).is_some_and(|g| *g > 0))
    }

    /// Gives waiting VMs a host: by priority, dependencies first, a few at a time.
    fn place_waiting(&mut self, now: Time, view: &dyn ClusterView) {
        // Right after the election the hosts have not reported yet.
        let halted = self.state.halted && !mutants::active(Mutant::HaltIgnored);
        if now.since(self.since) < self.config.repeat.saturating_mul(2) || !view.is_quorate() || halted {
            return;
        }
        let mut queue: Vec<(core::cmp::Reverse<u8>, VmId)> = self
            .state
            .vms
            .iter()
            .filter(|(_, v)| v.wanted && v.place.is_none() && v.phase == VmPhase::Waiting)
            .map(|(id, v)| (core::cmp::Reverse(v.spec.priority), *id))
            .collect();
        if queue.is_empty() {
            return;
        }
        queue.sort_unstable();
        let mut hosts = self.candidates(now, view);
        for (_, id) in queue {
            let record = self.state.vms[&id].clone();
            let ready = record
                .spec
                .depends_on
                .iter()
                .all(|d| self.state.vms.get(d).is_none_or(|v| v.phase == VmPhase::Running || !v.wanted));
            if !ready || now < self.history.earliest(id, &self.config.restart) {
                continue;
            }
            let target = hosts
                .iter()
                .enumerate()
                .filter(|(_, h)| {
                    h.free().fits(record.spec.demand)
                        && !self.avoids(now, id, h.host)
                        && self.starting_on(h.host) < self.config.restart.parallel
                        && self.sees_volumes(h.host, &record.spec)
                })
                .max_by_key(|(_, h)| (!h.spare, h.free().memory, core::cmp::Reverse(h.host)));
            let Some((at, host)) = target.map(|(i, h)| (i, h.host)) else { continue };
            hosts[at].vms.push(record.spec.demand);
            let place = Some(Incarnation { host, generation: self.state.hosts[&host].boot });
            let epoch = record.next_epoch();
            self.write_vm(now, VmRecord { place, epoch, phase: VmPhase::Starting, ..record });
        }
    }

    fn starting_on(&self, host: HostId) -> u32 {
        let starting =
            |v: &&VmRecord| v.phase == VmPhase::Starting && v.place.is_some_and(|p| p.host == host);
        self.state.vms.values().filter(starting).count() as u32
    }

    /// Carries out a request, or says why not. The state is written with the next step.
    pub fn request(
        &mut self,
        now: Time,
        request: Request,
        view: &dyn ClusterView,
    ) -> Result<(), RequestError> {
        if !self.loaded || self.pending.is_some() {
            return Err(RequestError::NotCoordinator);
        }
        let vm = |state: &ClusterState, id: VmId| state.vms.get(&id).cloned().ok_or(RequestError::BadVm(id));
        match request {
            Request::Start(spec) => {
                let old = self.state.vms.get(&spec.id);
                if old.is_some_and(|v| v.wanted || v.place.is_some()) {
                    return Err(RequestError::BadVm(spec.id));
                }
                let epoch = old.map_or(0, |v| v.epoch);
                self.check_admission(now, &spec, view).map_err(RequestError::Refused)?;
                self.history.forget(spec.id);
                self.write_vm(
                    now,
                    VmRecord { spec, wanted: true, place: None, epoch, phase: VmPhase::Waiting },
                );
            }
            Request::Stop(id) => {
                let record = vm(&self.state, id)?;
                if matches!(record.phase, VmPhase::Moving { .. }) {
                    return Err(RequestError::BadVm(id));
                }
                self.write_vm(now, VmRecord { wanted: false, ..record });
            }
            Request::Remove(id) => {
                let record = vm(&self.state, id)?;
                if record.place.is_some() {
                    return Err(RequestError::BadVm(id));
                }
                self.state.vms.remove(&id);
                self.dirty.push(Update::Forget(id));
            }
            Request::Move(id, host) => {
                let record = vm(&self.state, id)?;
                let fits = self.candidates(now, view).iter().any(|h| {
                    h.host == host
                        && h.free().fits(record.spec.demand)
                        && self.sees_volumes(host, &record.spec)
                });
                if !fits {
                    return Err(RequestError::BadHost(host));
                }
                if !record.wanted
                    || record.phase != VmPhase::Running
                    || record.place.is_none_or(|p| p.host == host)
                {
                    return Err(RequestError::BadVm(id));
                }
                let to = Incarnation { host, generation: self.state.hosts[&host].boot };
                self.write_vm(now, VmRecord { phase: VmPhase::Moving { to }, ..record });
            }
            Request::Maintenance(host, on) => {
                let mut record = self.state.hosts.get(&host).cloned().ok_or(RequestError::BadHost(host))?;
                record.maintenance = on;
                self.write_host(host, record);
            }
            Request::Halt(on) => {
                self.state.halted = on;
                self.dirty.push(Update::Halt(on));
            }
            Request::Retry(id) => {
                let record = vm(&self.state, id)?;
                if record.phase != VmPhase::Failed {
                    return Err(RequestError::BadVm(id));
                }
                self.history.forget(id);
                self.write_vm(now, VmRecord { phase: VmPhase::Waiting, ..record });
            }
        }
        Ok(())
    }

    /// Waiting VMs count as placed on the emptiest host, so that a burst of starts cannot eat the reserve.
    fn check_admission(&self, now: Time, spec: &VmSpec, view: &dyn ClusterView) -> Result<(), Refusal> {
        let mut hosts = self.candidates(now, view);
        let emptiest = |hosts: &[HostCapacity]| {
            (0..hosts.len()).max_by_key(|i| (!hosts[*i].spare, hosts[*i].free().memory))
        };
        let waiting = self.state.vms.values().filter(|v| v.wanted && v.place.is_none());
        for v in waiting {
            let at = emptiest(&hosts).ok_or(Refusal::NoRoom)?;
            hosts[at].vms.push(v.spec.demand);
        }
        let at = emptiest(&hosts).ok_or(Refusal::NoRoom)?;
        admission::admit(&self.config.admission, &hosts, hosts[at].host, spec.demand)
    }
}

/// Whether a VM uses room on a host: it is placed there or moves there.
fn involves(v: &VmRecord, host: HostId) -> bool {
    v.place.is_some_and(|p| p.host == host) || matches!(v.phase, VmPhase::Moving { to } if to.host == host)
}
