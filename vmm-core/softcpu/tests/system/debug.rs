//! Single steps, breakpoints, deterministic runs.

use std::sync::Arc;

use iced_x86::code_asm::*;

use super::rig::*;
use softcpu::{Budget, Clock, CpuConfig, CpuState, DebugControl, DebugEvent, Exit, Watchpoint};

fn program(a: &mut CodeAssembler) {
    a.mov(eax, 5).unwrap(); // 0, 5 bytes
    a.add(eax, eax).unwrap(); // 5, 2 bytes
    a.inc(ecx).unwrap(); // 7, 2 bytes
    a.hlt().unwrap(); // 9
}

#[test]
fn single_steps_stop_after_each_instruction() {
    let mut rig = Rig::new();
    rig.code(program);
    rig.cpu.set_state(&Rig::long_mode());
    rig.cpu.set_debug(DebugControl { single_step: true, ..DebugControl::default() });
    for offset in [5, 7, 9, 10] {
        assert_eq!(rig.cpu.run(Budget::UNLIMITED), Exit::Debug(DebugEvent::Step));
        assert_eq!(rig.cpu.state().rip, CODE + offset);
    }
    assert_eq!(rig.cpu.state().gpr[0], 10);
}

#[test]
fn breakpoints_stop_before_their_instruction() {
    let mut rig = Rig::new();
    rig.code(program);
    rig.cpu.set_state(&Rig::long_mode());
    rig.cpu.set_debug(DebugControl { breakpoints: vec![CODE, CODE + 7], ..DebugControl::default() });
    // A run that starts at a breakpoint executes its instruction.
    assert_eq!(rig.cpu.run(Budget::UNLIMITED), Exit::Debug(DebugEvent::Breakpoint(CODE + 7)));
    assert_eq!((rig.cpu.state().rip, rig.cpu.state().gpr[1]), (CODE + 7, 0));
    assert_eq!(rig.cpu.run(Budget { wait: false, ..Budget::UNLIMITED }), Exit::Halted);
    assert_eq!(rig.cpu.state().gpr[1], 1);
}

#[test]
fn int3_goes_to_the_debugger_if_it_wants() {
    let mut rig = Rig::new();
    rig.code(|a| a.int3().unwrap());
    rig.cpu.set_state(&Rig::long_mode());
    rig.cpu.set_debug(DebugControl { trap_int3: true, ..DebugControl::default() });
    assert_eq!(rig.cpu.run(Budget::UNLIMITED), Exit::Debug(DebugEvent::Int3(CODE)));
    assert_eq!(rig.cpu.state().rip, CODE);
}

#[test]
fn the_trap_flag_raises_db_after_one_instruction() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    s.rflags |= 0x100;
    assert_eq!(rig.fault(&s, program), Some((1, None, 5)));
    let end = rig.cpu.state();
    assert_eq!((end.gpr[0], end.dr[6] & 0x4000, end.rflags & 0x100), (5, 0x4000, 0));
    // POPF that sets TF traps after the instruction that follows it.
    let popf = |a: &mut CodeAssembler| {
        a.push(0x102).unwrap();
        a.popfq().unwrap();
        a.inc(rsi).unwrap();
        a.inc(rsi).unwrap();
        a.hlt().unwrap();
    };
    rig.fault(&Rig::long_mode(), popf);
    assert_eq!((rig.frame().unwrap().vector, rig.cpu.state().gpr[6]), (1, 1));
}

#[test]
fn instruction_breakpoints_fault_once() {
    let mut rig = Rig::new();
    // The handler returns: RF in its frame lets the instruction run.
    let handler = assemble(HANDLERS + 0x10, |a| {
        a.inc(rdi).unwrap();
        a.iretq().unwrap();
    });
    rig.memory.write(HANDLERS + 0x10, &handler).unwrap();
    let mut s = Rig::long_mode();
    s.dr[0] = CODE + 7;
    s.dr[7] = 0x402;
    let end = rig.execute(&s, program);
    assert_eq!((end.gpr[7], end.gpr[1], end.dr[6] & 1), (1, 1, 1));
}

#[test]
fn data_breakpoints_trap_behind_the_access() {
    let mut rig = Rig::new();
    let code = |a: &mut CodeAssembler| {
        a.mov(rax, qword_ptr(rbx)).unwrap(); // 0, 3 bytes
        a.mov(byte_ptr(rbx + 5), al).unwrap(); // 3, 3 bytes
        a.mov(rax, qword_ptr(rbx + 8)).unwrap(); // 6
        a.hlt().unwrap();
    };
    let mut s = Rig::long_mode();
    (s.gpr[3], s.dr[1]) = (WINDOW_RAM, WINDOW_RAM + 4);
    // Four bytes at DR1: on writes, on reads and writes, not at all.
    for (kind, hit) in [(1, Some((1, None, 6))), (3, Some((1, None, 3))), (0, None)] {
        s.dr[7] = 0x400 | if kind != 0 { 0x8 } else { 0 } | (kind | 0xc) << 20;
        assert_eq!(rig.fault(&s, code), hit);
        assert_eq!(rig.cpu.state().dr[6] & 0xf, if hit.is_some() { 2 } else { 0 });
        s.dr[6] = 0;
    }
}

#[test]
fn watchpoints_stop_after_the_access() {
    let mut rig = Rig::new();
    rig.code(|a| {
        a.mov(edi, WINDOW_RAM as u32).unwrap();
        a.mov(ecx, 100).unwrap();
        a.rep().stosd().unwrap();
        a.hlt().unwrap();
    });
    rig.cpu.set_state(&Rig::long_mode());
    let watchpoint = Watchpoint { address: WINDOW_RAM + 0x21, len: 1, read: false, write: true };
    rig.cpu.set_debug(DebugControl { watchpoints: vec![watchpoint], ..DebugControl::default() });
    assert_eq!(rig.cpu.run(Budget::UNLIMITED), Exit::Debug(DebugEvent::Watchpoint(WINDOW_RAM + 0x21)));
    rig.cpu.set_debug(DebugControl::default());
    assert_eq!(rig.run().gpr[1], 0);
    assert_eq!(rig.cpu.handle().unimplemented(), 0);
}

#[test]
fn budgets_are_exact() {
    let mut rig = Rig::with_clock(Arc::new(Clock::deterministic(1_000_000)), Some(1));
    rig.code(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(rax).unwrap();
        a.inc(rax).unwrap();
        a.jmp(again).unwrap();
    });
    rig.cpu.set_state(&Rig::long_mode());
    let mut total = 0;
    for n in [1, 2, 1, 7, 100, 4097, 1] {
        assert_eq!(rig.cpu.run(Budget::instructions(n)), Exit::Budget);
        total += n;
        assert_eq!(rig.cpu.executed(), total);
        assert_eq!(rig.cpu.state().gpr[0], total / 3 * 2 + total % 3);
    }
}

/// A guest whose result depends on the time-stamp counter, random numbers and where timer interrupts strike.
pub fn timed_run(seed: u64, budget: u64, translate_after: Option<u32>) -> (CpuState, u64) {
    let clock = Arc::new(Clock::deterministic(1_000_000));
    let mut rig = Rig::exactly(CpuConfig { seed: Some(seed), translate_after, ..CpuConfig::new(clock) });
    let handler = assemble(HANDLERS + 0x400, |a| {
        // Mix the interrupted counter in, and ask for the next interrupt at a random distance.
        a.imul_3(r8, r8, 31).unwrap();
        a.add(r8, rcx).unwrap();
        a.mov(r9, rcx).unwrap();
        a.rdtsc().unwrap();
        a.shl(rdx, 32).unwrap();
        a.or(rax, rdx).unwrap();
        a.xor(r8, rax).unwrap();
        a.rdrand(rdx).unwrap();
        a.and(edx, 0xffff).unwrap();
        a.add(rax, rdx).unwrap();
        a.mov(rdx, rax).unwrap();
        a.shr(rdx, 32).unwrap();
        a.mov(ecx, 0x6e0).unwrap();
        a.wrmsr().unwrap();
        a.mov(rcx, r9).unwrap();
        a.inc(rsi).unwrap();
        a.iretq().unwrap();
    });
    rig.memory.write(HANDLERS + 0x400, &handler).unwrap();
    rig.code(|a| {
        let mut again = a.create_label();
        let mut end = a.create_label();
        a.sti().unwrap();
        a.int(0x40).unwrap();
        a.set_label(&mut again).unwrap();
        a.inc(rcx).unwrap();
        a.test(ecx, 0xfff).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
        a.cmp(esi, 200).unwrap();
        a.jb(again).unwrap();
        a.set_label(&mut end).unwrap();
        a.cli().unwrap();
        a.hlt().unwrap();
    });
    let mut s = Rig::long_mode();
    s.gpr[1] = 0;
    rig.cpu.set_state(&s);
    loop {
        match rig.cpu.run(Budget::instructions(budget)) {
            Exit::Budget => {}
            Exit::Halted if rig.cpu.state().rflags & 0x200 == 0 => break,
            exit => panic!("{exit:?}"),
        }
    }
    (rig.cpu.state(), rig.cpu.executed())
}

#[test]
fn deterministic_runs_repeat_bit_for_bit() {
    let run = |seed, budget| timed_run(seed, budget, crate::TRANSLATE_AFTER);
    let first = run(1, u64::MAX);
    assert!(first.0.gpr[6] >= 200);
    assert_eq!(first, run(1, u64::MAX));
    // Where the host interrupts the run makes no difference.
    assert_eq!(first, run(1, 777));
    assert_ne!(first.0.gpr[8], run(2, u64::MAX).0.gpr[8]);
}
