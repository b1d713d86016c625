//! What hosts tell each other when the members change, in messages of bounded size.

use std::collections::BTreeMap;

use super::{Body, Told, Value};
use crate::mutants::{self, Mutant};
use crate::types::HostId;

/// Locks, or names with their values, in one message: with the longest names and values that is about half a MiB of
/// JSON.
pub(super) const PART: usize = 256;

/// What the members have told so far.
pub(super) type Recovery = BTreeMap<HostId, Account>;

/// What one member has told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Account {
    pub(super) locks: Vec<Told>,
    /// The names that it mastered.
    pub(super) mastered: Vec<(String, Value)>,
    parts: u32,
    complete: bool,
}

impl Account {
    /// All that a host has to tell.
    pub(super) fn whole(locks: Vec<Told>, mastered: Vec<(String, Value)>) -> Self {
        Account { locks, mastered, parts: 0, complete: true }
    }

    /// Until this is so, nothing of it may be used.
    pub(super) fn is_complete(&self) -> bool {
        self.complete || self.parts > 0 && mutants::active(Mutant::HalfRecoveryUsed)
    }

    /// Takes the next part; one that does not follow the last is of no use.
    pub(super) fn take(&mut self, part: u32, more: bool, locks: Vec<Told>, mastered: Vec<(String, Value)>) {
        if self.complete || part != self.parts {
            return;
        }
        self.parts = self.parts.saturating_add(1);
        self.complete = !more;
        self.locks.extend(locks);
        self.mastered.extend(mastered);
    }

    /// The messages that tell it, of at most `size` entries each.
    pub(super) fn messages(&self, size: usize) -> Vec<Body> {
        let locks = self.locks.chunks(size).map(|some| (some.to_vec(), Vec::new()));
        let mastered = self.mastered.chunks(size).map(|some| (Vec::new(), some.to_vec()));
        let mut parts: Vec<_> = locks.chain(mastered).collect();
        if parts.is_empty() {
            parts.push(Default::default());
        }
        let last = parts.len() - 1;
        let body =
            |(at, (locks, mastered))| Body::Recover { part: at as u32, more: at < last, locks, mastered };
        parts.into_iter().enumerate().map(body).collect()
    }
}
