//! Whether every opcode form that the software processor executes is tested: against the host or, where that would
//! harm this process or show what the host is, by programs of the `system` tests.

use std::collections::BTreeMap;

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use crate::difftest::forms::{self, Template};
use crate::difftest::layout::{INSTRUCTION, Mode};
use crate::difftest::soft::Soft;
use crate::difftest::state::State;

const UNDEFINED: u8 = 6;

/// The source of the tests of an instruction that does not run against the host, and what is in it for that instruction.
fn elsewhere(instruction: &Instruction) -> Option<(&'static str, String)> {
    let mnemonic = instruction.mnemonic();
    let call = |source| Some((source, format!("a.{}(", format!("{mnemonic:?}").to_lowercase())));
    let far = |source, what: &str| Some((source, what.to_string()));
    match mnemonic {
        M::Syscall | M::Sysret | M::Sysretq | M::Iretq | M::Int | M::Int1 | M::Ltr => {
            call(include_str!("../system/transfers.rs"))
        }
        M::Lar | M::Lsl | M::Verr | M::Verw | M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Swapgs => {
            call(include_str!("../system/segments.rs"))
        }
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => call(include_str!("../system/segments.rs")),
        M::Lds | M::Les | M::Lss | M::Lfs | M::Lgs | M::Retf | M::Iret | M::Iretd => {
            call(include_str!("../system/protected.rs"))
        }
        M::Sysenter | M::Sysexit => call(include_str!("../system/protected.rs")),
        M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed | M::Vmmcall => call(include_str!("../system/time.rs")),
        M::Cpuid => call(include_str!("../system/features.rs")),
        // With another operation code it is the same handler.
        M::Vmcall => far(include_str!("../system/time.rs"), "a.vmmcall("),
        M::Jmp => far(include_str!("../system/protected.rs"), "// jmp far"),
        M::Call => far(include_str!("../system/protected.rs"), "// call far"),
        M::Mov | M::Pop if loads_segment(instruction) => {
            far(include_str!("../system/protected.rs"), "fn segment_registers_take_what_fits")
        }
        // Its operand has two bytes or four, by vendor.
        M::Movsxd => far(include_str!("forms.rs"), "Movsxd_r16_rm16"),
        _ => None,
    }
}

fn loads_segment(instruction: &Instruction) -> bool {
    instruction.op0_kind() == OpKind::Register && instruction.op0_register().is_segment_register()
}

/// Executes a form alone: whether the processor knows it.
fn is_executed(soft: &mut Soft, mode: Mode, template: &Template) -> bool {
    soft.place(&template.plain());
    let input = State { rip: INSTRUCTION, rflags: 0x202, ..State::default() };
    soft.run(mode, &input, 1).exception.is_none_or(|exception| exception.vector != UNDEFINED)
}

#[test]
fn every_form_is_tested() {
    let mut soft = Soft::new(false);
    let mut untested = BTreeMap::new();
    let mut executed = 0;
    for mode in Mode::ALL {
        for (template, instruction) in forms::templates(mode) {
            if forms::is_testable(&instruction) || !is_executed(&mut soft, mode, &template) {
                continue;
            }
            executed += 1;
            let proof = elsewhere(&instruction);
            if !proof.is_some_and(|(source, what)| source.contains(&what)) {
                untested.entry(instruction.code()).or_insert((mode, template));
            }
        }
    }
    assert!(executed > 50, "{executed} forms only");
    assert!(untested.is_empty(), "{} forms are tested nowhere: {untested:x?}", untested.len());
}
