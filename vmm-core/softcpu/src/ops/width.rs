//! Operand sizes.

use crate::cpu::Cpu;

/// A power-of-two operand size. Values travel as zero-extended `u64`.
pub(crate) trait Width: Copy + 'static {
    const BITS: u32;
    const BYTES: u64 = Self::BITS as u64 / 8;
    const MASK: u64 = u64::MAX >> (64 - Self::BITS);
    /// Reads a register by its encoded number (see [`crate::block::op`]).
    fn get(cpu: &Cpu, reg: u8) -> u64;
    /// Writes a register; upper bits of `value` are ignored, those of the register follow the
    /// architecture (a 32-bit write clears them, smaller ones keep them).
    fn set(cpu: &mut Cpu, reg: u8, value: u64);
    /// Sign-extends.
    fn sx(value: u64) -> i64;
    /// Zero-extends.
    #[inline(always)]
    fn zx(value: u64) -> u64 {
        value & Self::MASK
    }
    /// The most significant bit.
    #[inline(always)]
    fn msb(value: u64) -> bool {
        value >> (Self::BITS - 1) & 1 != 0
    }
}

impl Width for u8 {
    const BITS: u32 = 8;
    #[inline(always)]
    fn get(cpu: &Cpu, reg: u8) -> u64 {
        // Bit 4 selects the second byte (AH to BH).
        (cpu.regs[usize::from(reg & 15)] >> ((reg & 16) >> 1)) & 0xff
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, reg: u8, value: u64) {
        let shift = (reg & 16) >> 1;
        let r = &mut cpu.regs[usize::from(reg & 15)];
        *r = *r & !(0xff << shift) | (value & 0xff) << shift;
    }
    #[inline(always)]
    fn sx(value: u64) -> i64 {
        i64::from(value as i8)
    }
}

impl Width for u16 {
    const BITS: u32 = 16;
    #[inline(always)]
    fn get(cpu: &Cpu, reg: u8) -> u64 {
        cpu.regs[usize::from(reg)] & 0xffff
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, reg: u8, value: u64) {
        let r = &mut cpu.regs[usize::from(reg)];
        *r = *r & !0xffff | value & 0xffff;
    }
    #[inline(always)]
    fn sx(value: u64) -> i64 {
        i64::from(value as i16)
    }
}

impl Width for u32 {
    const BITS: u32 = 32;
    #[inline(always)]
    fn get(cpu: &Cpu, reg: u8) -> u64 {
        cpu.regs[usize::from(reg)] & 0xffff_ffff
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, reg: u8, value: u64) {
        cpu.regs[usize::from(reg)] = value & 0xffff_ffff;
    }
    #[inline(always)]
    fn sx(value: u64) -> i64 {
        i64::from(value as i32)
    }
}

impl Width for u64 {
    const BITS: u32 = 64;
    #[inline(always)]
    fn get(cpu: &Cpu, reg: u8) -> u64 {
        cpu.regs[usize::from(reg)]
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, reg: u8, value: u64) {
        cpu.regs[usize::from(reg)] = value;
    }
    #[inline(always)]
    fn sx(value: u64) -> i64 {
        value as i64
    }
}
