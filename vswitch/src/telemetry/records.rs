//! Flow records: who talks to whom, and how much.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;
use serde::Serialize;

use super::Output;
use crate::address::MacAddr;
use crate::clock::{Nanos, SECOND};
use crate::datapath::verdict::RuleStats;
use crate::packet::key::{ETH_ARP, ETH_IPV4, ETH_IPV6, Field, FlowKey};
use crate::port::PortId;

const SHARDS: usize = 16;
/// Most records; further flows are forwarded without one.
const RECORDS_MAX: usize = 262_144;
/// How long a record stays without packets when nothing is exported.
pub(super) const FORGET: Nanos = 60 * SECOND;

/// What tells flows apart.
const FIELDS: [Field; 5] = [Field::InPort, Field::Vlan, Field::EthSrc, Field::EthDst, Field::EthType];
/// What tells IP flows apart, beyond that.
const IP_FIELDS: [Field; 6] =
    [Field::IpSrc, Field::IpDst, Field::IpProto, Field::IpTos, Field::TpSrc, Field::TpDst];

/// The bits of a packet that tell its flow.
pub(crate) fn flow_mask(key: &FlowKey) -> FlowKey {
    let mut mask = FlowKey::default();
    FIELDS.iter().for_each(|f| mask.mark(*f));
    if matches!(key.get64(Field::EthType) as u16, ETH_IPV4 | ETH_IPV6 | ETH_ARP) {
        IP_FIELDS.iter().for_each(|f| mask.mark(*f));
    }
    mask
}

/// The counters of one flow.
#[derive(Debug, Default)]
pub(crate) struct FlowRecord {
    counts: RuleStats,
    tcp_flags: AtomicU16,
    /// Time of the first packet since the last report; zero: none yet.
    first: AtomicU64,
}

impl FlowRecord {
    pub fn add(&self, packets: u64, bytes: u64, last: Nanos, tcp_flags: u16) {
        self.counts.add(packets, bytes, last);
        self.tcp_flags.fetch_or(tcp_flags, Ordering::Relaxed);
        let _ = self.first.compare_exchange(0, last, Ordering::Relaxed, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Entry {
    record: Arc<FlowRecord>,
    output: Output,
    created: Nanos,
    /// Packets and bytes reported so far.
    reported: (u64, u64),
    /// Packets and bytes at the last scan.
    scanned: (u64, u64),
    /// Packets and bytes a second between the last two scans.
    rate: (u64, u64),
}

/// Why a record is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    Idle,
    Active,
}

/// What is to be reported of one flow.
#[derive(Clone, Debug)]
pub(super) struct Report {
    pub key: FlowKey,
    pub output: Output,
    pub packets: u64,
    /// Bytes of whole frames.
    pub bytes: u64,
    pub first: Nanos,
    pub last: Nanos,
    pub tcp_flags: u16,
    pub reason: Reason,
}

/// One flow in the list of top talkers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Talker {
    /// Port that the packets come in by.
    pub in_port: PortId,
    /// VLAN tag's VLAN; zero without tag.
    pub vlan: u16,
    /// Source address.
    pub eth_src: MacAddr,
    /// Destination address.
    pub eth_dst: MacAddr,
    /// EtherType.
    pub eth_type: u16,
    /// IP (or ARP sender's) address.
    pub ip_src: Option<IpAddr>,
    /// IP (or ARP target's) address.
    pub ip_dst: Option<IpAddr>,
    /// IP protocol, or ARP operation.
    pub protocol: u8,
    /// Source port, or ICMP type.
    pub src_port: u16,
    /// Destination port, or ICMP code.
    pub dst_port: u16,
    /// Packets since the record began.
    pub packets: u64,
    /// Bytes of frames since the record began.
    pub bytes: u64,
    /// Packets a second, over the last second.
    pub packets_per_second: u64,
    /// Bits a second, over the last second.
    pub bits_per_second: u64,
    /// Seconds since the record began.
    pub age: u64,
}

/// The records of a switch.
#[derive(Debug)]
pub(crate) struct Records {
    shards: [Mutex<HashMap<FlowKey, Entry>>; SHARDS],
    hasher: RandomState,
    count: AtomicUsize,
}

impl Default for Records {
    fn default() -> Self {
        let shards = std::array::from_fn(|_| Mutex::default());
        Self { shards, hasher: RandomState::new(), count: AtomicUsize::new(0) }
    }
}

impl Records {
    /// The record of the flow that a packet with `key` belongs to; `None` when there are too many.
    pub fn open(&self, key: &FlowKey, output: Output, now: Nanos) -> Option<Arc<FlowRecord>> {
        let key = key.masked(&flow_mask(key));
        let shard = self.hasher.hash_one(key) as usize % SHARDS;
        let mut shard = self.shards[shard].lock();
        if let Some(e) = shard.get_mut(&key) {
            e.output = output;
            return Some(e.record.clone());
        }
        if self.count.load(Ordering::Relaxed) >= RECORDS_MAX {
            return None;
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        let record = Arc::new(FlowRecord { first: AtomicU64::new(now), ..FlowRecord::default() });
        let entry = Entry {
            record: record.clone(),
            output,
            created: now,
            reported: (0, 0),
            scanned: (0, 0),
            rate: (0, 0),
        };
        shard.insert(key, entry);
        Some(record)
    }

    /// Looks through all records, `since` being the time of the last scan: returns what is to be reported if
    /// `report`, and forgets records that ended.
    pub(super) fn scan(
        &self,
        now: Nanos,
        since: Nanos,
        active: Nanos,
        idle: Nanos,
        report: bool,
    ) -> Vec<Report> {
        let mut due = Vec::new();
        let elapsed = now.saturating_sub(since).max(1);
        for shard in &self.shards {
            shard.lock().retain(|key, e| {
                let counts = e.record.counts.get();
                let a_second = |new: u64, old: u64| {
                    (u128::from(new - old) * u128::from(SECOND) / u128::from(elapsed)) as u64
                };
                e.rate = (a_second(counts.0, e.scanned.0), a_second(counts.1, e.scanned.1));
                e.scanned = counts;
                let last = e.record.counts.used();
                let first = match e.record.first.load(Ordering::Relaxed) {
                    0 => last,
                    first => first.min(last),
                };
                let ended = now.saturating_sub(last.max(e.created)) >= idle;
                let fresh = counts.0 > e.reported.0;
                if report && fresh && (ended || now.saturating_sub(first) >= active) {
                    due.push(Report {
                        key: *key,
                        output: e.output,
                        packets: counts.0 - e.reported.0,
                        bytes: counts.1 - e.reported.1,
                        first,
                        last,
                        tcp_flags: e.record.tcp_flags.swap(0, Ordering::Relaxed),
                        reason: if ended { Reason::Idle } else { Reason::Active },
                    });
                    e.reported = counts;
                    e.record.first.store(0, Ordering::Relaxed);
                }
                // A worker that still holds the record may count on.
                let keep = !ended || Arc::strong_count(&e.record) > 1;
                if !keep {
                    self.count.fetch_sub(1, Ordering::Relaxed);
                }
                keep
            });
        }
        due
    }

    /// Forgets all records.
    pub fn clear(&self) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            self.count.fetch_sub(shard.len(), Ordering::Relaxed);
            shard.clear();
        }
    }

    /// The flows with the highest rates, counts multiplied by `scale`, and the number of records.
    pub fn top(&self, limit: usize, scale: u64, now: Nanos) -> (Vec<Talker>, usize) {
        let mut all: Vec<Talker> = Vec::new();
        for shard in &self.shards {
            all.extend(shard.lock().iter().map(|(key, e)| e.talker(key, scale, now)));
        }
        let total = all.len();
        all.sort_by_key(|t| std::cmp::Reverse((t.bits_per_second, t.bytes)));
        all.truncate(limit);
        (all, total)
    }
}

impl Entry {
    fn talker(&self, key: &FlowKey, scale: u64, now: Nanos) -> Talker {
        let (packets, bytes) = self.record.counts.get();
        let eth_type = key.get64(Field::EthType) as u16;
        let ip = |f: Field| match eth_type {
            ETH_IPV4 | ETH_ARP => Some(Ipv4Addr::from(key.get64(f) as u32).into()),
            ETH_IPV6 => Some(Ipv6Addr::from(key.get(f)).into()),
            _ => None,
        };
        Talker {
            in_port: key.get64(Field::InPort) as PortId,
            vlan: key.get64(Field::Vlan) as u16 & 0xfff,
            eth_src: MacAddr::from_u64(key.get64(Field::EthSrc)),
            eth_dst: MacAddr::from_u64(key.get64(Field::EthDst)),
            eth_type,
            ip_src: ip(Field::IpSrc),
            ip_dst: ip(Field::IpDst),
            protocol: key.get64(Field::IpProto) as u8,
            src_port: key.get64(Field::TpSrc) as u16,
            dst_port: key.get64(Field::TpDst) as u16,
            packets: packets.saturating_mul(scale),
            bytes: bytes.saturating_mul(scale),
            packets_per_second: self.rate.0.saturating_mul(scale),
            bits_per_second: self.rate.1.saturating_mul(8 * scale),
            age: now.saturating_sub(self.created) / SECOND,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(sport: u16) -> FlowKey {
        FlowKey::default()
            .with(Field::EthType, ETH_IPV4.into())
            .with(Field::IpProto, 17)
            .with(Field::TpSrc, sport.into())
            .with(Field::IpTtl, u128::from(sport % 3))
    }

    #[test]
    fn active_and_idle_flows_are_reported_once_a_period() {
        let r = Records::default();
        let (active, idle) = (60 * SECOND, 10 * SECOND);
        let mut now = 1000 * SECOND;
        let record = r.open(&key(1), Output::One(2), now).unwrap();
        let (mut packets, mut reports) = (0, 0);
        for _ in 0..150 {
            now += SECOND;
            record.add(3, 300, now, 2);
            for due in r.scan(now, now - SECOND, active, idle, true) {
                assert_eq!((due.reason, due.bytes), (Reason::Active, due.packets * 100));
                assert!(due.last - due.first >= 59 * SECOND && due.tcp_flags == 2);
                packets += due.packets;
                reports += 1;
            }
        }
        assert_eq!((reports, r.top(9, 1, now).0[0].packets_per_second), (2, 3));
        now += 10 * SECOND;
        let due = r.scan(now, now - SECOND, active, idle, true);
        assert_eq!((due.len(), due[0].reason, due[0].packets + packets), (1, Reason::Idle, 450));
        assert_eq!(r.top(9, 1, now).1, 1, "a worker may still count");
        drop(record);
        assert!(r.scan(now + SECOND, now, active, idle, true).is_empty());
        assert_eq!((r.top(9, 1, now).1, r.count.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn fields_that_do_not_tell_flows_share_a_record() {
        let r = Records::default();
        let a = r.open(&key(1), Output::None, 1).unwrap();
        let b = r.open(&key(1).with(Field::IpTtl, 9), Output::None, 1).unwrap();
        assert!(Arc::ptr_eq(&a, &b));
        assert!(!Arc::ptr_eq(&a, &r.open(&key(2), Output::None, 1).unwrap()));
    }
}
