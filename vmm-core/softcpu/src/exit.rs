//! Why a processor stopped running.

/// How long [`Cpu::run`](crate::Cpu::run) may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Return [`Exit::Budget`] after this many instructions. The count is exact in deterministic mode and
    /// may otherwise be overshot by one basic block.
    pub instructions: u64,
    /// Sleep inside `run` while the processor is halted or waits for a start-up IPI. If `false`, `run`
    /// returns [`Exit::Halted`] instead.
    pub wait: bool,
}

impl Budget {
    /// Run until something else ends the run; sleep in `HLT`.
    pub const UNLIMITED: Self = Self { instructions: u64::MAX, wait: true };

    /// Run at most `n` instructions; do not sleep in `HLT`.
    pub const fn instructions(n: u64) -> Self {
        Self { instructions: n, wait: false }
    }
}

/// Why [`Cpu::run`](crate::Cpu::run) returned. The processor can be run again after each of them, except
/// that a processor in shutdown must be reset first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// The instruction budget is used up.
    Budget,
    /// [`CpuHandle::kick`](crate::CpuHandle::kick) was called.
    Kicked,
    /// The processor is halted (or waits for a start-up IPI) and the budget says not to wait.
    Halted,
    /// A fault occurred while delivering a double fault; the machine should reset.
    TripleFault,
    /// Something that [`DebugControl`] asked for happened.
    Debug(DebugEvent),
}

/// What a debugger asked for happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DebugEvent {
    /// One instruction was executed.
    Step,
    /// The instruction at this linear address is about to execute.
    Breakpoint(u64),
    /// An instruction accessed what the watchpoint at this linear address covers; it has completed.
    Watchpoint(u64),
    /// An `INT3` instruction is about to execute at this linear address.
    Int3(u64),
}

/// What a debugger outside of the guest wants to stop at. Invisible to the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DebugControl {
    /// Stop after each instruction.
    pub single_step: bool,
    /// Stop at `INT3` instead of delivering `#BP` to the guest.
    pub trap_int3: bool,
    /// Stop before the instruction at any of these linear addresses. A run that starts at such an address
    /// executes that instruction first.
    pub breakpoints: Vec<u64>,
    /// Stop after an instruction that accesses any of these.
    pub watchpoints: Vec<Watchpoint>,
}

/// A range of linear addresses whose data accesses a debugger wants to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watchpoint {
    /// First linear address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
    /// Stop after reads.
    pub read: bool,
    /// Stop after writes.
    pub write: bool,
}
