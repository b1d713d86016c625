//! Where things are. The tested code and its data have the same linear addresses in the guest as in this
//! process, below 4 GiB so that 32-bit addressing reaches them.

pub const PAGE: u64 = 4096;

/// Data: two writable pages, a read-only one, then nothing. Nothing is mapped before it either.
pub const DATA: u64 = 0x1000_0000;
pub const DATA_WRITABLE: u64 = 2 * PAGE;
pub const DATA_LENGTH: u64 = 3 * PAGE;

/// Tested code, filled with `INT3`; the tested instruction is in the middle.
pub const CODE: u64 = 0x2000_0000;
pub const CODE_LENGTH: u64 = 16 * PAGE;
pub const INSTRUCTION: u64 = CODE + CODE_LENGTH / 2;

/// Base of GS.
pub const GS_BASE: u64 = 0x40;

/// Selectors that Linux gives to user programs.
pub const USER_CS32: u16 = 0x23;
pub const USER_DS: u16 = 0x2b;
pub const USER_CS64: u16 = 0x33;

/// The kind of code segment that the tested instruction is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit code.
    Long,
    /// 32-bit code under a 64-bit kernel. DS and ES are loaded as a 32-bit program has them.
    Compat,
    /// 16-bit code and data segments of a local descriptor table.
    Sixteen,
}

/// The 16-bit code segment covers the code window.
pub const LDT_CS: u16 = 0x07;
/// The 16-bit data segment starts a page before the data window and ends behind it.
pub const LDT_DS: u16 = 0x0f;
pub const LDT_DS_BASE: u64 = DATA - PAGE;
pub const LDT_DS_LIMIT: u32 = 0x5fff;

impl Mode {
    pub fn bits(self) -> u32 {
        match self {
            Self::Long => 64,
            Self::Compat => 32,
            Self::Sixteen => 16,
        }
    }

    /// General registers that exist.
    pub fn registers(self) -> usize {
        match self {
            Self::Long => 16,
            Self::Compat | Self::Sixteen => 8,
        }
    }

    /// Bits that a general register has.
    pub fn mask(self) -> u64 {
        match self {
            Self::Long => u64::MAX,
            Self::Compat | Self::Sixteen => 0xffff_ffff,
        }
    }

    /// Linear address of offset 0 in the code segment.
    pub fn code_base(self) -> u64 {
        if self == Self::Sixteen { CODE } else { 0 }
    }

    /// Linear address of offset 0 in the data and stack segments.
    pub fn data_base(self) -> u64 {
        if self == Self::Sixteen { LDT_DS_BASE } else { 0 }
    }

    pub const ALL: [Self; 3] = [Self::Long, Self::Compat, Self::Sixteen];
}
