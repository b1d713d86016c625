//! The host's kernel and its tools on the switch's ports, in network namespaces: taps, an uplink to a Linux bridge, DHCP
//! clients and servers. Needs root.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

mod common;
#[path = "common/hosts.rs"]
mod hosts;

use std::net::Ipv4Addr;

use hosts::{Host, enter_own_namespace, ip, wait};
use vswitch::{
    Clock, DropReason, GatewayConfig, GatewayPort, NetdevPort, PortConfig, PortId, Switch, VlanMode,
};

fn switch() -> Switch {
    Switch::builder().workers(1).build().unwrap()
}

/// A host on a tap of the switch.
fn host(s: &Switch, name: &str, queues: usize, address: Option<&str>, config: PortConfig) -> (PortId, Host) {
    let id = s.add_port(name, NetdevPort::tap(name, queues).unwrap(), config).unwrap();
    (id, Host::with(name, address))
}

fn access(vlan: u16) -> PortConfig {
    PortConfig { vlan: VlanMode::Access(vlan), ..PortConfig::default() }
}

/// Sends mebibytes by TCP with iperf3 and checks that they arrive. iperf3 does not wait for what is still under way at
/// the end.
fn iperf(client: &Host, server: &Host, address: &str, mebibytes: u64, options: &[&str]) {
    let _daemon = server.start("iperf3", &["iperf3", "-s", "-1"]);
    let amount = format!("{mebibytes}M");
    let args = [&["iperf3", "-c", address, "-J", "-n", &amount], options].concat();
    // Until the server listens the client reports an error, yet ends well.
    let received = wait("iperf3", || {
        let (_, text) = client.run("iperf3", &args);
        serde_json::from_str::<serde_json::Value>(&text).ok()?["end"]["sum_received"]["bytes"].as_u64()
    });
    assert!(received > mebibytes * (8 << 20) / 10, "{received} of {mebibytes} MiB arrived");
}

/// Sends a file by TCP and checks that each byte arrives.
fn copy(client: &Host, server: &Host, address: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let content: Vec<u8> = (0..8u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&from, &content).unwrap();
    let socket = format!("TCP:{address}:5000,retry=100,interval=0.1");
    let listen = format!("CREATE:{}", to.display());
    let _daemon = server.start("socat", &["socat", "-u", "TCP-LISTEN:5000", &listen]);
    client.ok("socat", &["socat", "-u", &format!("OPEN:{}", from.display()), &socket]);
    wait("the file", || (std::fs::metadata(&to).ok()?.len() == content.len() as u64).then_some(()));
    assert!(std::fs::read(&to).unwrap() == content, "the file differs");
}

#[test]
fn taps_join_hosts() {
    enter_own_namespace();
    let s = switch();
    let (a_id, a) = host(&s, "tap-a", 2, Some("10.1.0.1/24"), access(5));
    let (b_id, b) = host(&s, "tap-b", 2, Some("10.1.0.2/24"), access(5));
    let (_, other) = host(&s, "tap-c", 1, Some("10.1.0.3/24"), access(6));
    a.ping(Ipv4Addr::new(10, 1, 0, 2), &[]);
    iperf(&a, &b, "10.1.0.2", 64, &["-P", "2"]);
    let received = s.port_stats(a_id).unwrap();
    // In packets of the MTU 64 MiB would be 46000; with segmentation offload they are far fewer.
    assert!(received.rx_bytes > 50 << 20 && received.rx_packets < 20_000, "{received:?}");
    // And the other way, over IPv6.
    for (h, address) in [(&a, "fd00::1/64"), (&b, "fd00::2/64")] {
        h.ok("iproute2", &["ip", "address", "add", address, "dev", &h.interface, "nodad"]);
    }
    iperf(&a, &b, "fd00::2", 8, &["-R"]);
    copy(&a, &b, "10.1.0.2");
    b.ok("ethtool", &["ethtool", "-K", "tap-b", "tso", "off", "gso", "off", "tx", "off"]);
    copy(&b, &a, "10.1.0.1");
    for (h, name) in [(&a, "tap-a"), (&b, "tap-b")] {
        h.ok("iproute2", &["ip", "link", "set", name, "mtu", "9000"]);
    }
    a.ping(Ipv4Addr::new(10, 1, 0, 2), &["-s", "8972", "-M", "do"]);
    assert_eq!(s.port_stats(b_id).unwrap().rx_errors, 0);
    // Another VLAN is another network.
    assert!(!other.run("iputils-ping", &["ping", "-c2", "-i0.2", "-W1", "10.1.0.1"]).0);
}

#[test]
fn an_uplink_reaches_hosts_behind_a_linux_bridge() {
    enter_own_namespace();
    let s = switch();
    // The bridge has a host namespace of its own; two cables lead there.
    ip(&["link", "add", "cable", "type", "veth", "peer", "name", "p0"]);
    ip(&["link", "set", "cable", "up"]);
    s.add_port("uplink", NetdevPort::uplink("cable").unwrap(), PortConfig::default()).unwrap();
    ip(&["link", "add", "far", "type", "veth", "peer", "name", "p1"]);
    let bridge = Host::with("p0", None);
    ip(&["link", "set", "p1", "netns", &bridge.pid().to_string()]);
    bridge.ok("iproute2", &["ip", "link", "add", "dev", "bridge0", "type", "bridge"]);
    for args in
        [["p0", "master", "bridge0"], ["p1", "master", "bridge0"], ["p1", "up", ""], ["bridge0", "up", ""]]
    {
        let args: Vec<&str> = args.into_iter().filter(|a| !a.is_empty()).collect();
        bridge.ok("iproute2", &[&["ip", "link", "set"], &args[..]].concat());
    }
    let far = Host::with("far", Some("10.2.0.2/24"));
    let (_, near) = host(&s, "near", 1, Some("10.2.0.1/24"), PortConfig::default());
    near.ping(Ipv4Addr::new(10, 2, 0, 2), &[]);
    iperf(&near, &far, "10.2.0.2", 16, &[]);
    copy(&near, &far, "10.2.0.2");
    copy(&far, &near, "10.2.0.1");
}

/// Arguments of a DHCP client that ends with a lease, or after three attempts without.
const CLIENT: [&str; 8] = ["udhcpc", "-f", "-q", "-n", "-t3", "-T1", "-A1", "-s"];

/// Runs a DHCP client; its address afterwards.
fn lease(h: &Host, script: &str) -> Option<Ipv4Addr> {
    let args = [&CLIENT[..], &[script, "-i", &h.interface]].concat();
    h.run("udhcpc", &args).0.then(|| h.address())?
}

fn dnsmasq(h: &Host, first: &str, last: &str) -> hosts::Daemon {
    let range = format!("--dhcp-range={first},{last},1h");
    let interface = format!("--interface={}", h.interface);
    h.start(
        "dnsmasq-base",
        &[
            "dnsmasq",
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--port=0",
            "--bind-interfaces",
            "--leasefile-ro",
            "--no-ping",
            "--pid-file=",
            "--user=root",
            "--enable-ra",
            "--dhcp-range=fd00:5::,ra-only,1h",
            &interface,
            &range,
        ],
    )
}

#[test]
fn dhcp_clients_get_leases_but_not_from_guarded_ports() {
    enter_own_namespace();
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("udhcpc");
    let text = "#!/bin/sh\n[ \"$1\" = bound ] || [ \"$1\" = renew ] || exit 0\nip address flush dev $interface scope global\nip address add $ip/24 dev $interface\n";
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let script = script.to_str().unwrap();
    let s = switch();
    let guarded = PortConfig { dhcp_guard: true, ..PortConfig::default() };
    let (server_id, server) = host(&s, "server", 1, Some("10.3.0.1/24"), guarded);
    server.ok("iproute2", &["ip", "address", "add", "fd00:5::1/64", "dev", "server", "nodad"]);
    let _dnsmasq = dnsmasq(&server, "10.3.0.100", "10.3.0.120");
    let (_, client) = host(&s, "client", 1, None, PortConfig::default());
    let rogue = || s.drops().into_iter().find(|d| d.0 == DropReason::RogueServer).map_or(0, |d| d.1);
    // Its router advertisements show that the server runs, and they do not pass.
    let before = wait("the server's advertisement", || Some(rogue()).filter(|n| *n > 0));
    assert_eq!(lease(&client, script), None);
    assert!(rogue() > before, "it answered and was not let through");
    let ipv6 = client.ok("iproute2", &["ip", "-6", "-o", "address", "show", "scope", "global"]);
    assert!(!ipv6.contains("fd00:5:"), "{ipv6}");
    // The switch's own server still answers, and the client gets what that gives.
    let gateway = GatewayConfig::network(Ipv4Addr::new(10, 4, 0, 0), 24).unwrap();
    let own = s
        .add_port("own", GatewayPort::new(gateway, Clock::monotonic()).unwrap(), PortConfig::default())
        .unwrap();
    assert_eq!(lease(&client, script).unwrap().octets()[..3], [10, 4, 0]);
    client.ping(Ipv4Addr::new(10, 4, 0, 1), &[]);
    s.remove_port(own).unwrap();
    // Without the guard dnsmasq serves.
    s.set_port_config(server_id, PortConfig::default()).unwrap();
    let address = lease(&client, script).unwrap().octets();
    assert!(address[..3] == [10, 3, 0] && (100..=120).contains(&address[3]), "{address:?}");
    client.ping(Ipv4Addr::new(10, 3, 0, 1), &[]);
}
