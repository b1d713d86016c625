//! Stopping.

use iced_x86::code_asm::*;
use vmm_core::accel::VcpuExit;

use crate::harness::*;

fn spin(a: &mut CodeAssembler) {
    report_value(a, 1);
    let mut again = a.create_label();
    a.set_label(&mut again).unwrap();
    a.inc(ebx).unwrap();
    a.jmp(again).unwrap();
}

fn kick_after_report(target: &Target, guest: impl FnOnce(&mut CodeAssembler)) -> Machine {
    let mut machine = Machine::flat32(target, guest);
    let handle = machine.cpu.handle();
    let bus = machine.bus.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            bus.wait_for_reports(1);
            handle.kick();
        });
        assert!(matches!(machine.run(), VcpuExit::Interrupted));
    });
    machine
}

pub fn kicks_stop_a_running_cpu(target: &Target) {
    let mut machine = kick_after_report(target, spin);
    // And again, from a thread that does not run a vCPU and knows no thread that does.
    for _ in 0..20 {
        let handle = machine.cpu.handle();
        std::thread::scope(|scope| {
            scope.spawn(|| handle.kick());
            assert!(matches!(machine.run(), VcpuExit::Interrupted));
        });
    }
    let before = machine.cpu.state().unwrap();
    assert!((CODE..CODE + 0x20).contains(&before.rip));
}

pub fn kicks_wake_a_halted_cpu(target: &Target) {
    let mut machine = kick_after_report(target, |a| {
        report_value(a, 1);
        halt_forever(a);
    });
    let rip = machine.cpu.state().unwrap().rip;
    assert!((CODE..CODE + 0x20).contains(&rip));
}

pub fn a_kick_before_the_run_counts(target: &Target) {
    let mut machine = Machine::flat32(target, spin);
    let handle = machine.cpu.handle();
    handle.kick();
    handle.kick();
    assert!(matches!(machine.run(), VcpuExit::Interrupted));
    assert!(machine.bus.reports().is_empty(), "no instruction ran");
    assert_eq!(machine.cpu.state().unwrap().rip, CODE);
    // One run took both.
    let bus = machine.bus.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            bus.wait_for_reports(1);
            handle.kick();
        });
        machine.run();
    });
    assert_eq!(machine.bus.reports(), [1]);
}

pub fn a_triple_fault_ends_the_run(target: &Target) {
    let mut machine = Machine::flat32(target, |a| {
        a.ud2().unwrap();
    });
    let mut state = flat32();
    state.idtr.limit = 0;
    machine.cpu.set_state(&state).unwrap();
    assert!(matches!(machine.run(), VcpuExit::TripleFault));
    assert!(matches!(machine.run(), VcpuExit::TripleFault), "it stays down");
    assert_eq!(machine.cpu.state().unwrap().mp_state, softcpu::MpState::Shutdown);
    // New state brings it back.
    machine.memory.write(CODE, &assemble(32, CODE, done)).unwrap();
    machine.cpu.set_state(&flat32()).unwrap();
    machine.run_to_end();
}

/// A port read whose exit is followed by a kick has its value in the register when the run returns.
pub fn port_exits_complete_before_a_kick(target: &Target) {
    struct KickingBus {
        handle: std::sync::OnceLock<std::sync::Arc<dyn vmm_core::accel::VcpuHandle>>,
    }
    impl vmm_core::accel::IoBus for KickingBus {
        fn mmio_read(&self, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: u64, _: &[u8]) {}
        fn port_read(&self, _: u16, data: &mut [u8]) {
            data.fill(0x5a);
            self.handle.get().unwrap().kick();
        }
        fn port_write(&self, _: u16, _: &[u8]) {}
    }
    let memory = vmm_core::memory::GuestMemory::flat(RAM).unwrap();
    let code = assemble(32, CODE, |a| {
        a.mov(dx, 0x300).unwrap();
        a.in_(eax, dx).unwrap();
        halt_forever(a);
    });
    memory.write(CODE, &code).unwrap();
    let bus = std::sync::Arc::new(KickingBus { handle: Default::default() });
    let spec = vmm_core::accel::VmSpec { memory, vcpus: 1, model: None, tsc_khz: None, bus: bus.clone() };
    let vm = target.hypervisor.create_vm(spec).unwrap();
    let mut cpu = vm.create_vcpu(0).unwrap();
    assert!(bus.handle.set(cpu.handle()).is_ok());
    cpu.set_state(&flat32()).unwrap();
    assert!(matches!(cpu.run().unwrap(), VcpuExit::Interrupted));
    let state = cpu.state().unwrap();
    assert_eq!(state.gpr[0], 0x5a5a_5a5a);
    assert!(state.rip > CODE + 4, "the instruction is complete");
}
