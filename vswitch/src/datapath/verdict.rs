//! A decision of the slow path in the form that workers execute.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::clock::Nanos;
use crate::conntrack::{Conn, CtDependency};
use crate::mac_table::{Dependency, MacEntry};
use crate::packet::key::{Field, FlowKey};
use crate::packet::vlan::VlanOp;
use crate::pipeline::{Lookups, Meter};
use crate::port::PortId;
use crate::telemetry::Output;
use crate::telemetry::records::FlowRecord;

/// A change of the packet.
#[derive(Clone, Debug)]
pub enum Edit {
    /// Push, pop or rewrite a tag.
    Vlan(VlanOp),
    /// Overwrite bits of a field.
    Set {
        /// The field.
        field: Field,
        /// The bits.
        value: u128,
        /// Which bits.
        mask: u128,
    },
    /// Decrement the time to live, or drop.
    DecTtl,
}

/// Ports that frames leave by in turn.
#[derive(Clone, Debug)]
pub struct Turns {
    /// The port that they stand for.
    pub bond: PortId,
    /// The ports, at least one.
    pub members: Vec<PortId>,
    /// Frames sent so far, whichever flow they belong to.
    pub turn: Arc<AtomicUsize>,
}

impl Turns {
    /// The port of the next frame.
    pub fn take(&self) -> PortId {
        self.members[self.turn.fetch_add(1, Ordering::Relaxed) % self.members.len()]
    }
}

/// One step of a decision.
#[derive(Clone, Debug)]
pub enum Op {
    /// Send the packet, as it is now, out of a port.
    Output {
        /// The port.
        port: PortId,
        /// What happens to the outer tag on this way out only.
        vlan: VlanOp,
        /// Rate limit of this way out.
        limit: Option<Arc<Meter>>,
    },
    /// Send the packet, as it is now, out of one port after the other.
    OutputInTurn {
        /// The ports.
        turns: Turns,
        /// As above.
        vlan: VlanOp,
        /// As above.
        limit: Option<Arc<Meter>>,
    },
    /// Change the packet for the steps that follow.
    Edit(Edit),
    /// Go on only if the rate limit allows.
    Meter(Arc<Meter>),
    /// Give the packet to the controllers.
    Controller {
        /// Longest part that is given.
        max_len: u16,
        /// Why, in OpenFlow's numbers.
        reason: u8,
        /// Table of the rule.
        table: u8,
        /// Cookie of the rule.
        cookie: u64,
        /// Key at this point.
        key: Box<FlowKey>,
    },
    /// Give the packet to the LACP of the bond that the port belongs to.
    Lacp,
    /// Do these steps with a copy of the packet.
    Copy(Vec<Op>),
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Why a packet went nowhere, for counters and `trace`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum DropReason {
            $($(#[$doc])* $name,)*
        }

        impl DropReason {
            /// All reasons.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$name,)*];
        }

        impl fmt::Display for DropReason {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(DropReason::$name => $text,)* })
            }
        }
    };
}

reasons! {
    /// The frame's VLAN is not carried by the port it came in by.
    VlanNotAllowed = "vlan-not-allowed",
    /// The source address is a group address.
    BadSource = "bad-source",
    /// The destination is reserved for protocols between neighbours.
    Reserved = "reserved-destination",
    /// The destination is behind the port the frame came in by, or no port may take it.
    NoDestination = "no-destination",
    /// The source address is fixed to, or held at, another port.
    MacElsewhere = "mac-elsewhere",
    /// The port's limit of addresses is reached.
    MacLimit = "mac-limit",
    /// The source address is not bound to the port.
    SpoofedMac = "spoofed-mac",
    /// An IP, ARP or neighbour discovery address is not bound to the port.
    SpoofedAddress = "spoofed-address",
    /// The port may not act as a DHCP server or router.
    RogueServer = "rogue-server",
    /// No rule of a security group permits the packet.
    SecurityGroup = "security-group",
    /// The port is a member of a bond that does not use it at the moment.
    BondInactive = "bond-inactive",
    /// The flow tables have no rule for the packet, or one without output.
    Pipeline = "pipeline",
    /// The flow tables resubmit too deeply or have too many actions.
    TooDeep = "too-deep",
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
    /// Buckets of connection tracking that the decision rests on.
    pub ct_depends: Vec<CtDependency>,
    /// The connection, kept alive by the flow.
    pub conn: Option<Arc<Conn>>,
    /// Whether the decision holds for this packet only.
    pub once: bool,
    /// Rules that count the flow's packets.
    pub rules: Vec<Arc<RuleStats>>,
    /// Table lookups that the decision rests on.
    pub lookups: Lookups,
    /// The record of the metered flow.
    pub record: Option<Arc<FlowRecord>>,
}

impl Verdict {
    /// Where the packet goes, for flow records and samples.
    pub(crate) fn output(&self) -> Output {
        fn ports(ops: &[Op]) -> (u32, PortId) {
            ops.iter().fold((0, 0), |(n, last), op| match op {
                Op::Output { port, .. } => (n + 1, *port),
                Op::OutputInTurn { turns, .. } => (n + 1, turns.bond),
                Op::Copy(inner) => {
                    let (m, port) = ports(inner);
                    (n + m, if m > 0 { port } else { last })
                }
                _ => (n, last),
            })
        }
        match ports(&self.ops) {
            (0, _) => Output::None,
            (1, port) => Output::One(port),
            (n, _) => Output::Many(n),
        }
    }
}
