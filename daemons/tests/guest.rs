//! A Debian guest whose disk and network card are those of other processes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use blockfmt::{CreateOptions, Format};

#[path = "../../vmm-core/tests/machine/images.rs"]
mod images;

/// A process that prints a line when it is ready; dropping it kills it.
struct Daemon {
    child: Child,
    /// Open, so that it can go on printing.
    _output: BufReader<ChildStdout>,
}

impl Daemon {
    /// Starts it where `dir` is, without the sockets that a killed one left there.
    fn start(program: &str, dir: &Path, arguments: &[&str], sockets: &[&str]) -> Self {
        for socket in sockets {
            // At the first start there is none.
            let _ = std::fs::remove_file(dir.join(socket));
        }
        let mut command = Command::new(program);
        let mut child = command.args(arguments).current_dir(dir).stdout(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "{program} ended");
        Self { child, _output: output }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The guest boots from the disk of `nacre-blk`, gets its address from `nacre-switch`, and does not notice more than a
/// pause when either is killed and started again while it writes, reads and pings.
#[test]
fn a_guest_outlives_its_disk_and_switch_processes() {
    let images = images::images("", &["kernel", "initrd", "rootfs"]);
    // An export's parent is beside it.
    let dir = tempfile::tempdir_in(&images).unwrap();
    let base = dir.path().join("base.raw");
    std::fs::hard_link(images.join("base.raw"), &base).unwrap();
    CreateOptions::new(Format::Qcow2, std::fs::metadata(&base).unwrap().len())
        .backing("base.raw", Format::Raw)
        .create(&dir.path().join("disk.qcow2"))
        .unwrap();
    let export = ["--export", "name=disk,path=disk.qcow2,format=qcow2,vhost=blk"];
    let blk = || Daemon::start(env!("CARGO_BIN_EXE_nacre-blk"), dir.path(), &export, &["blk"]);
    let ports = ["--vhost-user", "net", "--dhcp", "10.9.1.0/24"];
    let switch = || Daemon::start(env!("CARGO_BIN_EXE_nacre-switch"), dir.path(), &ports, &["net"]);

    let (mut disk, mut network) = (blk(), switch());
    let mut nacre = Command::new(env!("CARGO_BIN_EXE_nacre"));
    nacre.args(["run", "--accel", "soft", "--memory", "256M", "--rng"]).current_dir(dir.path());
    nacre.arg("--kernel").arg(images.join("vmlinuz")).arg("--initrd").arg(images.join("initrd"));
    let line = "console=ttyS0 cryptomgr.notests root=/dev/vda rw nacre.check=rounds,10.9.1.1";
    nacre.args(["--cmdline", line, "--disk", "path=blk,format=vhost-user", "--net", "vhost-user=net"]);
    let mut nacre = nacre.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut text = String::new();
    for line in BufReader::new(nacre.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        // What follows is served by the next process.
        if line.contains("check: ping-1 ok") {
            drop(disk);
            disk = blk();
        } else if line.contains("check: disk-2 ok") {
            drop(network);
            network = switch();
        }
        text += &line;
        text.push('\n');
    }
    assert!(nacre.wait().unwrap().success(), "{text}");
    assert!(text.contains("check: done"), "{text}");
    drop((disk, network));
    let mut check = Command::new("qemu-img");
    check.args(["check", "-f", "qcow2"]).arg(dir.path().join("disk.qcow2"));
    let check = check.output().expect("install the Debian package qemu-utils");
    // Clusters that a killed process had taken and not yet used may be left over.
    let harmless = matches!(check.status.code(), Some(0 | 3));
    assert!(harmless, "{}", String::from_utf8_lossy(&check.stdout));
}
