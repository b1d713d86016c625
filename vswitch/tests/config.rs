//! Declarative configuration, policies by configuration, and moving a port between switches.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

mod common;

use std::sync::Arc;

use common::{arp, drain, mac, port, switch, tcp, udp};
use vswitch::{
    Binding, DropReason, Endpoint, MacAddr, MeterConfig, Mirror, OffloadCaps, PortConfig, StormControl,
    SwitchConfig,
};

fn bound(n: u8) -> PortConfig {
    PortConfig {
        bindings: vec![Binding { mac: MacAddr(mac(n)), ips: vec![format!("10.0.0.{n}").parse().unwrap()] }],
        anti_spoof: true,
        source_guard: true,
        dhcp_guard: true,
        ..PortConfig::default()
    }
}

#[test]
fn a_configuration_is_applied_as_a_difference_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let s = switch();
    let (api, _e) = port(&s, "api", PortConfig::default());
    let doc = |extra: &str| {
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let text = format!(
            r#"{{"port_groups":{{"g":{{"vlan":{{"access":7}}}}}},
                "ports":{{"a":{{"kind":{{"unix_stream":{{"socket":{a:?}}}}},"group":"g","number":9}}{extra}
                "b":{{"kind":{{"unix_stream":{{"socket":{b:?}}}}}}}}}}}"#
        );
        SwitchConfig::parse(&text).unwrap()
    };
    s.apply(&doc(",")).unwrap();
    assert_eq!(s.port_id("a"), Some(9));
    let b = s.port_id("b").unwrap();
    let first = s.ports();
    // One bad port: nothing changes, not even the good ones.
    let bad = r#","z":{"kind":{"uplink":{"interface":"no-such-if"}}},"c":{"kind":{"gateway":
        {"address":"10.9.0.1","prefix":24,"first":"10.9.0.2","last":"10.9.0.9"}}},"#;
    assert!(s.apply(&doc(bad)).is_err());
    assert_eq!(s.ports().len(), first.len());
    let mut changed = doc(",");
    changed.port_groups.get_mut("g").unwrap().mac_limit = 3;
    changed.ports.remove("b");
    s.apply(&changed).unwrap();
    assert_eq!(s.port_id("b"), None);
    assert!(!dir.path().join("b").exists() && dir.path().join("a").exists());
    let ports = s.ports();
    assert_eq!(ports.iter().find(|p| p.name == "a").unwrap().config.mac_limit, 3);
    assert!(ports.iter().any(|p| p.id == api) && b != api);
    assert_eq!(s.config(), Some(changed));
}

#[test]
fn guards_stop_spoofing_and_rogue_servers() {
    let s = switch();
    let (_, a) = port(&s, "a", bound(1));
    let (_, b) = port(&s, "b", PortConfig::default());
    let good = [udp(1, 2, 5, 6), arp(1, 1, 1, 2)];
    let mut spoofed_ip = udp(1, 2, 5, 6);
    spoofed_ip[29] = 9;
    let bad = [udp(3, 2, 5, 6), spoofed_ip, arp(1, 2, 9, 2), udp(1, 2, 67, 68)];
    for f in good.iter().chain(&bad) {
        a.send(f);
    }
    s.settle(9);
    assert_eq!(drain(&b), good);
    let drops: Vec<_> = s.drops();
    assert_eq!(
        drops,
        [(DropReason::SpoofedMac, 1), (DropReason::SpoofedAddress, 2), (DropReason::RogueServer, 1)]
    );
}

#[test]
fn security_groups_are_stateful() {
    let s = switch();
    let groups = r#"{"web":{"rules":[{"direction":"ingress","protocol":"tcp","ports":[80,80]}]},
                     "client":{"rules":[{"direction":"egress"}]}}"#;
    s.set_security_groups(serde_json::from_str(groups).unwrap());
    let member = |g: &str| PortConfig { security_groups: vec![g.into()], ..PortConfig::default() };
    let (_, c) = port(&s, "c", member("client"));
    let (_, w) = port(&s, "w", member("web"));
    c.send(&tcp(1, 2, 1000, 81, "S"));
    c.send(&tcp(1, 2, 1000, 80, "S"));
    s.settle(9);
    assert_eq!(drain(&w), [tcp(1, 2, 1000, 80, "S")]);
    w.send(&tcp(2, 1, 80, 1000, "SA"));
    w.send(&tcp(2, 1, 80, 1001, "SA"));
    w.send(&tcp(2, 1, 5000, 22, "S"));
    s.settle(9);
    assert_eq!(drain(&c), [tcp(2, 1, 80, 1000, "SA")]);
    // Taking the rule away does not cut established connections, but no new one starts.
    s.set_security_groups(
        serde_json::from_str(r#"{"web":{},"client":{"rules":[{"direction":"egress"}]}}"#).unwrap(),
    );
    c.send(&tcp(1, 2, 1000, 80, "A"));
    c.send(&tcp(1, 2, 1002, 80, "S"));
    s.settle(9);
    assert_eq!(drain(&w), [tcp(1, 2, 1000, 80, "A")]);
}

#[test]
fn rates_storms_and_mirrors() {
    let s = switch();
    let storm = StormControl { arp: Some(20), ..StormControl::default() };
    let (a_id, a) = port(&s, "a", PortConfig { storm, ..PortConfig::default() });
    let limit = Some(MeterConfig { pps: Some(30), burst_packets: Some(3), ..MeterConfig::default() });
    let (b_id, b) = port(&s, "b", PortConfig { egress: limit, ..PortConfig::default() });
    let (m_id, m) = port(&s, "m", PortConfig::default());
    s.set_mirrors(vec![Mirror { from: vec![a_id], to: m_id, vlan: Some(99), ..Mirror::default() }]);
    for _ in 0..10 {
        a.send(&arp(1, 1, 1, 2));
    }
    s.settle(9);
    assert_eq!(drain(&b).len(), 2, "a tenth of a second's worth of ARP passes at once");
    let copies = drain(&m);
    assert_eq!(copies.len(), 10, "mirrors see what storm control drops");
    assert_eq!(copies[0][12..16], [0x81, 0, 0, 99]);
    for _ in 0..10 {
        a.send(&udp(1, 2, 5, 6));
    }
    s.settle(9);
    assert_eq!(drain(&b).len(), 1);
    assert_eq!(s.port_stats(b_id).unwrap().tx_limited, 9);
}

#[test]
fn a_port_moves_with_its_state() {
    let (s, t) = (switch(), switch());
    let (id, a) = port(&s, "vm", PortConfig { anti_spoof: false, ..bound(1) });
    let (_, b) = port(&s, "b", PortConfig { security_groups: vec!["none".into()], ..PortConfig::default() });
    s.set_security_groups(serde_json::from_str(r#"{"none":{"rules":[{"direction":"ingress"}]}}"#).unwrap());
    a.send(&udp(1, 2, 5, 6));
    s.settle(5);
    assert_eq!(drain(&b).len(), 1);
    let json = serde_json::to_string(&s.export_port(id).unwrap()).unwrap();
    let state = serde_json::from_str(&json).unwrap();
    let (p, _end) = Endpoint::pair(8, OffloadCaps::empty()).unwrap();
    let new = t.import_port(&state, Arc::new(p)).unwrap();
    assert_eq!(t.port_stats(new).unwrap().rx_packets, 1);
    assert_eq!((t.mac_table().len(), t.connection_count()), (1, 1));
    assert!(t.import_port(&state, Arc::new(Endpoint::pair(8, OffloadCaps::empty()).unwrap().0)).is_err());
}
