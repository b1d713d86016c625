//! Emptying hosts in maintenance by moving their VMs while they run.

use super::io::ClusterView;
use super::manager::HaManager;
use super::records::{VmPhase, VmRecord};
use crate::types::{HostId, Incarnation, Time, VmId};

impl HaManager {
    /// Moves VMs away from hosts in maintenance, at most `parallel` at once from each.
    pub(super) fn evacuate(&mut self, now: Time, view: &dyn ClusterView) {
        if self.state.halted {
            return;
        }
        let sources: Vec<HostId> =
            self.state.hosts.iter().filter(|(_, h)| h.maintenance).map(|(id, _)| *id).collect();
        for source in sources {
            let leaving = |v: &&VmRecord| v.place.is_some_and(|p| p.host == source);
            let moving = self
                .state
                .vms
                .values()
                .filter(leaving)
                .filter(|v| matches!(v.phase, VmPhase::Moving { .. }))
                .count() as u32;
            let room = self.config.restart.parallel.saturating_sub(moving);
            let next: Vec<VmId> = self
                .state
                .vms
                .values()
                .filter(leaving)
                .filter(|v| v.wanted && v.phase == VmPhase::Running && self.may_move(now, v.spec.id))
                .take(room as usize)
                .map(|v| v.spec.id)
                .collect();
            for id in next {
                let record = self.state.vms[&id].clone();
                let target = self
                    .candidates(now, view)
                    .into_iter()
                    .filter(|h| {
                        h.host != source
                            && h.free().fits(record.spec.demand)
                            && !self.avoids(now, id, h.host)
                            && self.sees_volumes(h.host, &record.spec)
                    })
                    .max_by_key(|h| (!h.spare, h.free().memory));
                if let Some(target) = target {
                    let generation = self.state.hosts[&target.host].boot;
                    let to = Incarnation { host: target.host, generation };
                    self.write_vm(now, VmRecord { phase: VmPhase::Moving { to }, ..record });
                }
            }
        }
    }
}
