//! Instructions without a specialised handler.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};

use super::Slow;
use crate::ops::{io, legacy, string, system};

/// The function that executes an instruction, and whether the block can go on after it: it changes neither
/// how following instructions are found and decoded, nor anything that the run loop has to look at.
pub(crate) fn slow_handler(i: &Instruction) -> Option<(Slow, bool)> {
    let special =
        |n: u32| i.op_kind(n) == OpKind::Register && (i.op_register(n).is_cr() || i.op_register(n).is_dr());
    Some(match i.mnemonic() {
        M::Mov if i.op_count() == 2 && special(0) => (system::mov_to_special, false),
        M::Mov if i.op_count() == 2 && special(1) => (system::mov_from_special, true),
        M::Mov if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() => {
            (system::mov_to_segment, false)
        }
        M::Mov
            if i.op0_kind() == OpKind::Memory
                && i.op1_kind() == OpKind::Register
                && i.op1_register().is_segment_register() =>
        {
            (system::mov_from_segment, true)
        }
        M::Pop if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() => {
            (system::pop_segment, false)
        }
        M::Jmp if is_far(i) => (system::far_jump, false),
        M::Call if is_far(i) => (system::far_call, false),
        M::Retf => (system::far_return, false),
        M::Iret | M::Iretd | M::Iretq => (system::interrupt_return, false),
        M::Int => (system::int_n, false),
        M::Int3 => (system::int3, false),
        M::Int1 => (system::int1, false),
        M::Into => (legacy::into, false),
        M::Ud0 | M::Ud1 | M::Ud2 => (system::ud, false),
        // PREFETCHW needs a memory operand.
        M::Reservednop
            if matches!(
                i.code(),
                Code::Reservednop_rm16_r16_0F0D
                    | Code::Reservednop_rm32_r32_0F0D
                    | Code::Reservednop_rm64_r64_0F0D
            ) =>
        {
            (system::ud, false)
        }
        M::Hlt => (system::hlt, false),
        M::Cpuid => (system::cpuid, false),
        M::Rdtsc | M::Rdtscp => (system::rdtsc, true),
        M::Rdmsr => (system::rdmsr, false),
        M::Wrmsr => (system::wrmsr, false),
        M::Rdrand | M::Rdseed => (system::rdrand, true),
        M::Clts => (system::clts, false),
        M::Lmsw => (system::lmsw, false),
        M::Smsw => (system::smsw, true),
        M::Invlpg => (system::invlpg, false),
        M::Wbinvd | M::Invd => (system::privileged_nop, true),
        M::Swapgs => (system::swapgs, true),
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => (system::segment_base, true),
        M::Sgdt | M::Sidt => (system::store_table, true),
        M::Lgdt | M::Lidt => (system::load_table, false),
        M::Sldt | M::Str => (system::store_selector, true),
        M::Lldt | M::Ltr => (system::load_system_segment, false),
        M::Lar | M::Lsl | M::Verr | M::Verw => (system::inspect_descriptor, true),
        M::Syscall => (system::syscall, false),
        M::Sysret | M::Sysretq => (system::sysret, false),
        M::Sysenter => (system::sysenter, false),
        M::Sysexit | M::Sysexitq => (system::sysexit, false),
        M::Cmpxchg8b => (system::cmpxchg8b, true),
        M::Cmpxchg16b => (system::cmpxchg16b, true),
        M::Movbe => (system::movbe, true),
        M::Clflush | M::Clflushopt | M::Clwb => (system::touch, true),
        M::Xgetbv | M::Xsetbv => (system::no_xsave, false),
        M::Monitor | M::Mwait | M::Rdpmc | M::Rdpid => (system::ud, false),
        M::Vmcall | M::Vmmcall => (system::hypercall, true),
        M::In => (io::input, false),
        M::Out => (io::output, false),
        M::Insb | M::Insw | M::Insd => (string::ins, false),
        M::Outsb | M::Outsw | M::Outsd => (string::outs, false),
        M::Movsb | M::Movsw | M::Movsq => repeated(i, string::movs),
        M::Movsd if i.is_string_instruction() => repeated(i, string::movs),
        M::Cmpsb | M::Cmpsw | M::Cmpsq => repeated(i, string::cmps),
        M::Cmpsd if i.is_string_instruction() => repeated(i, string::cmps),
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => repeated(i, string::stos),
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => repeated(i, string::lods),
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => repeated(i, string::scas),
        M::Daa | M::Das => (legacy::decimal_adjust, true),
        M::Aaa | M::Aas => (legacy::ascii_adjust, true),
        M::Aam => (legacy::aam, true),
        M::Aad => (legacy::aad, true),
        M::Salc => (legacy::salc, true),
        M::Bound => (legacy::bound, true),
        M::Arpl => (legacy::arpl, true),
        M::Enter => (legacy::enter, true),
        M::Pusha | M::Pushad => (legacy::pusha, true),
        M::Popa | M::Popad => (legacy::popa, true),
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => (legacy::load_far_pointer, false),
        M::Xlatb => (legacy::xlat, true),
        _ => return None,
    })
}

fn is_far(i: &Instruction) -> bool {
    matches!(i.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
        || i.is_jmp_far_indirect()
        || i.is_call_far_indirect()
}

/// A repeated string instruction may stop half-way and let the run loop look around.
fn repeated(i: &Instruction, run: Slow) -> (Slow, bool) {
    (run, !i.has_rep_prefix() && !i.has_repne_prefix())
}
