//! Policies one by one: guards for IPv6, groups as peers, storms by kind, changes under load.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

mod common;

use std::time::{Duration, Instant};

use common::{arp, drain, mac, port, switch, udp};
use etherparse::PacketBuilder;
use vswitch::{
    Binding, DropReason, Endpoint, MacAddr, MeterConfig, OffloadCaps, PortConfig, StormControl, Switch,
};

/// The address fd00::n.
fn ip6(n: u8) -> [u8; 16] {
    let mut a = [0; 16];
    (a[0], a[15]) = (0xfd, n);
    a
}

/// ICMPv6 from host `src` of a type, with a target and a link-layer address option.
fn icmp6(src: u8, kind: u8, target: [u8; 16], option: u8, link: [u8; 6]) -> Vec<u8> {
    let mut body = target.to_vec();
    body.extend_from_slice(&[option, 1]);
    body.extend_from_slice(&link);
    let mut f = Vec::new();
    let b = PacketBuilder::ethernet2(mac(src), [0x33, 0x33, 0, 0, 0, 1]).ipv6(ip6(src), ip6(99), 255);
    b.icmpv6_raw(kind, 0, [0; 4]).write(&mut f, &body).unwrap();
    f
}

fn udp6(src: u8, sport: u16, dport: u16) -> Vec<u8> {
    let mut f = Vec::new();
    let b = PacketBuilder::ethernet2(mac(src), mac(2)).ipv6(ip6(src), ip6(2), 64);
    b.udp(sport, dport).write(&mut f, b"0123456789").unwrap();
    f
}

/// Sends frames one at a time; the place of each that arrived.
fn passed(s: &Switch, from: &Endpoint, to: &Endpoint, frames: &[Vec<u8>]) -> Vec<usize> {
    let sent = frames.iter().enumerate().filter(|(_, f)| {
        from.send(f);
        s.settle(9);
        drain(to) == [f.to_vec()]
    });
    sent.map(|(i, _)| i).collect()
}

#[test]
fn ipv6_hosts_speak_for_themselves_only() {
    let s = switch();
    let ips = vec!["fd00::1".parse().unwrap()];
    let bindings = vec![Binding { mac: MacAddr(mac(1)), ips }];
    let guarded = PortConfig { bindings, anti_spoof: true, source_guard: true, ..PortConfig::default() };
    let (_, a) = port(&s, "a", guarded);
    let (_, b) = port(&s, "b", PortConfig::default());
    let frames = [
        udp6(1, 5, 6),
        // Solicitation with its own address, with another's.
        icmp6(1, 135, ip6(2), 1, mac(1)),
        icmp6(1, 135, ip6(2), 1, mac(3)),
        // Advertisement of itself, of another address, of another's link-layer address.
        icmp6(1, 136, ip6(1), 2, mac(1)),
        icmp6(1, 136, ip6(9), 2, mac(1)),
        icmp6(1, 136, ip6(1), 2, mac(3)),
        {
            let mut f = udp6(1, 5, 6);
            f[37] = 7;
            f
        },
        udp6(3, 5, 6),
    ];
    assert_eq!(passed(&s, &a, &b, &frames), [0, 1, 3]);
    assert_eq!(s.drops(), [(DropReason::SpoofedMac, 1), (DropReason::SpoofedAddress, 4)]);
}

#[test]
fn guests_are_no_ipv6_routers_or_dhcpv6_servers() {
    let s = switch();
    let (_, a) = port(&s, "a", PortConfig { dhcp_guard: true, ..PortConfig::default() });
    let (_, b) = port(&s, "b", PortConfig::default());
    let frames = [
        icmp6(1, 134, ip6(2), 1, mac(1)),
        icmp6(1, 137, ip6(2), 1, mac(1)),
        udp6(1, 547, 546),
        // What a client says.
        icmp6(1, 133, ip6(2), 1, mac(1)),
        udp6(1, 546, 547),
    ];
    assert_eq!(passed(&s, &a, &b, &frames), [3, 4]);
    assert_eq!(s.drops(), [(DropReason::RogueServer, 3)]);
}

#[test]
fn a_group_is_a_peer_by_the_addresses_of_its_ports() {
    let s = switch();
    let groups = r#"{"app":{"rules":[{"direction":"egress"}]},
        "db":{"rules":[{"direction":"ingress","protocol":"udp","remote":{"group":"app"}}]}}"#;
    s.set_security_groups(serde_json::from_str(groups).unwrap());
    let member = |n: u8, ip: &str, group: &str| PortConfig {
        bindings: vec![Binding { mac: MacAddr(mac(n)), ips: vec![ip.parse().unwrap()] }],
        security_groups: vec![group.into()],
        ..PortConfig::default()
    };
    let (_, app) = port(&s, "app", member(1, "10.0.0.1", "app"));
    let (_, app6) = port(&s, "app6", member(4, "fd00::4", "app"));
    let (_, other) = port(&s, "other", PortConfig::default());
    let (_, db) = port(&s, "db", member(2, "10.0.0.2", "db"));
    assert_eq!(passed(&s, &app, &db, &[udp(1, 2, 5, 6), udp(9, 2, 5, 6)]), [0]);
    assert_eq!(passed(&s, &app6, &db, &[udp6(4, 5, 6), udp6(5, 5, 6)]), [0]);
    assert!(passed(&s, &other, &db, &[udp(3, 2, 5, 6)]).is_empty());
}

#[test]
fn each_kind_of_storm_has_its_limit() {
    let s = switch();
    // A tenth of a second's worth passes at once.
    let storm =
        StormControl { broadcast: Some(10), multicast: Some(20), unknown_unicast: Some(30), arp: Some(40) };
    let ingress = Some(MeterConfig { pps: Some(500), ..MeterConfig::default() });
    let (_, a) = port(&s, "a", PortConfig { storm, ingress, ..PortConfig::default() });
    let (_, b) = port(&s, "b", PortConfig::default());
    b.send(&udp(7, 8, 5, 6));
    s.settle(9);
    drain(&a);
    let to = |dst: [u8; 6]| {
        let mut f = udp(1, 2, 5, 6);
        f[..6].copy_from_slice(&dst);
        f
    };
    let counts =
        [to([0xff; 6]), to([1, 0, 0x5e, 0, 0, 1]), to(mac(66)), arp(1, 1, 1, 2), to(mac(7))].map(|f| {
            for _ in 0..10 {
                a.send(&f);
            }
            s.settle(9);
            drain(&b).len()
        });
    // Frames to a known address are no storm; the port's own limit of fifty is reached by the last.
    assert_eq!(counts, [1, 2, 3, 4, 10]);
    a.send(&to(mac(7)));
    s.settle(9);
    assert!(drain(&b).is_empty());
}

#[test]
fn properties_change_under_load_without_loss() {
    const FRAMES: u16 = 20_000;
    let s = Switch::builder().workers(2).build().unwrap();
    let (p, a) = Endpoint::pair(1 << 16, OffloadCaps::empty()).unwrap();
    s.add_port("a", p, PortConfig::default()).unwrap();
    let (p, b) = Endpoint::pair(1 << 16, OffloadCaps::empty()).unwrap();
    let id = s.add_port("b", p, PortConfig::default()).unwrap();
    let shaping = serde_json::from_str(r#"{"kbps":10000000}"#).unwrap();
    let configs = [
        PortConfig { mac_limit: 9, ..PortConfig::default() },
        PortConfig { shaping: Some(shaping), ..PortConfig::default() },
        PortConfig {
            bindings: vec![Binding { mac: MacAddr(mac(2)), ips: Vec::new() }],
            ..PortConfig::default()
        },
    ];
    let mut changes = 0;
    for n in 0..FRAMES {
        assert!(a.send(&udp(1, 2, n, 6)));
        if n % 100 == 0 {
            s.set_port_config(id, configs[changes % 3].clone()).unwrap();
            changes += 1;
        }
    }
    let mut got = Vec::new();
    let start = Instant::now();
    while got.len() < usize::from(FRAMES) {
        got.extend(drain(&b));
        assert!(start.elapsed() < Duration::from_secs(60), "{} of {FRAMES} frames", got.len());
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut numbers: Vec<u16> = got.iter().map(|f| u16::from_be_bytes([f[34], f[35]])).collect();
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..FRAMES), "each came once");
}
