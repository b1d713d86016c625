//! The world outside of the nodes: hosts, processes, volumes, network, power controllers, store.

use std::collections::BTreeMap;

use super::guests::{Guest, Stall};
use super::schedule::VOLUMES;
use crate::ha::ClusterState;
use crate::lease::DeltaRecord;
use crate::lock::Leader;
use crate::membership::KeyHolder;
use crate::node::Node;
use crate::ondisk::HostBlock;
use crate::types::{Generation, Time, VmId};

/// What a VM process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProcState {
    Booting,
    /// It may write to its disks.
    Live,
    /// A migration target that waits.
    Incoming,
    /// A migration source that has closed its disks.
    Paused,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Proc {
    pub(super) vm: VmId,
    pub(super) epoch: u64,
    pub(super) state: ProcState,
    /// Tells the processes of one VM apart.
    pub(super) serial: u64,
    pub(super) guest: Guest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bmc {
    Good,
    Dead,
    Slow,
    Lies,
}

pub(super) struct SimHost {
    pub(super) node: Option<Node>,
    /// Rises with each boot; events of a former life are dropped.
    pub(super) boot: u64,
    pub(super) booted_at: u64,
    pub(super) powered: bool,
    /// The host never comes back.
    pub(super) dead: bool,
    /// Clock drift in parts per million.
    pub(super) drift: i64,
    pub(super) has_watchdog: bool,
    pub(super) watchdog_late: u64,
    pub(super) watchdog_at: Option<u64>,
    pub(super) watchdog_event: bool,
    pub(super) paused_until: u64,
    pub(super) agent_paused_until: u64,
    pub(super) procs: Vec<Proc>,
    pub(super) wake_at: u64,
    /// What that is on the host's own clock.
    pub(super) wake_local: Time,
    pub(super) bmc: Bmc,
    pub(super) unkillable: bool,
    pub(super) stall: Stall,
    /// Of each volume the generation of the lease as last seen, and the highest of those that are over.
    pub(super) generations: [(Generation, Generation); VOLUMES as usize],
    /// Since when the host believes to coordinate without being it.
    pub(super) usurper_since: Option<u64>,
}

impl SimHost {
    /// The lease on a volume is lost, with the host or without it.
    pub(super) fn lease_over(&mut self, volume: usize) {
        let (seen, over) = &mut self.generations[volume];
        *over = (*over).max(*seen);
    }

    /// Nothing wakes the host.
    pub(super) fn forget_wake(&mut self) {
        (self.wake_at, self.wake_local) = (u64::MAX, Time(u64::MAX));
    }

    /// The host's own clock.
    pub(super) fn local(&self, now: u64) -> Time {
        let elapsed = now.saturating_sub(self.booted_at) as i64;
        Time((1000 + elapsed + elapsed * self.drift / 1_000_000) as u64)
    }

    /// When the host's own clock will show `local`.
    pub(super) fn global(&self, local: Time) -> u64 {
        let elapsed = local.0.saturating_sub(1000).min(1 << 40) as i64;
        let rate = 1_000_000 + self.drift;
        let real = (elapsed * 1_000_000 + rate - 1) / rate;
        self.booted_at + real.max(0) as u64
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Area {
    pub(super) leader: Leader,
    pub(super) blocks: Vec<HostBlock>,
}

/// How a host's I/O to a volume goes wrong.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct IoFaults {
    pub(super) fails: u32,
    pub(super) slow: bool,
    pub(super) completion_lost: bool,
    pub(super) completion_late: bool,
    pub(super) writes_late: bool,
}

pub(super) struct Volume {
    pub(super) deltas: Vec<DeltaRecord>,
    pub(super) areas: Vec<Area>,
    /// Index 0 is host 1.
    pub(super) faults: Vec<IoFaults>,
}

pub(super) struct Store {
    pub(super) state: ClusterState,
    pub(super) key: Option<KeyHolder>,
    pub(super) revision: u64,
    pub(super) leases: BTreeMap<u64, u64>,
    pub(super) next_lease: u64,
    pub(super) ambiguous: bool,
    pub(super) late: bool,
}

impl Store {
    /// Drops leases that have run out, and the key with its lease.
    pub(super) fn expire(&mut self, now: u64) {
        self.leases.retain(|_, until| now < *until);
        if let Some(key) = self.key
            && !self.leases.contains_key(&key.lease)
        {
            self.key = None;
        }
    }
}

/// Who can talk to whom.
pub(super) struct Network {
    /// `cut[a][b]`: how many faults cut the way from `a` to `b`; index 0 is the store.
    pub(super) cut: Vec<Vec<u32>>,
    /// Percentage of lost packets of each host.
    pub(super) loss: Vec<u64>,
}
