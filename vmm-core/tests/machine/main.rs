//! Whole machines with tiny guests, on every accelerator.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod debian;
mod firmware;
mod gdb;
mod guest;
mod images;
mod migration;
mod moving;
mod snapshot;
mod spans;
mod virtio;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vmm_core::accel::AccelKind;
use vmm_core::accel::kvm::KvmHypervisor;
use vmm_core::machine::{
    AccelChoice, BootConfig, CpuModelChoice, MemoryConfig, StopReason, Vm, VmBuilder, VmConfig, VmError,
    VmEvent,
};

/// The accelerators of this host. The software one is everywhere; KVM counts when its device opens.
fn accelerators() -> Vec<AccelChoice> {
    let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let mut all = vec![AccelChoice::Soft];
    if kvm {
        all.push(AccelChoice::Kvm);
    }
    all
}

fn config(kernel: &Path, accel: AccelChoice) -> VmConfig {
    VmConfig {
        accel,
        memory: MemoryConfig { size: 16 << 20, ..MemoryConfig::default() },
        boot: BootConfig { kernel: kernel.to_owned(), ..BootConfig::default() },
        debug_ports: true,
        ..VmConfig::default()
    }
}

/// Adds a disk: a new child of the raw image `base`. Returns the child's path.
fn add_child(config: &mut VmConfig, base: &Path, child: PathBuf) -> PathBuf {
    blockfmt::CreateOptions::new(blockfmt::Format::Qcow2, std::fs::metadata(base).unwrap().len())
        .backing(base.to_str().unwrap(), blockfmt::Format::Raw)
        .create(&child)
        .unwrap();
    let disk = serde_json::json!({"path": child, "format": "qcow2", "allow": [base.parent()]});
    config.disks.push(serde_json::from_value(disk).unwrap());
    child
}

/// A machine that prints into a buffer.
struct Printing(Arc<Mutex<Vec<u8>>>);

impl Printing {
    fn builder(config: &VmConfig) -> (VmBuilder, Self) {
        let text = Arc::new(Mutex::new(Vec::new()));
        let sink = text.clone();
        let output = move |data: &[u8]| sink.lock().unwrap().extend_from_slice(data);
        (Vm::builder(config.clone()).serial_output(output), Self(text))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    #[track_caller]
    fn wait_for(&self, vm: &Vm, text: &str) {
        while !self.text().contains(text) {
            assert_eq!(vm.stop_reason(), None, "{text:?} is missing:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Runs a machine to its end: what it printed and why it stopped.
fn run(config: VmConfig) -> (String, StopReason) {
    let (builder, output) = Printing::builder(&config);
    let vm = builder.build().unwrap();
    vm.start().unwrap();
    let reason = vm.wait();
    drop(vm);
    (output.text(), reason)
}

fn out8(a: &mut CodeAssembler, port: u16, value: u8) -> Result<(), IcedError> {
    a.mov(dx, u32::from(port))?;
    a.mov(al, u32::from(value))?;
    a.out(dx, al)
}

fn print(a: &mut CodeAssembler, text: &str) -> Result<(), IcedError> {
    text.bytes().try_for_each(|byte| out8(a, 0x3f8, byte))
}

fn power_off(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dx, 0x604)?;
    a.mov(ax, 0x3400)?; // SLP_EN, SLP_TYP 5
    a.out(dx, ax)?;
    let mut forever = a.create_label();
    a.set_label(&mut forever)?;
    a.hlt()?;
    a.jmp(forever)
}

/// A Multiboot kernel finds the magic number, its command line, the memory and its module, and ends the machine with a
/// code. `-kernel` of other machines takes the same file.
#[test]
fn a_multiboot_guest_finds_its_surroundings() {
    let kernel = guest::multiboot_kernel(|a| {
        let mut bad = a.create_label();
        let mut next = a.create_label();
        let mut done = a.create_label();
        a.cmp(eax, 0x2bad_b002u32 as i32)?;
        a.jne(bad)?;
        a.cmp(dword_ptr(ebx + 8), 15 << 10)?; // KiB above 1 MiB
        a.jne(bad)?;
        // The module's first byte, then the command line.
        a.mov(esi, dword_ptr(ebx + 24))?;
        a.mov(esi, dword_ptr(esi))?;
        a.mov(dx, 0x3f8)?;
        a.outsb()?;
        a.mov(esi, dword_ptr(ebx + 16))?;
        a.set_label(&mut next)?;
        a.lodsb()?;
        a.test(al, al)?;
        a.jz(done)?;
        a.out(dx, al)?;
        a.jmp(next)?;
        a.set_label(&mut done)?;
        out8(a, 0xf4, 7)?;
        a.set_label(&mut bad)?;
        out8(a, 0xf4, 1)
    });
    let mut module = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut module, b"M").unwrap();
    for accel in accelerators() {
        let mut config = config(kernel.path(), accel);
        config.boot.command_line = "a=1 b".into();
        config.boot.initrd = Some(module.path().to_owned());
        assert_eq!(run(config), ("Ma=1 b".into(), StopReason::Exit(7)), "{accel:?}");
    }
}

#[test]
fn a_guest_prints_and_powers_off() {
    let kernel = guest::kernel(|a| {
        print(a, "hello\n")?;
        power_off(a)
    });
    for accel in accelerators() {
        assert_eq!(run(config(kernel.path(), accel)), ("hello\n".into(), StopReason::PowerOff), "{accel:?}");
    }
}

#[test]
fn every_way_to_stop_has_its_reason() {
    type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let ways: [(Write, StopReason); 6] = [
        (|a| out8(a, 0x64, 0xfe), StopReason::Reset),
        (|a| out8(a, 0x60c, 1), StopReason::Reset),
        (|a| out8(a, 0xcf9, 6), StopReason::Reset),
        (|a| out8(a, 0x505, 1), StopReason::Panic),
        (|a| out8(a, 0xf4, 42), StopReason::Exit(42)),
        // Without an interrupt table this becomes a triple fault.
        (|a| a.ud2(), StopReason::TripleFault),
    ];
    for accel in accelerators() {
        for (write, reason) in &ways {
            let kernel = guest::kernel(|a| {
                write(a)?;
                a.hlt()
            });
            assert_eq!(run(config(kernel.path(), accel)).1, *reason, "{accel:?}");
        }
    }
}

/// A guest sees the features of the CPU model that was chosen, whatever the accelerator could show it.
#[test]
fn a_cpu_model_limits_what_the_guest_sees() {
    // Exits with the bits SSE3 (which both models have), SSE4.1, SSE4.2 and AVX of CPUID.
    let kernel = guest::kernel(|a| {
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.mov(ebx, ecx)?;
        a.and(ebx, 1)?;
        a.mov(eax, ecx)?;
        a.shr(eax, 18)?;
        a.and(eax, 6)?;
        a.or(eax, ebx)?;
        a.shr(ecx, 25)?;
        a.and(ecx, 8)?;
        a.or(eax, ecx)?;
        a.out(0xf4, al)?;
        a.hlt()
    });
    for accel in accelerators() {
        for (model, bits) in [(CpuModelChoice::V1, 0b0001), (CpuModelChoice::V2, 0b0111)] {
            let config = VmConfig { cpu_model: Some(model), ..config(kernel.path(), accel) };
            if accel == AccelChoice::Kvm && KvmHypervisor::is_software() {
                // It cannot hide anything.
                assert!(matches!(Vm::builder(config).build(), Err(VmError::Accel(_))));
                continue;
            }
            assert_eq!(run(config).1, StopReason::Exit(bits), "{accel:?}, {model:?}");
        }
    }
}

/// What programs of kvm-unit-tests find: the number of processors in fw_cfg, scratch registers, and an exit port that
/// takes double-words.
#[test]
fn test_guests_find_their_devices() {
    let kernel = guest::kernel(|a| {
        a.mov(dx, 0x510)?;
        a.mov(ax, 5)?;
        a.out(dx, ax)?;
        a.mov(dx, 0x511)?;
        a.in_(al, dx)?;
        a.movzx(ebx, al)?;
        // The scratch port and the scratch memory keep 16 and 32.
        a.mov(eax, 0x10)?;
        a.out(0xe0, eax)?;
        a.mov(dword_ptr(0xff00_0ff0u32), 0x20)?;
        a.in_(eax, 0xe0)?;
        a.or(ebx, eax)?;
        a.or(ebx, dword_ptr(0xff00_0ff0u32))?;
        // A page that is flushed keeps what is in it.
        a.mov(dword_ptr(0x20_0ff0u32), 0x40)?;
        a.mov(eax, 0x20_0000)?;
        a.out(0xe4, eax)?;
        a.or(ebx, dword_ptr(0x20_0ff0u32))?;
        a.mov(eax, ebx)?;
        a.out(0xf4, eax)?;
        a.hlt()
    });
    for accel in accelerators() {
        let config =
            VmConfig { cpus: 3, debug_ports: false, test_devices: true, ..config(kernel.path(), accel) };
        assert_eq!(run(config).1, StopReason::Exit(0x73), "{accel:?}");
    }
}

/// An instruction that the software CPU does not have raises #UD, and the machine's metrics count it.
#[test]
fn unimplemented_instructions_are_counted() {
    const IDT: u32 = 0x20_0000;
    let kernel = guest::kernel(|a| {
        // The handler: add dword ptr [esp], 4; iretd.
        a.mov(dword_ptr(IDT + 0x200), 0x0424_0483)?;
        a.mov(byte_ptr(IDT + 0x204), 0xcf)?;
        // A gate for #UD, in the code segment of the PVH entry.
        a.mov(dword_ptr(IDT + 8 * 6), 0x10 << 16 | 0x200)?;
        a.mov(dword_ptr(IDT + 8 * 6 + 4), IDT | 0x8e00)?;
        a.mov(dword_ptr(IDT + 0x100), 0x37)?;
        a.mov(dword_ptr(IDT + 0x102), IDT)?;
        a.lidt(dword_ptr(IDT + 0x100))?;
        for _ in 0..3 {
            a.db(&[0xc5, 0xfc, 0x58, 0xc0])?; // vaddps ymm0, ymm0, ymm0
        }
        power_off(a)
    });
    let vm = Vm::builder(config(kernel.path(), AccelChoice::Soft)).build().unwrap();
    vm.start().unwrap();
    assert_eq!(vm.wait(), StopReason::PowerOff);
    let metrics = vm.metrics();
    assert_eq!(metrics.cpu.unimplemented_instructions, 3);
    let text = metrics.prometheus("v");
    assert!(text.contains("nacre_cpu_unimplemented_instructions_total{vm=\"v\"} 3\n"), "{text}");
}

/// The start information of the PVH ABI reaches the guest: it prints the first byte of its command line.
#[test]
fn the_command_line_reaches_the_guest() {
    let kernel = guest::kernel(|a| {
        a.mov(esi, dword_ptr(ebx + 24))?;
        let mut again = a.create_label();
        let mut end = a.create_label();
        a.mov(dx, 0x3f8)?;
        a.set_label(&mut again)?;
        a.mov(al, byte_ptr(esi))?;
        a.test(al, al)?;
        a.je(end)?;
        a.out(dx, al)?;
        a.inc(esi)?;
        a.jmp(again)?;
        a.set_label(&mut end)?;
        power_off(a)
    });
    for accel in accelerators() {
        let mut config = config(kernel.path(), accel);
        config.boot.command_line = "root=/dev/vda quiet".into();
        assert_eq!(run(config).0, "root=/dev/vda quiet", "{accel:?}");
    }
}

/// A guest that never stops by itself is stopped, paused and resumed by its owner, and leaves no thread behind.
#[test]
fn the_owner_is_in_control() {
    let kernel = guest::kernel(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(dword_ptr(0x20_0000))?;
        a.jmp(again)
    });
    for accel in accelerators() {
        let vm = Vm::builder(VmConfig { cpus: 2, ..config(kernel.path(), accel) }).build().unwrap();
        let counter = || vm.memory().read_obj::<u32>(0x20_0000).unwrap();
        assert_eq!(counter(), 0);
        vm.start().unwrap();
        while counter() == 0 {
            std::thread::yield_now();
        }
        vm.pause().unwrap();
        let paused_at = counter();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(counter(), paused_at, "{accel:?}");
        assert_eq!(vm.stop_reason(), None);
        vm.start().unwrap();
        while counter() == paused_at {
            std::thread::yield_now();
        }
        vm.stop();
        assert_eq!(vm.wait(), StopReason::Stopped);
        assert!(matches!(vm.start(), Err(VmError::Stopped)));
        let events: Vec<_> = std::iter::from_fn(|| vm.events().take()).collect();
        let expected =
            [VmEvent::Started, VmEvent::Paused, VmEvent::Resumed, VmEvent::Stopped(StopReason::Stopped)];
        assert_eq!(events, expected);
        let kind = if accel == AccelChoice::Kvm { AccelKind::Kvm } else { AccelKind::Soft };
        assert_eq!(vm.accelerator(), kind);
    }
}

/// Builds, starts and drops machines; threads, descriptors and mappings return to what they were.
#[test]
fn nothing_remains_of_a_dropped_machine() {
    // In a process of its own: tests beside this one open and close things, too.
    const CHILD: &str = "NACRE_TEST_CHILD";
    if std::env::var_os(CHILD).is_none() {
        let me = std::env::current_exe().unwrap();
        let args = ["--exact", "nothing_remains_of_a_dropped_machine", "--test-threads=1"];
        let status = std::process::Command::new(me).args(args).env(CHILD, "1").status().unwrap();
        assert!(status.success());
        return;
    }
    let kernel = guest::kernel(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.jmp(again)
    });
    let count = |dir: &str| std::fs::read_dir(dir).unwrap().count();
    let guest_mappings = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.contains("guest-ram") || line.contains("kvm")).count()
    };
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    for accel in accelerators() {
        for mmio in [false, true] {
            let mut before = (0, 0, 0);
            for round in 0..4 {
                let mut config = VmConfig { cpus: 2, mmio, ..config(kernel.path(), accel) };
                config.disks.push(
                    serde_json::from_value(serde_json::json!({"path": disk.path(), "format": "raw"}))
                        .unwrap(),
                );
                let vm = Vm::builder(config).build().unwrap();
                if round % 2 == 0 {
                    vm.start().unwrap();
                }
                drop(vm);
                let now = (count("/proc/self/task"), count("/proc/self/fd"), guest_mappings());
                if round > 0 {
                    assert_eq!(now, before, "{accel:?}, mmio {mmio}");
                }
                before = now;
            }
            assert_eq!(before.2, 0, "{accel:?}, mmio {mmio}: guest RAM is still mapped");
        }
    }
}
