//! The first vCPU's registers at the entry of a kernel or a BIOS.

use softcpu::{CpuState, DescriptorTable, Segment, SegmentAttributes};

use crate::boot::{BOOT_GDT, Entry, EntryMode};

/// Where a BIOS is entered.
const BIOS_SELECTOR: u16 = 0xf000;
const BIOS_BASE: u64 = 0xf_0000;
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

const CODE_32: SegmentAttributes = SegmentAttributes(0xc09b);
const CODE_64: SegmentAttributes = SegmentAttributes(0xa09b);
const DATA: SegmentAttributes = SegmentAttributes(0xc093);
const BUSY_TASK: SegmentAttributes = SegmentAttributes(0x008b);

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

// Registers in the order of the instruction encoding.
const RAX: usize = 0;
const RBX: usize = 3;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;

/// The registers at `entry`; the rest of the state is as after a reset.
pub(super) fn state(entry: &Entry) -> CpuState {
    let mut state = CpuState::reset();
    let flat = |selector, attributes| Segment { selector, attributes, limit: u32::MAX, base: 0 };
    let code = match entry.mode {
        EntryMode::Real => {
            state.segments[1] = Segment { selector: BIOS_SELECTOR, base: BIOS_BASE, ..state.segments[1] };
            state.rip = entry.rip;
            return state;
        }
        EntryMode::Protected => CODE_32,
        EntryMode::Long { .. } => CODE_64,
    };
    state.segments = [flat(DATA_SELECTOR, DATA); 6];
    state.segments[1] = flat(CODE_SELECTOR, code);
    state.tr = Segment { selector: TASK_SELECTOR, attributes: BUSY_TASK, limit: 0x67, base: 0 };
    state.gdtr = DescriptorTable { base: entry.gdt, limit: size_of_val(&BOOT_GDT) as u16 - 1 };
    state.idtr = DescriptorTable { base: 0, limit: 0 };
    state.gpr = [0; 16];
    state.gpr[RAX] = entry.rax;
    state.gpr[RBX] = entry.rbx;
    state.gpr[RSP] = entry.rsp;
    state.gpr[RSI] = entry.rsi;
    state.gpr[RDI] = entry.rdi;
    state.rip = entry.rip;
    state.rflags = 2;
    state.cr0 = CR0_PE | CR0_ET | CR0_NE;
    if let EntryMode::Long { page_tables } = entry.mode {
        state.cr0 |= CR0_PG;
        state.cr3 = page_tables;
        state.cr4 = CR4_PAE;
        state.msrs.efer = EFER_LME | EFER_LMA;
    }
    state
}
