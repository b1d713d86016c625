//! Connection tracking: TCP, UDP, ICMP and other IP, sharded by a hash that both directions share.
//!
//! As in the MAC table, a cached decision remembers the version of the bucket its connection hashes to; a change of
//! state makes it stale. So an established connection costs the fast path one comparison.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::clock::{Nanos, SECOND};
use crate::packet::key::{ETH_IPV4, ETH_IPV6, FRAG_LATER, Field, FlowKey, ICMP, ICMPV6, TCP, UDP};

/// Bits of [`Field::CtState`], as `ovs-ofctl` numbers them.
pub mod state {
    /// The packet starts a connection.
    pub const NEW: u32 = 0x01;
    /// The packet belongs to a connection that was answered.
    pub const ESTABLISHED: u32 = 0x02;
    /// The packet is about a connection (an ICMP error).
    pub const RELATED: u32 = 0x04;
    /// The packet flows from the answering side.
    pub const REPLY: u32 = 0x08;
    /// The packet fits no connection and can start none.
    pub const INVALID: u32 = 0x10;
    /// The packet went through connection tracking.
    pub const TRACKED: u32 = 0x20;
}

const SHARDS: usize = 64;
const BUCKETS: usize = 65_536;
/// Default bound of the number of connections.
const CAPACITY: usize = 1_000_000;

const FIN: u64 = 1;
const SYN: u64 = 2;
const RST: u64 = 4;
const ACK: u64 = 16;
/// TCP flags that change a connection's state.
pub(crate) const TCP_CONTROL: u64 = FIN | SYN | RST;

/// Identity of a connection: zone, protocol and both ends, the smaller first, so that both directions agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ConnId {
    zone: u16,
    proto: u8,
    ipv6: bool,
    ends: [End; 2],
}

/// One end of a connection: address (IPv4 in the low 32 bits) and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
struct End {
    #[serde(with = "hex")]
    ip: u128,
    port: u16,
}

/// 128-bit numbers as text: JSON has no integers of that size.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(v: &u128, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&format_args!("{v:x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u128, D::Error> {
        u128::from_str_radix(&String::deserialize(d)?, 16).map_err(serde::de::Error::custom)
    }
}

type Shard = HashMap<ConnId, Arc<Conn>>;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    /// No answer yet.
    Opening,
    /// Answered.
    Established,
    /// One or both sides of a TCP connection have finished.
    Closing,
    /// A TCP connection was reset or finished on both sides.
    Closed,
}

/// A tracked connection.
#[derive(Debug)]
pub struct Conn {
    /// Which of `id.ends` started it.
    starter: usize,
    phase: Mutex<(Phase, u8)>,
    expires: AtomicU64,
    timeout: AtomicU64,
    mark: AtomicU32,
    label: Mutex<u128>,
}

impl Conn {
    /// Keeps the connection alive.
    #[inline]
    pub fn touch(&self, now: Nanos) {
        self.expires.store(now + self.timeout.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// A connection as reported and as moved with a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnRow {
    id: ConnId,
    starter: usize,
    phase: Phase,
    finished: u8,
    /// Seconds until it is forgotten.
    pub remaining: u64,
    /// Mark.
    pub mark: u32,
    /// Label.
    #[serde(with = "hex")]
    pub label: u128,
}

impl ConnRow {
    /// Zone of the connection.
    pub fn zone(&self) -> u16 {
        self.id.zone
    }

    /// Whether one of the ends has this address (IPv4 addresses in the low 32 bits).
    pub fn has_address(&self, ip: u128) -> bool {
        self.id.ends.iter().any(|e| e.ip == ip)
    }
}

impl std::fmt::Display for ConnRow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let end = |End { ip, port }: End| {
            if self.id.ipv6 {
                format!("[{}]:{port}", std::net::Ipv6Addr::from(ip))
            } else {
                format!("{}:{port}", std::net::Ipv4Addr::from(ip as u32))
            }
        };
        let (from, to) = (self.id.ends[self.starter], self.id.ends[1 - self.starter]);
        let (proto, phase) = (self.id.proto, self.phase);
        write!(f, "proto {proto} zone {} {} -> {} {phase:?}", self.id.zone, end(from), end(to))
    }
}

/// What tracking says of a packet.
#[derive(Clone, Debug, Default)]
pub struct Tracked {
    /// Bits of [`state`].
    pub state: u32,
    /// The connection, if it is known.
    pub conn: Option<Arc<Conn>>,
    /// Its mark.
    pub mark: u32,
    /// Its label.
    pub label: u128,
    id: Option<ConnId>,
    from: usize,
}

/// Version of a bucket, see the module's documentation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CtDependency {
    bucket: u16,
    version: u32,
}

/// All connections of one switch.
#[derive(Debug)]
pub struct Conntrack {
    shards: Box<[Mutex<Shard>]>,
    versions: Box<[AtomicU32]>,
    hasher: RandomState,
    count: AtomicUsize,
    capacity: AtomicUsize,
}

impl Default for Conntrack {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            versions: (0..BUCKETS).map(|_| AtomicU32::new(0)).collect(),
            hasher: RandomState::new(),
            count: AtomicUsize::new(0),
            capacity: AtomicUsize::new(CAPACITY),
        }
    }
}

/// Marks the bits of a packet that tracking looks at.
pub(crate) fn mark_fields(key: &FlowKey, mask: &mut FlowKey) {
    for f in
        [Field::EthType, Field::IpProto, Field::Frag, Field::IpSrc, Field::IpDst, Field::TpSrc, Field::TpDst]
    {
        mask.mark(f);
    }
    if key.get64(Field::IpProto) == u64::from(TCP) {
        let old = mask.get(Field::TcpFlags);
        mask.set(Field::TcpFlags, old | u128::from(TCP_CONTROL));
    }
}

/// Identity of a packet's connection and the end it comes from.
fn identify(key: &FlowKey, zone: u16) -> Option<(ConnId, usize)> {
    let ipv6 = match key.get64(Field::EthType) as u16 {
        ETH_IPV4 => false,
        ETH_IPV6 => true,
        _ => return None,
    };
    if key.get64(Field::Frag) & FRAG_LATER != 0 {
        return None;
    }
    let proto = key.get64(Field::IpProto) as u8;
    let (mut sport, mut dport) = (key.get64(Field::TpSrc) as u16, key.get64(Field::TpDst) as u16);
    if matches!(proto, ICMP | ICMPV6) {
        // An echo and its answer are one connection; other messages stand alone.
        let kind = match (proto, sport) {
            (ICMP, 0 | 8) => 8,
            (ICMPV6, 128 | 129) => 128,
            (_, k) => k,
        };
        (sport, dport) = (kind, kind);
    }
    let a = End { ip: key.get(Field::IpSrc), port: sport };
    let b = End { ip: key.get(Field::IpDst), port: dport };
    let from = usize::from(a > b);
    Some((ConnId { zone, proto, ipv6, ends: if from == 0 { [a, b] } else { [b, a] } }, from))
}

impl Conntrack {
    fn place(&self, id: &ConnId) -> (usize, u16) {
        let h = self.hasher.hash_one(id);
        ((h >> 32) as usize % SHARDS, h as u16)
    }

    /// The present version of a packet's bucket. Read it before the lookup it is to vouch for.
    pub fn depend(&self, key: &FlowKey, zone: u16) -> Option<CtDependency> {
        let (id, _) = identify(key, zone)?;
        let (_, bucket) = self.place(&id);
        Some(CtDependency { bucket, version: self.versions[usize::from(bucket)].load(Ordering::Acquire) })
    }

    /// Whether a bucket is unchanged.
    #[inline]
    pub fn is_current(&self, d: CtDependency) -> bool {
        self.versions[usize::from(d.bucket)].load(Ordering::Relaxed) == d.version
    }

    fn bump(&self, bucket: u16) {
        self.versions[usize::from(bucket)].fetch_add(1, Ordering::Release);
    }

    /// Finds a packet's connection and moves its state on.
    pub fn track(&self, key: &FlowKey, zone: u16, now: Nanos, readonly: bool) -> Tracked {
        let Some((id, from)) = identify(key, zone) else {
            return Tracked { state: state::TRACKED | state::INVALID, ..Tracked::default() };
        };
        let flags = key.get64(Field::TcpFlags);
        let (shard, bucket) = self.place(&id);
        let mut table = self.shards[shard].lock();
        let known = table.get(&id).filter(|c| c.expires.load(Ordering::Relaxed) > now).cloned();
        let mut tracked = Tracked { id: Some(id), from, ..Tracked::default() };
        if let Some(c) = known {
            if id.proto == TCP && flags & SYN != 0 && flags & ACK == 0 && c.phase.lock().0 == Phase::Closed {
                // The ports are used again.
                if !readonly {
                    table.remove(&id);
                    self.count.fetch_sub(1, Ordering::Relaxed);
                    self.bump(bucket);
                }
            } else {
                if !readonly && c.advance(id.proto, from != c.starter, flags, now) {
                    self.bump(bucket);
                }
                let answered = c.phase.lock().0 != Phase::Opening;
                tracked.state = state::TRACKED
                    | if answered { state::ESTABLISHED } else { state::NEW }
                    | if from != c.starter { state::REPLY } else { 0 };
                tracked.mark = c.mark.load(Ordering::Relaxed);
                tracked.label = *c.label.lock();
                tracked.conn = Some(c);
                return tracked;
            }
        }
        // A SYN with ACK, FIN or RST, or a bare RST, cannot start a connection. Other TCP packets may: the
        // connection may be older than the switch.
        let bad = id.proto == TCP
            && (flags & RST != 0 || flags & (SYN | ACK) == SYN | ACK || flags & (SYN | FIN) == SYN | FIN);
        tracked.state = state::TRACKED | if bad { state::INVALID } else { state::NEW };
        tracked
    }

    /// Treats an ICMP error by the packet that it quotes, whose key is `inner`.
    pub fn track_error(&self, inner: &FlowKey, zone: u16, now: Nanos) -> Tracked {
        let mut t = Tracked { state: state::TRACKED | state::INVALID, ..Tracked::default() };
        if let Some((id, from)) = identify(inner, zone) {
            let table = self.shards[self.place(&id).0].lock();
            if let Some(c) = table.get(&id).filter(|c| c.expires.load(Ordering::Relaxed) > now) {
                // The error flows against the quoted packet.
                let reply = if from == c.starter { state::REPLY } else { 0 };
                t.state = state::TRACKED | state::RELATED | reply;
                t.mark = c.mark.load(Ordering::Relaxed);
                t.label = *c.label.lock();
            }
        }
        t
    }

    /// Remembers the connection of a packet that [`Conntrack::track`] called new, or changes the mark and label of
    /// a known one.
    pub fn commit(
        &self,
        t: &Tracked,
        key: &FlowKey,
        mark: Option<(u32, u32)>,
        label: Option<(u128, u128)>,
        now: Nanos,
    ) -> Option<Arc<Conn>> {
        let id = t.id.filter(|_| t.state & state::INVALID == 0)?;
        let (shard, bucket) = self.place(&id);
        let mut table = self.shards[shard].lock();
        let mut changed = false;
        let conn = match table.get(&id).filter(|c| c.expires.load(Ordering::Relaxed) > now) {
            Some(c) => c.clone(),
            None => {
                if self.count.load(Ordering::Relaxed) >= self.capacity.load(Ordering::Relaxed) {
                    return None;
                }
                // A TCP packet in the middle of a connection proves that it is established.
                let middle = id.proto == TCP && key.get64(Field::TcpFlags) & SYN == 0;
                let phase = if middle { Phase::Established } else { Phase::Opening };
                let timeout = timeout(id.proto, phase);
                let c = Arc::new(Conn {
                    starter: t.from,
                    phase: Mutex::new((phase, 0)),
                    expires: AtomicU64::new(now + timeout),
                    timeout: AtomicU64::new(timeout),
                    mark: AtomicU32::new(0),
                    label: Mutex::new(0),
                });
                if table.insert(id, c.clone()).is_none() {
                    self.count.fetch_add(1, Ordering::Relaxed);
                }
                changed = true;
                c
            }
        };
        if let Some((v, m)) = mark {
            let old = conn.mark.load(Ordering::Relaxed);
            let new = (old & !m) | (v & m);
            conn.mark.store(new, Ordering::Relaxed);
            changed |= old != new;
        }
        if let Some((v, m)) = label {
            let mut l = conn.label.lock();
            let new = (*l & !m) | (v & m);
            changed |= *l != new;
            *l = new;
        }
        if changed {
            self.bump(bucket);
        }
        Some(conn)
    }

    /// Forgets connections whose time is over.
    pub fn expire(&self, now: Nanos) {
        self.retain(|_, c| c.expires.load(Ordering::Relaxed) > now);
    }

    /// Forgets all connections (of one zone).
    pub fn flush(&self, zone: Option<u16>) {
        self.retain(|id, _| zone.is_some_and(|z| z != id.zone));
    }

    fn retain(&self, keep: impl Fn(&ConnId, &Conn) -> bool) {
        for shard in &self.shards {
            shard.lock().retain(|id, c| {
                let keep = keep(id, c);
                if !keep {
                    self.count.fetch_sub(1, Ordering::Relaxed);
                    self.bump(self.place(id).1);
                }
                keep
            });
        }
    }

    /// Number of connections.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Bounds the number of connections.
    pub fn set_capacity(&self, n: usize) {
        self.capacity.store(n, Ordering::Relaxed);
    }

    /// All connections that `select` picks.
    pub fn rows(&self, now: Nanos, select: impl Fn(&ConnRow) -> bool) -> Vec<ConnRow> {
        let mut rows = Vec::new();
        for shard in &self.shards {
            for (id, c) in shard.lock().iter() {
                let (phase, finished) = *c.phase.lock();
                let row = ConnRow {
                    id: *id,
                    starter: c.starter,
                    phase,
                    finished,
                    remaining: c.expires.load(Ordering::Relaxed).saturating_sub(now) / SECOND,
                    mark: c.mark.load(Ordering::Relaxed),
                    label: *c.label.lock(),
                };
                if select(&row) {
                    rows.push(row);
                }
            }
        }
        rows
    }

    /// Takes over connections that moved here with a port.
    pub fn import(&self, rows: &[ConnRow], now: Nanos) {
        for r in rows {
            if r.starter > 1 || self.count() >= self.capacity.load(Ordering::Relaxed) {
                continue;
            }
            let limit = timeout(r.id.proto, r.phase);
            let c = Conn {
                starter: r.starter,
                phase: Mutex::new((r.phase, r.finished)),
                expires: AtomicU64::new(now + (r.remaining.saturating_mul(SECOND)).min(limit)),
                timeout: AtomicU64::new(limit),
                mark: AtomicU32::new(r.mark),
                label: Mutex::new(r.label),
            };
            let (shard, bucket) = self.place(&r.id);
            if self.shards[shard].lock().insert(r.id, Arc::new(c)).is_none() {
                self.count.fetch_add(1, Ordering::Relaxed);
            }
            self.bump(bucket);
        }
    }
}

/// How long a connection is remembered without a packet.
fn timeout(proto: u8, phase: Phase) -> Nanos {
    let seconds = match (proto, phase) {
        (TCP, Phase::Opening) => 30,
        (TCP, Phase::Established) => 86_400,
        (TCP, Phase::Closing) => 120,
        (TCP, Phase::Closed) => 10,
        (UDP, Phase::Opening) => 60,
        (UDP, _) => 180,
        (ICMP | ICMPV6, _) => 30,
        _ => 60,
    };
    seconds * SECOND
}

impl Conn {
    /// Moves the state on by one packet; says whether decisions about the connection may have changed.
    fn advance(&self, proto: u8, reply: bool, flags: u64, now: Nanos) -> bool {
        let mut guard = self.phase.lock();
        let (phase, finished) = *guard;
        let mut next = phase;
        let mut fins = finished;
        if phase == Phase::Opening && reply {
            next = Phase::Established;
        }
        if proto == TCP {
            if flags & RST != 0 {
                next = Phase::Closed;
            } else if flags & FIN != 0 {
                fins |= if reply { 2 } else { 1 };
                next = if fins == 3 { Phase::Closed } else { Phase::Closing };
            }
            if phase == Phase::Closed {
                next = Phase::Closed;
            }
        }
        *guard = (next, fins);
        self.timeout.store(timeout(proto, next), Ordering::Relaxed);
        drop(guard);
        self.touch(now);
        next != phase
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(src: u32, sport: u16, dst: u32, dport: u16, proto: u8, flags: u64) -> FlowKey {
        FlowKey::default()
            .with(Field::EthType, ETH_IPV4.into())
            .with(Field::IpProto, proto.into())
            .with(Field::IpSrc, src.into())
            .with(Field::IpDst, dst.into())
            .with(Field::TpSrc, sport.into())
            .with(Field::TpDst, dport.into())
            .with(Field::TcpFlags, flags.into())
    }

    #[test]
    fn a_tcp_connection_from_start_to_end() {
        let c = Conntrack::default();
        let (out, back) = (|f| key(1, 1000, 2, 80, TCP, f), |f| key(2, 80, 1, 1000, TCP, f));
        let t = c.track(&out(SYN), 0, 0, false);
        assert_eq!(t.state, state::TRACKED | state::NEW);
        assert!(c.commit(&t, &out(SYN), None, None, 0).is_some());
        let d = c.depend(&out(0), 0).unwrap();
        let t = c.track(&back(SYN | ACK), 0, 1, false);
        assert_eq!(t.state, state::TRACKED | state::ESTABLISHED | state::REPLY);
        assert!(!c.is_current(d), "the answer changes the state");
        let d = c.depend(&out(0), 0).unwrap();
        assert_eq!(c.track(&out(ACK), 0, 2, false).state, state::TRACKED | state::ESTABLISHED);
        assert!(c.is_current(d));
        c.track(&out(FIN | ACK), 0, 3, false);
        c.track(&back(FIN | ACK), 0, 4, false);
        c.expire(11 * SECOND);
        assert_eq!(c.count(), 0);
        assert_eq!(c.track(&back(SYN | ACK), 0, 0, false).state, state::TRACKED | state::INVALID);
    }

    #[test]
    fn zones_marks_and_limits() {
        let c = Conntrack::default();
        let k = key(1, 5, 2, 6, UDP, 0);
        let t = c.track(&k, 7, 0, false);
        c.commit(&t, &k, Some((5, 0xff)), None, 0);
        assert_eq!(c.track(&k, 7, 1, false).mark, 5);
        assert!(c.track(&k, 8, 1, false).conn.is_none());
        c.set_capacity(1);
        let t = c.track(&k, 8, 1, false);
        assert!(c.commit(&t, &k, None, None, 1).is_none());
        let rows = c.rows(1, |r| r.has_address(2));
        assert_eq!(rows.len(), 1);
        c.flush(Some(7));
        assert_eq!(c.count(), 0);
        c.import(&rows, 1);
        assert_eq!(c.track(&k, 7, 2, false).mark, 5);
    }

    #[test]
    fn an_echo_and_its_answer_are_one_connection() {
        let c = Conntrack::default();
        let t = c.track(&key(1, 8, 2, 0, ICMP, 0), 0, 0, false);
        c.commit(&t, &key(1, 8, 2, 0, ICMP, 0), None, None, 0);
        let t = c.track(&key(2, 0, 1, 0, ICMP, 0), 0, 0, false);
        assert_eq!(t.state & state::ESTABLISHED, state::ESTABLISHED);
    }
}
