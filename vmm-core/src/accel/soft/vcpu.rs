//! A vCPU of the software accelerator.

use std::any::Any;
use std::sync::Arc;

use softcpu::{Budget, Cpu, CpuConfig, CpuHandle, DebugEvent, Exit};

use super::bus::SoftBus;
use super::lapic::{Apics, Lapic, LocalApic};
use super::walk;
use crate::accel::{
    AccelError, BreakKind, CpuProfile, CpuState, DebugControl, DebugExit, ExtraState, HardwareBreakpoint,
    Vcpu, VcpuExit, VcpuHandle,
};
use crate::memory::GuestMemory;

/// Breakpoints and watchpoints that a debugger may set at a time, as on hardware.
const MAX_HARDWARE: usize = 4;
/// DR6: a single step.
const DR6_STEP: u64 = 1 << 14;

pub(super) struct SoftVcpu {
    cpu: Cpu,
    /// Breakpoints in the order in which the debugger gave them.
    breakpoints: Vec<u64>,
    /// Keeps the host memory mapped that `cpu` executes from.
    memory: GuestMemory,
    profile: CpuProfile,
}

impl SoftVcpu {
    pub(super) fn new(
        config: CpuConfig,
        memory: GuestMemory,
        ram: Arc<softcpu::GuestMemory>,
        bus: &Arc<SoftBus>,
        apics: &Arc<Apics>,
        lapic: &Arc<Lapic>,
    ) -> Self {
        let model = config.model;
        let profile = CpuProfile::new(config.clock.khz(), |leaf, subleaf| {
            model.features(leaf, subleaf).unwrap_or_default()
        });
        let local = LocalApic::new(apics.clone(), lapic.clone(), config.clock.clone());
        let cpu = Cpu::new(config, ram, bus.clone(), Box::new(local));
        lapic.attach(cpu.handle());
        Self { cpu, breakpoints: Vec::new(), memory, profile }
    }
}

impl SoftVcpu {
    fn apic(&mut self) -> Result<&mut LocalApic, AccelError> {
        let local: &mut dyn Any = self.cpu.local();
        local.downcast_mut().ok_or_else(|| AccelError::Unsupported("another local APIC".into()))
    }
}

/// Refuses control registers that a processor would fault on.
fn check(state: &CpuState) -> Result<(), AccelError> {
    const PE: u64 = 1;
    const NW: u64 = 1 << 29;
    const CD: u64 = 1 << 30;
    const PG: u64 = 1 << 31;
    const LME: u64 = 1 << 8;
    const LMA: u64 = 1 << 10;
    /// SCE, LME, LMA, NXE, AutoIBRS.
    const EFER: u64 = 0x20_0d01;
    /// XSAVE is not there, and so XCR0 stays as after a reset.
    const XCR0: u64 = 1;
    let (cr0, efer) = (state.cr0, state.msrs.efer);
    let what = if cr0 & (PE | PG) == PG || cr0 & (NW | CD) == NW || cr0 >> 32 != 0 {
        format!("CR0 {cr0:#x}")
    } else if efer & !EFER != 0 || (efer & LMA != 0) != (efer & LME != 0 && cr0 & PG != 0) {
        format!("EFER {efer:#x}")
    } else if state.cr4 & !CpuState::CR4_KNOWN != 0 {
        format!("CR4 {:#x}", state.cr4)
    } else if state.xcr0 & !XCR0 != 0 {
        format!("XCR0 {:#x}", state.xcr0)
    } else {
        return Ok(());
    };
    Err(AccelError::InvalidState(what))
}

impl Vcpu for SoftVcpu {
    fn run(&mut self) -> Result<VcpuExit, AccelError> {
        loop {
            return Ok(match self.cpu.run(Budget::UNLIMITED) {
                Exit::Kicked => VcpuExit::Interrupted,
                Exit::TripleFault => VcpuExit::TripleFault,
                Exit::Debug(event) => VcpuExit::Debug(match event {
                    DebugEvent::Step => {
                        DebugExit { rip: self.cpu.state().rip, dr6: DR6_STEP, software: false }
                    }
                    DebugEvent::Int3(rip) => DebugExit { rip, dr6: 0, software: true },
                    DebugEvent::Breakpoint(at) | DebugEvent::Watchpoint(at) => {
                        let hit = self.breakpoints.iter().position(|&b| b == at).unwrap_or(0);
                        DebugExit { rip: self.cpu.state().rip, dr6: 1 << hit, software: false }
                    }
                    _ => DebugExit { rip: self.cpu.state().rip, dr6: 0, software: false },
                }),
                // The budget neither ends nor forbids to sleep.
                _ => continue,
            });
        }
    }

    fn state(&mut self) -> Result<CpuState, AccelError> {
        Ok(self.cpu.state())
    }

    fn profile(&mut self) -> Result<CpuProfile, AccelError> {
        Ok(self.profile.clone())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), AccelError> {
        check(state)?;
        self.cpu.set_state(state);
        Ok(())
    }

    fn extra_state(&mut self) -> Result<ExtraState, AccelError> {
        let tsc = self.cpu.state().tsc;
        let apic = self.apic()?.save(tsc);
        // Events are delivered before `run` returns, and `CpuState` holds all registers of this processor.
        Ok(ExtraState { apic, pending: None, msrs: Vec::new(), xsave: Vec::new() })
    }

    fn set_extra_state(&mut self, state: &ExtraState) -> Result<(), AccelError> {
        let cpu = self.cpu.state();
        self.apic()?.load(&state.apic, state.pending, cpu.tsc)?;
        // The processor looks at its APIC anew.
        self.cpu.set_state(&cpu);
        Ok(())
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        Arc::new(Handle(self.cpu.handle()))
    }

    fn set_debug(&mut self, control: &DebugControl) -> Result<(), AccelError> {
        // DR6 says which one stopped the vCPU, and has four bits for it.
        if control.hardware.len() > MAX_HARDWARE {
            let n = control.hardware.len();
            return Err(AccelError::Unsupported(format!(
                "{n} hardware breakpoints; use {MAX_HARDWARE} at most"
            )));
        }
        self.breakpoints = control.hardware.iter().map(|b| b.address).collect();
        let (execute, data): (Vec<HardwareBreakpoint>, Vec<_>) =
            control.hardware.iter().copied().partition(|b| b.kind == BreakKind::Execute);
        let watchpoint = |b: HardwareBreakpoint| softcpu::Watchpoint {
            address: b.address,
            len: b.len.into(),
            read: b.kind == BreakKind::Access,
            write: true,
        };
        self.cpu.set_debug(softcpu::DebugControl {
            single_step: control.single_step,
            trap_int3: control.software_breakpoints,
            breakpoints: execute.iter().map(|b| b.address).collect(),
            watchpoints: data.into_iter().map(watchpoint).collect(),
        });
        Ok(())
    }

    fn translate(&mut self, linear: u64) -> Result<Option<u64>, AccelError> {
        Ok(walk::translate(&self.memory, &self.cpu.state(), linear))
    }
}

struct Handle(Arc<CpuHandle>);

impl VcpuHandle for Handle {
    fn kick(&self) {
        self.0.kick();
    }

    fn nmi(&self) {
        self.0.nmi();
    }

    fn unimplemented(&self) -> u64 {
        self.0.unimplemented()
    }
}
