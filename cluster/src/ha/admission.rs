//! Admission control: a VM starts only if the cluster keeps enough room for the VMs of failed hosts.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::mutants::{self, Mutant};
use crate::types::{HostId, Resources};

/// How the reserve is reckoned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AdmissionPolicy {
    /// Nothing is reserved.
    None,
    /// The VMs of any `failures` hosts fit on the others, placed one by one, the largest first.
    Hosts {
        /// How many hosts may fail at once.
        failures: u32,
    },
    /// The largest VM is one slot; the hosts left after the `failures` largest ones failed have a slot
    /// for every VM.
    Slots {
        /// How many hosts may fail at once.
        failures: u32,
    },
    /// A share of the whole cluster stays free.
    Percentage {
        /// Per cent of the processors.
        cpu: u8,
        /// Per cent of the memory.
        memory: u8,
    },
    /// Hosts marked as spare run nothing until another host fails.
    Dedicated,
}

/// A host as admission sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCapacity {
    /// The host.
    pub host: HostId,
    /// What it has.
    pub capacity: Resources,
    /// What its VMs need, one entry a VM.
    pub vms: Vec<Resources>,
    /// It is kept free for fail-over.
    pub spare: bool,
}

impl HostCapacity {
    /// What is left.
    pub fn free(&self) -> Resources {
        self.vms.iter().fold(self.capacity, |c, v| c.minus(*v))
    }
}

/// Why a VM was not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No host has room.
    #[error("No host has room for the VM; stop a VM or add a host")]
    NoRoom,
    /// The room that is left is reserved for fail-over.
    #[error("The room left is reserved for fail-over; stop a VM, add a host or lower the reserve")]
    Reserved,
}

/// Whether a VM of `demand` may start on `target` now.
pub fn admit(
    policy: &AdmissionPolicy,
    hosts: &[HostCapacity],
    target: HostId,
    demand: Resources,
) -> Result<(), Refusal> {
    let mut after = hosts.to_vec();
    let host = after.iter_mut().find(|h| h.host == target).ok_or(Refusal::NoRoom)?;
    if !host.free().fits(demand) {
        return Err(Refusal::NoRoom);
    }
    host.vms.push(demand);
    if mutants::active(Mutant::AdmissionIgnoresReserve) {
        return Ok(());
    }
    let spare = host.spare;
    let total = |f: &dyn Fn(&HostCapacity) -> u64| after.iter().map(|h| u128::from(f(h))).sum::<u128>();
    let enough = match *policy {
        AdmissionPolicy::None => true,
        AdmissionPolicy::Hosts { failures } => survives(&after, failures),
        AdmissionPolicy::Slots { failures } => slots_suffice(&after, failures),
        AdmissionPolicy::Percentage { cpu, memory } => {
            let keeps = |free: u128, all: u128, percent: u8| free * 100 >= all * u128::from(percent);
            keeps(total(&|h| h.free().cpu), total(&|h| h.capacity.cpu), cpu)
                && keeps(total(&|h| h.free().memory), total(&|h| h.capacity.memory), memory)
        }
        AdmissionPolicy::Dedicated => !spare,
    };
    if enough { Ok(()) } else { Err(Refusal::Reserved) }
}

/// Above this many combinations of failing hosts only the ones that carry most memory are tried.
const COMBINATIONS: u64 = 20_000;

/// Whether the VMs of any `failures` hosts fit on the others.
pub fn survives(hosts: &[HostCapacity], failures: u32) -> bool {
    let n = hosts.len();
    let k = (failures as usize).min(n);
    if k == 0 {
        return true;
    }
    if k == n {
        return hosts.iter().all(|h| h.vms.is_empty());
    }
    let mut combinations = 1u64;
    for i in 0..k as u64 {
        combinations = combinations.saturating_mul(n as u64 - i) / (i + 1);
    }
    let mut order: Vec<usize> = (0..n).collect();
    if combinations > COMBINATIONS {
        let used = |h: &HostCapacity| h.vms.iter().fold(Resources::default(), |sum, v| sum.plus(*v)).memory;
        order.sort_by_key(|i| core::cmp::Reverse(used(&hosts[*i])));
        return fits_without(hosts, &order[..k]);
    }
    let mut pick: Vec<usize> = (0..k).collect();
    loop {
        if !fits_without(hosts, &pick) {
            return false;
        }
        // The next combination in lexicographic order.
        let Some(i) = (0..k).rev().find(|i| pick[*i] < n - k + *i) else { return true };
        pick[i] += 1;
        for j in i + 1..k {
            pick[j] = pick[j - 1] + 1;
        }
    }
}

/// Places the VMs of the failed hosts on the others, the largest first, each where most memory is free.
fn fits_without(hosts: &[HostCapacity], failed: &[usize]) -> bool {
    let mut homeless: Vec<Resources> = failed.iter().flat_map(|i| hosts[*i].vms.iter().copied()).collect();
    homeless.sort_by_key(|v| core::cmp::Reverse((v.memory, v.cpu)));
    let mut free: Vec<Resources> =
        (0..hosts.len()).filter(|i| !failed.contains(i)).map(|i| hosts[i].free()).collect();
    homeless.into_iter().all(|vm| match free.iter_mut().filter(|f| f.fits(vm)).max_by_key(|f| f.memory) {
        Some(f) => {
            *f = f.minus(vm);
            true
        }
        None => false,
    })
}

fn slots_suffice(hosts: &[HostCapacity], failures: u32) -> bool {
    let all = || hosts.iter().flat_map(|h| &h.vms);
    let slot = Resources {
        cpu: all().map(|v| v.cpu).max().unwrap_or(0).max(1),
        memory: all().map(|v| v.memory).max().unwrap_or(0).max(1),
    };
    let mut slots: Vec<u64> =
        hosts.iter().map(|h| (h.capacity.cpu / slot.cpu).min(h.capacity.memory / slot.memory)).collect();
    slots.sort_unstable();
    slots.truncate(slots.len().saturating_sub(failures as usize));
    slots.iter().fold(0u64, |sum, n| sum.saturating_add(*n)) >= all().count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(n: u64) -> Resources {
        Resources { cpu: n, memory: n }
    }

    fn hosts(loads: &[&[u64]]) -> Vec<HostCapacity> {
        (1..)
            .zip(loads)
            .map(|(i, l)| HostCapacity {
                host: HostId(i),
                capacity: r(10),
                vms: l.iter().map(|v| r(*v)).collect(),
                spare: false,
            })
            .collect()
    }

    #[test]
    fn the_room_of_one_failed_host_is_kept() {
        let h = hosts(&[&[4], &[4], &[4]]);
        let policy = AdmissionPolicy::Hosts { failures: 1 };
        assert_eq!(admit(&policy, &h, HostId(1), r(2)), Ok(()));
        assert_eq!(admit(&policy, &h, HostId(1), r(6)), Ok(()));
        assert_eq!(
            admit(&policy, &hosts(&[&[4], &[4, 4], &[4, 4]]), HostId(1), r(5)),
            Err(Refusal::Reserved)
        );
        assert_eq!(admit(&policy, &h, HostId(1), r(7)), Err(Refusal::NoRoom));
        assert!(!survives(&hosts(&[&[6], &[6], &[6]]), 1));
        assert!(survives(&hosts(&[&[2], &[2], &[2], &[2]]), 2) && !survives(&hosts(&[&[6], &[6], &[1]]), 2));
        assert!(!survives(&hosts(&[&[1]]), 1) && survives(&hosts(&[&[]]), 1));
    }

    #[test]
    fn slots_percentage_and_dedicated_hosts() {
        let slots = AdmissionPolicy::Slots { failures: 1 };
        assert_eq!(admit(&slots, &hosts(&[&[5], &[5], &[5]]), HostId(1), r(5)), Ok(()));
        assert_eq!(admit(&slots, &hosts(&[&[5, 5], &[5], &[5]]), HostId(2), r(5)), Err(Refusal::Reserved));
        let percent = AdmissionPolicy::Percentage { cpu: 50, memory: 50 };
        assert_eq!(admit(&percent, &hosts(&[&[5], &[]]), HostId(2), r(5)), Ok(()));
        assert_eq!(admit(&percent, &hosts(&[&[5], &[]]), HostId(2), r(6)), Err(Refusal::Reserved));
        let mut h = hosts(&[&[], &[]]);
        h[1].spare = true;
        assert_eq!(admit(&AdmissionPolicy::Dedicated, &h, HostId(2), r(1)), Err(Refusal::Reserved));
        assert_eq!(admit(&AdmissionPolicy::Dedicated, &h, HostId(1), r(10)), Ok(()));
    }

    #[test]
    fn hosts_of_any_size_can_be_added_up() {
        let mut huge = hosts(&[&[], &[]]);
        huge.iter_mut().for_each(|h| h.capacity = r(u64::MAX));
        let percent = AdmissionPolicy::Percentage { cpu: 50, memory: 50 };
        assert_eq!(admit(&percent, &huge, HostId(1), r(5)), Ok(()));
        assert_eq!(admit(&AdmissionPolicy::Slots { failures: 0 }, &huge, HostId(1), r(1)), Ok(()));
        let full = vec![HostCapacity { vms: vec![r(u64::MAX); 2], ..huge[0].clone() }; 300];
        assert!(!survives(&full, 5));
    }

    #[test]
    fn many_hosts_end_in_bounded_time() {
        let loads: Vec<&[u64]> = vec![&[1, 1]; 300];
        assert!(survives(&hosts(&loads), 5));
    }
}
