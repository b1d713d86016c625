//! Delta leases: a host's heartbeat on a shared volume.
//!
//! A host proves that it is alive by rewriting its own sector of a lockspace every `2 * io_timeout`. The
//! holder ([`LeaseHolder`]) counts from the *submission* of its last successful write; everyone else
//! ([`LeaseObserver`]) counts from its own *read* of an unchanged sector, on its own clock. Once the
//! dead-time has passed, the holder has stopped its VMs or its watchdog has reset it.

mod holder;
mod observer;
mod timing;

pub use holder::{LeaseConfig, LeaseHolder, LeaseInput, LeaseOutput, LeaseStatus, LossReason};
pub use observer::{DiskLife, LeaseObserver};
pub use timing::Timing;

use crate::ondisk::{AreaKind, LeaderRecord, Name};
use crate::types::{Generation, HostId};

/// Identifies one I/O request; a completion names the request that it answers.
pub type OpId = u64;

/// An I/O request failed or timed out; whether a write reached the disk is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Lease I/O failed; look at the volume")]
pub struct IoFailed;

/// The part of a delta lease that the protocol looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeltaRecord {
    /// The host that wrote it; zero in a sector that was never used.
    pub owner: HostId,
    /// The host's generation.
    pub generation: Generation,
    /// The host's clock in seconds at the submission of the write; zero when the lease is free.
    pub timestamp: u64,
    /// The name of the host.
    pub name: Name,
    /// The host's I/O timeout in seconds.
    pub io_timeout: u16,
}

impl DeltaRecord {
    /// Whether nobody holds the lease.
    pub fn is_free(&self) -> bool {
        self.timestamp == 0
    }

    /// The record as it is stored.
    pub fn to_leader(self, space_name: Name) -> LeaderRecord {
        LeaderRecord {
            kind: AreaKind::Delta,
            max_hosts: 1,
            owner_id: u64::from(self.owner.0),
            owner_generation: self.generation,
            space_name,
            resource_name: self.name,
            timestamp: self.timestamp,
            io_timeout: self.io_timeout,
            ..LeaderRecord::default()
        }
    }

    /// The protocol's view of a stored record.
    pub fn from_leader(record: &LeaderRecord) -> Self {
        DeltaRecord {
            owner: HostId(u16::try_from(record.owner_id).unwrap_or(u16::MAX)),
            generation: record.owner_generation,
            timestamp: record.timestamp,
            name: record.resource_name,
            io_timeout: if record.io_timeout == 0 { 10 } else { record.io_timeout },
        }
    }
}
