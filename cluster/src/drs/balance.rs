//! Relieving overloaded hosts.

use std::collections::BTreeMap;

use super::load::{Fit, Load};
use super::model::{Config, Move, Plan, Snapshot};
use super::placement::evacuate_into;
use crate::types::{HostId, Resources};

/// Plans moves once; see [`Balancer`] for the hold time.
///
/// First hosts in maintenance are emptied and broken must rules mended, then overloaded hosts relieved.
pub fn balance(snapshot: &Snapshot, config: Config) -> Plan {
    let mut load = Load::new(snapshot, config);
    let mut plan = Plan::default();
    for h in 0..snapshot.hosts.len() {
        if snapshot.hosts[h].maintenance {
            evacuate_into(&mut load, h, &mut plan);
        }
    }
    mend_rules(&mut load, &mut plan);
    let mut overloaded: Vec<usize> = (0..snapshot.hosts.len()).filter(|h| over(&load, *h)).collect();
    // The worst first: it has the fewest ways out.
    overloaded.sort_by_key(|h| core::cmp::Reverse(load.load_of(*h)));
    for h in overloaded {
        if !relieve(&mut load, h, &mut plan) {
            plan.unsolved.push(snapshot.hosts[h].id);
        }
    }
    plan
}

fn over(load: &Load<'_>, host: usize) -> bool {
    load.excess(host) != Resources::default()
}

fn record(load: &mut Load<'_>, vm: usize, to: usize, plan: &mut Plan) {
    let Some(from) = load.at[vm] else { return };
    let v = &load.snapshot.vms[vm];
    plan.moves.push(Move {
        vm: v.id,
        from: load.snapshot.hosts[from].id,
        to: load.snapshot.hosts[to].id,
        size: v.size,
    });
    load.put(vm, Some(to));
}

fn mend_rules(load: &mut Load<'_>, plan: &mut Plan) {
    let limit = u64::from(load.config.threshold) * 10;
    for vm in 0..load.snapshot.vms.len() {
        let Some(host) = load.at[vm] else { continue };
        if load.fit(vm, host) == Fit::Forbidden
            && plan.moves.len() < load.config.moves as usize
            && let Some(to) = load.target(vm, limit)
            && load.fit(vm, to) != Fit::Forbidden
        {
            record(load, vm, to, plan);
        }
    }
}

/// How much of the excess a VM takes away, in thousandths of a percentage point of the host.
fn relief(load: &Load<'_>, host: usize, excess: Resources, vm: usize) -> u64 {
    let c = load.snapshot.hosts[host].capacity;
    let need = load.need[vm];
    let part =
        |excess: u64, need: u64, capacity: u64| excess.min(need).saturating_mul(100_000) / capacity.max(1);
    part(excess.cpu, need.cpu, c.cpu).saturating_add(part(excess.memory, need.memory, c.memory))
}

/// The VMs that take the whole excess away for the least size: greedily by relief for each MiB, then
/// without those that turned out to be needless, and compared with the one VM that is enough alone.
fn choose(load: &Load<'_>, host: usize, banned: &[usize]) -> Vec<usize> {
    let start = load.excess(host);
    let movable: Vec<usize> =
        load.on[host].iter().copied().filter(|v| !banned.contains(v) && !load.is_bound(*v)).collect();
    let mut left = start;
    let mut chosen: Vec<usize> = Vec::new();
    while left != Resources::default() {
        let best = movable
            .iter()
            .copied()
            .filter(|v| !chosen.contains(v))
            .map(|v| (relief(load, host, left, v), v))
            .filter(|(r, _)| *r > 0)
            .max_by(|(ra, a), (rb, b)| {
                let size = |v: usize| u128::from(load.snapshot.vms[v].size.max(1));
                (u128::from(*ra) * size(*b)).cmp(&(u128::from(*rb) * size(*a))).then(b.cmp(a))
            });
        let Some((_, v)) = best else { break };
        left = left.minus(load.need[v]);
        chosen.push(v);
    }
    let covers = |vms: &[usize]| {
        let sum = vms.iter().fold(Resources::default(), |s, v| s.plus(load.need[*v]));
        start.minus(sum) == Resources::default()
    };
    let size = |vms: &[usize]| vms.iter().fold(0u64, |sum, v| sum.saturating_add(load.snapshot.vms[*v].size));
    if covers(&chosen) {
        let mut by_size = chosen.clone();
        by_size.sort_by_key(|v| core::cmp::Reverse(load.snapshot.vms[*v].size));
        for v in by_size {
            let without: Vec<usize> = chosen.iter().copied().filter(|c| *c != v).collect();
            if covers(&without) {
                chosen = without;
            }
        }
        improve(&movable, &mut chosen, &covers, &size);
    }
    chosen
}

/// Replaces one or two of the chosen VMs by one or two others while that makes the set smaller.
fn improve(
    movable: &[usize],
    chosen: &mut Vec<usize>,
    covers: &dyn Fn(&[usize]) -> bool,
    size: &dyn Fn(&[usize]) -> u64,
) {
    // With many VMs on a host the greedy choice is close enough, and pairs are too many.
    if movable.len() > 64 {
        return;
    }
    let mut best = size(chosen);
    let try_set = |set: Vec<usize>, best: &mut u64, chosen: &mut Vec<usize>| {
        if size(&set) < *best && covers(&set) {
            *best = size(&set);
            *chosen = set;
        }
    };
    for (i, a) in movable.iter().enumerate() {
        try_set(vec![*a], &mut best, chosen);
        for b in &movable[i + 1..] {
            try_set(vec![*a, *b], &mut best, chosen);
        }
    }
    let kept = chosen.clone();
    for out in &kept {
        for new in movable.iter().filter(|m| !kept.contains(m)) {
            let mut set: Vec<usize> = kept.iter().copied().filter(|c| c != out).collect();
            set.push(*new);
            try_set(set, &mut best, chosen);
        }
    }
}

/// Moves VMs off a host until it is below the threshold.
fn relieve(load: &mut Load<'_>, host: usize, plan: &mut Plan) -> bool {
    let limit = u64::from(load.config.threshold.saturating_sub(load.config.margin)) * 10;
    let mut banned: Vec<usize> = Vec::new();
    while over(load, host) {
        let vms = choose(load, host, &banned);
        if vms.is_empty() || plan.moves.len() >= load.config.moves as usize {
            return false;
        }
        for v in vms {
            let gain = relief(load, host, load.excess(host), v);
            let benefit = gain.saturating_mul(u64::from(load.config.horizon)) / 1000;
            let cost = load.snapshot.vms[v].size.saturating_mul(u64::from(load.config.cost)) / 1024;
            let target = if benefit >= cost { load.target(v, limit) } else { None };
            match target {
                Some(to) => record(load, v, to, plan),
                None => {
                    banned.push(v);
                    break;
                }
            }
        }
    }
    true
}

/// Balances from sample to sample: a host has to be overloaded for some samples in a row.
#[derive(Clone, Debug)]
pub struct Balancer {
    config: Config,
    overloaded: BTreeMap<HostId, u32>,
}

impl Balancer {
    /// A balancer that has seen nothing.
    pub fn new(config: Config) -> Self {
        Balancer { config, overloaded: BTreeMap::new() }
    }

    /// Takes a sample; plans once a host has been overloaded for the hold time, or has to be emptied.
    pub fn step(&mut self, sample: &Snapshot) -> Plan {
        let load = Load::new(sample, self.config);
        let mut due = sample.hosts.iter().any(|h| h.maintenance);
        let mut next = BTreeMap::new();
        for (i, host) in sample.hosts.iter().enumerate() {
            if over(&load, i) {
                let count = self.overloaded.get(&host.id).copied().unwrap_or(0) + 1;
                due |= count >= self.config.hold;
                next.insert(host.id, count);
            }
        }
        self.overloaded = next;
        if !due {
            return Plan::default();
        }
        self.overloaded.clear();
        balance(sample, self.config)
    }
}
