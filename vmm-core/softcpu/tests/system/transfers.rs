//! Corners of transfers of control: SYSRET, IRET, gates, task-state segments, single steps across privilege levels.

use iced_x86::code_asm::*;

use super::rig::*;
use softcpu::CpuState;

const NON_CANONICAL: u64 = 0x8000_0000_0000_0000;
const IDT_BIT: u64 = 2;

fn vector_and_error(rig: &Rig) -> Option<(u8, Option<u64>)> {
    rig.frame().map(|f| (f.vector, f.error))
}

/// A state in which SYSCALL and SYSRET work.
fn with_syscall(mut s: CpuState) -> CpuState {
    s.msrs.star = u64::from(USER_CODE - 16) << 48 | u64::from(KERNEL_CODE) << 32;
    s.msrs.lstar = 0x2_1000;
    s
}

#[test]
fn sysret_to_a_non_canonical_address_faults_in_user_mode() {
    let mut rig = Rig::new();
    let mut s = with_syscall(Rig::long_mode());
    s.gpr[1] = NON_CANONICAL;
    s.gpr[11] = 0x202;
    s.gpr[4] = USER_STACK;
    // As AMD processors do it: the kernel's stack pointer is not what the handler runs on.
    rig.execute(&s, |a| a.sysretq().unwrap());
    let frame = rig.frame().unwrap();
    assert_eq!((frame.vector, frame.error, frame.rip), (13, Some(0), NON_CANONICAL));
    assert_eq!((frame.cs, frame.ss), (u64::from(USER_CODE), u64::from(USER_DATA)));
    assert_eq!(rig.cpu.state().gpr[4], RSP0 - 48);
}

#[test]
fn sysret_to_compatibility_mode_cuts_the_address() {
    let mut rig = Rig::new();
    let mut s = with_syscall(Rig::long_mode());
    s.gpr[1] = 0xffff_ffff_0002_2000;
    s.gpr[11] = 0x202;
    s.gpr[4] = USER_STACK;
    rig.memory.write(0x2_2000, &[0x0f, 0x0b]).unwrap();
    rig.execute(&s, |a| a.sysret().unwrap());
    let frame = rig.frame().unwrap();
    assert_eq!((frame.vector, frame.rip, frame.cs), (6, 0x2_2000, u64::from(USER_CODE - 16)));
}

#[test]
fn syscall_with_tf_steps_into_the_kernel_unless_it_is_masked() {
    let mut rig = Rig::new();
    rig.memory.write(0x2_1000, &[0x90, 0xf4]).unwrap();
    let mut s = with_syscall(Rig::user_mode());
    s.rflags |= 0x100;
    rig.execute(&s, |a| a.syscall().unwrap());
    let frame = rig.frame().unwrap();
    assert_eq!((frame.vector, frame.rip & !1, frame.cs), (1, 0x2_1000, u64::from(KERNEL_CODE)));
    s.msrs.sfmask = 0x100;
    rig.execute(&s, |a| a.syscall().unwrap());
    assert!(rig.frame().is_none());
    assert_eq!(rig.cpu.state().rip, 0x2_1002);
}

/// Pushes a frame and returns to it: RIP, CS, RFLAGS, RSP, SS.
fn iret(rig: &mut Rig, state: &CpuState, frame: [u64; 5]) {
    rig.execute(state, |a| {
        for value in frame.into_iter().rev() {
            a.mov(rax, value).unwrap();
            a.push(rax).unwrap();
        }
        a.iretq().unwrap();
    });
}

#[test]
fn iret_refuses_what_does_not_exist() {
    let mut rig = Rig::new();
    let s = Rig::long_mode();
    let (code, data, user) = (u64::from(KERNEL_CODE), u64::from(KERNEL_DATA), u64::from(USER_CODE));
    let gp = |error| Some((13, Some(error)));
    iret(&mut rig, &s, [CODE, 0, 2, STACK, data]);
    assert_eq!(vector_and_error(&rig), gp(0), "a null code segment");
    iret(&mut rig, &s, [CODE, 0x1000, 2, STACK, data]);
    assert_eq!(vector_and_error(&rig), gp(0x1000), "beyond the GDT");
    iret(&mut rig, &s, [CODE, data, 2, STACK, data]);
    assert_eq!(vector_and_error(&rig), gp(data), "code in a data segment");
    iret(&mut rig, &s, [CODE, user, 2, STACK, 0]);
    assert_eq!(vector_and_error(&rig), gp(0), "a null stack segment for user mode");
    // A code segment that is not present.
    rig.put(GDT + 0x28, 0x00af_1b00_0000_ffff);
    iret(&mut rig, &s, [CODE, 0x28, 2, STACK, data]);
    assert_eq!(vector_and_error(&rig), Some((11, Some(0x28))));
    // A nested task: there are none in long mode.
    let mut nested = s.clone();
    nested.rflags |= 1 << 14;
    iret(&mut rig, &nested, [CODE, code, 2, STACK, data]);
    assert_eq!(vector_and_error(&rig), gp(0), "NT");
    // The kernel may return to itself with a null stack segment.
    rig.memory.write(0x2_1000, &[0xf4]).unwrap();
    iret(&mut rig, &Rig::long_mode(), [0x2_1000, code, 2, STACK - 0x40, 0]);
    let end = rig.cpu.state();
    assert_eq!((end.rip, end.gpr[4], end.segments[2].selector), (0x2_1001, STACK - 0x40, 0));
}

#[test]
fn user_mode_cannot_raise_its_privilege_by_iret() {
    let mut rig = Rig::new();
    let s = Rig::user_mode();
    let (code, data) = (u64::from(USER_CODE), u64::from(USER_DATA));
    rig.memory.write(0x2_1000, &[0x0f, 0x0b]).unwrap();
    // IF and IOPL stay as they were.
    iret(&mut rig, &s, [0x2_1000, code, 0x3202, USER_STACK - 0x100, data]);
    let frame = rig.frame().unwrap();
    assert_eq!((frame.vector, frame.rflags & 0x3200), (6, 0));
    iret(&mut rig, &s, [0x2_1000, u64::from(KERNEL_CODE), 2, STACK, u64::from(KERNEL_DATA)]);
    assert_eq!(vector_and_error(&rig), Some((13, Some(u64::from(KERNEL_CODE)))));
}

#[test]
fn gates_are_checked() {
    let mut rig = Rig::new();
    let s = Rig::long_mode();
    let named = |vector: u64| Some(vector << 3 | IDT_BIT);
    let int = |rig: &mut Rig, s: &CpuState| {
        rig.execute(s, |a| a.int(0x50).unwrap());
        vector_and_error(rig)
    };
    rig.gate(0x50, HANDLERS + 0x500, 0x0e, 0);
    assert_eq!(int(&mut rig, &s), Some((11, named(0x50))), "not present");
    for kind in [0x85, 0x8c, 0x82, 0x80] {
        rig.gate(0x50, HANDLERS + 0x500, kind, 0);
        assert_eq!(int(&mut rig, &s), Some((13, named(0x50))), "type {kind:#x} is no gate of long mode");
    }
    // A handler of lower privilege than the interrupted code, a null one, one that is no 64-bit code.
    let gate_to = |rig: &Rig, selector: u16| {
        rig.gate(0x50, HANDLERS + 0x500, 0x8e, 0);
        let low = rig.get(IDT + 0x500) & !(0xffff << 16) | u64::from(selector) << 16;
        rig.put(IDT + 0x500, low);
    };
    gate_to(&rig, USER_CODE);
    assert_eq!(int(&mut rig, &s), Some((13, Some(u64::from(USER_CODE & !3)))));
    gate_to(&rig, 0);
    assert_eq!(int(&mut rig, &s), Some((13, Some(0))));
    rig.put(GDT + 0x28, 0x00cf_9b00_0000_ffff);
    gate_to(&rig, 0x28);
    assert_eq!(int(&mut rig, &s), Some((13, Some(0x28))));
    // Beyond the limit of the IDT.
    let mut short = s.clone();
    short.idtr.limit = 0x4ff;
    assert_eq!(int(&mut rig, &short), Some((13, named(0x50))));
    // A trap gate leaves IF alone, an interrupt gate clears it; both clear TF and NT.
    for (kind, left) in [(0x8e, 0), (0x8f, 0x200)] {
        rig.gate(0x50, HANDLERS + 0x500, kind, 0);
        let mut enabled = Rig::long_mode();
        enabled.rflags |= 0x4200;
        rig.execute(&enabled, |a| a.int(0x50).unwrap());
        assert_eq!(rig.cpu.state().rflags & 0x4300, left);
    }
}

#[test]
fn a_stack_that_cannot_be_pushed_to_ends_in_a_double_fault() {
    let mut rig = Rig::new();
    rig.gate(8, HANDLERS + 0x80, 0x8e, 1);
    // RSP0 is not canonical: #SS while delivering #UD, and again while delivering #SS.
    rig.put(TSS + 4, NON_CANONICAL);
    rig.execute(&Rig::user_mode(), |a| a.ud2().unwrap());
    assert_eq!(vector_and_error(&rig), Some((8, Some(0))));
    // A stack from the interrupt stack table is 16-byte aligned.
    rig.put(TSS + 36, IST1 - 8);
    rig.put(TSS + 4, NON_CANONICAL);
    rig.execute(&Rig::user_mode(), |a| a.ud2().unwrap());
    assert_eq!(rig.cpu.state().gpr[4], IST1 - 16 - 48);
}

#[test]
fn the_task_register_takes_available_task_states_only() {
    let mut rig = Rig::new();
    let s = Rig::long_mode();
    let ltr = |rig: &mut Rig, selector: u16| {
        rig.execute(&s, |a| {
            a.mov(eax, u32::from(selector)).unwrap();
            a.ltr(ax).unwrap();
            a.hlt().unwrap();
        });
        vector_and_error(rig)
    };
    let kind =
        |rig: &Rig, access: u64| rig.put(GDT + 0x30, rig.get(GDT + 0x30) & !(0xff << 40) | access << 40);
    assert_eq!(ltr(&mut rig, TASK), None);
    assert_eq!(rig.get(GDT + 0x30) >> 40 & 0xff, 0x8b, "LTR marks the descriptor busy");
    assert_eq!(ltr(&mut rig, TASK), Some((13, Some(u64::from(TASK)))), "busy");
    kind(&rig, 0x09);
    assert_eq!(ltr(&mut rig, TASK), Some((11, Some(u64::from(TASK)))), "not present");
    assert_eq!(ltr(&mut rig, 0), Some((13, Some(0))), "null");
    assert_eq!(ltr(&mut rig, KERNEL_DATA), Some((13, Some(u64::from(KERNEL_DATA)))), "no task state");
    assert_eq!(ltr(&mut rig, TASK | 4), Some((13, Some(u64::from(TASK | 4)))), "in the empty LDT");
}

#[test]
fn ports_follow_the_permission_bitmap() {
    let mut rig = Rig::new();
    let mut s = Rig::user_mode();
    s.tr.limit = 0x67 + 0x21;
    // The bitmap lies behind the task state; port 0x80 is open, 0x81 is not.
    rig.memory.write(TSS + 0x68, &[0xff; 0x21]).unwrap();
    rig.memory.write(TSS + 0x68 + 0x10, &[0xfe]).unwrap();
    rig.execute(&s, |a| {
        a.out(0x80, al).unwrap();
        a.out(0x81, al).unwrap();
    });
    assert_eq!(rig.frame().map(|f| (f.vector, f.error, f.rip)), Some((13, Some(0), CODE + 2)));
    // Two ports at once need both bits.
    assert_eq!(rig.fault(&s, |a| a.out(0x80, ax).unwrap()).map(|f| f.0), Some(13));
    assert_eq!(rig.ports.written.lock().unwrap().as_slice(), [(0x80, 0)]);
    // IOPL 3 opens all.
    s.rflags |= 0x3000;
    rig.execute(&s, |a| {
        a.out(0x81, ax).unwrap();
        a.ud2().unwrap();
    });
    assert_eq!(rig.frame().map(|f| f.vector), Some(6));
}

#[test]
fn int1_and_general_detect_raise_db() {
    let mut rig = Rig::new();
    let s = Rig::long_mode();
    assert_eq!(rig.fault(&s, |a| a.int1().unwrap()), Some((1, None, 1)));
    let mut guarded = s.clone();
    guarded.dr[7] = 0x2400;
    assert_eq!(rig.fault(&guarded, |a| a.mov(rax, dr0).unwrap()), Some((1, None, 0)));
    let end = rig.cpu.state();
    assert_eq!((end.dr[6] & 0x2000, end.dr[7] & 0x2000), (0x2000, 0), "the handler may look");
    // With CR4.DE DR4 does not exist.
    let mut extended = Rig::long_mode();
    extended.cr4 |= 8;
    assert_eq!(rig.fault(&extended, |a| a.mov(rax, dr4).unwrap()).map(|f| f.0), Some(6));
}

#[test]
fn mov_ss_holds_a_data_breakpoint_back_too() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    s.gpr[3] = WINDOW_RAM;
    rig.put(WINDOW_RAM, u64::from(KERNEL_DATA));
    (s.dr[0], s.dr[7]) = (WINDOW_RAM, 0x3_0402 & !0xf_0000 | 0xf_0000);
    // The load of SS touches the watched bytes; the trap comes after the next instruction.
    let code = |a: &mut CodeAssembler| {
        a.mov(ss, word_ptr(rbx)).unwrap();
        a.inc(rdi).unwrap();
        a.inc(rdi).unwrap();
        a.hlt().unwrap();
    };
    rig.fault(&s, code);
    assert_eq!(rig.frame().map(|f| f.vector), Some(1));
    assert_eq!(rig.cpu.state().gpr[7], 1);
}
