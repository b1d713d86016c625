//! What the coordinator decides about hosts.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{
    ClusterState, ClusterView, Command, HaConfig, HaInput, HaManager, HaOutput, HostRecord, Report, Request,
    Update, VmPhase, VmRecord, VmReport, VmSpec, VmStatus, WriteResult,
};
use crate::membership::Verdict;
use crate::types::{HostId, Incarnation, Resources, Time, VmId};

/// What is known of host 2.
#[derive(Clone, Copy)]
struct Seen {
    verdict: Verdict,
    mutual: bool,
    boot: u64,
}

/// Host 2 is heard, and hears us or not.
fn hears(mutual: bool) -> Seen {
    Seen { verdict: Verdict::Online, mutual, boot: 1 }
}

impl ClusterView for Seen {
    fn verdict(&self, _: HostId) -> Verdict {
        self.verdict
    }
    fn is_mutual(&self, _: HostId) -> bool {
        self.mutual
    }
    fn boot(&self, _: HostId) -> u64 {
        self.boot
    }
    fn is_quorate(&self) -> bool {
        true
    }
}

#[test]
fn a_host_that_does_not_hear_the_coordinator_is_fenced_after_the_patience_for_isolated_ones() {
    let config = HaConfig::default();
    let isolation = config.isolation;
    let mut manager = HaManager::new(config);
    let mut step = |now, input, mutual| {
        let mut out = Vec::new();
        manager.step(Time(now), input, &hears(mutual), &mut out);
        out
    };
    let out = step(0, HaInput::Elected { token: 1 }, true);
    let [HaOutput::Load { op }] = out[..] else { panic!("{out:?}") };
    let mut state = ClusterState::default();
    state.hosts.insert(HostId(2), HostRecord { boot: 1, ..HostRecord::default() });
    step(1, HaInput::Loaded { op, state: Some(state) }, true);
    let fence = HaOutput::Fence(Incarnation { host: HostId(2), generation: 1 });
    assert!(!step(1000, HaInput::Tick, false).contains(&fence));
    assert!(!step(999 + isolation, HaInput::Tick, false).contains(&fence));
    assert!(step(1000 + isolation, HaInput::Tick, false).contains(&fence));
    // It hears us again: the clock starts anew.
    assert!(step(1001 + isolation, HaInput::Tick, true).contains(&HaOutput::CancelFence(HostId(2))));
    assert!(!step(1002 + isolation, HaInput::Tick, false).contains(&fence));
}

#[test]
fn a_new_life_of_a_host_that_was_fenced_while_isolated_has_all_of_the_patience_again() {
    let config = HaConfig::default();
    let isolation = config.isolation;
    let mut manager = HaManager::new(config);
    let mut step = |now, input, seen| {
        let mut out = Vec::new();
        manager.step(Time(now), input, &seen, &mut out);
        out
    };
    let fence = |generation| HaOutput::Fence(Incarnation { host: HostId(2), generation });
    let isolated = Seen { verdict: Verdict::Isolated, mutual: false, boot: 1 };
    let [HaOutput::Load { op }] = step(0, HaInput::Elected { token: 1 }, isolated)[..] else { panic!() };
    let mut state = ClusterState::default();
    state.hosts.insert(HostId(2), HostRecord { boot: 1, ..HostRecord::default() });
    step(1, HaInput::Loaded { op, state: Some(state) }, isolated);
    assert!(step(1 + isolation, HaInput::Tick, isolated).contains(&fence(1)));
    let gone = HaInput::Gone { target: Incarnation { host: HostId(2), generation: 1 }, generations: vec![] };
    let out = step(2 + isolation, gone, isolated);
    let op = out.iter().find_map(|o| if let HaOutput::Write { op, .. } = o { Some(*op) } else { None });
    let written = HaInput::Written { op: op.expect("the end is written"), result: WriteResult::Done };
    step(3 + isolation, written, isolated);
    // It is switched on before its old lease has run out, and does not hear us yet.
    let new = Seen { verdict: Verdict::Online, mutual: false, boot: 2 };
    assert!(!step(4 + isolation, HaInput::Tick, new).contains(&fence(2)));
    assert!(!step(3 + 2 * isolation, HaInput::Tick, new).contains(&fence(2)));
    assert!(step(4 + 2 * isolation, HaInput::Tick, new).contains(&fence(2)));
}

#[test]
fn the_loss_of_a_host_with_many_vms_is_written_in_parts_that_a_store_takes() {
    let mut manager = HaManager::new(HaConfig::default());
    let mut step = |now, input| {
        let mut out = Vec::new();
        manager.step(Time(now), input, &hears(true), &mut out);
        out
    };
    let [HaOutput::Load { mut op }] = step(0, HaInput::Elected { token: 1 })[..] else { panic!() };
    let mut state = ClusterState::default();
    // The life that the VMs were given to is over.
    state.hosts.insert(HostId(2), HostRecord { boot: 1, gone_boot: 1, ..HostRecord::default() });
    let place = Some(Incarnation { host: HostId(2), generation: 1 });
    for id in (1..=250).map(VmId) {
        let spec = Arc::new(VmSpec { id, ..VmSpec::default() });
        state.vms.insert(id, VmRecord { spec, wanted: true, place, epoch: 1, phase: VmPhase::Running });
    }
    let mut answer = HaInput::Loaded { op, state: Some(state) };
    let (mut sizes, mut freed) = (Vec::new(), BTreeSet::new());
    for now in 1.. {
        let out = step(now, answer.clone());
        let Some(HaOutput::Write { op: written, updates, .. }) =
            out.into_iter().find(|o| matches!(o, HaOutput::Write { .. }))
        else {
            break;
        };
        sizes.push(updates.len());
        freed.extend(updates.iter().filter_map(|u| match u {
            Update::Vm(record) if record.place.is_none() => Some(record.spec.id),
            _ => None,
        }));
        op = written;
        answer = HaInput::Written { op, result: WriteResult::Done };
    }
    assert_eq!((sizes.as_slice(), freed.len()), (&[100, 100, 50][..], 250));
}

#[test]
fn the_highest_epoch_has_no_successor_and_is_no_overflow() {
    let mut manager = HaManager::new(HaConfig::default());
    let mut step = |now, input| {
        let mut out = Vec::new();
        manager.step(Time(now), input, &hears(true), &mut out);
        out
    };
    let [HaOutput::Load { op }] = step(0, HaInput::Elected { token: 1 })[..] else { panic!() };
    let life = Incarnation { host: HostId(2), generation: 1 };
    let capacity = Resources { cpu: 10, memory: 10 };
    let mut state = ClusterState::default();
    state.hosts.insert(life.host, HostRecord { boot: 1, capacity, ..HostRecord::default() });
    let moving = (Some(life), VmPhase::Moving { to: life });
    for (id, (place, phase)) in [(VmId(1), moving), (VmId(2), (None, VmPhase::Waiting))] {
        let spec = Arc::new(VmSpec { id, ..VmSpec::default() });
        state.vms.insert(id, VmRecord { spec, wanted: true, place, epoch: u64::MAX, phase });
    }
    step(1, HaInput::Loaded { op, state: Some(state) });
    let (leases, vms) = (Vec::new(), Vec::new());
    let report = Report { from: life, seq: 1, capacity, watchdog: false, leases, vms };
    let out = step(60_000, HaInput::Report(Box::new(report)));
    let placed = out.iter().any(|o| match o {
        HaOutput::Write { updates, .. } => updates.iter().any(
            |u| matches!(u, Update::Vm(v) if (v.spec.id, v.place, v.epoch) == (VmId(2), Some(life), u64::MAX)),
        ),
        _ => false,
    });
    assert!(placed, "{out:?}");
}

#[test]
fn a_shut_down_cluster_stops_dependents_first_starts_nothing_and_begins_again() {
    let mut manager = HaManager::new(HaConfig { repeat: 1, ..HaConfig::default() });
    let (host, boot) = (HostId(2), 1);
    let place = Incarnation { host, generation: boot };
    let capacity = Resources { cpu: 10, memory: 10 };
    let mut state = ClusterState::default();
    state.hosts.insert(host, HostRecord { boot, capacity, ..HostRecord::default() });
    // VM 2 depends on VM 1.
    for (id, depends_on) in [(VmId(1), vec![]), (VmId(2), vec![VmId(1)])] {
        let spec = Arc::new(VmSpec { id, depends_on, ..VmSpec::default() });
        let record = VmRecord { spec, wanted: true, place: Some(place), epoch: 1, phase: VmPhase::Running };
        state.vms.insert(id, record);
    }
    let mut inputs = vec![HaInput::Elected { token: 1 }];
    let (mut running, mut log) = (BTreeSet::from([(VmId(1), 1), (VmId(2), 1)]), Vec::new());
    for now in 1..200 {
        match now {
            50 => manager.request(Time(now), Request::Halt(true), &hears(true)).unwrap(),
            100 => {
                assert!(running.is_empty(), "{running:?}");
                assert!(manager.state().unwrap().vms.values().all(|v| v.wanted && v.place.is_none()));
                manager.request(Time(now), Request::Halt(false), &hears(true)).unwrap();
            }
            _ => {}
        }
        let vms = running.iter().map(|(vm, epoch)| VmReport {
            vm: *vm,
            epoch: *epoch,
            status: VmStatus::Running,
            usage: None,
        });
        let (leases, vms) = (Vec::new(), vms.collect());
        inputs.push(HaInput::Report(Box::new(Report {
            from: place,
            seq: now,
            capacity,
            watchdog: false,
            leases,
            vms,
        })));
        for input in core::mem::take(&mut inputs) {
            let mut out = Vec::new();
            manager.step(Time(now), input, &hears(true), &mut out);
            for output in out {
                match output {
                    HaOutput::Load { op } => inputs.push(HaInput::Loaded { op, state: Some(state.clone()) }),
                    HaOutput::Write { op, .. } => {
                        inputs.push(HaInput::Written { op, result: WriteResult::Done });
                    }
                    HaOutput::Send(_, Command::Stop { vm, epoch }) if running.remove(&(vm, epoch)) => {
                        log.push((vm.0, false));
                    }
                    HaOutput::Send(_, Command::Start { spec, epoch, .. })
                        if running.insert((spec.id, epoch)) =>
                    {
                        log.push((spec.id.0, true));
                    }
                    _ => {}
                }
            }
        }
    }
    assert_eq!(log, [(2, false), (1, false), (1, true), (2, true)]);
}
