//! Several vCPUs.

use iced_x86::code_asm::*;
use vmm_core::accel::VmSpec;
use vmm_core::memory::GuestMemory;

use crate::harness::*;

/// Where the start-up IPI lets other CPUs begin, in real mode.
const TRAMPOLINE: u64 = 0x6000;
/// A word that CPUs count up.
const COUNTER: u64 = 0x5000;

pub fn init_and_sipi_start_another_cpu(target: &Target) {
    let code = assemble(32, CODE, |a| {
        enable_apic(a);
        for id in [1u32, 2] {
            a.mov(dword_ptr(0xfee0_0310u64), id << 24).unwrap();
            a.mov(dword_ptr(0xfee0_0300u64), 0x4500).unwrap();
            a.mov(dword_ptr(0xfee0_0300u64), 0x4600 | (TRAMPOLINE >> 12) as u32).unwrap();
        }
        let mut wait = a.create_label();
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.cmp(dword_ptr(COUNTER), 2).unwrap();
        a.jne(wait).unwrap();
        done(a);
    });
    let mut machine = Machine::new(target, 3, &code);
    machine.cpu.set_state(&flat32()).unwrap();
    let trampoline = assemble(16, TRAMPOLINE, |a| {
        // The initial APIC ID, from CPUID.
        a.mov(eax, 1).unwrap();
        a.cpuid().unwrap();
        a.shr(ebx, 24).unwrap();
        a.mov(eax, ebx).unwrap();
        report(a);
        a.xor(ax, ax).unwrap();
        a.mov(ds, ax).unwrap();
        a.lock().inc(dword_ptr(COUNTER)).unwrap();
        halt_forever(a);
    });
    machine.memory.write(TRAMPOLINE, &trampoline).unwrap();
    let mut others = [machine.another_cpu(1), machine.another_cpu(2)];
    for cpu in &mut others {
        let state = cpu.state().unwrap();
        assert_eq!(state.mp_state, softcpu::MpState::WaitForSipi);
    }
    let bus = machine.bus.clone();
    std::thread::scope(|scope| {
        for cpu in &mut others {
            let bus = &bus;
            scope.spawn(move || run_to_end(bus, &mut **cpu));
        }
        machine.run_to_end();
    });
    let mut ids = machine.bus.reports();
    ids.sort();
    assert_eq!(ids, [1, 2]);
    for cpu in &mut others {
        assert_eq!(cpu.state().unwrap().segments[1].base, TRAMPOLINE);
    }
}

pub fn cpu_ids_are_checked(target: &Target) {
    let machine = Machine::flat32(target, done);
    assert!(machine.vm.create_vcpu(0).is_err(), "taken");
    assert!(machine.vm.create_vcpu(1).is_err(), "more than were asked for");
    for vcpus in [0, u32::MAX] {
        let spec = VmSpec {
            memory: GuestMemory::flat(RAM).unwrap(),
            vcpus,
            model: None,
            tsc_khz: None,
            bus: machine.bus.clone(),
        };
        assert!(target.hypervisor.create_vm(spec).is_err(), "{vcpus} vCPUs");
    }
}
