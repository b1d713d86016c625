//! Locks on ranges of clusters or granules.

use crate::sync::{Condvar, Mutex};
use std::ops::Range;

/// The ranges that are locked.
#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    held: Mutex<Vec<Range<u64>>>,
    released: Condvar,
}

/// A locked range; dropping it unlocks.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    range: Range<u64>,
    alone: bool,
}

impl RangeGuard<'_> {
    /// Whether no other range was locked when this one was.
    pub(crate) fn alone(&self) -> bool {
        self.alone
    }
}

impl RangeLocks {
    /// Waits until no overlapping range is locked and locks this one.
    /// A thread must hold at most one range.
    pub fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        let mut held = self.held.lock();
        while held.iter().any(|r| r.start < range.end && range.start < r.end) {
            self.released.wait(&mut held);
        }
        let alone = held.is_empty();
        held.push(range.clone());
        RangeGuard { locks: self, range, alone }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut held = self.locks.held.lock();
        if let Some(at) = held.iter().position(|r| *r == self.range) {
            held.swap_remove(at);
        }
        drop(held);
        self.locks.released.notify_all();
    }
}
