//! Declarative configuration, policies by configuration, and moving a port between switches.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use common::{arp, drain, mac, port, switch, tcp, udp};
use vswitch::{
    Binding, Clock, DropReason, Endpoint, MacAddr, MeterConfig, Mirror, OffloadCaps, PatchPanel, PortConfig,
    StormControl, Switch, SwitchConfig, VlanMode,
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

#[test]
fn trunks_carry_the_vlans_of_their_pool() {
    let s = switch();
    let allowed = |pool: &str| {
        let text = format!(
            r#"{{"vlan_pools":{{"tenants":{pool:?}}},
                "port_groups":{{"up":{{"vlan_pool":"tenants"}}}},
                "ports":{{"p":{{"kind":{{"patch":{{"cable":"c"}}}},"group":"up"}}}}}}"#
        );
        s.apply(&SwitchConfig::parse(&text).unwrap()).unwrap();
        match &s.ports()[0].config.vlan {
            VlanMode::Trunk { native: 0, allowed } => allowed.to_string(),
            v => panic!("{v:?}"),
        }
    };
    assert_eq!(allowed("100-199"), "100-199");
    let id = s.port_id("p");
    assert_eq!(allowed("100-149,300"), "100-149,300");
    assert_eq!(s.port_id("p"), id, "the port changed in place");
}

/// Sends and takes frames on a port's Unix stream.
struct Wire(UnixStream);

impl Wire {
    fn send(&mut self, frame: &[u8]) {
        self.0.write_all(&[&(frame.len() as u32).to_be_bytes(), frame].concat()).unwrap();
    }

    fn received(&mut self) -> Vec<Vec<u8>> {
        let mut bytes = Vec::new();
        // It ends for want of more.
        let _ = self.0.read_to_end(&mut bytes);
        let (mut rest, mut frames) = (&bytes[..], Vec::new());
        while let Some((len, tail)) = rest.split_first_chunk() {
            let (frame, tail) = tail.split_at(u32::from_be_bytes(*len) as usize);
            frames.push(frame.to_vec());
            rest = tail;
        }
        frames
    }
}

#[test]
fn one_configuration_makes_a_switch_of_many_hosts() {
    let dir = tempfile::tempdir().unwrap();
    let panel = PatchPanel::default();
    let build = |host: &str| {
        let b = Switch::builder().workers(0).clock(Clock::manual()).patch_panel(panel.clone());
        b.host(host).build().unwrap()
    };
    let (s, t) = (build("h1"), build("h2"));
    let port = |n: u8, host: &str, group: &str| {
        let socket = dir.path().join(format!("vm{n}"));
        format!(
            r#""vm{n}":{{"host":"{host}","kind":{{"unix_stream":{{"socket":{socket:?}}}}},"config":{{
                "bindings":[{{"mac":"02:00:00:00:00:0{n}","ips":["10.0.0.{n}"]}}],"security_groups":["{group}"]}}}}"#
        )
    };
    let document = |first: &str, second: &str| {
        let text = format!(
            r#"{{"security_groups":{{"app":{{"rules":[{{"direction":"egress"}}]}},
                 "db":{{"rules":[{{"direction":"ingress","remote":{{"group":"app"}}}}]}}}},
                "ports":{{"between":{{"kind":{{"patch":{{"cable":"c"}}}}}},{},{}}},
                "flows":[{{"priority":7,"match":{{"in_port":"vm1"}},"actions":["normal"]}}],
                "static_macs":[{{"mac":"02:00:00:00:00:02","port":"vm2"}}]}}"#,
            port(1, first, "app"),
            port(2, second, "db")
        );
        SwitchConfig::parse(&text).unwrap()
    };
    let names = |s: &Switch| s.ports().into_iter().map(|p| p.name).collect::<Vec<_>>();
    let both = document("h1", "h2");
    s.apply(&both).unwrap();
    t.apply(&both).unwrap();
    assert_eq!(
        (names(&s), names(&t)),
        (vec!["between".into(), "vm1".into()], vec!["between".into(), "vm2".into()])
    );
    assert_eq!((s.config(), t.config()), (Some(both.clone()), Some(both)));
    // The rule is where its port is, and so is the fixed address.
    assert_eq!((s.table_sizes(), t.table_sizes()), (vec![(0, 2)], vec![(0, 1)]));
    assert_eq!((s.mac_table().len(), t.mac_table().len()), (0, 1));
    let wire = |n: u8| {
        let w = UnixStream::connect(dir.path().join(format!("vm{n}"))).unwrap();
        w.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        Wire(w)
    };
    let settle = || (0..3).for_each(|_| [&s, &t].map(|s| s.settle(9)).into_iter().for_each(drop));
    let (mut a, mut b) = (wire(1), wire(2));
    settle();
    a.send(&udp(1, 2, 5, 6));
    // No member of the group that the rule names has this address.
    a.send(&udp(9, 2, 5, 6));
    settle();
    assert_eq!(b.received(), [udp(1, 2, 5, 6)]);
    // One port moves to the other host's switch.
    let moved = document("h2", "h2");
    s.apply(&moved).unwrap();
    t.apply(&moved).unwrap();
    assert_eq!((names(&s).len(), names(&t).len()), (1, 3));
    let mut a = wire(1);
    settle();
    a.send(&udp(1, 2, 7, 6));
    a.send(&udp(9, 2, 7, 6));
    settle();
    assert_eq!(b.received(), [udp(1, 2, 7, 6)]);
}
