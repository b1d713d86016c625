//! The cluster's load, kept up to date move by move.

use std::collections::{BTreeSet, BinaryHeap, HashMap};

use super::model::{Config, Rule, Snapshot};
use crate::types::{HostId, Resources, VmId};

/// A rule over indices.
enum Constraint {
    Together { members: Vec<usize>, must: bool },
    Apart { members: Vec<usize>, must: bool },
    On { hosts: Vec<usize>, must: bool, inside: bool },
}

/// How a host suits a VM under the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fit {
    Good,
    /// A should rule would be broken.
    Poor,
    Forbidden,
}

pub(super) struct Load<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) config: Config,
    pub(super) used: Vec<Resources>,
    /// The VMs on each host.
    pub(super) on: Vec<Vec<usize>>,
    pub(super) at: Vec<Option<usize>>,
    pub(super) need: Vec<Resources>,
    constraints: Vec<Constraint>,
    of_vm: Vec<Vec<usize>>,
    /// Hosts that take VMs, by load in per mille, the least loaded first.
    pub(super) by_load: BTreeSet<(u64, usize)>,
    reserve_kept: bool,
}

fn per_mille(used: u64, capacity: u64) -> u64 {
    used.saturating_mul(1000).checked_div(capacity).unwrap_or(u64::MAX)
}

impl<'a> Load<'a> {
    pub(super) fn new(snapshot: &'a Snapshot, config: Config) -> Self {
        let hosts: HashMap<HostId, usize> =
            snapshot.hosts.iter().enumerate().map(|(i, h)| (h.id, i)).collect();
        let vms: HashMap<VmId, usize> = snapshot.vms.iter().enumerate().map(|(i, v)| (v.id, i)).collect();
        let find_vms =
            |ids: &[VmId]| -> Vec<usize> { ids.iter().filter_map(|v| vms.get(v).copied()).collect() };
        let find_hosts =
            |ids: &[HostId]| -> Vec<usize> { ids.iter().filter_map(|h| hosts.get(h).copied()).collect() };
        let n = snapshot.hosts.len();
        let mut load = Load {
            snapshot,
            config,
            used: vec![Resources::default(); n],
            on: vec![Vec::new(); n],
            at: vec![None; snapshot.vms.len()],
            need: snapshot.vms.iter().map(|v| v.need()).collect(),
            constraints: Vec::new(),
            of_vm: vec![Vec::new(); snapshot.vms.len()],
            by_load: BTreeSet::new(),
            reserve_kept: true,
        };
        for rule in &snapshot.rules {
            let (members, constraint) = match rule {
                Rule::Together { vms, must } => {
                    let members = find_vms(vms);
                    (members.clone(), Constraint::Together { members, must: *must })
                }
                Rule::Apart { vms, must } => {
                    let members = find_vms(vms);
                    (members.clone(), Constraint::Apart { members, must: *must })
                }
                Rule::On { vms, hosts, must } => {
                    let hosts = find_hosts(hosts);
                    (find_vms(vms), Constraint::On { hosts, must: *must, inside: true })
                }
                Rule::NotOn { vms, hosts, must } => {
                    let hosts = find_hosts(hosts);
                    (find_vms(vms), Constraint::On { hosts, must: *must, inside: false })
                }
            };
            for v in members {
                load.of_vm[v].push(load.constraints.len());
            }
            load.constraints.push(constraint);
        }
        for (i, vm) in snapshot.vms.iter().enumerate() {
            if let Some(h) = vm.host.and_then(|h| hosts.get(&h).copied()) {
                load.at[i] = Some(h);
                load.on[h].push(i);
                load.used[h] = load.used[h].plus(load.need[i]);
            }
        }
        for h in 0..n {
            if !snapshot.hosts[h].maintenance {
                load.by_load.insert((load.utilisation(h, load.used[h]), h));
            }
        }
        load.reserve_kept = load.survives();
        load
    }

    /// The higher of processor and memory load in per mille.
    pub(super) fn utilisation(&self, host: usize, used: Resources) -> u64 {
        let c = self.snapshot.hosts[host].capacity;
        per_mille(used.cpu, c.cpu).max(per_mille(used.memory, c.memory))
    }

    pub(super) fn load_of(&self, host: usize) -> u64 {
        self.utilisation(host, self.used[host])
    }

    /// How far each resource of a host is above the threshold.
    pub(super) fn excess(&self, host: usize) -> Resources {
        let c = self.snapshot.hosts[host].capacity;
        let t = u64::from(self.config.threshold);
        let bar = Resources { cpu: c.cpu.saturating_mul(t) / 100, memory: c.memory.saturating_mul(t) / 100 };
        self.used[host].minus(bar)
    }

    /// Puts a VM on a host, or takes it away.
    pub(super) fn put(&mut self, vm: usize, host: Option<usize>) {
        if let Some(old) = self.at[vm] {
            self.by_load.remove(&(self.load_of(old), old));
            self.on[old].retain(|v| *v != vm);
            self.used[old] = self.used[old].minus(self.need[vm]);
            if !self.snapshot.hosts[old].maintenance {
                self.by_load.insert((self.load_of(old), old));
            }
        }
        self.at[vm] = host;
        if let Some(new) = host {
            self.by_load.remove(&(self.load_of(new), new));
            self.on[new].push(vm);
            self.used[new] = self.used[new].plus(self.need[vm]);
            if !self.snapshot.hosts[new].maintenance {
                self.by_load.insert((self.load_of(new), new));
            }
        }
    }

    /// How a host suits a VM under the rules, with all other VMs where they are.
    pub(super) fn fit(&self, vm: usize, host: usize) -> Fit {
        let mut fit = Fit::Good;
        for c in &self.of_vm[vm] {
            let (broken, must) = match &self.constraints[*c] {
                Constraint::Together { members, must } => {
                    (members.iter().any(|m| *m != vm && self.at[*m].is_some_and(|h| h != host)), *must)
                }
                Constraint::Apart { members, must } => {
                    (members.iter().any(|m| *m != vm && self.at[*m] == Some(host)), *must)
                }
                Constraint::On { hosts, must, inside } => (hosts.contains(&host) != *inside, *must),
            };
            if broken {
                fit = fit.max(if must { Fit::Forbidden } else { Fit::Poor });
            }
        }
        fit
    }

    /// Whether a VM is bound to others, so that it cannot move alone.
    pub(super) fn is_bound(&self, vm: usize) -> bool {
        self.of_vm[vm].iter().any(|c| {
            matches!(&self.constraints[*c], Constraint::Together { members, must: true } if members.len() > 1)
        })
    }

    /// The least loaded host that takes the VM below `limit` per mille: without breaking a should rule
    /// if possible, and only one whose use keeps the fail-over reserve.
    pub(super) fn target(&mut self, vm: usize, limit: u64) -> Option<usize> {
        let from = self.at[vm];
        let mut poor = None;
        let order: Vec<usize> =
            self.by_load.iter().take_while(|(l, _)| *l < limit).map(|(_, h)| *h).collect();
        for host in order {
            if Some(host) == from || self.utilisation(host, self.used[host].plus(self.need[vm])) > limit {
                continue;
            }
            match self.fit(vm, host) {
                Fit::Good if self.reserve_kept_with(vm, host) => return Some(host),
                Fit::Poor if poor.is_none() && self.reserve_kept_with(vm, host) => poor = Some(host),
                _ => {}
            }
        }
        poor
    }

    /// Whether the reserve, if there was one, is kept with the VM on this host.
    pub(super) fn reserve_kept_with(&mut self, vm: usize, host: usize) -> bool {
        if !self.reserve_kept || self.config.failures == 0 {
            return true;
        }
        let from = self.at[vm];
        self.put(vm, Some(host));
        let kept = self.survives();
        self.put(vm, from);
        kept
    }

    /// Whether the memory of the VMs of any one failing host (with more failures: of the fullest ones)
    /// fits on the others, the largest VM first, each where most is free.
    fn survives(&self) -> bool {
        let k = self.config.failures as usize;
        if k == 0 {
            return true;
        }
        let n = self.snapshot.hosts.len();
        let free: Vec<(u64, usize)> = (0..n)
            .filter(|h| !self.snapshot.hosts[*h].maintenance)
            .map(|h| (self.snapshot.hosts[h].capacity.memory.saturating_sub(self.used[h].memory), h))
            .collect();
        if k == 1 {
            let mut best = free.clone();
            best.sort_unstable_by(|a, b| b.cmp(a));
            return (0..n).all(|h| {
                // Mostly each VM can have a host of its own; only otherwise they have to be packed.
                let largest = self.on[h].iter().map(|v| self.need[*v].memory).max().unwrap_or(0);
                let roomy = best.get(self.on[h].len()).is_some_and(|(room, _)| *room >= largest);
                roomy || self.fits_elsewhere(&best, &[h])
            });
        }
        let mut fullest: Vec<usize> = (0..n).collect();
        fullest.sort_by_key(|h| core::cmp::Reverse(self.used[*h].memory));
        fullest.truncate(k);
        self.fits_elsewhere(&free, &fullest)
    }

    /// `free` may be sorted, the most first; then only as many hosts as there are VMs are looked at.
    fn fits_elsewhere(&self, free: &[(u64, usize)], failed: &[usize]) -> bool {
        let mut sizes: Vec<u64> =
            failed.iter().flat_map(|h| self.on[*h].iter().map(|v| self.need[*v].memory)).collect();
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        let enough = sizes.len() + failed.len();
        let hosts = free.iter().filter(|(_, h)| !failed.contains(h));
        let mut heap: BinaryHeap<u64> = if failed.len() == 1 {
            hosts.take(enough).map(|f| f.0).collect()
        } else {
            hosts.map(|f| f.0).collect()
        };
        sizes.into_iter().all(|size| match heap.pop() {
            Some(room) if room >= size => {
                heap.push(room - size);
                true
            }
            _ => false,
        })
    }
}
