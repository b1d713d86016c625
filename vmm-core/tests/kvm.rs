//! What only the KVM accelerator promises: its fault reports, its clock, and its manners towards the process.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::sync::Arc;

use iced_x86::code_asm::{CodeAssembler, eax, rbx};
use softcpu::{CpuState, Segment, SegmentAttributes};
use vmm_core::accel::kvm::{KvmHypervisor, KvmOptions};
use vmm_core::accel::{IoBus, PicState, PitCounterState, PitState, Vcpu, VcpuExit, Vm, VmSpec};
use vmm_core::memory::GuestMemory;

const CODE: u64 = 0x1000;

/// KVM, or `None` when the environment says that this host has none.
fn kvm() -> Option<KvmHypervisor> {
    match KvmHypervisor::new() {
        Ok(hypervisor) => Some(hypervisor),
        Err(error) if std::env::var_os("NACRE_TEST_NO_KVM").is_some_and(|v| v == "1") => {
            eprintln!("not run, as NACRE_TEST_NO_KVM=1 says: {error}");
            None
        }
        Err(error) => panic!("{error} (NACRE_TEST_NO_KVM=1 if this host shall do without)"),
    }
}

struct NoDevices;

impl IoBus for NoDevices {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _: u16, _: &[u8]) {}
}

fn spec() -> VmSpec {
    VmSpec {
        memory: GuestMemory::flat(1 << 20).unwrap(),
        vcpus: 1,
        model: None,
        tsc_khz: None,
        bus: Arc::new(NoDevices),
    }
}

/// A vCPU in flat 32-bit mode, about to execute `code`.
fn guest(kvm: &KvmHypervisor, code: impl FnOnce(&mut CodeAssembler)) -> Box<dyn Vcpu> {
    let spec = spec();
    let mut assembler = CodeAssembler::new(32).unwrap();
    code(&mut assembler);
    spec.memory.write(CODE, &assembler.assemble(CODE).unwrap()).unwrap();
    let vm = kvm.create_kvm_vm(spec).unwrap();
    let mut cpu = vm.create_vcpu(0).unwrap();
    cpu.set_state(&flat32()).unwrap();
    cpu
}

fn flat32() -> CpuState {
    let mut state = CpuState::reset();
    let segment = |selector, attributes| Segment {
        selector,
        attributes: SegmentAttributes(attributes),
        limit: u32::MAX,
        base: 0,
    };
    let data = segment(0x10, 0xc093);
    state.segments = [data, segment(0x8, 0xc09b), data, data, data, data];
    state.cr0 = 0x11;
    state.rip = CODE;
    state
}

/// Code outside of RAM is what no KVM can execute.
#[test]
fn a_fault_says_where_and_why() {
    let Some(kvm) = kvm() else { return };
    let mut cpu = guest(&kvm, |a| {
        a.mov(eax, 0xd000_0000u32).unwrap();
        a.jmp(eax).unwrap();
    });
    match cpu.run().unwrap() {
        VcpuExit::Fault(fault) => {
            assert_eq!(fault.rip, 0xd000_0000);
            assert_eq!(fault.state.gpr[0], 0xd000_0000);
            assert_eq!(fault.vcpu, 0);
            assert!(fault.to_string().starts_with("vCPU 0 stopped at 0xd0000000: "), "{fault}");
            assert_eq!(fault.reason.contains("kvm_pvm"), KvmHypervisor::is_software());
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_instruction_that_software_kvm_lacks_is_named() {
    let Some(kvm) = kvm() else { return };
    if !KvmHypervisor::is_software() {
        eprintln!("this host's KVM is hardware: it executes every instruction");
        return;
    }
    let mut cpu = guest(&kvm, |a| {
        a.nop().unwrap();
        a.int3().unwrap();
    });
    match cpu.run().unwrap() {
        VcpuExit::Fault(fault) => {
            assert_eq!(fault.instruction.as_deref(), Some("int3"));
            assert_eq!((fault.rip, fault.bytes[0]), (CODE + 1, 0xcc));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_chipset_survives_the_round_trip() {
    let Some(kvm) = kvm() else { return };
    let vm = kvm.create_kvm_vm(spec()).unwrap();
    let hour = 3_600_000_000_000;
    let mut wanted = vm.chipset_state().unwrap();
    wanted.clock = hour;
    wanted.pics[0] = PicState { imr: 0xfb, base: 0x30, level: 0x20, highest: 3, ..Default::default() };
    wanted.pics[1] = PicState { imr: 0xff, base: 0x38, special_mask: true, ..Default::default() };
    wanted.ioapic.select = 0x12;
    wanted.ioapic.id = 9;
    for (pin, entry) in wanted.ioapic.redirection.iter_mut().enumerate() {
        *entry = 1 << 16 | (0x40 + pin as u64) | (pin as u64) << 56;
    }
    let counter = PitCounterState {
        count: 11_932,
        mode: 2,
        access: 3,
        read_step: 3,
        write_step: 3,
        gate: true,
        age: 5_000_000,
        ..Default::default()
    };
    wanted.pit = Some(PitState { counters: [counter; 3], speaker: true });
    let other = kvm.create_kvm_vm(spec()).unwrap();
    other.set_chipset_state(&wanted).unwrap();
    let mut found = other.chipset_state().unwrap();
    assert!((hour..2 * hour).contains(&found.clock), "the clock goes on: {}", found.clock);
    found.clock = wanted.clock;
    // The kernel begins to count anew.
    for counter in &mut found.pit.as_mut().unwrap().counters {
        counter.age = 5_000_000;
    }
    assert_eq!(found, wanted);
    wanted.ioapic.redirection.pop();
    assert!(other.set_chipset_state(&wanted).is_err(), "23 inputs");
}

#[test]
fn dirty_rings_are_used_where_the_host_has_them() {
    let Some(kvm) = kvm() else { return };
    let features = kvm.features();
    let entries = |dirty_ring| {
        let kvm = KvmHypervisor::with_options(KvmOptions { dirty_ring, ..Default::default() }).unwrap();
        kvm.create_kvm_vm(spec()).unwrap().dirty_ring_entries()
    };
    assert_eq!(entries(0), None);
    let Some(most) = features.dirty_ring else {
        eprintln!("THIS HOST'S KVM HAS NO DIRTY RINGS: only their unit tests ran");
        assert_eq!(entries(4096), None);
        return;
    };
    let default = kvm.create_kvm_vm(spec()).unwrap().dirty_ring_entries();
    assert_eq!(default, (!KvmHypervisor::is_software()).then_some(4096.min(most)));
    assert_eq!(
        [entries(1), entries(1025), entries(u32::MAX)],
        [Some(1024), Some(2048.min(most)), Some(most)]
    );
}

fn blocked(signal: i32) -> bool {
    // SAFETY: the set is initialised by the first call.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), &mut set);
        libc::sigismember(&set, signal) == 1
    }
}

#[test]
fn signals_are_left_as_they_were() {
    let signal = libc::SIGRTMIN() + 3;
    let kvm = match kvm() {
        Some(_) => {
            KvmHypervisor::with_options(KvmOptions { kick_signal: signal, ..Default::default() }).unwrap()
        }
        None => return,
    };
    let mut cpu = guest(&kvm, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.jmp(again).unwrap();
    });
    let handle = cpu.handle();
    for _ in 0..100 {
        std::thread::scope(|scope| {
            scope.spawn(|| handle.kick());
            assert!(matches!(cpu.run().unwrap(), VcpuExit::Interrupted));
        });
        assert!(!blocked(signal));
    }
    // Kicks while nobody runs reach no thread: the default action of the signal would end the process.
    handle.kick();
    handle.nmi();
    // SAFETY: only reads the disposition.
    let action = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action);
        action.sa_sigaction
    };
    assert_eq!(action, libc::SIG_DFL);
}

#[test]
fn everything_is_released() {
    let Some(kvm) = kvm() else { return };
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    // Other tests open and close descriptors meanwhile: a leak of one in each round shows all the same.
    let before = descriptors();
    for _ in 0..64 {
        let vm = kvm.create_kvm_vm(spec()).unwrap();
        let cpu = vm.create_vcpu(0).unwrap();
        let vector = vm.msi_vector().unwrap();
        vector.set_message(Some(vmm_core::interrupt::Msi { address: 0xfee0_0000, data: 0x40, requester: 0 }));
        let _event = vector.event_fd().unwrap();
        let _line = vm.irq_line(3).unwrap();
        drop((vm, cpu));
    }
    assert!(descriptors() < before + 64);
}

#[test]
fn sixty_four_bit_code_is_disassembled_as_such() {
    let Some(kvm) = kvm() else { return };
    if !KvmHypervisor::is_software() {
        eprintln!("this host's KVM is hardware: it executes every instruction");
        return;
    }
    let spec = spec();
    let mut assembler = CodeAssembler::new(64).unwrap();
    assembler.cmpxchg16b(iced_x86::code_asm::xmmword_ptr(rbx)).unwrap();
    spec.memory.write(CODE, &assembler.assemble(CODE).unwrap()).unwrap();
    // One 2 MiB page maps everything.
    spec.memory.write_obj(0x2000, &0x3003u64).unwrap();
    spec.memory.write_obj(0x3000, &0x4003u64).unwrap();
    spec.memory.write_obj(0x4000, &0x83u64).unwrap();
    let vm = kvm.create_kvm_vm(spec).unwrap();
    let mut cpu = vm.create_vcpu(0).unwrap();
    let mut state = flat32();
    state.segments[1].attributes = SegmentAttributes(0xa09b);
    (state.cr0, state.cr3, state.cr4, state.msrs.efer) = (0x8000_0031, 0x2000, 0x620, 0xd00);
    state.gpr[3] = 0x8000;
    cpu.set_state(&state).unwrap();
    match cpu.run().unwrap() {
        VcpuExit::Fault(fault) => assert_eq!(fault.instruction.as_deref(), Some("cmpxchg16b [rbx]")),
        other => panic!("{other:?}"),
    }
}
