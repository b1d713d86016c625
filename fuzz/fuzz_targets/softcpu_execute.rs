//! Any bytes as code of the software CPU: decoding, interpreting and translating them ends, in every mode. (Whether
//! results are right is for the differential test, which knows what the architecture leaves undefined.)
#![no_main]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::Arc;

use fuzz::reached;
use libfuzzer_sys::fuzz_target;
use softcpu::{
    Budget, Bus, Clock, Cpu, CpuConfig, CpuState, GuestMemory, NoApic, Segment, SegmentAttributes,
};

struct Nothing;

impl Bus for Nothing {
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
    fn io_read(&self, _: u32, _: u16, data: &mut [u8]) {
        data.fill(0x5a);
    }
    fn io_write(&self, _: u32, _: u16, _: &[u8]) {}
}

const RAM: usize = 1 << 20;
const CODE: u64 = 0x8000;
const PML4: u64 = 0x1000;
const MODES: [&str; 3] = ["real", "protected", "long"];
/// Index of CS among the segment registers.
const CS: usize = 1;

/// Executes `code` in one of the modes of [`MODES`], interpreted, or with loops translated soon; says how many instructions
/// there were.
fn execute(mode: usize, code: &[u8], translate: bool) -> u64 {
    let layout = Layout::from_size_align(RAM, 4096).expect("layout");
    // SAFETY: the layout is not empty; the allocation is freed below, after the processor is gone.
    let ram = unsafe { alloc_zeroed(layout) };
    let memory = Arc::new(GuestMemory::new());
    // SAFETY: the allocation has the length given and outlives `memory`'s users.
    unsafe { memory.add_region(0, RAM as u64, ram, false) }.expect("region");
    let mut config = CpuConfig::new(Arc::new(Clock::deterministic(1_000_000)));
    config.seed = Some(1);
    config.translate_after = translate.then_some(2);
    let mut cpu = Cpu::new(config, memory.clone(), Arc::new(Nothing), Box::new(NoApic));
    memory.write(CODE, &code[..code.len().min(RAM - CODE as usize)]).expect("code");
    // One 1 GiB page, identity-mapped for everybody.
    memory.write(PML4, &0x2007u64.to_le_bytes()).expect("table");
    memory.write(0x2000, &0x87u64.to_le_bytes()).expect("table");
    cpu.set_state(&start(mode, cpu.state()));
    for _ in 0..20 {
        cpu.run(Budget::instructions(100));
    }
    if cpu.translated() > 0 {
        reached("translated");
    }
    let executed = cpu.executed();
    drop(cpu);
    drop(memory);
    // SAFETY: allocated above with the same layout; nothing refers to it any more.
    unsafe { dealloc(ram, layout) };
    executed
}

/// The state in which a program starts.
fn start(mode: usize, mut state: CpuState) -> CpuState {
    for (i, register) in state.gpr.iter_mut().enumerate() {
        *register = 0x1_0000 + 0x1111 * i as u64;
    }
    state.rip = CODE;
    state.segments[CS].base = 0;
    let flat = |selector: u16, bits: u16| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes: SegmentAttributes(bits),
    };
    match MODES[mode] {
        "real" => {}
        "protected" => {
            state.cr0 |= 1;
            state.segments = [flat(16, 0xc093); 6];
            state.segments[CS] = flat(8, 0xc09b);
        }
        _ => {
            state.cr4 |= 0x620;
            state.cr3 = PML4;
            state.msrs.efer = 0xd01;
            state.cr0 |= 0x8000_0001;
            state.segments = [flat(16, 0xc093); 6];
            state.segments[CS] = flat(8, 0xa09b);
        }
    }
    state
}

fuzz_target!(|data: &[u8]| {
    let [mode, code @ ..] = data else { return };
    let mode = usize::from(*mode) % MODES.len();
    // A program of some length, not one that faults at once.
    if execute(mode, code, false) >= 3 {
        match MODES[mode] {
            "real" => reached("real"),
            "protected" => reached("protected"),
            _ => reached("long"),
        }
    }
    // Only 64-bit code is translated.
    if MODES[mode] == "long" {
        execute(mode, code, true);
    }
});
