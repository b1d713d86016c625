//! NetFlow version 9 (RFC 3954) and IPFIX (RFC 7011): templates and records. The two share the numbers of their
//! information elements; they differ in headers, in the numbers of their sets and in how they tell time.

use std::mem;

use super::Output;
use super::collectors::{Collectors, DATAGRAM_MAX};
use super::config::{FlowExportConfig, FlowProtocol};
use super::records::{Reason, Report};
use crate::clock::{Clock, MILLISECOND, Nanos, SECOND};
use crate::error::Result;
use crate::packet::key::{ETH_IPV4, ETH_IPV6, Field, ICMP, ICMPV6};
use crate::put::Put;

const TEMPLATE_V4: u16 = 256;
const TEMPLATE_V6: u16 = 257;
const TEMPLATE_SAMPLING: u16 = 258;
/// Templates are repeated after so many datagrams, and after so long.
const TEMPLATE_DATAGRAMS: u32 = 64;
const TEMPLATE_INTERVAL: Nanos = 60 * SECOND;

/// Fields of both kinds of records behind the addresses: number of the information element and length.
const COMMON: [(u16, u16); 13] = [
    (7, 2),  // sourceTransportPort
    (11, 2), // destinationTransportPort
    (4, 1),  // protocolIdentifier
    (5, 1),  // ipClassOfService
    (6, 1),  // tcpControlBits
    (10, 4), // ingressInterface
    (14, 4), // egressInterface
    (1, 8),  // octetDeltaCount
    (2, 8),  // packetDeltaCount
    (58, 2), // vlanId
    (56, 6), // sourceMacAddress
    (80, 6), // destinationMacAddress
    (60, 1), // ipVersion
];
const ADDRESSES_V4: [(u16, u16); 2] = [(8, 4), (12, 4)];
const ADDRESSES_V6: [(u16, u16); 2] = [(27, 16), (28, 16)];
/// First and last packet: milliseconds since the exporter started.
const UPTIMES: [(u16, u16); 2] = [(22, 4), (21, 4)];
/// First and last packet: milliseconds since 1970; and why the flow is reported.
const DATES: [(u16, u16); 3] = [(152, 8), (153, 8), (136, 1)];

/// Sends flow records to collectors.
#[derive(Debug)]
pub(super) struct FlowExporter {
    collectors: Collectors,
    encoder: Encoder,
}

impl FlowExporter {
    pub fn new(config: &FlowExportConfig) -> Result<Self> {
        let encoder = Encoder {
            protocol: config.protocol,
            domain: config.domain,
            sampling: config.sampling,
            sequence: 0,
            datagrams: 0,
            templates_at: None,
        };
        Ok(Self { collectors: Collectors::open(&config.collectors)?, encoder })
    }

    /// Sends reports; `started` is when uptimes count from.
    pub fn export(&mut self, due: &[Report], now: Nanos, clock: &Clock, started: Nanos) {
        for d in self.encoder.datagrams(due, now, clock, started) {
            self.collectors.send(&d);
        }
    }
}

#[derive(Debug)]
struct Encoder {
    protocol: FlowProtocol,
    domain: u32,
    sampling: u32,
    /// IPFIX: records sent so far. NetFlow: datagrams.
    sequence: u32,
    datagrams: u32,
    templates_at: Option<Nanos>,
}

impl Encoder {
    fn is_ipfix(&self) -> bool {
        self.protocol == FlowProtocol::Ipfix
    }

    /// The datagrams for some reports. When templates are due they come first.
    fn datagrams(&mut self, due: &[Report], now: Nanos, clock: &Clock, started: Nanos) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        for (template, ethertype) in [(TEMPLATE_V4, ETH_IPV4), (TEMPLATE_V6, ETH_IPV6)] {
            let mut rows =
                due.iter().filter(|r| r.key.get64(Field::EthType) == u64::from(ethertype)).peekable();
            while rows.peek().is_some() {
                let mut d = Datagram::new(self, now, clock, started);
                if self.templates_due(now) {
                    self.put_templates(&mut d);
                }
                let set = d.begin_set(template);
                let size: u16 = self.fields(template).iter().map(|f| f.1).sum();
                while d.bytes.len() + usize::from(size) + 3 <= DATAGRAM_MAX
                    && let Some(r) = rows.next()
                {
                    self.put_record(&mut d, r, clock, started);
                }
                d.end_set(set);
                out.push(self.finish(d));
            }
        }
        out
    }

    fn templates_due(&mut self, now: Nanos) -> bool {
        let due = self.datagrams.is_multiple_of(TEMPLATE_DATAGRAMS)
            || self.templates_at.is_none_or(|t| now.saturating_sub(t) >= TEMPLATE_INTERVAL);
        if due {
            self.templates_at = Some(now);
        }
        due
    }

    fn fields(&self, template: u16) -> Vec<(u16, u16)> {
        let addresses = if template == TEMPLATE_V4 { ADDRESSES_V4 } else { ADDRESSES_V6 };
        let times: &[_] = if self.is_ipfix() { &DATES } else { &UPTIMES };
        [&addresses[..], &COMMON, times].concat()
    }

    fn put_templates(&self, d: &mut Datagram) {
        let set = d.begin_set(if self.is_ipfix() { 2 } else { 0 });
        for template in [TEMPLATE_V4, TEMPLATE_V6] {
            let fields = self.fields(template);
            d.bytes.put16(template);
            d.bytes.put16(fields.len() as u16);
            for (element, len) in fields {
                d.bytes.put16(element);
                d.bytes.put16(len);
            }
            d.templates += 1;
        }
        d.end_set(set);
        if self.sampling > 1 {
            self.put_sampling(d);
        }
    }

    /// The options that tell how packets are sampled: samplingInterval and samplingAlgorithm (2: at random).
    fn put_sampling(&self, d: &mut Datagram) {
        let set = d.begin_set(if self.is_ipfix() { 3 } else { 1 });
        d.bytes.put16(TEMPLATE_SAMPLING);
        // The scope is the observation domain, or the system. IPFIX counts fields, NetFlow bytes.
        let words: [u16; 8] =
            if self.is_ipfix() { [3, 1, 149, 4, 34, 4, 35, 1] } else { [4, 8, 1, 4, 34, 4, 35, 1] };
        words.iter().for_each(|w| d.bytes.put16(*w));
        d.templates += 1;
        d.end_set(set);
        let set = d.begin_set(TEMPLATE_SAMPLING);
        d.bytes.put32(self.domain);
        d.bytes.put32(self.sampling);
        d.bytes.put8(2);
        d.records += 1;
        d.end_set(set);
    }

    /// One record; the order is that of [`Encoder::fields`].
    fn put_record(&self, d: &mut Datagram, r: &Report, clock: &Clock, started: Nanos) {
        let out = &mut d.bytes;
        let k = &r.key;
        let ipv6 = k.get64(Field::EthType) == u64::from(ETH_IPV6);
        for f in [Field::IpSrc, Field::IpDst] {
            out.put_number(k.get(f), if ipv6 { 16 } else { 4 });
        }
        let proto = k.get64(Field::IpProto) as u8;
        let (src, dst) = (k.get64(Field::TpSrc) as u16, k.get64(Field::TpDst) as u16);
        // Type and code of ICMP are told in the destination port, as routers do.
        let (src, dst) = if matches!(proto, ICMP | ICMPV6) { (0, src << 8 | dst & 0xff) } else { (src, dst) };
        out.put16(src);
        out.put16(dst);
        out.put8(proto);
        out.put8(k.get64(Field::IpTos) as u8);
        out.put8(r.tcp_flags as u8);
        out.put32(k.get64(Field::InPort) as u32);
        out.put32(match r.output {
            Output::One(port) => port,
            Output::None | Output::Many(_) => 0,
        });
        let tags = [Field::Vlan, Field::InnerVlan].into_iter().filter(|f| k.get64(*f) != 0).count() as u64;
        out.put64(r.bytes.saturating_sub(r.packets * (14 + 4 * tags)));
        out.put64(r.packets);
        out.put16(k.get64(Field::Vlan) as u16 & 0xfff);
        out.put_number(k.get(Field::EthSrc), 6);
        out.put_number(k.get(Field::EthDst), 6);
        out.put8(if ipv6 { 6 } else { 4 });
        for t in [r.first, r.last] {
            if self.is_ipfix() {
                out.put64(clock.date(t) / MILLISECOND);
            } else {
                out.put32((t.saturating_sub(started) / MILLISECOND) as u32);
            }
        }
        if self.is_ipfix() {
            out.put8(match r.reason {
                Reason::Idle => 1,
                Reason::Active => 2,
            });
        }
        d.records += 1;
    }

    /// Completes the header and counts.
    fn finish(&mut self, d: Datagram) -> Vec<u8> {
        let Datagram { mut bytes, records, templates, .. } = d;
        self.datagrams = self.datagrams.wrapping_add(1);
        if self.is_ipfix() {
            bytes.put_len(2, 0);
            self.sequence = self.sequence.wrapping_add(records.into());
        } else {
            bytes[2..4].copy_from_slice(&(records + templates).to_be_bytes());
            self.sequence = self.sequence.wrapping_add(1);
        }
        bytes
    }
}

/// A datagram in the making.
struct Datagram {
    bytes: Vec<u8>,
    records: u16,
    templates: u16,
}

impl Datagram {
    fn new(e: &Encoder, now: Nanos, clock: &Clock, started: Nanos) -> Self {
        let mut b = Vec::with_capacity(DATAGRAM_MAX);
        let seconds = (clock.date(now) / SECOND) as u32;
        if e.is_ipfix() {
            b.put16(10);
            b.put16(0); // The length follows.
            b.put32(seconds);
        } else {
            b.put16(9);
            b.put16(0); // The number of records follows.
            b.put32((now.saturating_sub(started) / MILLISECOND) as u32);
            b.put32(seconds);
        }
        b.put32(e.sequence);
        b.put32(e.domain);
        Self { bytes: b, records: 0, templates: 0 }
    }

    fn begin_set(&mut self, id: u16) -> usize {
        let start = self.bytes.len();
        self.bytes.put16(id);
        self.bytes.put16(0); // The length follows.
        start
    }

    /// Pads a set to four bytes and completes its length.
    fn end_set(&mut self, start: usize) {
        let len = self.bytes.len();
        self.bytes.zeros(len.next_multiple_of(mem::size_of::<u32>()) - len);
        self.bytes.put_len(start + 2, start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::key::FlowKey;

    #[test]
    fn many_records_fill_datagrams_and_number_them() {
        for protocol in [FlowProtocol::Ipfix, FlowProtocol::Netflow9] {
            let mut e =
                Encoder { protocol, domain: 5, sampling: 10, sequence: 0, datagrams: 0, templates_at: None };
            let clock = Clock::manual();
            let now = clock.now();
            let report = |i: u16| Report {
                key: FlowKey::default()
                    .with(Field::EthType, if i.is_multiple_of(3) { ETH_IPV6 } else { ETH_IPV4 }.into())
                    .with(Field::TpSrc, i.into()),
                output: Output::One(1),
                packets: 1,
                bytes: 60,
                first: now,
                last: now,
                tcp_flags: 0,
                reason: Reason::Idle,
            };
            let due: Vec<Report> = (0..1000).map(report).collect();
            let list = e.datagrams(&due, now, &clock, now);
            assert!(list.iter().all(|d| d.len() <= DATAGRAM_MAX && d.len().is_multiple_of(4)));
            let sequence_at = if protocol == FlowProtocol::Ipfix { 8 } else { 12 };
            let (mut records, mut expected) = (0, 0);
            for d in &list {
                let word = |at: usize| u16::from_be_bytes([d[at], d[at + 1]]);
                let sequence = u32::from(word(sequence_at)) << 16 | u32::from(word(sequence_at + 2));
                assert_eq!(sequence, expected);
                let mut at = sequence_at + 8;
                let mut here = 0;
                while at < d.len() {
                    let (id, len) = (word(at), usize::from(word(at + 2)));
                    let size = |t| e.fields(t).iter().map(|f| usize::from(f.1)).sum::<usize>();
                    match id {
                        TEMPLATE_V4 | TEMPLATE_V6 => here += (len - 4) / size(id),
                        TEMPLATE_SAMPLING => here += 1,
                        _ => {}
                    }
                    at += len;
                }
                assert_eq!(at, d.len());
                expected += if protocol == FlowProtocol::Ipfix { here as u32 } else { 1 };
                records += here;
            }
            // Templates and options come with the first datagram only.
            assert_eq!(records, 1001);
            assert!(list.len() < 70);
        }
    }
}
