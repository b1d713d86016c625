//! What goes into a node and what comes out of it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::fence::{DeviceId, FenceAction, FenceConfig, FenceInput};
use crate::ha::{Ailment, Command, HaConfig, HaInput, Report, Signs, Update, VmSpec};
use crate::lease::{DeltaRecord, IoFailed, LeaseConfig, OpId, Timing};
use crate::lock::{Leader, LockInput};
use crate::membership::{CoordInput, CoordOutput, Heartbeat, MembershipConfig};
use crate::ondisk::{HostBlock, Name};
use crate::types::{HostId, Incarnation, LockspaceId, Millis, ResourceId, Resources, VmId};

/// How a host is fenced by the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceTarget {
    /// The host.
    pub host: HostId,
    /// Its devices and timers.
    pub config: FenceConfig,
}

/// A node's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The host's number.
    pub host: HostId,
    /// The host's name in its delta leases.
    pub name: Name,
    /// The timers of the leases.
    pub timing: Timing,
    /// How many lockspaces (shared volumes with leases) there are.
    pub lockspaces: u8,
    /// The host has a working hardware watchdog.
    pub watchdog: bool,
    /// What the host has for VMs.
    pub capacity: Resources,
    /// Members and heartbeat timers.
    pub membership: MembershipConfig,
    /// HA limits and timers.
    pub ha: HaConfig,
    /// How each host is fenced.
    pub fencing: Vec<FenceTarget>,
    /// The lock that decides a tie of two halves.
    pub witness: Option<ResourceId>,
    /// How long a VM may take to stop in an orderly manner before it is killed.
    pub stop_grace: Millis,
}

impl Config {
    pub(super) fn lease(&self) -> LeaseConfig {
        LeaseConfig { host: self.host, name: self.name, timing: self.timing }
    }
}

/// What hosts send to each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// A heartbeat.
    Heartbeat(Arc<Heartbeat>),
    /// A host's report to the coordinator.
    Report(Box<Report>),
    /// The coordinator's command to a host.
    Command {
        /// The coordinator's token; commands of an older coordinator are ignored.
        token: u64,
        /// The life of the host that is meant; any other one ignores the command.
        to: Incarnation,
        /// What to do.
        command: Command,
    },
    /// Migration source to target: the locks are yours, run the VM.
    Moved {
        /// The VM.
        vm: VmId,
        /// Its placement on the target.
        epoch: u64,
        /// The source.
        from: HostId,
    },
    /// A lock is in the way that names the receiver as owner: give it back unless it is in use.
    Unused {
        /// The resource.
        resource: ResourceId,
    },
    /// Migration target to source: understood.
    MovedAck {
        /// The VM.
        vm: VmId,
        /// Its placement on the target.
        epoch: u64,
    },
}

/// What happened to a VM process on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmEvent {
    /// It runs.
    Started,
    /// Its process is gone, for whatever reason; nothing of it can write any more.
    Exited,
    /// A migration source has sent everything, is paused and has closed its disks.
    Quiesced,
    /// A migration failed before the VM was paused for good; it runs on.
    MoveFailed,
}

/// What the host is to do with a VM process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmAction {
    /// Start it.
    Start(Arc<VmSpec>),
    /// Start it as a migration target that waits for its memory.
    Receive {
        /// The VM.
        spec: Arc<VmSpec>,
        /// The source.
        from: HostId,
    },
    /// Ask it to stop.
    Stop,
    /// Kill it.
    Kill,
    /// Send it to another host while it runs, then pause it and close its disks.
    MoveTo(HostId),
    /// Open its disks and run: the source of a failed move, or the target of a complete one.
    Resume,
}

/// What a node asks of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreRequest {
    /// A step of the election; the answer is a [`CoordInput`].
    Election(CoordOutput),
    /// Read the cluster's state.
    Load {
        /// Names the request.
        op: OpId,
    },
    /// Write changes of the state if the token is still the coordinator key's.
    Write {
        /// Names the request.
        op: OpId,
        /// The coordinator's token.
        token: u64,
        /// All or nothing.
        updates: Vec<Update>,
    },
}

/// What happens to a node.
#[derive(Clone, Debug)]
pub enum NodeInput {
    /// Time has passed.
    Tick,
    /// A read of the own delta lease ended.
    DeltaRead {
        /// The volume.
        lockspace: LockspaceId,
        /// The request.
        op: OpId,
        /// The record.
        result: Result<DeltaRecord, IoFailed>,
    },
    /// A write of the own delta lease ended.
    DeltaWrote {
        /// The volume.
        lockspace: LockspaceId,
        /// The request.
        op: OpId,
        /// Whether it is on disk.
        result: Result<(), IoFailed>,
    },
    /// A read of all delta leases ended; index 0 is host 1.
    SpaceRead {
        /// The volume.
        lockspace: LockspaceId,
        /// The request.
        op: OpId,
        /// The records.
        result: Result<Vec<DeltaRecord>, IoFailed>,
    },
    /// A lock's I/O ended.
    Lock {
        /// The resource.
        resource: ResourceId,
        /// `LeaderRead`, `BlocksRead` or `Wrote`.
        input: LockInput,
    },
    /// A message arrived.
    Message(Message),
    /// The store answered a step of the election.
    Coordinator(CoordInput),
    /// The store answered a load or a write.
    Ha(HaInput),
    /// A fence agent answered, or an operator confirms that a host is off.
    Fence {
        /// Which fencing.
        serial: u64,
        /// The answer.
        input: FenceInput,
    },
    /// Something happened to a VM process.
    Vm {
        /// The VM.
        vm: VmId,
        /// Its placement.
        epoch: u64,
        /// What happened.
        event: VmEvent,
    },
    /// What the processes of VMs show of their guests, with the VMs' placements.
    Signs(Vec<(VmId, u64, Signs)>),
    /// Leave the cluster: stop all VMs, give everything back.
    Leave,
}

/// What a node asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeOutput {
    /// Read the own delta lease.
    ReadDelta {
        /// The volume.
        lockspace: LockspaceId,
        /// Names the request.
        op: OpId,
    },
    /// Write the own delta lease.
    WriteDelta {
        /// The volume.
        lockspace: LockspaceId,
        /// Names the request.
        op: OpId,
        /// What to write.
        record: DeltaRecord,
    },
    /// Read all delta leases.
    ReadSpace {
        /// The volume.
        lockspace: LockspaceId,
        /// Names the request.
        op: OpId,
    },
    /// Read a leader record.
    ReadLeader {
        /// The resource.
        resource: ResourceId,
        /// Names the request.
        op: OpId,
    },
    /// Read all host blocks of a resource.
    ReadBlocks {
        /// The resource.
        resource: ResourceId,
        /// Names the request.
        op: OpId,
    },
    /// Write the own host block of a resource.
    WriteBlock {
        /// The resource.
        resource: ResourceId,
        /// Names the request.
        op: OpId,
        /// What to write.
        block: HostBlock,
    },
    /// Write a leader record.
    WriteLeader {
        /// The resource.
        resource: ResourceId,
        /// Names the request.
        op: OpId,
        /// What to write.
        leader: Leader,
    },
    /// Send to every member on every link.
    Broadcast(Message),
    /// Send to one host.
    Send(HostId, Message),
    /// Ask the store.
    Store(StoreRequest),
    /// Call a fence agent.
    Fence {
        /// Which fencing.
        serial: u64,
        /// The host that is fenced.
        target: Incarnation,
        /// Names the call.
        op: OpId,
        /// The device.
        device: DeviceId,
        /// What to do.
        action: FenceAction,
    },
    /// Feed the watchdog.
    FeedWatchdog,
    /// Stop the watchdog in an orderly manner.
    DisarmWatchdog,
    /// Reset this host now.
    Reset,
    /// Do something with a VM process.
    Vm {
        /// The VM.
        vm: VmId,
        /// Its placement.
        epoch: u64,
        /// What.
        action: VmAction,
    },
    /// A host's verdict changed.
    HostChanged(HostId, crate::membership::Verdict),
    /// This host became, or is no longer, the coordinator.
    Coordinating(bool),
    /// A host is being fenced.
    FencingStarted(Incarnation),
    /// A host was fenced.
    Fenced(Incarnation, crate::fence::Evidence),
    /// All fence levels of a host failed.
    FenceStuck(Incarnation),
    /// A lock was taken, with this token.
    Locked(ResourceId, crate::types::Token),
    /// A lease was lost.
    LeaseLost(LockspaceId),
    /// A VM is killed, since its guest does nothing any more.
    Ailing {
        /// The VM.
        vm: VmId,
        /// Its placement.
        epoch: u64,
        /// What is wrong.
        ailment: Ailment,
    },
    /// A VM was given up after too many failures.
    GaveUp(VmId),
    /// The host has left the cluster.
    Left,
}
