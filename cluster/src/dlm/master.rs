//! A name on its master: granted locks, conversions that wait, new locks that wait, and the value.

use super::{LockId, Mode, Value};
use crate::mutants::{self, Mutant};
use crate::types::HostId;

/// A lock of some host.
pub(super) type Owner = (HostId, LockId);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Entry {
    owner: Owner,
    granted: Option<Mode>,
    /// The mode that it waits for.
    wanted: Option<Mode>,
    /// Its place in the queue.
    turn: u64,
}

/// What the master has to tell an owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tell {
    Granted(Owner, Mode, Value),
    Deadlock(Owner),
    Released(Owner),
    Blocking(Owner, Mode),
}

/// The queues of one name. Conversions come before new locks, which are served in turn.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Resource {
    entries: Vec<Entry>,
    turn: u64,
    pub(super) value: Value,
    /// Writes are taken over from former lives of the name, and may not be the latest.
    doubtful: bool,
}

impl Resource {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn at(&self, owner: Owner) -> Option<usize> {
        self.entries.iter().position(|e| e.owner == owner)
    }

    /// Takes over a lock as its owner told it.
    pub(super) fn restore(&mut self, owner: Owner, granted: Mode) {
        self.entries.push(Entry { owner, granted: Some(granted), wanted: None, turn: 0 });
    }

    /// Somebody who is gone may have written the value.
    pub(super) fn doubt(&mut self) {
        self.value.valid = false;
        self.doubtful = true;
    }

    /// What is written from now on, in this view, is the latest for sure; and its version is above all
    /// that those who are gone may have given.
    pub(super) fn end_doubt(&mut self, view: u64) {
        if core::mem::take(&mut self.doubtful) {
            self.value.version = self.value.version.max(view.saturating_mul(1 << 32));
        }
    }

    /// Whether a host that is not among the members has such a mode.
    pub(super) fn loses_writer(&self, members: &[HostId]) -> bool {
        let lost = |e: &&Entry| !members.contains(&e.owner.0);
        self.entries.iter().filter(lost).any(|e| e.granted.is_some_and(Mode::writes_value))
    }

    fn write_value(&mut self, mode: Option<Mode>, bytes: Option<Vec<u8>>) {
        if let Some(bytes) = bytes.filter(|_| mode.is_some_and(Mode::writes_value)) {
            // Only a host that lies can have brought it near the end.
            let version = self.value.version.saturating_add(1);
            self.value = Value { bytes, version, valid: !self.doubtful };
        }
    }

    /// Gives a lock another mode, or the first one.
    pub(super) fn want(&mut self, owner: Owner, mode: Mode, value: Option<Vec<u8>>, out: &mut Vec<Tell>) {
        let at = self.at(owner).unwrap_or_else(|| {
            self.entries.push(Entry { owner, granted: None, wanted: None, turn: 0 });
            self.entries.len() - 1
        });
        self.write_value(self.entries[at].granted, value);
        if let Some(now) = self.entries[at].granted
            && now.allows_all_of(mode)
        {
            self.entries[at].granted = Some(mode);
            out.push(Tell::Granted(owner, mode, self.value.clone()));
            return self.grant(out);
        }
        if self.would_deadlock(at, mode) {
            return out.push(Tell::Deadlock(owner));
        }
        self.turn += 1;
        self.entries[at].wanted = Some(mode);
        self.entries[at].turn = self.turn;
        self.grant(out);
        if self.entries[at].wanted.is_some() {
            for (i, e) in self.entries.iter().enumerate() {
                if i != at && e.granted.is_some_and(|g| !g.is_compatible(mode)) {
                    out.push(Tell::Blocking(e.owner, mode));
                }
            }
        }
    }

    /// Whether conversions would wait for each other in a circle if `at` waited for `mode` too: each keeps its
    /// present mode, which is in the way of the next one.
    fn would_deadlock(&self, at: usize, mode: Mode) -> bool {
        if self.entries[at].granted.is_none() {
            return false;
        }
        let mut seen = vec![false; self.entries.len()];
        let mut next = vec![(at, mode)];
        while let Some((waiter, wanted)) = next.pop() {
            for (i, e) in self.entries.iter().enumerate() {
                if i == waiter || seen[i] || e.granted.is_none_or(|g| g.is_compatible(wanted)) {
                    continue;
                }
                if i == at {
                    return true;
                }
                seen[i] = true;
                next.extend(e.wanted.map(|w| (i, w)));
            }
        }
        false
    }

    /// Ends a lock.
    pub(super) fn release(&mut self, owner: Owner, value: Option<Vec<u8>>, out: &mut Vec<Tell>) {
        if let Some(at) = self.at(owner) {
            self.write_value(self.entries[at].granted, value);
            self.entries.remove(at);
        }
        out.push(Tell::Released(owner));
        self.grant(out);
    }

    fn is_free(&self, entry: &Entry, mode: Mode) -> bool {
        let beside = |e: &Entry| e.owner == entry.owner || e.granted.is_none_or(|g| g.is_compatible(mode));
        self.entries.iter().all(beside)
            || entry.granted.is_some() && mutants::active(Mutant::ConversionIgnoresOthers)
    }

    /// Grants what can be granted: every conversion that can be, in turn, and then new locks up to the first
    /// that cannot.
    fn grant(&mut self, out: &mut Vec<Tell>) {
        loop {
            let waiting = |conversions: bool| {
                let waits = move |e: &&Entry| e.wanted.is_some() && e.granted.is_some() == conversions;
                self.entries.iter().filter(waits)
            };
            let free = |e: &&Entry| e.wanted.is_some_and(|mode| self.is_free(e, mode));
            // A conversion that waits must not hold up another one: that could be a circle too.
            let conversion = waiting(true).filter(free).min_by_key(|e| e.turn);
            let new = waiting(false).min_by_key(|e| e.turn).filter(free);
            let new = new.filter(|_| waiting(true).next().is_none());
            let Some(owner) = conversion.or(new).map(|e| e.owner) else { return };
            let Some(entry) = self.entries.iter_mut().find(|e| e.owner == owner) else { return };
            let Some(mode) = entry.wanted.take() else { return };
            entry.granted = Some(mode);
            out.push(Tell::Granted(owner, mode, self.value.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(n: u16) -> Owner {
        (HostId(n), 1)
    }

    fn granted(tells: &[Tell]) -> Vec<(u16, Mode)> {
        let grants = tells.iter().filter_map(|t| match t {
            Tell::Granted(o, mode, _) => Some((o.0.0, *mode)),
            _ => None,
        });
        grants.collect()
    }

    #[test]
    fn conversions_come_before_new_locks_and_both_in_turn() {
        use Mode::*;
        let (mut r, mut out) = (Resource::default(), Vec::new());
        r.want(owner(1), ProtectedRead, None, &mut out);
        r.want(owner(2), ProtectedRead, None, &mut out);
        r.want(owner(3), Exclusive, None, &mut out);
        r.want(owner(4), ProtectedRead, None, &mut out);
        assert_eq!(granted(&out), [(1, ProtectedRead), (2, ProtectedRead)], "4 waits behind 3");
        assert!(out.contains(&Tell::Blocking(owner(1), Exclusive)));
        out.clear();
        r.want(owner(1), Exclusive, None, &mut out);
        r.want(owner(2), Exclusive, None, &mut out);
        assert_eq!(out[out.len() - 1], Tell::Deadlock(owner(2)));
        out.clear();
        r.release(owner(2), None, &mut out);
        assert_eq!(granted(&out), [(1, Exclusive)]);
        out.clear();
        r.release(owner(1), None, &mut out);
        assert_eq!(granted(&out), [(3, Exclusive)]);
        out.clear();
        r.want(owner(3), ConcurrentRead, None, &mut out);
        assert_eq!(granted(&out), [(3, ConcurrentRead), (4, ProtectedRead)]);
    }

    #[test]
    fn the_value_is_written_only_from_a_mode_that_may() {
        use Mode::*;
        let (mut r, mut out) = (Resource::default(), Vec::new());
        r.want(owner(1), Exclusive, None, &mut out);
        r.want(owner(1), Null, Some(vec![7]), &mut out);
        r.want(owner(1), ConcurrentRead, Some(vec![8]), &mut out);
        assert_eq!((r.value.bytes.as_slice(), r.value.version), (&[7][..], 1));
        r.release(owner(1), Some(vec![9]), &mut out);
        assert_eq!(r.value.bytes, [7]);
        assert!(r.is_empty());
    }

    #[test]
    fn versions_after_a_doubt_are_above_all_former_ones() {
        for (view, version) in [(2, 2 << 32), (u64::MAX - 1, u64::MAX)] {
            let mut r = Resource::default();
            r.doubt();
            r.end_doubt(view);
            assert_eq!(r.value.version, version);
        }
    }
}
