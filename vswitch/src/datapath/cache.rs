//! The flow cache of one worker: tuple space search over masked keys, with a signature cache in front.
//!
//! Every decision of the slow path comes with the mask of the bits it looked at. Entries with the same mask form a
//! subtable, a hash table over the masked key. Two entries that match one packet always hold the same decision, so
//! the first match wins. The signature cache maps the hash of a whole key to the entry that matched last and saves
//! the search when there are many subtables.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use crate::packet::key::{CACHE_WORDS, FlowKey};
use crate::sys::prefetch;

/// Most entries; beyond, entries that were not used lately make room.
const CAPACITY: usize = 262_144;
/// Slots of the signature cache.
const SIGNATURES: usize = 1 << 15;
/// From this many subtables on, the signature cache is asked first.
const SIGNATURE_MIN: usize = 3;
const NONE: u32 = u32::MAX;

/// The words of a key, or of a mask, that the cache looks at.
pub type CacheKey = [u64; CACHE_WORDS];

#[derive(Debug)]
struct Entry<V> {
    key: CacheKey,
    /// Next entry of the same hash bucket.
    next: u32,
    subtable: u16,
    used: bool,
    value: Option<V>,
}

#[derive(Debug)]
struct Subtable {
    mask: CacheKey,
    /// Words of the mask that are not zero.
    words: Vec<u8>,
    /// Hash buckets: index of the first entry.
    heads: Vec<u32>,
    len: usize,
    hits: u64,
    /// Whether the mask ends with the Ethernet header.
    l2_only: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct FlowCache<V> {
    subtables: Vec<Subtable>,
    /// Subtables that hold entries, in the order they are searched: most hits first.
    order: Vec<u16>,
    entries: Vec<Entry<V>>,
    free: Vec<u32>,
    /// Entries freed since the last burst was looked up: what that lookup found must not change its meaning before
    /// the burst is done.
    freed: Vec<u32>,
    signatures: Vec<u32>,
    seed: u64,
    hand: usize,
    lookups: u32,
    l2_only: bool,
}

impl<V> FlowCache<V> {
    pub fn new() -> Self {
        Self {
            subtables: Vec::new(),
            order: Vec::new(),
            entries: Vec::new(),
            free: Vec::new(),
            freed: Vec::new(),
            signatures: vec![NONE; SIGNATURES],
            seed: RandomState::new().hash_one(0) | 1,
            hand: 0,
            lookups: 0,
            l2_only: true,
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.subtables.clear();
        self.order.clear();
        self.entries.clear();
        self.free.clear();
        self.freed.clear();
        self.signatures.fill(NONE);
        self.l2_only = true;
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len() - self.freed.len()
    }

    /// Whether all masks end with the Ethernet header, so that keys need no more.
    #[inline]
    pub fn is_l2_only(&self) -> bool {
        self.l2_only
    }

    /// The value of an entry that a lookup returned.
    #[inline]
    pub fn value(&self, i: u32) -> Option<&V> {
        self.entries.get(i as usize)?.value.as_ref()
    }

    /// The value of an entry, to be changed.
    #[inline]
    pub fn value_mut(&mut self, i: u32) -> Option<&mut V> {
        self.entries.get_mut(i as usize)?.value.as_mut()
    }

    /// Finds the entries of several keys; those without one get `None`.
    pub fn lookup_burst(&mut self, keys: &[FlowKey], found: &mut [Option<u32>]) {
        self.free.append(&mut self.freed);
        if let [only] = self.order[..] {
            self.lookup_one_table(only, keys, found);
        } else {
            for (k, f) in keys.iter().zip(found.iter_mut()) {
                *f = self.lookup(k);
            }
        }
        self.lookups = self.lookups.wrapping_add(keys.len() as u32);
        if self.lookups >> 16 != 0 && self.order.len() > 1 {
            self.lookups = 0;
            let tables = &mut self.subtables;
            self.order.sort_by_key(|t| std::cmp::Reverse(tables[usize::from(*t)].hits));
            tables.iter_mut().for_each(|t| t.hits /= 2);
        }
    }

    /// With a single mask the loads of different packets overlap: first all buckets, then all entries.
    fn lookup_one_table(&mut self, only: u16, keys: &[FlowKey], found: &mut [Option<u32>]) {
        let t = &self.subtables[usize::from(only)];
        let mut firsts = [NONE; crate::packet::BURST];
        let mut last = NONE;
        for ((i, k), first) in keys.iter().enumerate().zip(&mut firsts) {
            // Packets of one flow follow each other: compare with the last entry before hashing.
            if i > 0 && last != NONE && equal(t, &self.entries[last as usize].key, k) {
                *first = last;
                continue;
            }
            *first = t.heads[t.bucket(k, self.seed)];
            if *first != NONE {
                prefetch(&raw const self.entries[*first as usize]);
            }
            last = *first;
        }
        for ((k, f), &first) in keys.iter().zip(found.iter_mut()).zip(&firsts) {
            *f = chain(&self.entries, t, first, k);
            if let Some(e) = *f {
                self.entries[e as usize].used = true;
            }
        }
    }

    /// Finds the entry of one key.
    pub fn lookup(&mut self, key: &FlowKey) -> Option<u32> {
        let signature = (self.order.len() >= SIGNATURE_MIN)
            .then(|| hash_words(&key.w, 0..CACHE_WORDS, self.seed) as usize % SIGNATURES);
        if let Some(s) = signature
            && let Some(e) = self.entries.get(self.signatures[s] as usize)
            && e.value.is_some()
            && equal(&self.subtables[usize::from(e.subtable)], &e.key, key)
        {
            let i = self.signatures[s];
            self.entries[i as usize].used = true;
            return Some(i);
        }
        for &o in &self.order {
            let t = &mut self.subtables[usize::from(o)];
            let first = t.heads[t.bucket(key, self.seed)];
            if let Some(i) = chain(&self.entries, t, first, key) {
                t.hits += 1;
                self.entries[i as usize].used = true;
                if let Some(s) = signature {
                    self.signatures[s] = i;
                }
                return Some(i);
            }
        }
        None
    }

    /// Adds or replaces an entry; what has to make room is given to `evicted`.
    pub fn insert(&mut self, key: &FlowKey, mask: &FlowKey, value: V, mut evicted: impl FnMut(V)) -> u32 {
        if self.len() >= CAPACITY
            && let Some(old) = self.evict()
        {
            evicted(old);
        }
        let key = key.masked(mask);
        let t = self.subtable(mask);
        let sub = &self.subtables[t];
        let bucket = sub.bucket(&key, self.seed);
        if let Some(i) = chain(&self.entries, sub, sub.heads[bucket], &key) {
            if let Some(old) = self.entries[i as usize].value.replace(value) {
                evicted(old);
            }
            return i;
        }
        let mut words = [0; CACHE_WORDS];
        words.copy_from_slice(&key.w[..CACHE_WORDS]);
        let sub = &mut self.subtables[t];
        let entry =
            Entry { key: words, next: sub.heads[bucket], subtable: t as u16, used: true, value: Some(value) };
        let i = match self.free.pop() {
            Some(i) => {
                self.entries[i as usize] = entry;
                i
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as u32
            }
        };
        sub.heads[bucket] = i;
        sub.len += 1;
        if sub.len > sub.heads.len() {
            self.rehash(t);
        }
        i
    }

    /// Takes an entry out.
    pub fn remove(&mut self, i: u32) -> Option<V> {
        let e = self.entries.get_mut(i as usize)?;
        let value = e.value.take()?;
        let next = e.next;
        let t = &mut self.subtables[usize::from(e.subtable)];
        let bucket = hash_masked(t, &e.key, self.seed) as usize & (t.heads.len() - 1);
        t.len -= 1;
        let emptied = t.len == 0;
        let mut at = t.heads[bucket];
        if at == i {
            t.heads[bucket] = next;
        } else {
            while at != NONE {
                let e = &mut self.entries[at as usize];
                if e.next == i {
                    e.next = next;
                    break;
                }
                at = e.next;
            }
        }
        self.freed.push(i);
        if emptied {
            self.order.retain(|o| self.subtables[usize::from(*o)].len > 0);
            self.l2_only = self.order.iter().all(|o| self.subtables[usize::from(*o)].l2_only);
        }
        Some(value)
    }

    /// Takes out the entries that `keep` refuses, given key, mask and value, and gives them to `dropped`.
    pub fn retain(
        &mut self,
        mut keep: impl FnMut(&CacheKey, &CacheKey, &mut V) -> bool,
        mut dropped: impl FnMut(V),
    ) {
        for i in 0..self.entries.len() {
            let e = &mut self.entries[i];
            let mask = &self.subtables[usize::from(e.subtable)].mask;
            if e.value.as_mut().is_some_and(|v| !keep(&e.key, mask, v)) {
                self.remove(i as u32).into_iter().for_each(&mut dropped);
            }
        }
    }

    /// Removes an entry that was not used since the hand last passed it.
    fn evict(&mut self) -> Option<V> {
        for _ in 0..2 * self.entries.len() {
            self.hand = (self.hand + 1) % self.entries.len();
            let e = &mut self.entries[self.hand];
            if e.value.is_some() && !std::mem::take(&mut e.used) {
                return self.remove(self.hand as u32);
            }
        }
        None
    }

    fn subtable(&mut self, mask: &FlowKey) -> usize {
        let cached = &mask.w[..CACHE_WORDS];
        if let Some(t) = self.order.iter().find(|t| self.subtables[usize::from(**t)].mask == cached) {
            return usize::from(*t);
        }
        let mut words = [0; CACHE_WORDS];
        words.copy_from_slice(cached);
        let new = Subtable {
            mask: words,
            words: (0..CACHE_WORDS as u8).filter(|w| words[usize::from(*w)] != 0).collect(),
            heads: vec![NONE; 64],
            len: 0,
            hits: 0,
            l2_only: mask.is_l2_mask(),
        };
        self.l2_only &= new.l2_only;
        let at = match self.subtables.iter().position(|t| t.len == 0) {
            Some(unused) => {
                self.subtables[unused] = new;
                unused
            }
            None => {
                self.subtables.push(new);
                self.subtables.len() - 1
            }
        };
        self.order.push(at as u16);
        at
    }

    fn rehash(&mut self, t: usize) {
        let sub = &mut self.subtables[t];
        sub.heads = vec![NONE; sub.heads.len() * 2];
        for (i, e) in self.entries.iter_mut().enumerate() {
            if usize::from(e.subtable) == t && e.value.is_some() {
                let bucket = hash_masked(sub, &e.key, self.seed) as usize & (sub.heads.len() - 1);
                e.next = sub.heads[bucket];
                sub.heads[bucket] = i as u32;
            }
        }
    }
}

impl Subtable {
    #[inline(always)]
    fn bucket(&self, key: &FlowKey, seed: u64) -> usize {
        let mut h = seed;
        for &w in &self.words {
            let w = usize::from(w) % CACHE_WORDS;
            h = mix(h ^ (key.w[w] & self.mask[w]));
        }
        h as usize & (self.heads.len() - 1)
    }
}

#[inline(always)]
fn mix(x: u64) -> u64 {
    let m = u128::from(x) * 0x9e37_79b9_7f4a_7c15_u128;
    (m as u64) ^ (m >> 64) as u64
}

fn hash_words(w: &[u64], range: std::ops::Range<usize>, seed: u64) -> u64 {
    w[range].iter().fold(seed, |h, w| mix(h ^ w))
}

fn hash_masked(t: &Subtable, key: &[u64; CACHE_WORDS], seed: u64) -> u64 {
    t.words.iter().fold(seed, |h, &w| mix(h ^ key[usize::from(w)]))
}

#[inline(always)]
fn equal(t: &Subtable, entry: &[u64; CACHE_WORDS], key: &FlowKey) -> bool {
    t.words.iter().all(|&w| {
        let w = usize::from(w) % CACHE_WORDS;
        key.w[w] & t.mask[w] == entry[w]
    })
}

#[inline(always)]
fn chain<V>(entries: &[Entry<V>], t: &Subtable, mut i: u32, key: &FlowKey) -> Option<u32> {
    while let Some(e) = entries.get(i as usize) {
        // A free entry can be met through a stale hint only; its chain is not followed.
        e.value.as_ref()?;
        if equal(t, &e.key, key) {
            return Some(i);
        }
        i = e.next;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::key::Field;
    use proptest::prelude::*;

    fn key(dst: u64, port: u32, proto: u64) -> FlowKey {
        FlowKey::default()
            .with(Field::EthDst, dst.into())
            .with(Field::InPort, port.into())
            .with(Field::IpProto, proto.into())
    }

    fn mask(fields: &[Field]) -> FlowKey {
        let mut m = FlowKey::default();
        fields.iter().for_each(|f| m.mark(*f));
        m
    }

    #[test]
    fn masks_decide_what_matches() {
        let mut c = FlowCache::new();
        let m = mask(&[Field::EthDst]);
        c.insert(&key(1, 2, 3), &m, 'a', |_| ());
        assert!(c.is_l2_only());
        let hit = c.lookup(&key(1, 9, 9)).unwrap();
        assert_eq!(c.value(hit), Some(&'a'));
        assert!(c.lookup(&key(2, 2, 3)).is_none());
        c.insert(&key(5, 2, 3), &mask(&[Field::IpProto]), 'b', |_| ());
        assert!(!c.is_l2_only());
        let mut found = [None; 2];
        c.lookup_burst(&[key(1, 0, 0), key(7, 7, 3)], &mut found);
        assert_eq!(found.map(|f| f.and_then(|f| c.value(f).copied())), [Some('a'), Some('b')]);
    }

    proptest! {
        #[test]
        fn behaves_like_a_map(ops in proptest::collection::vec((0u64..200, any::<bool>(), any::<bool>()), 1..400)) {
            let mut c = FlowCache::new();
            let mut model = std::collections::HashMap::new();
            let masks = [mask(&[Field::EthDst]), mask(&[Field::IpProto, Field::InPort])];
            for (n, (v, second, remove)) in ops.into_iter().enumerate() {
                // The two masks select disjoint sets of keys, as real decisions do.
                let k = if second { key(0, v as u32 + 1, v % 251 + 1) } else { key(v + 1, 0, 0) };
                if remove {
                    if let Some(i) = c.lookup(&k) {
                        prop_assert_eq!(c.remove(i), model.remove(&k));
                    } else {
                        prop_assert!(!model.contains_key(&k));
                    }
                } else {
                    c.insert(&k, &masks[usize::from(second)], n, |_| ());
                    model.insert(k, n);
                }
            }
            prop_assert_eq!(c.len(), model.len());
            for (k, v) in model {
                let i = c.lookup(&k);
                prop_assert_eq!(i.and_then(|i| c.value(i).copied()), Some(v));
            }
        }
    }
}
