//! Unmodified Debian kernels to userland on the software CPU.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use vmm_core::machine::{
    AccelChoice, AfterSnapshot, ConsoleConfig, ConsolePortConfig, MemoryConfig, NumaConfig, RestoreOptions,
    StopReason, VmConfig,
};
use vmm_core::migration::{MigrateOptions, Monitor};

use super::Printing;
use super::images::images;

#[path = "../virtio/namespace.rs"]
mod namespace;

fn config(images: &Path, cpus: u32, line: &str) -> VmConfig {
    let mut config = VmConfig {
        accel: AccelChoice::Soft,
        cpus,
        memory: MemoryConfig { size: 256 << 20, ..MemoryConfig::default() },
        ..VmConfig::default()
    };
    config.boot.kernel = images.join("vmlinuz");
    config.boot.initrd = Some(images.join("initrd"));
    // The crypto self-tests are half of a boot's instructions and test nothing of ours.
    config.boot.command_line = format!("console=ttyS0 cryptomgr.notests {line}");
    config
}

#[track_caller]
fn boots(config: VmConfig, expected: &[&str]) {
    let (text, reason) = super::run(config);
    for part in expected {
        assert!(text.contains(part), "{part:?} is missing; the machine stopped with {reason:?}:\n{text}");
    }
    assert_eq!(reason, StopReason::PowerOff, "{text}");
}

#[test]
fn debian_stable_boots_to_userland_with_one_and_four_cpus() {
    let images = images("", &["kernel", "initrd"]);
    boots(config(&images, 1, "boottest"), &["initrd: userland reached"]);
    boots(config(&images, 4, "boottest"), &["smp: Brought up 1 node, 4 CPUs", "initrd: userland reached"]);
}

#[test]
fn debian_backports_boots_to_userland_with_one_cpu_and_on_two_nodes() {
    let images = images("bookworm-backports", &["kernel", "initrd"]);
    boots(config(&images, 1, "boottest"), &["initrd: userland reached"]);
    let mut config = config(&images, 2, "boottest");
    let node = |cpu: u32| NumaConfig { cpus: vec![cpu], size: 128 << 20, ..NumaConfig::default() };
    config.memory.numa = vec![node(0), node(1)];
    boots(config, &["smp: Brought up 2 nodes, 2 CPUs", "initrd: userland reached"]);
}

/// Puts the root file system on a new differencing disk in `dir`; returns its path.
fn add_root(config: &mut VmConfig, images: &Path, dir: &Path) -> PathBuf {
    let child = dir.join(format!("child-{}.qcow2", config.mmio));
    super::add_child(config, &images.join("base.raw"), child)
}

/// The kernel prints its messages on the first port once its driver is there: that of vsock, loaded later, for one. The other port stays silent.
#[test]
fn debian_prints_on_a_virtio_console() {
    let images = images("", &["kernel", "initrd"]);
    let dir = tempfile::tempdir().unwrap();
    for mmio in [false, true] {
        let log = dir.path().join(format!("hvc0-{mmio}"));
        let mut config = config(&images, 1, "console=hvc0 boottest");
        config.mmio = mmio;
        let agent = ConsoleConfig::Socket(dir.path().join("agent"));
        config.console_ports = vec![
            ConsolePortConfig { to: ConsoleConfig::File(log.clone()), name: String::new() },
            ConsolePortConfig { to: agent, name: "agent".into() },
        ];
        boots(config, &["initrd: userland reached"]);
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(text.contains("NET: Registered PF_VSOCK"), "{text}");
        assert!(!dir.path().join("agent").exists(), "the socket's file is removed at the end");
    }
}

/// A guest pings the host through a tap device.
#[test]
fn debian_reaches_the_host_over_tap() {
    let images = images("", &["kernel", "initrd", "rootfs"]);
    namespace::inside(move || {
        namespace::ip(&["tuntap", "add", "dev", "guest0", "mode", "tap"]);
        namespace::ip(&["addr", "add", "10.9.0.1/24", "dev", "guest0"]);
        namespace::ip(&["link", "set", "guest0", "up"]);
        let dir = tempfile::tempdir().unwrap();
        let line = "root=/dev/vda rw nacre.ip=10.9.0.2/24 nacre.check=ping,10.9.0.1";
        let mut config = config(&images, 1, line);
        add_root(&mut config, &images, dir.path());
        let net = serde_json::json!({"backend": {"tap": "guest0"}});
        config.nets.push(serde_json::from_value(net).unwrap());
        boots(config, &["check: ping ok", "check: done"]);
    });
}

/// The root file system is on a differencing disk; the guest's own check writes and reads it. Over PCI and MMIO.
#[test]
fn debian_stable_boots_from_a_differencing_disk() {
    let images = images("", &["kernel", "initrd", "rootfs"]);
    let dir = tempfile::tempdir().unwrap();
    for mmio in [false, true] {
        let mut config = config(&images, 1, "root=/dev/vda rw nacre.check=disk");
        config.mmio = mmio;
        config.rng = true;
        let child = add_root(&mut config, &images, dir.path());
        boots(config, &["check: disk ok"]);
        assert!(std::fs::metadata(&child).unwrap().len() > 8 << 20, "the child has what the guest wrote");
    }
}

/// A guest moves to another machine while it boots, and into a file while it writes to its disk; where it goes on it reads
/// back what it wrote before and after.
#[test]
fn debian_moves_while_it_works() {
    let images = images("", &["kernel", "initrd", "rootfs"]);
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(&images, 2, "root=/dev/vda rw nacre.check=disk");
    (config.rng, config.balloon) = (true, true);
    add_root(&mut config, &images, dir.path());
    let (builder, output) = Printing::builder(&config);
    let first = builder.build().unwrap();
    first.start().unwrap();
    output.wait_for(&first, "initrd: userland reached");

    let (source, target) = UnixStream::pair().unwrap();
    let (builder, output) = Printing::builder(&config);
    let options = RestoreOptions::default();
    let second = std::thread::scope(|scope| {
        let received = scope.spawn(|| builder.receive(target, &options));
        first.migrate(source, &MigrateOptions::default(), &Monitor::default()).unwrap();
        received.join().unwrap().unwrap()
    });
    assert_eq!(first.wait(), StopReason::Moved);
    drop(first);
    output.wait_for(&second, "check: address");

    let saved = dir.path().join("saved");
    second.snapshot(&saved, AfterSnapshot::Stop).unwrap();
    drop(second);
    let (builder, output) = Printing::builder(&config);
    let third = builder.restore(&saved, &options).unwrap();
    third.start().unwrap();
    assert_eq!(third.wait(), StopReason::PowerOff, "{}", output.text());
    assert!(output.text().contains("check: disk ok"), "{}", output.text());
}

/// A damaged or too large kernel is an error before anything runs.
#[test]
fn a_guest_with_too_little_memory_for_the_kernel_is_refused() {
    let images = images("", &["kernel"]);
    let mut config = config(&images, 1, "");
    config.boot.initrd = None;
    config.memory.size = 16 << 20;
    let error = vmm_core::machine::Vm::builder(config).build().err().unwrap();
    assert!(error.to_string().contains("more memory"), "{error}");
}
