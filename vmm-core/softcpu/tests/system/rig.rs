//! A processor with tables in place, and what a test wants to know about it afterwards.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use iced_x86::code_asm::CodeAssembler;
use softcpu::*;

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
pub const PML4: u64 = 0x4000;
const PDPT: u64 = 0x5000;
const PD: u64 = 0x6000;
const WINDOW_PD: u64 = 0x7000;
pub const WINDOW_PT: u64 = 0x8000;
/// Handler n is a `hlt` at `HANDLERS + 16 * n`.
pub const HANDLERS: u64 = 0x9000;
pub const USER_STACK: u64 = 0x1_c000;
pub const STACK: u64 = 0x1_d000;
pub const IST1: u64 = 0x1_e000;
pub const RSP0: u64 = 0x1_f000;
pub const CODE: u64 = 0x2_0000;
/// Linear address of 512 pages of 4 KiB whose entries tests choose.
pub const WINDOW: u64 = 0x4000_0000;
/// Guest-physical address behind the window.
pub const WINDOW_RAM: u64 = 0x20_0000;
const RAM: u64 = 4 << 20;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_DATA: u16 = 0x1b;
pub const USER_CODE: u16 = 0x23;
pub const TASK: u16 = 0x30;

pub const P: u64 = 1;
pub const RW: u64 = 2;
pub const US: u64 = 4;
pub const A: u64 = 0x20;
pub const D: u64 = 0x40;
pub const G: u64 = 0x100;
pub const NX: u64 = 1 << 63;

/// Ports record what is written; everything else is absent.
#[derive(Default)]
pub struct Ports {
    pub written: Mutex<Vec<(u16, u64)>>,
}

impl Bus for Ports {
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
    fn io_read(&self, _: u32, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn io_write(&self, _: u32, port: u16, data: &[u8]) {
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        self.written.lock().unwrap().push((port, u64::from_le_bytes(value)));
    }
}

/// An interrupt controller that delivers queued vectors in order, and a TSC-deadline timer on vector 0x40.
#[derive(Clone, Default)]
pub struct Queue {
    pub vectors: Arc<Mutex<VecDeque<u8>>>,
    deadline: u64,
}

impl Local for Queue {
    fn pending(&mut self) -> bool {
        !self.vectors.lock().unwrap().is_empty()
    }
    fn acknowledge(&mut self) -> Option<u8> {
        self.vectors.lock().unwrap().pop_front()
    }
    fn read_msr(&mut self, msr: u32, _: u64) -> Result<u64, MsrFault> {
        if msr == 0x6e0 { Ok(self.deadline) } else { Err(MsrFault) }
    }
    fn write_msr(&mut self, msr: u32, value: u64, _: u64) -> Result<(), MsrFault> {
        if msr != 0x6e0 {
            return Err(MsrFault);
        }
        self.deadline = value;
        Ok(())
    }
    fn deadline(&mut self) -> Option<u64> {
        (self.deadline != 0).then_some(self.deadline)
    }
    fn timer(&mut self, _: u64) {
        self.deadline = 0;
        self.vectors.lock().unwrap().push_back(0x40);
    }
}

/// Host memory that outlives the processors.
struct Ram(*mut u8);

impl Ram {
    fn new() -> Self {
        // SAFETY: an anonymous mapping.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                RAM as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(p, libc::MAP_FAILED);
        Self(p.cast())
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; the processors are dropped before.
        unsafe { libc::munmap(self.0.cast(), RAM as usize) };
    }
}

/// The frame that an exception pushed.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    pub vector: u8,
    pub error: Option<u64>,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

pub struct Rig {
    pub cpu: Cpu,
    pub memory: Arc<GuestMemory>,
    pub ports: Arc<Ports>,
    pub queue: Queue,
    _ram: Ram,
}

/// Assembles 64-bit code at an address.
pub fn assemble(at: u64, write: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    write(&mut a);
    a.assemble(at).unwrap()
}

pub fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { selector, attributes: SegmentAttributes(attributes), limit: 0xffff_ffff, base: 0 }
}

/// The same processor in the mode of execution that this test program is about.
pub fn translating(config: CpuConfig) -> CpuConfig {
    CpuConfig { translate_after: crate::TRANSLATE_AFTER, ..config }
}

impl Rig {
    pub fn new() -> Self {
        Self::with_clock(Arc::new(Clock::host(1_000_000)), None)
    }

    pub fn with_clock(clock: Arc<Clock>, seed: Option<u64>) -> Self {
        Self::with_config(CpuConfig { seed, ..CpuConfig::new(clock) })
    }

    pub fn with_config(config: CpuConfig) -> Self {
        Self::exactly(translating(config))
    }

    /// A processor of exactly this configuration.
    pub fn exactly(config: CpuConfig) -> Self {
        let ram = Ram::new();
        let memory = Arc::new(GuestMemory::new());
        // SAFETY: the mapping lives as long as the rig, which drops its processor first.
        unsafe { memory.add_region(0, RAM, ram.0, false).unwrap() };
        let ports = Arc::new(Ports::default());
        let queue = Queue::default();
        let cpu = Cpu::new(config, memory.clone(), ports.clone(), Box::new(queue.clone()));
        let rig = Self { cpu, memory, ports, queue, _ram: ram };
        rig.tables();
        rig
    }

    /// Page tables (the first GiB is mapped to itself, for everyone), GDT, IDT and TSS.
    fn tables(&self) {
        self.put(PML4, PDPT | P | RW | US);
        self.put(PDPT, PD | P | RW | US);
        self.put(PDPT + 8, WINDOW_PD | P | RW | US);
        self.put(WINDOW_PD, WINDOW_PT | P | RW | US);
        for i in 0..512 {
            self.put(PD + 8 * i, i << 21 | 0x80 | P | RW | US);
        }
        let descriptors =
            [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
        for (i, descriptor) in descriptors.into_iter().enumerate() {
            self.put(GDT + 8 * i as u64, descriptor);
        }
        self.put(GDT + 0x30, 0x67 | (TSS & 0xffff) << 16 | 0x89 << 40);
        self.put(GDT + 0x38, 0);
        self.put(TSS + 4, RSP0);
        self.put(TSS + 36, IST1);
        // No I/O permission bitmap: it begins at the limit.
        self.memory.write(TSS + 102, &0x68u16.to_le_bytes()).unwrap();
        for n in 0..256 {
            self.gate(n, HANDLERS + 16 * n, 0x8e, 0);
            self.memory.write(HANDLERS + 16 * n, &[0xf4]).unwrap();
        }
    }

    /// Fills an IDT entry.
    pub fn gate(&self, vector: u64, target: u64, kind: u64, ist: u64) {
        let low = target & 0xffff
            | u64::from(KERNEL_CODE) << 16
            | ist << 32
            | kind << 40
            | (target >> 16 & 0xffff) << 48;
        self.put(IDT + 16 * vector, low);
        self.put(IDT + 16 * vector + 8, target >> 32);
    }

    pub fn put(&self, gpa: u64, value: u64) {
        self.memory.write(gpa, &value.to_le_bytes()).unwrap();
    }

    pub fn get(&self, gpa: u64) -> u64 {
        let mut data = [0; 8];
        self.memory.read(gpa, &mut data).unwrap();
        u64::from_le_bytes(data)
    }

    /// Maps a page of the window with these flags (plus the page's own RAM).
    pub fn window(&self, page: u64, flags: u64) {
        let ram = if flags & P != 0 { WINDOW_RAM + page * 0x1000 } else { 0 };
        self.put(WINDOW_PT + 8 * page, ram | flags);
    }

    /// 64-bit kernel mode at `CODE`.
    pub fn long_mode() -> CpuState {
        let mut s = CpuState::reset();
        s.segments = [flat(KERNEL_DATA, 0xc093); 6];
        s.segments[1] = flat(KERNEL_CODE, 0xa09b);
        s.gdtr = DescriptorTable { base: GDT, limit: 0x3f };
        s.idtr = DescriptorTable { base: IDT, limit: 0xfff };
        s.tr = Segment { selector: TASK, attributes: SegmentAttributes(0x8b), limit: 0x67, base: TSS };
        s.cr0 = 0x8001_0031;
        s.cr3 = PML4;
        s.cr4 = 0x6a0;
        s.msrs.efer = 0xd01;
        s.gpr = [0; 16];
        s.gpr[4] = STACK;
        s.rip = CODE;
        s
    }

    /// The same in user mode.
    pub fn user_mode() -> CpuState {
        let mut s = Self::long_mode();
        s.segments = [flat(USER_DATA, 0xc0f3); 6];
        s.segments[1] = flat(USER_CODE, 0xa0fb);
        s.gpr[4] = USER_STACK;
        s
    }

    pub fn code(&self, write: impl FnOnce(&mut CodeAssembler)) {
        self.memory.write(CODE, &assemble(CODE, write)).unwrap();
    }

    /// Runs until the processor halts.
    pub fn run(&mut self) -> CpuState {
        let exit = self.cpu.run(Budget::instructions(10_000_000));
        assert_eq!(exit, Exit::Halted, "at {:#x}", self.cpu.state().rip);
        self.cpu.state()
    }

    /// Runs code from a state until the processor halts.
    pub fn execute(&mut self, state: &CpuState, write: impl FnOnce(&mut CodeAssembler)) -> CpuState {
        self.code(write);
        self.cpu.set_state(state);
        self.run()
    }

    /// The exception whose handler the processor halted in.
    pub fn frame(&self) -> Option<Frame> {
        let s = self.cpu.state();
        let vector = u8::try_from((s.rip - 1).checked_sub(HANDLERS)? / 16).ok()?;
        let with_error = matches!(vector, 8 | 10..=14 | 17);
        let at = s.gpr[4] + if with_error { 8 } else { 0 };
        Some(Frame {
            vector,
            error: with_error.then(|| self.get(s.gpr[4])),
            rip: self.get(at),
            cs: self.get(at + 8),
            rflags: self.get(at + 16),
            rsp: self.get(at + 24),
            ss: self.get(at + 32),
        })
    }

    /// Runs code and returns vector, error code and the offset of the saved RIP in the code.
    pub fn fault(
        &mut self,
        state: &CpuState,
        write: impl FnOnce(&mut CodeAssembler),
    ) -> Option<(u8, Option<u64>, u64)> {
        self.execute(state, write);
        self.frame().map(|f| (f.vector, f.error, f.rip.wrapping_sub(CODE)))
    }
}
