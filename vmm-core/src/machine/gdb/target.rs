//! The machine as the debugger sees it.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use softcpu::CpuState;

use super::super::events::StopReason;
use super::super::vcpu::Control;
use crate::accel::{BreakKind, DebugControl, HardwareBreakpoint};
use crate::memory::{GuestMemory, PAGE_SIZE};

/// The instruction that software breakpoints are made of: INT3.
const INT3: u8 = 0xcc;
/// DR6: a single step.
const DR6_STEP: u64 = 1 << 14;

/// Errors that end the session do not happen: a machine that has stopped reports that it exited.
#[derive(Debug)]
pub(super) enum Unreachable {}

impl std::fmt::Display for Unreachable {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {}
    }
}

/// The debugger's number of a vCPU; numbers start at 1.
pub(super) fn tid(vcpu: u32) -> Tid {
    NonZeroUsize::MIN.saturating_add(vcpu as usize)
}

fn vcpu(tid: Tid) -> u32 {
    (tid.get() - 1) as u32
}

pub(super) struct Debuggee {
    control: Arc<Control>,
    memory: GuestMemory,
    vcpus: u32,
    /// Software breakpoints: linear address to physical address and the byte that was there.
    software: BTreeMap<u64, (u64, u8)>,
    hardware: Vec<HardwareBreakpoint>,
    /// Which vCPU the next resume steps.
    step: Option<u32>,
    /// While it steps, the other vCPUs wait.
    locked: bool,
}

impl Debuggee {
    pub(super) fn new(control: Arc<Control>, memory: GuestMemory, vcpus: u32) -> Self {
        Self {
            control,
            memory,
            vcpus,
            software: BTreeMap::new(),
            hardware: Vec::new(),
            step: None,
            locked: false,
        }
    }

    pub(super) fn control(&self) -> &Control {
        &self.control
    }

    /// Why the machine stopped since it was resumed, if it did.
    pub(super) fn stop_reason(&self) -> Option<MultiThreadStopReason<u64>> {
        self.control.clear_debug_event();
        match self.control.ending() {
            None => {}
            Some(StopReason::PowerOff | StopReason::Reset) => return Some(MultiThreadStopReason::Exited(0)),
            Some(StopReason::Exit(code)) => return Some(MultiThreadStopReason::Exited(code)),
            Some(_) => return Some(MultiThreadStopReason::Terminated(Signal::SIGABRT)),
        }
        let (id, exit) = self.control.take_debug_stop()?;
        let tid = tid(id);
        if exit.software {
            return Some(MultiThreadStopReason::SwBreak(tid));
        }
        if exit.dr6 & DR6_STEP != 0 {
            return Some(MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP });
        }
        let hit = self.hardware.get((exit.dr6 & 15).trailing_zeros() as usize);
        Some(match hit {
            Some(HardwareBreakpoint {
                address, kind: kind @ (BreakKind::Write | BreakKind::Access), ..
            }) => {
                let kind = if *kind == BreakKind::Write { WatchKind::Write } else { WatchKind::ReadWrite };
                MultiThreadStopReason::Watch { tid, kind, addr: *address }
            }
            _ => MultiThreadStopReason::HwBreak(tid),
        })
    }

    /// Removes all breakpoints and lets the machine run.
    pub(super) fn detach(&mut self) {
        self.control.pause();
        for (_, (physical, byte)) in std::mem::take(&mut self.software) {
            // It was writable when the breakpoint was set; RAM does not go away.
            let _ = self.memory.write(physical, &[byte]);
        }
        self.hardware.clear();
        self.step = None;
        self.apply();
        self.control.run();
    }

    /// Programs all vCPUs; false when one cannot do what is asked.
    fn apply(&self) -> bool {
        (0..self.vcpus).all(|id| {
            let control = DebugControl {
                single_step: self.step == Some(id),
                software_breakpoints: !self.software.is_empty(),
                hardware: self.hardware.clone(),
            };
            self.control.with_vcpu(id, move |vcpu| vcpu.set_debug(&control).is_ok()).unwrap_or(false)
        })
    }

    /// Adds a hardware breakpoint when all vCPUs take it.
    fn add_hardware(&mut self, breakpoint: HardwareBreakpoint) -> bool {
        self.hardware.push(breakpoint);
        let taken = self.apply();
        if !taken {
            self.hardware.pop();
            self.apply();
        }
        taken
    }

    fn remove_hardware(&mut self, address: u64, kind: impl Fn(BreakKind) -> bool) -> bool {
        let at = self.hardware.iter().position(|b| b.address == address && kind(b.kind));
        at.map(|at| self.hardware.remove(at)).is_some() && self.apply()
    }

    fn state(&self, tid: Tid) -> TargetResult<CpuState, Self> {
        self.control.with_vcpu(vcpu(tid), |vcpu| vcpu.state().ok()).flatten().ok_or(TargetError::NonFatal)
    }

    fn translate(&self, tid: Tid, linear: u64) -> Option<u64> {
        self.control.with_vcpu(vcpu(tid), move |vcpu| vcpu.translate(linear).ok().flatten()).flatten()
    }

    /// Calls `piece` with the physical address and the part of `len` on each page.
    fn pages(
        &self,
        tid: Tid,
        start: u64,
        len: usize,
        mut piece: impl FnMut(u64, std::ops::Range<usize>) -> bool,
    ) -> usize {
        let mut done = 0;
        while done < len {
            let linear = start.wrapping_add(done as u64);
            let n = (len - done).min((PAGE_SIZE - linear % PAGE_SIZE) as usize);
            match self.translate(tid, linear) {
                Some(physical) if piece(physical, done..done + n) => done += n,
                _ => break,
            }
        }
        done
    }
}

impl Target for Debuggee {
    type Arch = X86_64_SSE;
    type Error = Unreachable;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

/// Positions of the debugger's RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, R8 to R15 in the encoding's order.
const ORDER: [usize; 16] = [0, 3, 1, 2, 6, 7, 5, 4, 8, 9, 10, 11, 12, 13, 14, 15];
/// The same for CS, SS, DS, ES, FS, GS.
const SEGMENTS: [usize; 6] = [1, 2, 3, 0, 4, 5];

impl MultiThreadBase for Debuggee {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let state = self.state(tid)?;
        regs.regs = ORDER.map(|at| state.gpr[at]);
        regs.rip = state.rip;
        regs.eflags = state.rflags as u32;
        let [cs, ss, ds, es, fs, gs] = SEGMENTS.map(|at| u32::from(state.segments[at].selector));
        let s = &mut regs.segments;
        (s.cs, s.ss, s.ds, s.es, s.fs, s.gs) = (cs, ss, ds, es, fs, gs);
        for (to, from) in regs.st.iter_mut().zip(&state.fpu.st) {
            to.copy_from_slice(&from.to_le_bytes()[..10]);
        }
        regs.fpu.fctrl = state.fpu.fcw.into();
        regs.fpu.fstat = state.fpu.fsw.into();
        regs.xmm = state.fpu.xmm;
        regs.mxcsr = state.fpu.mxcsr;
        Ok(())
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let mut state = self.state(tid)?;
        for (value, at) in regs.regs.iter().zip(ORDER) {
            state.gpr[at] = *value;
        }
        state.rip = regs.rip;
        state.rflags = u64::from(regs.eflags) | 2;
        state.fpu.xmm = regs.xmm;
        let set = self.control.with_vcpu(vcpu(tid), move |vcpu| vcpu.set_state(&state).is_ok());
        if set == Some(true) { Ok(()) } else { Err(TargetError::NonFatal) }
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let memory = self.memory.clone();
        let n = self.pages(tid, start, data.len(), |at, range| memory.read(at, &mut data[range]).is_ok());
        if n == 0 && !data.is_empty() { Err(TargetError::NonFatal) } else { Ok(n) }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let n = self.pages(tid, start, data.len(), |at, range| self.memory.write(at, &data[range]).is_ok());
        if n < data.len() { Err(TargetError::NonFatal) } else { Ok(()) }
    }

    fn list_active_threads(&mut self, register: &mut dyn FnMut(Tid)) -> Result<(), Self::Error> {
        (0..self.vcpus).for_each(|id| register(tid(id)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Debuggee {
    fn resume(&mut self) -> Result<(), Self::Error> {
        self.apply();
        self.control.run_only(self.step.filter(|_| self.locked));
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Self::Error> {
        self.step = None;
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, _tid: Tid, _signal: Option<Signal>) -> Result<(), Self::Error> {
        Ok(())
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSchedulerLocking for Debuggee {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Self::Error> {
        self.locked = true;
        Ok(())
    }
}

impl MultiThreadSingleStep for Debuggee {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Self::Error> {
        self.step = Some(vcpu(tid));
        Ok(())
    }
}

impl Breakpoints for Debuggee {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Debuggee {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let Some(physical) = self.translate(tid(0), address) else { return Ok(false) };
        if self.software.contains_key(&address) {
            return Ok(true);
        }
        let Ok(byte) = self.memory.read_obj::<u8>(physical) else { return Ok(false) };
        if self.memory.write(physical, &[INT3]).is_err() {
            return Ok(false);
        }
        self.software.insert(address, (physical, byte));
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let Some((physical, byte)) = self.software.remove(&address) else { return Ok(false) };
        Ok(self.memory.write(physical, &[byte]).is_ok())
    }
}

impl HwBreakpoint for Debuggee {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.add_hardware(HardwareBreakpoint { address, len: 1, kind: BreakKind::Execute }))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.remove_hardware(address, |kind| kind == BreakKind::Execute))
    }
}

impl HwWatchpoint for Debuggee {
    fn add_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        if !matches!(len, 1 | 2 | 4 | 8) {
            return Ok(false);
        }
        let kind = if kind == WatchKind::Write { BreakKind::Write } else { BreakKind::Access };
        Ok(self.add_hardware(HardwareBreakpoint { address, len: len as u8, kind }))
    }

    fn remove_hw_watchpoint(&mut self, address: u64, _len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let wanted = if kind == WatchKind::Write { BreakKind::Write } else { BreakKind::Access };
        Ok(self.remove_hardware(address, |kind| kind == wanted))
    }
}
