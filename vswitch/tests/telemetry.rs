//! Exported flow records and samples, decoded by nfcapd/nfdump and tshark; the list of top talkers.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

mod common;

use std::net::UdpSocket;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{arp, drain, port, tcp, udp};
use vswitch::{
    Batch, CapturePort, Clock, Endpoint, FlowExportConfig, FlowProtocol, Packet, Port, PortConfig,
    SflowConfig, Switch, TelemetryConfig,
};

/// A collector of the test's own.
fn collector() -> UdpSocket {
    let s = UdpSocket::bind("127.0.0.1:0").unwrap();
    s.set_nonblocking(true).unwrap();
    s
}

fn export(to: &UdpSocket, protocol: FlowProtocol, sampling: u32) -> TelemetryConfig {
    let flow_export = Some(FlowExportConfig {
        collectors: vec![to.local_addr().unwrap()],
        protocol,
        active_timeout: 60,
        idle_timeout: 15,
        sampling,
        domain: 7,
    });
    TelemetryConfig { flow_export, ..TelemetryConfig::default() }
}

fn received(s: &UdpSocket) -> Vec<Vec<u8>> {
    let mut buffer = [0; 2048];
    std::iter::from_fn(|| s.recv(&mut buffer).ok().map(|n| buffer[..n].to_vec())).collect()
}

fn pass(s: &Switch, seconds: u64) {
    for _ in 0..seconds {
        s.clock().advance(Duration::from_secs(1));
        s.settle(9);
    }
}

fn udp6(sport: u16) -> Vec<u8> {
    let mut f = Vec::new();
    let b =
        etherparse::PacketBuilder::ethernet2(common::mac(1), common::mac(2)).ipv6([0x20; 16], [0x30; 16], 64);
    b.udp(sport, 53).write(&mut f, &[0; 100]).unwrap();
    f
}

/// Some traffic from one port to another: TCP of three packets, UDP over IPv6 of two, ARP, and a flow that is dropped.
fn traffic(s: &Switch, a: &Endpoint, b: &Endpoint) {
    b.send(&udp(2, 1, 9, 9));
    s.settle(9);
    for flags in ["S", "A", "F"] {
        a.send(&tcp(1, 2, 1000, 80, flags));
    }
    a.send(&udp6(4000));
    a.send(&udp6(4000));
    a.send(&arp(1, 1, 1, 2));
    s.settle(9);
}

/// Runs a program of a Debian package; its standard output.
fn run(program: &str, package: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output();
    let out = out.unwrap_or_else(|e| panic!("{program}: {e}: install the Debian package {package}"));
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Sends datagrams to nfcapd and returns what nfdump reads from its files, as comma-separated values.
fn nfdump(datagrams: &[Vec<u8>], format: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let target = collector().local_addr().unwrap();
    let mut daemon = Command::new("nfcapd")
        .args(["-b", "127.0.0.1", "-p", &target.port().to_string(), "-w"])
        .arg(dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("nfcapd is missing: install the Debian package nfdump");
    let bound = format!(":{:04X} ", target.port());
    let end = Instant::now() + Duration::from_secs(20);
    while !std::fs::read_to_string("/proc/net/udp").unwrap().contains(&bound) {
        assert!(Instant::now() < end, "nfcapd does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    for d in datagrams {
        sender.send_to(d, target).unwrap();
    }
    // Until nfcapd has taken all from its socket.
    let queue = |line: &str| line.split_whitespace().nth(4).is_some_and(|q| !q.ends_with(":00000000"));
    let waits = |line: &str| line.contains(&bound) && queue(line);
    while std::fs::read_to_string("/proc/net/udp").unwrap().lines().any(waits) {
        assert!(Instant::now() < end, "nfcapd does not read");
        std::thread::sleep(Duration::from_millis(20));
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon.id() as i32), nix::sys::signal::Signal::SIGTERM)
        .unwrap();
    daemon.wait().unwrap();
    let files = dir.path().to_str().unwrap();
    run("nfdump", "nfdump", &["-R", files, "-q", "-N", "-o", format])
}

/// Puts datagrams into a capture file, as UDP packets to `port`.
fn capture(datagrams: &[Vec<u8>], port: u16, file: &Path) {
    let capture = CapturePort::new(std::fs::File::create(file).unwrap(), 65_535, Clock::manual()).unwrap();
    for d in datagrams {
        let mut f = Vec::new();
        let b = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([127, 0, 0, 1], [127, 0, 0, 1], 64);
        b.udp(port, port).write(&mut f, d).unwrap();
        capture.transmit(0, &Batch::all(&[Packet::from_frame(&f)]));
    }
    capture.finish().unwrap();
}

#[test]
fn nfdump_reads_the_flows_of_both_protocols() {
    for protocol in [FlowProtocol::Netflow9, FlowProtocol::Ipfix] {
        let (s, socket) = (common::switch(), collector());
        s.set_telemetry(&export(&socket, protocol, 1)).unwrap();
        let (_, a) = port(&s, "a", PortConfig::default());
        let (_, b) = port(&s, "b", PortConfig::default());
        traffic(&s, &a, &b);
        pass(&s, 14);
        assert!(received(&socket).is_empty(), "no flow has ended yet");
        pass(&s, 3);
        let text = nfdump(&received(&socket), "fmt:%pr|%sa|%sp|%da|%dp|%pkt|%byt|%flg|%in|%out|%ismc");
        let rows: Vec<Vec<&str>> = text.lines().map(|l| l.split('|').map(str::trim).collect()).collect();
        let find = |sport: &str| {
            rows.iter().find(|r| r.len() > 9 && r[2] == sport).unwrap_or_else(|| panic!("{text}"))
        };
        let bytes = |frames: &[Vec<u8>]| frames.iter().map(|f| f.len() - 14).sum::<usize>().to_string();
        let t = find("1000");
        assert_eq!((t[0], t[1], t[3], t[4], t[5]), ("6", "10.0.0.1", "10.0.0.2", "80", "3"), "{text}");
        assert_eq!(t[6], bytes(&["S", "A", "F"].map(|f| tcp(1, 2, 1000, 80, f))));
        assert!(
            t[7].contains('S') && t[7].contains('A') && t[7].contains('F') && !t[7].contains('R'),
            "{text}"
        );
        assert_eq!((t[8], t[9]), ("1", "2"));
        let u = find("4000");
        assert_eq!((u[0], u[4], u[5]), ("17", "53", "2"), "{text}");
        assert_eq!(u[6], bytes(&[udp6(1), udp6(1)]));
        assert_eq!(rows.len(), 3, "ARP is no IP flow: {text}");
    }
}

#[test]
fn a_long_flow_is_reported_in_parts_that_add_up() {
    let (s, socket) = (common::switch(), collector());
    s.set_telemetry(&export(&socket, FlowProtocol::Netflow9, 1)).unwrap();
    let (_, a) = port(&s, "a", PortConfig::default());
    let (_, b) = port(&s, "b", PortConfig::default());
    for _ in 0..150 {
        a.send(&udp(1, 2, 5, 6));
        pass(&s, 1);
    }
    drain(&b);
    pass(&s, 20);
    let text = nfdump(&received(&socket), "fmt:%pkt");
    let packets: Vec<u32> = text.lines().filter_map(|l| l.trim().parse().ok()).collect();
    assert_eq!((packets.len(), packets.iter().sum::<u32>()), (3, 150), "{text}");
}

#[test]
fn collectors_learn_the_sampling_rate() {
    for protocol in [FlowProtocol::Netflow9, FlowProtocol::Ipfix] {
        let (s, socket) = (common::switch(), collector());
        s.set_telemetry(&export(&socket, protocol, 10)).unwrap();
        let (_, a) = port(&s, "a", PortConfig::default());
        let (_, b) = port(&s, "b", PortConfig::default());
        for _ in 0..200 {
            for _ in 0..100 {
                a.send(&udp(1, 2, 5, 6));
            }
            s.settle(9);
            drain(&b);
        }
        pass(&s, 20);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sampled");
        capture(&received(&socket), 2055, &file);
        let text =
            run("tshark", "tshark", &["-r", file.to_str().unwrap(), "-d", "udp.port==2055,cflow", "-V"]);
        assert!(text.contains("Sampling interval: 10\n"), "{text}");
        assert!(text.contains("Sampling algorithm: Random sampling (2)"), "{text}");
        let counts = text.lines().filter_map(|l| l.trim().strip_prefix("Packets: ")?.parse::<u32>().ok());
        let packets: u32 = counts.sum();
        // Two thousand samples are expected: three hundred are more than six deviations.
        assert!((1700..2300).contains(&packets), "{protocol:?}: {text}");
    }
}

#[test]
fn tshark_decodes_records_without_complaint() {
    let dir = tempfile::tempdir().unwrap();
    for (protocol, version) in [(FlowProtocol::Netflow9, "9"), (FlowProtocol::Ipfix, "10")] {
        let (s, socket) = (common::switch(), collector());
        s.set_telemetry(&export(&socket, protocol, 1)).unwrap();
        let (_, a) = port(&s, "a", PortConfig::default());
        let (_, b) = port(&s, "b", PortConfig::default());
        traffic(&s, &a, &b);
        pass(&s, 20);
        let file = dir.path().join(version);
        capture(&received(&socket), 2055, &file);
        let fields =
            ["cflow.version", "cflow.srcaddr", "cflow.srcaddrv6", "cflow.packets", "_ws.expert.severity"];
        let mut args = vec!["-r", file.to_str().unwrap(), "-d", "udp.port==2055,cflow", "-T", "fields"];
        fields.iter().for_each(|f| args.extend(["-e", f]));
        let text = run("tshark", "tshark", &args);
        assert!(text.lines().all(|l| l.starts_with(version) && l.ends_with('\t')), "{text}");
        assert!(text.contains("10.0.0.1") && text.contains("2020:2020"), "{text}");
    }
}

#[test]
fn sflow_samples_and_counters_are_decoded_by_tshark() {
    let (s, socket) = (common::switch(), collector());
    let sflow = SflowConfig {
        collectors: vec![socket.local_addr().unwrap()],
        agent: Some("10.9.9.9".parse().unwrap()),
        sampling: 1,
        header: 64,
        polling: 20,
    };
    s.set_telemetry(&TelemetryConfig { sflow: Some(sflow), ..TelemetryConfig::default() }).unwrap();
    let (_, a) = port(&s, "a", PortConfig::default());
    let (_, b) = port(&s, "b", PortConfig::default());
    traffic(&s, &a, &b);
    pass(&s, 21);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sflow");
    capture(&received(&socket), 6343, &file);
    let text = run("tshark", "tshark", &["-r", file.to_str().unwrap(), "-V"]);
    for expected in [
        "Datagram version: 5",
        "Agent address: 10.9.9.9",
        "Flow sample",
        "Counters sample",
        "Input interface (ifIndex): 1",
        "Output interface value: 2",
        "Frame length: 166",
        "Sampled header length: 64",
        "Generic interface counters",
        "Src Port: 1000",
    ] {
        let text = text.to_lowercase();
        assert!(text.contains(&expected.to_lowercase()), "{expected} is not in {text}");
    }
    assert!(!text.contains("Malformed"), "{text}");
}

#[test]
fn top_talkers_are_sorted_by_rate() {
    let s = common::switch();
    assert!(s.top_talkers(5).is_err());
    s.set_telemetry(&TelemetryConfig { meter_flows: true, ..TelemetryConfig::default() }).unwrap();
    let (a_id, a) = port(&s, "a", PortConfig::default());
    let (_, b) = port(&s, "b", PortConfig::default());
    pass(&s, 1);
    for n in 0..20 {
        a.send(&udp(1, 2, 7, n % 4));
        a.send(&udp(1, 2, 8, 9));
    }
    s.settle(9);
    drain(&b);
    pass(&s, 1);
    let (top, total) = s.top_talkers(2).unwrap();
    assert_eq!((top.len(), total), (2, 5));
    assert_eq!((top[0].src_port, top[0].packets_per_second, top[0].in_port), (8, 20, a_id));
    assert_eq!(top[0].bits_per_second, 20 * 8 * udp(1, 2, 8, 9).len() as u64);
    assert_eq!(top[1].packets, 5);
    // Records of flows that ended are forgotten.
    pass(&s, 120);
    assert_eq!(s.top_talkers(2).unwrap().1, 0);
}

#[test]
fn workers_meter_as_they_forward() {
    let (s, socket) = (Arc::new(Switch::builder().workers(2).build().unwrap()), collector());
    s.set_telemetry(&export(&socket, FlowProtocol::Ipfix, 1)).unwrap();
    let (_, a) = port(&s, "a", PortConfig::default());
    let (_, b) = port(&s, "b", PortConfig::default());
    let end = Instant::now() + Duration::from_secs(20);
    for i in 0..100 {
        while !a.send(&udp(1, 2, 5, i % 10)) {}
    }
    let mut arrived = 0;
    while arrived < 100 {
        arrived += drain(&b).len();
        assert!(Instant::now() < end);
    }
    // What was measured is not lost when the switch ends.
    drop(s);
    let text = nfdump(&received(&socket), "fmt:%pkt");
    let packets: Vec<u32> = text.lines().filter_map(|l| l.trim().parse().ok()).collect();
    assert_eq!((packets.len(), packets.iter().sum::<u32>()), (10, 100), "{text}");
}
