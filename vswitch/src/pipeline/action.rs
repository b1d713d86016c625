//! Actions and instructions of a rule.

use super::{FlowSpec, Match};
use crate::packet::key::{Field, FlowKey};
use crate::port::PortId;

/// Some bits of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// The field.
    pub field: Field,
    /// First bit, counted from the lowest.
    pub offset: u32,
    /// Number of bits.
    pub bits: u32,
}

impl Location {
    /// A whole field.
    pub fn whole(field: Field) -> Self {
        Self { field, offset: 0, bits: field.bits() }
    }

    /// The bits in the field's place.
    pub fn mask(&self) -> u128 {
        let ones = if self.bits >= 128 { u128::MAX } else { (1 << self.bits) - 1 };
        ones.checked_shl(self.offset).unwrap_or(0) & self.field.ones()
    }

    /// Reads the bits.
    pub fn get(&self, key: &FlowKey) -> u128 {
        (key.get(self.field) & self.mask()).checked_shr(self.offset).unwrap_or(0)
    }

    /// The value in the field's place.
    pub fn place(&self, value: u128) -> u128 {
        value.checked_shl(self.offset).unwrap_or(0) & self.mask()
    }
}

/// One step of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send out of a port; the port it came in by is skipped, as OpenFlow wants it.
    Output(PortId),
    /// Send out of the port whose number is in a field.
    OutputField(Location),
    /// Send back out of the port it came in by.
    InPort,
    /// Send out of all other ports, whatever their VLANs.
    All,
    /// Flood within the frame's VLAN, without learning.
    Flood,
    /// Switch as a learning bridge does.
    Normal,
    /// Give to the controllers, at most `max_len` bytes of the frame.
    Controller {
        /// Longest part that is given.
        max_len: u16,
        /// Why, in OpenFlow's numbers.
        reason: u8,
    },
    /// Add an outer tag with this TPID; VLAN zero until set.
    PushVlan(u16),
    /// Remove the outer tag.
    PopVlan,
    /// Overwrite bits of a field.
    SetField {
        /// The field.
        field: Field,
        /// The bits.
        value: u128,
        /// Which bits.
        mask: u128,
    },
    /// Copy bits from one field to another; the widths are equal.
    Move {
        /// From.
        from: Location,
        /// To.
        to: Location,
    },
    /// Decrement the time to live; a packet that runs out is dropped.
    DecTtl,
    /// Treat by a group.
    Group(u32),
    /// Limit the rate: packets beyond it are dropped.
    Meter(u32),
    /// Look the packet up in another table and come back.
    Resubmit {
        /// Table; `None`: this one.
        table: Option<u8>,
        /// Port that the lookup sees.
        in_port: Option<PortId>,
    },
    /// Track the connection.
    Conntrack(ConntrackAction),
    /// Make a rule from the packet.
    Learn(Box<LearnSpec>),
}

/// Connection tracking, as the `ct` action of ovs-ofctl.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConntrackAction {
    /// Zone.
    pub zone: u16,
    /// Whether a new connection is remembered.
    pub commit: bool,
    /// Table in which the packet goes on with its connection's state, after which the rest of this list runs on the
    /// packet as it was.
    pub table: Option<u8>,
    /// Mark given to a committed connection: value and mask.
    pub mark: Option<(u32, u32)>,
    /// Label given to a committed connection: value and mask.
    pub label: Option<(u128, u128)>,
}

/// How a learned rule is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LearnSpec {
    /// The rule without the parts that depend on the packet.
    pub base: FlowSpec,
    /// The parts that depend on the packet.
    pub steps: Vec<LearnStep>,
}

/// One part of a learned rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LearnStep {
    /// Match the bits of `to` with those that the packet has in `from`.
    Match {
        /// Bits of the packet.
        from: Location,
        /// Bits of the rule's match.
        to: Location,
    },
    /// Match a constant.
    MatchValue {
        /// The constant.
        value: u128,
        /// Bits of the rule's match.
        to: Location,
    },
    /// Load bits of the packet into a field.
    Load {
        /// Bits of the packet.
        from: Location,
        /// Where the rule loads them to.
        to: Location,
    },
    /// Load a constant into a field.
    LoadValue {
        /// The constant.
        value: u128,
        /// Where the rule loads it to.
        to: Location,
    },
    /// Output to the port whose number the packet has in these bits.
    Output(Location),
}

impl LearnSpec {
    /// The rule for a packet; every bit read is marked in `mask`.
    pub(crate) fn rule(&self, key: &FlowKey, mask: &mut FlowKey) -> FlowSpec {
        let mut read = |l: &Location| {
            let mut m = FlowKey::default();
            m.set(l.field, l.mask());
            mask.join(&m);
            l.get(key)
        };
        let mut spec = self.base.clone();
        let matching = |spec: &mut FlowSpec, to: &Location, v: u128| {
            let old = (spec.matches.value.get(to.field), spec.matches.mask.get(to.field));
            let m: Match = spec.matches;
            spec.matches = m.masked(to.field, old.0 | to.place(v), old.1 | to.mask());
        };
        let load = |spec: &mut FlowSpec, to: &Location, v: u128| {
            let set = Action::SetField { field: to.field, value: to.place(v), mask: to.mask() };
            spec.instructions.apply.push(set);
        };
        for step in &self.steps {
            match step {
                LearnStep::Match { from, to } => matching(&mut spec, to, read(from)),
                LearnStep::MatchValue { value, to } => matching(&mut spec, to, *value),
                LearnStep::Load { from, to } => load(&mut spec, to, read(from)),
                LearnStep::LoadValue { value, to } => load(&mut spec, to, *value),
                LearnStep::Output(l) => spec.instructions.apply.push(Action::Output(read(l) as PortId)),
            }
        }
        spec
    }
}

/// What a rule does, in the order of execution.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instructions {
    /// Limit the rate first.
    pub meter: Option<u32>,
    /// Do this at once.
    pub apply: Vec<Action>,
    /// Forget what is to be done at the end.
    pub clear: bool,
    /// Add to what is to be done when the packet leaves the last table.
    pub write: Vec<Action>,
    /// Set metadata: value and mask.
    pub metadata: Option<(u64, u64)>,
    /// Go on in a later table.
    pub goto: Option<u8>,
}

impl Instructions {
    /// Only a list of actions.
    pub fn apply(actions: Vec<Action>) -> Self {
        Self { apply: actions, ..Self::default() }
    }
}
