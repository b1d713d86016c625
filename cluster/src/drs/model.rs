//! What the planner sees and what it answers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::types::{HostId, Resources, VmId};

/// A host as the planner sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLoad {
    /// The host.
    pub id: HostId,
    /// What it has.
    pub capacity: Resources,
    /// It takes no VMs and is to be emptied.
    #[serde(default)]
    pub maintenance: bool,
}

/// A VM as the planner sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmLoad {
    /// The VM.
    pub id: VmId,
    /// Where it runs.
    pub host: Option<HostId>,
    /// What it would use if nothing held it back.
    pub demand: Resources,
    /// What it is guaranteed.
    #[serde(default)]
    pub reservation: Resources,
    /// What it may use at most; `None` is no limit.
    #[serde(default)]
    pub limit: Option<Resources>,
    /// Its weight when a host is short.
    #[serde(default = "default_shares")]
    pub shares: u32,
    /// How much memory a migration sends, in MiB.
    pub size: u64,
}

fn default_shares() -> u32 {
    1000
}

impl VmLoad {
    /// What the VM has to be given: its demand within its limit, at least its reservation.
    pub fn need(&self) -> Resources {
        let limit = self.limit.unwrap_or(Resources { cpu: u64::MAX, memory: u64::MAX });
        Resources {
            cpu: self.demand.cpu.min(limit.cpu).max(self.reservation.cpu),
            memory: self.demand.memory.min(limit.memory).max(self.reservation.memory),
        }
    }
}

/// A wish about which VMs run where. A *must* rule is never broken by a plan; a *should* rule only when
/// nothing else helps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// The VMs run on one host.
    Together {
        /// The VMs.
        vms: Vec<VmId>,
        /// Must, not should.
        must: bool,
    },
    /// The VMs run on different hosts.
    Apart {
        /// The VMs.
        vms: Vec<VmId>,
        /// Must, not should.
        must: bool,
    },
    /// The VMs run on these hosts.
    On {
        /// The VMs.
        vms: Vec<VmId>,
        /// The hosts.
        hosts: Vec<HostId>,
        /// Must, not should.
        must: bool,
    },
    /// The VMs do not run on these hosts.
    NotOn {
        /// The VMs.
        vms: Vec<VmId>,
        /// The hosts.
        hosts: Vec<HostId>,
        /// Must, not should.
        must: bool,
    },
}

/// The cluster at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The hosts that work.
    pub hosts: Vec<HostLoad>,
    /// The VMs.
    pub vms: Vec<VmLoad>,
    /// The rules.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

/// How the planner decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Config {
    /// A host is overloaded above this percentage of its processor or memory.
    pub threshold: u8,
    /// A target stays this many percentage points below the threshold, so that VMs do not bounce.
    pub margin: u8,
    /// The VMs of this many hosts must fit on the others after every move.
    pub failures: u32,
    /// How long a new load is expected to last, in seconds; the benefit of a move is reckoned over it.
    pub horizon: u32,
    /// What sending one GiB costs, in percentage-point-seconds of a host.
    pub cost: u32,
    /// For how many samples in a row a host must be overloaded before anything moves.
    pub hold: u32,
    /// How many moves a plan may have.
    pub moves: u32,
}

impl Default for Config {
    fn default() -> Self {
        Config { threshold: 80, margin: 2, failures: 1, horizon: 600, cost: 50, hold: 3, moves: 2000 }
    }
}

/// One migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// The VM.
    pub vm: VmId,
    /// Where it runs.
    pub from: HostId,
    /// Where it is to run.
    pub to: HostId,
    /// How much memory it sends, in MiB.
    pub size: u64,
}

/// Migrations in the order in which they are to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The moves.
    pub moves: Vec<Move>,
    /// Hosts that stay overloaded, or in maintenance with VMs.
    pub unsolved: Vec<HostId>,
}

impl Plan {
    /// How much memory the plan sends, in MiB.
    pub fn size(&self) -> u64 {
        self.moves.iter().fold(0, |sum, m| sum.saturating_add(m.size))
    }
}

/// Why a VM has no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// No host has room.
    #[error("No host has room for the VM; add a host or stop a VM")]
    NoRoom,
    /// The hosts with room are excluded by must rules.
    #[error("Rules exclude every host with room; relax a rule")]
    Rules,
    /// Any place would eat the fail-over reserve.
    #[error("Any place would use room reserved for fail-over; add a host or lower the reserve")]
    Reserved,
}
