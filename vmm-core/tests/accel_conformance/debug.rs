//! Debugging.

use iced_x86::code_asm::*;
use vmm_core::accel::{BreakKind, DebugControl, DebugExit, HardwareBreakpoint, VcpuExit};

use crate::harness::*;

fn stop(machine: &mut Machine) -> DebugExit {
    match machine.run() {
        VcpuExit::Debug(stop) => stop,
        other => panic!("{other:?}"),
    }
}

pub fn single_steps(target: &Target) {
    let mut machine = Machine::flat32(target, |a| {
        a.nop().unwrap();
        a.inc(ebx).unwrap();
        a.nop().unwrap();
        done(a);
    });
    machine.cpu.set_debug(&DebugControl { single_step: true, ..Default::default() }).unwrap();
    for step in 1..=3u64 {
        let stop = stop(&mut machine);
        assert!(!stop.software);
        assert_eq!(stop.rip, CODE + step);
        let state = machine.cpu.state().unwrap();
        assert_eq!((state.rip, state.gpr[3]), (CODE + step, u64::from(step >= 2)));
    }
    machine.cpu.set_debug(&DebugControl::default()).unwrap();
    machine.run_to_end();
}

pub fn software_breakpoints(target: &Target) {
    let mut machine = Machine::flat32(target, |a| {
        a.inc(ebx).unwrap();
        a.int3().unwrap();
        a.inc(ebx).unwrap();
        done(a);
    });
    machine.cpu.set_debug(&DebugControl { software_breakpoints: true, ..Default::default() }).unwrap();
    match machine.run() {
        VcpuExit::Debug(stop) => {
            assert!(stop.software);
            assert_eq!(stop.rip, CODE + 1, "the stop is before the breakpoint's instruction");
            let mut state = machine.cpu.state().unwrap();
            assert_eq!((state.rip, state.gpr[3]), (CODE + 1, 1));
            state.rip += 1;
            machine.cpu.set_state(&state).unwrap();
            machine.run_to_end();
            assert_eq!(machine.cpu.state().unwrap().gpr[3], 2);
        }
        VcpuExit::Fault(fault) if target.holes.kernel_breakpoints => {
            assert_eq!(fault.instruction.as_deref(), Some("int3"));
            assert_eq!(fault.rip, CODE + 1);
        }
        other => panic!("{other:?}"),
    }
}

pub fn hardware_breakpoints(target: &Target) {
    let mut machine = Machine::flat32(target, |a| {
        a.nop().unwrap();
        a.inc(ebx).unwrap();
        a.mov(dword_ptr(0x5004), ebx).unwrap();
        a.inc(ebx).unwrap();
        done(a);
    });
    let breakpoint = |address, len, kind| HardwareBreakpoint { address, len, kind };
    let hardware = vec![breakpoint(CODE + 1, 1, BreakKind::Execute), breakpoint(0x5004, 4, BreakKind::Write)];
    machine.cpu.set_debug(&DebugControl { hardware, ..Default::default() }).unwrap();
    let first = stop(&mut machine);
    assert_eq!((first.rip, first.dr6 & 3, first.software), (CODE + 1, 1, false));
    if target.holes.kernel_watchpoints {
        machine.run_to_end();
    } else {
        let second = stop(&mut machine);
        assert_eq!(second.dr6 & 3, 2);
        let written = machine.memory.read_obj::<u32>(0x5004).unwrap();
        assert_eq!(written, 1, "a watchpoint stops after the write");
        machine.cpu.set_debug(&DebugControl::default()).unwrap();
        machine.run_to_end();
    }
    assert_eq!(machine.cpu.state().unwrap().gpr[3], 2);
}

pub fn debugging_can_be_switched_off(target: &Target) {
    let mut machine = Machine::flat32(target, done);
    let five = vec![HardwareBreakpoint { address: CODE, len: 1, kind: BreakKind::Execute }; 5];
    assert!(machine.cpu.set_debug(&DebugControl { hardware: five, ..Default::default() }).is_err());
    machine.cpu.set_debug(&DebugControl { single_step: true, ..Default::default() }).unwrap();
    machine.cpu.set_debug(&DebugControl::default()).unwrap();
    machine.run_to_end();
}
