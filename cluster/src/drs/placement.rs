//! Where a VM starts, and where the VMs of a host in maintenance go.

use super::load::{Fit, Load};
use super::model::{Config, Move, NoPlace, Plan, Snapshot};
use crate::types::{HostId, VmId};

/// The best host for a VM of the snapshot that runs nowhere: the least loaded one that the rules allow.
pub fn place(snapshot: &Snapshot, config: Config, vm: VmId) -> Result<HostId, NoPlace> {
    let mut load = Load::new(snapshot, config);
    let v = snapshot.vms.iter().position(|v| v.id == vm).ok_or(NoPlace::NoRoom)?;
    load.put(v, None);
    let order: Vec<usize> = load.by_load.iter().map(|(_, h)| *h).collect();
    let roomy: Vec<usize> = order
        .into_iter()
        .filter(|h| snapshot.hosts[*h].capacity.minus(load.used[*h]).fits(load.need[v]))
        .collect();
    if roomy.is_empty() {
        return Err(NoPlace::NoRoom);
    }
    let mut allowed: Vec<usize> = roomy.into_iter().filter(|h| load.fit(v, *h) != Fit::Forbidden).collect();
    if allowed.is_empty() {
        return Err(NoPlace::Rules);
    }
    // Stable: within each group the least loaded host stays first.
    allowed.sort_by_key(|h| load.fit(v, *h));
    let best = allowed.into_iter().find(|h| load.reserve_kept_with(v, *h));
    best.map(|h| snapshot.hosts[h].id).ok_or(NoPlace::Reserved)
}

/// Empties a host: every VM, the largest first, to the least loaded host that the rules allow.
pub fn evacuate(snapshot: &Snapshot, config: Config, host: HostId) -> Plan {
    let mut emptied = snapshot.clone();
    for h in &mut emptied.hosts {
        h.maintenance |= h.id == host;
    }
    let mut load = Load::new(&emptied, config);
    let mut plan = Plan::default();
    if let Some(h) = emptied.hosts.iter().position(|h| h.id == host) {
        evacuate_into(&mut load, h, &mut plan);
    }
    plan
}

pub(super) fn evacuate_into(load: &mut Load<'_>, host: usize, plan: &mut Plan) {
    let mut vms = load.on[host].clone();
    vms.sort_by_key(|v| core::cmp::Reverse(load.need[*v].memory));
    let from = load.snapshot.hosts[host].id;
    for vm in vms {
        match load.target(vm, 1000) {
            Some(to) => {
                let v = &load.snapshot.vms[vm];
                plan.moves.push(Move { vm: v.id, from, to: load.snapshot.hosts[to].id, size: v.size });
                load.put(vm, Some(to));
            }
            None if plan.unsolved.last() != Some(&from) => plan.unsolved.push(from),
            None => {}
        }
    }
}
