//! Addresses of memory operands.

use super::width::Width;
use crate::block::op::{OpPtr, X_ADDR16, X_ADDR32};
use crate::cpu::{Cpu, Fault, seg, vector};
use crate::state::Segment;

/// How the linear address of a memory operand is computed.
pub(crate) trait Ea: 'static {
    fn linear<T: Width>(cpu: &mut Cpu, op: OpPtr, write: bool) -> Result<u64, Fault>;
}

/// 64-bit code with 64-bit addresses.
pub(crate) struct Long;

impl Ea for Long {
    #[inline(always)]
    fn linear<T: Width>(cpu: &mut Cpu, op: OpPtr, _write: bool) -> Result<u64, Fault> {
        Ok(cpu.regs[usize::from(op.base)]
            .wrapping_add(cpu.regs[usize::from(op.index)] << (op.scale & 3))
            .wrapping_add(op.disp as i64 as u64)
            .wrapping_add(cpu.regs[usize::from(op.seg)]))
    }
}

/// The same without segment base.
pub(crate) struct Indexed;

impl Ea for Indexed {
    #[inline(always)]
    fn linear<T: Width>(cpu: &mut Cpu, op: OpPtr, _write: bool) -> Result<u64, Fault> {
        Ok(cpu.regs[usize::from(op.base)]
            .wrapping_add(cpu.regs[usize::from(op.index)] << (op.scale & 3))
            .wrapping_add(op.disp as i64 as u64))
    }
}

/// The same without index and segment base.
pub(crate) struct Base;

impl Ea for Base {
    #[inline(always)]
    fn linear<T: Width>(cpu: &mut Cpu, op: OpPtr, _write: bool) -> Result<u64, Fault> {
        Ok(cpu.regs[usize::from(op.base)].wrapping_add(op.disp as i64 as u64))
    }
}

/// Everything else: segmentation, 16- and 32-bit addresses.
pub(crate) struct Legacy;

impl Ea for Legacy {
    #[inline(always)]
    fn linear<T: Width>(cpu: &mut Cpu, op: OpPtr, write: bool) -> Result<u64, Fault> {
        cpu.legacy_address(op, T::BYTES, write)
    }
}

impl Cpu {
    /// Offset of a memory operand within its segment.
    pub(crate) fn legacy_offset(&self, op: OpPtr) -> u64 {
        let offset = self.regs[usize::from(op.base)]
            .wrapping_add(self.regs[usize::from(op.index)] << (op.scale & 3))
            .wrapping_add(op.disp as i64 as u64);
        if op.x & X_ADDR16 != 0 {
            offset & 0xffff
        } else if op.x & X_ADDR32 != 0 {
            offset & 0xffff_ffff
        } else {
            offset
        }
    }

    #[inline(never)]
    fn legacy_address(&mut self, op: OpPtr, size: u64, write: bool) -> Result<u64, Fault> {
        let offset = self.legacy_offset(op);
        self.segment_address(usize::from(op.seg), offset, size, write)
    }

    /// Linear address of `offset` in a segment, after the checks that the mode asks for.
    #[inline]
    pub(crate) fn segment_address(
        &mut self,
        segment: usize,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Fault> {
        if self.code64 {
            let base = if segment >= seg::FS { self.segs[segment].base } else { 0 };
            return Ok(base.wrapping_add(offset));
        }
        let s = self.segs[segment];
        if !segment_allows(&s, offset, size, write, self.protected()) {
            let vector = if segment == seg::SS { vector::SS } else { vector::GP };
            return Err(self.raise(vector, Some(0)));
        }
        Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
    }
}

/// Limit and type checks outside of 64-bit mode.
fn segment_allows(s: &Segment, offset: u64, size: u64, write: bool, protected: bool) -> bool {
    let last = offset + (size - 1);
    let a = s.attributes;
    if !protected {
        return last <= u64::from(s.limit);
    }
    if !a.present() || write && (a.is_code() || !a.writable_or_readable()) {
        return false;
    }
    if a.is_code() {
        return a.writable_or_readable() && last <= u64::from(s.limit);
    }
    if a.conforming_or_down() {
        let top = if a.big() { 0xffff_ffff } else { 0xffff };
        offset > u64::from(s.limit) && last <= top
    } else {
        last <= u64::from(s.limit)
    }
}
