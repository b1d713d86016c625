//! Linux guests in QEMU on ports of the switch: bonding and VLAN drivers over the `stream` and `dgram` back-ends; TCP
//! over vhost-user while the switch is killed.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use vswitch::{
    BondConfig, BondMode, Clock, DatagramPort, GatewayConfig, GatewayPort, PortConfig, SIZE_CLASSES,
    StreamMode, StreamPort, Switch, VhostUserOptions, VhostUserPort, VlanMode,
};

#[path = "../../vmm-core/tests/machine/images.rs"]
mod images;

/// A running process, mostly a guest, and what it says.
struct Guest {
    process: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Guest {
    fn start(mut command: Command) -> Self {
        let process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut process =
            process.expect("qemu-system-x86_64 is missing: install the Debian package qemu-system-x86");
        let (to, lines) = channel();
        let output = BufReader::new(process.stdout.take().unwrap());
        // The thread ends with the guest.
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = to.send(line);
            }
        });
        Self { process, lines, seen: Vec::new() }
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

    /// Forgets what was said by now.
    fn skip(&mut self) {
        self.seen.extend(self.lines.try_iter());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A guest without devices; `words` go to its kernel's command line.
fn qemu(images: &Path, initrd: &str, words: &str) -> Command {
    let mut c = Command::new("qemu-system-x86_64");
    c.args(
        "-accel tcg -cpu max -m 256 -nodefaults -no-user-config -no-reboot -display none -serial stdio"
            .split(' '),
    );
    c.args(["-object", "memory-backend-memfd,id=m,size=256M,share=on", "-machine", "pc,memory-backend=m"]);
    c.arg("-kernel").arg(images.join("vmlinuz")).arg("-initrd").arg(images.join(initrd));
    c.args(["-append", &format!("console=ttyS0 cryptomgr.notests net.ifnames=0 {words}")]);
    c
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

    let mut qemu = qemu(&images, "network", "");
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

/// Directory with the sockets of a [`switch_that_is_killed`].
const SOCKETS: &str = "NACRE_TEST_SOCKETS";

#[test]
#[ignore = "a part of `guests_talk_while_the_switch_is_killed`, which starts it as a process"]
fn switch_that_is_killed() {
    let dir = PathBuf::from(std::env::var_os(SOCKETS).expect("the test of guests starts this one"));
    let s = Switch::builder().workers(1).build().unwrap();
    for (name, mode) in [("waits", StreamMode::Listen), ("connects", StreamMode::Connect)] {
        let options = VhostUserOptions { packed_rings: true, ..VhostUserOptions::new(dir.join(name), mode) };
        s.add_port(name, VhostUserPort::new(&options).unwrap(), PortConfig::default()).unwrap();
    }
    println!("switch: ready");
    let longest =
        |name: &str| s.port_stats(s.port_id(name).unwrap()).unwrap().rx_size[SIZE_CLASSES.len() - 1];
    while longest("connects") == 0 {
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("switch: unsegmented frames passed");
    loop {
        std::thread::park();
    }
}

/// One guest has split rings and connects to the switch, the other packed ones and waits for it. Nothing but the rings
/// tells the next switch where the last one was.
#[test]
fn guests_talk_while_the_switch_is_killed() {
    let images = images::images("", &["kernel", "traffic"]);
    let dir = tempfile::tempdir().unwrap();
    let switch = || {
        let mut c = Command::new(std::env::current_exe().unwrap());
        c.args(["--exact", "switch_that_is_killed", "--ignored", "--nocapture"]);
        let mut s = Guest::start({
            c.env(SOCKETS, dir.path());
            c
        });
        s.expect("switch: ready");
        s
    };
    let guest = |n: usize, socket: &str, device: &str| {
        let mut c = qemu(&images, "traffic", &format!("guest.own=10.7.0.{n} guest.peer=10.7.0.{}", 3 - n));
        c.arg("-chardev").arg(format!("socket,id=c,path={}/{socket}", dir.path().display()));
        c.args(["-netdev", "vhost-user,id=n,chardev=c", "-device"]);
        // No MSI-X: QEMU 7.2 without KVM falls over a vhost device that uses it.
        c.arg(format!("virtio-net-pci,netdev=n,vectors=0,mac=02:00:00:00:02:0{n}{device}"));
        Guest::start(c)
    };
    let mut s = switch();
    let mut sender = guest(1, "connects,server=on", ",packed=on");
    let mut receiver = guest(2, "waits,reconnect=1", "");
    for (g, packed) in [(&mut sender, "1"), (&mut receiver, "0")] {
        let line = g.expect("guest: features ");
        let bits = line.split_whitespace().last().unwrap();
        // What the driver and the switch agreed on: checksums and TSO both ways, mergeable buffers, event indices.
        for feature in [0, 1, 7, 11, 15, 29] {
            assert_eq!(&bits[feature..=feature], "1", "{feature}: {line}");
        }
        assert_eq!(&bits[34..35], packed, "{line}");
    }
    let sum = sender.expect("guest: sends ").split_whitespace().nth(2).unwrap().to_owned();
    for _ in 0..2 {
        let received = |g: &mut Guest| {
            let line = g.expect("guest: received ");
            assert!(line.contains(&sum), "{line}, not {sum}");
        };
        received(&mut receiver);
        s.expect("switch: unsegmented frames passed");
        // By SIGKILL, in the middle of a transfer.
        drop(s);
        receiver.skip();
        s = switch();
        received(&mut receiver);
        received(&mut receiver);
    }
}
