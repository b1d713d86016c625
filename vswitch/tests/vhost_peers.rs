//! The vhost-user back-end against front-ends of others: DPDK's virtio-user with several queues, on sockets of either
//! side, while switches come and go; and QEMU, with a guest that asks for its address.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vswitch::{
    Clock, GatewayConfig, GatewayPort, PortConfig, PortStats, StreamMode, Switch, VhostUserOptions,
    VhostUserPort,
};

const QUEUES: usize = 2;

/// Waits until `f` gives something; else fails with what `story` tells.
fn wait<T>(what: &str, story: impl Fn() -> String, mut f: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(90);
    loop {
        if let Some(t) = f() {
            return t;
        }
        assert!(Instant::now() < end, "{what} did not come: {}", story());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn read(log: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(log).unwrap()).into_owned()
}

/// Held while threads of testpmd poll: two tests at once would get little of the processor.
static POLLING: Mutex<()> = Mutex::new(());

/// A running testpmd with two devices, driven through its prompt.
struct Testpmd {
    process: Ended,
    log: PathBuf,
    _polling: MutexGuard<'static, ()>,
}

/// A process that ends with this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself. `timeout` passes this signal on to what it runs.
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

impl Testpmd {
    /// Each device has a socket, and further words: `server=1` if it is to make it.
    fn start(dir: &Path, devices: [(&Path, &str); 2]) -> Self {
        let polling = POLLING.lock().unwrap_or_else(PoisonError::into_inner);
        let log = dir.join("testpmd.log");
        let output = File::create(&log).unwrap();
        let mut c = Command::new("stdbuf");
        c.args(["-oL", "dpdk-testpmd"]);
        c.args("--lcores=0@(0-1),1@(0-1) --no-pci --no-huge --no-telemetry --iova-mode=va -m 192".split(' '));
        c.arg(format!("--file-prefix=nacre-test-{}", std::process::id()));
        // What it leaves behind goes with the test.
        c.env("RUNTIME_DIRECTORY", dir);
        for (n, (path, more)) in devices.iter().enumerate() {
            let path = path.display();
            c.arg(format!(
                "--vdev=net_virtio_user{n},mac=02:00:00:00:00:0{n},path={path},queues={QUEUES},queue_size=256{more}"
            ));
        }
        // It tells the layout of its rings.
        c.arg("--log-level=pmd.net.virtio.init:info");
        c.args(["--", "-i", "--nb-cores=1", "--total-num-mbufs=4096", "--forward-mode=mac"]);
        c.args([format!("--rxq={QUEUES}"), format!("--txq={QUEUES}")]);
        c.args(["--eth-peer=0,02:00:00:00:00:01", "--eth-peer=1,02:00:00:00:00:00"]);
        c.stdin(Stdio::piped()).stdout(output.try_clone().unwrap()).stderr(output);
        let process = c.spawn().unwrap();
        let mut t = Self { process: Ended(process), log, _polling: polling };
        t.expect("testpmd> ", 1);
        let packed = devices.iter().filter(|(_, more)| more.contains("packed_vq=1")).count();
        let said = ["Rx", "Tx"].map(|way| {
            let text = t.text();
            let lines = text.lines().filter(|l| l.contains("using packed ring") && l.contains(way));
            let mut ports: Vec<_> =
                lines.filter_map(|l| l.split(" on port ").nth(1)).map(str::trim).collect();
            ports.sort_unstable();
            ports.dedup();
            ports.len()
        });
        assert_eq!(said, [packed; 2], "devices with packed rings: {}", t.text());
        t
    }

    fn text(&self) -> String {
        read(&self.log)
    }

    fn expect(&mut self, what: &str, count: usize) {
        let (log, process) = (&self.log, &mut self.process.0);
        wait(
            what,
            || read(log),
            || {
                let ended = process.try_wait().unwrap();
                assert!(ended.is_none(), "testpmd (Debian package dpdk-dev) ended: {}", read(log));
                (read(log).matches(what).count() >= count).then_some(())
            },
        );
    }

    fn say(&mut self, line: &str) {
        writeln!(self.process.0.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// A counter of a device.
    fn counter(&mut self, device: usize, name: &str) -> u64 {
        let heading = "NIC extended statistics for port";
        let before = self.text().matches(heading).count();
        let prompts = self.text().matches("testpmd> ").count();
        self.say(&format!("show port xstats {device}"));
        self.expect(heading, before + 1);
        self.expect("testpmd> ", prompts + 1);
        let text = self.text();
        let page = &text[text.rfind(heading).unwrap()..];
        let line = page.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("{name}: {page}")).trim().parse().unwrap()
    }
}

/// A switch on the sockets of both devices, with a worker for each queue.
fn switch(sockets: [(&Path, StreamMode); 2]) -> Switch {
    let s = Switch::builder().workers(QUEUES).build().unwrap();
    for (n, (path, mode)) in sockets.into_iter().enumerate() {
        let options =
            VhostUserOptions { queue_pairs: QUEUES, packed_rings: true, ..VhostUserOptions::new(path, mode) };
        let port = VhostUserPort::new(&options).unwrap();
        s.add_port(&format!("p{n}"), port, PortConfig::default()).unwrap();
    }
    s
}

fn stats(s: &Switch) -> [PortStats; 2] {
    ["p0", "p1"].map(|name| s.port_stats(s.port_id(name).unwrap()).unwrap())
}

/// Waits until frames pass through the switch both ways, in numbers that need the rings to go round.
fn passes(s: &Switch, pmd: &Testpmd) {
    let before = stats(s).map(|p| p.tx_packets);
    wait(
        "traffic",
        || pmd.text(),
        || {
            let now = stats(s).map(|p| p.tx_packets);
            now.iter().zip(before).all(|(now, before)| now - before > 2000).then_some(())
        },
    );
    assert_eq!(stats(s).map(|p| p.rx_errors), [0, 0]);
}

/// Frames go from each device to the other and back for ever; one makes its socket, the other connects to the switch's.
fn every_queue_is_used(features: [&str; 2]) {
    let dir = tempfile::tempdir().unwrap();
    let (served, connected) = (dir.path().join("served"), dir.path().join("connected"));
    let s = switch([(&served, StreamMode::Listen), (&connected, StreamMode::Connect)]);
    let server = format!("{},server=1", features[1]);
    let mut pmd = Testpmd::start(dir.path(), [(&served, features[0]), (&connected, &server)]);
    pmd.say("start tx_first 2");
    passes(&s, &pmd);
    for device in 0..2 {
        for queue in 0..QUEUES {
            for counter in [format!("rx_q{queue}_good_packets"), format!("tx_q{queue}_good_packets")] {
                assert!(pmd.counter(device, &counter) > 0, "{counter} of device {device}");
            }
        }
    }
}

#[test]
fn testpmd_uses_every_queue() {
    every_queue_is_used(["", ""]);
}

#[test]
fn testpmd_uses_every_packed_queue() {
    every_queue_is_used([",packed_vq=1", ",packed_vq=1,mrg_rxbuf=0,in_order=0"]);
    every_queue_is_used([",packed_vq=1,mrg_rxbuf=0", ",packed_vq=1,in_order=0"]);
    every_queue_is_used(["", ",packed_vq=1"]);
}

/// Nothing but the rings tells the next switch where the last one stopped.
#[test]
fn testpmd_outlives_switches() {
    for features in ["", ",packed_vq=1"] {
        outlives_switches(features);
    }
}

fn outlives_switches(features: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let sockets = [(&*a, StreamMode::Connect), (&*b, StreamMode::Connect)];
    let mut s = switch(sockets);
    let server = format!("{features},server=1");
    let mut pmd = Testpmd::start(dir.path(), [(&a, &server), (&b, &server)]);
    pmd.say("start tx_first 2");
    for _ in 0..3 {
        passes(&s, &pmd);
        // With frames under way.
        drop(s);
        s = switch(sockets);
        wait("both links", || pmd.text(), || s.ports().iter().all(|p| p.link_up).then_some(()));
        // Those that were on a link that was down are lost; others take their place.
        pmd.say("stop");
        pmd.say("start tx_first 2");
    }
    passes(&s, &pmd);
}

/// The network boot of QEMU's own firmware asks for an address over vhost-user.
#[test]
fn firmware_in_qemu_gets_an_address() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("net");
    let s = Switch::builder().workers(1).build().unwrap();
    let port = VhostUserPort::new(&VhostUserOptions::new(&socket, StreamMode::Listen)).unwrap();
    let guest = s.add_port("guest", port, PortConfig::default()).unwrap();
    let network = GatewayConfig::network(Ipv4Addr::new(10, 6, 0, 0), 24).unwrap();
    let gateway = GatewayPort::new(network, Clock::monotonic()).unwrap();
    s.add_port("gateway", gateway, PortConfig::default()).unwrap();
    let mut qemu = Command::new("timeout");
    qemu.args(["120", "qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-nodefaults", "-no-reboot"]);
    qemu.args(["-display", "none", "-object", "memory-backend-memfd,id=m,size=64M,share=on"]);
    qemu.args(["-machine", "q35,memory-backend=m,graphics=off", "-serial", "stdio", "-boot", "n"]);
    qemu.arg("-chardev").arg(format!("socket,id=c,path={}", socket.display()));
    qemu.args(["-netdev", "vhost-user,id=n,chardev=c"]);
    qemu.args(["-device", "virtio-net-pci,netdev=n,mac=02:00:00:00:00:07"]);
    let log = dir.path().join("serial");
    let output = File::create(&log).unwrap();
    qemu.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
    let mut qemu = Ended(qemu.spawn().unwrap());
    let text = || read(&log);
    let seen = wait("the guest's address", text, || {
        let seen = text();
        let ended = qemu.0.try_wait().unwrap();
        assert!(
            ended.is_none(),
            "install the packages qemu-system-x86, seabios and ipxe-qemu: {ended:?} {seen}"
        );
        seen.contains("10.6.0.2/255.255.255.0").then_some(seen)
    });
    assert!(s.mac_table().iter().any(|r| r.mac == 0x0200_0000_0007 && r.port == guest), "{seen}");
}
