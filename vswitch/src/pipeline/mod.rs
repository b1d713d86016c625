//! The flow pipeline: tables of rules, their actions, groups and meters.
//!
//! The model is that of OpenFlow 1.3 with the extensions that `ovs-ofctl` uses (registers, resubmit, conntrack,
//! learn), free of any wire format.

mod action;
mod change;
mod group;
mod meter;
mod table;
mod text;

/// Number of tables: 0 to 253. OpenFlow gives table 254 to no one, and 255 means "all".
pub(crate) const TABLES: u8 = 254;

pub use action::{Action, ConntrackAction, Instructions, LearnSpec, LearnStep, Location};
pub(crate) use change::{ChangeLog, FlowChange, Lookups};
pub use group::{Bucket, Group, GroupKind};
pub use meter::{Meter, MeterConfig};
pub use table::{FlowEntry, FlowFilter, FlowSpec};
pub(crate) use table::{GROUPS_MAX, RULES_MAX, Tables};
pub(crate) use text::Fields;

use crate::packet::key::{Field, FlowKey};

/// What a rule matches: the bits of `mask` must equal those of `value`. The default matches everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Match {
    /// Values; zero outside of the mask.
    pub value: FlowKey,
    /// Bits that count.
    pub mask: FlowKey,
}

impl Match {
    /// Adds an exact match of a field.
    #[must_use]
    pub fn field(self, f: Field, value: u128) -> Self {
        self.masked(f, value, f.ones())
    }

    /// Adds a match of the bits of a field that are set in `mask`.
    #[must_use]
    pub fn masked(mut self, f: Field, value: u128, mask: u128) -> Self {
        let mask = mask & f.ones();
        self.value.set(f, value & mask);
        self.mask.set(f, mask);
        self
    }

    /// Whether a packet with `key` matches.
    pub fn matches(&self, key: &FlowKey) -> bool {
        key.matches(&self.value, &self.mask)
    }

    /// Whether some packet matches both.
    pub fn overlaps(&self, other: &Match) -> bool {
        let both = |i: usize| self.mask.w[i] & other.mask.w[i];
        (0..self.mask.w.len()).all(|i| (self.value.w[i] ^ other.value.w[i]) & both(i) == 0)
    }

    /// Whether everything that `other` matches is matched by this too.
    pub fn covers(&self, other: &Match) -> bool {
        let wider = self.mask.w.iter().zip(&other.mask.w).all(|(a, b)| a & !b == 0);
        wider && other.value.matches(&self.value, &self.mask)
    }
}
