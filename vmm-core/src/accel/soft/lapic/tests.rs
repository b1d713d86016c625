use std::sync::Arc;

use softcpu::{Clock, Local};

use super::*;

/// Frequency at which a tick is a nanosecond.
const KHZ: u32 = 1_000_000;

fn machine(cpus: u32) -> (Arc<Apics>, Vec<LocalApic>) {
    let clock = Arc::new(Clock::deterministic(KHZ));
    let apics = Apics::new(cpus);
    let locals = (0..cpus)
        .map(|id| {
            let lapic = apics.lapic(id).unwrap();
            lapic.attach(Arc::default());
            let mut local = LocalApic::new(apics.clone(), lapic.clone(), clock.clone());
            write(&mut local, 0xf0, 0x1ff);
            local
        })
        .collect();
    (apics, locals)
}

fn write(apic: &mut LocalApic, offset: u32, value: u32) {
    apic.mmio_write(offset, &value.to_le_bytes(), 0);
}

fn read_at(apic: &mut LocalApic, offset: u32, tsc: u64) -> u32 {
    let mut data = [0; 4];
    apic.mmio_read(offset, &mut data, tsc);
    u32::from_le_bytes(data)
}

fn read(apic: &mut LocalApic, offset: u32) -> u32 {
    read_at(apic, offset, 0)
}

fn fixed(id: u32, vector: u8) -> Message {
    Message {
        destination: Destination { id, logical: false, wide: false },
        delivery: Delivery::Fixed,
        vector,
        level: false,
    }
}

fn to_x2apic(apic: &mut LocalApic) {
    let base = apic.read_msr(0x1b, 0).unwrap();
    apic.write_msr(0x1b, base | 1 << 10, 0).unwrap();
}

#[test]
fn priorities_nest() {
    let (apics, mut locals) = machine(1);
    let apic = &mut locals[0];
    apics.deliver(&fixed(0, 0x31));
    assert_eq!(apic.acknowledge(), Some(0x31));
    apics.deliver(&fixed(0, 0x3f));
    assert!(!apic.pending(), "the same class waits");
    apics.deliver(&fixed(0, 0x41));
    assert_eq!(apic.acknowledge(), Some(0x41));
    assert_eq!(read(apic, 0xa0), 0x40, "PPR");
    write(apic, 0xb0, 0);
    assert_eq!(read(apic, 0xa0), 0x30);
    write(apic, 0xb0, 0);
    assert_eq!(apic.acknowledge(), Some(0x3f));
    write(apic, 0xb0, 0);
    apic.set_cr8(5);
    assert_eq!(read(apic, 0x80), 0x50, "CR8 is TPR 7:4");
    apics.deliver(&fixed(0, 0x5f));
    assert!(!apic.pending());
    apics.deliver(&fixed(0, 0x60));
    assert_eq!(apic.acknowledge(), Some(0x60));
    assert_eq!(read(apic, 0x220), 1 << 31, "IRR word 2");
}

#[test]
fn a_software_disabled_apic_takes_no_interrupt() {
    let (apics, mut locals) = machine(1);
    write(&mut locals[0], 0xf0, 0xff);
    apics.deliver(&fixed(0, 0x50));
    write(&mut locals[0], 0xf0, 0x1ff);
    assert!(!locals[0].pending());
    apics.deliver(&fixed(0, 8));
    assert!(!locals[0].pending(), "vectors below 16 are illegal");
}

#[test]
fn destinations_in_every_mode() {
    let (apics, mut locals) = machine(20);
    let mut hit = |destination: Destination| {
        apics.deliver(&Message { destination, ..fixed(0, 0x40) });
        let hit: Vec<u32> = (0..20).filter(|&i| locals[i as usize].acknowledge().is_some()).collect();
        locals.iter_mut().for_each(|l| write(l, 0xb0, 0));
        hit
    };
    let physical = |id| Destination { id, logical: false, wide: false };
    let logical = |id| Destination { id, logical: true, wide: false };
    assert_eq!(hit(physical(3)), [3]);
    assert_eq!(hit(physical(0xff)).len(), 20);
    assert_eq!(hit(logical(6)), [] as [u32; 0]);
    for (i, local) in locals.iter_mut().enumerate().take(8) {
        write(local, 0xd0, 1 << (24 + i));
    }
    let mut hit = |destination: Destination| {
        apics.deliver(&Message { destination, ..fixed(0, 0x40) });
        let hit: Vec<u32> = (0..20).filter(|&i| locals[i as usize].acknowledge().is_some()).collect();
        locals.iter_mut().for_each(|l| write(l, 0xb0, 0));
        hit
    };
    assert_eq!(hit(logical(6)), [1, 2]);
    write(&mut locals[9], 0xe0, 0x0fff_ffff);
    write(&mut locals[9], 0xd0, 0x2400_0000);
    apics.deliver(&Message { destination: logical(0x24), ..fixed(0, 0x41) });
    assert_eq!(locals[9].acknowledge(), Some(0x41), "cluster 2, member 4");
    to_x2apic(&mut locals[17]);
    let wide = Destination { id: 1 << 16 | 0b10, logical: true, wide: true };
    apics.deliver(&Message { destination: wide, ..fixed(0, 0x42) });
    assert_eq!(locals[17].acknowledge(), Some(0x42));
    assert_eq!(locals[17].read_msr(0x80d, 0), Ok(1 << 16 | 2));
}

#[test]
fn ipis_with_shorthands_and_startup() {
    let (_apics, mut locals) = machine(3);
    let mut sent = |low: u32, high: u32| {
        write(&mut locals[1], 0x310, high);
        write(&mut locals[1], 0x300, low);
        let hit: Vec<u32> = (0..3).filter(|&i| locals[i as usize].acknowledge().is_some()).collect();
        locals.iter_mut().for_each(|l| write(l, 0xb0, 0));
        hit
    };
    assert_eq!(sent(0x4_0040, 0), [1], "self");
    assert_eq!(sent(0x8_0040, 0), [0, 1, 2], "all");
    assert_eq!(sent(0xc_0040, 0), [0, 2], "others");
    assert_eq!(sent(0x40, 2 << 24), [2]);
    assert_eq!(sent(0x140, 0xff << 24), [0], "lowest priority picks one");
    to_x2apic(&mut locals[0]);
    locals[0].write_msr(0x830, 2 << 32 | 0x55, 0).unwrap();
    assert_eq!(locals[2].acknowledge(), Some(0x55));
    locals[0].write_msr(0x83f, 0x66, 0).unwrap();
    assert_eq!(locals[0].acknowledge(), Some(0x66));
}

#[test]
fn timer_modes() {
    let (_apics, mut locals) = machine(1);
    let apic = &mut locals[0];
    write(apic, 0x3e0, 0b1011); // divide by 1
    write(apic, 0x320, 0x50);
    apic.mmio_write(0x380, &1000u32.to_le_bytes(), 5000);
    assert_eq!(apic.deadline(), Some(6000));
    assert_eq!(read_at(apic, 0x390, 5400), 600);
    apic.timer(5999);
    assert!(!apic.pending());
    apic.timer(6000);
    assert_eq!((apic.acknowledge(), apic.deadline()), (Some(0x50), None));
    write(apic, 0xb0, 0);

    write(apic, 0x3e0, 0); // divide by 2
    write(apic, 0x320, 0x2_0051); // periodic
    apic.mmio_write(0x380, &50_000u32.to_le_bytes(), 0);
    assert_eq!(apic.deadline(), Some(100_000));
    apic.timer(350_000);
    assert_eq!(apic.deadline(), Some(400_000), "missed periods are one interrupt");
    assert_eq!(apic.acknowledge(), Some(0x51));
    write(apic, 0xb0, 0);
    apic.mmio_write(0x380, &1u32.to_le_bytes(), 0);
    assert!(apic.deadline() >= Some(20_000), "the shortest period is bounded");
    apic.mmio_write(0x380, &0u32.to_le_bytes(), 0);
    assert_eq!(apic.deadline(), None);

    write(apic, 0x320, 0x4_0052); // TSC deadline
    apic.write_msr(0x6e0, 777, 0).unwrap();
    assert_eq!((apic.deadline(), apic.read_msr(0x6e0, 0)), (Some(777), Ok(777)));
    write(apic, 0x320, 0x5_0052); // masked
    apic.timer(777);
    assert!(!apic.pending());
    assert_eq!(apic.read_msr(0x6e0, 0), Ok(0), "disarmed");
}

#[test]
fn mode_changes_follow_the_state_machine() {
    let (_apics, mut locals) = machine(2);
    let apic = &mut locals[0];
    let base = apic.read_msr(0x1b, 0).unwrap();
    assert_eq!(base, 0xfee0_0900, "enabled bootstrap processor");
    assert_eq!(apic.mmio_page(), Some(0xfee0_0000));
    assert!(apic.read_msr(0x802, 0).is_err(), "no x2APIC registers yet");
    to_x2apic(apic);
    assert_eq!(apic.mmio_page(), None);
    assert!(apic.write_msr(0x1b, base, 0).is_err(), "no way back to xAPIC");
    assert!(apic.write_msr(0x80b, 1, 0).is_err(), "EOI takes zero only");
    assert!(apic.write_msr(0x802, 0, 0).is_err(), "the ID is read-only");
    assert!(apic.read_msr(0x80e, 0).is_err(), "there is no DFR");
    apic.write_msr(0x1b, 0xfee0_0100, 0).unwrap();
    assert!(apic.write_msr(0x1b, base | 1 << 10, 0).is_err(), "disabled to x2APIC in one step");
    apic.write_msr(0x1b, base, 0).unwrap();
    assert_eq!(locals[1].read_msr(0x1b, 0), Ok(0xfee0_0800));
}

/// Which registers exist in x2APIC mode, for what (Intel SDM volume 3, table 11-6), and that their upper half does not.
#[test]
fn x2apic_registers_are_checked() {
    let (_apics, mut locals) = machine(1);
    let apic = &mut locals[0];
    for register in 0..0x100 {
        assert!(apic.read_msr(0x800 + register, 0).is_err(), "{register:#x} in xAPIC mode");
        assert!(apic.write_msr(0x800 + register, 0, 0).is_err(), "{register:#x} in xAPIC mode");
    }
    to_x2apic(apic);
    for register in 0..0x100u32 {
        let (read, write) = match register {
            0x02 | 0x03 | 0x0a | 0x0d | 0x10..=0x27 | 0x39 => (true, false),
            0x08 | 0x0f | 0x28 | 0x30 | 0x32..=0x38 | 0x3e => (true, true),
            0x0b | 0x3f => (false, true),
            _ => (false, false),
        };
        assert_eq!(apic.read_msr(0x800 + register, 0).is_ok(), read, "reading {register:#x}");
        assert_eq!(apic.write_msr(0x800 + register, 0, 0).is_ok(), write, "writing {register:#x}");
        if register != 0x30 {
            assert!(apic.write_msr(0x800 + register, 1 << 32, 0).is_err(), "upper half of {register:#x}");
        }
    }
    for reserved in [0x100, 0xff00, 0xff00_0000] {
        assert!(apic.write_msr(0x83f, reserved, 0).is_err(), "self IPI {reserved:#x}");
    }
}

/// The register page moves with the base address; address bits that the processor does not have are refused.
#[test]
fn the_register_page_can_be_moved() {
    let (_apics, mut locals) = machine(1);
    let apic = &mut locals[0];
    let base = apic.read_msr(0x1b, 0).unwrap();
    apic.write_msr(0x1b, 0xfed4_0900, 0).unwrap();
    assert_eq!((apic.mmio_page(), apic.read_msr(0x1b, 0)), (Some(0xfed4_0000), Ok(0xfed4_0900)));
    assert!(apic.write_msr(0x1b, base | 1 << 46, 0).is_err());
    assert!(apic.write_msr(0x1b, base | 1, 0).is_err());
    let saved = apic.save(0);
    apic.write_msr(0x1b, base, 0).unwrap();
    assert_eq!(apic.mmio_page(), Some(0xfee0_0000));
    apic.load(&saved, None, 0).unwrap();
    assert_eq!(apic.mmio_page(), Some(0xfed4_0000));
}

/// A timer that is switched between one-shot and periodic mode counts on from where it is.
#[test]
fn a_change_of_the_timers_mode_does_not_restart_it() {
    let (_apics, mut locals) = machine(1);
    let apic = &mut locals[0];
    const COUNT: u32 = 1_000_000;
    let mode = |apic: &mut LocalApic, mode: u32| write(apic, 0x320, mode << 17 | 0x50);
    write(apic, 0x3e0, 0b1011);
    mode(apic, 0);
    apic.mmio_write(0x380, &COUNT.to_le_bytes(), 0);
    mode(apic, 1);
    assert_eq!((read_at(apic, 0x380, 600_000), read_at(apic, 0x390, 600_000)), (COUNT, 400_000));
    apic.timer(1_000_000);
    assert_eq!(read_at(apic, 0x390, 1_100_000), 900_000, "it starts over");
    mode(apic, 0);
    assert_eq!(read_at(apic, 0x390, 1_600_000), 400_000);
    apic.timer(2_000_000);
    assert_eq!(read_at(apic, 0x390, 2_500_000), 0);
    mode(apic, 1);
    assert_eq!((read_at(apic, 0x390, 2_600_000), apic.deadline()), (0, None), "it stays at zero");
}

#[test]
fn msi_addresses_are_decoded() {
    let msi = |address, data| Message::from_msi(Msi { address, data, requester: 0 });
    let m = msi(0xfee0_3004, 0x4143).unwrap();
    assert_eq!((m.destination.id, m.destination.logical, m.vector), (3, true, 0x43));
    assert_eq!(m.delivery, Delivery::LowestPriority);
    assert_eq!(msi(0xfeb0_0000, 0), None);
    assert_eq!(msi(0x1234, 0), None);
}

// -- IO-APIC ----------------------------------------------------------------------------------------------------------

fn route(apics: &Apics, pin: u8, entry: u64) {
    for (index, value) in [(0x11 + 2 * pin, (entry >> 32) as u32), (0x10 + 2 * pin, entry as u32)] {
        apics.ioapic.write(0, &[index]);
        apics.ioapic.write(0x10, &value.to_le_bytes());
    }
}

fn entry(apics: &Apics, pin: u8) -> u32 {
    apics.ioapic.write(0, &[0x10 + 2 * pin]);
    let mut data = [0; 4];
    apics.ioapic.read(0x10, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn ioapic_edges_and_levels() {
    let (apics, mut locals) = machine(1);
    let apic = &mut locals[0];
    route(&apics, 4, 0x34);
    apics.ioapic.set_source(4, true);
    assert_eq!(apic.acknowledge(), Some(0x34));
    write(apic, 0xb0, 0);
    assert!(!apic.pending(), "an edge is one interrupt");
    apics.ioapic.set_source(4, false);

    route(&apics, 9, 0x8039); // level
    apics.ioapic.set_source(9, true);
    apics.ioapic.set_source(9, true); // a second source shares the line
    assert_eq!(apic.acknowledge(), Some(0x39));
    assert_ne!(entry(&apics, 9) & 1 << 14, 0, "remote IRR");
    assert!(!apic.pending());
    apics.ioapic.set_source(9, false);
    write(apic, 0xb0, 0);
    assert_eq!(apic.acknowledge(), Some(0x39), "still asserted at EOI");
    apics.ioapic.set_source(9, false);
    write(apic, 0xb0, 0);
    assert!(!apic.pending());
    assert_eq!(entry(&apics, 9) & 1 << 14, 0);
}

#[test]
fn ioapic_masks_levels_but_does_not_forget_them() {
    let (apics, mut locals) = machine(2);
    route(&apics, 10, 0x1_803a);
    apics.ioapic.set_source(10, true);
    assert!(!locals[0].pending());
    route(&apics, 10, 1 << 56 | 0x803a);
    assert_eq!(locals[1].acknowledge(), Some(0x3a));
    assert!(!locals[0].pending());
    // Nonsense indices answer nothing and do no harm.
    apics.ioapic.write(0, &[0xff]);
    apics.ioapic.write(0x10, &[0xff; 4]);
    assert_eq!(entry(&apics, 23), 0x1_0000);
}

// -- PIC --------------------------------------------------------------------------------------------------------------

fn init_pic(apics: &Apics) {
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0xa0, 0x11),
        (0xa1, 0x28),
        (0xa1, 2),
        (0xa1, 1),
        (0x21, 0),
        (0xa1, 0),
    ] {
        apics.pic.write(port, value);
    }
}

#[test]
fn pic_reaches_the_bootstrap_processor_through_lint0() {
    let (apics, mut locals) = machine(2);
    init_pic(&apics);
    write(&mut locals[0], 0x350, 0x700);
    apics.pic.set(4, true);
    assert!(locals[0].pending());
    assert!(!locals[1].pending());
    assert_eq!(locals[0].acknowledge(), Some(0x24));
    assert!(!locals[0].pending());
    apics.pic.write(0x20, 0x20);
    apics.pic.set(4, false);
    write(&mut locals[0], 0x350, 0x1_0700);
    apics.pic.set(4, true);
    assert!(!locals[0].pending(), "LINT0 is masked");
}

#[test]
fn pic_priorities_cascade_and_spurious() {
    let (apics, mut locals) = machine(1);
    write(&mut locals[0], 0x350, 0x700);
    init_pic(&apics);
    apics.pic.set(12, true);
    assert_eq!(apics.pic.acknowledge(), Some(0x2c));
    apics.pic.set(3, true);
    assert!(!apics.pic.output(), "the cascade is above input 3");
    apics.pic.set(8, true);
    assert_eq!(apics.pic.acknowledge(), Some(0x28), "within the second controller 8 is above 12");
    apics.pic.write(0xa0, 0x20);
    apics.pic.write(0xa0, 0x20);
    apics.pic.write(0x20, 0x20);
    assert_eq!(apics.pic.acknowledge(), Some(0x23));
    apics.pic.write(0x20, 0x63); // specific EOI
    assert_eq!(apics.pic.acknowledge(), Some(0x27), "spurious");
    apics.pic.write(0x4d0, 0x20);
    apics.pic.set(5, true);
    assert_eq!(apics.pic.acknowledge(), Some(0x25));
    apics.pic.write(0x20, 0x20);
    assert!(apics.pic.output(), "a level stays");
    apics.pic.set(5, false);
    assert!(!apics.pic.output());
}
