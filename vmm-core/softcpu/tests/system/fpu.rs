//! When x87, MMX and SSE instructions raise `#NM`, `#UD`, `#MF` and `#XM`, by CR0 and CR4.

use iced_x86::code_asm::*;

use super::rig::*;

const MP: u64 = 1 << 1;
const EM: u64 = 1 << 2;
const TS: u64 = 1 << 3;
const OSFXSR: u64 = 1 << 9;
const OSXMMEXCPT: u64 = 1 << 10;

/// What an instruction belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    X87,
    Wait,
    Mmx,
    Sse,
    Save,
}

type Write = fn(&mut CodeAssembler);

const INSTRUCTIONS: [(Unit, Write); 7] = [
    (Unit::X87, |a| a.fld1().unwrap()),
    (Unit::X87, |a| a.fninit().unwrap()),
    (Unit::Wait, |a| a.wait().unwrap()),
    (Unit::Mmx, |a| a.paddb(mm0, mm1).unwrap()),
    (Unit::Sse, |a| a.addps(xmm0, xmm1).unwrap()),
    (Unit::Sse, |a| a.movups(xmmword_ptr(rbx), xmm2).unwrap()),
    (Unit::Save, |a| a.fxsave(byte_ptr(rbx)).unwrap()),
];

/// The exception that the AMD64 Architecture Programmer's Manual, volume 2, table 12-1 and the descriptions of the
/// instructions ask for.
fn expected(unit: Unit, control: u64, extensions: u64) -> Option<u8> {
    let (em, ts, mp) = (control & EM != 0, control & TS != 0, control & MP != 0);
    match unit {
        Unit::X87 | Unit::Save => (em || ts).then_some(7),
        Unit::Wait => (mp && ts).then_some(7),
        Unit::Mmx if em => Some(6),
        Unit::Sse if em || extensions & OSFXSR == 0 => Some(6),
        Unit::Mmx | Unit::Sse => ts.then_some(7),
    }
}

#[test]
fn units_can_be_switched_off() {
    let mut rig = Rig::new();
    for (number, (unit, write)) in INSTRUCTIONS.into_iter().enumerate() {
        for n in 0..16u64 {
            let mut s = Rig::long_mode();
            s.cr0 = s.cr0 & !(MP | EM | TS) | (n & 7) << 1;
            s.cr4 = s.cr4 & !OSFXSR | if n & 8 != 0 { OSFXSR } else { 0 };
            s.gpr[3] = WINDOW_RAM;
            let found = rig.fault(&s, |a| {
                write(a);
                a.int(0x80).unwrap();
            });
            let wanted = expected(unit, s.cr0, s.cr4);
            let what = format!("instruction {number}, CR0 {:#x}, CR4 {:#x}", s.cr0, s.cr4);
            match wanted {
                Some(vector) => assert_eq!(found, Some((vector, None, 0)), "{what}"),
                None => assert_eq!(found.map(|f| f.0), Some(0x80), "{what}"),
            }
        }
    }
}

/// An unmasked x87 exception is reported by the next x87 instruction that waits, and by no other.
#[test]
fn x87_exceptions_wait_for_the_next_instruction() {
    let mut rig = Rig::new();
    let divide = |a: &mut CodeAssembler| {
        a.fninit().unwrap();
        a.mov(dword_ptr(rbx), 0x0340).unwrap();
        a.fldcw(word_ptr(rbx)).unwrap();
        a.fldz().unwrap();
        a.fldz().unwrap();
        a.fdivp(st1, st0).unwrap();
        a.inc(rdi).unwrap();
    };
    let mut s = Rig::long_mode();
    s.gpr[3] = WINDOW_RAM;
    type Then = fn(&mut CodeAssembler);
    let reports: [Then; 3] = [|a| a.fld1().unwrap(), |a| a.wait().unwrap(), |a| a.movq(rax, mm0).unwrap()];
    for then in reports {
        let mut offset = 0;
        rig.execute(&s, |a| {
            divide(a);
            offset = assemble(CODE, divide).len() as u64;
            then(a);
        });
        let frame = rig.frame().unwrap();
        assert_eq!((frame.vector, frame.rip, rig.cpu.state().gpr[7]), (16, CODE + offset, 1));
    }
    let silent: [Then; 4] = [
        |a| a.fnstsw(ax).unwrap(),
        |a| a.fnclex().unwrap(),
        |a| a.fninit().unwrap(),
        |a| a.addps(xmm0, xmm1).unwrap(),
    ];
    for then in silent {
        rig.execute(&s, |a| {
            divide(a);
            then(a);
            a.int(0x80).unwrap();
        });
        assert_eq!(rig.frame().map(|f| f.vector), Some(0x80));
    }
}

/// An unmasked SSE exception is `#XM`, or `#UD` if CR4.OSXMMEXCPT is clear; the instruction has no result.
#[test]
fn simd_exceptions_fault() {
    let mut rig = Rig::new();
    for (enabled, vector) in [(OSXMMEXCPT, 19), (0, 6)] {
        let mut s = Rig::long_mode();
        s.cr4 = s.cr4 & !OSXMMEXCPT | OSFXSR | enabled;
        s.fpu.mxcsr = 0x1f80 & !(1 << 9); // division by zero is not masked
        s.fpu.xmm[0] = 0x3f80_0000;
        s.fpu.xmm[1] = 0;
        assert_eq!(rig.fault(&s, |a| a.divss(xmm0, xmm1).unwrap()), Some((vector, None, 0)));
        let end = rig.cpu.state();
        assert_eq!((end.fpu.xmm[0], end.fpu.mxcsr & 0x3f), (0x3f80_0000, 4));
    }
}
