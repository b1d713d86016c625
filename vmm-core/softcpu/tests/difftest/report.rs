//! Describes a mismatch so that it can be reproduced.

use std::fmt::Write;

use iced_x86::{Formatter, Instruction, IntelFormatter};

use super::generate::{Encoding, Patches};
use super::layout::DATA;
use super::sequence::Sequence;
use super::state::{Outcome, State};

pub const GPR_NAMES: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13", "R14",
    "R15",
];

/// The instruction, its input and both outcomes.
pub fn mismatch(
    encoding: &Encoding,
    input: &State,
    patches: &Patches,
    native: &Outcome,
    soft: &Outcome,
    memory: (&[u8], &[u8]),
    difference: Option<String>,
) -> String {
    let what = difference.unwrap_or_else(|| "memory".into());
    let mut text = line(&encoding.bytes, &encoding.instruction);
    let _ = writeln!(text, " | differs: {what}");
    for (address, bytes) in patches {
        let _ = writeln!(text, "  memory {address:#x}: {bytes:02x?}");
    }
    outcomes(&mut text, encoding.fpu, input, native, soft, memory);
    text
}

/// A sequence, its input and both outcomes.
pub fn sequence(
    sequence: &Sequence,
    input: &State,
    before: &[u8],
    native: &Outcome,
    soft: &Outcome,
    memory: (&[u8], &[u8]),
    what: &str,
) -> String {
    let mut text = format!(
        "sequence of {} in {:?} mode | differs: {what}\n",
        sequence.instructions.len(),
        sequence.mode
    );
    let mut at = 0;
    for instruction in &sequence.instructions {
        let bytes = &sequence.bytes[at..at + instruction.len()];
        at += instruction.len();
        let _ = writeln!(text, "    {}", line(bytes, instruction));
        let address = instruction.memory_displacement64();
        let constant = instruction.memory_base() != iced_x86::Register::RBX;
        let offset = if constant { address } else { input.gpr[3].wrapping_add(address) }.wrapping_sub(DATA);
        if let Some(bytes) = before.get(offset as usize..).and_then(|rest| rest.get(..16)) {
            let _ = writeln!(text, "      memory {:#x}: {bytes:02x?}", DATA + offset);
        }
    }
    outcomes(&mut text, sequence.fpu, input, native, soft, memory);
    text
}

fn line(bytes: &[u8], instruction: &Instruction) -> String {
    let mut disassembly = String::new();
    IntelFormatter::new().format(instruction, &mut disassembly);
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{} | {disassembly} | {:?}", bytes.join(" "), instruction.code())
}

fn outcomes(
    text: &mut String,
    with_fpu: bool,
    input: &State,
    native: &Outcome,
    soft: &Outcome,
    memory: (&[u8], &[u8]),
) {
    let _ = writeln!(text, "  exception: native {:?}, soft {:?}", native.exception, soft.exception);
    let rows = GPR_NAMES
        .iter()
        .enumerate()
        .map(|(n, name)| (*name, input.gpr[n], native.state.gpr[n], soft.state.gpr[n]));
    let rows = rows.chain([
        ("RIP", input.rip, native.state.rip, soft.state.rip),
        ("RFLAGS", input.rflags, native.state.rflags, soft.state.rflags),
    ]);
    for (name, input, native, soft) in rows {
        let mark = if native == soft { "" } else { "  <--" };
        let _ = writeln!(text, "  {name:6} {input:#018x} -> native {native:#018x} soft {soft:#018x}{mark}");
    }
    if with_fpu {
        fpu(text, input, native, soft);
    }
    let differing = memory.0.iter().zip(memory.1).enumerate().filter(|(_, (a, b))| a != b);
    for (offset, (a, b)) in differing.take(32) {
        let _ = writeln!(text, "  [{:#x}] native {a:02x} soft {b:02x}", DATA + offset as u64);
    }
}

fn fpu(text: &mut String, input: &State, native: &Outcome, soft: &Outcome) {
    let (i, a, b) = (&input.fx, &native.state.fx, &soft.state.fx);
    let words = [
        ("FCW", u32::from(i.fcw), u32::from(a.fcw), u32::from(b.fcw)),
        ("FSW", u32::from(i.fsw), u32::from(a.fsw), u32::from(b.fsw)),
        ("FTW", u32::from(i.ftw), u32::from(a.ftw), u32::from(b.ftw)),
        ("MXCSR", i.mxcsr, a.mxcsr, b.mxcsr),
    ];
    for (name, input, native, soft) in words {
        let mark = if native == soft { "" } else { "  <--" };
        let _ = writeln!(text, "  {name:6} {input:#06x} -> native {native:#06x} soft {soft:#06x}{mark}");
    }
    let st = (0..8).map(|n| (format!("ST{n}"), i.st[n], a.st[n], b.st[n]));
    let xmm = (0..16).map(|n| (format!("XMM{n}"), i.xmm[n], a.xmm[n], b.xmm[n]));
    for (name, input, native, soft) in st.chain(xmm) {
        let mark = if native == soft { "" } else { "  <--" };
        let _ = writeln!(text, "  {name:6} {input:#034x} -> native {native:#034x} soft {soft:#034x}{mark}");
    }
}
