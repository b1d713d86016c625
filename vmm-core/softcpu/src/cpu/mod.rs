//! The processor.

pub(crate) mod control;
mod cpuid;
pub(crate) mod exception;
pub(crate) mod flags;
mod msr;
mod run;
pub(crate) mod segment;
mod transfer;

use std::collections::HashSet;
use std::sync::Arc;

use crate::block::cache::BlockCache;
#[cfg(feature = "native")]
use crate::block::native::Native;
use crate::block::op::{FS_BASE, GS_BASE, RIP};
use crate::bus::{Bus, Local};
use crate::config::CpuConfig;
use crate::exit::DebugControl;
use crate::handle::CpuHandle;
use crate::hostop::{Resident, StubCache};
use crate::memory::{GuestMemory, Map, Member};
use crate::mmu::tlb::{ENTRIES, Entry, NO_ENTRIES, Tlb};
use crate::state::{CpuState, DescriptorTable, FpuState, MpState, Msrs, Segment};
use flags::Lazy;

/// Exception vectors.
pub(crate) mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

/// Segment register numbers.
pub(crate) mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

pub(crate) const CR0_PE: u64 = 1 << 0;
pub(crate) const CR0_MP: u64 = 1 << 1;
pub(crate) const CR0_EM: u64 = 1 << 2;
pub(crate) const CR0_TS: u64 = 1 << 3;
pub(crate) const CR0_AM: u64 = 1 << 18;
pub(crate) const CR4_TSD: u64 = 1 << 2;
pub(crate) const CR4_DE: u64 = 1 << 3;
pub(crate) const CR4_OSFXSR: u64 = 1 << 9;
pub(crate) const CR4_FSGSBASE: u64 = 1 << 16;
pub(crate) const EFER_SCE: u64 = 1 << 0;
pub(crate) const EFER_LME: u64 = 1 << 8;
pub(crate) const EFER_LMA: u64 = 1 << 10;

/// An instruction did not complete: [`Cpu::pending`] says why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault;

/// Why an instruction did not complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exception {
    /// An exception of the architecture.
    Vector { vector: u8, error: Option<u32> },
    /// The instruction overwrites decoded instructions: execute it alone.
    Restart,
    /// The debugger wants to see this `INT3`.
    Int3,
}

/// The mode of the code segment and the like: what decoding and instruction fetches depend on.
pub(crate) mod mode {
    /// Default operand size of 32 bits.
    pub const CODE32: u16 = 1 << 0;
    /// 64-bit mode.
    pub const CODE64: u16 = 1 << 1;
    /// The stack pointer has 32 bits (outside of 64-bit mode).
    pub const STACK32: u16 = 1 << 2;
    /// Blocks of one instruction.
    pub const SINGLE: u16 = 1 << 3;
    /// CPL 3; matters for the fetch only.
    pub const USER: u16 = 1 << 4;
    /// Real mode.
    pub const REAL: u16 = 1 << 5;
}

/// One virtual processor.
///
/// It belongs to the thread that calls [`Cpu::run`]; everything that other threads may do goes through its
/// [`CpuHandle`].
#[repr(C)]
pub struct Cpu {
    /// RAX to R15 and the registers of [`crate::block::op`].
    pub(crate) regs: [u64; 256],
    pub(crate) lazy: Lazy,
    /// Instructions that may still execute before control returns to `run`.
    pub(crate) fuel: i64,
    pub(crate) tlb: Tlb,
    /// The table of the TLB for the current privilege level.
    pub(crate) table: *const Entry,
    /// Data accesses are compared with breakpoints.
    pub(crate) watching: bool,
    /// Data and I/O breakpoints (bits of DR6) that the current instruction hit.
    pub(crate) data_hits: u64,
    /// The debugger's watchpoint that the current instruction hit.
    pub(crate) watched: Option<u64>,
    /// Misaligned accesses raise `#AC`.
    pub(crate) alignment: bool,
    /// 1 at CPL 3, otherwise 0.
    pub(crate) user: usize,
    /// RFLAGS without the status flags.
    pub(crate) flags: u64,
    pub(crate) blocks: BlockCache,
    #[cfg(feature = "native")]
    pub(crate) native: Native,
    /// RIP of the block that executes a generic instruction.
    pub(crate) block_start: u64,
    /// What RIP is limited to: 16, 32 or 64 bits.
    pub(crate) rip_mask: u64,
    pub(crate) fpu: FpuState,
    /// What of `fpu` the host's registers hold at the moment.
    pub(crate) resident: Resident,
    /// Code that executes SIMD and x87 instructions.
    pub(crate) stubs: StubCache,
    pub(crate) code64: bool,
    pub(crate) cpl: u8,
    /// Bits of [`mode`].
    pub(crate) mode: u16,
    pub(crate) segs: [Segment; 6],
    pub(crate) ldtr: Segment,
    pub(crate) tr: Segment,
    pub(crate) gdtr: DescriptorTable,
    pub(crate) idtr: DescriptorTable,
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) xcr0: u64,
    pub(crate) dr: [u64; 8],
    pub(crate) efer: u64,
    pub(crate) msrs: Msrs,
    pub(crate) pdptes: [u64; 4],
    pub(crate) mp_state: MpState,
    pub(crate) shadow: bool,
    /// Debug traps of the instruction that loaded SS wait for the next one.
    pub(crate) traps_held: bool,
    pub(crate) nmi_blocked: bool,
    /// Non-maskable interrupts that wait.
    pub(crate) nmis: u32,
    /// A single-step trap follows the current instruction.
    pub(crate) step: bool,

    /// Set with `Err(Fault)`.
    pub(crate) pending: Option<Exception>,
    /// Becomes CR2 if a page fault is delivered.
    pub(crate) pending_cr2: u64,
    /// The pending `#GP` is due to a non-canonical address; `#SS` for stack accesses.
    pub(crate) non_canonical: bool,
    /// The current instruction runs alone after [`Exception::Restart`].
    pub(crate) restarting: bool,
    /// The local APIC has an interrupt that could not be delivered yet, or has to be asked.
    pub(crate) ask_local: bool,
    /// Instructions of the current block behind the current generic one: `fuel` counts them already.
    pub(crate) ahead: u64,
    /// Value of `fuel` when this slice began.
    slice: i64,
    /// Instructions executed before this slice.
    executed: u64,
    /// Guest TSC minus the clock's.
    tsc_offset: u64,
    /// The guest's page of the KVM clock has to be written anew.
    kvm_clock_due: bool,
    /// Virtual time that passed while halted, in ticks.
    skipped: u64,
    /// When to look at the clock again, in executed instructions.
    next_poll: u64,
    /// The local APIC's next timer expiry.
    deadline: Option<u64>,
    /// Guest-physical address of the xAPIC page.
    pub(crate) apic_page: Option<u64>,
    /// The local APIC is enabled, in either mode.
    pub(crate) apic_enabled: bool,
    /// PAUSE instructions executed.
    pub(crate) pauses: u32,
    /// Which instructions the log has a line of already.
    logged: HashSet<iced_x86::Code>,
    random: u64,
    debug: DebugControl,
    pub(crate) config: CpuConfig,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) map: Arc<Map>,
    map_generation: u64,
    pub(crate) member: Arc<Member>,
    pub(crate) bus: Arc<dyn Bus>,
    pub(crate) local: Box<dyn Local>,
    pub(crate) handle: Arc<CpuHandle>,
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpu").field("config", &self.config).finish_non_exhaustive()
    }
}

// SAFETY: the raw pointers inside (the TLB table, links between decoded blocks) point to memory that the processor itself
// owns and only follows from its own methods.
unsafe impl Send for Cpu {}

impl Cpu {
    /// A processor in the state after RESET. Processors other than the bootstrap processor wait for a
    /// start-up IPI.
    pub fn new(
        config: CpuConfig,
        memory: Arc<GuestMemory>,
        bus: Arc<dyn Bus>,
        local: Box<dyn Local>,
    ) -> Self {
        let member = memory.sync().join();
        let reset = CpuState::reset();
        let mut cpu = Self {
            regs: [0; 256],
            lazy: Lazy::default(),
            fuel: 0,
            tlb: Tlb::new(),
            table: &raw const NO_ENTRIES[0],
            alignment: false,
            watching: false,
            data_hits: 0,
            watched: None,
            user: 0,
            flags: 2,
            blocks: BlockCache::new(),
            #[cfg(feature = "native")]
            native: Native::new(config.translate_after),
            block_start: 0,
            rip_mask: 0xffff,
            fpu: FpuState::default(),
            resident: Resident::default(),
            stubs: StubCache::default(),
            code64: false,
            cpl: 0,
            mode: 0,
            segs: reset.segments,
            ldtr: reset.ldtr,
            tr: reset.tr,
            gdtr: reset.gdtr,
            idtr: reset.idtr,
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            dr: [0; 8],
            efer: 0,
            msrs: Msrs::default(),
            pdptes: [0; 4],
            mp_state: MpState::Running,
            shadow: false,
            traps_held: false,
            nmi_blocked: false,
            nmis: 0,
            step: false,
            pending: None,
            pending_cr2: 0,
            non_canonical: false,
            restarting: false,
            ask_local: true,
            ahead: 0,
            slice: 0,
            executed: 0,
            tsc_offset: 0,
            kvm_clock_due: false,
            skipped: 0,
            next_poll: 0,
            deadline: None,
            apic_page: None,
            apic_enabled: false,
            pauses: 0,
            logged: HashSet::new(),
            random: config.seed.unwrap_or(0),
            debug: DebugControl::default(),
            map: memory.snapshot(),
            map_generation: 0,
            config,
            memory,
            member,
            bus,
            local,
            handle: Arc::default(),
        };
        let (features, extended) = (cpu.cpuid(1, 0)[2], cpu.cpuid(7, 0)[1]);
        cpu.stubs.announce(features, extended);
        let mut state = reset;
        if !cpu.config.bootstrap {
            state.mp_state = MpState::WaitForSipi;
        }
        state.tsc = cpu.tsc_now();
        cpu.set_state(&state);
        cpu
    }

    /// What other threads use to interrupt, kick and reset this processor.
    pub fn handle(&self) -> Arc<CpuHandle> {
        self.handle.clone()
    }

    /// The local APIC given to [`Cpu::new`].
    pub fn local(&mut self) -> &mut dyn Local {
        &mut *self.local
    }

    /// How many instructions the processor has executed.
    pub fn executed(&self) -> u64 {
        self.executed
    }

    /// How many blocks were translated to machine code of the host.
    pub fn translated(&self) -> u64 {
        #[cfg(feature = "native")]
        return self.native.translated;
        #[cfg(not(feature = "native"))]
        0
    }

    /// Sets what the debugger wants to stop at.
    pub fn set_debug(&mut self, debug: DebugControl) {
        self.debug = debug;
        self.update_mode();
    }

    /// The processor's state. Meaningful between two runs.
    pub fn state(&self) -> CpuState {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.regs[..16]);
        CpuState {
            gpr,
            rip: self.regs[usize::from(RIP)],
            rflags: self.rflags(),
            segments: self.segs,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            xcr0: self.xcr0,
            dr: self.dr,
            msrs: Msrs { efer: self.efer, ..self.msrs },
            fpu: self.fpu,
            tsc: self.tsc_now(),
            mp_state: self.mp_state,
            interrupt_shadow: self.shadow,
            nmi_blocked: self.nmi_blocked,
            nmi_pending: self.nmis > 0,
            pdptes: self.pdptes,
        }
    }

    /// Replaces the processor's state. The privilege level is that of SS.
    pub fn set_state(&mut self, state: &CpuState) {
        self.regs[..16].copy_from_slice(&state.gpr);
        self.regs[usize::from(RIP)] = state.rip;
        self.set_rflags(state.rflags);
        self.segs = state.segments;
        self.ldtr = state.ldtr;
        self.tr = state.tr;
        self.gdtr = state.gdtr;
        self.idtr = state.idtr;
        self.cr0 = state.cr0;
        self.cr2 = state.cr2;
        self.cr3 = state.cr3;
        self.cr4 = state.cr4;
        self.xcr0 = state.xcr0;
        self.dr = state.dr;
        self.msrs = state.msrs;
        self.efer = state.msrs.efer;
        self.fpu = state.fpu;
        self.fpu.make_valid();
        self.tsc_offset = self.tsc_offset.wrapping_add(state.tsc.wrapping_sub(self.tsc_now()));
        self.kvm_clock_due = true;
        self.mp_state = state.mp_state;
        self.shadow = state.interrupt_shadow;
        self.nmi_blocked = state.nmi_blocked;
        self.nmis = state.nmi_pending.into();
        self.step = false;
        self.data_hits = 0;
        self.pdptes = state.pdptes;
        self.pending = None;
        self.cpl = if self.cr0 & CR0_PE == 0 { 0 } else { self.segs[seg::SS].attributes.dpl() };
        self.follow_apic_base();
        self.update_mode();
        self.local_changed();
    }

    /// The local APIC may have moved, or may have been switched on or off.
    pub(crate) fn follow_apic_base(&mut self) {
        self.apic_page = self.local.mmio_page();
        self.apic_enabled =
            self.local.read_msr(msr::APIC_BASE, 0).is_ok_and(|base| base & msr::APIC_ENABLED != 0);
        self.flush_tlb();
    }

    /// Reads a general-purpose register (0 is RAX, 15 is R15).
    #[inline(always)]
    pub(crate) fn gpr(&self, index: u8) -> u64 {
        self.regs[usize::from(index & 15)]
    }

    #[inline(always)]
    pub(crate) fn rip(&self) -> u64 {
        self.regs[usize::from(RIP)]
    }

    #[inline(always)]
    pub(crate) fn set_rip(&mut self, rip: u64) {
        self.regs[usize::from(RIP)] = rip;
    }

    /// Long mode is active (64-bit or compatibility mode).
    #[inline(always)]
    pub(crate) fn long_mode(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    #[inline(always)]
    pub(crate) fn protected(&self) -> bool {
        self.cr0 & CR0_PE != 0
    }

    /// Makes an exception pending: `return Err(cpu.raise(vector::GP, Some(0)))`.
    #[cold]
    pub(crate) fn raise(&mut self, vector: u8, error: Option<u32>) -> Fault {
        self.pending = Some(Exception::Vector { vector, error });
        Fault
    }

    /// `#GP(0)`.
    #[cold]
    pub(crate) fn gp(&mut self) -> Fault {
        self.raise(vector::GP, Some(0))
    }

    /// `#UD`.
    #[cold]
    pub(crate) fn ud(&mut self) -> Fault {
        self.raise(vector::UD, None)
    }

    /// A non-canonical address was used: `#SS` if the operand was on the stack.
    pub(crate) fn stack_fault(&mut self, stack: bool) {
        if std::mem::take(&mut self.non_canonical)
            && stack
            && self.pending == Some(Exception::Vector { vector: vector::GP, error: Some(0) })
        {
            self.pending = Some(Exception::Vector { vector: vector::SS, error: Some(0) });
        }
    }

    /// `INT3` goes to the debugger.
    pub(crate) fn traps_int3(&self) -> bool {
        self.debug.trap_int3
    }

    /// Counts an instruction that is not implemented, and logs the first one of its kind: the guest must not be able
    /// to fill the log.
    pub(crate) fn count_unimplemented(&mut self, instruction: &iced_x86::Instruction) {
        self.handle.count_unimplemented();
        if !self.logged.insert(instruction.code()) {
            return;
        }
        let mut bytes = [0u8; 15];
        let start = self.block_start.wrapping_add(instruction.ip());
        for (i, byte) in bytes.iter_mut().take(instruction.len()).enumerate() {
            let base = if self.code64 { 0 } else { self.segs[seg::CS].base };
            let at = base.wrapping_add(start).wrapping_add(i as u64);
            *byte = self.load_slow(at, 1, self.user != 0).unwrap_or(0) as u8;
        }
        self.pending = None;
        tracing::warn!(
            rip = format_args!("{start:#x}"),
            bytes = format_args!("{:02x?}", &bytes[..instruction.len()]),
            "Instruction is not implemented"
        );
    }

    /// The next number from the configured seed (SplitMix64).
    pub(crate) fn random_from_seed(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Recomputes what depends on the mode, the privilege level and the segment registers.
    pub(crate) fn update_mode(&mut self) {
        let cs = self.segs[seg::CS].attributes;
        self.code64 = self.long_mode() && cs.long();
        self.user = usize::from(self.cpl == 3);
        self.alignment = self.user != 0 && self.cr0 & CR0_AM != 0 && self.flags & flags::AC != 0;
        self.watching = self.watches_data();
        self.table = if self.alignment || self.watching {
            // The checks are in the slow path.
            &raw const NO_ENTRIES[0]
        } else {
            &raw const self.tlb.entries[self.user * ENTRIES]
        };
        let mut mode = 0;
        if self.code64 {
            mode |= mode::CODE64;
            self.rip_mask = u64::MAX;
        } else if cs.big() {
            mode |= mode::CODE32;
            self.rip_mask = 0xffff_ffff;
        } else {
            self.rip_mask = 0xffff_ffff;
        }
        if self.segs[seg::SS].attributes.big() {
            mode |= mode::STACK32;
        }
        if self.user != 0 {
            mode |= mode::USER;
        }
        if !self.protected() {
            mode |= mode::REAL;
        }
        self.mode = mode;
        self.blocks.set_mode(mode);
        self.regs[usize::from(FS_BASE)] = self.segs[seg::FS].base;
        self.regs[usize::from(GS_BASE)] = self.segs[seg::GS].base;
    }

    /// Removes all translations.
    pub(crate) fn flush_tlb(&mut self) {
        self.tlb.flush_all();
        self.blocks.forget_addresses(true);
    }

    /// Removes translations that are not global.
    pub(crate) fn flush_tlb_local(&mut self) {
        self.tlb.flush_local();
        self.blocks.forget_addresses(false);
    }
}
