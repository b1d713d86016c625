//! The processor.

use std::sync::Arc;

use crate::bus::{Bus, Local};
use crate::config::CpuConfig;
use crate::exit::{Budget, Exit};
use crate::handle::CpuHandle;
use crate::memory::GuestMemory;
use crate::state::{CpuState, FpuState};

/// An instruction did not complete: the exception is in the processor's `pending` field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault;

/// One virtual processor.
///
/// It belongs to the thread that calls [`Cpu::run`]; everything that other threads may do goes through its
/// [`CpuHandle`].
pub struct Cpu {
    /// RAX to R15; higher entries are used internally.
    pub(crate) regs: [u64; 256],
    pub(crate) fpu: FpuState,
    state: CpuState,
    config: CpuConfig,
    memory: Arc<GuestMemory>,
    bus: Arc<dyn Bus>,
    local: Box<dyn Local>,
    handle: Arc<CpuHandle>,
}

impl Cpu {
    /// A processor in the state after RESET. Processors other than the bootstrap processor wait for a
    /// start-up IPI.
    pub fn new(
        config: CpuConfig,
        memory: Arc<GuestMemory>,
        bus: Arc<dyn Bus>,
        local: Box<dyn Local>,
    ) -> Self {
        Self {
            regs: [0; 256],
            fpu: FpuState::default(),
            state: CpuState::reset(),
            config,
            memory,
            bus,
            local,
            handle: Arc::default(),
        }
    }

    /// Executes guest code until there is a reason to stop.
    pub fn run(&mut self, _budget: Budget) -> Exit {
        Exit::Kicked
    }

    /// What other threads use to interrupt, kick and reset this processor.
    pub fn handle(&self) -> Arc<CpuHandle> {
        self.handle.clone()
    }

    /// The processor's state. Meaningful between two runs.
    pub fn state(&self) -> CpuState {
        self.state.clone()
    }

    /// Replaces the processor's state.
    pub fn set_state(&mut self, state: &CpuState) {
        self.state = state.clone();
    }

    /// The local APIC given to [`Cpu::new`].
    pub fn local(&mut self) -> &mut dyn Local {
        &mut *self.local
    }

    // -- For `hostop` ---------------------------------------------------------------------------------

    /// Reads a general-purpose register (0 is RAX, 15 is R15).
    #[inline(always)]
    pub(crate) fn gpr(&self, index: u8) -> u64 {
        self.regs[usize::from(index & 15)]
    }

    /// Writes all 64 bits of a general-purpose register.
    #[inline(always)]
    pub(crate) fn set_gpr(&mut self, index: u8, value: u64) {
        self.regs[usize::from(index & 15)] = value;
    }

    /// Reads memory at a linear address with the current privilege; raises `#PF` and the like.
    pub(crate) fn read_bytes<const N: usize>(&mut self, _address: u64) -> Result<[u8; N], Fault> {
        Err(Fault)
    }

    /// Writes memory at a linear address with the current privilege: all of it or, on a fault, nothing.
    pub(crate) fn write_bytes<const N: usize>(&mut self, _address: u64, _data: [u8; N]) -> Result<(), Fault> {
        Err(Fault)
    }

    /// Sets CF, PF, AF, ZF, SF and OF (in their RFLAGS positions) as COMISS and PTEST do.
    pub(crate) fn set_status_flags(&mut self, _flags: u64) {}

    /// The six status flags in their RFLAGS positions (FCMOVcc).
    pub(crate) fn status_flags(&self) -> u64 {
        0
    }

    /// Makes an exception pending: `return Err(cpu.raise(Vector::..., error_code))`.
    pub(crate) fn raise(&mut self, _vector: u8, _error: Option<u32>) -> Fault {
        Fault
    }
}
