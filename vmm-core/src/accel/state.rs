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

/// One of the two 8259 interrupt controllers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    /// Requested inputs.
    pub irr: u8,
    /// Inputs in service.
    pub isr: u8,
    /// Masked inputs.
    pub imr: u8,
    /// Levels of the inputs at the last change, for edge detection.
    pub lines: u8,
    /// Level-triggered inputs (ELCR).
    pub level: u8,
    /// First vector.
    pub base: u8,
    /// The next initialisation word that is expected: 0 for none, 1 for word 2, and so on.
    pub init_step: u8,
    /// Word 1 announced a word 4.
    pub needs_word4: bool,
    /// Interrupts end when they are acknowledged.
    pub auto_eoi: bool,
    /// The command port reads ISR, not IRR.
    pub read_isr: bool,
    /// The next read of the command port polls.
    pub poll: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Special fully nested mode.
    pub special_fully_nested: bool,
    /// The input with the highest priority.
    pub highest: u8,
    /// Priorities rotate when an interrupt ends automatically.
    pub rotate_on_auto_eoi: bool,
}

impl PicState {
    /// Both controllers as a machine begins with them: every input is masked until the guest programs them, for there is
    /// no firmware that would do it.
    pub fn at_power_on() -> [Self; 2] {
        [0x08, 0x70].map(|base| Self { imr: 0xff, base, ..Self::default() })
    }
}

/// The IO-APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// The index register.
    pub select: u8,
    /// The ID register's four bits.
    pub id: u8,
    /// Inputs that are asserted.
    pub levels: u32,
    /// The redirection table, one entry an input.
    pub redirection: Vec<u64>,
}

/// One counter of the 8254 interval timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitCounterState {
    /// The reload value, 1 to 65536.
    pub count: u32,
    /// The value that a latch command took.
    pub latched_count: Option<u16>,
    /// Where reading of the latched value is: the byte order state of [`PitCounterState::access`].
    pub latch_step: u8,
    /// The status byte that a read-back command took.
    pub latched_status: Option<u8>,
    /// Which byte is read next: 1 low only, 2 high only, 3 low of two, 4 high of two.
    pub read_step: u8,
    /// Which byte is written next, in the same code.
    pub write_step: u8,
    /// The low byte of a value of which the high byte is awaited.
    pub write_low: u8,
    /// Access mode: 1 low byte, 2 high byte, 3 both.
    pub access: u8,
    /// Counting mode, 0 to 5; [`Self::IDLE`] while the counter is not programmed.
    pub mode: u8,
    /// Counts in BCD.
    pub bcd: bool,
    /// The gate input.
    pub gate: bool,
    /// Nanoseconds since the count was loaded. KVM begins to count anew when the state is loaded.
    pub age: u64,
}

impl PitCounterState {
    /// The mode of a counter that does not count.
    pub const IDLE: u8 = 0xff;
}

/// The interval timer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// The counters.
    pub counters: [PitCounterState; 3],
    /// The speaker data bit of port 0x61.
    pub speaker: bool,
}

/// What the accelerator holds of the chipset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipsetState {
    /// The first and the second PIC.
    pub pics: [PicState; 2],
    /// The IO-APIC.
    pub ioapic: IoApicState,
    /// The interval timer, where the machine has one.
    pub pit: Option<PitState>,
    /// Nanoseconds of the paravirtual clock (kvmclock).
    pub clock: u64,
}
