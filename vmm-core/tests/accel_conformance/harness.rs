//! What the cases share: the accelerator under test, a bus that records, and guests in 32-bit and 64-bit mode.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use iced_x86::code_asm::{CodeAssembler, al, ax, dx, eax};
use softcpu::{CpuState, Segment, SegmentAttributes};
use vmm_core::accel::kvm::{KvmHypervisor, KvmOptions};
use vmm_core::accel::soft::SoftHypervisor;
use vmm_core::accel::{Hypervisor, IoBus, Vcpu, VcpuExit, VcpuHandle, Vm, VmSpec};
use vmm_core::memory::GuestMemory;

/// Where guest code starts.
pub const CODE: u64 = 0x1_0000;
/// Where handlers and results live.
pub const IDT: u64 = 0x2000;
/// Top of the stack of vCPU 0.
pub const STACK: u64 = 0x8000;
/// Page tables of 64-bit guests: identity for the first 4 GiB.
pub const PAGE_TABLES: u64 = 0x9_0000;
/// A write here ends the guest.
pub const DONE: u16 = 0x501;
/// A write here tells the test that the guest got somewhere.
pub const REPORT: u16 = 0x510;
/// RAM of a guest.
pub const RAM: u64 = 4 << 20;
/// How long a guest may take before the test fails: far beyond what the slowest host needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// The accelerator under test.
pub struct Target {
    pub hypervisor: Box<dyn Hypervisor>,
    /// What this host's accelerator is known not to do.
    pub holes: Holes,
}

/// Known incompleteness of an accelerator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holes {
    /// SSE instructions in guest kernel code end in a fault.
    pub kernel_sse: bool,
    /// int3 in guest kernel code cannot be intercepted.
    pub kernel_breakpoints: bool,
    /// Data watchpoints do not stop guest kernel code.
    pub kernel_watchpoints: bool,
    /// The guest reads the host's time-stamp counter.
    pub host_tsc: bool,
}

/// KVM, or `None` when the environment says that this host has none. On a host without KVM, the test fails with the
/// reason.
pub fn kvm() -> Option<Target> {
    kvm_with(KvmOptions::default())
}

/// KVM with the dirty log, whatever else the host has.
pub fn kvm_dirty_log() -> Option<Target> {
    kvm_with(KvmOptions { dirty_ring: 0, ..KvmOptions::default() })
}

/// KVM with the smallest dirty rings, where the host has them, also if that would not be the choice.
pub fn kvm_dirty_ring() -> Option<Target> {
    kvm_with(KvmOptions { dirty_ring: 1, ..KvmOptions::default() })
}

/// KVM with the software CPU's assistance.
pub fn kvm_assisted() -> Option<Target> {
    kvm_with(KvmOptions { assist: true, ..KvmOptions::default() })
}

fn kvm_with(options: KvmOptions) -> Option<Target> {
    let assist = options.assist;
    match KvmHypervisor::with_options(options) {
        Ok(hypervisor) => {
            let software = KvmHypervisor::is_software();
            let holes = Holes {
                kernel_sse: software && !assist,
                kernel_breakpoints: software && !assist,
                kernel_watchpoints: software,
                host_tsc: software,
            };
            Some(Target { hypervisor: Box::new(hypervisor), holes })
        }
        Err(error) if std::env::var_os("NACRE_TEST_NO_KVM").is_some_and(|v| v == "1") => {
            eprintln!("not run, as NACRE_TEST_NO_KVM=1 says: {error}");
            None
        }
        Err(error) => panic!("{error} (NACRE_TEST_NO_KVM=1 if this host shall do without)"),
    }
}

/// The software accelerator.
pub fn soft() -> Target {
    Target { hypervisor: Box::new(SoftHypervisor::new()), holes: Holes::default() }
}

/// One access that reached the bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    PortRead(u16, usize),
    PortWrite(u16, Vec<u8>),
    MmioRead(u64, usize),
    MmioWrite(u64, Vec<u8>),
}

/// A bus that records every access and answers reads with 0x11, 0x22, ... by position in the access plus the number
/// of reads so far.
#[derive(Default)]
pub struct TestBus {
    log: Mutex<Vec<Access>>,
    changed: Condvar,
    done: AtomicBool,
    handles: Mutex<Vec<Arc<dyn VcpuHandle>>>,
}

impl TestBus {
    fn record(&self, access: Access) -> MutexGuard<'_, Vec<Access>> {
        let mut log = self.log.lock().unwrap();
        log.push(access);
        self.changed.notify_all();
        log
    }

    /// The accesses so far, without the one that ended the guest.
    pub fn accesses(&self) -> Vec<Access> {
        let log = self.log.lock().unwrap();
        log.iter().filter(|a| !matches!(a, Access::PortWrite(DONE, _))).cloned().collect()
    }

    /// The values written to [`REPORT`] so far.
    pub fn reports(&self) -> Vec<u32> {
        reports(&self.log.lock().unwrap())
    }

    /// Lets a guest that was done run again.
    pub fn again(&self) {
        self.done.store(false, Ordering::SeqCst);
    }

    /// Waits until `count` values were written to [`REPORT`].
    pub fn wait_for_reports(&self, count: usize) -> Vec<u32> {
        let log = self.log.lock().unwrap();
        let (log, timeout) =
            self.changed.wait_timeout_while(log, PATIENCE, |log| reports(log).len() < count).unwrap();
        assert!(!timeout.timed_out(), "the guest reported {:x?} only", reports(&log));
        reports(&log)
    }
}

fn reports(log: &[Access]) -> Vec<u32> {
    let value = |data: &[u8]| data.iter().rev().fold(0, |v, &b| v << 8 | u32::from(b));
    log.iter()
        .filter_map(|a| match a {
            Access::PortWrite(REPORT, data) => Some(value(data)),
            _ => None,
        })
        .collect()
}

fn answer(reads_before: usize, data: &mut [u8]) {
    for (n, byte) in data.iter_mut().enumerate() {
        *byte = ((n + 1) * 0x11 + reads_before) as u8;
    }
}

impl IoBus for TestBus {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        let log = self.record(Access::MmioRead(address, data.len()));
        answer(count_reads(&log), data);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        drop(self.record(Access::MmioWrite(address, data.to_vec())));
    }
    fn port_read(&self, port: u16, data: &mut [u8]) {
        let log = self.record(Access::PortRead(port, data.len()));
        answer(count_reads(&log), data);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        drop(self.record(Access::PortWrite(port, data.to_vec())));
        if port == DONE {
            self.done.store(true, Ordering::SeqCst);
            for handle in &*self.handles.lock().unwrap() {
                handle.kick();
            }
        }
    }
}

fn count_reads(log: &[Access]) -> usize {
    log.iter().filter(|a| matches!(a, Access::PortRead(..) | Access::MmioRead(..))).count() - 1
}

/// A machine with vCPU 0, ready to run.
pub struct Machine {
    pub memory: GuestMemory,
    pub bus: Arc<TestBus>,
    pub vm: Arc<dyn Vm>,
    pub cpu: Box<dyn Vcpu>,
}

impl Machine {
    /// A machine with `RAM` bytes and `code` at [`CODE`], and vCPU 0 in its power-on state.
    pub fn new(target: &Target, vcpus: u32, code: &[u8]) -> Self {
        let memory = GuestMemory::flat(RAM).unwrap();
        memory.write(CODE, code).unwrap();
        Self::with_memory(target, vcpus, memory)
    }

    pub fn with_memory(target: &Target, vcpus: u32, memory: GuestMemory) -> Self {
        let bus = Arc::new(TestBus::default());
        let spec = VmSpec { memory: memory.clone(), vcpus, model: None, tsc_khz: None, bus: bus.clone() };
        let vm = target.hypervisor.create_vm(spec).unwrap();
        let cpu = vm.create_vcpu(0).unwrap();
        bus.handles.lock().unwrap().push(cpu.handle());
        Self { memory, bus, vm, cpu }
    }

    /// A guest in flat 32-bit protected mode without paging, about to execute `code`.
    pub fn flat32(target: &Target, code: impl FnOnce(&mut CodeAssembler)) -> Self {
        let mut machine = Self::new(target, 1, &assemble(32, CODE, code));
        machine.cpu.set_state(&flat32()).unwrap();
        machine
    }

    /// A guest in 64-bit mode, about to execute `code`.
    pub fn long64(target: &Target, code: impl FnOnce(&mut CodeAssembler)) -> Self {
        let mut machine = Self::new(target, 1, &assemble(64, CODE, code));
        write_page_tables(&machine.memory);
        machine.cpu.set_state(&long64()).unwrap();
        machine
    }

    /// Another vCPU, which the end of the guest stops too.
    pub fn another_cpu(&self, id: u32) -> Box<dyn Vcpu> {
        let cpu = self.vm.create_vcpu(id).unwrap();
        self.bus.handles.lock().unwrap().push(cpu.handle());
        cpu
    }

    /// Runs vCPU 0 until the guest says that it is done.
    pub fn run_to_end(&mut self) {
        run_to_end(&self.bus, &mut *self.cpu);
    }

    /// Runs vCPU 0 until anything but the guest's end comes back.
    pub fn run(&mut self) -> VcpuExit {
        let handle = self.cpu.handle();
        watched(&handle, || self.cpu.run().unwrap())
    }

    /// Installs `handler` (32-bit code at `at`) for interrupt `vector`.
    pub fn set_handler32(&self, vector: u8, at: u64, handler: impl FnOnce(&mut CodeAssembler)) {
        self.memory.write(at, &assemble(32, at, handler)).unwrap();
        let gate = (at & 0xffff) | 0x8 << 16 | 0x8e00 << 32 | (at >> 16) << 48;
        self.memory.write_obj(IDT + 8 * u64::from(vector), &gate).unwrap();
    }
}

/// Runs `cpu` until the guest says that it is done.
pub fn run_to_end(bus: &TestBus, cpu: &mut dyn Vcpu) {
    let handle = cpu.handle();
    watched(&handle, || {
        while !bus.done.load(Ordering::SeqCst) {
            match cpu.run().unwrap() {
                VcpuExit::Interrupted => {}
                VcpuExit::Fault(fault) => panic!("{fault}: {:?} {:02x?}", fault.instruction, fault.bytes),
                other => panic!("{other:?} at {:#x} after {:x?}", cpu.state().unwrap().rip, bus.accesses()),
            }
        }
    });
}

/// Runs `work`, which runs a vCPU; a guest that hangs fails the test instead of stopping it.
fn watched<T>(handle: &Arc<dyn VcpuHandle>, work: impl FnOnce() -> T) -> T {
    let finished = Mutex::new(false);
    let changed = Condvar::new();
    std::thread::scope(|scope| {
        let watchdog = scope.spawn(|| {
            let start = Instant::now();
            let guard = finished.lock().unwrap();
            let (guard, _) = changed.wait_timeout_while(guard, PATIENCE, |finished| !*finished).unwrap();
            if !*guard {
                drop(guard);
                // The owner of the vCPU sees an interruption that nobody asked for, and ends the process.
                eprintln!("the guest still runs after {:?}", start.elapsed());
                handle.kick();
                std::process::abort();
            }
        });
        let finish = Finish(&finished, &changed);
        let result = work();
        drop(finish);
        watchdog.join().unwrap();
        result
    })
}

/// Ends the watchdog, also when the work panics.
struct Finish<'a>(&'a Mutex<bool>, &'a Condvar);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

/// Assembles code that runs at `address`.
pub fn assemble(bitness: u32, address: u64, code: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bitness).unwrap();
    code(&mut assembler);
    assembler.assemble(address).unwrap()
}

/// Ends the guest.
pub fn done(a: &mut CodeAssembler) {
    a.mov(dx, u32::from(DONE)).unwrap();
    a.out(dx, al).unwrap();
    halt_forever(a);
}

/// Reports EAX.
pub fn report(a: &mut CodeAssembler) {
    a.mov(dx, u32::from(REPORT)).unwrap();
    a.out(dx, eax).unwrap();
}

/// Reports a constant.
pub fn report_value(a: &mut CodeAssembler, value: u32) {
    a.mov(eax, value).unwrap();
    report(a);
}

/// Halts with interrupts as they are, again and again.
pub fn halt_forever(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    a.set_label(&mut again).unwrap();
    a.hlt().unwrap();
    a.jmp(again).unwrap();
}

/// Ends an interrupt at the local APIC (xAPIC mode); uses EAX.
pub fn end_of_interrupt(a: &mut CodeAssembler) {
    a.xor(eax, eax).unwrap();
    a.mov(iced_x86::code_asm::dword_ptr(0xfee0_00b0u64), eax).unwrap();
}

/// Enables the local APIC by software; uses EAX.
pub fn enable_apic(a: &mut CodeAssembler) {
    a.mov(eax, 0x1ff).unwrap();
    a.mov(iced_x86::code_asm::dword_ptr(0xfee0_00f0u64), eax).unwrap();
}

/// Loads a 16-bit constant into AX and writes it to `port`.
pub fn out_word(a: &mut CodeAssembler, port: u16, value: u16) {
    a.mov(ax, u32::from(value)).unwrap();
    a.mov(dx, u32::from(port)).unwrap();
    a.out(dx, ax).unwrap();
}

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment { selector, attributes: SegmentAttributes(attributes), limit: 0xffff_ffff, base: 0 }
}

/// Flat 32-bit protected mode at [`CODE`]; the GDT's limit covers the two descriptors that [`gdt`] makes.
pub fn flat32() -> CpuState {
    let mut state = CpuState::reset();
    let data = segment(0x10, 0xc093);
    state.segments = [data, segment(0x8, 0xc09b), data, data, data, data];
    state.idtr.base = IDT;
    state.idtr.limit = 0x7ff;
    state.gdtr.base = GDT;
    state.gdtr.limit = 0x17;
    state.cr0 = 0x11;
    state.rip = CODE;
    state.gpr[4] = STACK;
    state
}

/// Where [`write_gdt`] puts the descriptors of [`flat32`]: interrupt delivery reads them.
pub const GDT: u64 = 0x1000;

/// Writes the null, code and data descriptors of [`flat32`].
pub fn write_gdt(memory: &GuestMemory) {
    memory.write_obj(GDT, &[0u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff]).unwrap();
}

/// 64-bit mode at [`CODE`] on [`write_page_tables`].
pub fn long64() -> CpuState {
    let mut state = flat32();
    state.segments[1] = segment(0x8, 0xa09b);
    state.cr0 = 0x8000_0031;
    state.cr4 = 0x620;
    state.cr3 = PAGE_TABLES;
    state.msrs.efer = 0xd00;
    state
}

/// Identity-maps the first 4 GiB with 2 MiB pages.
pub fn write_page_tables(memory: &GuestMemory) {
    let table = |n: u64| PAGE_TABLES + 0x1000 * n;
    memory.write_obj(table(0), &(table(1) | 3)).unwrap();
    for gib in 0..4 {
        memory.write_obj(table(1) + 8 * gib, &(table(2 + gib) | 3)).unwrap();
        for n in 0..512 {
            memory.write_obj(table(2 + gib) + 8 * n, &((gib << 30 | n << 21) | 0x83)).unwrap();
        }
    }
}
