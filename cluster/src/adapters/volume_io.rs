//! Lease I/O on threads of its own, so that a volume that hangs never stops a state machine.
//!
//! Each volume has three lanes: the own delta lease, the scan of all delta leases, and the locks. A request
//! that waited in its lane past its deadline is dropped unexecuted: no stale write starts late.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::clock::Clock;
use super::{DiskError, LeaseVolume};
use crate::lease::{DeltaRecord, IoFailed};
use crate::lock::Leader;
use crate::ondisk::{HostBlock, Name};
use crate::types::{HostId, Time};

/// Requests that wait in one lane at most; more fail at once.
const LANE: usize = 256;

/// What to read or write on a lease volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeRequest {
    /// Read a host's delta lease.
    ReadDelta(HostId),
    /// Write a host's delta lease.
    WriteDelta(HostId, DeltaRecord),
    /// Read the delta leases of hosts 1 to this number.
    ReadSpace(u16),
    /// Read the leader record of the resource with this index and name.
    ReadLeader(u32, Name),
    /// Write the leader record of the resource with this index and name.
    WriteLeader(u32, Name, Leader),
    /// Read the blocks of a resource, of hosts 1 to this number.
    ReadBlocks(u32, u16),
    /// Write a host's block of a resource.
    WriteBlock(u32, HostId, HostBlock),
}

/// What a request read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeReply {
    /// A delta lease.
    Delta(DeltaRecord),
    /// All delta leases; index 0 is host 1.
    Space(Vec<DeltaRecord>),
    /// A leader record.
    Leader(Leader),
    /// All blocks of a resource; index 0 is host 1.
    Blocks(Vec<HostBlock>),
    /// A write is on disk.
    Written,
}

struct Job<T> {
    tag: T,
    request: VolumeRequest,
    deadline: Time,
}

/// Carries out requests on one volume; `done` is called on a thread of the volume.
pub struct VolumeIo<T> {
    lanes: Vec<SyncSender<Job<T>>>,
    threads: Vec<JoinHandle<()>>,
    done: Arc<Done<T>>,
}

type Done<T> = dyn Fn(T, Result<VolumeReply, IoFailed>) + Send + Sync;

impl<T> core::fmt::Debug for VolumeIo<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("VolumeIo").finish_non_exhaustive()
    }
}

impl<T: Send + 'static> VolumeIo<T> {
    /// Starts the volume's threads. `done` is told how each request ended.
    pub fn start(
        volume: LeaseVolume,
        clock: Clock,
        done: impl Fn(T, Result<VolumeReply, IoFailed>) + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let volume = Arc::new(volume);
        let mut io = VolumeIo { lanes: Vec::new(), threads: Vec::new(), done: Arc::new(done) };
        for name in ["lease-delta", "lease-scan", "lease-locks"] {
            let (sender, jobs) = sync_channel(LANE);
            let (volume, done) = (volume.clone(), io.done.clone());
            let run = move || work(&volume, clock, &jobs, &*done);
            io.lanes.push(sender);
            io.threads.push(std::thread::Builder::new().name(name.into()).spawn(run)?);
        }
        Ok(io)
    }

    /// Carries out a request unless it has to wait past `deadline`.
    pub fn submit(&self, tag: T, request: VolumeRequest, deadline: Time) {
        let lane = match request {
            VolumeRequest::ReadDelta(_) | VolumeRequest::WriteDelta(..) => 0,
            VolumeRequest::ReadSpace(_) => 1,
            _ => 2,
        };
        if let Err(e) = self.lanes[lane].try_send(Job { tag, request, deadline }) {
            let job = match e {
                std::sync::mpsc::TrySendError::Full(job) => job,
                std::sync::mpsc::TrySendError::Disconnected(job) => job,
            };
            (self.done)(job.tag, Err(IoFailed));
        }
    }
}

impl<T> Drop for VolumeIo<T> {
    /// Waits for the requests in flight; those that still wait are dropped by their deadline.
    fn drop(&mut self) {
        self.lanes.clear();
        for thread in self.threads.drain(..) {
            // A panic in a lane has shown itself as requests that time out.
            let _ = thread.join();
        }
    }
}

fn work<T>(volume: &LeaseVolume, clock: Clock, jobs: &Receiver<Job<T>>, done: &Done<T>) {
    while let Ok(job) = jobs.recv() {
        let late = clock.now() >= job.deadline;
        let result = if late { Err(IoFailed) } else { carry_out(volume, job.request).map_err(report) };
        done(job.tag, result);
    }
}

fn report(error: DiskError) -> IoFailed {
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    tracing::warn!(%error, source, "lease I/O failed");
    IoFailed
}

fn carry_out(volume: &LeaseVolume, request: VolumeRequest) -> Result<VolumeReply, DiskError> {
    Ok(match request {
        VolumeRequest::ReadDelta(host) => VolumeReply::Delta(volume.read_delta(host)?),
        VolumeRequest::WriteDelta(host, record) => {
            volume.write_delta(host, record)?;
            VolumeReply::Written
        }
        VolumeRequest::ReadSpace(hosts) => VolumeReply::Space(volume.read_space(hosts)?),
        VolumeRequest::ReadLeader(index, name) => VolumeReply::Leader(volume.read_leader(index, name)?),
        VolumeRequest::WriteLeader(index, name, leader) => {
            volume.write_leader(index, name, leader)?;
            VolumeReply::Written
        }
        VolumeRequest::ReadBlocks(index, hosts) => VolumeReply::Blocks(volume.read_blocks(index, hosts)?),
        VolumeRequest::WriteBlock(index, host, block) => {
            volume.write_block(index, host, block)?;
            VolumeReply::Written
        }
    })
}
