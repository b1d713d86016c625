//! A vCPU of the software accelerator.

use std::sync::Arc;

use softcpu::{Budget, Cpu, CpuConfig, CpuHandle, DebugEvent, Exit};

use super::bus::SoftBus;
use super::lapic::{Apics, Lapic, LocalApic};
use super::walk;
use crate::accel::{
    AccelError, BreakKind, CpuState, DebugControl, DebugExit, HardwareBreakpoint, Vcpu, VcpuExit, VcpuHandle,
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
        let local = LocalApic::new(apics.clone(), lapic.clone(), config.clock.clone());
        let cpu = Cpu::new(config, ram, bus.clone(), Box::new(local));
        lapic.attach(cpu.handle());
        Self { cpu, breakpoints: Vec::new(), memory }
    }
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

    fn set_state(&mut self, state: &CpuState) -> Result<(), AccelError> {
        self.cpu.set_state(state);
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
}
