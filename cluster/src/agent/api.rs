//! What the agent's API asks and answers: one JSON object a line in each direction.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::adapters::Event;
use crate::drs::Plan;
use crate::ha::{HostRecord, VmRecord, VmSpec, VmStatus};
use crate::membership::Verdict;
use crate::types::{Generation, HostId, Incarnation, Millis, ResourceId, Resources, Token, VmId};

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ApiRequest {
    /// This host at a glance.
    Status,
    /// Every host.
    Hosts,
    /// Every VM.
    Vms,
    /// The locks of this host.
    Locks,
    /// This host's journal.
    Events {
        /// Only events with higher numbers.
        #[serde(default)]
        after: u64,
        /// How many at most.
        #[serde(default = "default_limit")]
        limit: usize,
    },
    /// What the balancer would do now; the coordinator knows.
    Plan,
    /// Start a VM and keep it running.
    Start {
        /// The VM.
        spec: Arc<VmSpec>,
    },
    /// Stop a VM.
    Stop {
        /// The VM.
        vm: VmId,
    },
    /// Forget a stopped VM.
    Remove {
        /// The VM.
        vm: VmId,
    },
    /// Move a VM while it runs.
    Move {
        /// The VM.
        vm: VmId,
        /// Where to.
        host: HostId,
    },
    /// Try a VM again that was given up.
    Retry {
        /// The VM.
        vm: VmId,
    },
    /// Empty a host, or take it back.
    Maintenance {
        /// The host.
        host: HostId,
        /// In or out.
        on: bool,
    },
    /// Stop every VM and start none, or start again what ran.
    Halt {
        /// Stop or start.
        on: bool,
    },
    /// An operator has looked: the host that is being fenced is off.
    ConfirmOff {
        /// The host.
        host: HostId,
    },
    /// Stop this host's VMs, give everything back and end the agent.
    Leave,
}

fn default_limit() -> usize {
    100
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ApiReply {
    /// [`ApiRequest::Status`].
    Status(Status),
    /// [`ApiRequest::Hosts`].
    Hosts(Vec<HostEntry>),
    /// [`ApiRequest::Vms`].
    Vms(Vec<VmEntry>),
    /// [`ApiRequest::Locks`].
    Locks(Vec<LockEntry>),
    /// [`ApiRequest::Events`].
    Events(Vec<Event>),
    /// [`ApiRequest::Plan`].
    Plan(Plan),
    /// It is done, or will be.
    Done,
    /// It was refused.
    Error {
        /// Why, and what to do.
        message: String,
        /// The host to ask instead.
        #[serde(default)]
        coordinator: Option<HostId>,
    },
}

/// A host at a glance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The host and its boot number.
    pub host: Incarnation,
    /// Its name.
    pub name: String,
    /// Whether its partition may act.
    pub quorate: bool,
    /// Who coordinates.
    pub coordinator: Option<HostId>,
    /// Whether the cluster is shut down; only the coordinator knows.
    #[serde(default)]
    pub halted: Option<bool>,
    /// Its delta lease on each volume.
    pub leases: Vec<LeaseEntry>,
    /// Whether it has a watchdog.
    pub watchdog: bool,
    /// The VMs here.
    pub vms: Vec<LocalEntry>,
}

/// A delta lease of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseEntry {
    /// The lockspace.
    pub space: String,
    /// The generation, while it is held.
    pub generation: Option<Generation>,
    /// When it runs out unless renewed, in milliseconds from now.
    pub expires_in: Millis,
}

/// A VM on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalEntry {
    /// The VM.
    pub vm: VmId,
    /// Its placement.
    pub epoch: u64,
    /// What it does.
    pub status: VmStatus,
}

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostEntry {
    /// Its number.
    pub host: HostId,
    /// What this host thinks of it.
    pub verdict: Verdict,
    /// What the store knows of it.
    pub record: Option<HostRecord>,
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmEntry {
    /// What the store knows of it.
    pub record: VmRecord,
    /// What it uses, if the coordinator was asked.
    #[serde(default)]
    pub usage: Option<Resources>,
}

/// A lock of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockEntry {
    /// The resource.
    pub resource: ResourceId,
    /// Its fencing token.
    pub token: Token,
}
