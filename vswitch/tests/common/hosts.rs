//! Hosts in network namespaces of their own, on ports of a switch. Needs root.
#![allow(dead_code, clippy::unwrap_used, reason = "each test uses some of them, and ends where a step fails")]

use std::net::Ipv4Addr;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

/// Gives the calling thread, and what it starts, a network namespace of its own, which ends with them.
pub fn enter_own_namespace() {
    unshare(CloneFlags::CLONE_NEWNET).expect("this test makes network namespaces: run it as root");
    ip(&["link", "set", "lo", "up"]);
}

fn run(mut c: Command, package: &str) -> Output {
    let name = c.get_program().to_string_lossy().into_owned();
    c.output().unwrap_or_else(|e| panic!("{name}: {e}: install the Debian package {package}"))
}

fn text(o: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr))
}

/// Runs `ip` in the calling thread's namespace.
pub fn ip(args: &[&str]) {
    let mut c = Command::new("ip");
    c.args(args);
    let o = run(c, "iproute2");
    assert!(o.status.success(), "ip {args:?}: {}", text(&o));
}

/// A namespace with one network interface; it ends when this is dropped, or the test in any way.
pub struct Host {
    /// Holds the namespace, until its input ends.
    holder: Child,
    /// Name of the interface.
    pub interface: String,
}

impl Host {
    /// Moves an interface of the calling thread's namespace to a host of its own.
    pub fn with(interface: &str, address: Option<&str>) -> Self {
        let mut c = Command::new("unshare");
        c.args(["--net", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let holder = c.spawn().expect("unshare is missing: install the Debian package util-linux");
        let host = Self { holder, interface: interface.into() };
        let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        wait("the namespace", || (namespace(host.holder.id()) != own).then_some(()));
        ip(&["link", "set", "dev", interface, "netns", &host.holder.id().to_string()]);
        host.ok("iproute2", &["ip", "link", "set", "lo", "up"]);
        host.ok("iproute2", &["ip", "link", "set", "dev", interface, "up"]);
        if let Some(a) = address {
            host.ok("iproute2", &["ip", "address", "add", a, "dev", interface, "nodad"]);
        }
        host
    }

    /// Number of a process in the namespace.
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// A program that is to run on the host.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut c = Command::new("nsenter");
        c.args(["--net", "-t", &self.holder.id().to_string(), "--"]).args(args);
        c
    }

    /// Runs a program to its end; whether it succeeded, and what it said.
    pub fn run(&self, package: &str, args: &[&str]) -> (bool, String) {
        let o = run(self.command(args), "util-linux");
        let missing = o.status.code() == Some(127);
        assert!(!missing, "{} is missing: install the Debian package {package}: {}", args[0], text(&o));
        (o.status.success(), text(&o))
    }

    /// The same for one that must succeed.
    pub fn ok(&self, package: &str, args: &[&str]) -> String {
        let (ok, text) = self.run(package, args);
        assert!(ok, "{args:?}: {text}");
        text
    }

    /// Starts a program that runs until it is dropped.
    pub fn start(&self, package: &str, args: &[&str]) -> Daemon {
        let (found, _) = self.run("debianutils", &["which", args[0]]);
        assert!(found, "{} is missing: install the Debian package {package}", args[0]);
        let mut c = self.command(args);
        Daemon(c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// Waits until an address answers.
    pub fn ping(&self, address: Ipv4Addr, options: &[&str]) {
        let address = address.to_string();
        let args = [&["ping", "-c1", "-W1"], options, &[&address]].concat();
        wait(&format!("{args:?}"), || self.run("iputils-ping", &args).0.then_some(()));
    }

    /// The IPv4 address of the interface.
    pub fn address(&self) -> Option<Ipv4Addr> {
        let text = self.ok("iproute2", &["ip", "-4", "-o", "address", "show", "dev", &self.interface]);
        let word = text.split_whitespace().skip_while(|w| *w != "inet").nth(1)?;
        word.split('/').next()?.parse().ok()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It ends with its input; if it does not, waiting would be for ever.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A running program.
pub struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until `f` gives something.
pub fn wait<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(t) = f() {
            return t;
        }
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}
