//! x87, MMX and SSE instructions.

use iced_x86::Instruction;

use crate::cpu::{Cpu, Fault};

/// One decoded x87, MMX or SSE instruction, ready to execute.
///
/// The caller has checked CR0.EM, CR0.TS and CR4.OSFXSR, and for x87 and MMX instructions whether an
/// unmasked x87 exception is pending.
pub(crate) struct HostOp {
    /// Executes the instruction. `address` is the linear address of the memory operand if there is one.
    /// On an error nothing that a restarted instruction would see may have changed.
    pub run: fn(&mut Cpu, &HostOp, address: u64) -> Result<(), Fault>,
    /// The decoded instruction.
    pub instruction: Instruction,
}

/// Translates an instruction, or returns `None` if it is not implemented (it then raises `#UD`).
pub(crate) fn translate(_instruction: &Instruction) -> Option<HostOp> {
    None
}
