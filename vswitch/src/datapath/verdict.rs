//! A decision of the slow path in the form that workers execute.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::Nanos;
use crate::mac_table::{Dependency, MacEntry};
use crate::packet::vlan::VlanOp;
use crate::port::PortId;

/// One step of a decision.
#[derive(Clone, Debug)]
pub enum Op {
    /// Send the packet, as it is now, out of a port.
    Output {
        /// The port.
        port: PortId,
        /// What happens to the outer tag on this way out only.
        vlan: VlanOp,
    },
}

/// Why a packet went nowhere, for counters and `trace`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DropReason {
    /// The frame's VLAN is not carried by the port it came in by.
    VlanNotAllowed,
    /// The source address is a group address.
    BadSource,
    /// The destination is behind the port the frame came in by, or no port carries the VLAN.
    NoDestination,
    /// The source address is fixed to, or held at, another port.
    MacElsewhere,
    /// The port's limit of addresses is reached.
    MacLimit,
}

/// Packets and bytes that a rule handled.
#[derive(Debug, Default)]
pub struct RuleStats {
    packets: AtomicU64,
    bytes: AtomicU64,
    used: AtomicU64,
}

impl RuleStats {
    /// Adds to the counters and notes the time.
    pub(crate) fn add(&self, packets: u64, bytes: u64, now: Nanos) {
        self.packets.fetch_add(packets, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.used.fetch_max(now, Ordering::Relaxed);
    }

    /// Packets and bytes.
    pub fn get(&self) -> (u64, u64) {
        (self.packets.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }

    /// Time of the last packet counted; zero when there was none.
    pub fn used(&self) -> Nanos {
        self.used.load(Ordering::Relaxed)
    }
}

/// What happens to the packets of one flow.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Steps in order; none: drop.
    pub ops: Vec<Op>,
    /// Why there is no step.
    pub drop: Option<DropReason>,
    /// Buckets of the MAC table that the decision rests on.
    pub depends: Vec<Dependency>,
    /// The source address's entry, kept young by the flow.
    pub source: Option<Arc<MacEntry>>,
    /// Rules that count the flow's packets.
    pub rules: Vec<Arc<RuleStats>>,
}
