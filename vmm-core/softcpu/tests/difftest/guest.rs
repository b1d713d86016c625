//! The minimal guest at whose CPL 3 instructions run: on the software processor, and in a machine of KVM.
//!
//! It has the windows of [`layout`](super::layout) mapped at their linear addresses, and an interrupt table
//! whose entries lead to distinct addresses, so that an exception shows as RIP in the handlers and its details
//! on the kernel stack.

use softcpu::{CpuState, DescriptorTable, Segment, SegmentAttributes};

use super::layout::{
    CODE, CODE_LENGTH, DATA, DATA_LENGTH, DATA_WRITABLE, GS_BASE, LDT_CS, LDT_DS, LDT_DS_BASE, LDT_DS_LIMIT,
    Mode, PAGE, USER_CS32, USER_CS64, USER_DS,
};
use super::state::{Exception, Outcome, RFLAGS_RF, State};

// Guest-physical layout.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT_SYSTEM: u64 = 0x4000;
const PT_DATA: u64 = 0x5000;
const PT_CODE: u64 = 0x6000;
const GDT: u64 = 0x7000;
const IDT: u64 = 0x8000;
const TSS: u64 = 0x9000;
const STACK: u64 = 0xa000;
const STACK_TOP: u64 = STACK + PAGE;
const HANDLERS: u64 = 0xc000;
pub const DATA_GPA: u64 = 0x10_0000;
pub const CODE_GPA: u64 = 0x11_0000;
pub const RAM: u64 = 0x20_0000;
const PDPT_SYSTEM: u64 = 0xd000;
const PD_SYSTEM: u64 = 0xe000;

/// Where the kernel's tables, stack and handlers are mapped: at this address plus their guest-physical one.
pub const SYSTEM: u64 = 0xffff_8000_0000_0000;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;

pub const KERNEL_CS: u16 = 0x10;
/// Writes page tables, descriptors, handlers and the code window's filling.
pub fn build(put: &mut dyn FnMut(u64, u64)) {
    let table = PRESENT | WRITABLE | USER;
    put(PML4, PDPT | table);
    put(PDPT, PD | table);
    put(PML4 + 256 * 8, PDPT_SYSTEM | table);
    put(PDPT_SYSTEM, PD_SYSTEM | table);
    put(PD_SYSTEM, PT_SYSTEM | table);
    put(PD + (DATA >> 21) * 8, PT_DATA | table);
    put(PD + (CODE >> 21) * 8, PT_CODE | table);
    for page in 0..16 {
        put(PT_SYSTEM + page * 8, (page * PAGE) | PRESENT | WRITABLE);
    }
    for page in 0..DATA_LENGTH / PAGE {
        let access = if page * PAGE < DATA_WRITABLE { WRITABLE } else { 0 };
        put(PT_DATA + page * 8, (DATA_GPA + page * PAGE) | PRESENT | USER | access | 1 << 63);
    }
    for page in 0..CODE_LENGTH / PAGE {
        put(PT_CODE + page * 8, (CODE_GPA + page * PAGE) | PRESENT | USER | WRITABLE);
    }
    put(GDT + 0x10, 0x00af_9b00_0000_ffff);
    put(GDT + 0x18, 0x00cf_9300_0000_ffff);
    put(GDT + 0x20, 0x00cf_fb00_0000_ffff);
    put(GDT + 0x28, 0x00cf_f300_0000_ffff);
    put(GDT + 0x30, 0x00af_fb00_0000_ffff);
    put(TSS + 4, SYSTEM + STACK_TOP);
    // No I/O permission bitmap.
    put(TSS + 0x60, 0xffff << 48);
    for vector in 0..32u64 {
        let privilege = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let offset = SYSTEM + HANDLERS + vector * 16;
        let gate = offset & 0xffff | u64::from(KERNEL_CS) << 16 | (0x8e | privilege << 5) << 40;
        put(IDT + vector * 16, gate | (offset >> 16 & 0xffff) << 48);
        put(IDT + vector * 16 + 8, offset >> 32);
        // HLT: a run that goes on into the handler stops there.
        put(HANDLERS + vector * 16, 0xf4f4_f4f4_f4f4_f4f4);
    }
    for at in (0..CODE_LENGTH).step_by(8) {
        put(CODE_GPA + at, 0xcccc_cccc_cccc_cccc);
    }
}

/// Sets the state up in which the placed instruction starts; returns its offset in the code segment.
pub fn prepare(base: &mut CpuState, mode: Mode, input: &State) -> u64 {
    let code = &mut base.segments[1];
    (code.selector, code.attributes) = match mode {
        Mode::Long => (USER_CS64, SegmentAttributes(0xa0fb)),
        Mode::Compat => (USER_CS32, SegmentAttributes(0xc0fb)),
        Mode::Sixteen => (LDT_CS, SegmentAttributes(0xfb)),
    };
    code.base = mode.code_base();
    code.limit = if mode == Mode::Sixteen { 0xffff } else { u32::MAX };
    let data = match mode {
        Mode::Sixteen => Segment {
            selector: LDT_DS,
            attributes: SegmentAttributes(0xf3),
            limit: LDT_DS_LIMIT,
            base: LDT_DS_BASE,
        },
        _ => Segment { selector: USER_DS, attributes: SegmentAttributes(0xc0f3), limit: u32::MAX, base: 0 },
    };
    for register in [0, 2, 3] {
        base.segments[register] = data;
    }
    let start = input.rip - mode.code_base();
    base.gpr = input.gpr;
    base.rflags = input.rflags;
    base.rip = start;
    base.fpu = input.fx;
    start
}

/// What came of a run that ended in `after`; `read` reads eight bytes of guest-physical memory.
pub fn outcome(mode: Mode, after: &CpuState, read: &dyn Fn(u64) -> u64) -> Outcome {
    let rip = after.rip.wrapping_add(mode.code_base());
    let mut state = State { gpr: after.gpr, rflags: after.rflags, rip, fx: after.fpu };
    let mut exception = None;
    if after.segments[1].selector == KERNEL_CS {
        let vector = ((after.rip - SYSTEM - HANDLERS) / 16) as u8;
        let has_error = matches!(vector, 8 | 10..=14 | 17 | 21);
        let frame = after.gpr[4] - SYSTEM;
        let word = |index: u64| read(frame + index * 8);
        let saved = u64::from(has_error);
        state.rip = word(saved) + mode.code_base();
        state.rflags = word(saved + 2);
        state.gpr[4] = word(saved + 3);
        exception = Some(Exception {
            vector,
            error: if has_error { word(0) as u32 } else { 0 },
            address: if vector == 14 { after.cr2 } else { 0 },
        });
    }
    state.rflags &= !RFLAGS_RF;
    for register in &mut state.gpr {
        *register &= mode.mask();
    }
    Outcome { state, exception }
}

/// Long mode at CPL 3 with the selectors that Linux gives to user programs.
pub fn user_state() -> CpuState {
    let mut state = CpuState::reset();
    let flat = |selector, attributes| Segment {
        selector,
        attributes: SegmentAttributes(attributes),
        limit: u32::MAX,
        base: 0,
    };
    let null = Segment::default();
    let data = flat(USER_DS, 0xc0f3);
    state.segments = [data, flat(USER_CS64, 0xa0fb), data, data, null, null];
    state.segments[5].base = GS_BASE;
    state.tr =
        Segment { selector: 0x40, attributes: SegmentAttributes(0x8b), limit: 0x67, base: SYSTEM + TSS };
    state.gdtr = DescriptorTable { base: SYSTEM + GDT, limit: 0x3f };
    state.idtr = DescriptorTable { base: SYSTEM + IDT, limit: 32 * 16 - 1 };
    state.cr0 = 0x8005_0033;
    state.cr3 = PML4;
    state.cr4 = 0x620;
    state.msrs.efer = 0xd01;
    state
}
