//! What the coordinator's decisions are made from, and what comes of them.

use std::sync::Arc;

use super::admission::{AdmissionPolicy, Refusal};
use super::health::HealthConfig;
use super::records::{ClusterState, Command, Report, Update, VmSpec};
use super::restart::RestartConfig;
use crate::lease::OpId;
use crate::membership::Verdict;
use crate::types::{HostId, Incarnation, Millis, VmId};

/// Limits and timers of the manager.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HaConfig {
    /// Restart limits.
    pub restart: RestartConfig,
    /// When a VM whose process is there counts as failed.
    pub health: HealthConfig,
    /// Reserve for failed hosts.
    pub admission: AdmissionPolicy,
    /// How long an isolated host, or one that does not hear the coordinator, is left alone before it is fenced.
    pub isolation: Millis,
    /// Commands are repeated this often.
    pub repeat: Millis,
    /// How long a start or a move may take before it counts as failed.
    pub patience: Millis,
    /// How long a store write may take.
    pub deadline: Millis,
}

impl Default for HaConfig {
    fn default() -> Self {
        HaConfig {
            restart: RestartConfig::default(),
            health: HealthConfig::default(),
            admission: AdmissionPolicy::Hosts { failures: 1 },
            isolation: 180_000,
            repeat: 3000,
            patience: 180_000,
            deadline: 1000,
        }
    }
}

/// What the manager needs to know of the hosts.
pub trait ClusterView {
    /// The verdict on a host.
    fn verdict(&self, host: HostId) -> Verdict;
    /// Whether a host is online and hears this one, so that commands reach it.
    fn is_mutual(&self, host: HostId) -> bool;
    /// The latest known boot number of a host; zero when never heard.
    fn boot(&self, host: HostId) -> u64;
    /// Whether the own partition is quorate.
    fn is_quorate(&self) -> bool;
}

/// A wish of an operator or of the balancer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Start a VM (and keep it running).
    Start(Arc<VmSpec>),
    /// Stop a VM, and do not restart it.
    Stop(VmId),
    /// Stop a VM and forget it.
    Remove(VmId),
    /// Move a VM while it runs.
    Move(VmId, HostId),
    /// Empty a host, or take it back into service.
    Maintenance(HostId, bool),
    /// Try a VM again that was given up.
    Retry(VmId),
    /// Stop every VM, those that others depend on last, and start none; or start again what ran.
    Halt(bool),
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// This host does not coordinate, or does not know the state yet.
    #[error("This host does not coordinate now; ask the coordinator")]
    NotCoordinator,
    /// The VM does not exist, or is not in the state that the request needs.
    #[error("VM {} is not in a state for this; look at `nacre cluster vms`", .0.0)]
    BadVm(VmId),
    /// The host does not exist or is not online.
    #[error("Host {} is not available; look at `nacre cluster hosts`", .0.0)]
    BadHost(HostId),
    /// Admission control said no.
    #[error("VM was not admitted")]
    Refused(#[source] Refusal),
}

/// How a store write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteResult {
    /// It is stored.
    Done,
    /// The token is no longer valid.
    Outdated,
    /// Nobody knows.
    Unknown,
}

/// What happens to a [`HaManager`](super::HaManager).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HaInput {
    /// This host was elected.
    Elected {
        /// Its token.
        token: u64,
    },
    /// This host no longer coordinates.
    SteppedDown,
    /// The state was read.
    Loaded {
        /// The request.
        op: OpId,
        /// The state; `None` when the store did not answer.
        state: Option<ClusterState>,
    },
    /// A write ended.
    Written {
        /// The request.
        op: OpId,
        /// How.
        result: WriteResult,
    },
    /// A host reported.
    Report(Box<Report>),
    /// A life of a host is over; the generations of its leases that are over with it.
    Gone {
        /// The life.
        target: Incarnation,
        /// For each lockspace the highest generation that is over.
        generations: Vec<u64>,
    },
    /// Time has passed.
    Tick,
}

/// What a [`HaManager`](super::HaManager) asks for or announces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HaOutput {
    /// Read the state.
    Load {
        /// Names the request.
        op: OpId,
    },
    /// Write the state, guarded by the token.
    Write {
        /// Names the request.
        op: OpId,
        /// The coordinator's token.
        token: u64,
        /// What to write, all or nothing.
        updates: Vec<Update>,
    },
    /// Make sure that this life is over.
    Fence(Incarnation),
    /// This life need not be fenced any more.
    CancelFence(HostId),
    /// Tell a life of a host; a later life must not act on it.
    Send(Incarnation, Command),
    /// A VM was given up.
    GaveUp(VmId),
}
