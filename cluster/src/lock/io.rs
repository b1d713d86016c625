//! What goes into a lock and what comes out of it.

use super::Leader;
use crate::lease::{IoFailed, OpId};
use crate::ondisk::HostBlock;
use crate::types::{Incarnation, Time, Token};

/// How a resource is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LockMode {
    /// One owner.
    Exclusive,
    /// Any number of owners, none of them exclusive.
    Shared,
}

/// What happens to a [`Locker`](super::Locker).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LockInput {
    /// Take the lock.
    Acquire(LockMode),
    /// Give the lock back, after its user has closed the disk.
    Release,
    /// Make another host the owner, after its user has stopped writing.
    HandOver(Incarnation),
    /// The own delta lease is lost: forget the lock.
    Abandon,
    /// Time has passed.
    Tick,
    /// A read of the leader record ended.
    LeaderRead {
        /// The request.
        op: OpId,
        /// What it holds.
        result: Result<Leader, IoFailed>,
    },
    /// A read of all host blocks ended; index 0 is host 1.
    BlocksRead {
        /// The request.
        op: OpId,
        /// What they hold.
        result: Result<Vec<HostBlock>, IoFailed>,
    },
    /// A write ended.
    Wrote {
        /// The request.
        op: OpId,
        /// Whether it is on disk.
        result: Result<(), IoFailed>,
    },
}

/// Why a lock was not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DenyReason {
    /// Another host holds it.
    #[error("Lock is held by {}; stop its user there first", .0.host)]
    Held(Incarnation),
    /// Hosts hold it shared.
    #[error("Lock is held shared by {}; stop its user there first", .0.host)]
    HeldShared(Incarnation),
    /// The own delta lease is not fresh.
    #[error("Own delta lease is not fresh; wait until the volume answers")]
    NoLease,
    /// The volume failed or did not answer.
    #[error("Volume did not answer; look at it and try again")]
    Io,
    /// The locker is busy, or holds the lock.
    #[error("Lock is in use by another operation on this host; wait for it")]
    Busy,
}

/// What a [`Locker`](super::Locker) asks for or announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockOutput {
    /// Read the leader record.
    ReadLeader {
        /// Names the request.
        op: OpId,
    },
    /// Read all host blocks.
    ReadBlocks {
        /// Names the request.
        op: OpId,
    },
    /// Write the own host block.
    WriteBlock {
        /// Names the request.
        op: OpId,
        /// What to write.
        block: HostBlock,
    },
    /// Write the leader record.
    WriteLeader {
        /// Names the request.
        op: OpId,
        /// What to write.
        leader: Leader,
    },
    /// The lock is held from now on.
    Acquired(Token),
    /// The lock was not given.
    Denied(DenyReason),
    /// The lock was given back.
    Released,
    /// The lock belongs to the other host.
    HandedOver(Token),
    /// The hand-over did not happen.
    HandOverFailed {
        /// The lock is still ours for sure. Otherwise the other host may own it: do not use it any more.
        still_ours: bool,
    },
    /// Call with [`LockInput::Tick`] at this time at the latest.
    WakeAt(Time),
}
