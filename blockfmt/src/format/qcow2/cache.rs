//! The cache of L2 slices.
//!
//! Lookups take no lock: every word is an atomic, and a sequence number per slot tells a reader whether the
//! slot was given to another slice (or, with two-word entries, changed) meanwhile. Changes take the lock
//! of the slot's set. A slot that holds unwritten changes is never reused.

use crate::Result;
use crate::sequence::Sequence;
use parking_lot::Mutex;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const WAYS: usize = 8;
const COUNTERS: usize = 16;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Clean,
    /// Holds changes that are in no write-back.
    Dirty,
    /// A copy is being written.
    Writing,
    /// A copy is being written, and there are newer changes.
    WritingDirty,
}

#[derive(Debug)]
struct Slot {
    sequence: Sequence,
    used: AtomicBool,
    words: Box<[AtomicU64]>,
}

#[derive(Debug, Default)]
struct SetState {
    states: [State; WAYS],
    hand: usize,
}

#[derive(Debug, Default)]
struct Set {
    /// Slice number plus one; zero for an empty slot.
    tags: [AtomicU64; WAYS],
    slots: [OnceLock<Slot>; WAYS],
    lock: Mutex<SetState>,
}

/// What [`SliceCache::with_slice`] found.
pub(super) enum Access<R> {
    Done(R),
    /// Every candidate slot holds unwritten changes: write back and try again.
    Full,
}

/// A slice under its lock.
pub(super) struct SliceMut<'a> {
    slot: &'a Slot,
    wide: bool,
    changed: bool,
}

impl SliceMut<'_> {
    #[cfg(test)]
    pub fn get(&self, word: usize) -> u64 {
        self.slot.words[word].load(Ordering::Relaxed)
    }

    /// Sets entry number `index` (and its bitmap, in images with extended entries).
    pub fn set(&mut self, index: usize, entry: u64, bitmap: u64) {
        self.changed = true;
        if !self.wide {
            self.slot.words[index].store(entry, Ordering::Release);
            return;
        }
        self.slot.sequence.write(|| {
            self.slot.words[2 * index].store(entry, Ordering::Relaxed);
            self.slot.words[2 * index + 1].store(bitmap, Ordering::Relaxed);
        });
    }
}

/// A set-associative cache of L2 slices, keyed by slice number in guest order.
#[derive(Debug)]
pub(super) struct SliceCache {
    sets: Box<[Set]>,
    words: usize,
    wide: bool,
    dirty: Mutex<Vec<u64>>,
    misses: AtomicU64,
    /// Lookups, counted by several threads without sharing a cache line.
    lookups: Box<[Counter]>,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Counter(AtomicU64);

impl SliceCache {
    /// A cache of at least `slots` slices of `words` words; `wide` says that entries have two words.
    pub fn new(slots: usize, words: usize, wide: bool) -> Self {
        let sets = (0..slots.div_ceil(WAYS).max(1)).map(|_| Set::default()).collect();
        let lookups = (0..COUNTERS).map(|_| Counter::default()).collect();
        SliceCache { sets, words, wide, dirty: Mutex::default(), misses: AtomicU64::new(0), lookups }
    }

    /// Lookups so far, and slices that had to be loaded.
    pub fn stats(&self) -> (u64, u64) {
        let lookups = self.lookups.iter().map(|c| c.0.load(Ordering::Relaxed)).sum();
        (lookups, self.misses.load(Ordering::Relaxed))
    }

    fn set(&self, slice: u64) -> &Set {
        &self.sets[(slice % self.sets.len() as u64) as usize]
    }

    /// Runs `f` on the words of a slice if it is cached. `f` may run several times and may see a mixture
    /// of states; the result that is returned comes from a consistent one.
    pub fn read<R>(&self, slice: u64, mut f: impl FnMut(&[AtomicU64]) -> R) -> Option<R> {
        self.lookups[crate::gate::shard() % COUNTERS].0.fetch_add(1, Ordering::Relaxed);
        let set = self.set(slice);
        for (tag, slot) in set.tags.iter().zip(&set.slots) {
            if tag.load(Ordering::Acquire) != slice + 1 {
                continue;
            }
            let slot = slot.get()?;
            let result =
                slot.sequence.read(|| (tag.load(Ordering::Acquire) == slice + 1).then(|| f(&slot.words)));
            if result.is_some() && !slot.used.load(Ordering::Relaxed) {
                slot.used.store(true, Ordering::Relaxed);
            }
            return result;
        }
        None
    }

    /// Runs `f` on a slice under its lock, after `load` filled it if it was not cached.
    pub fn with_slice<R>(
        &self,
        slice: u64,
        load: impl FnOnce(&mut [u64]) -> Result<()>,
        f: impl FnOnce(&mut SliceMut<'_>) -> R,
    ) -> Result<Access<R>> {
        let set = self.set(slice);
        let mut state = set.lock.lock();
        let way = match find(set, slice) {
            Some(way) => way,
            None => {
                let Some(way) = self.victim(set, &mut state) else { return Ok(Access::Full) };
                self.misses.fetch_add(1, Ordering::Relaxed);
                let mut words = vec![0; self.words];
                load(&mut words)?;
                fill(set, way, slice, &words);
                way
            }
        };
        let slot = set.slots[way].get_or_init(|| new_slot(self.words));
        slot.used.store(true, Ordering::Relaxed);
        let mut access = SliceMut { slot, wide: self.wide, changed: false };
        let result = f(&mut access);
        if access.changed {
            let old = state.states[way];
            state.states[way] = match old {
                State::Clean | State::Dirty => State::Dirty,
                State::Writing | State::WritingDirty => State::WritingDirty,
            };
            if matches!(old, State::Clean | State::Writing) {
                self.dirty.lock().push(slice);
            }
        }
        Ok(Access::Done(result))
    }

    /// A slot to reuse, by the clock algorithm.
    fn victim(&self, set: &Set, state: &mut SetState) -> Option<usize> {
        for _ in 0..2 * WAYS {
            let way = state.hand;
            state.hand = (way + 1) % WAYS;
            if state.states[way] != State::Clean {
                continue;
            }
            match set.slots[way].get() {
                Some(slot) if slot.used.swap(false, Ordering::Relaxed) => {}
                _ => return Some(way),
            }
        }
        (0..WAYS).find(|way| state.states[*way] == State::Clean)
    }

    /// Starts a write-back: copies of all changed slices. Each must be passed to
    /// [`written`](Self::written) afterwards.
    pub fn take_dirty(&self) -> Vec<(u64, Vec<u64>)> {
        let slices = std::mem::take(&mut *self.dirty.lock());
        let mut copies = Vec::with_capacity(slices.len());
        for slice in slices {
            let set = self.set(slice);
            let mut state = set.lock.lock();
            if let Some(way) = find(set, slice)
                && let Some(slot) = set.slots[way].get()
            {
                state.states[way] = State::Writing;
                copies.push((slice, slot.words.iter().map(|w| w.load(Ordering::Relaxed)).collect()));
            }
        }
        copies
    }

    /// Ends the write-back of a slice.
    pub fn written(&self, slice: u64, ok: bool) {
        let set = self.set(slice);
        let mut state = set.lock.lock();
        let Some(way) = find(set, slice) else { return };
        state.states[way] = match state.states[way] {
            State::WritingDirty => State::Dirty,
            State::Writing if !ok => {
                self.dirty.lock().push(slice);
                State::Dirty
            }
            _ => State::Clean,
        };
    }

    /// Forgets everything. There must be no unwritten change and no concurrent access.
    pub fn clear(&self) {
        for set in &self.sets {
            let mut state = set.lock.lock();
            *state = SetState::default();
            for tag in &set.tags {
                tag.store(0, Ordering::Release);
            }
        }
    }
}

fn find(set: &Set, slice: u64) -> Option<usize> {
    set.tags.iter().position(|tag| tag.load(Ordering::Relaxed) == slice + 1)
}

fn new_slot(words: usize) -> Slot {
    Slot {
        sequence: Sequence::default(),
        used: AtomicBool::new(false),
        words: (0..words).map(|_| AtomicU64::new(0)).collect(),
    }
}

/// Gives a slot to a slice; the set's lock is held.
fn fill(set: &Set, way: usize, slice: u64, words: &[u64]) {
    let slot = set.slots[way].get_or_init(|| new_slot(words.len()));
    slot.sequence.write(|| {
        for (to, from) in slot.words.iter().zip(words) {
            to.store(*from, Ordering::Relaxed);
        }
        set.tags[way].store(slice + 1, Ordering::Relaxed);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(cache: &SliceCache, slice: u64) -> Access<u64> {
        let fill = |words: &mut [u64]| {
            words.fill(slice * 10);
            Ok(())
        };
        cache.with_slice(slice, fill, |s| s.get(0)).unwrap()
    }

    #[test]
    fn dirty_slices_stay_and_clean_ones_go() {
        let cache = SliceCache::new(8, 4, false);
        for slice in 0..8 {
            let change = |s: &mut SliceMut<'_>| s.set(1, 7, 0);
            assert!(matches!(cache.with_slice(slice, |_| Ok(()), change).unwrap(), Access::Done(())));
        }
        assert!(matches!(load(&cache, 100), Access::Full));
        let copies = cache.take_dirty();
        assert_eq!(copies.len(), 8);
        // A change during the write-back keeps its slice.
        assert!(matches!(cache.with_slice(3, |_| Ok(()), |s| s.set(2, 9, 0)).unwrap(), Access::Done(())));
        for (slice, words) in copies {
            assert_eq!(words, [0, 7, 0, 0]);
            cache.written(slice, true);
        }
        for slice in 100..120 {
            assert!(matches!(load(&cache, slice), Access::Done(v) if v == slice * 10));
        }
        assert_eq!(cache.take_dirty(), [(3, vec![0, 7, 9, 0])]);
    }

    #[test]
    fn readers_never_see_a_mixture() {
        let cache = SliceCache::new(8, 64, false);
        std::thread::scope(|scope| {
            let cache = &cache;
            for seed in 0..2u64 {
                scope.spawn(move || {
                    for i in 0..20_000u64 {
                        load(cache, (i * 7 + seed) % 40);
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(move || {
                    for i in 0..40_000u64 {
                        let slice = i % 40;
                        let read = |words: &[AtomicU64]| {
                            words.iter().map(|w| w.load(Ordering::Relaxed)).collect::<Vec<_>>()
                        };
                        if let Some(words) = cache.read(slice, read) {
                            assert!(words.iter().all(|w| *w == slice * 10), "{slice}: {words:?}");
                        }
                    }
                });
            }
        });
    }
}
