//! The contract of `nacre run`: exit status, errors in one line, the terminal.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod certificates;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use certificates::{authority, certificate, client};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{Termios, tcgetattr};
use nix::unistd::Pid;
use tempfile::TempDir;

/// An ELF file with a PVH note around 32-bit code that is linked at 1 MiB.
fn kernel(dir: &TempDir, name: &str, code: &[u8]) -> PathBuf {
    let mut f = Vec::new();
    f.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0");
    f.extend(0x10_0000u64.to_le_bytes());
    f.extend(64u64.to_le_bytes());
    f.extend([0; 12]);
    for n in [64u16, 56, 2, 0, 0, 0] {
        f.extend(n.to_le_bytes());
    }
    for (kind, offset, address, len) in [(1u32, 0x400u64, 0x10_0000u64, code.len() as u64), (4, 0x200, 0, 20)]
    {
        f.extend(kind.to_le_bytes());
        f.extend(7u32.to_le_bytes());
        for n in [offset, address, address, len, len, 4] {
            f.extend(n.to_le_bytes());
        }
    }
    f.resize(0x200, 0);
    f.extend(*b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0\0\0\x10\0");
    f.resize(0x400, 0);
    f.extend(code);
    let path = dir.path().join(name);
    std::fs::write(&path, f).unwrap();
    path
}

/// `mov dx, port; mov al, value; out dx, al`
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(0x3f8, byte)).collect()
}

/// `jmp $`
const FOREVER: [u8; 2] = [0xeb, 0xfe];

fn power_off() -> Vec<u8> {
    // mov dx, 0x604; mov ax, 0x3400; out dx, ax
    let mut code = vec![0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef];
    code.extend(FOREVER);
    code
}

fn nacre(kernel: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nacre"));
    command.args(["run", "--accel", "soft", "--kernel"]).arg(kernel);
    command.stdin(Stdio::null());
    command
}

#[test]
fn each_end_has_its_exit_status() {
    let dir = TempDir::new().unwrap();
    let reset = [print("r"), out(0x64, 0xfe), FOREVER.to_vec()].concat();
    let ends = [
        (power_off(), 0),
        (reset, 3),
        ([out(0x505, 1), FOREVER.to_vec()].concat(), 4),
        (vec![0x0f, 0x0b], 5),
        ([out(0xf4, 7), FOREVER.to_vec()].concat(), 71),
    ];
    for (code, status) in ends {
        let code = [print("hello\n"), code].concat();
        let output = nacre(&kernel(&dir, "k", &code)).arg("--debug-ports").output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        assert!(output.stdout.starts_with(b"hello\n"), "{output:?}");
    }
}

/// Fails with status 1 and one line that names what is wrong.
#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    one_line(output, 1, words);
}

#[track_caller]
fn one_line(output: &Output, status: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{text}");
    assert!(text.starts_with("nacre: ") && text.lines().count() == 1, "{text}");
    for word in words {
        assert!(text.contains(word), "{word} is missing: {text}");
    }
}

#[test]
fn errors_are_one_line_that_says_what_to_do() {
    let dir = TempDir::new().unwrap();
    let good = kernel(&dir, "good", &power_off());
    refused(
        &nacre(Path::new("/nonexistent")).output().unwrap(),
        &["kernel", "/nonexistent", "check the path"],
    );
    let text = dir.path().join("text");
    std::fs::write(&text, "no kernel").unwrap();
    refused(&nacre(&text).output().unwrap(), &["neither a bzImage nor an ELF"]);
    let cut = dir.path().join("cut");
    std::fs::write(&cut, &std::fs::read(&good).unwrap()[..0x300]).unwrap();
    refused(&nacre(&cut).output().unwrap(), &["truncated"]);
    refused(&nacre(&good).args(["--memory", "100T"]).output().unwrap(), &["memory of"]);
    // A size that a guest could have, and this host cannot give.
    refused(
        &nacre(&good).args(["--memory", "15T"]).output().unwrap(),
        &["memory of", "this host has", "less"],
    );
    refused(&nacre(&good).args(["--pin", "0=1023"]).output().unwrap(), &["vCPU 0", "host CPUs", "exist"]);
    refused(&nacre(&good).args(["--cpus", "300"]).output().unwrap(), &["300 vCPUs"]);
    refused(&nacre(&good).args(["--net", "unix=/nonexistent"]).output().unwrap(), &["Nobody listens"]);

    let disk = dir.path().join("disk");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let option = format!("path={},format=raw", disk.display());
    let held = blockfmt::OpenOptions::new(blockfmt::Format::Raw).open(&disk).unwrap();
    // Nothing half-made is left: not even the socket of the console.
    let socket = dir.path().join("console");
    let console = format!("socket={}", socket.display());
    let output = nacre(&good).args(["--disk", &option, "--console", &console]).output().unwrap();
    refused(&output, &["disk"]);
    assert!(!socket.exists());
    drop(held);
    assert!(nacre(&good).args(["--disk", &option]).status().unwrap().success());
}

#[test]
fn a_wrong_command_line_is_one_line() {
    let wrong: [(&[&str], &[&str]); 5] = [
        (&["--kernel", "k", "--memoryy", "1G"], &["--memoryy", "--memory'"]),
        (&["--kernel", "k", "--firmware", "f"], &["--kernel", "--firmware"]),
        (&[], &["--kernel"]),
        (&["--kernel", "k", "--accel", "xen"], &["xen", "kvm"]),
        (&["--kernel", "k", "--disk", "path=x"], &["format=..."]),
    ];
    for (arguments, words) in wrong {
        let output = Command::new(env!("CARGO_BIN_EXE_nacre")).arg("run").args(arguments).output().unwrap();
        one_line(&output, 2, words);
    }
    let output = Command::new(env!("CARGO_BIN_EXE_nacre")).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("Usage: nacre <COMMAND>"));
    let output = Command::new(env!("CARGO_BIN_EXE_nacre")).args(["run", "--help"]).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    assert!(String::from_utf8_lossy(&output.stdout).contains("Exit status:"));
}

/// What only the superuser may use is refused to others with the reason. (The tests run as root, or somebody who has
/// no such rights in the first place.)
#[test]
fn missing_permissions_are_explained() {
    const NOBODY: u32 = 65534;
    let dir = TempDir::new().unwrap();
    let good = kernel(&dir, "good", &power_off());
    let program = dir.path().join("nacre");
    std::fs::copy(env!("CARGO_BIN_EXE_nacre"), &program).unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let as_nobody = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.args(["run", "--kernel"]).arg(&good).args(arguments).stdin(Stdio::null());
        if nix::unistd::geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        loop {
            match command.output() {
                // Another test's thread was starting a process while this one wrote the program.
                Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
                output => return output.unwrap(),
            }
        }
    };
    refused(&as_nobody(&["--accel", "soft", "--net", "tap=nacre-no-tap"]), &["nacre-no-tap", "may use it"]);
    if !Path::new("/dev/kvm").exists() {
        refused(&as_nobody(&["--accel", "kvm"]), &["/dev/kvm", "does not exist"]);
    } else if nix::unistd::geteuid().is_root() {
        refused(&as_nobody(&["--accel", "kvm"]), &["no permission to open /dev/kvm", "group"]);
    }
    assert!(as_nobody(&["--accel", "soft"]).status.success());
}

/// The thread of each vCPU runs where `--pin` says.
#[test]
fn vcpus_are_pinned() {
    let dir = TempDir::new().unwrap();
    let forever = kernel(&dir, "forever", &[print("ready"), FOREVER.to_vec()].concat());
    // A CPU that this process may use.
    let status = |path: &Path, key: &str| {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().to_owned()
    };
    let allowed = status(Path::new("/proc/self/status"), "Cpus_allowed_list:");
    let cpu: String =
        allowed.chars().rev().take_while(char::is_ascii_digit).collect::<Vec<_>>().iter().rev().collect();
    let mut session = Session::start(nacre(&forever).args(["--cpus", "2", "--pin", &format!("1={cpu}")]));
    session.expect("ready");
    let threads = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", session.child.id())).unwrap();
        let paths = tasks.map(|task| task.unwrap().path().join("status"));
        let named = paths.map(|path| (status(&path, "Name:"), status(&path, "Cpus_allowed_list:")));
        named.filter(|(name, _)| name.starts_with("vcpu")).collect::<Vec<_>>()
    };
    // The guest speaks when its first vCPU runs; the thread of the second may still be at its beginning.
    let mut found = threads();
    while found.len() < 2 {
        std::thread::yield_now();
        found = threads();
    }
    found.sort();
    assert_eq!(found, [("vcpu0".into(), allowed), ("vcpu1".into(), cpu)]);
    session.master.write_all(b"\x01x").unwrap();
    session.end(6);
}

/// A `nacre run` on a terminal of its own.
struct Session {
    child: Child,
    master: File,
    slave: OwnedFd,
    before: Termios,
}

impl Session {
    fn start(command: &mut Command) -> Self {
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(pty.slave.as_fd()).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = command.stdin(end()).stdout(end()).stderr(Stdio::piped()).spawn().unwrap();
        Self { child, master: pty.master.into(), slave: pty.slave, before }
    }

    /// Reads until the guest printed `text`.
    fn expect(&mut self, text: &str) {
        let mut seen = Vec::new();
        while !seen.windows(text.len()).any(|w| w == text.as_bytes()) {
            let mut byte = [0];
            self.master.read_exact(&mut byte).unwrap();
            seen.push(byte[0]);
        }
    }

    /// Waits for the end; the terminal must be as before.
    fn end(mut self, status: i32) {
        let ended = self.child.wait().unwrap();
        assert_eq!((ended.code(), ended.signal()), (Some(status), None));
        let after = tcgetattr(self.slave.as_fd()).unwrap();
        assert!(after == self.before, "{after:?} was {:?}", self.before);
    }
}

#[test]
fn the_terminal_is_raw_during_a_session_and_restored_after_it() {
    let dir = TempDir::new().unwrap();
    let forever = kernel(&dir, "forever", &[print("ready"), FOREVER.to_vec()].concat());
    let mut session = Session::start(&mut nacre(&forever));
    session.expect("ready");
    assert!(tcgetattr(session.slave.as_fd()).unwrap() != session.before, "raw");
    session.master.write_all(b"\x01x").unwrap();
    session.end(6);

    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut session = Session::start(&mut nacre(&forever));
        session.expect("ready");
        kill(Pid::from_raw(session.child.id() as i32), signal).unwrap();
        session.end(6);
    }

    let mut session = Session::start(&mut nacre(&kernel(&dir, "off", &[print("bye"), power_off()].concat())));
    session.expect("bye");
    session.end(0);
}

#[test]
fn restart_boots_again_after_each_reset() {
    let dir = TempDir::new().unwrap();
    let code = [print("again "), out(0x64, 0xfe), FOREVER.to_vec()].concat();
    let mut session = Session::start(nacre(&kernel(&dir, "k", &code)).arg("--restart"));
    for _ in 0..3 {
        session.expect("again ");
    }
    kill(Pid::from_raw(session.child.id() as i32), Signal::SIGTERM).unwrap();
    session.end(6);
}

#[test]
fn metrics_are_served_on_a_socket() {
    let dir = TempDir::new().unwrap();
    let socket = dir.path().join("metrics");
    let forever = kernel(&dir, "forever", &[print("ready"), FOREVER.to_vec()].concat());
    let mut session = Session::start(nacre(&forever).arg("--metrics").arg(&socket));
    session.expect("ready");
    let mut client = UnixStream::connect(&socket).unwrap();
    client.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.0 200 OK\r\n"), "{text}");
    assert!(text.contains("nacre_bus_port_writes_total{vm=\"nacre\"} 5\n"), "{text}");
    session.master.write_all(b"\x01x").unwrap();
    session.end(6);
    assert!(!socket.exists());
}

/// A guest that prints a dot whenever it has counted far enough, for ever.
fn dots(dir: &TempDir) -> PathBuf {
    // mov ecx, 0x4000; loop $; dot; jmp to the first
    let dot = out(0x3f8, b'.');
    let mut code = vec![0xb9, 0x00, 0x40, 0x00, 0x00, 0xe2, 0xfe];
    code.extend(&dot);
    let back = -(code.len() as i8 + 2);
    code.extend([0xeb, back as u8]);
    kernel(dir, "dots", &code)
}

/// Waits until the file has more dots than `after`; returns how many.
#[track_caller]
fn more_dots(file: &Path, after: u64) -> u64 {
    for _ in 0..60_000 {
        let now = std::fs::metadata(file).map_or(0, |m| m.len());
        if now > after {
            return now;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("the guest prints nothing more into {}", file.display());
}

fn vm(socket: &Path, command: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nacre")).arg("vm").arg(socket).args(command).output().unwrap()
}

/// Ends a machine that came from another process: it runs a little before it takes commands.
fn stop(socket: &Path) {
    while !vm(socket, &["status"]).status.success() {
        std::thread::yield_now();
    }
    assert!(vm(socket, &["stop"]).status.success());
}

/// Ends a process that was started.
struct Ended(Child);

impl Ended {
    #[track_caller]
    fn status(mut self) -> Option<i32> {
        self.0.wait().unwrap().code()
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process that prints into a file of its name in `dir`, and takes commands on a socket of its own there.
fn running(dir: &TempDir, name: &str, more: &[&str]) -> Ended {
    let at = |name: String| dir.path().join(name);
    let mut command = Command::new(env!("CARGO_BIN_EXE_nacre"));
    command.args(["run", "--accel", "soft", "--console"]).arg(format!("file={}", at(name.into()).display()));
    command.arg("--control").arg(at(format!("{name}.sock"))).args(more).stdin(Stdio::null());
    Ended(command.spawn().unwrap())
}

/// A directory with an authority, and certificates of it for both ends.
fn certificates(dir: &TempDir) -> PathBuf {
    let ours = authority(dir.path().join("ours"));
    certificate(&ours, &ours, "server", "2");
    certificate(&ours, &ours, "client", "2");
    ours
}

#[test]
fn a_machine_is_saved_and_moved() {
    let dir = TempDir::new().unwrap();
    let kernel = dots(&dir);
    let path = |name: &str| dir.path().join(name);
    let disk = path("disk");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let disk = format!("path={},format=raw", disk.display());
    let run = |name: &str, origin: &[&str]| running(&dir, name, &[&["--disk", &disk], origin].concat());
    let control = |name: &str| path(&format!("{name}.sock"));
    let first = run("first", &["--kernel", kernel.to_str().unwrap()]);
    more_dots(&path("first"), 3);

    // Paused it prints nothing, and goes on.
    assert!(vm(&control("first"), &["pause"]).status.success());
    let text = String::from_utf8(vm(&control("first"), &["status"]).stdout).unwrap();
    assert!(text.contains("\"state\":\"paused\""), "{text}");
    assert!(vm(&control("first"), &["resume"]).status.success());
    let dots = more_dots(&path("first"), 0);
    more_dots(&path("first"), dots);
    refused(&vm(&control("first"), &["cancel"]), &["No migration"]);
    refused(&vm(&control("first"), &["migrate", "unix:/nonexistent"]), &["Nobody waits"]);
    refused(&vm(&path("no.sock"), &["status"]), &["--control"]);

    // Into a file, and out of it.
    let saved = path("saved");
    let output = vm(&control("first"), &["snapshot", saved.to_str().unwrap(), "--then", "stop"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(first.status(), Some(6));
    let second = run("second", &["--restore", saved.to_str().unwrap()]);
    more_dots(&path("second"), 3);

    // To another process.
    let address = format!("unix:{}", path("move").display());
    let third = run("third", &["--incoming", &address]);
    while !path("move").exists() {
        std::thread::yield_now();
    }
    let output = vm(&control("second"), &["migrate", &address]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("\"confirmed\":true"), "{text}");
    assert_eq!(second.status(), Some(7));
    more_dots(&path("third"), 3);
    stop(&control("third"));
    assert_eq!(third.status(), Some(6));
    assert!(!path("move").exists() && !control("third").exists());

    // A process that waits for a machine can be ended.
    let waiting = run("fourth", &["--incoming", &address]);
    while !path("move").exists() {
        std::thread::yield_now();
    }
    kill(Pid::from_raw(waiting.0.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(waiting.status(), Some(6));
}

#[test]
fn a_machine_moves_over_tls_between_those_who_have_certificates_only() {
    let dir = TempDir::new().unwrap();
    let kernel = dots(&dir);
    let path = |name: &str| dir.path().join(name);
    let (ours, others) = (certificates(&dir), authority(path("others")));
    let (nobody, stranger) = (client(path("nobody"), &ours), client(path("stranger"), &ours));
    certificate(&others, &stranger, "client", "2");
    let wary = client(path("wary"), &others);
    certificate(&ours, &wary, "client", "2");

    // Another program could take the port before the target does; it does not, in practice.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("tcp:localhost:{port}");
    let source = running(&dir, "source", &["--kernel", kernel.to_str().unwrap()]);
    more_dots(&path("source"), 3);
    let target =
        running(&dir, "target", &["--incoming", &address, "--tls-certificates", ours.to_str().unwrap()]);

    // Who says nothing, or does not speak TLS, is not taken for the source.
    let _silent = loop {
        if let Ok(stream) = TcpStream::connect(("localhost", port)) {
            break stream;
        }
        std::thread::yield_now();
    };
    let mut plain = TcpStream::connect(("localhost", port)).unwrap();
    plain.write_all(b"NACREVM\n\x01\0\0\0\0\0\0\0").unwrap();
    let migrate = |more: &[&str]| vm(&path("source.sock"), &[&["migrate", &address], more].concat());
    let with = |certificates: &Path| migrate(&["--tls-certificates", certificates.to_str().unwrap()]);
    refused(&migrate(&[]), &[]);
    refused(&with(&nobody), &["CertificateRequired"]);
    refused(&with(&stranger), &["UnknownCA"]);
    refused(&with(&wary), &["certificates", "UnknownIssuer"]);
    let unix = ["migrate", "unix:x", "--tls-certificates", "pki"];
    refused(&vm(&path("source.sock"), &unix), &[]);
    // All of that leaves the machine where it was.
    let dots = more_dots(&path("source"), 0);
    more_dots(&path("source"), dots);

    // Those who stall, however many they are, do not keep the source waiting until it gives up.
    let mut stalled: Vec<TcpStream> =
        (0..40).map(|_| TcpStream::connect(("localhost", port)).unwrap()).collect();
    for half in stalled.iter_mut().skip(30) {
        // The beginning of a greeting.
        half.write_all(&[22, 3, 1, 2, 0, 1]).unwrap();
    }
    let output = with(&ours);
    drop(stalled);
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(output.status.success() && text.contains("\"confirmed\":true"), "{output:?}");
    assert_eq!(source.status(), Some(7));
    more_dots(&path("target"), 3);
    stop(&path("target.sock"));
    assert_eq!(target.status(), Some(6));
}

#[test]
fn a_connection_over_tls_that_breaks_leaves_the_machine_where_it_is() {
    let dir = TempDir::new().unwrap();
    let kernel = dots(&dir);
    let path = |name: &str| dir.path().join(name);
    let ours = certificates(&dir);
    let certificates = ours.to_str().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("tcp:localhost:{port}");
    // Between the two, and gone in the middle of the memory.
    let middle = TcpListener::bind("127.0.0.1:0").unwrap();
    let _source = running(&dir, "source", &["--kernel", kernel.to_str().unwrap()]);
    more_dots(&path("source"), 3);
    let target = running(&dir, "target", &["--incoming", &address, "--tls-certificates", certificates]);
    let through = format!("tcp:localhost:{}", middle.local_addr().unwrap().port());
    let cut = std::thread::spawn(move || {
        let (mut near, _) = middle.accept().unwrap();
        let mut far = loop {
            if let Ok(stream) = TcpStream::connect(("localhost", port)) {
                break stream;
            }
            std::thread::yield_now();
        };
        let (mut back, mut there) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        let answers = std::thread::spawn(move || std::io::copy(&mut back, &mut there));
        let sent = std::io::copy(&mut (&mut near).take(16 << 10), &mut far).unwrap();
        for stream in [&near, &far] {
            stream.shutdown(std::net::Shutdown::Both).unwrap();
        }
        // It ends with the connections.
        let _ = answers.join().unwrap();
        sent
    });
    refused(&vm(&path("source.sock"), &["migrate", &through, "--tls-certificates", certificates]), &[]);
    assert_eq!(cut.join().unwrap(), 16 << 10);
    // The one has failed, the other goes on.
    assert_eq!(target.status(), Some(1));
    let dots = more_dots(&path("source"), 0);
    more_dots(&path("source"), dots);
}
