//! What the coordinator decides about hosts.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{
    ClusterState, ClusterView, HaConfig, HaInput, HaManager, HaOutput, HostRecord, Update, VmPhase, VmRecord,
    VmSpec, WriteResult,
};
use crate::membership::Verdict;
use crate::types::{HostId, Incarnation, Time, VmId};

/// Host 2 is heard, and hears us or not.
struct Hears(bool);

impl ClusterView for Hears {
    fn verdict(&self, _: HostId) -> Verdict {
        Verdict::Online
    }
    fn is_mutual(&self, _: HostId) -> bool {
        self.0
    }
    fn boot(&self, _: HostId) -> u64 {
        1
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
    let mut step = |now, input, hears| {
        let mut out = Vec::new();
        manager.step(Time(now), input, &Hears(hears), &mut out);
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
fn the_loss_of_a_host_with_many_vms_is_written_in_parts_that_a_store_takes() {
    let mut manager = HaManager::new(HaConfig::default());
    let mut step = |now, input| {
        let mut out = Vec::new();
        manager.step(Time(now), input, &Hears(true), &mut out);
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
