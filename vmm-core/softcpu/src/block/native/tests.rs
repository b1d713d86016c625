//! What cannot be arranged from outside: code memory that is full at one certain instruction.

use std::sync::Arc;

use crate::{
    Budget, Bus, Clock, Cpu, CpuConfig, CpuState, DescriptorTable, Exit, GuestMemory, Local, MsrFault,
    Segment, SegmentAttributes,
};

const RAM: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const CODE: u64 = 0x6000;
const HANDLER: u64 = 0x7000;
const STACK: u64 = 0x9000;
const VECTOR: u8 = 0x30;

struct NoDevices;

impl Bus for NoDevices {
    fn mmio_read(&self, _: u32, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
    fn io_read(&self, _: u32, _: u16, _: &mut [u8]) {}
    fn io_write(&self, _: u32, _: u16, _: &[u8]) {}
}

/// One interrupt is pending.
struct Pending(Option<u8>);

impl Local for Pending {
    fn pending(&mut self) -> bool {
        self.0.is_some()
    }
    fn acknowledge(&mut self) -> Option<u8> {
        self.0.take()
    }
    fn read_msr(&mut self, _: u32, _: u64) -> Result<u64, MsrFault> {
        Err(MsrFault)
    }
    fn write_msr(&mut self, _: u32, _: u64, _: u64) -> Result<(), MsrFault> {
        Err(MsrFault)
    }
}

/// A whole machine in long mode: `inc rax; hlt`, and a handler that halts.
fn cpu(ram: &mut [u64]) -> (Cpu, CpuState) {
    let mut put = |at: u64, value: u64| ram[at as usize / 8] = value;
    put(PML4, PDPT | 3);
    put(PDPT, PD | 3);
    put(PD, 0x83);
    put(GDT + 8, 0x00af_9b00_0000_ffff);
    put(GDT + 16, 0x00cf_9300_0000_ffff);
    put(IDT + 16 * u64::from(VECTOR), HANDLER | 8 << 16 | 0x8e << 40);
    put(CODE, 0xf4c0_ff48);
    put(HANDLER, 0xf4);
    let memory = Arc::new(GuestMemory::new());
    // SAFETY: the caller keeps `ram` longer than the processor, and looks at it only afterwards.
    unsafe { memory.add_region(0, RAM as u64, ram.as_mut_ptr().cast(), false) }.unwrap();
    let clock = Arc::new(Clock::deterministic(1_000_000));
    let config = CpuConfig { translate_after: Some(0), ..CpuConfig::new(clock) };
    let cpu = Cpu::new(config, memory, Arc::new(NoDevices), Box::new(Pending(Some(VECTOR))));
    let mut state = CpuState::reset();
    let flat = |selector, attributes| Segment {
        selector,
        attributes: SegmentAttributes(attributes),
        limit: u32::MAX,
        base: 0,
    };
    state.segments = [flat(16, 0xc093); 6];
    state.segments[1] = flat(8, 0xa09b);
    state.gdtr = DescriptorTable { base: GDT, limit: 0x17 };
    state.idtr = DescriptorTable { base: IDT, limit: 0xfff };
    (state.cr0, state.cr3, state.cr4, state.msrs.efer) = (0x8001_0031, PML4, 0x20, 0xd00);
    state.gpr = [0; 16];
    state.gpr[4] = STACK;
    (state.rip, state.rflags) = (CODE, 0x202);
    (cpu, state)
}

/// Linux waits with `sti; hlt`. An interrupt between the two is one that HLT does not end for.
#[test]
fn the_shadow_of_sti_survives_that_code_memory_is_emptied() {
    let mut ram = vec![0u64; (RAM + 4096) / 8];
    let offset = ram.as_ptr().align_offset(4096);
    let ram = &mut ram[offset..][..RAM / 8];
    let (mut cpu, mut state) = cpu(ram);
    // Once through, so that there is code memory; then it is full, and the code is not translated any more.
    cpu.set_state(&CpuState { rflags: 2, ..state.clone() });
    assert_eq!(cpu.run(Budget::instructions(100)), Exit::Halted);
    let code = cpu.native.code.as_mut().unwrap();
    let used = code.arena.used();
    code.arena.append(&vec![0xcc; code.arena.room()]).unwrap();
    cpu.blocks.clear();
    state.interrupt_shadow = true;
    cpu.set_state(&state);
    cpu.handle().interrupt();
    assert_eq!(cpu.run(Budget::instructions(100)), Exit::Halted);
    assert!(
        cpu.native.code.as_ref().unwrap().arena.used() <= used,
        "the test has not filled the code memory"
    );
    let after = cpu.state();
    assert_eq!(after.rip, HANDLER + 1, "the interrupt came");
    assert_eq!(after.gpr[0], 1, "after the instruction in the shadow");
}
