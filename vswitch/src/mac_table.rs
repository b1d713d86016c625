//! The MAC address table: learning, ageing, limits per port, static entries, flap detection.
//!
//! Only the slow path and control operations take its locks. A cached decision remembers the version of the two
//! table buckets it came from (source and destination address); any change of a bucket makes it stale.

use std::collections::HashMap;
use std::collections::hash_map::{Entry, RandomState};
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use crate::clock::{Nanos, SECOND};
use crate::port::PortId;

const SHARDS: usize = 16;
const BUCKETS: usize = 4096;
/// Version that changes whenever room for addresses becomes free; it follows those of the buckets.
const LIMITS: u16 = BUCKETS as u16;
/// Most learned addresses in one switch.
const CAPACITY: usize = 131_072;
/// Moves within [`FLAP_WINDOW`] that make an address flapping.
const FLAP_MOVES: u32 = 8;
/// See [`FLAP_MOVES`]; a flapping address also stays where it is for this long.
const FLAP_WINDOW: Nanos = 10 * SECOND;

/// What is known of one address.
#[derive(Debug)]
pub struct MacEntry {
    port: AtomicU32,
    /// Last use in seconds.
    seen: AtomicU64,
    fixed: bool,
    moves: Mutex<Moves>,
}

#[derive(Debug, Default)]
struct Moves {
    since: Nanos,
    count: u32,
    held_until: Nanos,
}

impl MacEntry {
    /// Notes that a frame from the address was seen.
    #[inline]
    pub fn touch(&self, now: Nanos) {
        let s = now / SECOND;
        if self.seen.load(Ordering::Relaxed) != s {
            self.seen.store(s, Ordering::Relaxed);
        }
    }

    /// The port behind which the address lives.
    pub fn port(&self) -> PortId {
        self.port.load(Ordering::Relaxed)
    }
}

/// One row of the table, as reported and as moved with a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MacRow {
    /// VLAN.
    pub vlan: u16,
    /// Address, first byte highest.
    pub mac: u64,
    /// Port.
    pub port: PortId,
    /// Seconds since the address was last seen.
    pub age: u64,
    /// Whether the entry was configured and neither ages nor moves.
    pub fixed: bool,
}

/// Result of [`MacTable::learn`].
#[derive(Debug)]
pub enum Learned {
    /// The address is in the table at this port.
    Here(Arc<MacEntry>),
    /// The port's or the table's limit is reached; the address stays unknown.
    LimitReached,
    /// The address is fixed to another port.
    Fixed,
    /// The address is held at another port for a while because it flapped.
    Held,
}

/// A version of one bucket, see the module's documentation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dependency {
    bucket: u16,
    version: u32,
}

type Shard = HashMap<(u16, u64), Arc<MacEntry>>;

/// The table of one switch.
#[derive(Debug)]
pub struct MacTable {
    shards: [RwLock<Shard>; SHARDS],
    versions: Box<[AtomicU32]>,
    hasher: RandomState,
    counts: Mutex<HashMap<PortId, usize>>,
    /// Seconds after which an unseen address is forgotten; zero: never.
    ageing: AtomicU64,
    flaps: AtomicU64,
}

impl Default for MacTable {
    fn default() -> Self {
        Self {
            shards: std::array::from_fn(|_| RwLock::default()),
            versions: (0..=BUCKETS).map(|_| AtomicU32::new(0)).collect(),
            hasher: RandomState::new(),
            counts: Mutex::default(),
            ageing: AtomicU64::new(300),
            flaps: AtomicU64::new(0),
        }
    }
}

impl MacTable {
    fn slot(&self, vlan: u16, mac: u64) -> (usize, u16) {
        let h = self.hasher.hash_one((vlan, mac));
        ((h >> 32) as usize % SHARDS, (h as usize % BUCKETS) as u16)
    }

    /// The present version of the bucket of an address. Read it before the lookup it is to vouch for.
    pub fn depend(&self, vlan: u16, mac: u64) -> Dependency {
        let (_, bucket) = self.slot(vlan, mac);
        Dependency { bucket, version: self.versions[usize::from(bucket)].load(Ordering::Acquire) }
    }

    /// Whether a bucket is unchanged.
    #[inline]
    pub fn is_current(&self, d: Dependency) -> bool {
        self.versions[usize::from(d.bucket)].load(Ordering::Relaxed) == d.version
    }

    fn bump(&self, bucket: u16) {
        self.versions[usize::from(bucket)].fetch_add(1, Ordering::Release);
    }

    /// The present version of everything that a refusal for want of room depends on.
    pub fn depend_on_limits(&self) -> Dependency {
        let version = self.versions[usize::from(LIMITS)].load(Ordering::Acquire);
        Dependency { bucket: LIMITS, version }
    }

    /// One address less on a port.
    fn decrement(&self, counts: &mut HashMap<PortId, usize>, port: PortId) {
        if let Some(n) = counts.get_mut(&port) {
            *n = n.saturating_sub(1);
        }
        self.bump(LIMITS);
    }

    /// The port of an address.
    pub fn lookup(&self, vlan: u16, mac: u64) -> Option<PortId> {
        let (shard, _) = self.slot(vlan, mac);
        self.shards[shard].read().get(&(vlan, mac)).map(|e| e.port())
    }

    /// Learns that `mac` lives behind `port`. `limit` is the port's limit of addresses (zero: none).
    pub fn learn(&self, vlan: u16, mac: u64, port: PortId, limit: usize, now: Nanos) -> Learned {
        let (shard, bucket) = self.slot(vlan, mac);
        if let Some(e) = self.shards[shard].read().get(&(vlan, mac))
            && e.port() == port
        {
            e.touch(now);
            return Learned::Here(e.clone());
        }
        let mut table = self.shards[shard].write();
        let mut counts = self.counts.lock();
        let total: usize = counts.values().sum();
        let mine = counts.get(&port).copied().unwrap_or(0);
        let full = limit != 0 && mine >= limit;
        match table.entry((vlan, mac)) {
            Entry::Occupied(o) => {
                let e = o.get().clone();
                let from = e.port();
                if from == port {
                    return Learned::Here(e);
                }
                if e.fixed {
                    return Learned::Fixed;
                }
                if !self.may_move(&e, now) {
                    return Learned::Held;
                }
                if full {
                    return Learned::LimitReached;
                }
                e.port.store(port, Ordering::Relaxed);
                e.touch(now);
                self.decrement(&mut counts, from);
                *counts.entry(port).or_default() += 1;
                self.bump(bucket);
                Learned::Here(e)
            }
            Entry::Vacant(_) if full || total >= CAPACITY => Learned::LimitReached,
            Entry::Vacant(v) => {
                let e = Arc::new(MacEntry {
                    port: AtomicU32::new(port),
                    seen: AtomicU64::new(now / SECOND),
                    fixed: false,
                    moves: Mutex::default(),
                });
                v.insert(e.clone());
                *counts.entry(port).or_default() += 1;
                self.bump(bucket);
                Learned::Here(e)
            }
        }
    }

    /// Counts a move; `false` while the address is held because it moved too often.
    fn may_move(&self, e: &MacEntry, now: Nanos) -> bool {
        let mut m = e.moves.lock();
        if now < m.held_until {
            return false;
        }
        if now.saturating_sub(m.since) > FLAP_WINDOW {
            *m = Moves { since: now, ..Moves::default() };
        }
        m.count += 1;
        if m.count > FLAP_MOVES {
            *m = Moves { since: now, count: 0, held_until: now + FLAP_WINDOW };
            self.flaps.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        true
    }

    /// How often an address was found to flap.
    pub fn flaps(&self) -> u64 {
        self.flaps.load(Ordering::Relaxed)
    }

    /// Sets the ageing time in seconds; zero switches ageing off.
    pub fn set_ageing(&self, seconds: u64) {
        self.ageing.store(seconds, Ordering::Relaxed);
    }

    /// Fixes an address to a port, replacing what was learned. One that is fixed there already stays as it is.
    pub fn add_static(&self, vlan: u16, mac: u64, port: PortId) {
        if !self.is_static(vlan, mac, port) {
            self.insert(vlan, mac, port, true, 0);
        }
    }

    /// Whether an address is fixed to this port.
    pub fn is_static(&self, vlan: u16, mac: u64, port: PortId) -> bool {
        let (shard, _) = self.slot(vlan, mac);
        self.shards[shard].read().get(&(vlan, mac)).is_some_and(|e| e.fixed && e.port() == port)
    }

    /// Forgets an address if it is fixed to this port.
    pub fn remove_static(&self, vlan: u16, mac: u64, port: PortId) {
        if self.is_static(vlan, mac, port) {
            let (shard, bucket) = self.slot(vlan, mac);
            self.shards[shard].write().remove(&(vlan, mac));
            self.bump(bucket);
        }
    }

    fn insert(&self, vlan: u16, mac: u64, port: PortId, fixed: bool, seen: u64) {
        let (shard, bucket) = self.slot(vlan, mac);
        let entry = MacEntry {
            port: AtomicU32::new(port),
            seen: AtomicU64::new(seen),
            fixed,
            moves: Mutex::default(),
        };
        let mut table = self.shards[shard].write();
        let mut counts = self.counts.lock();
        if let Some(old) = table.insert((vlan, mac), Arc::new(entry))
            && !old.fixed
        {
            self.decrement(&mut counts, old.port());
        }
        if !fixed {
            *counts.entry(port).or_default() += 1;
        }
        self.bump(bucket);
    }

    /// Takes over the rows of a port that moved here, under its new number.
    pub fn import(&self, rows: &[MacRow], port: PortId, now: Nanos) {
        for r in rows {
            self.insert(r.vlan, r.mac, port, r.fixed, (now / SECOND).saturating_sub(r.age));
        }
    }

    /// Forgets addresses that were not seen for the ageing time.
    pub fn age(&self, now: Nanos) {
        let limit = self.ageing.load(Ordering::Relaxed);
        let now = now / SECOND;
        if limit != 0 {
            self.retain(|_, e| e.fixed || now.saturating_sub(e.seen.load(Ordering::Relaxed)) <= limit);
        }
    }

    /// Forgets the learned addresses of a port (of all ports: `None`); static ones too if `fixed`.
    pub fn flush(&self, port: Option<PortId>, fixed: bool) {
        self.retain(|_, e| (e.fixed && !fixed) || port.is_some_and(|p| p != e.port()));
    }

    fn retain(&self, keep: impl Fn(&(u16, u64), &MacEntry) -> bool) {
        for shard in &self.shards {
            shard.write().retain(|k, e| {
                let keep = keep(k, e);
                if !keep {
                    if !e.fixed {
                        self.decrement(&mut self.counts.lock(), e.port());
                    }
                    self.bump(self.slot(k.0, k.1).1);
                }
                keep
            });
        }
    }

    /// All rows, sorted by VLAN and address.
    pub fn rows(&self, now: Nanos) -> Vec<MacRow> {
        let mut rows = Vec::new();
        for shard in &self.shards {
            rows.extend(shard.read().iter().map(|(&(vlan, mac), e)| MacRow {
                vlan,
                mac,
                port: e.port(),
                age: (now / SECOND).saturating_sub(e.seen.load(Ordering::Relaxed)),
                fixed: e.fixed,
            }));
        }
        rows.sort_by_key(|r| (r.vlan, r.mac));
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learning_moving_and_ageing_make_dependencies_stale() {
        let t = MacTable::default();
        let d = t.depend(1, 5);
        assert!(matches!(t.learn(1, 5, 3, 0, SECOND), Learned::Here(_)));
        assert!(!t.is_current(d));
        let d = t.depend(1, 5);
        t.learn(1, 5, 3, 0, 2 * SECOND);
        assert!(t.is_current(d));
        t.learn(1, 5, 4, 0, 3 * SECOND);
        assert!(!t.is_current(d));
        assert_eq!(t.lookup(1, 5), Some(4));
        assert_eq!(t.lookup(2, 5), None);
        t.age(303 * SECOND);
        assert_eq!(t.lookup(1, 5), Some(4));
        t.age(304 * SECOND);
        assert_eq!(t.lookup(1, 5), None);
    }

    #[test]
    fn limits_hold_per_port() {
        let t = MacTable::default();
        assert!(matches!(t.learn(1, 1, 1, 2, 0), Learned::Here(_)));
        assert!(matches!(t.learn(1, 2, 1, 2, 0), Learned::Here(_)));
        assert!(matches!(t.learn(1, 3, 1, 2, 0), Learned::LimitReached));
        assert!(matches!(t.learn(1, 3, 2, 2, 0), Learned::Here(_)));
        t.flush(Some(1), false);
        assert!(matches!(t.learn(1, 4, 1, 2, 0), Learned::Here(_)));
        assert_eq!(t.rows(0).len(), 2);
    }

    #[test]
    fn static_entries_stay_and_flapping_ones_are_held() {
        let t = MacTable::default();
        t.add_static(1, 9, 7);
        assert!(matches!(t.learn(1, 9, 8, 0, 0), Learned::Fixed));
        t.learn(1, 6, 1, 0, SECOND);
        let mut refused = 0;
        for i in 0..20u32 {
            if matches!(t.learn(1, 6, 1 + (i + 1) % 2, 0, SECOND), Learned::Held) {
                refused += 1;
            }
        }
        assert!(refused > 0);
        assert_eq!(t.flaps(), 1);
        assert!(matches!(t.learn(1, 6, 5, 0, 12 * SECOND), Learned::Here(_)));
    }
}
