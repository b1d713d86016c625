//! The XSAVE area (Intel SDM volume 1, chapter 13): FXSAVE's 512 bytes, the header, and YMM's upper halves.

use softcpu::FpuState;

/// The area in the standard format, as large as KVM hands it out without dynamically enabled features.
pub type Area = [u8; 4096];

/// Offset of the header's first word: which components are not in their initial state.
const XSTATE_BV: usize = 512;
/// Offset of the upper halves of YMM0 to YMM15, the same on all processors.
const YMM_HIGH: usize = 576;
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;

/// KVM's array of words as bytes.
pub fn from_words(words: &[u32; 1024]) -> Area {
    let mut area = [0; 4096];
    for (to, word) in area.chunks_exact_mut(4).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    area
}

fn take<const N: usize>(area: &Area, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&area[at..at + N]);
    bytes
}

fn vectors<const N: usize>(area: &Area, at: usize) -> [u128; N] {
    std::array::from_fn(|n| u128::from_le_bytes(take(area, at + 16 * n)))
}

/// The x87 and vector registers in `area`.
pub fn fpu(area: &Area) -> FpuState {
    let live = u64::from_le_bytes(take(area, XSTATE_BV));
    FpuState {
        fcw: u16::from_le_bytes(take(area, 0)),
        fsw: u16::from_le_bytes(take(area, 2)),
        ftw: area[4],
        reserved0: 0,
        fop: u16::from_le_bytes(take(area, 6)),
        fip: u64::from_le_bytes(take(area, 8)),
        fdp: u64::from_le_bytes(take(area, 16)),
        mxcsr: u32::from_le_bytes(take(area, 24)),
        mxcsr_mask: u32::from_le_bytes(take(area, 28)),
        st: vectors(area, 32),
        xmm: vectors(area, 160),
        reserved1: vectors(area, 416),
        ymm_high: if live & AVX != 0 { vectors(area, YMM_HIGH) } else { [0; 16] },
    }
}

/// Puts the x87 and vector registers into `area`; the other components stay.
pub fn set_fpu(area: &mut Area, fpu: &FpuState) {
    let mut put = |at: usize, bytes: &[u8]| area[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &fpu.fcw.to_le_bytes());
    put(2, &fpu.fsw.to_le_bytes());
    put(4, &[fpu.ftw, 0]);
    put(6, &fpu.fop.to_le_bytes());
    put(8, &fpu.fip.to_le_bytes());
    put(16, &fpu.fdp.to_le_bytes());
    // The mask is the host processor's own; 28 to 31 stay.
    put(24, &fpu.mxcsr.to_le_bytes());
    for (n, value) in fpu.st.iter().chain(&fpu.xmm).chain(&fpu.reserved1).enumerate() {
        put(32 + 16 * n, &value.to_le_bytes());
    }
    let mut live = u64::from_le_bytes(take(area, XSTATE_BV)) | X87 | SSE;
    // YMM only where it holds something: the processor may not have it.
    if live & AVX != 0 || fpu.ymm_high.iter().any(|&v| v != 0) {
        live |= AVX;
        for (n, value) in fpu.ymm_high.iter().enumerate() {
            area[YMM_HIGH + 16 * n..][..16].copy_from_slice(&value.to_le_bytes());
        }
    }
    area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&live.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_survive_the_round_trip() {
        let mut fpu_state =
            FpuState { fcw: 0x27f, fsw: 0x3800, ftw: 0x81, mxcsr: 0x1fa0, ..Default::default() };
        fpu_state.st[7] = 0x3fff_8000_0000_0000_0000;
        fpu_state.xmm[15] = 15 << 100;
        fpu_state.ymm_high[3] = 3;
        let mut area = [0; 4096];
        area[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
        set_fpu(&mut area, &fpu_state);
        assert_eq!(area[XSTATE_BV], 7);
        assert_eq!(fpu(&area), fpu_state);
        assert_eq!(area[28..32], [0xff, 0xff, 0, 0], "the host's mask of MXCSR stays");
    }
}
