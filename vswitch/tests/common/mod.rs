//! Helpers that several tests share.
#![allow(dead_code, clippy::unwrap_used, reason = "each test uses some of them, and ends where a step fails")]

use vswitch::{Clock, Endpoint, OffloadCaps, PortConfig, PortId, Switch};

pub fn switch() -> Switch {
    Switch::builder().workers(0).clock(Clock::manual()).build().unwrap()
}

pub fn port(s: &Switch, name: &str, config: PortConfig) -> (PortId, Endpoint) {
    let (p, e) = Endpoint::pair(1024, OffloadCaps::empty()).unwrap();
    (s.add_port(name, p, config).unwrap(), e)
}

pub fn mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, n]
}

pub fn udp(src: u8, dst: u8, sport: u16, dport: u16) -> Vec<u8> {
    let mut f = Vec::new();
    etherparse::PacketBuilder::ethernet2(mac(src), mac(dst))
        .ipv4([10, 0, 0, src], [10, 0, 0, dst], 64)
        .udp(sport, dport)
        .write(&mut f, b"0123456789abcdef")
        .unwrap();
    f
}

pub fn tcp(src: u8, dst: u8, sport: u16, dport: u16, flags: &str) -> Vec<u8> {
    let mut f = Vec::new();
    let mut b = etherparse::PacketBuilder::ethernet2(mac(src), mac(dst))
        .ipv4([10, 0, 0, src], [10, 0, 0, dst], 64)
        .tcp(sport, dport, 1, 1000);
    for c in flags.chars() {
        b = match c {
            'S' => b.syn(),
            'F' => b.fin(),
            'R' => b.rst(),
            _ => b.ack(1),
        };
    }
    b.write(&mut f, b"").unwrap();
    f
}

pub fn arp(src: u8, op: u8, spa: u8, tpa: u8) -> Vec<u8> {
    let mut f = [[0xff; 6], mac(src)].concat();
    f.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, op]);
    f.extend_from_slice(&mac(src));
    f.extend_from_slice(&[10, 0, 0, spa, 0, 0, 0, 0, 0, 0, 10, 0, 0, tpa]);
    f
}

/// All frames that wait at an endpoint.
pub fn drain(e: &Endpoint) -> Vec<Vec<u8>> {
    e.recv_burst(usize::MAX).into_iter().map(|(f, _)| f).collect()
}
