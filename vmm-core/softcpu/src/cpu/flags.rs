//! Lazy status flags.
//!
//! Most instructions that write CF, PF, AF, ZF, SF and OF are followed by another that overwrites them
//! unread. So an instruction only records its result, one operand and how to compute the flags from them.

use super::Cpu;
use crate::ops::width::Width;

pub(crate) const CF: u64 = 1 << 0;
pub(crate) const PF: u64 = 1 << 2;
pub(crate) const AF: u64 = 1 << 4;
pub(crate) const ZF: u64 = 1 << 6;
pub(crate) const SF: u64 = 1 << 7;
pub(crate) const TF: u64 = 1 << 8;
pub(crate) const IF: u64 = 1 << 9;
pub(crate) const DF: u64 = 1 << 10;
pub(crate) const OF: u64 = 1 << 11;
pub(crate) const IOPL: u64 = 3 << 12;
pub(crate) const NT: u64 = 1 << 14;
pub(crate) const RF: u64 = 1 << 16;
pub(crate) const VM: u64 = 1 << 17;
pub(crate) const AC: u64 = 1 << 18;
pub(crate) const ID: u64 = 1 << 21;

/// The flags that are kept lazily.
pub(crate) const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// How to compute the status flags from `result` and `operand`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// `operand` holds all of them, in their RFLAGS positions.
    Known,
    /// `result = x + operand`.
    Add,
    /// `result = x - operand`.
    Sub,
    /// A logical operation: CF, AF and OF are clear.
    Logic,
    /// `result = x + 1`; `operand` holds CF.
    Inc,
    /// `result = x - 1`; `operand` holds CF.
    Dec,
    /// PF, ZF and SF follow from the result; `operand` holds CF, AF and OF in their RFLAGS positions.
    Partial,
}

/// The record. Bits of `result` and `operand` above the operand size are arbitrary.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Lazy {
    pub result: u64,
    pub operand: u64,
    pub kind: Kind,
    /// 64 minus the operand size in bits.
    pub shift: u8,
}

impl Default for Lazy {
    fn default() -> Self {
        Self { result: 0, operand: 0, kind: Kind::Known, shift: 0 }
    }
}

impl Lazy {
    #[inline(always)]
    pub fn cf(&self) -> bool {
        match self.kind {
            Kind::Add => (self.result << self.shift) < (self.operand << self.shift),
            Kind::Sub => {
                (self.result.wrapping_add(self.operand) << self.shift) < (self.operand << self.shift)
            }
            Kind::Logic => false,
            Kind::Known | Kind::Inc | Kind::Dec | Kind::Partial => self.operand & CF != 0,
        }
    }

    #[inline(always)]
    pub fn zf(&self) -> bool {
        match self.kind {
            Kind::Known => self.operand & ZF != 0,
            _ => self.result << self.shift == 0,
        }
    }

    #[inline(always)]
    pub fn sf(&self) -> bool {
        match self.kind {
            Kind::Known => self.operand & SF != 0,
            _ => ((self.result << self.shift) as i64) < 0,
        }
    }

    #[inline(always)]
    pub fn pf(&self) -> bool {
        match self.kind {
            Kind::Known => self.operand & PF != 0,
            _ => (self.result as u8).count_ones() & 1 == 0,
        }
    }

    #[inline(always)]
    pub fn of(&self) -> bool {
        let (r, b) = (self.result, self.operand);
        match self.kind {
            Kind::Known | Kind::Partial => b & OF != 0,
            Kind::Add => {
                let a = r.wrapping_sub(b);
                ((((a ^ r) & (b ^ r)) << self.shift) as i64) < 0
            }
            Kind::Sub => {
                let a = r.wrapping_add(b);
                ((((a ^ b) & (a ^ r)) << self.shift) as i64) < 0
            }
            Kind::Logic => false,
            Kind::Inc => r << self.shift == 1 << 63,
            Kind::Dec => r << self.shift == (u64::MAX >> 1) & (u64::MAX << self.shift),
        }
    }

    #[inline]
    pub fn af(&self) -> bool {
        let (r, b) = (self.result, self.operand);
        match self.kind {
            Kind::Known | Kind::Partial => b & AF != 0,
            Kind::Add => (r.wrapping_sub(b) ^ b ^ r) & AF != 0,
            Kind::Sub => (r.wrapping_add(b) ^ b ^ r) & AF != 0,
            Kind::Logic => false,
            Kind::Inc => r & 15 == 0,
            Kind::Dec => r & 15 == 15,
        }
    }

    /// All status flags in their RFLAGS positions.
    pub fn all(&self) -> u64 {
        if self.kind == Kind::Known {
            return self.operand & STATUS;
        }
        let bit = |set: bool, flag: u64| if set { flag } else { 0 };
        bit(self.cf(), CF)
            | bit(self.pf(), PF)
            | bit(self.af(), AF)
            | bit(self.zf(), ZF)
            | bit(self.sf(), SF)
            | bit(self.of(), OF)
    }

    /// Evaluates condition code `C` of Jcc, SETcc and CMOVcc.
    #[inline(always)]
    pub fn condition<const C: u8>(&self) -> bool {
        let value = match C >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.less(),
            _ => self.zf() || self.less(),
        };
        value ^ (C & 1 != 0)
    }

    /// SF != OF.
    #[inline(always)]
    fn less(&self) -> bool {
        match self.kind {
            Kind::Sub => {
                let a = self.result.wrapping_add(self.operand);
                ((a << self.shift) as i64) < ((self.operand << self.shift) as i64)
            }
            Kind::Logic => self.sf(),
            _ => self.sf() != self.of(),
        }
    }
}

impl Cpu {
    /// Records how to compute the status flags.
    #[inline(always)]
    pub(crate) fn set_lazy<T: Width>(&mut self, kind: Kind, result: u64, operand: u64) {
        self.lazy = Lazy { result, operand, kind, shift: (64 - T::BITS) as u8 };
    }

    /// Sets all status flags, given in their RFLAGS positions (COMISS, PTEST, SAHF).
    #[inline]
    pub(crate) fn set_status_flags(&mut self, flags: u64) {
        self.lazy = Lazy { result: 0, operand: flags, kind: Kind::Known, shift: 0 };
    }

    /// The status flags in their RFLAGS positions.
    #[inline]
    pub(crate) fn status_flags(&self) -> u64 {
        self.lazy.all()
    }

    /// Sets or clears one status flag and keeps the others.
    #[inline]
    pub(crate) fn set_one_flag(&mut self, flag: u64, set: bool) {
        let others = self.status_flags() & !flag;
        self.set_status_flags(others | if set { flag } else { 0 });
    }

    /// All of RFLAGS.
    #[inline]
    pub(crate) fn rflags(&self) -> u64 {
        self.flags & !STATUS | self.lazy.all() | 2
    }

    /// Replaces RFLAGS.
    #[inline]
    pub(crate) fn set_rflags(&mut self, value: u64) {
        self.flags = value & !STATUS | 2;
        self.set_status_flags(value & STATUS);
    }
}
