//! Wired, message-signalled, non-maskable and timer interrupts.

use std::fs::File;
use std::io::Write;

use iced_x86::code_asm::*;
use vmm_core::accel::IOAPIC_PINS;
use vmm_core::interrupt::Msi;

use crate::harness::*;

const VECTOR: u8 = 0x31;
const HANDLER: u64 = 0x4000;
/// Reported when the guest is ready for interrupts.
const READY: u32 = 0x1000;

/// A guest that enables its APIC, does `set_up`, reports [`READY`] and halts with interrupts enabled. Interrupt
/// [`VECTOR`] reports its number and goes back to the halt; the guest is done after `interrupts` of them.
fn waiting_guest(target: &Target, interrupts: u32, set_up: impl FnOnce(&mut CodeAssembler)) -> Machine {
    let machine = Machine::flat32(target, |a| {
        a.mov(ebp, interrupts).unwrap();
        // Both PICs masked: their inputs are the IO-APIC's too.
        a.mov(al, 0xff).unwrap();
        a.out(0x21, al).unwrap();
        a.out(0xa1, al).unwrap();
        enable_apic(a);
        set_up(a);
        report_value(a, READY);
        a.sti().unwrap();
        halt_forever(a);
    });
    write_gdt(&machine.memory);
    machine.set_handler32(VECTOR, HANDLER, |a| {
        let mut more = a.create_label();
        report_value(a, u32::from(VECTOR));
        end_of_interrupt(a);
        a.dec(ebp).unwrap();
        a.jnz(more).unwrap();
        done(a);
        a.set_label(&mut more).unwrap();
        // Back to the halt without IRET, which software KVM does not know in this mode.
        a.add(esp, 12).unwrap();
        a.sti().unwrap();
        halt_forever(a);
    });
    machine
}

/// Runs the guest while `act` happens on another thread.
fn run_while(machine: &mut Machine, act: impl FnOnce(&TestBus) + Send) {
    let bus = machine.bus.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| act(&bus));
        machine.run_to_end();
    });
}

/// Routes IO-APIC pin `pin`, edge-triggered, to [`VECTOR`] on APIC 0.
fn route_pin(a: &mut CodeAssembler, pin: u32) {
    for (register, value) in [(0x11 + 2 * pin, 0), (0x10 + 2 * pin, u32::from(VECTOR))] {
        a.mov(dword_ptr(0xfec0_0000u64), register).unwrap();
        a.mov(dword_ptr(0xfec0_0010u64), value).unwrap();
    }
}

pub fn a_line_wakes_a_halted_cpu(target: &Target) {
    let mut machine = waiting_guest(target, 2, |a| route_pin(a, 5));
    let line = machine.vm.irq_line(5).unwrap();
    let other = machine.vm.irq_line(6).unwrap();
    run_while(&mut machine, |bus| {
        bus.wait_for_reports(1);
        other.pulse();
        line.pulse();
        bus.wait_for_reports(2);
        line.set_level(true);
    });
    assert_eq!(machine.bus.reports(), [READY, 0x31, 0x31]);
}

fn message() -> Msi {
    Msi { address: 0xfee0_0000, data: VECTOR.into(), requester: 0 }
}

pub fn messages_arrive_unless_masked(target: &Target) {
    let mut machine = waiting_guest(target, 3, |_| {});
    let vm = machine.vm.clone();
    let vector = vm.msi_vector().unwrap();
    run_while(&mut machine, |bus| {
        bus.wait_for_reports(1);
        vector.trigger();
        vector.set_message(Some(message()));
        vector.trigger();
        bus.wait_for_reports(2);
        vector.set_message(None);
        vector.trigger();
        vm.send_msi(message()).unwrap();
        bus.wait_for_reports(3);
        vector.set_message(Some(message()));
        vector.trigger();
    });
    assert_eq!(machine.bus.reports(), [READY, 0x31, 0x31, 0x31]);
}

pub fn event_descriptors_send_messages(target: &Target) {
    let mut machine = waiting_guest(target, 4, |_| {});
    let vm = machine.vm.clone();
    // Made before and after the message is known, and asked for twice.
    let early = vm.msi_vector().unwrap();
    let mut early_event = File::from(early.event_fd().unwrap());
    early.set_message(Some(message()));
    let late = vm.msi_vector().unwrap();
    late.set_message(Some(message()));
    let mut late_event = File::from(late.event_fd().unwrap());
    let mut again = File::from(late.event_fd().unwrap());
    run_while(&mut machine, |bus| {
        let signal = |event: &mut File| event.write_all(&1u64.to_ne_bytes()).unwrap();
        bus.wait_for_reports(1);
        signal(&mut early_event);
        bus.wait_for_reports(2);
        signal(&mut late_event);
        bus.wait_for_reports(3);
        signal(&mut again);
        bus.wait_for_reports(4);
        // Masked and unmasked again, it still works.
        late.set_message(None);
        late.set_message(Some(message()));
        signal(&mut late_event);
    });
    assert_eq!(machine.bus.reports(), [READY, 0x31, 0x31, 0x31, 0x31]);
}

pub fn an_nmi_interrupts_a_loop(target: &Target) {
    let mut machine = Machine::flat32(target, |a| {
        report_value(a, READY);
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.pause().unwrap();
        a.jmp(again).unwrap();
    });
    write_gdt(&machine.memory);
    machine.set_handler32(2, HANDLER, |a| {
        report_value(a, 2);
        done(a);
    });
    let handle = machine.cpu.handle();
    run_while(&mut machine, |bus| {
        bus.wait_for_reports(1);
        handle.nmi();
    });
    assert_eq!(machine.bus.reports(), [READY, 2]);
}

pub fn the_apic_timer_fires(target: &Target) {
    let mut machine = waiting_guest(target, 3, |a| {
        // Periodic, divided by 1.
        for (register, value) in [(0x3e0u64, 0xb), (0x320, 0x2_0000 | u32::from(VECTOR)), (0x380, 2_000_000)]
        {
            a.mov(dword_ptr(0xfee0_0000 + register), value).unwrap();
        }
    });
    machine.run_to_end();
    assert_eq!(machine.bus.reports(), [READY, 0x31, 0x31, 0x31]);
}

/// A device's message address is the guest's choice: an address that is no APIC's must not end the machine.
pub fn a_bad_message_is_an_error_or_dropped(target: &Target) {
    let mut machine = waiting_guest(target, 1, |_| {});
    let vm = machine.vm.clone();
    let vector = vm.msi_vector().unwrap();
    run_while(&mut machine, |bus| {
        bus.wait_for_reports(1);
        // APIC 77 is not there.
        vector.set_message(Some(Msi { address: 0xfee4_d000, ..message() }));
        vector.trigger();
        vector.set_message(Some(message()));
        vector.trigger();
    });
    assert_eq!(machine.bus.reports(), [READY, 0x31]);
}

pub fn lines_are_bounded(target: &Target) {
    let machine = Machine::flat32(target, done);
    assert!(machine.vm.irq_line(IOAPIC_PINS - 1).is_ok());
    assert!(machine.vm.irq_line(IOAPIC_PINS).is_err());
    assert!(machine.vm.irq_line(u32::MAX).is_err());
}
