//! The run loop: events, interrupts, and blocks in between.

use super::flags::{IF, TF};
use super::{CR4_DE, Cpu, Exception, Fault, mode, vector};
use crate::block::op::{BlockPtr, execute};
use crate::config::CpuConfig;
use crate::exit::{Budget, DebugEvent, Exit, Watchpoint};
use crate::handle::{INIT, INTERRUPT, KICK, NMI, SIPI};
use crate::state::{CpuState, MpState, Segment};

/// Instructions after which the loop looks for events and timers.
const SLICE: u64 = 4096;
/// Any breakpoint is enabled.
const DR7_ENABLED: u64 = 0xff;
/// DR6: single step.
const DR6_BS: u64 = 1 << 14;
/// What a breakpoint waits for (R/W fields of DR7).
const BREAK_EXECUTE: u64 = 0;
const BREAK_WRITE: u64 = 1;
const BREAK_IO: u64 = 2;
const BREAK_ACCESS: u64 = 3;

/// One of DR0 to DR3.
struct Breakpoint {
    /// Its bit in DR6.
    hit: u64,
    kind: u64,
    address: u64,
    len: u64,
}

impl Cpu {
    /// Executes guest code until there is a reason to stop.
    pub fn run(&mut self, budget: Budget) -> Exit {
        self.memory.sync().enter(&self.member);
        if std::mem::take(&mut self.kvm_clock_due) {
            self.update_kvm_clock();
        }
        let exit = self.run_until(budget);
        self.member.leave();
        self.config.clock.advance_to(self.executed.wrapping_add(self.skipped));
        exit
    }

    fn run_until(&mut self, budget: Budget) -> Exit {
        let end = self.executed.saturating_add(budget.instructions);
        let mut first = true;
        loop {
            self.follow_memory();
            if let Some(exit) = self.events(budget.wait) {
                return exit;
            }
            if self.executed >= end {
                return Exit::Budget;
            }
            if self.mp_state != MpState::Running {
                continue;
            }
            let allowed = SLICE.min(end - self.executed).min(self.until_deadline());
            let traced = self.debug.single_step
                || !self.debug.breakpoints.is_empty()
                || !self.debug.watchpoints.is_empty();
            let alone = self.shadow
                || self.restarting
                || self.flags & TF != 0
                || traced
                || self.dr[7] & DR7_ENABLED != 0;
            if !alone {
                if let Some(exit) = self.run_slice(allowed, false).or_else(|| self.debug_traps()) {
                    return exit;
                }
            } else {
                if traced && !first && self.at_breakpoint() {
                    return Exit::Debug(DebugEvent::Breakpoint(self.linear_rip()));
                }
                let before = self.executed;
                if let Some(exit) = self.run_alone().or_else(|| self.debug_traps()) {
                    return exit;
                }
                if let Some(address) = self.watched.take() {
                    return Exit::Debug(DebugEvent::Watchpoint(address));
                }
                if self.debug.single_step && self.executed != before {
                    return Exit::Debug(DebugEvent::Step);
                }
            }
            first = false;
        }
    }

    /// Executes blocks until one leaves. `single` executes one instruction only.
    fn run_slice(&mut self, allowed: u64, single: bool) -> Option<Exit> {
        let first = match self.next_block(single) {
            Ok(block) => block,
            Err(Fault) => {
                self.stack_fault(false);
                return self.deliver_pending();
            }
        };
        if u64::from(first.count) > allowed && !single {
            // Exact budgets: the block does not fit any more.
            return self.run_slice(1, true);
        }
        self.slice = allowed as i64;
        self.fuel = self.slice - i64::from(first.count);
        execute(self, first.first());
        self.resident.settle(&mut self.fpu);
        self.executed += (self.slice - self.fuel) as u64;
        self.slice = 0;
        self.fuel = 0;
        if self.pending.is_some() { self.deliver_pending() } else { None }
    }

    /// The block at RIP, translated when it is due.
    fn next_block(&mut self, single: bool) -> Result<BlockPtr, Fault> {
        let block = self.find_block(single)?;
        #[cfg(feature = "native")]
        if crate::block::native::is_due(&block) && !self.translate_block(block) {
            // All blocks were dropped to make room, this one too. The run loop must not hear of it: an interrupt
            // between STI and its next instruction would be one.
            return self.next_block(single);
        }
        Ok(block)
    }

    /// Executes one instruction with everything that can only happen around single instructions.
    fn run_alone(&mut self) -> Option<Exit> {
        if let hits @ 1.. = self.instruction_breakpoints() {
            self.hit_breakpoints(hits);
            // The only #DB that is a fault: the handler returns with RF set, or it would fire again.
            self.flags |= super::flags::RF;
            self.raise(vector::DB, None);
            return self.deliver_pending();
        }
        self.flags &= !super::flags::RF;
        self.step = self.flags & TF != 0;
        // It ends with this instruction, also when that faults.
        self.shadow = false;
        self.traps_held = false;
        self.mode |= mode::SINGLE;
        self.blocks.set_mode(self.mode);
        let before = self.executed;
        let exit = self.run_slice(1, true);
        self.restarting = self.restarting && self.executed == before;
        if self.executed == before {
            self.step = false;
        }
        self.update_mode();
        exit
    }

    /// Raises the `#DB` that is due after the instructions that were executed.
    fn debug_traps(&mut self) -> Option<Exit> {
        if self.traps_held || !self.step && self.data_hits == 0 {
            return None;
        }
        let hits = std::mem::take(&mut self.data_hits);
        self.hit_breakpoints(hits);
        if std::mem::take(&mut self.step) {
            self.dr[6] |= DR6_BS;
        }
        // HLT was executed, but does not last.
        self.mp_state = MpState::Running;
        self.raise(vector::DB, None);
        self.deliver_pending()
    }

    /// Says in DR6 which breakpoints were hit.
    pub(crate) fn hit_breakpoints(&mut self, hits: u64) {
        self.dr[6] = self.dr[6] & !0xf | hits;
    }

    /// SS was loaded: neither interrupts nor debug traps before the next instruction has executed.
    pub(crate) fn hold_events(&mut self) {
        self.shadow = true;
        self.traps_held = true;
    }

    fn at_breakpoint(&self) -> bool {
        self.debug.breakpoints.contains(&self.linear_rip())
    }

    /// Linear address of the next instruction.
    pub(crate) fn linear_rip(&self) -> u64 {
        if self.code64 {
            self.rip()
        } else {
            self.segs[super::seg::CS].base.wrapping_add(self.rip()) & 0xffff_ffff
        }
    }

    /// Whether data accesses have to be compared with breakpoints.
    pub(crate) fn watches_data(&self) -> bool {
        !self.debug.watchpoints.is_empty()
            || self.breakpoints().any(|b| matches!(b.kind, BREAK_WRITE | BREAK_ACCESS))
    }

    /// The breakpoints that DR7 enables.
    fn breakpoints(&self) -> impl Iterator<Item = Breakpoint> {
        let dr7 = self.dr[7];
        self.dr.into_iter().take(4).enumerate().filter_map(move |(n, address)| {
            let len = [1, 2, 8, 4][(dr7 >> (18 + 4 * n) & 3) as usize];
            (dr7 >> (2 * n) & 3 != 0).then(|| Breakpoint {
                hit: 1 << n,
                kind: dr7 >> (16 + 4 * n) & 3,
                address: address & !(len - 1),
                len,
            })
        })
    }

    /// Compares a data access with the breakpoints of the guest and of the debugger.
    #[cold]
    pub(crate) fn watch(&mut self, address: u64, size: u64, write: bool) {
        let touches =
            |at: u64, len: u64| address < at.saturating_add(len) && at < address.saturating_add(size);
        let counts = |kind| kind == BREAK_ACCESS || write && kind == BREAK_WRITE;
        let hits = self.breakpoints().filter(|b| counts(b.kind) && touches(b.address, b.len));
        self.data_hits |= hits.fold(0, |hits, b| hits | b.hit);
        let hit = |w: &&Watchpoint| (if write { w.write } else { w.read }) && touches(w.address, w.len);
        if let Some(hit) = self.debug.watchpoints.iter().find(hit) {
            self.watched = Some(hit.address);
        }
    }

    /// Compares a port access with the guest's I/O breakpoints.
    pub(crate) fn watch_port(&mut self, port: u16, size: u64) {
        if self.dr[7] & DR7_ENABLED == 0 || self.cr4 & CR4_DE == 0 {
            return;
        }
        let port = u64::from(port);
        let touches =
            |b: &Breakpoint| b.kind == BREAK_IO && port < b.address + b.len && b.address < port + size;
        self.data_hits |= self.breakpoints().filter(touches).fold(0, |hits, b| hits | b.hit);
    }

    /// The breakpoints that ask for a fault before this instruction, as bits of DR6.
    fn instruction_breakpoints(&self) -> u64 {
        if self.dr[7] & DR7_ENABLED == 0 || self.flags & super::flags::RF != 0 {
            return 0;
        }
        let rip = self.linear_rip();
        let here = |b: &Breakpoint| b.kind == BREAK_EXECUTE && b.len == 1 && b.address == rip;
        self.breakpoints().filter(here).fold(0, |hits, b| hits | b.hit)
    }

    /// Follows what other threads did to the memory.
    pub(crate) fn follow_memory(&mut self) {
        if self.memory.sync().must_pause(&self.member) {
            self.member.leave();
            self.memory.sync().enter(&self.member);
        }
        if let Some(request) = self.memory.sync().must_flush(&self.member) {
            if self.memory.map_generation() != self.map_generation {
                self.map_generation = self.memory.map_generation();
                self.map = self.memory.snapshot();
                self.blocks.clear();
                self.flush_tlb();
            }
            self.tlb.forget_writes();
            let memory = self.memory.clone();
            memory.sync().flushed(&self.member, request);
        }
        if self.member.has_invalidated() {
            match self.member.take_invalidated() {
                Some(pages) => pages.iter().for_each(|&page| self.blocks.invalidate_page(page)),
                None => self.blocks.clear(),
            }
        }
        self.blocks.collect();
    }

    /// Calls into the machine: meanwhile other threads need not wait for this processor. Virtual time is
    /// brought up to date, since devices may look at it.
    pub(crate) fn outside<R>(&mut self, call: impl FnOnce() -> R) -> R {
        if self.config.clock.is_deterministic() {
            self.config.clock.advance_to(self.instructions_now().wrapping_add(self.skipped));
        }
        self.member.leave();
        let result = call();
        self.memory.sync().enter(&self.member);
        self.catch_up();
        result
    }

    /// Executes a part of an instruction while no other processor executes guest code.
    #[cold]
    pub(crate) fn alone<R>(&mut self, change: impl FnOnce(&mut Self) -> R) -> R {
        let (memory, member) = (self.memory.clone(), self.member.clone());
        member.leave();
        let alone = memory.sync().alone(&member);
        self.catch_up();
        let result = change(self);
        drop(alone);
        result
    }

    /// Drops translations that became stale while the processor was not executing.
    fn catch_up(&mut self) {
        if self.memory.sync().must_flush(&self.member).is_some() {
            self.tlb.forget_writes();
            if self.memory.map_generation() != self.map_generation {
                // The pages behind translations may be gone; everything else can wait for the run loop.
                self.tlb.flush_all();
                self.events_soon();
            }
        }
    }

    /// Makes the current slice end with the current block.
    #[inline]
    pub(crate) fn events_soon(&mut self) {
        if self.slice > 0 {
            // Keep the count of executed instructions: both sides move.
            let rest = self.fuel.max(0);
            self.slice -= rest;
            self.fuel -= rest;
        }
    }

    /// Something about the local APIC may have changed.
    pub(crate) fn local_changed(&mut self) {
        self.deadline = self.local.deadline();
        self.ask_local = true;
        self.next_poll = 0;
        self.events_soon();
    }

    /// Instructions executed, including the current one (if it is a generic one or runs alone).
    fn instructions_now(&self) -> u64 {
        self.executed + (self.slice - self.fuel) as u64 - self.ahead
    }

    /// The time-stamp counter as the guest reads it.
    pub(crate) fn tsc_now(&self) -> u64 {
        let now = if self.config.clock.is_deterministic() {
            self.instructions_now().wrapping_add(self.skipped)
        } else {
            self.config.clock.tsc()
        };
        now.wrapping_add(self.tsc_offset)
    }

    /// Guest TSC minus the clock's.
    pub(crate) fn tsc_offset(&self) -> u64 {
        self.tsc_offset
    }

    /// Sets the time-stamp counter.
    pub(crate) fn set_tsc(&mut self, value: u64) {
        self.tsc_offset = self.tsc_offset.wrapping_add(value.wrapping_sub(self.tsc_now()));
        self.update_kvm_clock();
    }

    /// In deterministic mode the number of instructions until the timer expires.
    fn until_deadline(&self) -> u64 {
        match self.deadline {
            Some(deadline) if self.config.clock.is_deterministic() => {
                deadline.saturating_sub(self.tsc_now()).max(1)
            }
            _ => u64::MAX,
        }
    }

    /// Handles what happens between instructions.
    fn events(&mut self, wait: bool) -> Option<Exit> {
        if self.handle.peek() != 0 {
            let events = self.handle.take(KICK | INTERRUPT | NMI | INIT | SIPI);
            if events & INIT != 0 {
                self.init();
            }
            if events & SIPI != 0 && self.mp_state == MpState::WaitForSipi {
                self.start_up(self.handle.sipi_vector());
            }
            if events & NMI != 0 {
                // One can wait while another is being handled, two while none is.
                let most = if self.nmi_blocked { 1 } else { 2 };
                self.nmis = self.nmis.saturating_add(self.handle.take_nmis()).min(most);
            }
            self.ask_local |= events & INTERRUPT != 0;
            if events & KICK != 0 {
                return Some(Exit::Kicked);
            }
        }
        self.poll_timer();
        match self.mp_state {
            MpState::Running => {}
            MpState::Shutdown => return Some(Exit::TripleFault),
            MpState::WaitForSipi => return self.idle(wait),
            MpState::Halted => {
                let mut wake = self.nmis > 0 && !self.nmi_blocked;
                if self.flags & IF != 0 && self.ask_local {
                    self.ask_local = self.local.pending();
                    wake |= self.ask_local;
                }
                if !wake {
                    return self.idle(wait);
                }
                self.mp_state = MpState::Running;
            }
        }
        if self.shadow || self.restarting {
            return None;
        }
        if self.nmis > 0 && !self.nmi_blocked {
            self.nmis -= 1;
            self.nmi_blocked = true;
            return self.deliver_external(vector::NMI);
        }
        if self.ask_local && self.flags & IF != 0 {
            self.ask_local = self.local.pending();
            if self.ask_local {
                let vector = self.local.acknowledge();
                self.deadline = self.local.deadline();
                if let Some(vector) = vector {
                    return self.deliver_external(vector);
                }
            }
        }
        None
    }

    fn poll_timer(&mut self) {
        let Some(deadline) = self.deadline else { return };
        let due = self.executed >= self.next_poll
            || self.mp_state != MpState::Running
            || self.config.clock.is_deterministic();
        if due {
            self.next_poll = self.executed + SLICE;
            let now = self.tsc_now();
            if now >= deadline {
                self.local.timer(now);
                self.local_changed();
            }
        }
    }

    /// Nothing to execute: sleeps until something happens, or skips virtual time.
    fn idle(&mut self, wait: bool) -> Option<Exit> {
        if self.config.clock.is_deterministic()
            && let Some(deadline) = self.deadline
        {
            self.skipped = self.skipped.wrapping_add(deadline.saturating_sub(self.tsc_now()));
            self.config.clock.advance_to(self.executed.wrapping_add(self.skipped));
            return None;
        }
        if !wait {
            return Some(Exit::Halted);
        }
        let clock = self.config.clock.clone();
        let timeout = self.deadline.map(|d| clock.until(d.wrapping_sub(self.tsc_offset)));
        let handle = self.handle.clone();
        self.member.leave();
        handle.sleep(timeout);
        self.memory.sync().enter(&self.member);
        None
    }

    /// INIT: like RESET, but the caches, the FPU and most MSRs keep their state.
    fn init(&mut self) {
        let old = self.state();
        let mut state = CpuState::reset();
        state.fpu = old.fpu;
        state.tsc = old.tsc;
        state.msrs = old.msrs;
        state.msrs.efer = 0;
        state.cr0 |= old.cr0 & 0x6000_0000;
        if !self.config.bootstrap {
            state.mp_state = MpState::WaitForSipi;
        }
        self.local.init();
        self.set_state(&state);
    }

    fn start_up(&mut self, page: u8) {
        let mut state = self.state();
        state.mp_state = MpState::Running;
        state.rip = 0;
        state.segments[super::seg::CS] = Segment {
            selector: u16::from(page) << 8,
            base: u64::from(page) << 12,
            ..state.segments[super::seg::CS]
        };
        self.set_state(&state);
    }

    /// Puts the processor into the state after RESET, as [`Cpu::new`] does.
    pub fn reset(&mut self) {
        let CpuConfig { bootstrap, .. } = self.config;
        let mut state = CpuState::reset();
        if !bootstrap {
            state.mp_state = MpState::WaitForSipi;
        }
        state.tsc = self.tsc_now();
        self.handle.take(INTERRUPT | NMI | INIT | SIPI);
        self.handle.take_nmis();
        self.local.init();
        self.set_state(&state);
    }

    /// Delivers what [`Cpu::pending`] holds.
    fn deliver_pending(&mut self) -> Option<Exit> {
        match self.pending.take()? {
            Exception::Restart => {
                self.restarting = true;
                None
            }
            Exception::Int3 => Some(Exit::Debug(DebugEvent::Int3(self.linear_rip()))),
            Exception::Vector { vector, error } => self.deliver_exception(vector, error),
        }
    }

    pub(super) fn triple_fault(&mut self) -> Option<Exit> {
        self.mp_state = MpState::Shutdown;
        Some(Exit::TripleFault)
    }
}
