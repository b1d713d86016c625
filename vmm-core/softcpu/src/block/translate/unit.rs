//! x87, MMX and SSE instructions.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::super::op::Op;
use super::{Builder, Chosen, has_memory};
use crate::hostop;
use crate::ops::host::Unit;
use crate::ops::{host, system};

impl Builder<'_> {
    /// x87, MMX and SSE instructions, and whatever is left.
    pub(super) fn host(&mut self, i: &Instruction, op: &mut Op, long: bool) -> Chosen {
        let i = &without_hint(i);
        let Some(host) = hostop::translate(i, self.stubs) else {
            return self.slow(i, op, system::unimplemented, false);
        };
        let host = self.owned.host(host);
        op.imm.set(std::ptr::from_ref(host) as usize as u64);
        if let Some(handler) = hostop::choose(i, host, op, long) {
            return (handler, false);
        }
        op.r1 = unit(i) as u8;
        op.r2 = 0;
        if has_memory(i) {
            op.r2 = if writes_memory(i) { 2 } else { 1 };
            op.x |= (i.memory_size().size().min(128) as u16) << 8;
        }
        (if long || !has_memory(i) { host::host::<true> } else { host::host::<false> }, false)
    }
}

/// Replaces a non-temporal move by the ordinary one: on the way through host registers the hint costs far more
/// than it could save.
pub(in crate::block) fn without_hint(i: &Instruction) -> Instruction {
    use iced_x86::Code as C;
    let mut plain = *i;
    match i.code() {
        C::Movntdq_m128_xmm => plain.set_code(C::Movdqa_xmmm128_xmm),
        C::Movntps_m128_xmm => plain.set_code(C::Movaps_xmmm128_xmm),
        C::Movntpd_m128_xmm => plain.set_code(C::Movapd_xmmm128_xmm),
        C::Movntdqa_xmm_m128 => plain.set_code(C::Movdqa_xmm_xmmm128),
        C::Movntq_m64_mm => plain.set_code(C::Movq_mmm64_mm),
        _ => {}
    }
    plain
}

fn writes_memory(i: &Instruction) -> bool {
    use iced_x86::OpAccess::{CondWrite, ReadCondWrite, ReadWrite, Write};
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let info = factory.info(i);
    info.used_memory().iter().any(|m| matches!(m.access(), Write | CondWrite | ReadWrite | ReadCondWrite))
}

/// Which unit an x87, MMX or SSE instruction needs.
fn unit(i: &Instruction) -> Unit {
    use iced_x86::CpuidFeature as F;
    match i.mnemonic() {
        M::Wait => return Unit::Wait,
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => return Unit::Fxsr,
        M::Fninit
        | M::Fnstcw
        | M::Fnstsw
        | M::Fnclex
        | M::Fnstenv
        | M::Fnsave
        | M::Fneni
        | M::Fndisi
        | M::Fnsetpm => return Unit::X87Control,
        _ => {}
    }
    let features = i.cpuid_features();
    let x87 = features.iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387 | F::FPU287XL_ONLY))
        || matches!(
            i.mnemonic(),
            M::Fcmovb
                | M::Fcmove
                | M::Fcmovbe
                | M::Fcmovu
                | M::Fcmovnb
                | M::Fcmovne
                | M::Fcmovnbe
                | M::Fcmovnu
                | M::Fcomi
                | M::Fcomip
                | M::Fucomi
                | M::Fucomip
                | M::Fisttp
        );
    let uses_mm = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm());
    if x87 {
        Unit::X87
    } else if uses_mm || i.mnemonic() == M::Emms {
        Unit::Mmx
    } else {
        Unit::Sse
    }
}
