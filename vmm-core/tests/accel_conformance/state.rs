//! Architectural state: loading, saving, moving.

use iced_x86::code_asm::*;
use softcpu::CpuState;
use vmm_core::accel::{PicState, PitCounterState, VcpuExit};
use vmm_core::interrupt::Msi;

use crate::harness::*;

/// A time-stamp counter that no host comes to by itself while the test runs.
const TSC: u64 = 1 << 60;

/// 64-bit state with a distinct value in everything that a round trip must keep.
fn distinct() -> CpuState {
    let mut state = long64();
    for (n, register) in state.gpr.iter_mut().enumerate() {
        *register = 0x0101_0101_0101_0101 * n as u64;
    }
    state.rflags = 0x8d7 & !(1 << 8);
    for (n, segment) in state.segments.iter_mut().enumerate().skip(4) {
        segment.base = 0x7fff_0000_1000 * (n as u64 - 3);
    }
    state.gdtr.base = 0xffff_8000_0000_1000;
    state.cr2 = 0xdead_b000;
    state.dr = [0x1000, 0x2000, 0x3000, 0x4000, 0, 0, 0xffff_0ff1, 0x401];
    state.msrs.star = 0x23_0010_0000_0000;
    state.msrs.lstar = 0xffff_ffff_8100_0000;
    state.msrs.cstar = 0xffff_ffff_8200_0000;
    state.msrs.sfmask = 0x4_7700;
    state.msrs.kernel_gs_base = 0xffff_8880_0000_0000;
    state.msrs.sysenter_cs = 0x10;
    state.msrs.sysenter_esp = 0xffff_8000_1234_0000;
    state.msrs.sysenter_eip = 0xffff_8000_4321_0000;
    state.msrs.pat = 0x0407_0106_0407_0106;
    state.msrs.tsc_aux = 5;
    state.interrupt_shadow = true;
    state.tsc = TSC;
    state
}

pub fn registers_survive_the_round_trip(target: &Target) {
    let mut machine = Machine::long64(target, done);
    let mut wanted = distinct();
    machine.cpu.set_state(&wanted).unwrap();
    let found = machine.cpu.state().unwrap();
    let goes_on = (TSC..TSC << 1).contains(&found.tsc);
    assert_eq!(goes_on, !target.holes.host_tsc, "the time-stamp counter goes on at {:#x}", found.tsc);
    wanted.tsc = found.tsc;
    // Which bits of MXCSR exist, and what the unused end of the FXSAVE image holds, is the processor's own.
    wanted.fpu.mxcsr_mask = found.fpu.mxcsr_mask;
    wanted.fpu.reserved1 = found.fpu.reserved1;
    assert_eq!(found, wanted);
    // And it runs.
    machine.cpu.set_state(&long64()).unwrap();
    machine.run_to_end();
}

/// A boot protocol's registers, loaded alone into a new vCPU, leave it in the state that loading everything leaves.
pub fn registers_of_a_boot_protocol_are_all_that_changes(target: &Target) {
    for entry in [flat32(), distinct()] {
        let [mut alone, mut whole] = [(); 2].map(|()| Machine::new(target, 1, &[]));
        let new = whole.cpu.state().unwrap();
        let mut wanted =
            CpuState { msrs: softcpu::Msrs { efer: entry.msrs.efer, ..new.msrs }, ..new.clone() };
        (wanted.gpr, wanted.rip, wanted.rflags) = (entry.gpr, entry.rip, entry.rflags);
        (wanted.segments, wanted.ldtr, wanted.tr) = (entry.segments, entry.ldtr, entry.tr);
        (wanted.gdtr, wanted.idtr) = (entry.gdtr, entry.idtr);
        (wanted.cr0, wanted.cr2, wanted.cr3, wanted.cr4) = (entry.cr0, entry.cr2, entry.cr3, entry.cr4);
        assert_ne!(wanted, new);
        whole.cpu.set_state(&wanted).unwrap();
        alone.cpu.set_registers(&entry).unwrap();
        let [mut found, mut expected] = [&mut alone, &mut whole].map(|machine| machine.cpu.state().unwrap());
        // They run on, and began at different times.
        (found.tsc, expected.tsc) = (0, 0);
        assert_eq!(found, expected);
        assert_eq!(found, CpuState { tsc: 0, ..wanted });
        let [found, expected] = [&mut alone, &mut whole].map(|machine| {
            let mut extra = machine.cpu.extra_state().unwrap();
            // Registers of hypervisors: some are clocks.
            extra.msrs.retain(|(number, _)| !(0x4000_0000..0xc000_0000).contains(number));
            if !extra.xsave.is_empty() {
                // XSTATE_BV: what has been loaded counts as in use, also with its initial value.
                extra.xsave[512..520].fill(0);
            }
            extra
        });
        assert_eq!((found.apic, found.pending, found.msrs), (expected.apic, expected.pending, expected.msrs));
        assert!(found.xsave == expected.xsave, "the extended registers differ");
    }
}

pub fn sse_state_survives_the_round_trip(target: &Target) {
    let mut machine = Machine::long64(target, |a| {
        a.paddq(xmm3, xmm3).unwrap();
        a.movups(xmmword_ptr(0x3000), xmm3).unwrap();
        done(a);
    });
    let mut state = long64();
    state.fpu.fcw = 0x27f;
    state.fpu.mxcsr = 0x9fc0;
    state.fpu.ftw = 0xff;
    for n in 0..16 {
        state.fpu.xmm[n] = (n as u128 + 1) << 64 | n as u128;
    }
    for n in 0..8 {
        state.fpu.st[n] = 0x3fff_8000_0000_0000_0000 + n as u128;
    }
    machine.cpu.set_state(&state).unwrap();
    let found = machine.cpu.state().unwrap().fpu;
    assert_eq!(
        (found.fcw, found.ftw, found.mxcsr, found.xmm, found.st),
        (0x27f, 0xff, 0x9fc0, state.fpu.xmm, state.fpu.st)
    );
    if target.holes.kernel_sse {
        match machine.run() {
            VcpuExit::Fault(fault) => {
                assert_eq!(fault.instruction.as_deref(), Some("paddq xmm3,xmm3"));
                assert_eq!(fault.bytes[..4], [0x66, 0x0f, 0xd4, 0xdb]);
                assert_eq!(fault.rip, CODE);
                assert!(fault.reason.contains("kvm_pvm"), "{}", fault.reason);
            }
            other => panic!("{other:?}"),
        }
    } else {
        machine.run_to_end();
        assert_eq!(machine.memory.read_obj::<u64>(0x3000).unwrap(), 6);
        assert_eq!(machine.cpu.state().unwrap().fpu.xmm[3], 8u128 << 64 | 6);
    }
}

/// A guest with an interrupt waiting at its APIC is stopped, and goes on in a second machine.
pub fn a_guest_moves_to_another_machine(target: &Target) {
    let code = |a: &mut CodeAssembler| {
        enable_apic(a);
        report_value(a, 1);
        let mut wait = a.create_label();
        a.set_label(&mut wait).unwrap();
        a.cmp(dword_ptr(0x5000), 0).unwrap();
        a.je(wait).unwrap();
        a.sti().unwrap();
        halt_forever(a);
    };
    let mut first = Machine::flat32(target, code);
    write_gdt(&first.memory);
    first.set_handler32(0x44, 0x4000, |a| {
        report_value(a, 0x44);
        done(a);
    });
    let vm = first.vm.clone();
    let handle = first.cpu.handle();
    let bus = first.bus.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            bus.wait_for_reports(1);
            // The guest has interrupts disabled: this one stays in the APIC.
            vm.send_msi(Msi { address: 0xfee0_0000, data: 0x44, requester: 0 }).unwrap();
            handle.kick();
        });
        assert!(matches!(first.run(), VcpuExit::Interrupted));
    });
    let state = first.cpu.state().unwrap();
    let extra = first.cpu.extra_state().unwrap();
    assert_eq!(extra.apic.registers.len(), 64);
    assert_eq!(extra.apic.registers[0x22], 1 << 4, "vector 0x44 is requested");
    assert_eq!(extra.apic.base & 0x900, 0x900);

    let mut image = vec![0; RAM as usize];
    first.memory.read(0, &mut image).unwrap();
    drop(first);
    let mut second = Machine::new(target, 1, &[]);
    second.memory.write(0, &image).unwrap();
    second.memory.write_obj(0x5000, &1u32).unwrap();
    second.cpu.set_state(&state).unwrap();
    second.cpu.set_extra_state(&extra).unwrap();
    assert_eq!(second.cpu.extra_state().unwrap().apic.registers, extra.apic.registers);
    second.run_to_end();
    assert_eq!(second.bus.reports(), [0x44]);
}

/// Nanoseconds of the paravirtual clock that no test lasts.
const HOURS: u64 = 1 << 50;

pub fn the_chipset_survives_the_round_trip(target: &Target) {
    let first = Machine::flat32(target, done);
    let mut wanted = first.vm.chipset_state().unwrap();
    assert_eq!(wanted.pics, PicState::at_power_on());
    wanted.pics[0] = PicState { irr: 0x10, isr: 0x02, imr: 0x68, lines: 0x10, base: 0x20, ..wanted.pics[0] };
    wanted.pics[1] = PicState { level: 0x06, base: 0x28, read_isr: true, highest: 3, ..wanted.pics[1] };
    wanted.ioapic.select = 0x12;
    wanted.ioapic.redirection[3] = 1 << 16 | 0x33;
    wanted.ioapic.redirection[9] = 1 << 56 | 1 << 16 | 1 << 15 | 0x39;
    wanted.clock = HOURS;
    let pit = wanted.pit.as_mut().unwrap();
    pit.counters[2] =
        PitCounterState { mode: 3, count: 0x1234, access: 3, read_step: 3, write_step: 3, ..pit.counters[2] };
    pit.speaker = true;
    let second = Machine::flat32(target, done);
    second.vm.set_chipset_state(&wanted).unwrap();
    let mut found = second.vm.chipset_state().unwrap();
    assert!((HOURS..2 * HOURS).contains(&found.clock), "the paravirtual clock goes on at {}", found.clock);
    // Time goes on, each on its own host.
    for state in [&mut wanted, &mut found] {
        state.clock = 0;
        state.pit.as_mut().unwrap().counters.iter_mut().for_each(|c| c.age = 0);
    }
    assert_eq!(found, wanted);
    wanted.ioapic.redirection.pop();
    assert!(second.vm.set_chipset_state(&wanted).is_err(), "23 inputs");
}

pub fn bad_state_is_refused(target: &Target) {
    let mut machine = Machine::flat32(target, done);
    // Paging without protection, and a reserved bit of EFER.
    let mut state = flat32();
    state.cr0 = 0x8000_0000;
    assert!(machine.cpu.set_state(&state).is_err(), "CR0");
    let mut extra = machine.cpu.extra_state().unwrap();
    extra.apic.registers.pop();
    assert!(machine.cpu.set_extra_state(&extra).is_err(), "APIC");
    // The vCPU is still usable.
    machine.cpu.set_state(&flat32()).unwrap();
    machine.run_to_end();
}
