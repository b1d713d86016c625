//! What a processor sees of the machine around it.

/// The machine's I/O and MMIO space. Shared by all processors and called on their threads.
///
/// `data` is 1, 2, 4 or 8 bytes long (ports: 1, 2 or 4), little endian. An access that no device claims
/// reads as all ones; writes to it are dropped. Accesses are split at page boundaries, and string I/O
/// calls once for each element.
pub trait Bus: Send + Sync {
    /// Reads guest-physical memory that is not RAM.
    fn mmio_read(&self, vcpu: u32, gpa: u64, data: &mut [u8]);
    /// Writes guest-physical memory that is not RAM, or that is read-only.
    fn mmio_write(&self, vcpu: u32, gpa: u64, data: &[u8]);
    /// Executes `IN`.
    fn io_read(&self, vcpu: u32, port: u16, data: &mut [u8]);
    /// Executes `OUT`.
    fn io_write(&self, vcpu: u32, port: u16, data: &[u8]);
}

/// The access to a model-specific register is invalid: the processor raises `#GP(0)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The model-specific register or its value is not valid")]
pub struct MsrFault;

/// A processor's local APIC as the processor's own thread sees it.
///
/// When another thread makes an interrupt pending it must call [`CpuHandle::interrupt`]; the processor
/// then asks [`Local::pending`] before the next instruction boundary at which it looks for events (at the
/// latest some thousand instructions later, at once when it is halted). After each call that may change
/// the answer (MSR, MMIO and CR8 writes, timer expiry) the processor asks again by itself.
///
/// Times are in units of the guest's time-stamp counter, see [`Clock`]. The methods' defaults are those of a
/// processor without a local APIC, [`NoApic`].
///
/// [`CpuHandle::interrupt`]: crate::CpuHandle::interrupt
/// [`Clock`]: crate::Clock
pub trait Local: std::any::Any + Send {
    /// Whether an interrupt is waiting that the task priority lets through (including ExtINT from an
    /// 8259 wired to LINT0).
    fn pending(&mut self) -> bool {
        false
    }
    /// The interrupt acknowledge cycle: takes the highest-priority deliverable interrupt and returns its
    /// vector, or `None` if there is none any more.
    fn acknowledge(&mut self) -> Option<u8> {
        None
    }
    /// Reads IA32_APIC_BASE (0x1b), IA32_TSC_DEADLINE (0x6e0) or an x2APIC register (0x800..=0x8ff).
    ///
    /// # Errors
    /// The register does not exist in the current mode.
    fn read_msr(&mut self, _msr: u32, _tsc: u64) -> Result<u64, MsrFault> {
        Err(MsrFault)
    }
    /// Writes one of the registers of [`Local::read_msr`].
    ///
    /// # Errors
    /// The register does not exist in the current mode, or the value is reserved.
    fn write_msr(&mut self, _msr: u32, _value: u64, _tsc: u64) -> Result<(), MsrFault> {
        Err(MsrFault)
    }
    /// The task priority class, bits 3:0 (`MOV reg, CR8`).
    fn cr8(&mut self) -> u8 {
        0
    }
    /// Sets the task priority class (`MOV CR8, reg`).
    fn set_cr8(&mut self, _priority: u8) {}
    /// Guest-physical address of the xAPIC register page, or `None` while the APIC is disabled or in
    /// x2APIC mode. The processor asks again after each write of IA32_APIC_BASE and after a reset.
    fn mmio_page(&self) -> Option<u64> {
        None
    }
    /// Reads the xAPIC register page; `offset` is below 0x1000.
    fn mmio_read(&mut self, _offset: u32, _data: &mut [u8], _tsc: u64) {}
    /// Writes the xAPIC register page.
    fn mmio_write(&mut self, _offset: u32, _data: &[u8], _tsc: u64) {}
    /// When the APIC timer expires next. The processor calls [`Local::timer`] as soon as its time-stamp
    /// counter has reached that value, also while it is halted.
    fn deadline(&mut self) -> Option<u64> {
        None
    }
    /// The time-stamp counter has reached [`Local::deadline`].
    fn timer(&mut self, _tsc: u64) {}
    /// INIT was delivered to this processor: reset the APIC to its state after INIT.
    fn init(&mut self) {}
}

/// A processor without a local APIC: nothing interrupts it.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoApic;

impl Local for NoApic {}
