//! Unmodified Debian kernels to userland on the software CPU.
//!
//! The kernel comes from Debian's archive by `tests/guest/make-image`, into the directory that `NACRE_TEST_CACHE` names
//! or one below Cargo's target directory, once.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use vmm_core::machine::{AccelChoice, MemoryConfig, StopReason, VmConfig};

/// Two tests must not make the same file at once.
static MAKING: Mutex<()> = Mutex::new(());

/// The directory with the kernel, initrd and root disk of a Debian suite (an empty name is the host's own).
fn images(suite: &str, parts: &[&str]) -> PathBuf {
    let cache = match std::env::var_os("NACRE_TEST_CACHE") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("images"),
    };
    let dir = cache.join(if suite.is_empty() { "stable" } else { suite });
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/guest/make-image");
    let _lock = MAKING.lock().unwrap_or_else(|e| e.into_inner());
    for part in parts {
        let status = Command::new(&script).arg(part).arg(&dir).env("SUITE", suite).status().unwrap();
        assert!(status.success(), "{} {part} {} failed", script.display(), dir.display());
    }
    dir
}

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
fn debian_backports_boots_to_userland() {
    let images = images("bookworm-backports", &["kernel", "initrd"]);
    boots(config(&images, 2, "boottest"), &["initrd: userland reached"]);
}

/// The root file system is on a differencing disk; the guest's own check writes and reads it. Over PCI and MMIO.
#[test]
fn debian_stable_boots_from_a_differencing_disk() {
    let images = images("", &["kernel", "initrd", "rootfs"]);
    let dir = tempfile::tempdir().unwrap();
    let base = images.join("base.raw");
    for mmio in [false, true] {
        let child = dir.path().join(format!("child-{mmio}.qcow2"));
        let size = std::fs::metadata(&base).unwrap().len();
        blockfmt::CreateOptions::new(blockfmt::Format::Qcow2, size)
            .backing(base.to_str().unwrap(), blockfmt::Format::Raw)
            .create(&child)
            .unwrap();
        let mut config = config(&images, 1, "root=/dev/vda rw nacre.check=disk");
        config.mmio = mmio;
        config.rng = true;
        let disk = serde_json::json!({"path": child, "format": "qcow2", "allow": [images]});
        config.disks.push(serde_json::from_value(disk).unwrap());
        boots(config, &["check: disk ok"]);
        assert!(std::fs::metadata(&child).unwrap().len() > 8 << 20, "the child has what the guest wrote");
    }
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
