//! Decoded instructions and how one leads to the next.
//!
//! Each operation holds a pointer to the function that executes it. In release builds a handler ends with
//! a call of the next one in tail position, which the compiler turns into a jump; with debug assertions it
//! returns the next operation to a loop instead. Both have the same signature, so the loop in
//! [`execute`] drives either. Where the compiler does not make a jump of the call the stack grows, but only
//! by the instructions of one slice: control returns to the loop after some thousand of them.

use std::cell::Cell;
use std::ops::Deref;

use super::Block;
use crate::cpu::Cpu;

/// Executes one operation; returns the next one, or null to return to [`Cpu::run`].
pub(crate) type Handler = fn(&mut Cpu, OpPtr) -> OpPtr;

/// Register numbers above 15 that operations use. Entry [`ZERO`] is never written.
///
/// Between blocks this one is the instruction pointer. While operations execute it is the instruction pointer that
/// the first byte of their page would have: jumps within a page need not change it, and [`Op::off`] completes it.
pub(crate) const RIP: u8 = 16;
pub(crate) const ZERO: u8 = 17;
/// Base of FS, as 64-bit code sees it.
pub(crate) const FS_BASE: u8 = 18;
/// Base of GS, as 64-bit code sees it.
pub(crate) const GS_BASE: u8 = 19;

/// The memory operand uses SS by default: `#SS` instead of `#GP`.
pub(crate) const X_STACK: u16 = 1 << 0;
/// Address size of 16 bits.
pub(crate) const X_ADDR16: u16 = 1 << 1;
/// Address size of 32 bits.
pub(crate) const X_ADDR32: u16 = 1 << 2;

/// One decoded operation.
#[repr(C)]
pub(crate) struct Op {
    pub handler: Cell<Handler>,
    /// Immediate, or a pointer: the first operation of the linked block, the boxed instruction.
    pub imm: Cell<u64>,
    /// Displacement of the memory operand, or a branch target relative to the page.
    pub disp: i32,
    /// Destination register.
    pub r1: u8,
    /// Source register.
    pub r2: u8,
    /// Base register of the memory operand.
    pub base: u8,
    /// Index register of the memory operand.
    pub index: u8,
    /// Shift of the index.
    pub scale: u8,
    /// 64-bit code: register that holds the segment base. Otherwise: segment register number.
    pub seg: u8,
    /// Length of the instruction in bytes.
    pub len: u8,
    /// Instructions from this one to the end of the block, inclusive.
    pub left: u8,
    /// Offset of the instruction from the start of the page.
    pub off: u16,
    /// `X_` flags.
    pub x: u16,
}

impl Op {
    /// An operation without operands, which stands for no instruction.
    pub fn bare(handler: Handler) -> Self {
        Self {
            handler: Cell::new(handler),
            imm: Cell::new(0),
            disp: 0,
            r1: 0,
            r2: 0,
            base: ZERO,
            index: ZERO,
            scale: 0,
            seg: ZERO,
            len: 0,
            left: 0,
            off: 0,
            x: 0,
        }
    }
}

/// A pointer to an [`Op`] of a live block, or null.
///
/// Blocks are only freed by [`Cpu::run`] between two calls of [`execute`], and every block ends with an
/// operation that does not go on to the following one; both together keep the pointer valid.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct OpPtr(*const Op);

impl OpPtr {
    /// Leaves the execution of blocks.
    pub const NULL: Self = Self(std::ptr::null());

    pub fn is_null(self) -> bool {
        self.0.is_null()
    }

    /// From what [`Op::imm`] of a linked jump holds.
    #[inline(always)]
    pub fn from_link(link: u64) -> Self {
        Self(link as usize as *const Op)
    }

    #[inline(always)]
    pub fn as_link(self) -> u64 {
        self.0 as usize as u64
    }

    /// The operation after this one in the same block.
    #[inline(always)]
    pub fn following(self) -> Self {
        // SAFETY: see the type: handlers that go on are never the last of their block.
        Self(unsafe { self.0.add(1) })
    }
}

impl Deref for OpPtr {
    type Target = Op;
    #[inline(always)]
    fn deref(&self) -> &Op {
        // SAFETY: see the type; handlers only get non-null pointers.
        unsafe { &*self.0 }
    }
}

/// A pointer to a live block, as [`OpPtr`].
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct BlockPtr(pub *const Block);

impl BlockPtr {
    pub const NULL: Self = Self(std::ptr::null());

    pub fn is_null(self) -> bool {
        self.0.is_null()
    }

    #[inline(always)]
    pub fn first(self) -> OpPtr {
        OpPtr(self.ops.as_ptr())
    }
}

impl Deref for BlockPtr {
    type Target = Block;
    #[inline(always)]
    fn deref(&self) -> &Block {
        // SAFETY: see `OpPtr`.
        unsafe { &*self.0 }
    }
}

/// Goes on with an operation: a tail call, or a return to the loop.
macro_rules! go {
    ($cpu:expr, $op:expr) => {{
        let op = $op;
        if cfg!(debug_assertions) {
            return op;
        }
        return (op.handler.get())($cpu, op);
    }};
}

/// Goes on with the following operation of the block.
macro_rules! next {
    ($cpu:expr, $op:expr) => {
        $crate::block::op::go!($cpu, $op.following())
    };
}

/// Enters a block by its first operation: takes its instructions from the budget, or leaves if they exceed it.
macro_rules! enter {
    ($cpu:expr, $first:expr) => {{
        let first = $first;
        $cpu.fuel -= i64::from(first.left);
        if $cpu.fuel < 0 {
            return $crate::block::op::not_entered($cpu, first);
        }
        $crate::block::op::go!($cpu, first)
    }};
}

/// [`enter`] by a jump of its own, for the second way out of a handler.
macro_rules! enter_apart {
    ($cpu:expr, $first:expr) => {{
        let first = $first;
        $cpu.fuel -= i64::from(first.left);
        if $cpu.fuel < 0 {
            return $crate::block::op::not_entered($cpu, first);
        }
        if cfg!(debug_assertions) {
            return first;
        }
        let handler = $crate::block::op::apart(first.handler.get());
        return handler($cpu, first);
    }};
}

/// Enters a block in any page, by its address and first operation.
macro_rules! enter_page {
    ($cpu:expr, $rip:expr, $first:expr) => {{
        let first = $first;
        $cpu.regs[usize::from($crate::block::op::RIP)] = $rip.wrapping_sub(u64::from(first.off));
        $crate::block::op::enter!($cpu, first)
    }};
}

/// Goes on at an address in any page.
macro_rules! dispatch {
    ($cpu:expr, $rip:expr) => {{
        let rip = $rip;
        match $cpu.blocks.jump(rip) {
            Some(first) => $crate::block::op::enter_page!($cpu, rip, first),
            None => {
                $cpu.regs[usize::from($crate::block::op::RIP)] = rip;
                return $crate::block::op::OpPtr::NULL;
            }
        }
    }};
}

/// Unwraps a `Result<_, Fault>`, or leaves the block with the exception that is pending.
macro_rules! check {
    ($cpu:expr, $op:expr, $result:expr) => {
        match $result {
            Ok(value) => value,
            Err($crate::cpu::Fault) => return $crate::block::op::fault($cpu, $op),
        }
    };
}

pub(crate) use {check, dispatch, enter, enter_apart, enter_page, go, next};

/// The instruction did not complete: RIP points to it again, and it does not count as executed.
#[cold]
#[inline(never)]
pub(crate) fn fault(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let rip = cpu.regs[usize::from(RIP)].wrapping_add(u64::from(op.off));
    cpu.regs[usize::from(RIP)] = rip & cpu.rip_mask;
    cpu.fuel += i64::from(op.left);
    cpu.stack_fault(op.x & X_STACK != 0);
    OpPtr::NULL
}

/// The block was not entered: its instructions exceed the budget, or it was dropped. RIP points to it.
#[cold]
#[inline(never)]
pub(crate) fn not_entered(cpu: &mut Cpu, first: OpPtr) -> OpPtr {
    let rip = cpu.regs[usize::from(RIP)].wrapping_add(u64::from(first.off));
    cpu.regs[usize::from(RIP)] = rip & cpu.rip_mask;
    cpu.fuel += i64::from(first.left);
    OpPtr::NULL
}

/// Returns its argument. Keeps the compiler from inlining the handler, and from merging the jump that follows with the
/// same jump at another place: on their own they are predicted better.
#[inline(always)]
pub(crate) fn apart(mut handler: Handler) -> Handler {
    #[cfg(target_arch = "x86_64")]
    #[expect(clippy::pointers_in_nomem_asm_block, reason = "it is not followed")]
    // SAFETY: no instruction.
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) handler, options(nomem, nostack, preserves_flags));
    }
    handler
}

/// Leaves the block after an instruction that completed, with RIP behind it.
#[inline(always)]
pub(crate) fn leave(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let rip = cpu.regs[usize::from(RIP)].wrapping_add(u64::from(op.off) + u64::from(op.len));
    cpu.regs[usize::from(RIP)] = rip & cpu.rip_mask;
    cpu.fuel += i64::from(op.left) - 1;
    OpPtr::NULL
}

/// Runs blocks from `first` on, which is at RIP, until one leaves.
#[inline(never)]
pub(crate) fn execute(cpu: &mut Cpu, first: OpPtr) {
    let mut op = first;
    cpu.regs[usize::from(RIP)] = cpu.regs[usize::from(RIP)].wrapping_sub(u64::from(first.off));
    while !op.is_null() {
        op = (op.handler.get())(cpu, op);
    }
}
