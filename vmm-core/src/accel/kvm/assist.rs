//! Instructions that the kernel's emulator does not know, executed by the software CPU on the vCPU's state.
//!
//! The software CPU works on the guest's RAM and devices, but not on what is in the kernel: an instruction that reaches
//! for the local APIC, the IO-APIC, the PICs or the timer is refused, as is one that it does not know itself. What it
//! does not enforce (SMAP, protection keys) it does not enforce here either, and a locked access that crosses a page is
//! not atomic for vCPUs that KVM runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use softcpu::{
    Budget, Bus, Clock, Cpu, CpuConfig, CpuState, CpuidEntry, DebugControl, DebugEvent, Exit, GuestMemory,
    Local, MsrFault, PAGE_SIZE,
};

use crate::accel::IoBus;

/// Page tables of five levels, which the software CPU does not know.
const CR4_LA57: u64 = 1 << 12;
/// Where the IO-APIC and the local APICs are.
const INTERRUPT_CONTROLLERS: std::ops::Range<u64> = 0xfec0_0000..0xfef0_0000;

/// What came of an instruction.
pub enum Outcome {
    /// The state after it.
    Executed(Box<CpuState>),
    /// It is a breakpoint of the debugger, at this linear address.
    Breakpoint(u64),
}

/// The software CPU beside one vCPU.
pub struct Assistant {
    cpu: Cpu,
    ram: Arc<GuestMemory>,
    refused: Arc<AtomicBool>,
}

impl Assistant {
    /// For a vCPU of a machine with this RAM and these devices.
    pub fn new(id: u32, vcpus: u32, ram: Arc<GuestMemory>, bus: Arc<dyn IoBus>) -> Self {
        let refused = Arc::new(AtomicBool::new(false));
        let all = |leaf| CpuidEntry { leaf, subleaf: None, output: [u32::MAX; 4] };
        let config = CpuConfig {
            index: id,
            apic_id: id,
            processors: vcpus,
            // The guest has checked by KVM's CPUID what there is.
            cpuid: vec![all(1), all(7)],
            kvm_leaves: false,
            translate_after: None,
            // Only instructions matter, and none of them lasts.
            ..CpuConfig::new(Arc::new(Clock::host(1_000_000)))
        };
        let devices = Arc::new(Devices { bus, refused: refused.clone() });
        let local = Box::new(InKernel { refused: refused.clone() });
        Self { cpu: Cpu::new(config, ram.clone(), devices, local), ram, refused }
    }

    /// Executes the instruction at the state's RIP, or begins the exception that it raises; `None` if that is beyond the
    /// software CPU. `code` are the guest-physical pages that the instruction may be in. With `trap_int3` INT3 is the
    /// debugger's.
    pub fn execute(&mut self, state: &CpuState, code: &[u64], trap_int3: bool) -> Option<Outcome> {
        if state.cr4 & CR4_LA57 != 0 {
            return None;
        }
        // What the guest wrote by itself nobody has heard of.
        code.iter().for_each(|page| self.ram.notify_written(*page, PAGE_SIZE));
        self.cpu.set_debug(DebugControl { trap_int3, ..DebugControl::default() });
        self.cpu.set_state(state);
        self.refused.store(false, Ordering::Relaxed);
        let handle = self.cpu.handle();
        let unknown = handle.unimplemented();
        let exit = self.cpu.run(Budget::instructions(1));
        if handle.unimplemented() != unknown || self.refused.load(Ordering::Relaxed) {
            return None;
        }
        match exit {
            Exit::Budget | Exit::Halted => Some(Outcome::Executed(Box::new(self.cpu.state()))),
            Exit::Debug(DebugEvent::Int3(rip)) => Some(Outcome::Breakpoint(rip)),
            _ => None,
        }
    }
}

/// The machine's devices, without those in the kernel.
struct Devices {
    bus: Arc<dyn IoBus>,
    refused: Arc<AtomicBool>,
}

impl Devices {
    fn refuse_if(&self, in_kernel: bool) -> bool {
        if in_kernel {
            self.refused.store(true, Ordering::Relaxed);
        }
        in_kernel
    }
}

/// Whether the kernel has the device behind a port: PICs, timer, speaker.
fn is_in_kernel(port: u16) -> bool {
    matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 | 0x40..=0x43 | 0x61)
}

impl Bus for Devices {
    fn mmio_read(&self, _vcpu: u32, gpa: u64, data: &mut [u8]) {
        if !self.refuse_if(INTERRUPT_CONTROLLERS.contains(&gpa)) {
            self.bus.mmio_read(gpa, data);
        }
    }

    fn mmio_write(&self, _vcpu: u32, gpa: u64, data: &[u8]) {
        if !self.refuse_if(INTERRUPT_CONTROLLERS.contains(&gpa)) {
            self.bus.mmio_write(gpa, data);
        }
    }

    fn io_read(&self, _vcpu: u32, port: u16, data: &mut [u8]) {
        if !self.refuse_if(is_in_kernel(port)) {
            self.bus.port_read(port, data);
        }
    }

    fn io_write(&self, _vcpu: u32, port: u16, data: &[u8]) {
        if !self.refuse_if(is_in_kernel(port)) {
            self.bus.port_write(port, data);
        }
    }
}

/// The place of the local APIC, which is in the kernel.
struct InKernel {
    refused: Arc<AtomicBool>,
}

impl InKernel {
    fn refuse(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }
}

impl Local for InKernel {
    fn read_msr(&mut self, _msr: u32, _tsc: u64) -> Result<u64, MsrFault> {
        self.refuse();
        Err(MsrFault)
    }
    fn write_msr(&mut self, _msr: u32, _value: u64, _tsc: u64) -> Result<(), MsrFault> {
        self.refuse();
        Err(MsrFault)
    }
    fn cr8(&mut self) -> u8 {
        self.refuse();
        0
    }
    fn set_cr8(&mut self, _priority: u8) {
        self.refuse();
    }
}
