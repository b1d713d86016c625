//! sFlow version 5 (sflow.org, "sFlow Version 5", July 2004): sampled headers and interface counters.

use std::collections::HashMap;
use std::net::IpAddr;

use super::Output;
use super::collectors::{Collectors, DATAGRAM_MAX};
use super::config::SflowConfig;
use super::sampler::{Sample, Use};
use crate::clock::{MILLISECOND, Nanos, SECOND};
use crate::error::Result;
use crate::port::PortId;
use crate::put::Put;
use crate::shared::{PortEntry, PortTable};

const FLOW_SAMPLE: u32 = 1;
const COUNTERS_SAMPLE: u32 = 2;
const RAW_HEADER: u32 = 1;
const INTERFACE_COUNTERS: u32 = 1;
/// Bytes of the frame check sequence, which counts as stripped.
const FCS: u32 = 4;
/// Value of a counter that is not kept.
const UNKNOWN: u32 = u32::MAX;

/// Sends samples to collectors.
#[derive(Debug)]
pub(super) struct SflowExporter {
    collectors: Collectors,
    agent: IpAddr,
    sampling: u32,
    polling: Nanos,
    polled: Option<Nanos>,
    sequence: u32,
    /// Numbers of the last samples of each port: flows, counters.
    samples: HashMap<PortId, (u32, u32)>,
}

impl SflowExporter {
    pub fn new(config: &SflowConfig) -> Result<Self> {
        let collectors = Collectors::open(&config.collectors)?;
        let agent = config.agent.unwrap_or_else(|| collectors.local_address());
        Ok(Self {
            collectors,
            agent,
            sampling: config.sampling,
            polling: config.polling * SECOND,
            polled: None,
            sequence: 0,
            samples: HashMap::new(),
        })
    }

    /// Sends samples, of which `lost` more were taken in all, and counters when they are due.
    pub fn export(&mut self, samples: &[Sample], lost: u32, ports: &PortTable, now: Nanos, started: Nanos) {
        let mut encoded: Vec<Vec<u8>> = Vec::new();
        for s in samples.iter().filter(|s| s.purpose == Use::Sflow) {
            let pool = ports.get(s.in_port).map_or(0, |p| p.stats.sum().rx_packets as u32);
            encoded.push(self.flow_sample(s, pool, lost));
        }
        let due = self.polled.is_none_or(|t| now.saturating_sub(t) >= self.polling);
        if self.polling != 0 && due {
            self.polled = Some(now);
            self.samples.retain(|id, _| ports.get(*id).is_some());
            encoded.extend(ports.iter().map(|p| self.counters_sample(p)));
        }
        let mut rest = &encoded[..];
        while !rest.is_empty() {
            // A sample is smaller than a datagram by far, so at least one fits.
            let mut size = 64;
            let fits = |s: &&Vec<u8>| {
                size += s.len();
                size <= DATAGRAM_MAX
            };
            let n = rest.iter().take_while(fits).count().max(1);
            let datagram = self.datagram(&rest[..n], now, started);
            self.collectors.send(&datagram);
            rest = &rest[n..];
        }
    }

    fn datagram(&mut self, samples: &[Vec<u8>], now: Nanos, started: Nanos) -> Vec<u8> {
        let mut d = Vec::with_capacity(DATAGRAM_MAX);
        d.put32(5);
        match self.agent {
            IpAddr::V4(a) => {
                d.put32(1);
                d.extend_from_slice(&a.octets());
            }
            IpAddr::V6(a) => {
                d.put32(2);
                d.extend_from_slice(&a.octets());
            }
        }
        d.put32(0); // Sub-agent.
        self.sequence = self.sequence.wrapping_add(1);
        d.put32(self.sequence);
        d.put32((now.saturating_sub(started) / MILLISECOND) as u32);
        d.put32(samples.len() as u32);
        samples.iter().for_each(|s| d.extend_from_slice(s));
        d
    }

    fn flow_sample(&mut self, s: &Sample, pool: u32, lost: u32) -> Vec<u8> {
        let number = &mut self.samples.entry(s.in_port).or_default().0;
        *number = number.wrapping_add(1);
        let mut b = Vec::new();
        b.put32(*number);
        b.put32(s.in_port);
        b.put32(self.sampling);
        b.put32(pool);
        b.put32(lost);
        b.put32(s.in_port);
        b.put32(match s.output {
            Output::None => 0x4000_0000,
            Output::One(port) => port,
            Output::Many(n) => 0x8000_0000 | n,
        });
        b.put32(1); // Records.
        let mut header = Vec::new();
        header.put32(1); // Ethernet.
        header.put32(s.length as u32 + FCS);
        header.put32(FCS);
        header.put32(s.header.len() as u32);
        header.extend_from_slice(&s.header);
        header.zeros(s.header.len().next_multiple_of(4) - s.header.len());
        put_record(&mut b, RAW_HEADER, &header);
        record(FLOW_SAMPLE, &b)
    }

    fn counters_sample(&mut self, p: &PortEntry) -> Vec<u8> {
        let number = &mut self.samples.entry(p.id).or_default().1;
        *number = number.wrapping_add(1);
        let s = p.stats.sum();
        let mut c = Vec::with_capacity(88);
        c.put32(p.id);
        c.put32(6); // ethernetCsmacd.
        c.put64(0); // Speed: unknown.
        c.put32(1); // Full duplex.
        c.put32(1 | u32::from(p.port.link_up()) << 1);
        c.put64(s.rx_bytes);
        c.put32(s.rx_packets.saturating_sub(s.rx_multicast + s.rx_broadcast) as u32);
        c.put32(s.rx_multicast as u32);
        c.put32(s.rx_broadcast as u32);
        c.put32(s.rx_dropped as u32);
        c.put32(s.rx_errors as u32);
        c.put32(UNKNOWN);
        c.put64(s.tx_bytes);
        c.put32(s.tx_packets as u32);
        c.put32(UNKNOWN);
        c.put32(UNKNOWN);
        c.put32((s.tx_dropped + s.tx_limited) as u32);
        c.put32(s.tx_too_long as u32);
        c.put32(0); // Promiscuous: not told.
        let mut b = Vec::new();
        b.put32(*number);
        b.put32(p.id);
        b.put32(1); // Records.
        put_record(&mut b, INTERFACE_COUNTERS, &c);
        record(COUNTERS_SAMPLE, &b)
    }
}

/// Appends a format number and a body with its length.
fn put_record(out: &mut Vec<u8>, format: u32, body: &[u8]) {
    out.put32(format);
    out.put32(body.len() as u32);
    out.extend_from_slice(body);
}

fn record(format: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + body.len());
    put_record(&mut out, format, body);
    out
}
