//! A virtual CPU: its run loop and the debugger's side of it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{
    CpuId, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP,
    KVM_MAX_CPUID_ENTRIES, kvm_guest_debug,
};
use kvm_ioctls::VcpuFd;

use super::assist::{Assistant, Outcome};
use super::exit::{self, Exit};
use super::kick::Kicker;
use super::vm::Shared;
use super::{coalesced, failed, fault, msr, os, state, sys};
use crate::accel::{
    AccelError, BreakKind, CpuProfile, CpuState, DebugControl, DebugExit, ExtraState, HardwareBreakpoint,
    IoBus, Vcpu, VcpuExit, VcpuHandle,
};
use crate::memory::{GuestMemory, PAGE_SIZE};

/// #BP's vector.
const BREAKPOINT_VECTOR: u32 = 3;

/// A virtual CPU on KVM.
pub struct KvmVcpu {
    vm: Arc<Shared>,
    fd: VcpuFd,
    id: u32,
    kicker: Arc<Kicker>,
    /// Signals that KVM was told to block while the guest runs.
    guest_mask: Option<u64>,
    /// After a triple fault, until new state is loaded.
    shut_down: bool,
    /// Size of the mapping of the shared page.
    page_size: usize,
    debug: DebugControl,
    /// Made when it is first needed.
    assistant: Option<Assistant>,
    /// The address of the execution breakpoint that ended the last run.
    stopped_at: Option<u64>,
}

/// What the software CPU did about an instruction that the kernel's emulator does not know.
enum Assisted {
    No,
    GoOn,
    Stop(DebugExit),
}

/// DR6: a single step.
const DR6_STEP: u64 = 1 << 14;

impl KvmVcpu {
    pub fn new(vm: Arc<Shared>, id: u32, cpuid: &CpuId) -> Result<Self, AccelError> {
        let fd = vm.fd.create_vcpu(u64::from(id)).map_err(failed("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        // Firmware switches fast string operations on; kernels that boot without one complain when they are off.
        msr::write(&fd, &[(msr::index::MISC_ENABLE, 1)]).map_err(os("KVM_SET_MSRS"))?;
        if let Some(rings) = &vm.dirty_rings {
            rings.add(&fd).map_err(os("mapping of a dirty ring"))?;
        }
        let kicker = Kicker::new(vm.host.options.kick_signal);
        let page_size = vm.fd.run_size();
        Ok(Self {
            vm,
            fd,
            id,
            kicker,
            guest_mask: None,
            shut_down: false,
            page_size,
            debug: DebugControl::default(),
            assistant: None,
            stopped_at: None,
        })
    }

    /// Gives the time-stamp counter a frequency that the guest knows already.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), AccelError> {
        let own = self.fd.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
        if own == khz {
            return Ok(());
        }
        self.fd.set_tsc_khz(khz).map_err(|_| {
            AccelError::Unsupported(format!(
                "a time-stamp counter of {khz} kHz: it has {own} kHz here, and this host's processors do not scale it"
            ))
        })
    }

    pub fn id(&self) -> u32 {
        self.id
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.vm.memory
    }

    fn executes_breakpoint(&self, address: u64) -> bool {
        self.debug.hardware.iter().any(|b| b.kind == BreakKind::Execute && b.address == address)
    }

    fn apply_debug(&self, control: &DebugControl) -> Result<(), AccelError> {
        let mut request = kvm_guest_debug::default();
        let mut enable =
            |flag: u32, on: bool| request.control |= if on { flag | KVM_GUESTDBG_ENABLE } else { 0 };
        enable(KVM_GUESTDBG_SINGLESTEP, control.single_step);
        enable(KVM_GUESTDBG_USE_SW_BP, control.software_breakpoints);
        enable(KVM_GUESTDBG_USE_HW_BP, !control.hardware.is_empty());
        request.arch.debugreg = debug_registers(&control.hardware)?;
        self.fd.set_guest_debug(&request).map_err(failed("KVM_SET_GUEST_DEBUG"))
    }

    /// A run that begins where an execution breakpoint stopped the last one executes that instruction first: the
    /// processor would stop there again and again. Returns the exit if the step came to another end.
    fn step_off_breakpoint(&mut self, kicker: &Kicker) -> Result<Option<VcpuExit>, AccelError> {
        let Some(address) = self.stopped_at.take() else { return Ok(None) };
        let regs = self.fd.get_regs().map_err(failed("KVM_GET_REGS"))?;
        let sregs = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        if sregs.cs.base.wrapping_add(regs.rip) != address || !self.executes_breakpoint(address) {
            return Ok(None);
        }
        let mut step = self.debug.clone();
        step.single_step = true;
        step.hardware.retain(|b| b.kind != BreakKind::Execute);
        self.apply_debug(&step)?;
        let exit = self.run_loop(kicker);
        self.apply_debug(&self.debug)?;
        Ok(match exit? {
            // Only the step was done, unless the caller asked for it or a watchpoint hit too.
            VcpuExit::Debug(stop) if !self.debug.single_step && stop.dr6 & (DR6_STEP | 0xf) == DR6_STEP => {
                None
            }
            other => Some(other),
        })
    }

    /// Lets the software CPU execute the instruction that the kernel could not, if that is wanted.
    fn assist(&mut self) -> Result<Assisted, AccelError> {
        let Some(ram) = self.vm.assistants_ram.clone() else { return Ok(Assisted::No) };
        let state = state::read(&self.fd)?;
        let rip = fault::linear_rip(&state);
        let mut pages = Vec::with_capacity(2);
        for linear in [rip, rip.wrapping_add(fault::MAX_INSTRUCTION as u64 - 1)] {
            pages.extend(self.translate(linear)?.map(|physical| physical & !(PAGE_SIZE - 1)));
        }
        pages.dedup();
        let (id, vcpus, bus) = (self.id, self.vm.vcpus, &self.vm.bus);
        let assistant = self.assistant.get_or_insert_with(|| Assistant::new(id, vcpus, ram, bus.clone()));
        match assistant.execute(&state, &pages, self.debug.software_breakpoints) {
            None => Ok(Assisted::No),
            Some(Outcome::Breakpoint(rip)) => Ok(Assisted::Stop(DebugExit { rip, dr6: 0, software: true })),
            Some(Outcome::Executed(after)) => {
                state::advance(&self.fd, &after)?;
                self.kicker.count_assisted();
                let step = DebugExit { rip: after.rip, dr6: DR6_STEP, software: false };
                Ok(if self.debug.single_step { Assisted::Stop(step) } else { Assisted::GoOn })
            }
        }
    }

    /// Runs until something is left for the caller to do.
    fn run_loop(&mut self, kicker: &Kicker) -> Result<VcpuExit, AccelError> {
        loop {
            if kicker.take_nmi() {
                self.fd.nmi().map_err(failed("KVM_NMI"))?;
            }
            // Enter the kernel even when kicked: it completes the access of the last exit, without which the state
            // could not be saved.
            self.fd.set_kvm_immediate_exit(kicker.is_kicked().into());
            let result = sys::run(&self.fd);
            if self.vm.coalesces.load(Ordering::Acquire) {
                let turn = &self.vm.coalesced_turn;
                coalesced::deliver(self.fd.get_kvm_run(), self.page_size, turn, &*self.vm.bus);
            }
            if let Err(error) = result {
                match error.raw_os_error() {
                    // An application processor got INIT or SIPI.
                    Some(libc::EAGAIN) => continue,
                    Some(libc::EINTR) => {
                        kicker.drain();
                        if !kicker.take_kick() && kicker.take_nmi() {
                            self.fd.nmi().map_err(failed("KVM_NMI"))?;
                            continue;
                        }
                        return Ok(VcpuExit::Interrupted);
                    }
                    _ => return Err(AccelError::Os { operation: "KVM_RUN", source: error }),
                }
            }
            match exit::decode(self.fd.get_kvm_run(), self.page_size) {
                Exit::Port { port, size, write, data } => port_access(&*self.vm.bus, port, size, write, data),
                Exit::Mmio { address, write: true, data } => self.vm.bus.mmio_write(address, data),
                Exit::Mmio { address, write: false, data } => self.vm.bus.mmio_read(address, data),
                Exit::DirtyRingFull => self.vm.harvest_dirty_rings()?,
                Exit::Interrupted => return Ok(VcpuExit::Interrupted),
                Exit::Shutdown => {
                    self.shut_down = true;
                    return Ok(VcpuExit::TripleFault);
                }
                Exit::System(event) => return Ok(VcpuExit::SystemEvent(event)),
                Exit::Debug(stop) => {
                    let software = stop.exception == BREAKPOINT_VECTOR;
                    let hit = self.executes_breakpoint(stop.pc) && !software;
                    self.stopped_at = hit.then_some(stop.pc);
                    return Ok(VcpuExit::Debug(DebugExit { rip: stop.pc, dr6: stop.dr6, software }));
                }
                Exit::EmulationFailed { bytes } => {
                    match self.assist()? {
                        Assisted::No => {}
                        Assisted::GoOn => continue,
                        Assisted::Stop(stop) => return Ok(VcpuExit::Debug(stop)),
                    }
                    let fault = fault::describe(self, fault::emulation_reason(), bytes)?;
                    return Ok(VcpuExit::Fault(Box::new(fault)));
                }
                Exit::Failed(reason) => {
                    let fault = fault::describe(self, reason, Vec::new())?;
                    return Ok(VcpuExit::Fault(Box::new(fault)));
                }
            }
        }
    }
}

/// Dispatches each element of a port access.
fn port_access(bus: &dyn IoBus, port: u16, size: usize, write: bool, data: &mut [u8]) {
    for element in data.chunks_exact_mut(size) {
        if write {
            bus.port_write(port, element);
        } else {
            bus.port_read(port, element);
        }
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<VcpuExit, AccelError> {
        if self.shut_down {
            return Ok(VcpuExit::TripleFault);
        }
        let kicker = Arc::clone(&self.kicker);
        let _running = kicker.enter(&self.fd, &mut self.guest_mask).map_err(os("KVM_SET_SIGNAL_MASK"))?;
        match self.step_off_breakpoint(&kicker)? {
            Some(exit) => Ok(exit),
            None => self.run_loop(&kicker),
        }
    }

    fn state(&mut self) -> Result<CpuState, AccelError> {
        let mut state = state::read(&self.fd)?;
        if self.shut_down {
            state.mp_state = softcpu::MpState::Shutdown;
        }
        Ok(state)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), AccelError> {
        state::write(&self.fd, state)?;
        self.shut_down = state.mp_state == softcpu::MpState::Shutdown;
        Ok(())
    }

    fn set_registers(&mut self, state: &CpuState) -> Result<(), AccelError> {
        state::write_registers(&self.fd, state)
    }

    fn extra_state(&mut self) -> Result<ExtraState, AccelError> {
        state::read_extra(&self.fd, self.vm.host.saved_msrs()?)
    }

    fn set_extra_state(&mut self, state: &ExtraState) -> Result<(), AccelError> {
        state::write_extra(&self.fd, state, self.vm.host.saved_msrs()?)
    }

    fn profile(&mut self) -> Result<CpuProfile, AccelError> {
        let khz = self.fd.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
        let cpuid = self.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_CPUID2"))?;
        let entry = |leaf, subleaf| {
            let found = cpuid.as_slice().iter().find(|e| e.function == leaf && e.index == subleaf);
            found.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
        };
        Ok(CpuProfile::new(khz, entry))
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.kicker.clone()
    }

    fn set_debug(&mut self, control: &DebugControl) -> Result<(), AccelError> {
        self.apply_debug(control)?;
        self.debug = control.clone();
        self.stopped_at = None;
        Ok(())
    }

    fn translate(&mut self, linear: u64) -> Result<Option<u64>, AccelError> {
        let translation = self.fd.translate_gva(linear).map_err(failed("KVM_TRANSLATE"))?;
        Ok((translation.valid != 0).then_some(translation.physical_address))
    }
}

/// DR0 to DR3 and DR7 for the breakpoints (Intel SDM volume 3, section 18.2.4).
fn debug_registers(breakpoints: &[HardwareBreakpoint]) -> Result<[u64; 8], AccelError> {
    if breakpoints.len() > 4 {
        return Err(AccelError::Unsupported("more than 4 hardware breakpoints".into()));
    }
    let mut registers = [0; 8];
    // Bit 10 is always set; bits 8 and 9 ask for exact data breakpoints.
    let mut dr7 = 0x700;
    for (n, breakpoint) in breakpoints.iter().enumerate() {
        registers[n] = breakpoint.address;
        let kind = match breakpoint.kind {
            BreakKind::Execute => 0b00,
            BreakKind::Write => 0b01,
            BreakKind::Access => 0b11,
        };
        let len = match (breakpoint.kind, breakpoint.len) {
            (_, 1) => 0b00,
            (BreakKind::Write | BreakKind::Access, 2) => 0b01,
            (BreakKind::Write | BreakKind::Access, 4) => 0b11,
            (BreakKind::Write | BreakKind::Access, 8) => 0b10,
            (_, len) => {
                return Err(AccelError::Unsupported(format!("a hardware breakpoint of {len} bytes")));
            }
        };
        dr7 |= 0b10 << (2 * n) | (len << 2 | kind) << (16 + 4 * n);
    }
    registers[7] = dr7;
    Ok(registers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_registers_encode_kind_and_length() {
        let at = |address, len, kind| HardwareBreakpoint { address, len, kind };
        let r =
            debug_registers(&[at(0x1000, 1, BreakKind::Execute), at(0x2000, 4, BreakKind::Write)]).unwrap();
        assert_eq!(r[..2], [0x1000, 0x2000]);
        assert_eq!(r[7], 0x700 | 0b10 | 0b1000 | 0b1101 << 20);
        assert!(debug_registers(&[at(0, 2, BreakKind::Execute)]).is_err());
        assert!(debug_registers(&[at(0, 3, BreakKind::Write)]).is_err());
        assert!(debug_registers(&[at(0, 1, BreakKind::Write); 5]).is_err());
    }
}
