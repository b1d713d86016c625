//! Rules of the x87, MMX and SSE state that do not belong to one instruction.

use crate::state::FpuState;

/// Status-word bits that report exceptions (IE, DE, ZE, OE, UE, PE).
pub(crate) const EXCEPTIONS: u16 = 0x3f;
/// Status-word bits ES (error summary) and B (its copy).
pub(crate) const FSW_ES_B: u16 = 0x8080;
/// Status-word field TOP.
pub(crate) const FSW_TOP: u16 = 0x3800;
/// MXCSR exception mask bits.
pub(crate) const MXCSR_MASKS: u32 = 0x1f80;
/// MXCSR exception flag bits.
pub(crate) const MXCSR_FLAGS: u32 = 0x3f;
/// MXCSR underflow flag.
pub(crate) const MXCSR_UE: u32 = 1 << 4;
/// MXCSR underflow mask.
pub(crate) const MXCSR_UM: u32 = 1 << 11;
/// MXCSR flush-to-zero.
pub(crate) const MXCSR_FZ: u32 = 1 << 15;
/// MXCSR bits that the virtual CPU implements; setting another raises `#GP`.
pub(crate) const MXCSR_VALID: u32 = 0xffff;

/// Byte offset of `xmm[0]` within [`FpuState`].
pub(crate) const XMM_OFFSET: usize = 160;

impl FpuState {
    /// The effect of `FNINIT` on the x87 part.
    pub(crate) fn init_x87(&mut self) {
        self.reset_top();
        self.fcw = 0x37f;
        self.fsw = 0;
        self.ftw = 0;
        self.fop = 0;
        self.fip = 0;
        self.fdp = 0;
    }

    /// Clears what no guest can have set, and what the host would refuse to load.
    pub(crate) fn make_valid(&mut self) {
        self.mxcsr &= MXCSR_VALID;
        self.mxcsr_mask = MXCSR_VALID;
        self.fcw = self.fcw & 0x1f3f | 0x40;
        self.fop &= 0x7ff;
        self.update_summary();
    }

    /// Recomputes ES and B from the exception flags and the masks of the control word.
    pub(crate) fn update_summary(&mut self) {
        if self.fsw & !self.fcw & EXCEPTIONS != 0 {
            self.fsw |= FSW_ES_B;
        } else {
            self.fsw &= !FSW_ES_B;
        }
    }

    /// What every MMX instruction but `EMMS` does to the x87 stack: TOP becomes 0 and all
    /// registers valid.
    pub(crate) fn enter_mmx(&mut self) {
        self.reset_top();
        self.ftw = 0xff;
    }

    /// Makes TOP 0; registers keep their physical number, so the stack order rotates.
    pub(crate) fn reset_top(&mut self) {
        let top = usize::from((self.fsw & FSW_TOP) >> 11);
        self.st.rotate_right(top);
        self.fsw &= !FSW_TOP;
    }

    /// The `FXSAVE64` area as bytes.
    pub(crate) fn area(&self) -> &[u8; 512] {
        // SAFETY: the structure is `repr(C)` and starts with the 512-byte area, which has no padding.
        unsafe { &*std::ptr::from_ref(self).cast() }
    }

    /// The `FXSAVE64` area as writable bytes; every bit pattern is a valid value of the fields.
    pub(crate) fn area_mut(&mut self) -> &mut [u8; 512] {
        // SAFETY: as in `area`; all fields are plain integers.
        unsafe { &mut *std::ptr::from_mut(self).cast() }
    }
}

const _: () = assert!(std::mem::offset_of!(FpuState, xmm) == XMM_OFFSET);
const _: () = assert!(std::mem::offset_of!(FpuState, ymm_high) == 512);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mmx_entry_keeps_physical_registers() {
        let mut image = FpuState { fsw: 3 << 11, ..FpuState::default() };
        for (i, st) in image.st.iter_mut().enumerate() {
            // ST(i) lives in physical register (TOP + i) mod 8.
            *st = ((3 + i) % 8) as u128;
        }
        image.enter_mmx();
        assert_eq!(image.fsw & FSW_TOP, 0);
        for (i, st) in image.st.iter().enumerate() {
            assert_eq!(*st, i as u128);
        }
    }

    #[test]
    fn reserved_bits_are_dropped() {
        let mut image = FpuState { mxcsr: u32::MAX, fcw: u16::MAX, ..FpuState::default() };
        image.make_valid();
        assert_eq!((image.mxcsr, image.fcw), (0xffff, 0x1f7f));
    }

    #[test]
    fn summary_follows_the_masks() {
        let mut image = FpuState::default();
        image.init_x87();
        image.fsw = 0x04;
        image.update_summary();
        assert_eq!(image.fsw, 0x04);
        image.fcw &= !0x04;
        image.update_summary();
        assert_eq!(image.fsw, 0x04 | FSW_ES_B);
    }
}
