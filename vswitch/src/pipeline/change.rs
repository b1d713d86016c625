//! Changes of rules, and which cached decisions they reach.
//!
//! A cached decision remembers each table lookup it rests on. A rule that comes, goes or changes can alter the
//! decision only if it is in one of those tables, does not lose to the rule found there, and matches some packet of the
//! cached flow. The flow's packets agree in the bits of its mask and may differ in all others.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::{FlowSpec, Match};
use crate::datapath::cache::CacheKey;
use crate::packet::key::{CACHE_WORDS, FlowKey, WORDS};

/// Changes that are kept for workers; one that is further behind forgets all it cached.
const KEPT: usize = 256;
/// Most lookups that a decision remembers; with more, every change reaches it.
const LOOKUPS_MAX: usize = 16;

/// One rule that was added, removed or changed.
#[derive(Clone, Debug)]
pub(crate) struct FlowChange {
    table: u8,
    priority: u16,
    matches: Match,
}

impl From<&FlowSpec> for FlowChange {
    fn from(s: &FlowSpec) -> Self {
        Self { table: s.table, priority: s.priority, matches: s.matches }
    }
}

#[derive(Clone, Debug)]
struct Lookup {
    table: u8,
    /// Priority of the rule found.
    found: Option<u16>,
    /// The key at this point; `None`: the packet's own.
    key: Option<Box<FlowKey>>,
}

/// The table lookups that a decision rests on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lookups {
    list: Vec<Lookup>,
    too_many: bool,
}

impl Lookups {
    /// Notes a lookup with `key` for a packet whose own key is `packet`.
    pub fn note(&mut self, table: u8, found: Option<u16>, key: &FlowKey, packet: &FlowKey) {
        if self.list.len() == LOOKUPS_MAX {
            self.too_many = true;
            return;
        }
        let key = (key != packet).then(|| Box::new(*key));
        self.list.push(Lookup { table, found, key });
    }

    /// Whether a change may alter the decision for some packet that has the bits `key` in `mask`.
    pub fn reached_by(&self, change: &FlowChange, key: &CacheKey, mask: &CacheKey) -> bool {
        self.too_many || self.list.iter().any(|l| l.reached_by(change, key, mask))
    }
}

impl Lookup {
    fn reached_by(&self, c: &FlowChange, key: &CacheKey, mask: &CacheKey) -> bool {
        if self.table != c.table || self.found.is_some_and(|p| c.priority < p) {
            return false;
        }
        (0..WORDS).all(|i| {
            let value = match &self.key {
                Some(k) => k.w[i],
                None if i < CACHE_WORDS => key[i],
                None => 0,
            };
            // What the pipeline alone sets is the same for all packets of the flow; so is what it overwrote in fields
            // whose bits are in the mask.
            let known = if i < CACHE_WORDS { mask[i] } else { u64::MAX };
            (value ^ c.matches.value.w[i]) & c.matches.mask.w[i] & known == 0
        })
    }
}

/// The latest changes of a switch's rules.
#[derive(Debug, Default)]
pub(crate) struct ChangeLog {
    /// Number of changes so far.
    total: AtomicU64,
    kept: Mutex<VecDeque<FlowChange>>,
}

impl ChangeLog {
    /// Number of changes so far: where a worker stands that has seen all.
    #[inline]
    pub fn position(&self) -> u64 {
        self.total.load(Ordering::Acquire)
    }

    /// Tells of changes, which are in the tables already.
    pub fn add(&self, changes: impl IntoIterator<Item = FlowChange>) {
        let mut kept = self.kept.lock();
        let mut total = self.total.load(Ordering::Relaxed);
        for c in changes {
            if kept.len() == KEPT {
                kept.pop_front();
            }
            kept.push_back(c);
            total += 1;
        }
        self.total.store(total, Ordering::Release);
    }

    /// The changes from a position on, and the new position; `None` in place of changes that are no longer kept.
    pub fn since(&self, position: u64) -> (Option<Vec<FlowChange>>, u64) {
        let kept = self.kept.lock();
        let total = self.total.load(Ordering::Relaxed);
        let missed = total.wrapping_sub(position) as usize;
        let changes = kept.len().checked_sub(missed).map(|at| kept.range(at..).cloned().collect());
        (changes, total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::key::Field;

    fn change(table: u8, priority: u16, matches: Match) -> FlowChange {
        FlowChange { table, priority, matches }
    }

    #[test]
    fn changes_reach_what_they_may_alter() {
        let packet = FlowKey::default().with(Field::EthDst, 5).with(Field::IpProto, 17);
        let mut mask = FlowKey::default();
        mask.mark(Field::EthDst);
        let words = |k: &FlowKey| CacheKey::try_from(&k.w[..CACHE_WORDS]).unwrap();
        let mut l = Lookups::default();
        l.note(0, Some(10), &packet, &packet);
        l.note(3, None, &packet.with(Field::Reg(1), 7), &packet);
        let reached = |c: FlowChange| l.reached_by(&c, &words(&packet.masked(&mask)), &words(&mask));
        let any = Match::default();
        assert!(reached(change(0, 10, any)) && reached(change(3, 0, any)));
        assert!(!reached(change(0, 9, any)), "it loses to the rule found");
        assert!(!reached(change(1, 99, any)), "the table was not asked");
        assert!(!reached(change(0, 99, any.field(Field::EthDst, 6))));
        assert!(reached(change(0, 99, any.field(Field::EthDst, 5))));
        assert!(reached(change(0, 99, any.field(Field::IpProto, 6))), "other packets of the flow may match");
        assert!(!reached(change(3, 99, any.field(Field::Reg(1), 6))));
        assert!(reached(change(3, 99, any.field(Field::Reg(1), 7))));
        assert!(!reached(change(0, 99, any.field(Field::Reg(1), 7))));
    }

    #[test]
    fn a_worker_that_is_too_far_behind_is_told() {
        let log = ChangeLog::default();
        log.add((0..10).map(|i| change(i, 0, Match::default())));
        let (changes, position) = log.since(7);
        assert_eq!(
            (changes.unwrap().iter().map(|c| c.table).collect::<Vec<_>>(), position),
            (vec![7, 8, 9], 10)
        );
        log.add((0..KEPT).map(|_| change(0, 0, Match::default())));
        assert!(log.since(9).0.is_none() && log.since(10).0.is_some());
    }
}
