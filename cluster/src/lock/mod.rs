//! Resource leases on a shared volume, agreed on by Disk Paxos.
//!
//! A resource's leader record names its owner and a lease version (`lver`). A new owner is chosen by one
//! ballot for `lver + 1`: each host writes only its own block and reads everyone's, so any number of hosts
//! may try at once. No I/O is done on a resource while it is held: the owner's delta lease stands for it.
//! A ballot starts only when the present owner is *gone*; see [`OwnerState`].

mod ballot;
mod io;
mod locker;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

pub use io::{DenyReason, LockInput, LockMode, LockOutput};
pub use locker::Locker;

use crate::ondisk::{AreaKind, LeaderRecord, Name};
use crate::types::{Generation, HostId, Incarnation};

/// Whether the owner of a lock may still use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnerState {
    /// It restarted, left, was confirmed off, or its dead-time has passed and it has a watchdog.
    Gone,
    /// It may still write.
    Alive,
}

/// What a [`Locker`] needs to know of the host it runs on.
pub trait LockContext {
    /// Whether `owner` may still use what it locked in this lockspace.
    fn owner(&self, owner: Incarnation) -> OwnerState;

    /// The generation of the own delta lease in this lockspace while it is far from expiry.
    fn fresh_generation(&self) -> Option<Generation>;
}

/// The part of a resource's leader record that the protocol looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Leader {
    /// The present or last owner.
    pub owner: Incarnation,
    /// The lease version that the owner was chosen for.
    pub lver: u64,
    /// The owner's clock in seconds; zero when the lease is free.
    pub timestamp: u64,
    /// The lease is held only to take it shared.
    pub short_hold: bool,
    /// Which host wrote the record.
    pub writer: Incarnation,
}

impl Leader {
    /// Whether nobody holds the lease.
    pub fn is_free(&self) -> bool {
        self.timestamp == 0
    }

    /// The record as it is stored; `template` gives the names and sizes.
    pub fn to_record(self, template: &LeaderRecord) -> LeaderRecord {
        LeaderRecord {
            kind: AreaKind::Resource,
            short_hold: self.short_hold,
            owner_id: u64::from(self.owner.host.0),
            owner_generation: self.owner.generation,
            lver: self.lver,
            timestamp: self.timestamp,
            write_id: u64::from(self.writer.host.0),
            write_generation: self.writer.generation,
            write_timestamp: self.timestamp,
            ..*template
        }
    }

    /// The protocol's view of a stored record.
    pub fn from_record(r: &LeaderRecord) -> Self {
        let host = |id: u64| HostId(u16::try_from(id).unwrap_or(u16::MAX));
        Leader {
            owner: Incarnation { host: host(r.owner_id), generation: r.owner_generation },
            lver: r.lver,
            timestamp: r.timestamp,
            short_hold: r.short_hold,
            writer: Incarnation { host: host(r.write_id), generation: r.write_generation },
        }
    }
}

/// Checks that a stored record heads the resource that the caller means.
pub fn is_resource(record: &LeaderRecord, space: Name, resource: Name) -> bool {
    record.kind == AreaKind::Resource && record.space_name == space && record.resource_name == resource
}
