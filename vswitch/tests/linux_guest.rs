//! A Linux guest's bonding and VLAN drivers on two ports of the switch: QEMU's `stream` and `dgram` back-ends.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use vswitch::{
    BondConfig, BondMode, Clock, DatagramPort, GatewayConfig, GatewayPort, PortConfig, StreamMode,
    StreamPort, Switch, VlanMode,
};

#[path = "../../vmm-core/tests/machine/images.rs"]
mod images;

/// What a running guest says.
struct Guest {
    qemu: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Guest {
    fn start(mut qemu: Command) -> Self {
        let qemu = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut qemu =
            qemu.expect("qemu-system-x86_64 is missing: install the Debian package qemu-system-x86");
        let (to, lines) = channel();
        let output = BufReader::new(qemu.stdout.take().unwrap());
        // The thread ends with the guest.
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = to.send(line);
            }
        });
        Self { qemu, lines, seen: Vec::new() }
    }

    /// Waits for a line with this in it.
    fn expect(&mut self, what: &str) -> String {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            let Ok(line) = self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) else {
                panic!("\"{what}\" did not come; seen:\n{}", self.seen.join("\n"));
            };
            self.seen.push(line.clone());
            if line.contains(what) {
                return line;
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

#[test]
fn linux_bonds_its_links_by_lacp_and_tags_its_frames() {
    let images = images::images("", &["kernel", "network"]);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let s = Switch::builder().workers(1).build().unwrap();
    let stream = StreamPort::new(path("stream"), StreamMode::Listen).unwrap();
    let datagram = DatagramPort::new(path("switch"), Some(&path("guest"))).unwrap();
    let members = vec![
        s.add_port("stream", stream, PortConfig::default()).unwrap(),
        s.add_port("datagram", datagram, PortConfig::default()).unwrap(),
    ];
    let bond = BondConfig {
        mode: BondMode::BalanceFlow,
        members: members.clone(),
        lacp: true,
        system: [2, 0, 0, 0, 9, 1],
    };
    let bond = s.add_bond("bond", bond, PortConfig::default()).unwrap();
    let network = GatewayConfig::network(Ipv4Addr::new(10, 5, 0, 0), 24).unwrap();
    let gateway = GatewayPort::new(network, Clock::monotonic()).unwrap();
    s.add_port("gateway", gateway, PortConfig { vlan: VlanMode::Access(5), ..PortConfig::default() })
        .unwrap();

    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args("-accel tcg -machine pc -cpu max -m 256 -nodefaults -no-user-config -no-reboot -display none -serial stdio".split(' '));
    qemu.arg("-kernel").arg(images.join("vmlinuz")).arg("-initrd").arg(images.join("network"));
    qemu.args(["-append", "console=ttyS0 cryptomgr.notests net.ifnames=0"]);
    let stream = format!("stream,id=n0,server=off,addr.type=unix,addr.path={}", path("stream").display());
    let datagram = format!(
        "dgram,id=n1,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        path("guest").display(),
        path("switch").display()
    );
    // LACP aggregates links of known speed only.
    for (n, netdev) in [stream, datagram].iter().enumerate() {
        qemu.args(["-netdev", netdev, "-device"])
            .arg(format!("virtio-net-pci,netdev=n{n},mac=02:00:00:00:01:0{n},speed=1000,duplex=full"));
    }
    let mut guest = Guest::start(qemu);
    assert!(guest.expect("guest: address").contains("10.5.0."));
    guest.expect("links 2 answer yes");
    let seen = guest.seen.join("\n");
    assert!(seen.contains("bonding: Bonding Mode: IEEE 802.3ad Dynamic link aggregation"), "{seen}");
    assert!(seen.contains("Partner Mac Address: 02:00:00:00:09:01"), "{seen}");
    assert_eq!(s.bond_members_in_use(bond), members);
    // The guest's address is known on the bond, in its VLAN.
    assert!(s.mac_table().iter().any(|r| (r.vlan, r.port) == (5, bond)), "{:?}", s.mac_table());
    // One link falls silent: nothing tells the guest but the frames that do not come.
    s.remove_port(members[1]).unwrap();
    guest.expect("links 1 answer yes");
    assert_eq!(s.bond_members_in_use(bond), members[..1]);
}
