//! The debugger's server, driven by gdb itself.

use std::process::Command;

use iced_x86::code_asm::*;
use vmm_core::machine::{AccelChoice, GdbConfig, StopReason, Vm, VmConfig};

use super::{accelerators, config, guest, power_off};

/// gdb stops at a breakpoint, steps, reads and writes registers and memory, and lets the guest end.
#[test]
fn gdb_stops_steps_and_changes_a_guest() {
    let kernel = guest::kernel(|a| {
        a.mov(eax, 1)?; // 5 bytes
        a.nop()?;
        a.add(eax, 2)?; // 5 bytes, at +6
        a.mov(dword_ptr(0x20_0000), eax)?;
        power_off(a)
    });
    // Hardware breakpoints and no watchpoint with KVM: one that is itself software stops at INT3 in kernel code, and
    // does not see DR7's data breakpoints there.
    for accel in accelerators() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("gdb");
        let mut config: VmConfig = config(kernel.path(), accel);
        config.cpus = 2;
        config.gdb = Some(GdbConfig::Unix(socket.clone()));
        let vm = Vm::builder(config).build().unwrap();
        vm.start().unwrap();
        assert_eq!(vm.memory().read_obj::<u32>(0x20_0000).unwrap(), 0, "it waits for the debugger");
        let base = guest::BASE;
        let mut script = vec![
            "set confirm off".into(),
            "set architecture i386:x86-64".into(),
            format!("target remote {}", socket.display()),
            "info threads".into(),
            format!("{} *{:#x}", if accel == AccelChoice::Kvm { "hbreak" } else { "break" }, base + 6),
            "continue".into(),
            "printf \"at %lx eax %ld\\n\", $rip, $rax".into(),
            "set $rax = 40".into(),
            "stepi".into(),
            "printf \"at %lx eax %ld\\n\", $rip, $rax".into(),
            format!("printf \"byte %x\\n\", *(unsigned char *){base:#x}"),
            "set {int}0x200004 = 77".into(),
            "continue".into(),
        ];
        let watch = accel == AccelChoice::Soft;
        if watch {
            let at = script.len() - 1;
            let lines = ["watch *(int *)0x200000", "continue", "printf \"watched %d\\n\", *(int *)0x200000"];
            script.splice(at..at, lines.map(String::from));
        }
        let mut gdb = Command::new("gdb");
        gdb.args(["-nx", "-batch"]);
        for line in &script {
            gdb.args(["-ex", line]);
        }
        let output = gdb.output().expect("gdb is missing: install the Debian package gdb");
        let text =
            String::from_utf8_lossy(&output.stdout).to_string() + &String::from_utf8_lossy(&output.stderr);
        let expected = [
            format!("at {:x} eax 1", base + 6),
            format!("at {:x} eax 42", base + 11),
            "byte b8".into(),
            if watch { "watched 42".into() } else { String::new() },
            "exited normally".into(),
        ];
        for part in &expected {
            assert!(text.contains(part), "{accel:?}: {part} is missing in:\n{text}");
        }
        assert_eq!(vm.wait(), StopReason::PowerOff, "{accel:?}");
        assert_eq!(vm.memory().read_obj::<[u32; 2]>(0x20_0000).unwrap(), [42, 77], "{accel:?}");
    }
}

/// A machine that waits for a debugger who never comes can be dropped.
#[test]
fn a_machine_that_waits_for_its_debugger_can_be_dropped() {
    let kernel = guest::kernel(power_off);
    for accel in accelerators() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("gdb");
        let mut config = config(kernel.path(), accel);
        config.gdb = Some(GdbConfig::Unix(socket.clone()));
        let vm = Vm::builder(config).build().unwrap();
        vm.start().unwrap();
        drop(vm);
        assert!(!socket.exists());
    }
}
