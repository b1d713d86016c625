//! OpenFlow with its real peers: `ovs-ofctl` in both versions, an os-ken controller.
#![allow(clippy::unwrap_used, reason = "a test ends where a step fails")]

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{drain, port, udp};
use vswitch::openflow::{OpenFlowConfig, OpenFlowServer, OpenFlowTarget};
use vswitch::{Endpoint, PortConfig, Switch};

fn serve(switch: &Arc<Switch>, targets: &[String]) -> OpenFlowServer {
    let targets = targets.iter().map(|t| t.parse::<OpenFlowTarget>().unwrap()).collect();
    OpenFlowServer::start(switch, &OpenFlowConfig { targets, datapath_id: 0xabc }).unwrap()
}

/// A switch with its threads, and three ports.
fn threaded() -> (Arc<Switch>, Vec<Endpoint>) {
    let switch = Arc::new(Switch::builder().workers(1).build().unwrap());
    let ends = ["a", "b", "c"].map(|n| port(&switch, n, PortConfig::default()).1);
    (switch, ends.into())
}

struct Ofctl<'a> {
    socket: &'a Path,
    version: &'static str,
}

impl Ofctl<'_> {
    fn command(&self, command: &str, args: &[&str]) -> Command {
        let mut c = Command::new("ovs-ofctl");
        c.args(["-O", self.version, "--timeout=20", command]);
        // Where it makes its control socket.
        c.env("OVS_RUNDIR", self.socket.parent().unwrap());
        c.arg(format!("unix:{}", self.socket.display())).args(args);
        c
    }

    fn output(&self, command: &str, args: &[&str]) -> (bool, String) {
        let out = self.command(command, args).output();
        let out = out.expect("ovs-ofctl is missing: install the Debian package openvswitch-common");
        let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        (out.status.success(), text)
    }

    fn run(&self, command: &str, args: &[&str]) -> String {
        let (ok, text) = self.output(command, args);
        assert!(ok && !text.contains("***"), "{} {command} {args:?}: {text}", self.version);
        text
    }

    /// Actions of the rules as `ovs-ofctl` shows them, without what changes.
    fn flows(&self) -> Vec<String> {
        let text = self.run("dump-flows", &["--no-stats"]);
        text.lines().map(|l| l.trim().to_string()).filter(|l| l.contains("actions=")).collect()
    }
}

/// Waits until `f` gives something.
fn wait<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(t) = f() {
            return t;
        }
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Rules that come back as they were written, in both versions.
const RULES: [&str; 22] = [
    "priority=100,tcp,in_port=1,nw_src=10.0.0.0/8,tp_dst=80 actions=output:2",
    "priority=101,ip,nw_dst=10.1.2.3 actions=dec_ttl,output:3",
    "priority=102,udp6,ipv6_src=2001:db8::/32,tp_src=53 actions=NORMAL",
    "priority=103,arp,arp_op=1,arp_tpa=10.0.0.1 actions=FLOOD",
    "priority=104,dl_src=02:00:00:00:00:01,dl_dst=01:00:00:00:00:00/01:00:00:00:00:00 actions=ALL",
    "priority=105,reg0=0x5,reg7=0x10/0xf0 actions=resubmit(,3)",
    "table=3,priority=106,metadata=0x5 actions=resubmit(2,4)",
    "priority=107,ct_state=+trk+new,ip actions=ct(commit,zone=5,exec(load:0x7->NXM_NX_CT_MARK[])),output:2",
    "priority=108,ip actions=ct(table=1,zone=9)",
    "table=1,priority=109,ct_state=+est+trk,ct_mark=0x7,ip actions=IN_PORT",
    "priority=110 actions=learn(table=2,hard_timeout=30,priority=5,NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[],output:NXM_OF_IN_PORT[]),resubmit(,2)",
    "priority=111 actions=move:NXM_NX_REG0[0..15]->NXM_NX_REG1[16..31],load:0x3->NXM_NX_REG2[0..3],output:NXM_NX_REG1[0..15]",
    "priority=112 actions=CONTROLLER:65535",
    "priority=113 actions=controller(reason=no_match,max_len=99)",
    "priority=114,icmp,icmp_type=8 actions=drop",
    "priority=115,icmp6,icmp_type=135,nd_target=fe80::1 actions=drop",
    "priority=116,tcp,tcp_flags=+syn-ack actions=drop",
    "priority=117,idle_timeout=60,hard_timeout=600,tun_id=0x5 actions=drop",
    "priority=118,sctp,tp_dst=99 actions=output:1,output:2",
    "priority=119,ip,nw_tos=16,nw_ttl=64 actions=drop",
    "priority=120,ip_frag=later,ip actions=drop",
    "priority=121,in_port=1,vlan_tci=0x0000/0x1fff actions=drop",
];

#[test]
fn rules_go_there_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("of");
    let (switch, _ends) = threaded();
    let _server = serve(&switch, &[format!("punix:{}", socket.display())]);
    for version in ["OpenFlow10", "OpenFlow13"] {
        let ofctl = Ofctl { socket: &socket, version };
        ofctl.run("del-flows", &[]);
        assert!(ofctl.flows().is_empty());
        let file = dir.path().join("rules");
        let mut rules = RULES.join("\n");
        if version == "OpenFlow13" {
            // The same, as this version writes it.
            rules = rules.replace("load:0x7->NXM_NX_CT_MARK[]", "set_field:0x7->ct_mark");
        }
        std::fs::write(&file, rules).unwrap();
        ofctl.run("add-flows", &[file.to_str().unwrap()]);
        // ovs-ofctl itself compares what it reads back with what it wrote.
        let (same, diff) = ofctl.output("diff-flows", &[file.to_str().unwrap()]);
        assert!(same, "{version}: {diff}");
        assert_eq!(ofctl.flows().len(), RULES.len());
        ofctl.run(
            "mod-flows",
            &["priority=100,tcp,in_port=1,nw_src=10.0.0.0/8,tp_dst=80,actions=output:3", "--strict"],
        );
        assert!(
            ofctl
                .flows()
                .iter()
                .any(|f| f.contains("tp_dst=80") && f.contains("output:c") | f.contains("output:3"))
        );
        ofctl.run("del-flows", &["ip"]);
        assert!(ofctl.flows().iter().all(|f| !f.contains("tcp") && !f.contains("icmp,")));
        ofctl.run("del-flows", &["out_port=2"]);
        let vlan = "priority=9,dl_vlan=5,dl_vlan_pcp=3,actions=strip_vlan,mod_vlan_vid:7,mod_nw_src:1.2.3.4,output:2";
        let ip_vlan = vlan.replace("priority=9,", "priority=9,ip,");
        ofctl.run("add-flow", &[&ip_vlan]);
        let shown = ofctl.flows().join("\n");
        assert!(shown.contains("dl_vlan=5,dl_vlan_pcp=3") && shown.contains("1.2.3.4"), "{shown}");
        let aggregate = ofctl.run("dump-aggregate", &[]);
        assert!(aggregate.contains("flow_count="), "{aggregate}");
    }
}

#[test]
fn ports_tables_and_descriptions_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("of");
    let (switch, ends) = threaded();
    let _server = serve(&switch, &[format!("punix:{}", socket.display())]);
    ends[0].send(&udp(1, 2, 3, 4));
    wait("the frame is counted", || (switch.port_stats(1).unwrap().rx_packets == 1).then_some(()));
    for version in ["OpenFlow10", "OpenFlow13"] {
        let ofctl = Ofctl { socket: &socket, version };
        let show = ofctl.run("show", &[]);
        assert!(
            show.contains("dpid:0000000000000abc") && show.contains("1(a)") && show.contains("3(c)"),
            "{show}"
        );
        assert!(ofctl.run("dump-desc", &[]).contains("Hardware: Userspace virtual switch"));
        let ports = ofctl.run("dump-ports", &[]);
        assert!(ports.contains("rx pkts=1, bytes=58") && ports.contains("3 ports"), "{ports}");
        assert!(ofctl.run("dump-ports", &["2"]).contains("tx pkts=1"));
        assert!(ofctl.run("dump-ports-desc", &[]).contains("2(b)"));
        assert!(ofctl.run("dump-tables", &[]).contains("active=1"));
        let queues = ofctl.run("queue-stats", &[]);
        assert!(queues.contains("0 queues"), "{queues}");
        assert!(ofctl.run("probe", &[]).is_empty());
        assert!(ofctl.run("ping", &[]).contains("64 bytes from"));
    }
    let ofctl = Ofctl { socket: &socket, version: "OpenFlow13" };
    assert!(ofctl.run("dump-table-features", &[]).contains("table 253"));
    drop(ends);
}

#[test]
fn groups_and_meters_are_set_up() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("of");
    let (switch, ends) = threaded();
    let _server = serve(&switch, &[format!("punix:{}", socket.display())]);
    let ofctl = Ofctl { socket: &socket, version: "OpenFlow13" };
    ofctl.run("add-group", &["group_id=1,type=all,bucket=output:2,bucket=dec_ttl,output:3"]);
    ofctl.run("add-group", &["group_id=2,type=ff,bucket=watch_port:2,output:2,bucket=watch_port:3,output:3"]);
    ofctl.run("add-group", &["group_id=3,type=select,bucket=weight:10,output:2,bucket=weight:20,output:3"]);
    let shown = ofctl.run("dump-groups", &[]);
    for part in ["group_id=1,type=all", "watch_port:2", "weight:20", "dec_ttl"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let (ok, error) = ofctl.output("add-group", &["group_id=1,type=all,bucket=output:2"]);
    assert!(!ok && error.contains("OFPGMFC_GROUP_EXISTS"), "{error}");
    ofctl.run("add-meter", &["meter=7,pktps,burst,stats,bands=type=drop,rate=5,burst_size=5"]);
    let shown = ofctl.run("dump-meters", &[]);
    assert!(shown.contains("meter=7 pktps burst stats") && shown.contains("rate=5 burst_size=5"), "{shown}");
    ofctl.run("add-flow", &["priority=5,in_port=1,actions=meter:7,group:1"]);
    for _ in 0..20 {
        assert!(ends[0].send(&udp(1, 2, 3, 4)));
    }
    wait("the meter has seen all", || {
        let stats = ofctl.run("meter-stats", &["meter=7"]);
        stats.contains("packet_in_count:20").then_some(())
    });
    // Whatever time passed, the first five went through and the rest came at once.
    let (b, c) = (drain(&ends[1]), drain(&ends[2]));
    assert!(b.len() >= 5 && b.len() < 20 && b.len() == c.len(), "{} and {}", b.len(), c.len());
    assert_eq!((b[0][22], c[0][22]), (64, 63));
    assert!(ofctl.run("dump-group-stats", &["group_id=1"]).contains("ref_count=1"));
    assert!(ofctl.run("dump-group-features", &[]).contains("Group table"));
    assert!(ofctl.run("meter-features", &[]).contains("max_meter:65536"));
    ofctl.run("del-groups", &["group_id=1"]);
    assert!(!ofctl.run("dump-flows", &[]).contains("group:1"), "rules go with their group");
    ofctl.run("del-meters", &[]);
    assert!(!ofctl.run("dump-meters", &[]).contains("meter=7"));
}

/// A tool that runs until it is dropped, and the lines it prints.
struct Running(Child, std::sync::mpsc::Receiver<String>);

impl Running {
    fn start(mut command: Command, package: &str) -> Self {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|e| panic!("{e}: install the Debian package {package}"));
        let (to, lines) = std::sync::mpsc::channel();
        let outputs: [Box<dyn std::io::Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for out in outputs {
            let to = to.clone();
            // The threads end with the tool.
            std::thread::spawn(move || {
                for line in BufReader::new(out).lines().map_while(Result::ok) {
                    let _ = to.send(line);
                }
            });
        }
        Self(child, lines)
    }

    fn expect(&self, what: &str) -> String {
        let mut seen = String::new();
        loop {
            match self.1.recv_timeout(Duration::from_secs(60)) {
                Ok(l) if l.contains(what) => return l,
                Ok(l) => seen += &format!("{l}\n"),
                Err(e) => panic!("{what} did not come ({e}); seen:\n{seen}"),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn monitors_see_packets_rules_and_ports() {
    for version in ["OpenFlow10", "OpenFlow13"] {
        let dir = tempfile::tempdir().unwrap();
        let (socket, snoop) = (dir.path().join("of"), dir.path().join("of.snoop"));
        let (switch, ends) = threaded();
        let targets = [format!("punix:{}", socket.display()), format!("snoop:punix:{}", snoop.display())];
        let _server = serve(&switch, &targets);
        let ofctl = Ofctl { socket: &socket, version };
        let snooper = Ofctl { socket: &snoop, version };
        let snooper = Running::start(snooper.command("snoop", &[]), "openvswitch-common");
        let monitor = Running::start(ofctl.command("monitor", &["128"]), "openvswitch-common");
        // Once the monitor has its configuration a packet reaches it; until then packets are sent.
        ofctl.run("add-flow", &["priority=9,cookie=0x55,in_port=1,udp,actions=controller"]);
        wait("the monitor sees the packet", || {
            ends[0].send(&udp(1, 2, 1234, 4321));
            let line = monitor.1.recv_timeout(Duration::from_millis(100)).ok()?;
            // Seen only if the test fails.
            println!("monitor: {line}");
            (line.contains("tp_dst=4321")).then_some(())
        });
        // Others' messages are shown, once the snooper is there.
        wait("the snooper sees a rule", || {
            ofctl.run("add-flow", &["priority=6,in_port=3,actions=drop"]);
            snooper.1.try_iter().any(|l| l.contains("FLOW_MOD")).then_some(())
        });
        // With a removal to be told of, in both directions.
        ofctl.run("add-flow", &["priority=7,send_flow_rem,in_port=3,actions=drop"]);
        ofctl.run("del-flows", &["in_port=3"]);
        assert!(monitor.expect("FLOW_REMOVED").contains("reason=delete"));
        port(&switch, "late", PortConfig::default());
        assert!(monitor.expect("PORT_STATUS").contains("ADD"));
        drain(&ends[1]);
        let frame: String = udp(7, 8, 1, 2).iter().map(|b| format!("{b:02x}")).collect();
        ofctl.run("packet-out", &[&format!("in_port=CONTROLLER packet={frame} actions=output:2")]);
        let got = wait("the packet goes out", || drain(&ends[1]).pop());
        assert_eq!(got, udp(7, 8, 1, 2));
    }
}

#[test]
fn controllers_of_os_ken_run_the_switch() {
    let dir = tempfile::tempdir().unwrap();
    // A port of the loopback interface that nobody else has at the moment.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let controller_port = free.local_addr().unwrap().port();
    drop(free);
    let mut c = Command::new("osken-manager");
    c.args(["--ofp-listen-host", "127.0.0.1", "--ofp-tcp-listen-port", &controller_port.to_string()]);
    c.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/os_ken_app.py")).current_dir(dir.path());
    c.env("PYTHONUNBUFFERED", "1");
    let controller = Running::start(c, "python3-os-ken");
    let (switch, ends) = threaded();
    switch.delete_flows(&Default::default());
    let _server = serve(&switch, &[format!("tcp:127.0.0.1:{controller_port}")]);
    controller.expect("switch abc");
    assert!(controller.expect("description").contains("Nacre"));
    assert!(controller.expect("ports").contains("[1, 2, 3]"));
    controller.expect("ready");
    // The controller learns addresses: first it floods, then it sets rules.
    ends[0].send(&udp(1, 2, 3, 4));
    wait("the controller floods", || (!drain(&ends[2]).is_empty()).then_some(()));
    ends[1].send(&udp(2, 1, 4, 3));
    wait("the answer arrives", || (!drain(&ends[0]).is_empty()).then_some(()));
    controller.expect("rule");
    assert!(drain(&ends[2]).is_empty(), "a known address is not flooded to");
    // What it set works without it.
    drop(controller);
    drain(&ends[0]);
    ends[1].send(&udp(2, 1, 4, 3));
    wait("the rule forwards", || (!drain(&ends[0]).is_empty()).then_some(()));
}
