//! Decoded code.

pub(crate) mod cache;
mod decode;
mod liveness;
#[cfg(feature = "native")]
pub(crate) mod native;
pub(crate) mod op;
mod slow;
mod translate;

use iced_x86::Instruction;

use crate::cpu::{Cpu, Fault};
use crate::hostop::HostOp;
use op::Op;

/// Executes an instruction that has no specialised handler. RIP is behind it; on an error nothing that a
/// restarted instruction would see may have changed.
pub(crate) type Slow = fn(&mut Cpu, &Instruction) -> Result<(), Fault>;

/// What the operation of such an instruction points to.
pub(crate) struct SlowOp {
    pub run: Slow,
    pub instruction: Instruction,
}

/// A straight run of instructions within one page (the only instruction of a block may cross into the next
/// page).
pub(crate) struct Block {
    /// Number of instructions.
    pub count: u32,
    /// Cleared when the code was overwritten; such a block is not entered any more.
    pub valid: std::cell::Cell<bool>,
    /// The operations; the last one does not go on to a following one.
    pub ops: Box<[Op]>,
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Mode bits that decoding depended on.
    pub mode: u16,
    /// Guest-physical address of the second page, if the instruction crosses into it.
    pub second_page: Option<u64>,
    /// What its code refers to, if it has been translated.
    #[cfg(feature = "native")]
    pub native: native::PartsCell,
    /// What operations point to.
    pub _owned: Owned,
}

/// Instructions that operations of a block point to.
#[derive(Default)]
#[expect(clippy::vec_box, reason = "the addresses must stay when the vectors grow")]
pub(crate) struct Owned {
    slow: Vec<Box<SlowOp>>,
    host: Vec<Box<HostOp>>,
}

impl Owned {
    /// Keeps an instruction; returns what [`Op::imm`] holds.
    pub fn slow(&mut self, op: SlowOp) -> u64 {
        let boxed = Box::new(op);
        let address = (&raw const *boxed) as usize as u64;
        self.slow.push(boxed);
        address
    }

    /// Keeps an instruction of `hostop`; [`Op::imm`] holds the address of what is returned.
    pub fn host(&mut self, op: HostOp) -> &HostOp {
        self.host.push(Box::new(op));
        &self.host[self.host.len() - 1]
    }
}
