//! When `#DB` is raised: single steps around instructions that change TF or hold traps back, breakpoints on ports,
//! what DR6 says. The expectations are those of kvm-unit-tests (its `debug` and `syscall` programs).

use iced_x86::code_asm::*;
use softcpu::{Budget, CpuState, DebugControl, DebugEvent, Exit, Watchpoint};

use super::rig::*;

const TF: u64 = 1 << 8;
const DR6_ACTIVE_LOW: u64 = 0xffff_0ff0;
const DR6_BS: u64 = 1 << 14;
const DR6_BD: u64 = 1 << 13;
/// Where the handler of `#DB` keeps RIP and DR6 of each trap; their number is in R15.
const LOG: u64 = 0x1_0000;

/// Records each `#DB` and returns.
fn record(rig: &Rig) {
    let handler = assemble(0x1_2000, |a| {
        a.push(rax).unwrap();
        a.mov(r14, LOG).unwrap();
        a.mov(rax, qword_ptr(rsp + 8)).unwrap();
        a.mov(qword_ptr(r14 + r15 * 8), rax).unwrap();
        a.mov(rax, dr6).unwrap();
        a.mov(qword_ptr(r14 + r15 * 8 + 0x400), rax).unwrap();
        a.inc(r15).unwrap();
        // A breakpoint on an instruction does not strike again.
        a.bts(qword_ptr(rsp + 24), 16).unwrap();
        a.pop(rax).unwrap();
        a.iretq().unwrap();
    });
    rig.memory.write(0x1_2000, &handler).unwrap();
    rig.gate(1, 0x1_2000, 0x8e, 0);
}

/// Runs code to its HLT with the recorder in place: offset from `CODE`, and DR6, of each `#DB`.
fn traps(rig: &mut Rig, state: &CpuState, write: impl FnOnce(&mut CodeAssembler)) -> Vec<(u64, u64)> {
    record(rig);
    let end = rig.execute(state, write);
    assert!(rig.frame().is_none(), "{:?}", rig.frame());
    (0..end.gpr[15])
        .map(|n| (rig.get(LOG + 8 * n).wrapping_sub(CODE), rig.get(LOG + 0x400 + 8 * n)))
        .collect()
}

/// Sets TF with POPFQ: 8 bytes. TF in RAX is clear afterwards.
fn start_steps(a: &mut CodeAssembler) {
    a.pushfq().unwrap(); // 1
    a.pop(rax).unwrap(); // 1
    a.or(ah, 1).unwrap(); // 3
    a.push(rax).unwrap(); // 1
    a.popfq().unwrap(); // 1
    debug_assert_eq!(STEPS, 7);
}

/// The length of [`start_steps`].
const STEPS: u64 = 7;

/// Clears TF: `and ah, !1` (3 bytes), `push rax`, `popfq`.
fn end_steps(a: &mut CodeAssembler) {
    a.and(ah, !1i32 as u32 & 0xff).unwrap();
    a.push(rax).unwrap();
    a.popfq().unwrap();
}

fn steps(at: &[u64]) -> Vec<(u64, u64)> {
    at.iter().map(|at| (STEPS + at, DR6_ACTIVE_LOW | DR6_BS)).collect()
}

#[test]
fn popf_starts_steps_late_and_ends_them_late() {
    let mut rig = Rig::new();
    let found = traps(&mut rig, &Rig::long_mode(), |a| {
        start_steps(a);
        end_steps(a);
        a.hlt().unwrap();
    });
    // Behind AND, PUSH and the POPF that clears TF.
    assert_eq!(found, steps(&[3, 4, 5]));
}

#[test]
fn sti_does_not_hold_a_step_back_but_a_load_of_ss_does() {
    let mut rig = Rig::new();
    let found = traps(&mut rig, &Rig::long_mode(), |a| {
        start_steps(a);
        a.sti().unwrap();
        end_steps(a);
        a.hlt().unwrap();
    });
    assert_eq!(found, steps(&[1, 4, 5, 6]));
    let mut s = Rig::long_mode();
    s.gpr[1] = KERNEL_DATA.into();
    let found = traps(&mut rig, &s, |a| {
        start_steps(a);
        a.mov(ss, ecx).unwrap(); // 2
        end_steps(a);
        a.hlt().unwrap();
    });
    assert_eq!(found, steps(&[5, 6, 7]));
}

#[test]
fn a_step_wakes_from_hlt() {
    let mut rig = Rig::new();
    let found = traps(&mut rig, &Rig::long_mode(), |a| {
        start_steps(a);
        a.sti().unwrap();
        a.hlt().unwrap();
        end_steps(a);
        a.hlt().unwrap();
    });
    assert_eq!(found, steps(&[1, 2, 5, 6, 7]));
}

#[test]
fn icebp_is_a_trap_without_a_step() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    s.gpr[1] = KERNEL_DATA.into();
    let found = traps(&mut rig, &s, |a| {
        start_steps(a);
        a.mov(ss, ecx).unwrap();
        a.int1().unwrap();
        a.int1().unwrap();
        end_steps(a);
        a.hlt().unwrap();
    });
    let icebp = |at| (STEPS + at, DR6_ACTIVE_LOW);
    let mut expected = vec![icebp(3), icebp(4)];
    expected.extend(steps(&[7, 8, 9]));
    assert_eq!(found, expected);
}

/// General detect is a fault: neither TF nor a load of SS holds it back, and the instruction is executed again.
#[test]
fn general_detect_comes_first() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    s.gpr[1] = KERNEL_DATA.into();
    s.dr[7] = 0x2400;
    let found = traps(&mut rig, &s, |a| {
        a.xor(ebx, ebx).unwrap(); // 2
        start_steps(a);
        a.mov(ss, ecx).unwrap(); // 2
        a.mov(dr6, rbx).unwrap(); // 3
        end_steps(a);
        a.hlt().unwrap();
    });
    let mut expected = vec![(STEPS + 4, DR6_ACTIVE_LOW | DR6_BD)];
    expected.extend(steps(&[7, 10, 11, 12]));
    // The steps are 2 bytes later than in the other tests.
    assert_eq!(found, expected);
}

#[test]
fn repeated_string_instructions_step_by_element() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    (s.gpr[1], s.gpr[7]) = (5, WINDOW_RAM);
    let found = traps(&mut rig, &s, |a| {
        start_steps(a);
        a.rep().stosb().unwrap(); // 2
        end_steps(a);
        a.hlt().unwrap();
    });
    assert_eq!(found, steps(&[0, 0, 0, 0, 2, 5, 6, 7]));
    assert_eq!(rig.cpu.state().gpr[1], 0);
}

/// SYSCALL steps by the TF that it leaves, SYSRET by the one that it loads; both at once.
#[test]
fn syscall_and_sysret_step_by_their_new_flags() {
    let mut rig = Rig::new();
    record(&rig);
    let mut s = Rig::user_mode();
    s.msrs.star = u64::from(USER_CODE - 16) << 48 | u64::from(KERNEL_CODE) << 32;
    s.msrs.lstar = 0x2_1000;
    s.msrs.sfmask = TF;
    s.rflags |= TF;
    // The kernel halts the second time. It returns with the flags that it saved.
    let kernel = assemble(0x2_1000, |a| {
        let mut first = a.create_label();
        a.inc(rbx).unwrap();
        a.cmp(ebx, 1).unwrap();
        a.je(first).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut first).unwrap();
        a.sysretq().unwrap();
    });
    rig.memory.write(0x2_1000, &kernel).unwrap();
    rig.code(|a| {
        a.syscall().unwrap();
        a.syscall().unwrap();
    });
    rig.cpu.set_state(&s);
    let end = rig.run();
    // One step: behind SYSRET, before the next instruction.
    assert_eq!((end.gpr[15], rig.get(LOG), end.gpr[3]), (1, CODE + 2, 2));
}

/// Bits 3:0 say what this trap is about; the others stay until software clears them.
#[test]
fn dr6_tells_of_this_trap_and_keeps_the_rest() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    s.dr[2] = CODE;
    s.dr[6] = DR6_ACTIVE_LOW | DR6_BS | 2;
    s.dr[7] = 0x420;
    let nop = |a: &mut CodeAssembler| {
        a.nop().unwrap();
        a.hlt().unwrap();
    };
    assert_eq!(traps(&mut rig, &s, nop), [(0, DR6_ACTIVE_LOW | DR6_BS | 4)]);
    // A write of 4 bytes.
    s.dr[1] = WINDOW_RAM;
    s.dr[6] = DR6_ACTIVE_LOW;
    s.dr[7] = 0x00d0_040a;
    s.gpr[3] = WINDOW_RAM;
    let write = |a: &mut CodeAssembler| {
        a.mov(qword_ptr(rbx), rax).unwrap();
        a.hlt().unwrap();
    };
    assert_eq!(traps(&mut rig, &s, write), [(3, DR6_ACTIVE_LOW | 2)]);
}

/// A watched load of SS, and then an instruction that raises an exception of its own.
#[test]
fn a_trap_that_a_load_of_ss_held_back_joins_icebp() {
    let mut rig = Rig::new();
    rig.put(WINDOW_RAM, KERNEL_DATA.into());
    let mut s = Rig::long_mode();
    s.gpr[3] = WINDOW_RAM;
    s.dr[1] = WINDOW_RAM;
    s.dr[7] = 0x00f0_040a;
    let found = traps(&mut rig, &s, |a| {
        a.mov(ss, word_ptr(rbx)).unwrap(); // 2
        a.int1().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(found.len(), 1, "{found:x?}");
    assert_eq!(found[0].0, 3);
    // INT 1 is a call of the handler and no trap: it is entered twice.
    let found = traps(&mut rig, &s, |a| {
        a.mov(ss, word_ptr(rbx)).unwrap();
        a.int(1).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(found.len(), 2, "{found:x?}");
    // INT3 leads to its own handler, before whose first instruction the trap strikes.
    let handler = assemble(0x1_3000, |a| {
        a.inc(rdi).unwrap();
        a.iretq().unwrap();
    });
    rig.memory.write(0x1_3000, &handler).unwrap();
    rig.gate(3, 0x1_3000, 0x8e, 0);
    record(&rig);
    let end = rig.execute(&s, |a| {
        a.mov(ss, word_ptr(rbx)).unwrap();
        a.int3().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((end.gpr[15], end.gpr[7], rig.get(LOG)), (1, 1, 0x1_3000));
}

/// An instruction breakpoint strikes behind a load of SS too, as on AMD's processors.
#[test]
fn a_load_of_ss_does_not_hide_an_instruction_breakpoint() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    s.gpr[1] = KERNEL_DATA.into();
    s.dr[0] = CODE + 2;
    s.dr[7] = 0x402;
    let found = traps(&mut rig, &s, |a| {
        a.mov(ss, ecx).unwrap();
        a.inc(rdi).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((found, rig.cpu.state().gpr[7]), (vec![(2, DR6_ACTIVE_LOW | 1)], 1));
}

/// With CR4.DE a breakpoint can wait for a port.
#[test]
fn breakpoints_on_ports_trap_behind_the_access() {
    let mut rig = Rig::new();
    // DR3: two bytes from port 0x60 on.
    for (de, port, size, hit) in [
        (8, 0x60u16, 1, true),
        (8, 0x61, 1, true),
        (8, 0x62, 1, false),
        (8, 0x5e, 4, true),
        (8, 0x5e, 2, false),
        (0, 0x60, 1, false),
    ] {
        let mut s = Rig::long_mode();
        s.cr4 |= de;
        s.dr[3] = 0x60;
        s.dr[7] = 0x400 | 0x80 | (2 | 1 << 2) << 28;
        s.gpr[2] = port.into();
        let found = traps(&mut rig, &s, |a| {
            match size {
                1 => a.out(dx, al).unwrap(), // 1 byte
                2 => a.out(dx, ax).unwrap(),
                _ => a.in_(eax, dx).unwrap(), // 1
            }
            a.nop().unwrap();
            a.hlt().unwrap();
        });
        let behind = if size == 2 { 2 } else { 1 };
        let expected = if hit { vec![(behind, DR6_ACTIVE_LOW | 8)] } else { vec![] };
        assert_eq!(found, expected, "port {port:#x}, {size} bytes, DE {de}");
    }
}

/// A debugger's watchpoints tell reads from writes.
#[test]
fn watchpoints_tell_reads_from_writes() {
    let mut rig = Rig::new();
    rig.code(|a| {
        a.mov(rax, qword_ptr(rbx + 8)).unwrap(); // 4
        a.mov(qword_ptr(rbx + 8), rax).unwrap(); // 8
        a.inc(qword_ptr(rbx + 8)).unwrap(); // 12
        a.movups(xmm0, xmmword_ptr(rbx)).unwrap(); // 15
        a.hlt().unwrap();
    });
    let mut s = Rig::long_mode();
    s.gpr[3] = WINDOW_RAM;
    for (read, write, expected) in
        [(true, false, vec![4, 12, 15]), (false, true, vec![8, 12]), (true, true, vec![4, 8, 12, 15])]
    {
        let watchpoint = Watchpoint { address: WINDOW_RAM + 9, len: 1, read, write };
        rig.cpu.set_state(&s);
        rig.cpu.set_debug(DebugControl { watchpoints: vec![watchpoint], ..DebugControl::default() });
        let mut stops = Vec::new();
        while rig.cpu.run(Budget { wait: false, ..Budget::UNLIMITED })
            == Exit::Debug(DebugEvent::Watchpoint(WINDOW_RAM + 9))
        {
            stops.push(rig.cpu.state().rip - CODE);
        }
        assert_eq!(stops, expected, "read {read}, write {write}");
    }
}
