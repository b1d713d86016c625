//! Instructions on control state: MXCSR, the x87 control and status words, save areas.

use iced_x86::{Code, Instruction, Mnemonic as M};

use super::exec::{Guest, Trap};
use super::fpu::MXCSR_VALID;
use super::op::Memory;
use crate::state::FpuState;

/// Bytes of the `FXSAVE` area that hold x87 state, MXCSR and XMM0 to XMM15.
const AREA: usize = 512;
/// The part of the area that `FXSAVE` writes.
const AREA_WRITTEN: usize = 416;
/// The part that 32-bit modes use: they have XMM0 to XMM7 only.
const AREA_32: usize = 288;

/// An instruction that needs no stub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Control {
    Nop,
    Emms,
    Fninit,
    Fnclex,
    Fldcw,
    Fnstcw,
    Fnstsw,
    FnstswAx,
    Ldmxcsr,
    Stmxcsr,
    /// With 64-bit pointers or not; in a 64-bit segment or not.
    Fxsave {
        wide: bool,
        long: bool,
    },
    Fxrstor {
        wide: bool,
        long: bool,
    },
    /// `MASKMOVDQU` or `MASKMOVQ`: source and mask register.
    Maskmov {
        source: u8,
        mask: u8,
        mmx: bool,
    },
}

impl Control {
    pub(super) fn classify(instruction: &Instruction) -> Option<Self> {
        let long = instruction.code_size() == iced_x86::CodeSize::Code64;
        let operand = |index| instruction.op_register(index).number() as u8;
        Some(match instruction.mnemonic() {
            M::Prefetch | M::Prefetchw | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchnta => {
                Self::Nop
            }
            M::Fneni | M::Fndisi | M::Fnsetpm => Self::Nop,
            // A pending exception was delivered before.
            M::Wait => Self::Nop,
            M::Emms => Self::Emms,
            M::Fninit => Self::Fninit,
            M::Fnclex => Self::Fnclex,
            M::Fldcw => Self::Fldcw,
            M::Fnstcw => Self::Fnstcw,
            M::Fnstsw if instruction.code() == Code::Fnstsw_AX => Self::FnstswAx,
            M::Fnstsw => Self::Fnstsw,
            M::Ldmxcsr => Self::Ldmxcsr,
            M::Stmxcsr => Self::Stmxcsr,
            M::Fxsave => Self::Fxsave { wide: false, long },
            M::Fxsave64 => Self::Fxsave { wide: true, long },
            M::Fxrstor => Self::Fxrstor { wide: false, long },
            M::Fxrstor64 => Self::Fxrstor { wide: true, long },
            M::Maskmovq => Self::Maskmov { source: operand(1), mask: operand(2), mmx: true },
            M::Maskmovdqu => Self::Maskmov { source: operand(1), mask: operand(2), mmx: false },
            _ => return None,
        })
    }

    /// Use, size and alignment of the memory operand.
    pub(super) fn memory(self) -> (Memory, u16, bool) {
        match self {
            Self::Nop | Self::Emms | Self::Fninit | Self::Fnclex | Self::FnstswAx => (Memory::None, 0, false),
            Self::Fldcw => (Memory::Load, 2, false),
            Self::Fnstcw | Self::Fnstsw => (Memory::Store, 2, false),
            Self::Ldmxcsr => (Memory::Load, 4, false),
            Self::Stmxcsr => (Memory::Store, 4, false),
            Self::Fxsave { .. } => (Memory::Store, AREA as u16, true),
            Self::Fxrstor { .. } => (Memory::Load, AREA as u16, true),
            Self::Maskmov { mmx, .. } => (Memory::Store, if mmx { 8 } else { 16 }, false),
        }
    }

    pub(super) fn execute<G: Guest>(self, guest: &mut G, address: u64) -> Result<(), G::Fault> {
        match self {
            Self::Nop => {}
            Self::Emms => {
                guest.fpu().reset_top();
                guest.fpu().ftw = 0;
            }
            Self::Fninit => guest.fpu().init_x87(),
            Self::Fnclex => guest.fpu().fsw &= 0x7f00,
            Self::Fldcw => {
                let mut data = [0; 2];
                guest.read(address, &mut data)?;
                let (resident, fpu) = guest.units();
                resident.set_control_word(fpu, u16::from_le_bytes(data) & 0x1f3f | 0x40);
            }
            Self::Fnstcw => {
                let data = guest.units().1.fcw.to_le_bytes();
                guest.write(address, &data)?;
            }
            Self::Fnstsw => {
                let (resident, fpu) = guest.units();
                let data = resident.status_word(fpu).to_le_bytes();
                guest.write(address, &data)?;
            }
            Self::FnstswAx => {
                let (resident, fpu) = guest.units();
                let status = u64::from(resident.status_word(fpu));
                let rax = guest.gpr(0);
                *rax = *rax & !0xffff | status;
            }
            Self::Ldmxcsr => {
                let mut data = [0; 4];
                guest.read(address, &mut data)?;
                let value = u32::from_le_bytes(data);
                if value & !MXCSR_VALID != 0 {
                    return Err(guest.raise_trap(Trap::GeneralProtection));
                }
                guest.fpu().mxcsr = value;
            }
            Self::Stmxcsr => {
                let data = guest.fpu().mxcsr.to_le_bytes();
                guest.write(address, &data)?;
            }
            Self::Fxsave { wide, long } => fxsave(guest, address, wide, long)?,
            Self::Fxrstor { wide, long } => fxrstor(guest, address, wide, long)?,
            Self::Maskmov { source, mask, mmx } => maskmov(guest, address, source, mask, mmx)?,
        }
        Ok(())
    }
}

fn fxsave<G: Guest>(guest: &mut G, address: u64, wide: bool, long: bool) -> Result<(), G::Fault> {
    guest.probe_write(address, AREA)?;
    let mut area = *guest.fpu();
    area.mxcsr_mask = MXCSR_VALID;
    if !wide {
        // The upper halves hold the selectors, which are not recorded.
        area.fip &= 0xffff_ffff;
        area.fdp &= 0xffff_ffff;
    }
    let length = if long { AREA_WRITTEN } else { AREA_32 };
    guest.write(address, &area.area()[..length])
}

fn fxrstor<G: Guest>(guest: &mut G, address: u64, wide: bool, long: bool) -> Result<(), G::Fault> {
    let mut area = FpuState::default();
    guest.read(address, area.area_mut())?;
    if area.mxcsr & !MXCSR_VALID != 0 {
        return Err(guest.raise_trap(Trap::GeneralProtection));
    }
    if !wide {
        area.fip &= 0xffff_ffff;
        area.fdp &= 0xffff_ffff;
    }
    let fpu = guest.fpu();
    fpu.fsw = area.fsw;
    fpu.ftw = area.ftw;
    fpu.fop = area.fop;
    fpu.fip = area.fip;
    fpu.fdp = area.fdp;
    fpu.mxcsr = area.mxcsr;
    for (register, saved) in fpu.st.iter_mut().zip(area.st) {
        *register = saved & ((1 << 80) - 1);
    }
    let count = if long { 16 } else { 8 };
    fpu.xmm[..count].copy_from_slice(&area.xmm[..count]);
    fpu.fcw = area.fcw;
    fpu.make_valid();
    Ok(())
}

/// Unselected bytes are not written, but AMD processors check access to all.
fn maskmov<G: Guest>(guest: &mut G, address: u64, source: u8, mask: u8, mmx: bool) -> Result<(), G::Fault> {
    let length = if mmx { 8 } else { 16 };
    let fpu = guest.fpu();
    if mmx {
        // Also when the write faults.
        fpu.enter_mmx();
    }
    let registers: &[u128] = if mmx { &fpu.st } else { &fpu.xmm };
    let register = |number| registers.get(usize::from(number)).copied().unwrap_or_default().to_le_bytes();
    let (source, mask): ([u8; 16], [u8; 16]) = (register(source), register(mask));
    let selected = |index: usize| mask[index] & 0x80 != 0;
    guest.probe_write(address, length)?;
    for index in (0..length).filter(|&index| selected(index)) {
        guest.write(address.wrapping_add(index as u64), &source[index..=index])?;
    }
    Ok(())
}

/// Instruction pointer, data pointer and opcode within an x87 environment (`FNSTENV`, `FNSAVE`), in the
/// protected-mode formats (SDM volume 1, section 8.1.10). Selectors are not recorded.
pub(super) fn put_pointers(environment: &mut [u8], (fop, fip, fdp): (u16, u64, u64)) {
    if is_wide(environment.len()) {
        put(environment, 12, &(fip as u32).to_le_bytes());
        put(environment, 16, &(u32::from(fop) << 16).to_le_bytes());
        put(environment, 20, &(fdp as u32).to_le_bytes());
        put(environment, 24, &0xffff_0000u32.to_le_bytes());
    } else {
        put(environment, 6, &(fip as u16).to_le_bytes());
        put(environment, 8, &[0; 2]);
        put(environment, 10, &(fdp as u16).to_le_bytes());
        put(environment, 12, &[0; 2]);
    }
}

/// The inverse of [`put_pointers`]: opcode, instruction pointer and data pointer.
pub(super) fn take_pointers(environment: &[u8]) -> (u16, u64, u64) {
    let half = |offset: usize| {
        environment
            .get(offset..offset + 2)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u16::from_le_bytes)
    };
    if is_wide(environment.len()) {
        let word = |offset| u64::from(half(offset)) | u64::from(half(offset + 2)) << 16;
        (half(18) & 0x7ff, word(12), word(20))
    } else {
        (0, u64::from(half(6)), u64::from(half(10)))
    }
}

/// Whether an environment (alone or followed by 80 bytes of registers) has the 32-bit format.
fn is_wide(length: usize) -> bool {
    matches!(length, 28 | 108)
}

fn put(buffer: &mut [u8], offset: usize, bytes: &[u8]) {
    if let Some(target) = buffer.get_mut(offset..offset + bytes.len()) {
        target.copy_from_slice(bytes);
    }
}
