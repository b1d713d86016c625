//! Keeps the guest's x87 state and MXCSR in the host's registers from one instruction to the next.
//!
//! Switching them costs more than most instructions that use them. Rust code between two guest instructions
//! touches neither the x87 unit nor floating point, so they can stay until something foreign runs: a device,
//! the program that embeds the processor. The processor calls [`Resident::settle`] before that.
//!
//! Only state with all exceptions masked becomes resident; the host would trap otherwise.

use std::arch::asm;

use super::fpu::{EXCEPTIONS, MXCSR_MASKS};
use crate::state::FpuState;

/// What of the guest's state the host's registers hold. While `x87` is set, the control word of the
/// [`FpuState`] is right and the summary bit of
/// the status word are right and the other x87 fields are stale, except for the last instruction's pointers;
/// while `mxcsr` is set, its control bits are right and its flags are stale.
#[derive(Debug, Default)]
pub(crate) struct Resident {
    x87: bool,
    mxcsr: bool,
    host_mxcsr: u32,
}

impl Resident {
    /// Where generated code finds whether MXCSR is resident: a byte that is not 0 then.
    #[cfg(feature = "native")]
    pub(crate) const MXCSR: usize = std::mem::offset_of!(Self, mxcsr);

    /// Moves what is resident back to `fpu` and gives the host's registers back to the host.
    #[inline(always)]
    pub(crate) fn settle(&mut self, fpu: &mut FpuState) {
        if self.x87 || self.mxcsr {
            self.settle_resident(fpu);
        }
    }

    #[cold]
    #[inline(never)]
    fn settle_resident(&mut self, fpu: &mut FpuState) {
        if self.x87 {
            let mut saved = FpuState::default();
            // SAFETY: the area is aligned and large enough. The unit is left as the calling convention
            // wants it: empty, with the default control word.
            unsafe { asm!("fxsave64 [{}]", "fninit", in(reg) &raw mut saved) };
            (fpu.fcw, fpu.fsw, fpu.ftw, fpu.st) = (saved.fcw, saved.fsw, saved.ftw, saved.st);
            self.x87 = false;
        }
        if self.mxcsr {
            // SAFETY: `host_mxcsr` is what the host had before.
            unsafe {
                asm!(
                    "stmxcsr [{guest}]",
                    "ldmxcsr [{host}]",
                    guest = in(reg) &raw mut fpu.mxcsr,
                    host = in(reg) &raw const self.host_mxcsr,
                );
            }
            self.mxcsr = false;
        }
    }

    /// Makes MXCSR resident; `false` if an exception is not masked.
    #[inline(always)]
    pub(super) fn enter_mxcsr(&mut self, fpu: &FpuState) -> bool {
        if self.mxcsr {
            return true;
        }
        if fpu.mxcsr & MXCSR_MASKS != MXCSR_MASKS {
            return false;
        }
        // SAFETY: all exceptions are masked, reserved bits were refused when the guest set the register, and
        // `settle` restores the host's value.
        unsafe {
            asm!(
                "stmxcsr [{host}]",
                "ldmxcsr [{guest}]",
                host = in(reg) &raw mut self.host_mxcsr,
                guest = in(reg) &raw const fpu.mxcsr,
            );
        }
        self.mxcsr = true;
        true
    }

    /// Makes the x87 state resident; `false` if an exception is not masked.
    #[inline(always)]
    pub(super) fn enter_x87(&mut self, fpu: &mut FpuState) -> bool {
        if self.x87 {
            return true;
        }
        if fpu.fcw & EXCEPTIONS != EXCEPTIONS {
            return false;
        }
        // A summary bit without unmasked exceptions, as software may have loaded it.
        fpu.update_summary();
        self.load_x87(fpu);
        true
    }

    #[cold]
    #[inline(never)]
    fn load_x87(&mut self, fpu: &mut FpuState) {
        let mut mxcsr = 0u32;
        // SAFETY: the area is valid; FXRSTOR also loads XMM registers, which a call clobbers anyway, and
        // MXCSR, which is put back.
        unsafe {
            asm!(
                "stmxcsr [{mxcsr}]",
                "fxrstor64 [{area}]",
                "ldmxcsr [{mxcsr}]",
                mxcsr = in(reg) &raw mut mxcsr,
                area = in(reg) std::ptr::from_mut(fpu),
                clobber_abi("sysv64"),
            );
        }
        self.x87 = true;
    }

    /// The x87 status word.
    pub(super) fn status_word(&self, fpu: &FpuState) -> u16 {
        if !self.x87 {
            return fpu.fsw;
        }
        let status: u16;
        // SAFETY: reads a register.
        unsafe { asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags)) };
        status
    }

    /// Sets the x87 control word, in the host too if the state is resident and can stay so.
    pub(super) fn set_control_word(&mut self, fpu: &mut FpuState, value: u16) {
        if value & EXCEPTIONS != EXCEPTIONS {
            self.settle(fpu);
        }
        fpu.fcw = value;
        if self.x87 {
            // SAFETY: all exceptions are masked in the new value.
            unsafe { asm!("fldcw [{}]", in(reg) &raw const fpu.fcw, options(nostack, preserves_flags)) };
        } else {
            fpu.update_summary();
        }
    }
}
