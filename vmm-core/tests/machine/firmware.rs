//! SeaBIOS, GRUB and an unmodified Debian kernel from a disk's partition, on the software CPU.

use std::path::{Path, PathBuf};

use vmm_core::boot::BootError;
use vmm_core::machine::{
    AccelChoice, AfterSnapshot, BootConfig, MemoryConfig, NumaConfig, RestoreOptions, StopReason, Vm,
    VmConfig, VmError,
};

use super::Printing;
use super::images::images;

const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";

fn with_firmware(firmware: &Path) -> VmConfig {
    VmConfig {
        accel: AccelChoice::Soft,
        memory: MemoryConfig { size: 256 << 20, ..MemoryConfig::default() },
        boot: BootConfig { firmware: Some(firmware.to_owned()), ..BootConfig::default() },
        ..VmConfig::default()
    }
}

fn seabios() -> VmConfig {
    assert!(Path::new(SEABIOS).exists(), "{SEABIOS} is missing: install the Debian package seabios");
    with_firmware(Path::new(SEABIOS))
}

/// Puts a child of the disk with GRUB on it into `dir`.
fn add_disk(config: &mut VmConfig, dir: &Path) -> PathBuf {
    let images = images("", &["kernel", "initrd", "bootdisk"]);
    super::add_child(config, &images.join("bootdisk.raw"), dir.join("child.qcow2"))
}

/// The machine is saved while GRUB loads the kernel through the BIOS, and goes on in another one.
#[test]
fn seabios_and_grub_boot_debian_from_a_differencing_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = VmConfig { cpus: 2, rng: true, ..seabios() };
    let child = add_disk(&mut config, dir.path());
    let (builder, output) = Printing::builder(&config);
    let vm = builder.build().unwrap();
    vm.start().unwrap();
    output.wait_for(&vm, "GRUB: booting");
    let saved = dir.path().join("saved");
    vm.snapshot(&saved, AfterSnapshot::Stop).unwrap();
    drop(vm);
    assert!(output.text().contains("SeaBIOS"), "{}", output.text());

    let (builder, output) = Printing::builder(&config);
    let vm = builder.restore(&saved, &RestoreOptions::default()).unwrap();
    vm.start().unwrap();
    let (reason, text) = (vm.wait(), output.text());
    for part in ["Brought up 1 node, 2 CPUs", "check: disk ok"] {
        assert!(text.contains(part), "{part:?} is missing; the machine stopped with {reason:?}:\n{text}");
    }
    assert_eq!(reason, StopReason::PowerOff, "{text}");
    assert!(std::fs::metadata(&child).unwrap().len() > 8 << 20, "the child has what the guest wrote");

    // A machine without firmware is another one.
    config.boot = BootConfig::default();
    let error = Vm::builder(config).restore(&saved, &RestoreOptions::default()).err().unwrap();
    assert!(matches!(error, VmError::Lifecycle(_) | VmError::Incompatible(_)), "{error}");
}

/// RAM on both sides of the hole below 4 GiB, tables at the end of the lower part.
#[test]
fn firmware_learns_of_memory_and_processors_and_ends_without_a_disk() {
    let mut config = VmConfig { cpus: 3, debug_ports: true, ..seabios() };
    let node = |cpus: &[u32], size| NumaConfig { cpus: cpus.to_vec(), size, ..NumaConfig::default() };
    config.memory.size = 5 << 30;
    config.memory.numa = vec![node(&[0], 1 << 30), node(&[1, 2], 4 << 30)];
    let (text, reason) = super::run(config);
    assert_eq!(reason, StopReason::Reset, "{text}");
    for part in [
        "qemu/e820: addr 0x0000000000000000 len 0x00000000bffc0000 [RAM]",
        "qemu/e820: addr 0x0000000100000000 len 0x0000000080000000 [RAM]",
        "Found 3 cpu(s) max supported 3 cpu(s)",
        "(via xsdt)",
        "3: 0000000000100000 - 00000000bffc0000 = 1 RAM",
    ] {
        assert!(text.contains(part), "{part:?} is missing:\n{text}");
    }
    let (text, reason) = super::run(seabios());
    assert_eq!(reason, StopReason::Reset, "{text}");
    assert!(text.contains("No bootable device"), "{text}");
}

#[test]
fn what_is_no_firmware_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let build = |config: VmConfig| Vm::builder(config).build().err().unwrap();
    for path in [
        write("empty", &[]),
        write("odd", &[0xea; 1000]),
        write("long", &[0xea; 512 << 10]),
        write("no-reset-vector", &[0; 128 << 10]),
    ] {
        let error = build(with_firmware(&path));
        assert!(matches!(error, VmError::Boot(BootError::Firmware { .. })), "{error}");
        assert!(error.to_string().contains("bios-256k.bin"), "{error}");
    }
    let error = build(with_firmware(&dir.path().join("missing")));
    assert!(matches!(error, VmError::Boot(BootError::File { what: "firmware", .. })), "{error}");

    let mut with_kernel = seabios();
    with_kernel.boot.kernel = "vmlinuz".into();
    let over_mmio = VmConfig { mmio: true, ..seabios() };
    for config in [with_kernel, over_mmio] {
        let error = build(config);
        assert!(matches!(error, VmError::Config(_)), "{error}");
    }
}
