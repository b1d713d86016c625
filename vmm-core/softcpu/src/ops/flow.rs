//! Near transfers of control.

use super::ea::Ea;
use super::width::Width;
use crate::block::op::{OpPtr, RIP, check, dispatch, enter, enter_apart, enter_page, go};
use crate::cpu::segment::canonical;
use crate::cpu::{Cpu, seg};
use crate::mmu::{General, Reach, reach};

/// Goes to a block in the same page: directly if the operation is linked already.
macro_rules! follow {
    ($cpu:expr, $op:expr) => {{
        let link = $op.imm.get();
        if link != 0 {
            enter!($cpu, OpPtr::from_link(link));
        }
        return find_link($cpu, $op);
    }};
}

/// Goes to an address in any page, after the checks that are due. Where a block is the address is canonical.
macro_rules! go_to {
    ($t:ident, $cpu:expr, $op:expr, $target:expr) => {{
        let target = $target;
        if $t::BITS < 64 && out_of_reach::<$t>($cpu, target) {
            return not_canonical($cpu, $op);
        }
        match $cpu.blocks.jump(target) {
            Some(first) => enter_page!($cpu, target, first),
            None => return unknown::<$t>($cpu, $op, target),
        }
    }};
}

/// Pushes the return address and goes to an address in 64-bit mode.
macro_rules! call64_to {
    ($r:ident, $cpu:expr, $op:expr, $target:expr, $general:expr) => {{
        let target = $target;
        let known = $cpu.blocks.jump(target);
        if known.is_none() && !canonical(target) {
            return not_canonical($cpu, $op);
        }
        let sp = $cpu.regs[4].wrapping_sub(8);
        let back = return_address($cpu, $op);
        reach!($r, $cpu, $op, $r::st::<u64>($cpu, sp, back), $general);
        $cpu.regs[4] = sp;
        match known {
            Some(first) => enter_page!($cpu, target, first),
            None => {
                $cpu.regs[usize::from(RIP)] = target;
                return OpPtr::NULL;
            }
        }
    }};
}

/// Links an operation to the block that it leads to if that is known, and goes there.
#[cold]
#[inline(never)]
fn find_link(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let page = cpu.regs[usize::from(RIP)];
    let rip = page.wrapping_add(op.disp as i64 as u64) & cpu.rip_mask;
    if let Some(block) = cpu.blocks.block_at(rip) {
        op.imm.set(block.first().as_link());
    }
    dispatch!(cpu, rip)
}

/// Mask of the instruction pointer: by operand size outside of 64-bit mode.
#[inline(always)]
const fn mask<T: Width>() -> u64 {
    T::MASK
}

/// JMP, and the end of a block that just goes on: to the same page.
pub(crate) fn jump_near(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    follow!(cpu, op)
}

/// JMP to another page: `disp` is relative to the following instruction.
pub(crate) fn jump_far<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let target = return_address(cpu, op).wrapping_add(op.disp as i64 as u64) & mask::<T>();
    go_to!(T, cpu, op, target)
}

/// Jcc. `disp` leads to the target; the following operation is the jump to the next instruction.
pub(crate) fn jcc_near<const C: u8>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    if cpu.lazy.condition::<C>() {
        follow!(cpu, op)
    }
    not_taken(cpu, op)
}

pub(crate) fn jcc_far<T: Width, const C: u8>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    if cpu.lazy.condition::<C>() {
        return jump_far::<T>(cpu, op);
    }
    not_taken(cpu, op)
}

/// Goes to the instruction after a conditional jump.
#[inline(always)]
fn not_taken(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let other = op.following();
    let link = other.imm.get();
    if link != 0 {
        enter_apart!(cpu, OpPtr::from_link(link));
    }
    go!(cpu, other)
}

#[cold]
#[inline(never)]
fn not_canonical(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    cpu.gp();
    crate::block::op::fault(cpu, op)
}

/// Whether a near branch to `target` faults: the address is not canonical, or beyond the limit of CS.
#[inline(always)]
fn out_of_reach<T: Width>(cpu: &Cpu, target: u64) -> bool {
    if T::BITS == 64 {
        !canonical(target)
    } else {
        !cpu.code64 && target > u64::from(cpu.segs[seg::CS].limit)
    }
}

/// Leaves for an address where no block is known.
#[cold]
#[inline(never)]
fn unknown<T: Width>(cpu: &mut Cpu, op: OpPtr, target: u64) -> OpPtr {
    if out_of_reach::<T>(cpu, target) {
        return not_canonical(cpu, op);
    }
    cpu.regs[usize::from(RIP)] = target;
    OpPtr::NULL
}

#[inline(always)]
fn return_address(cpu: &Cpu, op: OpPtr) -> u64 {
    cpu.regs[usize::from(RIP)].wrapping_add(u64::from(op.off) + u64::from(op.len))
}

/// CALL in 64-bit mode to the same page.
pub(crate) fn call64_near<R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let sp = cpu.regs[4].wrapping_sub(8);
    let back = return_address(cpu, op);
    reach!(R, cpu, op, R::st::<u64>(cpu, sp, back), call64_near::<General>);
    cpu.regs[4] = sp;
    follow!(cpu, op)
}

/// CALL in 64-bit mode to another page.
pub(crate) fn call64_far<R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let target = return_address(cpu, op).wrapping_add(op.disp as i64 as u64);
    call64_to!(R, cpu, op, target, call64_far::<General>)
}

/// CALL in 64-bit mode to an address in a register.
pub(crate) fn call64_reg<R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let target = cpu.regs[usize::from(op.r1)];
    call64_to!(R, cpu, op, target, call64_reg::<General>)
}

/// CALL outside of 64-bit mode to the same page.
pub(crate) fn call_near<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let back = return_address(cpu, op);
    check!(cpu, op, cpu.push::<T>(back));
    follow!(cpu, op)
}

/// CALL outside of 64-bit mode to another page, or with a 16-bit operand.
pub(crate) fn call_far<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let back = return_address(cpu, op);
    check!(cpu, op, cpu.push::<T>(back));
    dispatch!(cpu, back.wrapping_add(op.disp as i64 as u64) & mask::<T>())
}

/// RET in 64-bit mode; `imm` is the number of bytes to release.
pub(crate) fn ret64<R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let sp = cpu.regs[4];
    let target = reach!(R, cpu, op, R::ld::<u64>(cpu, sp), ret64::<General>);
    let Some(first) = cpu.blocks.jump(target) else { return ret64_unknown(cpu, op, target) };
    cpu.regs[4] = sp.wrapping_add(8).wrapping_add(op.imm.get());
    enter_page!(cpu, target, first)
}

#[cold]
#[inline(never)]
fn ret64_unknown(cpu: &mut Cpu, op: OpPtr, target: u64) -> OpPtr {
    if !canonical(target) {
        return not_canonical(cpu, op);
    }
    cpu.regs[4] = cpu.regs[4].wrapping_add(8).wrapping_add(op.imm.get());
    cpu.regs[usize::from(RIP)] = target;
    OpPtr::NULL
}

/// RET otherwise.
pub(crate) fn ret_legacy<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let before = cpu.regs[4];
    let target = check!(cpu, op, cpu.pop::<T>());
    if out_of_reach::<T>(cpu, target) {
        cpu.regs[4] = before;
        return not_canonical(cpu, op);
    }
    let sp = cpu.regs[4].wrapping_add(op.imm.get());
    cpu.set_sp(sp);
    dispatch!(cpu, target)
}

/// JMP to an address in a register.
pub(crate) fn jump_reg<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    go_to!(T, cpu, op, T::get(cpu, op.r1))
}

/// JMP to an address in memory.
pub(crate) fn jump_mem<T: Width, E: Ea, R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let target = reach!(R, cpu, op, R::ld::<T>(cpu, address), jump_mem::<T, E, General>);
    go_to!(T, cpu, op, target)
}

/// CALL to an address in a register, otherwise.
pub(crate) fn call_reg<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let target = T::get(cpu, op.r1);
    let back = return_address(cpu, op);
    if out_of_reach::<T>(cpu, target) {
        return not_canonical(cpu, op);
    }
    check!(cpu, op, cpu.push::<T>(back));
    dispatch!(cpu, target)
}

/// CALL to an address in memory.
pub(crate) fn call_mem<T: Width, E: Ea>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let target = check!(cpu, op, cpu.ld::<T>(address));
    let back = return_address(cpu, op);
    if out_of_reach::<T>(cpu, target) {
        return not_canonical(cpu, op);
    }
    check!(cpu, op, cpu.push::<T>(back));
    dispatch!(cpu, target)
}

/// LOOP, LOOPE, LOOPNE and JCXZ. `r1` selects which, `r2` is the address size in bytes; `disp` is relative
/// to the page, `scale` holds the operand size in bytes.
pub(crate) fn count_jump(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let mask = u64::MAX >> (64 - 8 * u32::from(op.r2));
    let mut count = cpu.regs[1] & mask;
    if op.r1 < 3 {
        count = count.wrapping_sub(1) & mask;
        cpu.regs[1] = if op.r2 == 2 { cpu.regs[1] & !mask | count } else { count };
    }
    let taken = match op.r1 {
        0 => count != 0,
        1 => count != 0 && cpu.lazy.zf(),
        2 => count != 0 && !cpu.lazy.zf(),
        _ => count == 0,
    };
    let by = if taken { op.disp as i64 as u64 } else { u64::from(op.off) + u64::from(op.len) };
    let mask = if taken { u64::MAX >> (64 - 8 * u32::from(op.scale)) } else { cpu.rip_mask };
    let target = cpu.regs[usize::from(RIP)].wrapping_add(by) & mask;
    dispatch!(cpu, target)
}
