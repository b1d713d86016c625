//! Exceptions, interrupts, and ways back.

use iced_x86::code_asm::*;

use super::rig::*;
use softcpu::{Budget, Exit};

const NON_CANONICAL: u64 = 0x8000_0000_0000_0000;

#[test]
fn faults_point_to_the_instruction_and_traps_behind_it() {
    let mut rig = Rig::new();
    let s = Rig::long_mode();
    assert_eq!(rig.fault(&s, |a| a.ud2().unwrap()), Some((6, None, 0)));
    assert_eq!(rig.fault(&s, |a| a.int3().unwrap()), Some((3, None, 1)));
    assert_eq!(rig.fault(&s, |a| a.int(0x55).unwrap()), Some((0x55, None, 2)));
    assert_eq!(rig.fault(&s, |a| a.div(rcx).unwrap()), Some((0, None, 0)));
    let mut s = s;
    s.gpr[3] = NON_CANONICAL;
    assert_eq!(rig.fault(&s, |a| a.mov(rax, qword_ptr(rbx)).unwrap()), Some((13, Some(0), 0)));
    s.gpr[5] = NON_CANONICAL;
    assert_eq!(rig.fault(&s, |a| a.mov(rax, qword_ptr(rbp)).unwrap()), Some((12, Some(0), 0)));
    assert_eq!(rig.fault(&s, |a| a.jmp(rbx).unwrap()), Some((13, Some(0), 0)));
    assert_eq!(rig.fault(&s, |a| a.rdmsr().unwrap()), Some((13, Some(0), 0)));
    // The middle of a block counts as well.
    let middle = |a: &mut CodeAssembler| {
        a.nop().unwrap();
        a.inc(rax).unwrap();
        a.ud2().unwrap();
    };
    assert_eq!(rig.fault(&s, middle), Some((6, None, 4)));
}

#[test]
fn faults_set_rf_in_the_frame_and_clear_if() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    s.rflags |= 0x200;
    rig.execute(&s, |a| a.ud2().unwrap());
    assert_eq!(rig.frame().unwrap().rflags & 0x1_0200, 0x1_0200);
    assert_eq!(rig.cpu.state().rflags & 0x1_0200, 0);
}

#[test]
fn privileged_instructions_need_privilege() {
    let mut rig = Rig::new();
    let s = Rig::user_mode();
    let privileged: [fn(&mut CodeAssembler); 7] = [
        |a| a.hlt().unwrap(),
        |a| a.cli().unwrap(),
        |a| a.mov(rax, cr0).unwrap(),
        |a| a.wbinvd().unwrap(),
        |a| a.swapgs().unwrap(),
        |a| a.in_(al, dx).unwrap(),
        |a| a.lidt(byte_ptr(rsp)).unwrap(),
    ];
    for write in privileged {
        assert_eq!(rig.fault(&s, write), Some((13, Some(0), 0)));
    }
    // INT 0x80 through a gate of DPL 0: the error code names the gate.
    assert_eq!(rig.fault(&s, |a| a.int(0x80).unwrap()), Some((13, Some(0x80 << 3 | 2), 0)));
}

#[test]
fn an_exception_in_user_mode_switches_to_rsp0() {
    let mut rig = Rig::new();
    let mut s = Rig::user_mode();
    s.gpr[4] = USER_STACK - 8;
    rig.execute(&s, |a| a.ud2().unwrap());
    let frame = rig.frame().unwrap();
    assert_eq!((frame.cs, frame.ss), (u64::from(USER_CODE), u64::from(USER_DATA)));
    assert_eq!(frame.rsp, USER_STACK - 8);
    let state = rig.cpu.state();
    assert_eq!(state.gpr[4], RSP0 - 40);
    assert_eq!((state.segments[1].selector, state.segments[2].selector), (KERNEL_CODE, 0));
}

#[test]
fn the_interrupt_stack_table_is_used() {
    let mut rig = Rig::new();
    rig.gate(6, HANDLERS + 0x60, 0x8e, 1);
    rig.execute(&Rig::long_mode(), |a| a.ud2().unwrap());
    assert_eq!(rig.cpu.state().gpr[4], IST1 - 40);
}

#[test]
fn faults_while_delivering_become_double_and_triple_faults() {
    // The page-fault gate is not present: #PF, then #NP while delivering it, makes #DF.
    let mut rig = Rig::new();
    rig.gate(14, HANDLERS + 0xe0, 0x0e, 0);
    let mut s = Rig::long_mode();
    s.gpr[3] = WINDOW;
    rig.window(0, 0);
    assert_eq!(rig.fault(&s, |a| a.mov(rax, qword_ptr(rbx)).unwrap()), Some((8, Some(0), 0)));
    assert_eq!(rig.cpu.state().cr2, WINDOW);
    // #UD is not contributory: its missing gate gives #NP only.
    rig.gate(6, HANDLERS + 0x60, 0x0e, 0);
    assert_eq!(rig.fault(&s, |a| a.ud2().unwrap()), Some((11, Some(6 << 3 | 3), 0)));
    // Without a double-fault handler the processor shuts down, and stays down.
    rig.gate(8, HANDLERS + 0x80, 0x0e, 0);
    rig.code(|a| a.mov(rax, qword_ptr(rbx)).unwrap());
    rig.cpu.set_state(&s);
    assert_eq!(rig.cpu.run(Budget::UNLIMITED), Exit::TripleFault);
    assert_eq!(rig.cpu.run(Budget::UNLIMITED), Exit::TripleFault);
}

#[test]
fn iret_returns_to_user_mode_and_checks_what_it_pops() {
    let mut rig = Rig::new();
    let frame = |a: &mut CodeAssembler, code: u64, target: u64, stack: u64| {
        a.push(stack as i32).unwrap();
        a.push(USER_STACK as i32).unwrap();
        a.push(0x202).unwrap();
        a.push(code as i32).unwrap();
        a.mov(rax, target).unwrap();
        a.push(rax).unwrap();
        a.iretq().unwrap();
    };
    let (code, data) = (u64::from(USER_CODE), u64::from(USER_DATA));
    rig.memory.write(0x2_1000, &[0x0f, 0x0b]).unwrap();
    rig.execute(&Rig::long_mode(), |a| frame(a, code, 0x2_1000, data));
    let user = rig.frame().unwrap();
    assert_eq!((user.vector, user.rip, user.cs, user.rsp), (6, 0x2_1000, code, USER_STACK));
    assert_eq!(user.rflags & 0x200, 0x200);
    // A code segment of another privilege, a stack segment that does not match, a wild address.
    rig.execute(&Rig::long_mode(), |a| frame(a, code & !3, 0x2_1000, data));
    assert_eq!(rig.frame().map(|f| (f.vector, f.error)), Some((13, Some(code & !3))));
    rig.execute(&Rig::long_mode(), |a| frame(a, code, 0x2_1000, u64::from(KERNEL_DATA)));
    assert_eq!(rig.frame().map(|f| (f.vector, f.error)), Some((13, Some(u64::from(KERNEL_DATA)))));
    rig.execute(&Rig::long_mode(), |a| frame(a, code, NON_CANONICAL, data));
    assert_eq!(rig.frame().map(|f| (f.vector, f.error)), Some((13, Some(0))));
}

#[test]
fn syscall_and_sysret_go_there_and_back() {
    let mut rig = Rig::new();
    let mut s = Rig::user_mode();
    s.msrs.star = u64::from(USER_CODE - 16) << 48 | u64::from(KERNEL_CODE) << 32;
    s.msrs.lstar = 0x2_1000;
    s.msrs.sfmask = 0x200;
    s.rflags |= 0x201;
    let kernel = assemble(0x2_1000, |a| {
        a.pushfq().unwrap();
        a.pop(rbx).unwrap();
        a.mov(edx, cs).unwrap();
        a.sysretq().unwrap();
    });
    rig.memory.write(0x2_1000, &kernel).unwrap();
    rig.execute(&s, |a| {
        a.syscall().unwrap();
        a.mov(esi, cs).unwrap();
        a.ud2().unwrap();
    });
    let end = rig.cpu.state();
    assert_eq!(end.gpr[1], CODE + 2, "RCX is the return address");
    assert_eq!(end.gpr[11] & 0xfff, 0x203);
    assert_eq!(end.gpr[3] & 0xfff, 0x003, "SFMASK cleared IF");
    assert_eq!((end.gpr[2], end.gpr[6]), (u64::from(KERNEL_CODE), u64::from(USER_CODE)));
    let frame = rig.frame().unwrap();
    assert_eq!((frame.vector, frame.rflags & 0x201), (6, 0x201));
    // Without EFER.SCE there is no such instruction.
    s.msrs.efer &= !1;
    assert_eq!(rig.fault(&s, |a| a.syscall().unwrap()), Some((6, None, 0)));
}

#[test]
fn sti_and_mov_ss_hold_interrupts_back_for_one_instruction() {
    let mut rig = Rig::new();
    let s = Rig::long_mode();
    rig.queue.vectors.lock().unwrap().push_back(0x30);
    rig.cpu.handle().interrupt();
    rig.execute(&s, |a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(rig.frame().map(|f| (f.vector, f.rip)), Some((0x30, CODE + 2)));
    let mut s = s;
    s.rflags |= 0x200;
    s.interrupt_shadow = true;
    rig.queue.vectors.lock().unwrap().push_back(0x31);
    rig.cpu.handle().interrupt();
    rig.execute(&s, |a| {
        a.mov(eax, ss).unwrap();
        a.mov(ss, eax).unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    let frame = rig.frame().unwrap();
    assert_eq!(frame.vector, 0x31);
    assert_eq!(frame.rip, CODE + 2, "after the shadow in the state, before MOV SS");
}

#[test]
fn nmis_wait_for_iret() {
    let mut rig = Rig::new();
    let handler = assemble(HANDLERS + 0x20, |a| {
        a.inc(rdi).unwrap();
        a.hlt().unwrap();
        a.iretq().unwrap();
    });
    rig.memory.write(HANDLERS + 0x20, &handler).unwrap();
    rig.cpu.handle().nmi();
    let first = rig.execute(&Rig::long_mode(), |a| {
        a.hlt().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((first.gpr[7], first.nmi_blocked), (1, true));
    // A second one stays pending while the first is being handled.
    rig.cpu.handle().nmi();
    assert_eq!(rig.cpu.run(Budget::instructions(100)), Exit::Halted);
    assert_eq!(rig.cpu.state().gpr[7], 1);
    assert!(rig.cpu.state().nmi_pending);
    // Let the first handler go on to its IRET.
    let mut s = rig.cpu.state();
    s.mp_state = softcpu::MpState::Running;
    rig.cpu.set_state(&s);
    let second = rig.run();
    assert_eq!((second.gpr[7], second.nmi_pending), (2, false));
}

#[test]
fn alignment_is_checked_when_asked_for() {
    let mut rig = Rig::new();
    let mut s = Rig::user_mode();
    s.gpr[3] = USER_STACK - 31;
    s.rflags |= 1 << 18;
    let load = |a: &mut CodeAssembler| {
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.ud2().unwrap();
    };
    assert_eq!(rig.fault(&s, load).map(|f| f.0), Some(6), "CR0.AM is clear");
    s.cr0 |= 1 << 18;
    assert_eq!(rig.fault(&s, load), Some((17, Some(0), 0)));
    s.gpr[3] += 7;
    assert_eq!(rig.fault(&s, load).map(|f| f.0), Some(6));
}

#[test]
fn an_unknown_instruction_is_counted() {
    let mut rig = Rig::new();
    // VADDPS ymm0, ymm0, ymm0: AVX is not announced.
    rig.memory.write(CODE, &[0xc5, 0xfc, 0x58, 0xc0]).unwrap();
    rig.cpu.set_state(&Rig::long_mode());
    rig.run();
    assert_eq!(rig.frame().map(|f| (f.vector, f.rip)), Some((6, CODE)));
    assert_eq!(rig.cpu.handle().unimplemented(), 1);
}

/// How delivering an exception can fail.
#[derive(Debug, Clone, Copy)]
enum Obstacle {
    /// The gate is not present: `#NP`.
    Absent,
    /// The gate is no gate: `#GP`.
    NoGate,
    /// The stack is not mapped: `#PF`.
    Unmapped,
    /// The stack's address is not canonical: `#SS`.
    WildStack,
}

/// A second exception while the first is delivered: both in turn, or a double fault (APM volume 2, table 8-4).
#[test]
fn two_exceptions_make_a_double_fault_or_follow_each_other() {
    // Vector, whether it is contributory, whether it is a page fault.
    type Cause = (u8, fn(&mut CodeAssembler));
    let causes: [Cause; 5] = [
        (0, |a| a.div(rcx).unwrap()),
        (6, |a| a.ud2().unwrap()),
        (12, |a| a.mov(rax, qword_ptr(rbp)).unwrap()),
        (13, |a| a.mov(rax, qword_ptr(rdx)).unwrap()),
        (14, |a| a.mov(rax, qword_ptr(rbx)).unwrap()),
    ];
    let contributory = |vector: u8| matches!(vector, 0 | 10..=13);
    let mut rig = Rig::new();
    rig.window(0, 0);
    let mut s = Rig::long_mode();
    (s.gpr[2], s.gpr[3], s.gpr[5]) = (NON_CANONICAL, WINDOW, NON_CANONICAL);
    for (first, cause) in causes {
        for obstacle in [Obstacle::Absent, Obstacle::NoGate, Obstacle::Unmapped, Obstacle::WildStack] {
            let vector = u64::from(first);
            let (kind, ist) = match obstacle {
                Obstacle::Absent => (0x0e, 0),
                Obstacle::NoGate => (0x8c, 0),
                Obstacle::Unmapped | Obstacle::WildStack => (0x8e, 2),
            };
            rig.put(
                TSS + 44,
                if matches!(obstacle, Obstacle::Unmapped) { WINDOW + 0x1000 } else { NON_CANONICAL },
            );
            rig.gate(vector, HANDLERS + 16 * vector, kind, ist);
            // The second exception and its error code: EXT is set, as an exception is being delivered.
            let (second, error) = match obstacle {
                Obstacle::Absent => (11, vector << 3 | 3),
                Obstacle::NoGate => (13, vector << 3 | 3),
                Obstacle::Unmapped => (14, 2),
                Obstacle::WildStack => (12, 1),
            };
            let double = contributory(first) && contributory(second)
                || first == 14 && (contributory(second) || second == 14);
            let same_gate = first == second;
            let found = rig.fault(&s, cause).map(|f| (f.0, f.1));
            let what = format!("{first}, {obstacle:?}");
            if double {
                assert_eq!(found, Some((8, Some(0))), "{what}");
            } else if !same_gate {
                assert_eq!(found, Some((second, Some(error))), "{what}");
            }
            rig.gate(vector, HANDLERS + 16 * vector, 0x8e, 0);
        }
    }
}

/// Two NMIs that arrive together are two, as they are when one arrives while the other is being handled; more are not.
#[test]
fn nmis_that_arrive_together_are_two() {
    let mut rig = Rig::new();
    let handler = assemble(HANDLERS + 0x20, |a| {
        a.inc(rdi).unwrap();
        a.iretq().unwrap();
    });
    rig.memory.write(HANDLERS + 0x20, &handler).unwrap();
    for _ in 0..3 {
        rig.cpu.handle().nmi();
    }
    let end = rig.execute(&Rig::long_mode(), |a| {
        for _ in 0..5 {
            a.nop().unwrap();
        }
        a.hlt().unwrap();
    });
    assert_eq!((end.gpr[7], end.nmi_pending, end.nmi_blocked), (2, false, false));
}

/// An NMI ends HLT whatever IF says; an interrupt only if IF is set.
#[test]
fn an_nmi_ends_hlt_without_if() {
    let mut rig = Rig::new();
    let handler = assemble(HANDLERS + 0x20, |a| {
        a.inc(rdi).unwrap();
        a.iretq().unwrap();
    });
    rig.memory.write(HANDLERS + 0x20, &handler).unwrap();
    rig.execute(&Rig::long_mode(), |a| {
        a.hlt().unwrap();
        a.inc(rsi).unwrap();
        a.hlt().unwrap();
    });
    rig.queue.vectors.lock().unwrap().push_back(0x30);
    rig.cpu.handle().interrupt();
    assert_eq!(rig.cpu.run(Budget::instructions(100)), Exit::Halted);
    assert_eq!(rig.cpu.state().gpr[6], 0, "the interrupt waits");
    rig.cpu.handle().nmi();
    let end = rig.run();
    assert_eq!((end.gpr[7], end.gpr[6]), (1, 1));
}
