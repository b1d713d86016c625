//! Runs one instruction on the software processor, at CPL 3 of a minimal guest.
//!
//! The guest has the windows of [`layout`](super::layout) mapped at their linear addresses, and an
//! interrupt table whose entries lead to distinct addresses, so that an exception shows as RIP in the
//! handlers and its details on the kernel stack.

use std::sync::Arc;

use softcpu::{
    Budget, Bus, Clock, Cpu, CpuConfig, CpuState, CpuidEntry, DescriptorTable, GuestMemory, Local, MsrFault,
    Segment, SegmentAttributes,
};

use super::layout::{
    CODE, CODE_LENGTH, DATA, DATA_LENGTH, DATA_WRITABLE, GS_BASE, INSTRUCTION, LDT_CS, LDT_DS, LDT_DS_BASE,
    LDT_DS_LIMIT, Mode, PAGE, USER_CS32, USER_CS64, USER_DS,
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
const DATA_GPA: u64 = 0x10_0000;
const CODE_GPA: u64 = 0x11_0000;
const RAM: u64 = 0x20_0000;
const PDPT_SYSTEM: u64 = 0xd000;
const PD_SYSTEM: u64 = 0xe000;

/// Where the kernel's tables, stack and handlers are mapped: at this address plus their guest-physical one.
const SYSTEM: u64 = 0xffff_8000_0000_0000;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;

const KERNEL_CS: u16 = 0x10;
/// Bytes that an instruction or a sequence, and what follows it, can have.
pub const PLACE: usize = 256;

#[repr(align(4096))]
#[expect(dead_code, reason = "accessed through raw pointers")]
struct Ram([u8; RAM as usize]);

struct NoDevices;

impl Bus for NoDevices {
    fn mmio_read(&self, _vcpu: u32, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _vcpu: u32, _gpa: u64, _data: &[u8]) {}
    fn io_read(&self, _vcpu: u32, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn io_write(&self, _vcpu: u32, _port: u16, _data: &[u8]) {}
}

struct NoApic;

impl Local for NoApic {
    fn pending(&mut self) -> bool {
        false
    }
    fn acknowledge(&mut self) -> Option<u8> {
        None
    }
    fn read_msr(&mut self, _msr: u32, _tsc: u64) -> Result<u64, MsrFault> {
        Err(MsrFault)
    }
    fn write_msr(&mut self, _msr: u32, _value: u64, _tsc: u64) -> Result<(), MsrFault> {
        Err(MsrFault)
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _priority: u8) {}
    fn mmio_page(&self) -> Option<u64> {
        None
    }
    fn mmio_read(&mut self, _offset: u32, _data: &mut [u8], _tsc: u64) {}
    fn mmio_write(&mut self, _offset: u32, _data: &[u8], _tsc: u64) {}
    fn deadline(&mut self) -> Option<u64> {
        None
    }
    fn timer(&mut self, _tsc: u64) {}
    fn init(&mut self) {}
}

/// The software processor and its guest.
pub struct Soft {
    cpu: Cpu,
    memory: Arc<GuestMemory>,
    ram: *mut Ram,
    base: CpuState,
}

impl Soft {
    pub fn new() -> Self {
        // SAFETY: zeroes are valid for an array of bytes.
        let ram = Box::into_raw(unsafe { Box::<Ram>::new_zeroed().assume_init() });
        let memory = Arc::new(GuestMemory::new());
        // SAFETY: the allocation is never freed, and accessed through raw pointers only.
        unsafe { memory.add_region(0, RAM, ram.cast(), false) }.expect("region");
        let mut config = CpuConfig::new(Arc::new(Clock::deterministic(1_000_000)));
        // All extensions that the processor can execute, whatever the model has.
        let all = |leaf| CpuidEntry { leaf, subleaf: None, output: [u32::MAX; 4] };
        config.cpuid = vec![all(1), all(7)];
        let cpu = Cpu::new(config, memory.clone(), Arc::new(NoDevices), Box::new(NoApic));
        let mut soft = Self { cpu, memory, ram, base: CpuState::reset() };
        soft.build_tables();
        soft.memory.write(CODE_GPA, &[0xcc; CODE_LENGTH as usize]).expect("RAM");
        soft.base = user_state(&soft.base);
        soft
    }

    fn put(&mut self, gpa: u64, value: u64) {
        self.memory.write(gpa, &value.to_le_bytes()).expect("RAM");
    }

    fn build_tables(&mut self) {
        let table = PRESENT | WRITABLE | USER;
        self.put(PML4, PDPT | table);
        self.put(PDPT, PD | table);
        self.put(PML4 + 256 * 8, PDPT_SYSTEM | table);
        self.put(PDPT_SYSTEM, PD_SYSTEM | table);
        self.put(PD_SYSTEM, PT_SYSTEM | table);
        self.put(PD + (DATA >> 21) * 8, PT_DATA | table);
        self.put(PD + (CODE >> 21) * 8, PT_CODE | table);
        for page in 0..16 {
            self.put(PT_SYSTEM + page * 8, (page * PAGE) | PRESENT | WRITABLE);
        }
        for page in 0..DATA_LENGTH / PAGE {
            let access = if page * PAGE < DATA_WRITABLE { WRITABLE } else { 0 };
            self.put(PT_DATA + page * 8, (DATA_GPA + page * PAGE) | PRESENT | USER | access | 1 << 63);
        }
        for page in 0..CODE_LENGTH / PAGE {
            self.put(PT_CODE + page * 8, (CODE_GPA + page * PAGE) | PRESENT | USER | WRITABLE);
        }
        self.put(GDT + 0x10, 0x00af_9b00_0000_ffff);
        self.put(GDT + 0x18, 0x00cf_9300_0000_ffff);
        self.put(GDT + 0x20, 0x00cf_fb00_0000_ffff);
        self.put(GDT + 0x28, 0x00cf_f300_0000_ffff);
        self.put(GDT + 0x30, 0x00af_fb00_0000_ffff);
        self.put(TSS + 4, SYSTEM + STACK_TOP);
        // No I/O permission bitmap.
        self.put(TSS + 0x60, 0xffff << 48);
        for vector in 0..32u64 {
            let privilege = if matches!(vector, 3 | 4) { 3 } else { 0 };
            let offset = SYSTEM + HANDLERS + vector * 16;
            let gate = offset & 0xffff | u64::from(KERNEL_CS) << 16 | (0x8e | privilege << 5) << 40;
            self.put(IDT + vector * 16, gate | (offset >> 16 & 0xffff) << 48);
            self.put(IDT + vector * 16 + 8, offset >> 32);
            // HLT: a run that goes on into the handler stops there.
            self.put(HANDLERS + vector * 16, 0xf4f4_f4f4_f4f4_f4f4);
        }
    }

    /// Places an instruction or a sequence.
    pub fn place(&mut self, bytes: &[u8]) {
        let mut code = [0xcc; PLACE];
        code[..bytes.len()].copy_from_slice(bytes);
        self.memory.write(CODE_GPA + (INSTRUCTION - CODE), &code).expect("RAM");
    }

    /// The bytes of the data window.
    pub fn data(&mut self) -> &mut [u8] {
        // SAFETY: within the allocation; the borrow of `self` keeps the processor from running meanwhile.
        unsafe {
            let start = self.ram.cast::<u8>().add(DATA_GPA as usize);
            std::slice::from_raw_parts_mut(start, DATA_LENGTH as usize)
        }
    }

    /// Runs the placed instruction, or the `count` instructions of a sequence.
    pub fn run(&mut self, mode: Mode, input: &State, count: u64) -> Outcome {
        let code = &mut self.base.segments[1];
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
            _ => {
                Segment { selector: USER_DS, attributes: SegmentAttributes(0xc0f3), limit: u32::MAX, base: 0 }
            }
        };
        for register in [0, 2, 3] {
            self.base.segments[register] = data;
        }
        let start = input.rip - mode.code_base();
        self.base.gpr = input.gpr;
        self.base.rflags = input.rflags;
        self.base.rip = start;
        self.base.fpu = input.fx;
        self.cpu.set_state(&self.base);
        let mut after;
        let mut steps = 0;
        loop {
            self.cpu.run(Budget::instructions(count));
            after = self.cpu.state();
            // A repeated string instruction may take several rounds.
            steps += 1;
            if after.rip != start || after.segments[1].selector == KERNEL_CS || steps > 1_000_000 {
                break;
            }
        }
        let rip = after.rip.wrapping_add(mode.code_base());
        let mut state = State { gpr: after.gpr, rflags: after.rflags, rip, fx: after.fpu };
        let mut exception = None;
        if after.segments[1].selector == KERNEL_CS {
            let vector = ((after.rip - SYSTEM - HANDLERS) / 16) as u8;
            let has_error = matches!(vector, 8 | 10..=14 | 17 | 21);
            let frame = after.gpr[4] - SYSTEM;
            let word = |index: u64| {
                let mut bytes = [0; 8];
                self.memory.read(frame + index * 8, &mut bytes).expect("RAM");
                u64::from_le_bytes(bytes)
            };
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
}

/// Long mode at CPL 3 with the selectors that Linux gives to user programs.
fn user_state(reset: &CpuState) -> CpuState {
    let mut state = reset.clone();
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
