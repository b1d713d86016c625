//! The traits of a hypervisor, a virtual machine and a vCPU, and what a caller needs to use either accelerator.
//!
//! Two implementations: [`kvm`] (the Linux kernel's KVM) and [`soft`] (the `softcpu` crate with interrupt controllers
//! and timers in software). CPU state is described by one set of types ([`CpuState`]), so that a snapshot can cross
//! from one accelerator to the other.

pub mod kvm;
pub mod probe;
mod profile;
pub mod soft;
mod state;

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Which instruction set extensions a guest sees.
pub use softcpu::CpuModel;
/// Architectural state of one CPU, the same for both accelerators.
pub use softcpu::CpuState;
use softcpu::Msrs;

use crate::interrupt::{IrqLine, Msi, MsiVector};
use crate::memory::GuestMemory;
pub use profile::{CpuProfile, FeatureWord};
pub use state::{
    ApicState, ChipsetState, ExtraState, IoApicState, PendingEvent, PicState, PitCounterState, PitState,
};

/// Which accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelKind {
    /// The Linux kernel's KVM.
    Kvm,
    /// The x86-64 CPU in software.
    Soft,
}

impl fmt::Display for AccelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Soft => "soft",
        })
    }
}

/// A failure of an accelerator.
#[derive(Debug, thiserror::Error)]
pub enum AccelError {
    /// The accelerator does not work on this host.
    #[error("Accelerator `{kind}` is not available: {reason}")]
    Unavailable {
        /// Which one.
        kind: AccelKind,
        /// Why, and what to do about it.
        reason: String,
    },
    /// A system call of the accelerator failed.
    #[error("{operation} failed")]
    Os {
        /// What was attempted.
        operation: &'static str,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// The request is outside what this accelerator can do.
    #[error("Not supported by this accelerator: {0}")]
    Unsupported(String),
    /// CPU state that cannot be loaded.
    #[error("Invalid CPU state: {0}")]
    InvalidState(String),
}

/// Answers the guest's accesses that are not RAM. Called on vCPU threads, several at once.
pub trait IoBus: Send + Sync {
    /// A guest read of 1 to 8 bytes of MMIO.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// A guest write of 1 to 8 bytes of MMIO.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// A guest read of 1, 2 or 4 bytes from an I/O port.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// A guest write of 1, 2 or 4 bytes to an I/O port.
    fn port_write(&self, port: u16, data: &[u8]);
}

/// What a new VM is made of.
pub struct VmSpec {
    /// The guest's RAM, mapped into the VM at creation.
    pub memory: GuestMemory,
    /// Number of vCPUs that will be created; APIC IDs are `0..vcpus`.
    pub vcpus: u32,
    /// The features that CPUID shows at most. `None`: all that the accelerator has.
    pub model: Option<CpuModel>,
    /// Frequency of the time-stamp counter, for a guest that knows it from where it ran before. `None`: the
    /// accelerator's own.
    pub tsc_khz: Option<u32>,
    /// Where accesses that are not RAM go.
    pub bus: Arc<dyn IoBus>,
}

/// An accelerator on this host.
pub trait Hypervisor: Send + Sync {
    /// Which accelerator this is.
    fn kind(&self) -> AccelKind;

    /// Creates a virtual machine with its interrupt controllers and timers, and no vCPU yet.
    ///
    /// # Errors
    /// Fails when the host refuses or the specification exceeds what the accelerator can do.
    fn create_vm(&self, spec: VmSpec) -> Result<Arc<dyn Vm>, AccelError>;

    /// Finds out ahead what the first vCPU needs to know of the host: for a thread that has time while another one makes
    /// the VM. What fails here fails again, with its error, in [`Vm::create_vcpu`].
    fn prepare_vcpus(&self) {}
}

/// Number of wired interrupt inputs of the IO-APIC.
pub const IOAPIC_PINS: u32 = 24;

/// Where a doorbell write goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoAddress {
    /// An MMIO address.
    Mmio(u64),
    /// An I/O port.
    Port(u16),
}

/// A virtual machine: one guest-physical address space with its interrupt controllers.
pub trait Vm: Send + Sync {
    /// Creates vCPU `id` (also its APIC ID). vCPU 0 is the bootstrap processor; the others wait for INIT and SIPI.
    ///
    /// # Errors
    /// Fails when the host refuses or the ID is taken.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, AccelError>;

    /// The wired interrupt input `gsi` (below [`IOAPIC_PINS`]).
    ///
    /// # Errors
    /// Fails when there is no such input.
    fn irq_line(&self, gsi: u32) -> Result<Arc<dyn IrqLine>, AccelError>;

    /// A new message-signalled interrupt vector, masked at first.
    ///
    /// # Errors
    /// Fails when the accelerator has no route left.
    fn msi_vector(&self) -> Result<Arc<dyn MsiVector>, AccelError>;

    /// Sends one message now.
    ///
    /// # Errors
    /// Fails when the message addresses no local APIC.
    fn send_msi(&self, message: Msi) -> Result<(), AccelError>;

    /// Lets the accelerator signal `event` for a guest write of `len` bytes at `address` (with `value`, only for that
    /// value), instead of a call to [`IoBus`]. Returns false where the accelerator cannot; the bus then sees the write.
    ///
    /// # Errors
    /// Fails when the host refuses.
    fn add_doorbell(
        &self,
        address: IoAddress,
        len: u32,
        value: Option<u64>,
        event: BorrowedFd<'_>,
    ) -> Result<bool, AccelError>;

    /// Removes what [`Vm::add_doorbell`] added with the same arguments.
    ///
    /// # Errors
    /// Fails when there is no such doorbell.
    fn remove_doorbell(
        &self,
        address: IoAddress,
        len: u32,
        value: Option<u64>,
        event: BorrowedFd<'_>,
    ) -> Result<(), AccelError>;

    /// Lets the accelerator queue guest writes of up to `len` bytes within `[address, address + len)` and pass them to
    /// [`IoBus`] together, in their order: before the next access of any vCPU that is not queued, and before a vCPU
    /// returns from [`Vcpu::run`]. For registers whose writes have no effect until another register is touched. Returns
    /// false where the accelerator cannot; the bus then sees each write at once.
    ///
    /// # Errors
    /// Fails when the host refuses.
    fn coalesce_writes(&self, _address: IoAddress, _len: u32) -> Result<bool, AccelError> {
        Ok(false)
    }

    /// Starts or stops tracking of the RAM pages that vCPUs write.
    ///
    /// # Errors
    /// Fails when the host refuses.
    fn set_dirty_tracking(&self, on: bool) -> Result<(), AccelError>;

    /// The pages of region `index` (of [`GuestMemory::regions`]) that vCPUs wrote since the last call: one bit a page,
    /// least significant bit first. Clears them. What a vCPU wrote just now, while it runs, the next call may be the first
    /// to report. Writes by devices are reported by the memory's write observer.
    ///
    /// # Errors
    /// Fails when tracking is off.
    fn take_dirty_pages(&self, index: usize) -> Result<Vec<u64>, AccelError>;

    /// The interrupt controllers, timer and clock of the chipset; only while no vCPU runs.
    ///
    /// # Errors
    /// Fails when the host refuses or the accelerator cannot tell.
    fn chipset_state(&self) -> Result<ChipsetState, AccelError> {
        Err(AccelError::Unsupported("saving the chipset".into()))
    }

    /// Loads what [`Vm::chipset_state`] returned; only while no vCPU runs.
    ///
    /// # Errors
    /// Fails when the state is not valid on this accelerator.
    fn set_chipset_state(&self, _state: &ChipsetState) -> Result<(), AccelError> {
        Err(AccelError::Unsupported("loading the chipset".into()))
    }
}

/// Why a vCPU came back from [`Vcpu::run`].
#[derive(Debug)]
pub enum VcpuExit {
    /// [`VcpuHandle::kick`] was called, or a signal arrived.
    Interrupted,
    /// A triple fault: the guest cannot go on.
    TripleFault,
    /// The guest asked the accelerator to reset or power off the machine (not through a device).
    SystemEvent(SystemEvent),
    /// A breakpoint, watchpoint or single step of the debugger.
    Debug(DebugExit),
    /// The accelerator cannot execute the guest any further.
    Fault(Box<VcpuFault>),
}

/// A request of the guest to the accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemEvent {
    /// Reset the machine.
    Reset,
    /// Power the machine off.
    Shutdown,
    /// The guest crashed.
    Crash,
}

/// What stopped a vCPU that is being debugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugExit {
    /// The instruction pointer (linear) at the stop.
    pub rip: u64,
    /// DR6 at the stop: which hardware breakpoint hit, or the single-step bit.
    pub dr6: u64,
    /// Whether a software breakpoint (int3) stopped it.
    pub software: bool,
}

/// The accelerator could not execute an instruction.
#[derive(Debug, thiserror::Error)]
#[error("vCPU {vcpu} stopped at {rip:#x}: {reason}")]
pub struct VcpuFault {
    /// The vCPU's ID.
    pub vcpu: u32,
    /// What happened, with a hint.
    pub reason: String,
    /// Linear instruction pointer.
    pub rip: u64,
    /// The bytes at the instruction pointer, as many as could be read.
    pub bytes: Vec<u8>,
    /// The instruction in Intel syntax, when it decodes.
    pub instruction: Option<String>,
    /// The registers.
    pub state: Box<CpuState>,
}

/// What a debugger wants to be stopped at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DebugControl {
    /// Stop after each instruction.
    pub single_step: bool,
    /// Stop at int3 instead of delivering #BP to the guest.
    pub software_breakpoints: bool,
    /// Hardware breakpoints and watchpoints (at most 4).
    pub hardware: Vec<HardwareBreakpoint>,
}

/// A breakpoint or watchpoint at a linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HardwareBreakpoint {
    /// Linear address.
    pub address: u64,
    /// Length in bytes: 1, 2, 4 or 8 (1 for execution).
    pub len: u8,
    /// What stops the vCPU.
    pub kind: BreakKind,
}

/// What a hardware breakpoint watches for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakKind {
    /// Execution.
    Execute,
    /// A write.
    Write,
    /// A read or a write.
    Access,
}

/// One virtual CPU. It is run by one thread at a time.
pub trait Vcpu: Send {
    /// Runs the guest until something stops it. A halted vCPU sleeps inside this call.
    ///
    /// # Errors
    /// Fails when the host refuses to run the vCPU at all.
    fn run(&mut self) -> Result<VcpuExit, AccelError>;

    /// The architectural state, without the local APIC.
    ///
    /// # Errors
    /// Fails when the host refuses.
    fn state(&mut self) -> Result<CpuState, AccelError>;

    /// The local APIC, and what else a snapshot needs beside [`Vcpu::state`].
    ///
    /// # Errors
    /// Fails when the host refuses or the accelerator cannot tell.
    fn extra_state(&mut self) -> Result<ExtraState, AccelError> {
        Err(AccelError::Unsupported("saving the local APIC".into()))
    }

    /// Loads what [`Vcpu::extra_state`] returned, after [`Vcpu::set_state`].
    ///
    /// # Errors
    /// Fails when the state is not valid on this accelerator.
    fn set_extra_state(&mut self, _state: &ExtraState) -> Result<(), AccelError> {
        Err(AccelError::Unsupported("loading the local APIC".into()))
    }

    /// What the guest knows of this processor and relies on wherever it runs.
    ///
    /// # Errors
    /// Fails when the host refuses.
    fn profile(&mut self) -> Result<CpuProfile, AccelError>;

    /// Loads architectural state; drops a pending event.
    ///
    /// # Errors
    /// Fails when the state is not valid on this accelerator.
    fn set_state(&mut self, state: &CpuState) -> Result<(), AccelError>;

    /// Loads of `state` only what boot protocols define: general registers, RIP, RFLAGS, segments, descriptor tables, CR0 to
    /// CR4 and EFER. Everything else stays: for a vCPU that has not run, so at its reset value.
    ///
    /// # Errors
    /// Fails when the state is not valid on this accelerator.
    fn set_registers(&mut self, state: &CpuState) -> Result<(), AccelError> {
        let old = self.state()?;
        let CpuState { gpr, rip, rflags, segments, ldtr, tr, gdtr, idtr, cr0, cr2, cr3, cr4, .. } = *state;
        let msrs = Msrs { efer: state.msrs.efer, ..old.msrs };
        let new =
            CpuState { gpr, rip, rflags, segments, ldtr, tr, gdtr, idtr, cr0, cr2, cr3, cr4, msrs, ..old };
        self.set_state(&new)
    }

    /// A handle that other threads use to stop this vCPU.
    fn handle(&self) -> Arc<dyn VcpuHandle>;

    /// Sets what stops the vCPU for a debugger.
    ///
    /// # Errors
    /// Fails when more is asked for than the accelerator has.
    fn set_debug(&mut self, control: &DebugControl) -> Result<(), AccelError>;

    /// Translates a linear address with the vCPU's current paging, or `None` when it is not mapped.
    ///
    /// # Errors
    /// Fails when the host refuses.
    fn translate(&mut self, linear: u64) -> Result<Option<u64>, AccelError>;
}

/// Reaches a vCPU from other threads.
pub trait VcpuHandle: Send + Sync {
    /// Makes the current or next [`Vcpu::run`] return [`VcpuExit::Interrupted`] soon.
    fn kick(&self);
    /// Raises a non-maskable interrupt.
    fn nmi(&self);
    /// How often the guest tried to execute an instruction that exists, but not in this accelerator: it got `#UD`.
    fn unimplemented(&self) -> u64 {
        0
    }
    /// How many instructions the software CPU executed because this accelerator does not know them.
    fn assisted(&self) -> u64 {
        0
    }
}
