//! What the store keeps, and what coordinator and hosts tell each other.

use std::collections::BTreeMap;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::types::{Generation, HostId, Incarnation, LockspaceId, ResourceId, Resources, VmId};

/// A virtual machine as its owner described it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmSpec {
    /// The VM.
    pub id: VmId,
    /// VMs with a higher priority restart first.
    #[serde(default)]
    pub priority: u8,
    /// VMs that must run before this one starts.
    #[serde(default)]
    pub depends_on: Vec<VmId>,
    /// What the VM needs.
    pub demand: Resources,
    /// The leases of its disks.
    #[serde(default)]
    pub disks: Vec<ResourceId>,
    /// What the VM runner needs to start it; opaque here.
    #[serde(default)]
    pub definition: String,
}

/// What a VM is doing, as far as the coordinator knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmPhase {
    /// It has no host.
    #[default]
    Waiting,
    /// Its host was told to start it.
    Starting,
    /// It runs.
    Running,
    /// It moves to another host.
    Moving {
        /// The target.
        to: Incarnation,
    },
    /// It failed too often; an operator must look.
    Failed,
}

/// A VM in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// What it is.
    pub spec: Arc<VmSpec>,
    /// Whether it should run.
    pub wanted: bool,
    /// The life of the host that it was given to.
    pub place: Option<Incarnation>,
    /// Rises with each placement, so that late commands and reports are recognised.
    pub epoch: u64,
    /// What it is doing.
    pub phase: VmPhase,
}

impl VmRecord {
    /// The epoch of its next placement. No VM is placed so often that there is none.
    pub(super) fn next_epoch(&self) -> u64 {
        self.epoch.saturating_add(1)
    }
}

/// A host in the store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// The last life that joined (its boot number).
    pub boot: u64,
    /// Every life up to this one is known to be over.
    pub gone_boot: u64,
    /// For each lockspace, every generation up to this one is known to be over.
    pub gone: Vec<Generation>,
    /// The host has a working watchdog.
    pub watchdog: bool,
    /// The host is being emptied, or is empty, for maintenance.
    pub maintenance: bool,
    /// The host is kept free for fail-over.
    pub spare: bool,
    /// What it has.
    pub capacity: Resources,
}

/// Everything the coordinator keeps in the store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterState {
    /// The hosts.
    pub hosts: BTreeMap<HostId, HostRecord>,
    /// The VMs.
    pub vms: BTreeMap<VmId, VmRecord>,
    /// The cluster is being shut down, or is: no VM runs.
    pub halted: bool,
}

/// One change of the stored state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Update {
    /// Write a host.
    Host(HostId, HostRecord),
    /// Write a VM.
    Vm(VmRecord),
    /// Delete a VM.
    Forget(VmId),
    /// Shut the cluster down, or let it start again.
    Halt(bool),
}

impl ClusterState {
    /// Applies a change.
    pub fn apply(&mut self, update: Update) {
        match update {
            Update::Host(id, record) => {
                self.hosts.insert(id, record);
            }
            Update::Vm(record) => {
                self.vms.insert(record.spec.id, record);
            }
            Update::Forget(id) => {
                self.vms.remove(&id);
            }
            Update::Halt(on) => self.halted = on,
        }
    }
}

/// Lives of hosts that are known to be over: host, lockspace, highest generation.
pub type Evidences = Vec<(HostId, LockspaceId, Generation)>;

/// What the coordinator tells a host to do. Commands are repeated until the host's report shows their effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Take the VM's locks and start it.
    Start {
        /// The VM.
        spec: Arc<VmSpec>,
        /// The placement.
        epoch: u64,
        /// Lives that are over, so that their locks may be taken.
        gone: Evidences,
    },
    /// Stop the VM of this or an earlier placement and give its locks back.
    Stop {
        /// The VM.
        vm: VmId,
        /// The placement.
        epoch: u64,
    },
    /// Move the VM to another host while it runs.
    Migrate {
        /// The VM.
        vm: VmId,
        /// The placement that runs.
        epoch: u64,
        /// The target.
        to: Incarnation,
    },
    /// Get ready to receive the VM.
    Receive {
        /// The VM.
        spec: Arc<VmSpec>,
        /// The placement that it will have here.
        epoch: u64,
        /// Where it comes from.
        from: Incarnation,
    },
}

/// What a VM does on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmStatus {
    /// Taking its locks, or starting.
    Starting,
    /// Waiting for its memory and its locks from the source of a migration.
    Incoming,
    /// Running.
    Running,
    /// Stopping, or giving its locks back.
    Stopping,
    /// It did not get its locks; the host has nothing of it any more.
    Refused,
    /// Its process has ended; the host has nothing of it any more.
    Failed,
    /// Its disks completed nothing any more, and it was killed; the host has nothing of it any more.
    Stalled,
    /// A migration did not bring it here; the host has nothing of it any more.
    NotReceived,
}

impl VmStatus {
    /// Whether the placement has come to its end.
    pub fn is_over(self) -> bool {
        matches!(self, VmStatus::Refused | VmStatus::Failed | VmStatus::Stalled | VmStatus::NotReceived)
    }
}

/// A VM in a host's report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    /// The VM.
    pub vm: VmId,
    /// The placement.
    pub epoch: u64,
    /// What it does.
    pub status: VmStatus,
    /// What it uses, as far as that is measured.
    #[serde(default)]
    pub usage: Option<Resources>,
}

/// What a host tells the coordinator every few seconds, and whenever something changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The host and its boot number.
    pub from: Incarnation,
    /// Rises with each report of one life.
    pub seq: u64,
    /// What the host has.
    pub capacity: Resources,
    /// Whether it has a working watchdog.
    pub watchdog: bool,
    /// The generations of its leases; zero for a volume without a fresh lease.
    pub leases: Vec<Generation>,
    /// Every VM it has.
    pub vms: Vec<VmReport>,
}
