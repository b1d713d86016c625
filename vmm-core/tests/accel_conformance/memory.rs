//! Guest RAM: regions, dirty pages, translation.

use iced_x86::code_asm::*;
use vmm_core::memory::{GuestMemory, MemoryRegion, RegionOptions};

use crate::harness::*;

pub fn regions_and_the_hole_between_them(target: &Target) {
    const HIGH: u64 = 0x1_0000_0000;
    let options = RegionOptions::default();
    let memory = GuestMemory::new(vec![
        MemoryRegion::allocate(0, 1 << 20, &options).unwrap(),
        MemoryRegion::allocate(2 << 20, 1 << 20, &options).unwrap(),
        MemoryRegion::allocate(HIGH, 2 << 20, &options).unwrap(),
    ])
    .unwrap();
    let code = assemble(64, CODE, |a| {
        a.mov(eax, 0x1234_5678).unwrap();
        a.mov(dword_ptr(0x2f_fffcu64), eax).unwrap();
        a.mov(dword_ptr(0x18_0000u64), eax).unwrap();
        a.mov(rbx, HIGH + 0x1000).unwrap();
        a.mov(dword_ptr(rbx), eax).unwrap();
        a.mov(ecx, dword_ptr(rbx - 0x800)).unwrap();
        a.mov(dword_ptr(0x3000), ecx).unwrap();
        done(a);
    });
    memory.write(CODE, &code).unwrap();
    memory.store_u32(HIGH + 0x800, 77, std::sync::atomic::Ordering::Relaxed).unwrap();
    write_page_tables(&memory);
    // A fifth entry maps the region above 4 GiB.
    memory.write_obj(PAGE_TABLES + 0x1000 + 8 * 4, &((PAGE_TABLES + 0x6000) | 3)).unwrap();
    memory.write_obj(PAGE_TABLES + 0x6000, &(HIGH | 0x83)).unwrap();
    let mut machine = Machine::with_memory(target, 1, memory);
    machine.cpu.set_state(&long64()).unwrap();
    machine.run_to_end();
    assert_eq!(machine.memory.read_obj::<u32>(0x2f_fffc).unwrap(), 0x1234_5678);
    assert_eq!(machine.memory.read_obj::<u32>(HIGH + 0x1000).unwrap(), 0x1234_5678);
    assert_eq!(machine.memory.read_obj::<u32>(0x3000).unwrap(), 77);
    assert_eq!(machine.bus.accesses(), [Access::MmioWrite(0x18_0000, vec![0x78, 0x56, 0x34, 0x12])]);
}

fn dirty(machine: &Machine) -> Vec<u64> {
    let words = machine.vm.take_dirty_pages(0).unwrap();
    assert_eq!(words.len() as u64, RAM / 4096 / 64);
    (0..RAM / 4096).filter(|page| words[*page as usize / 64] >> (page % 64) & 1 == 1).collect()
}

pub fn dirty_pages_are_reported_once(target: &Target) {
    let mut machine = Machine::flat32(target, |a| {
        for page in [0x40u64, 0x7f, 0x80, 0x3ff] {
            a.mov(dword_ptr(page * 4096), 1u32).unwrap();
        }
        a.mov(eax, dword_ptr(0x55_000)).unwrap();
        report_value(a, 1);
        a.mov(dword_ptr(0x80_004), 1u32).unwrap();
        report_value(a, 2);
        done(a);
    });
    // Pages that were touched before tracking starts are tracked too.
    machine.memory.write(0x7f_000, &[1; 4096]).unwrap();
    machine.vm.set_dirty_tracking(true).unwrap();
    assert!(dirty(&machine).is_empty());
    let handle = machine.cpu.handle();
    // Stop after the first report.
    let bus = machine.bus.clone();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            bus.wait_for_reports(1);
            handle.kick();
        });
        machine.run();
    });
    let mut pages = dirty(&machine);
    if machine.bus.reports().len() == 1 {
        assert_eq!(pages, [0x40, 0x7f, 0x80, 0x3ff]);
        machine.run_to_end();
        assert_eq!(dirty(&machine), [0x80]);
    } else {
        // The kick came late: everything is in the first harvest.
        pages.dedup();
        assert_eq!(pages, [0x40, 0x7f, 0x80, 0x3ff]);
    }
    assert!(dirty(&machine).is_empty());
    machine.vm.set_dirty_tracking(false).unwrap();
}

pub fn dirty_tracking_must_be_on(target: &Target) {
    let machine = Machine::flat32(target, done);
    assert!(machine.vm.take_dirty_pages(0).is_err());
    machine.vm.set_dirty_tracking(true).unwrap();
    assert!(machine.vm.take_dirty_pages(0).is_ok());
    assert!(machine.vm.take_dirty_pages(1).is_err(), "there is one region");
    machine.vm.set_dirty_tracking(false).unwrap();
    assert!(machine.vm.take_dirty_pages(0).is_err());
}

pub fn linear_addresses_translate(target: &Target) {
    let mut machine = Machine::long64(target, done);
    // The second 2 MiB of linear space is the first of physical space; nothing is at 1 TiB.
    machine.memory.write_obj(PAGE_TABLES + 0x2008, &0x83u64).unwrap();
    assert_eq!(machine.cpu.translate(0x12_3456).unwrap(), Some(0x12_3456));
    assert_eq!(machine.cpu.translate(0x32_3456).unwrap(), Some(0x12_3456));
    assert_eq!(machine.cpu.translate(1 << 40).unwrap(), None);
}
