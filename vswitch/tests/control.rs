//! The control socket, and what the configuration says beyond ports: rules, fixed addresses, captures, patches.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use common::{drain, mac, port, udp};
use vswitch::control::{ControlServer, Request, View, ask, table};
use vswitch::pipeline::FlowFilter;
use vswitch::{Binding, Clock, MacAddr, PatchPanel, PortConfig, PortState, Switch, SwitchConfig};

fn hex(frame: &[u8]) -> String {
    frame.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn a_running_switch_answers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let s = Arc::new(Switch::builder().workers(1).build().unwrap());
    let bound = PortConfig {
        bindings: vec![Binding { mac: MacAddr(mac(1)), ips: vec!["10.0.0.1".parse().unwrap()] }],
        anti_spoof: true,
        source_guard: true,
        ..PortConfig::default()
    };
    let (_, _a) = port(&s, "a", bound);
    let (b, _b) = port(&s, "b", PortConfig::default());
    s.add_static_mac(0, mac(2), b).unwrap();
    let server = ControlServer::start(&s, &path).unwrap();
    let show = |what| ask(&path, &Request::Show { what, limit: 10 });
    let ports = show(View::Ports).unwrap();
    assert_eq!((&ports["total"], &ports["rows"][1]["name"]), (&2.into(), &"b".into()));
    let text = table(View::Ports, &ports);
    assert!(text.starts_with("id  name  kind      link") && text.lines().count() == 3, "{text}");
    let metrics = ask(&path, &Request::Metrics).unwrap();
    assert!(metrics.as_str().unwrap().contains("nacre_switch_port_up{port=\"b\"} 1"), "{metrics}");
    let macs = show(View::Macs).unwrap();
    assert_eq!(macs["rows"][0]["mac"], "02:00:00:00:00:02");
    assert_eq!((&macs["rows"][0]["name"], &macs["rows"][0]["static"]), (&"b".into(), &true.into()));
    let flows = show(View::Flows).unwrap();
    assert_eq!((&flows["rows"][0]["match"], &flows["rows"][0]["actions"]), (&"any".into(), &"normal".into()));
    assert!(show(View::Top).unwrap_err().to_string().contains("meter_flows"));

    let trace = |frame: &[u8]| {
        let r = Request::Trace { port: "a".into(), frame: hex(frame) };
        ask(&path, &r).map(|v| {
            v.as_array().unwrap().iter().map(|l| l.as_str().unwrap().to_string()).collect::<Vec<_>>()
        })
    };
    let good = trace(&udp(1, 2, 5, 6)).unwrap().join("\n");
    for step in [
        "in by port 1 (a)",
        "guards passed",
        "table 0: priority 0",
        "destination known",
        "output to port 2 (b)",
    ] {
        assert!(good.contains(step), "{step}: {good}");
    }
    assert!(trace(&udp(3, 2, 5, 6)).unwrap().join("\n").contains("drop: spoofed-mac"));
    assert_eq!(s.drops(), [], "a trace changes nothing");
    assert_eq!(s.mac_table().len(), 1);
    let wrong = ask(&path, &Request::Trace { port: "a".into(), frame: "0g".into() });
    assert!(wrong.unwrap_err().to_string().contains("hexadecimal"));
    assert!(ask(&path, &Request::Trace { port: "z".into(), frame: "00".into() }).is_err());

    // Nonsense is answered, and a client that says nothing does not stop the next one.
    let _silent = UnixStream::connect(&path).unwrap();
    let mut c = UnixStream::connect(&path).unwrap();
    c.write_all(b"{\"command\":\"reboot\"}\n").unwrap();
    c.shutdown(std::net::Shutdown::Write).unwrap();
    let mut reply = String::new();
    c.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("{\"error\":"), "{reply}");
    drop(server);
    assert!(!path.exists() && UnixStream::connect(&path).is_err());
}

#[test]
fn rules_and_fixed_addresses_come_and_go_with_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let s = common::switch();
    let config = |rules: &str, macs: &str| {
        let sockets = ["x", "y"].map(|n| dir.path().join(n));
        let text = format!(
            r#"{{"ports":{{"x":{{"kind":{{"unix_stream":{{"socket":{:?}}}}},"number":5}},
                          "y":{{"kind":{{"unix_stream":{{"socket":{:?}}}}},"number":6}}}},
                "flows":[{rules}],"static_macs":[{macs}]}}"#,
            sockets[0], sockets[1]
        );
        SwitchConfig::parse(&text).unwrap()
    };
    let rules = || -> Vec<String> {
        let all = s.flows(&FlowFilter::default());
        all.iter()
            .map(|e| format!("{}:{} {}", e.spec.priority, e.spec.matches, e.spec.instructions))
            .collect()
    };
    let drop_dns = r#"{"priority":9,"match":{"ip_dst":"10.0.0.0/8","protocol":"udp","dst_port":53}}"#;
    let to_y = r#"{"priority":5,"match":{"in_port":"x"},"actions":[{"set_vlan":7},{"output":"y"}]}"#;
    let fixed = r#"{"vlan":7,"mac":"02:00:00:00:00:09","port":"y"}"#;
    s.apply(&config(&format!("{drop_dns},{to_y}"), fixed)).unwrap();
    let dns = "9:eth_type=0x800,protocol=17,dst_port=53,ip_dst=10.0.0.0/0xff000000 drop";
    let to = "5:in_port=5 set(vlan=0x7/0xfff),output:6";
    let sorted = |mut v: Vec<String>| {
        v.sort();
        v
    };
    assert_eq!(sorted(rules()), sorted(vec![dns.into(), to.into(), "0:any normal".into()]));
    assert_eq!(s.mac_table().iter().map(|r| (r.vlan, r.port, r.fixed)).collect::<Vec<_>>(), [(7, 6, true)]);
    let kept = s.flows(&FlowFilter::default())[0].created;
    s.clock().advance(std::time::Duration::from_secs(5));
    // The rule that stays keeps its age, and with it its counters; a rule in the default's place takes it over.
    s.apply(&config(&format!("{drop_dns},{{}}"), "")).unwrap();
    assert_eq!(rules(), [dns, "0:any drop"]);
    assert_eq!(s.flows(&FlowFilter::default())[0].created, kept);
    assert!(s.mac_table().is_empty());
    s.apply(&config("", "")).unwrap();
    assert_eq!(rules(), ["0:any normal"]);
}

#[test]
fn captures_go_on_in_the_next_file_or_end() {
    let dir = tempfile::tempdir().unwrap();
    let (ring, single) = (dir.path().join("ring"), dir.path().join("single"));
    let s = common::switch();
    let text = format!(
        r#"{{"ports":{{"ring":{{"kind":{{"capture":{{"file":{ring:?},"limit_bytes":131072,"files":3}}}}}},
                      "single":{{"kind":{{"capture":{{"file":{single:?},"limit_bytes":131072,"files":1}}}}}}}}}}"#
    );
    s.apply(&SwitchConfig::parse(&text).unwrap()).unwrap();
    let (_, a) = port(&s, "a", PortConfig::default());
    let mut long = udp(1, 2, 5, 6);
    long.resize(9000, 1);
    // Fourteen fit into a file.
    for _ in 0..66 {
        assert!(a.send(&long));
    }
    s.settle(9);
    let rows = |name: &str| {
        let out = std::process::Command::new("tshark").arg("-r").arg(dir.path().join(name)).output();
        let out = out.expect("tshark is missing: install the Debian package tshark");
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).lines().count()
    };
    assert_eq!(["ring", "ring.1", "ring.2", "single"].map(rows), [10, 14, 14, 14]);
    assert!(!dir.path().join("ring.3").exists() && !dir.path().join("single.1").exists());
    let dropped = |name| s.port_stats(s.port_id(name).unwrap()).unwrap().tx_dropped;
    assert_eq!((dropped("ring"), dropped("single")), (0, 52));
}

#[test]
fn two_configured_switches_are_patched_and_captured() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("all.pcapng");
    let panel = PatchPanel::default();
    let build =
        || Switch::builder().workers(0).clock(Clock::manual()).patch_panel(panel.clone()).build().unwrap();
    let (s, t) = (build(), build());
    let patch = r#""to-other":{"kind":{"patch":{"cable":"c"}}}"#;
    let one = format!(
        r#"{{"ports":{{{patch},"dump":{{"kind":{{"capture":{{"file":{file:?}}}}}}}}},
            "mirrors":{{"m":{{"from":["to-other"],"towards":["to-other"],"to":"dump"}}}}}}"#
    );
    s.apply(&SwitchConfig::parse(&one).unwrap()).unwrap();
    let other = SwitchConfig::parse(&format!(r#"{{"ports":{{{patch}}}}}"#)).unwrap();
    assert!(!s.ports().iter().find(|p| p.name == "to-other").unwrap().link_up);
    t.apply(&other).unwrap();
    assert!(build().apply(&other).is_err(), "a cable has two ends");
    let (_, a) = port(&s, "a", PortConfig::default());
    let (_, b) = port(&t, "b", PortConfig::default());
    a.send(&udp(1, 2, 5, 6));
    s.settle(9);
    t.settle(9);
    assert_eq!(drain(&b), [udp(1, 2, 5, 6)]);
    // One end goes and comes back.
    t.apply(&SwitchConfig::default()).unwrap();
    assert!(!s.ports().iter().find(|p| p.name == "to-other").unwrap().link_up);
    t.apply(&other).unwrap();
    b.send(&udp(2, 1, 5, 6));
    t.settle(9);
    s.settle(9);
    assert_eq!(drain(&a), [udp(2, 1, 5, 6)]);
    let out = std::process::Command::new("tshark")
        .arg("-r")
        .arg(&file)
        .args(["-T", "fields", "-e", "eth.src"])
        .output();
    let out = out.expect("tshark is missing: install the Debian package tshark");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "02:00:00:00:00:01\n02:00:00:00:00:02\n");
}

#[test]
fn the_state_of_a_port_moves_over_control_sockets() {
    let dir = tempfile::tempdir().unwrap();
    let group = r#"{"g":{"rules":[{"direction":"egress"}]}}"#;
    let vm = PortConfig {
        bindings: vec![Binding { mac: MacAddr(mac(1)), ips: vec!["10.0.0.1".parse().unwrap()] }],
        security_groups: vec!["g".into()],
        ..PortConfig::default()
    };
    let make = |name: &str| {
        let s = Arc::new(common::switch());
        s.set_security_groups(serde_json::from_str(group).unwrap());
        let (_, a) = port(&s, "vm", vm.clone());
        let (_, b) = port(&s, "other", PortConfig::default());
        let path = dir.path().join(name);
        (ControlServer::start(&s, &path).unwrap(), path, s, a, b)
    };
    let (_from, from_path, s, a, b) = make("from");
    let (_to, to_path, t, a2, b2) = make("to");
    a.send(&udp(1, 2, 5, 6));
    s.settle(9);
    assert_eq!(drain(&b).len(), 1);
    // An answer to a connection that nobody here has seen does not pass.
    b2.send(&udp(2, 1, 6, 5));
    t.settle(9);
    assert!(drain(&a2).is_empty());
    let state = ask(&from_path, &Request::ExportPort { port: "vm".into() }).unwrap();
    let state: Box<PortState> = serde_json::from_value(state).unwrap();
    assert_eq!((state.macs.len(), state.connections.len(), state.stats.rx_packets), (1, 1, 1));
    let id = ask(&to_path, &Request::ImportPort { state: state.clone() }).unwrap();
    assert_eq!(id, t.port_id("vm").unwrap());
    b2.send(&udp(2, 1, 6, 5));
    t.settle(9);
    assert_eq!(drain(&a2), [udp(2, 1, 6, 5)]);
    let stats = t.port_stats(t.port_id("vm").unwrap()).unwrap();
    assert_eq!((stats.rx_packets, stats.tx_packets), (1, 1));
    let lost =
        ask(&to_path, &Request::ImportPort { state: Box::new(PortState { name: "z".into(), ..*state }) });
    assert!(lost.unwrap_err().to_string().contains("No such port"));
}
