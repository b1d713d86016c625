//! What the coordinator decides about hosts.

use super::{ClusterState, ClusterView, HaConfig, HaInput, HaManager, HaOutput, HostRecord};
use crate::membership::Verdict;
use crate::types::{HostId, Incarnation, Time};

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
