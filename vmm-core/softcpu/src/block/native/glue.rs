//! Code that all translated blocks share: the way in and out, and the search for the next block.

use std::io;
use std::mem::offset_of;
use std::panic::{AssertUnwindSafe, catch_unwind};

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};

use super::super::cache::layout;
use super::super::op::{Op, OpPtr, RIP};
use crate::cpu::Cpu;
use crate::hostop::Arena;

/// Enters generated code at an address; returns the operation that the interpreter goes on with, or null.
pub(super) type Trampoline = unsafe extern "sysv64" fn(*mut Cpu, u64) -> OpPtr;

/// Where the parts are.
#[derive(Clone, Copy)]
pub(super) struct Glue {
    pub trampoline: Trampoline,
    /// Goes back to the interpreter with the operation in R14.
    pub leave: u64,
    /// Lets the interpreter execute the operation in R14 alone. To be called.
    pub call_op: u64,
    /// The same; afterwards the host's flags are the guest's.
    pub call_op_flags: u64,
    /// Looks the block at the address in R14 up: its first operation in R14 and the address in R13, or ZF. To be called.
    pub lookup: u64,
    /// Goes to the block whose first operation is in R14 and whose address is in R13.
    pub enter_page: u64,
    /// Goes to the block that the operation in R13 is linked to, or back to the interpreter with that operation.
    pub follow_link: u64,
    /// The budget does not suffice for the block whose first operation is in R14, and was reduced already.
    pub not_entered: u64,
}

/// Offset of a register of the guest.
pub(super) const fn register(number: u8) -> i32 {
    8 * number as i32
}

pub(super) const RIP_SLOT: i32 = register(RIP);
pub(super) const FUEL: i32 = offset_of!(Cpu, fuel) as i32;
pub(super) const TABLE: i32 = offset_of!(Cpu, table) as i32;
pub(super) const NEXT: i32 = offset_of!(Cpu, native.next) as i32;
pub(super) const TARGET: i32 = offset_of!(Cpu, native.target) as i32;
pub(super) const ADDRESS: i32 = offset_of!(Cpu, native.address) as i32;
pub(super) const CONDITIONS: i32 = offset_of!(Cpu, native.conditions) as i32;
const FLAGS: i32 = offset_of!(Cpu, native.flags) as i32;
const ENTER: i32 = offset_of!(Cpu, native.enter) as i32;
const BLOCKS: i32 = offset_of!(Cpu, blocks) as i32;
pub(super) const OP_IMM: i32 = offset_of!(Op, imm) as i32;
const OP_HANDLER: i32 = offset_of!(Op, handler) as i32;
const OP_OFF: i32 = offset_of!(Op, off) as i32;
const OP_LEFT: i32 = offset_of!(Op, left) as i32;
pub(super) const OP_SIZE: u64 = size_of::<Op>() as u64;

/// Registers of the host that hold registers of the guest, and which. The processor's address is in R15; R13 and R14 are
/// free for use within an instruction. The other registers of the guest stay in [`Cpu::regs`].
const HELD: [(AsmRegister64, u8); 12] = [
    (rcx, 1),
    (rdx, 2),
    (rbx, 3),
    (r12, 4),
    (rbp, 5),
    (rsi, 6),
    (rdi, 7),
    (r8, 8),
    (r9, 9),
    (r10, 10),
    (r11, 11),
    (rax, 0),
];

const SAVED: [AsmRegister64; 6] = [rbx, rbp, r12, r13, r14, r15];

fn at(offset: i32) -> AsmMemoryOperand {
    qword_ptr(r15 + offset)
}

/// Lets the interpreter execute one operation.
///
/// # Safety
/// `cpu` must be the processor that runs the generated code, `op` one of its block's operations.
unsafe extern "sysv64" fn call_op(cpu: *mut Cpu, op: OpPtr) -> OpPtr {
    // SAFETY: generated code got the pointer from `enter`, which has borrowed the processor and waits.
    let cpu = unsafe { &mut *cpu };
    match catch_unwind(AssertUnwindSafe(|| (op.handler.get())(cpu, op))) {
        Ok(next) => next,
        Err(panic) => {
            // Generated code has no frames that could be unwound.
            cpu.native.panic = Some(panic);
            OpPtr::NULL
        }
    }
}

/// The same, and leaves RFLAGS for generated code.
///
/// # Safety
/// As [`call_op`].
unsafe extern "sysv64" fn call_op_flags(cpu: *mut Cpu, op: OpPtr) -> OpPtr {
    // SAFETY: as promised.
    let next = unsafe { call_op(cpu, op) };
    // SAFETY: as in `call_op`.
    let cpu = unsafe { &mut *cpu };
    cpu.native.flags = cpu.status_flags() | 0x202;
    next
}

impl Glue {
    pub fn generate(arena: &mut Arena) -> io::Result<Self> {
        let ip = arena.next_address();
        let (code, labels) = assemble(ip).map_err(io::Error::other)?;
        arena.append(&code)?;
        let [trampoline, leave, call_op, call_op_flags, lookup, enter_page, follow_link, not_entered] =
            labels;
        Ok(Self {
            // SAFETY: the code at the address follows the calling convention of the type.
            trampoline: unsafe { std::mem::transmute::<usize, Trampoline>(trampoline as usize) },
            leave,
            call_op,
            call_op_flags,
            lookup,
            enter_page,
            follow_link,
            not_entered,
        })
    }
}

fn assemble(ip: u64) -> Result<(Vec<u8>, [u64; 8]), IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut labels: [CodeLabel; 8] = std::array::from_fn(|_| a.create_label());
    let [trampoline, leave, call, call_flags, lookup, enter_page, follow_link, not_entered] = &mut labels;
    let mut leave_stored = a.create_label();
    let mut enter_block = a.create_label();

    a.set_label(trampoline)?;
    SAVED.iter().try_for_each(|&r| a.push(r))?;
    a.sub(rsp, 8)?;
    a.mov(r15, rdi)?;
    a.mov(r13, rsi)?;
    HELD.iter().try_for_each(|&(r, n)| a.mov(r, at(register(n))))?;
    a.jmp(r13)?;

    a.set_label(leave)?;
    HELD.iter().try_for_each(|&(r, n)| a.mov(at(register(n)), r))?;
    a.set_label(&mut leave_stored)?;
    a.mov(rax, r14)?;
    a.add(rsp, 8)?;
    SAVED.iter().rev().try_for_each(|&r| a.pop(r))?;
    a.ret()?;

    for (label, function, flags) in
        [(call, call_op as *const () as u64, false), (call_flags, call_op_flags as *const () as u64, true)]
    {
        let mut bail = a.create_label();
        a.set_label(label)?;
        HELD.iter().try_for_each(|&(r, n)| a.mov(at(register(n)), r))?;
        a.push(r14)?;
        a.mov(rdi, r15)?;
        a.mov(rsi, r14)?;
        a.mov(rax, function)?;
        a.call(rax)?;
        a.pop(r14)?;
        a.add(r14, OP_SIZE as i32)?;
        a.cmp(rax, r14)?;
        a.jne(bail)?;
        HELD.iter().try_for_each(|&(r, n)| a.mov(r, at(register(n))))?;
        if flags {
            a.push(at(FLAGS))?;
            a.popfq()?;
        }
        a.ret()?;
        a.set_label(&mut bail)?;
        a.add(rsp, 8)?;
        a.mov(r14, rax)?;
        a.jmp(leave_stored)?;
    }

    let mut miss = a.create_label();
    a.set_label(lookup)?;
    a.mov(r13, r14)?;
    a.shr(r13, 12)?;
    a.xor(r13, r14)?;
    a.and(r13d, layout::JUMP_MASK)?;
    a.shl(r13, layout::JUMP_SHIFT)?;
    a.add(r13, at(BLOCKS + layout::JUMPS_AT))?;
    a.cmp(qword_ptr(r13 + layout::JUMP_RIP), r14)?;
    a.jne(miss)?;
    a.mov(at(TARGET), r14)?;
    a.mov(r14d, dword_ptr(r13 + layout::JUMP_KEY))?;
    a.and(r14d, 1)?;
    a.mov(r14, qword_ptr(r15 + r14 * 8 + (BLOCKS + layout::KEYS)))?;
    a.cmp(r14, qword_ptr(r13 + layout::JUMP_KEY))?;
    a.jne(miss)?;
    a.mov(r14, qword_ptr(r13 + layout::JUMP_FIRST))?;
    a.mov(r13, at(TARGET))?;
    a.test(r14, r14)?;
    a.ret()?;
    a.set_label(&mut miss)?;
    a.xor(r14d, r14d)?;
    a.ret()?;

    a.set_label(enter_page)?;
    a.mov(at(RIP_SLOT), r13)?;
    a.movzx(r13d, word_ptr(r14 + OP_OFF))?;
    a.sub(at(RIP_SLOT), r13)?;
    a.set_label(&mut enter_block)?;
    a.movzx(r13d, byte_ptr(r14 + OP_LEFT))?;
    a.sub(at(FUEL), r13)?;
    a.js(*not_entered)?;
    a.mov(r13, qword_ptr(r14 + OP_HANDLER))?;
    a.cmp(r13, at(ENTER))?;
    a.jne(*leave)?;
    a.jmp(qword_ptr(r14 + OP_IMM))?;

    a.set_label(follow_link)?;
    a.mov(r14, qword_ptr(r13 + OP_IMM))?;
    a.test(r14, r14)?;
    a.jne(enter_block)?;
    a.mov(r14, r13)?;
    a.jmp(*leave)?;

    a.set_label(not_entered)?;
    a.movzx(r13d, word_ptr(r14 + OP_OFF))?;
    a.add(at(RIP_SLOT), r13)?;
    a.movzx(r13d, byte_ptr(r14 + OP_LEFT))?;
    a.add(at(FUEL), r13)?;
    a.xor(r14d, r14d)?;
    a.jmp(*leave)?;

    let result = a.assemble_options(ip, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let mut addresses = [0; 8];
    for (address, label) in addresses.iter_mut().zip(&labels) {
        *address = result.label_ip(label)?;
    }
    Ok((result.inner.code_buffer, addresses))
}
