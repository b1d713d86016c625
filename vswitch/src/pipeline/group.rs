//! Groups: several lists of actions behind one number.

use super::Action;
use crate::port::PortId;

/// How a group chooses among its buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupKind {
    /// Every bucket gets a copy of the packet.
    All,
    /// One bucket, by a hash over addresses and ports, in proportion to the weights.
    Select,
    /// The only bucket.
    Indirect,
    /// The first bucket that is alive.
    FastFailover,
}

/// One list of actions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Number within the group.
    pub id: u32,
    /// Share in a select group.
    pub weight: u16,
    /// The bucket is alive while this port's link is up.
    pub watch_port: Option<PortId>,
    /// What is done.
    pub actions: Vec<Action>,
}

/// A group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Choice of buckets.
    pub kind: GroupKind,
    /// The buckets.
    pub buckets: Vec<Bucket>,
}
