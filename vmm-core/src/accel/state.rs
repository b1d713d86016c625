//! State of a vCPU and of the chipset inside the accelerator that [`CpuState`](super::CpuState) does not hold.

use serde::{Deserialize, Serialize};

/// A local APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApicState {
    /// IA32_APIC_BASE: address, enable and x2APIC bits, bootstrap processor.
    pub base: u64,
    /// The xAPIC register page: the 32-bit register at offset `16 * n` is element `n` (in x2APIC mode too).
    pub registers: Vec<u32>,
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
}

/// An event that the processor has accepted and not delivered yet: it comes before the next instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PendingEvent {
    /// An external interrupt, acknowledged at the APIC.
    Interrupt {
        /// Its vector.
        vector: u8,
    },
    /// `INT n` under delivery.
    SoftwareInterrupt {
        /// Its vector.
        vector: u8,
    },
    /// An exception.
    Exception {
        /// Its vector.
        vector: u8,
        /// The error code, for the vectors that push one.
        error_code: Option<u32>,
    },
}

/// What a vCPU holds beside [`CpuState`](super::CpuState). Loaded after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtraState {
    /// The local APIC.
    pub apic: ApicState,
    /// The event under delivery.
    pub pending: Option<PendingEvent>,
    /// MSRs that the accelerator has beyond those of [`CpuState`](super::CpuState): number and value. Another
    /// accelerator loads those that it knows.
    pub msrs: Vec<(u32, u64)>,
    /// The XSAVE area in the standard format, where the accelerator has one: it holds what `CpuState` has no room
    /// for (AVX-512, PKRU). Empty otherwise.
    pub xsave: Vec<u8>,
}
