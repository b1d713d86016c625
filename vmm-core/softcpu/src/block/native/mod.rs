//! Hot blocks as machine code of the host, which has the same instruction set.
//!
//! A block of 64-bit code counts how often it is entered. When that was often enough, it and the blocks of its page that
//! it is linked with are translated together. Most instructions keep their opcode; only operands are rewritten: most
//! general registers of the guest live in registers of the host while generated code runs, and memory operands go
//! through the TLB. Status flags stay in the host's register from the instruction that sets them to the one that reads
//! them; before anything can look at them they are recorded in [`Lazy`](crate::cpu::flags::Lazy).
//!
//! Whatever generated code cannot do by itself, the interpreter does in its place: an instruction that is not
//! translated, an access that the TLB does not know, a fault. For that each instruction has its operation of the
//! interpreter, followed by one that returns to generated code. So there is one implementation of everything that is
//! rare, all exceptions are precise, and the instruction count is exact.
//!
//! ```text
//!   Cpu::run ─ execute ─► warm ── count is up ──► Cpu::translate
//!                         enter ─► trampoline ─► generated code ─► other block, or back with the operation
//!                                                  │        ▲      that the interpreter goes on with
//!                                                  └ call_op┘
//! ```
//!
//! Generated code refers to its block and to others of the same page. It is not entered any more when the page's blocks
//! are dropped, and freed with all others when the memory for code is full.

mod address;
mod branch;
mod emit;
mod flags;
mod general;
mod glue;
mod region;
mod step;
mod vector;

use std::any::Any;
use std::cell::{Cell, OnceCell};

use super::op::{BlockPtr, Handler, Op, OpPtr, next, not_entered};
use super::{Block, Owned};
use crate::cpu::{Cpu, mode};
use crate::hostop::Arena;
use glue::Glue;

/// Bytes of generated code that are kept before everything is thrown away.
const CAPACITY: usize = 32 << 20;

/// What generated code shares with the rest of the processor.
#[repr(C)]
pub(crate) struct Native {
    /// First operation of the block that a call leads to.
    next: u64,
    /// Where an indirect branch or a call leads.
    target: u64,
    /// Linear address of a memory operand.
    address: u64,
    /// RFLAGS to go on with after the interpreter executed an instruction.
    flags: u64,
    /// Conditions that are evaluated before the flags are lost.
    conditions: [u8; 2],
    /// [`enter`], as blocks hold it.
    enter: Handler,
    /// Entries of a block before it is translated; `None` for never.
    threshold: Option<u32>,
    code: Option<Code>,
    /// Blocks that were translated.
    pub translated: u64,
    /// A panic on its way through generated code.
    panic: Option<Box<dyn Any + Send>>,
}

/// Memory for generated code.
struct Code {
    arena: Arena,
    glue: Glue,
    /// What `arena` holds when only `glue` is left.
    start: usize,
}

/// What the generated code of a block refers to.
pub(crate) struct Parts {
    /// For each instruction its operation, and one that returns to generated code.
    ops: Box<[Op]>,
    _owned: Vec<Owned>,
}

/// Set when a block is translated.
pub(crate) type PartsCell = OnceCell<Parts>;

impl Native {
    /// Translates blocks after `threshold` entries.
    pub fn new(threshold: Option<u32>) -> Self {
        Self {
            next: 0,
            target: 0,
            address: 0,
            flags: 0,
            conditions: [0; 2],
            enter,
            threshold,
            code: None,
            translated: 0,
            panic: None,
        }
    }

    /// Nothing is translated any more. Blocks that were have to be dropped.
    fn give_up(&mut self) {
        self.threshold = None;
        self.code = None;
    }

    /// The operation in front of a new block, if it may be translated.
    pub fn counter(&self, mode: u16, first: &Op) -> Option<Op> {
        let threshold = self.threshold?;
        (mode & mode::CODE64 != 0).then(|| Op {
            imm: Cell::new(threshold.into()),
            left: first.left,
            off: first.off,
            ..Op::bare(warm)
        })
    }
}

/// Counts an entry of a block that is not translated yet; leaves when the block is due.
fn warm(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let count = op.imm.get();
    if count == 0 {
        return not_entered(cpu, op);
    }
    op.imm.set(count - 1);
    next!(cpu, op)
}

/// In front of a block that is not to be translated.
fn cold(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    next!(cpu, op)
}

/// Runs generated code; `imm` is its address.
fn enter(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let Some(code) = &cpu.native.code else { return not_entered(cpu, op) };
    let trampoline = code.glue.trampoline;
    // SAFETY: the block is live, so its code is there; code only uses the processor, which it is given, host memory
    // that the TLB knows, and the interpreter.
    let next = unsafe { trampoline(cpu, op.imm.get()) };
    if let Some(panic) = cpu.native.panic.take() {
        std::panic::resume_unwind(panic);
    }
    next
}

/// Behind the operation of a single instruction: goes on in generated code.
fn resume(_cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    op
}

/// Whether the block has been entered often enough.
pub(crate) fn is_due(block: &Block) -> bool {
    let first = &block.ops[0];
    first.imm.get() == 0 && std::ptr::fn_addr_eq(first.handler.get(), warm as Handler)
}

impl Cpu {
    /// Translates a block that is due, outside of the execution of blocks. Returns `false` if all blocks had to be
    /// dropped, this one too.
    #[cold]
    #[inline(never)]
    pub(crate) fn translate_block(&mut self, block: BlockPtr) -> bool {
        if self.native.code.is_none() {
            match Code::new() {
                Ok(code) => self.native.code = Some(code),
                Err(error) => {
                    tracing::warn!(%error, "No memory for generated code; the interpreter goes on alone");
                    self.native.give_up();
                }
            }
        }
        let region = self.collect_region(block);
        let translated = region.and_then(|region| self.translate_region(region));
        match translated {
            Some(true) => true,
            Some(false) => {
                self.blocks.clear();
                if let Some(code) = &mut self.native.code {
                    code.arena.truncate(code.start);
                }
                false
            }
            None => {
                block.ops[0].handler.set(cold);
                true
            }
        }
    }
}

impl Code {
    fn new() -> std::io::Result<Self> {
        let mut arena = Arena::with_capacity(CAPACITY)?;
        let glue = Glue::generate(&mut arena)?;
        let start = arena.used();
        Ok(Self { arena, glue, start })
    }
}

#[cfg(test)]
mod tests;
