//! Runs one instruction on the software processor.

use std::sync::Arc;

use softcpu::{Budget, Bus, Clock, Cpu, CpuConfig, CpuState, CpuidEntry, GuestMemory, NoApic};

use super::guest::{self, CODE_GPA, DATA_GPA, KERNEL_CS, RAM};
use super::layout::{CODE, DATA_LENGTH, INSTRUCTION, Mode};
use super::state::{Outcome, State};

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

/// The software processor and its guest.
pub struct Soft {
    cpu: Cpu,
    memory: Arc<GuestMemory>,
    ram: *mut Ram,
    base: CpuState,
}

impl Soft {
    pub fn new(translate: bool) -> Self {
        // SAFETY: zeroes are valid for an array of bytes.
        let ram = Box::into_raw(unsafe { Box::<Ram>::new_zeroed().assume_init() });
        let memory = Arc::new(GuestMemory::new());
        // SAFETY: the allocation is never freed, and accessed through raw pointers only.
        unsafe { memory.add_region(0, RAM, ram.cast(), false) }.expect("region");
        let mut config = CpuConfig::new(Arc::new(Clock::deterministic(1_000_000)));
        // All extensions that the processor can execute, whatever the model has.
        let all = |leaf| CpuidEntry { leaf, subleaf: None, output: [u32::MAX; 4] };
        config.cpuid = vec![all(1), all(7)];
        config.translate_after = translate.then_some(0);
        let cpu = Cpu::new(config, memory.clone(), Arc::new(NoDevices), Box::new(NoApic));
        let soft = Self { cpu, memory, ram, base: guest::user_state() };
        guest::build(&mut |gpa, value| soft.memory.write(gpa, &value.to_le_bytes()).expect("RAM"));
        soft
    }

    /// How many blocks were translated.
    pub fn translated(&self) -> u64 {
        self.cpu.translated()
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
        let start = guest::prepare(&mut self.base, mode, input);
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
        guest::outcome(mode, &after, &|gpa| {
            let mut bytes = [0; 8];
            self.memory.read(gpa, &mut bytes).expect("RAM");
            u64::from_le_bytes(bytes)
        })
    }
}
