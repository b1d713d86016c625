//! 32-bit protected mode: privilege levels with stacks from a task-state segment, segment limits, gates, SYSENTER.

use iced_x86::code_asm::*;

use super::rig::*;
use softcpu::{CpuState, DescriptorTable, Segment, SegmentAttributes};

/// Descriptors behind those of [`Rig`]: 32-bit code and data for both privilege levels.
pub const CODE32: u16 = 0x40;
pub const USER_CODE32: u16 = 0x5b;
/// A data segment of 256 bytes, one that is not present, one that expands down from 256 bytes, a call gate.
const SMALL: u16 = 0x60;
const ABSENT: u16 = 0x68;
const DOWN: u16 = 0x70;
const GATE: u16 = 0x78;
const GDT_LIMIT: u16 = 0x9f;
/// Interrupt gates of eight bytes.
const IDT32: u64 = 0x1_4000;
/// The task-state segment's stack for the kernel.
const ESP0: u64 = 0x1_f000;

/// The frame that an exception pushed.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame32 {
    pub vector: u8,
    pub error: Option<u32>,
    pub eip: u32,
    pub cs: u32,
    pub eflags: u32,
}

/// A processor in protected mode without paging.
pub struct Protected(Rig);

impl std::ops::Deref for Protected {
    type Target = Rig;
    fn deref(&self) -> &Rig {
        &self.0
    }
}

impl std::ops::DerefMut for Protected {
    fn deref_mut(&mut self) -> &mut Rig {
        &mut self.0
    }
}

/// An access through EBX, then INT 0x80.
pub fn access(write: bool, execute: bool) -> impl Fn(&mut CodeAssembler) {
    move |a| {
        if execute {
            a.jmp(ebx).unwrap();
        } else if write {
            a.mov(dword_ptr(ebx), eax).unwrap();
        } else {
            a.mov(eax, dword_ptr(ebx)).unwrap();
        }
        a.int(0x80).unwrap();
    }
}

impl Protected {
    pub fn new() -> Self {
        let rig = Rig::new();
        for (selector, descriptor) in [
            (CODE32, 0x00cf_9b00_0000_ffff),
            (USER_CODE32 & !3, 0x00cf_fb00_0000_ffff),
            (SMALL, 0x0040_9300_0000_00ff | (WINDOW_RAM & 0xff_ffff) << 16),
            (ABSENT, 0x00cf_1300_0000_ffff),
            (DOWN, 0x0040_9700_0000_00ff | (WINDOW_RAM & 0xff_ffff) << 16),
        ] {
            rig.put(GDT + u64::from(selector), descriptor);
        }
        rig.put(TSS + 4, ESP0 | u64::from(KERNEL_DATA) << 32);
        for n in 0..256u64 {
            let target = HANDLERS + 16 * n;
            let kind = if n == 0x80 { 0xee } else { 0x8e };
            let gate = target & 0xffff | u64::from(CODE32) << 16 | kind << 40 | (target >> 16) << 48;
            rig.put(IDT32 + 8 * n, gate);
        }
        Self(rig)
    }

    pub fn state(&self, user: bool) -> CpuState {
        let mut s = CpuState::reset();
        let (code, data, dpl) = if user { (USER_CODE32, USER_DATA, 0x60) } else { (CODE32, KERNEL_DATA, 0) };
        s.segments = [flat(data, 0xc093 | dpl); 6];
        s.segments[1] = flat(code, 0xc09b | dpl);
        s.gdtr = DescriptorTable { base: GDT, limit: GDT_LIMIT };
        s.idtr = DescriptorTable { base: IDT32, limit: 0x7ff };
        s.tr = Segment { selector: TASK, attributes: SegmentAttributes(0x8b), limit: 0x67, base: TSS };
        s.cr0 = 0x31;
        s.gpr = [0; 16];
        s.gpr[4] = if user { USER_STACK } else { STACK };
        s.rip = CODE;
        s
    }

    /// Places 32-bit code.
    pub fn code(&self, write: impl FnOnce(&mut CodeAssembler)) {
        let mut a = CodeAssembler::new(32).unwrap();
        write(&mut a);
        self.memory.write(CODE, &a.assemble(CODE).unwrap()).unwrap();
    }

    /// Runs the code until a handler halts.
    pub fn run(&mut self, state: &CpuState) -> Frame32 {
        self.cpu.set_state(state);
        let end = self.0.run();
        let vector = u8::try_from((end.rip - 1).wrapping_sub(HANDLERS) / 16).expect("no handler was reached");
        let has_error = matches!(vector, 8 | 10..=14 | 17);
        let word = |n: u64| self.get(end.segments[2].base + end.gpr[4] + 4 * n) as u32;
        let at = u64::from(has_error);
        Frame32 {
            vector,
            error: has_error.then(|| word(0)),
            eip: word(at),
            cs: word(at + 1),
            eflags: word(at + 2),
        }
    }

    fn fault(&mut self, state: &CpuState, write: impl FnOnce(&mut CodeAssembler)) -> (u8, Option<u32>, u32) {
        self.code(write);
        let frame = self.run(state);
        (frame.vector, frame.error, frame.eip.wrapping_sub(CODE as u32))
    }
}

#[test]
fn an_exception_switches_to_the_stack_of_the_task_state() {
    let mut rig = Protected::new();
    let s = rig.state(true);
    assert_eq!(rig.fault(&s, |a| a.ud2().unwrap()), (6, None, 0));
    let end = rig.cpu.state();
    // EIP, CS, EFLAGS, ESP and SS are on the stack.
    assert_eq!((end.gpr[4], end.segments[2].selector), (ESP0 - 20, KERNEL_DATA));
    assert_eq!(rig.get(ESP0 - 8), USER_STACK | u64::from(USER_DATA) << 32);
    // A null stack segment there: #TS while delivering, then #TS again makes a double fault, then shutdown.
    rig.put(TSS + 4, ESP0);
    rig.code(|a| a.ud2().unwrap());
    rig.cpu.set_state(&s);
    assert_eq!(rig.cpu.run(softcpu::Budget::instructions(10)), softcpu::Exit::TripleFault);
}

#[test]
fn software_exceptions_of_32_bit_code() {
    let mut rig = Protected::new();
    let mut s = rig.state(false);
    s.rflags |= 0x800;
    assert_eq!(rig.fault(&s, |a| a.into().unwrap()), (4, None, 1), "a trap");
    s.rflags &= !0x800;
    let none = |a: &mut CodeAssembler| {
        a.into().unwrap();
        a.int(0x80).unwrap();
    };
    assert_eq!(rig.fault(&s, none).0, 0x80, "OF is clear");
    rig.put(WINDOW_RAM, 5 | 9 << 32);
    (s.gpr[0], s.gpr[3]) = (10, WINDOW_RAM);
    assert_eq!(rig.fault(&s, |a| a.bound(eax, qword_ptr(ebx)).unwrap()), (5, None, 0), "a fault");
    // Gates of DPL 0 are not for programs.
    s = rig.state(true);
    assert_eq!(rig.fault(&s, |a| a.int(0x50).unwrap()), (13, Some(0x50 << 3 | 2), 0));
    assert_eq!(rig.fault(&s, |a| a.int(0x80).unwrap()).0, 0x80);
}

#[test]
fn segment_limits_are_checked() {
    let mut rig = Protected::new();
    let s = rig.state(false);
    let at = |selector: u16, offset: u32, stack: bool| {
        move |a: &mut CodeAssembler| {
            a.mov(eax, u32::from(selector)).unwrap();
            a.mov(ebx, offset).unwrap();
            if stack {
                a.mov(ss, eax).unwrap();
                a.mov(eax, dword_ptr(ebx).ss()).unwrap();
            } else {
                a.mov(ds, eax).unwrap();
                a.mov(eax, dword_ptr(ebx)).unwrap();
            }
            a.mov(ecx, u32::from(KERNEL_DATA)).unwrap();
            a.mov(ss, ecx).unwrap();
            a.int(0x80).unwrap();
        }
    };
    // Four bytes at the end of the segment, and one too far. An expand-down segment begins where the other ends.
    for (selector, offset, allowed) in [
        (SMALL, 0, true),
        (SMALL, 0xfc, true),
        (SMALL, 0xfd, false),
        (SMALL, 0x1000, false),
        (DOWN, 0x100, true),
        (DOWN, 0xff, false),
        (DOWN, 0, false),
    ] {
        let found = rig.fault(&s, at(selector, offset, false));
        assert_eq!(found.0, if allowed { 0x80 } else { 13 }, "{selector:#x}:{offset:#x}");
    }
    // Beyond the stack segment: #SS. Its handler needs a stack, so the segment stays usable at its start.
    let mut s = s;
    s.gpr[4] = 0xf0;
    assert_eq!(rig.fault(&s, at(SMALL, 0x100, true)), (12, Some(0), 12));
}

#[test]
fn segment_registers_take_what_fits() {
    let mut rig = Protected::new();
    let load = |register: AsmRegisterSegment, selector: u16| {
        move |a: &mut CodeAssembler| {
            a.mov(eax, u32::from(selector)).unwrap();
            a.mov(register, eax).unwrap();
            a.int(0x80).unwrap();
        }
    };
    let (kernel, user) = (rig.state(false), rig.state(true));
    let error = |selector: u16| Some(u32::from(selector));
    for (state, register, selector, expected) in [
        (&kernel, ds, 0, (0x80, None)),
        (&kernel, ds, CODE32, (0x80, None)),
        (&kernel, ds, ABSENT, (11, error(ABSENT))),
        (&kernel, ds, TASK, (13, error(TASK))),
        (&kernel, ds, 0x1000, (13, error(0x1000))),
        (&kernel, ds, KERNEL_DATA | 4, (13, error(KERNEL_DATA | 4))),
        (&user, ds, KERNEL_DATA, (13, error(KERNEL_DATA))),
        (&user, es, USER_DATA, (0x80, None)),
        (&kernel, ss, 0, (13, Some(0))),
        (&kernel, ss, CODE32, (13, error(CODE32))),
        (&kernel, ss, USER_DATA, (13, error(USER_DATA & !3))),
        (&kernel, ss, ABSENT, (12, error(ABSENT))),
    ] {
        let found = rig.fault(state, load(register, selector));
        assert_eq!((found.0, found.1), expected, "{selector:#x}");
    }
    // A null segment can be loaded, but not used.
    let null = |a: &mut CodeAssembler| {
        a.xor(eax, eax).unwrap();
        a.mov(es, eax).unwrap();
        a.mov(eax, dword_ptr(ebx).es()).unwrap();
    };
    assert_eq!(rig.fault(&kernel, null), (13, Some(0), 4));
}

/// LDS, LES, LFS, LGS and LSS load a register and a segment register, or neither.
#[test]
fn far_pointers_load_both_halves() {
    let mut rig = Protected::new();
    let mut s = rig.state(false);
    s.gpr[3] = WINDOW_RAM;
    rig.put(WINDOW_RAM, 0x1234_5678 | u64::from(SMALL) << 32);
    type Load = fn(&mut CodeAssembler);
    let loads: [(Load, usize); 4] = [
        (|a| a.les(edx, fword_ptr(ebx)).unwrap(), 0),
        (|a| a.lds(edx, fword_ptr(ebx)).unwrap(), 3),
        (|a| a.lfs(edx, fword_ptr(ebx)).unwrap(), 4),
        (|a| a.lgs(edx, fword_ptr(ebx)).unwrap(), 5),
    ];
    for (load, segment) in loads {
        rig.fault(&s, |a| {
            load(a);
            a.int(0x80).unwrap();
        });
        let end = rig.cpu.state();
        assert_eq!((end.gpr[2], end.segments[segment].selector), (0x1234_5678, SMALL));
        assert_eq!(end.segments[segment].base, WINDOW_RAM);
    }
    rig.put(WINDOW_RAM, (STACK - 0x100) | u64::from(KERNEL_DATA) << 32);
    rig.fault(&s, |a| {
        a.lss(esp, fword_ptr(ebx)).unwrap();
        a.int(0x80).unwrap();
    });
    assert_eq!(rig.cpu.state().gpr[4], STACK - 0x100 - 12);
    rig.put(WINDOW_RAM, 0x1234_5678 | u64::from(ABSENT) << 32);
    assert_eq!(rig.fault(&s, |a| a.les(edx, fword_ptr(ebx)).unwrap()), (11, Some(u32::from(ABSENT)), 0));
    assert_eq!(rig.cpu.state().gpr[2], 0);
}

/// A call gate from user to kernel mode copies parameters to the new stack; the far return releases them.
#[test]
fn a_call_gate_changes_the_stack_and_back() {
    const KERNEL: u64 = 0x3_0000;
    let mut rig = Protected::new();
    // Two parameters, DPL 3.
    rig.put(
        GDT + u64::from(GATE),
        KERNEL & 0xffff | u64::from(CODE32) << 16 | 2 << 32 | 0xec << 40 | KERNEL >> 16 << 48,
    );
    let mut a = CodeAssembler::new(32).unwrap();
    a.mov(esi, dword_ptr(esp + 8)).unwrap();
    a.mov(edi, dword_ptr(esp + 12)).unwrap();
    a.mov(ecx, cs).unwrap();
    a.mov(ebp, esp).unwrap();
    a.retf_1(8).unwrap();
    rig.memory.write(KERNEL, &a.assemble(KERNEL).unwrap()).unwrap();
    let s = rig.state(true);
    let found = rig.fault(&s, |a| {
        a.push(22).unwrap();
        a.push(11).unwrap();
        a.db(&[0x9a, 0, 0, 0, 0]).unwrap(); // call far GATE:0
        a.dw(&[GATE | 3]).unwrap();
        a.mov(edx, cs).unwrap();
        a.mov(eax, esp).unwrap();
        a.int(0x80).unwrap();
    });
    assert_eq!(found.0, 0x80);
    let end = rig.cpu.state();
    assert_eq!((end.gpr[6], end.gpr[7]), (11, 22), "the parameters");
    assert_eq!((end.gpr[1], end.gpr[2]), (u64::from(CODE32), u64::from(USER_CODE32)));
    assert_eq!((end.gpr[5], end.gpr[0]), (ESP0 - 24, USER_STACK), "both stacks");
    // A gate for the kernel alone.
    rig.put(GDT + u64::from(GATE), rig.get(GDT + u64::from(GATE)) & !(0x60 << 40));
    let call = |a: &mut CodeAssembler| {
        a.db(&[0x9a, 0, 0, 0, 0]).unwrap();
        a.dw(&[GATE | 3]).unwrap();
    };
    assert_eq!(rig.fault(&s, call), (13, Some(u32::from(GATE)), 0));
}

#[test]
fn far_jumps_and_calls_check_their_segment() {
    let mut rig = Protected::new();
    let (kernel, user) = (rig.state(false), rig.state(true));
    let jump = |selector: u16| {
        move |a: &mut CodeAssembler| {
            a.db(&[0xea]).unwrap(); // jmp far
            a.db(&(CODE as u32 + 7).to_le_bytes()).unwrap();
            a.dw(&[selector]).unwrap();
            a.int(0x80).unwrap();
        }
    };
    for (state, selector, expected) in [
        (&kernel, CODE32, (0x80, None)),
        (&kernel, 0, (13, Some(0))),
        (&kernel, KERNEL_DATA, (13, Some(u32::from(KERNEL_DATA)))),
        (&kernel, USER_CODE32, (13, Some(u32::from(USER_CODE32 & !3)))),
        (&user, CODE32, (13, Some(u32::from(CODE32)))),
        (&user, USER_CODE32, (0x80, None)),
    ] {
        let found = rig.fault(state, jump(selector));
        assert_eq!((found.0, found.1), expected, "{selector:#x}");
    }
    // A far call and return at one privilege level.
    let found = rig.fault(&kernel, |a| {
        a.db(&[0x9a]).unwrap();
        a.db(&(CODE as u32 + 9).to_le_bytes()).unwrap();
        a.dw(&[CODE32]).unwrap();
        a.int(0x80).unwrap();
        a.inc(edx).unwrap();
        a.retf().unwrap();
    });
    assert_eq!((found.0, rig.cpu.state().gpr[2]), (0x80, 1));
}

#[test]
fn sysenter_and_sysexit_change_the_privilege() {
    const KERNEL: u64 = 0x3_0000;
    let mut rig = Protected::new();
    let mut a = CodeAssembler::new(32).unwrap();
    a.mov(esi, cs).unwrap();
    a.mov(edi, ss).unwrap();
    a.pushfd().unwrap();
    a.pop(ebp).unwrap();
    a.sysexit().unwrap();
    rig.memory.write(KERNEL, &a.assemble(KERNEL).unwrap()).unwrap();
    let mut s = rig.state(true);
    // CS, then SS, and for the user 16 and 24 higher.
    s.msrs.sysenter_cs = u64::from(CODE32);
    (s.msrs.sysenter_eip, s.msrs.sysenter_esp) = (KERNEL, STACK);
    s.rflags |= 0x200;
    (s.gpr[1], s.gpr[2]) = (USER_STACK - 64, CODE + 2);
    let found = rig.fault(&s, |a| {
        a.sysenter().unwrap();
        a.mov(eax, cs).unwrap();
        a.mov(ebx, esp).unwrap();
        a.int(0x80).unwrap();
    });
    assert_eq!(found.0, 0x80);
    let end = rig.cpu.state();
    assert_eq!((end.gpr[6], end.gpr[7]), (u64::from(CODE32), u64::from(CODE32 + 8)));
    assert_eq!(end.gpr[5] & 0x200, 0, "interrupts are off");
    assert_eq!((end.gpr[0], end.gpr[3]), (u64::from((CODE32 + 16) | 3), USER_STACK - 64));
    // Without a selector, and outside of the kernel.
    s.msrs.sysenter_cs = 0;
    assert_eq!(rig.fault(&s, |a| a.sysenter().unwrap()), (13, Some(0), 0));
    assert_eq!(rig.fault(&s, |a| a.sysexit().unwrap()), (13, Some(0), 0));
}

/// SYSCALL and SYSRET outside of long mode take the entry point from STAR.
#[test]
fn syscall_of_32_bit_mode() {
    const KERNEL: u64 = 0x3_0000;
    let mut rig = Protected::new();
    let mut a = CodeAssembler::new(32).unwrap();
    a.mov(esi, cs).unwrap();
    a.sysret().unwrap();
    rig.memory.write(KERNEL, &a.assemble(KERNEL).unwrap()).unwrap();
    let mut s = rig.state(true);
    s.msrs.efer = 1;
    s.msrs.star = KERNEL | u64::from(CODE32) << 32 | u64::from(USER_CODE32 & !3) << 48;
    s.rflags |= 0x200;
    let found = rig.fault(&s, |a| {
        a.syscall().unwrap();
        a.mov(eax, cs).unwrap();
        a.int(0x80).unwrap();
    });
    let end = rig.cpu.state();
    assert_eq!((found.0, end.gpr[6], end.gpr[1]), (0x80, u64::from(CODE32), CODE + 2));
    assert_eq!(end.gpr[0], u64::from(USER_CODE32));
}

/// IRET with operands of two and four bytes: to the same privilege level, and to the user's with a new stack.
#[test]
fn iret_of_32_bit_code() {
    let mut rig = Protected::new();
    rig.memory.write(0x3_0000, &[0x0f, 0x0b]).unwrap();
    let s = rig.state(false);
    let found = rig.fault(&s, |a| {
        a.push(u32::from(USER_DATA)).unwrap();
        a.push(USER_STACK as u32).unwrap();
        a.push(0x3202).unwrap();
        a.push(u32::from(USER_CODE32)).unwrap();
        a.push(0x3_0000).unwrap();
        a.iretd().unwrap();
    });
    assert_eq!((found.0, found.2), (6, 0x1_0000));
    let end = rig.cpu.state();
    assert_eq!(rig.get(end.gpr[4] + 12) as u32, USER_STACK as u32, "the user's stack");
    assert_eq!(rig.get(end.gpr[4] + 8) as u32 & 0x3200, 0x3200, "the kernel may set IOPL and IF");
    // Within the kernel the stack pointer is not popped. The 16-bit form cuts EIP.
    for (wide, target) in [(true, 0x2_f000u32), (false, 0xf000)] {
        rig.memory.write(u64::from(target), &[0xcd, 0x80]).unwrap();
        let found = rig.fault(&s, |a| {
            if wide {
                a.push(0x82).unwrap();
                a.push(u32::from(CODE32)).unwrap();
                a.push(target).unwrap();
                a.iretd().unwrap();
            } else {
                a.push(u32::from(CODE32) | 0x82 << 16).unwrap();
                a.sub(esp, 2).unwrap();
                a.mov(word_ptr(esp), target).unwrap();
                a.iret().unwrap();
            }
        });
        let end = rig.cpu.state();
        assert_eq!((found.0, found.2.wrapping_add(CODE as u32)), (0x80, target + 2));
        assert_eq!((end.gpr[4], rig.get(end.gpr[4] + 8) as u32 & 0xff), (STACK - 12, 0x82));
    }
}
