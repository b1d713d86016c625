//! What a tested instruction can see and change.

use softcpu::FpuState;

/// RFLAGS.RF, which exceptions set in the saved image at the processor's discretion.
pub const RFLAGS_RF: u64 = 1 << 16;

/// Registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// In the order of the instruction encoding.
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub rip: u64,
    pub fx: FpuState,
}

/// An exception that the instruction raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    pub vector: u8,
    pub error: u32,
    /// CR2 of a page fault, otherwise zero.
    pub address: u64,
}

/// The registers after an instruction, and how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub state: State,
    pub exception: Option<Exception>,
}
