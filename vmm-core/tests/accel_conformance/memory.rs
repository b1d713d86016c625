//! Guest RAM: regions, dirty pages, translation.

use std::collections::BTreeSet;

use iced_x86::code_asm::*;
use softcpu::CpuState;
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
    let pages = machine.memory.total_size() / 4096;
    assert_eq!(words.len() as u64, pages / 64);
    (0..pages).filter(|page| words[*page as usize / 64] >> (page % 64) & 1 == 1).collect()
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

/// 32-bit code at `at` that writes to each `stride`th byte of `range`. It leaves the guest now and then: a KVM that is
/// software looks at its dirty ring only then.
fn write_pages(machine: &Machine, at: u64, range: std::ops::Range<u64>, stride: u32) {
    let code = assemble(32, at, |a| {
        let mut again = a.create_label();
        let mut stay = a.create_label();
        a.mov(edi, range.start as u32).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(dword_ptr(edi), edi).unwrap();
        a.test(edi, 0x3_f000).unwrap();
        a.jnz(stay).unwrap();
        a.out(0x80, al).unwrap();
        a.set_label(&mut stay).unwrap();
        a.add(edi, stride as i32).unwrap();
        a.cmp(edi, range.end as i32).unwrap();
        a.jb(again).unwrap();
        done(a);
    });
    machine.memory.write(at, &code).unwrap();
}

fn pages(range: std::ops::Range<u64>, stride: u32) -> impl Iterator<Item = u64> {
    range.step_by(stride as usize).map(|address| address / 4096)
}

/// Exactly these pages above 1 MiB are dirty. (Below is the code, which the test itself writes.)
#[track_caller]
fn expect_dirty(machine: &Machine, expected: impl Iterator<Item = u64>) {
    let found: BTreeSet<u64> = dirty(machine).into_iter().filter(|page| *page >= 0x100).collect();
    let expected: BTreeSet<u64> = expected.collect();
    let missing: Vec<_> = expected.difference(&found).take(8).collect();
    let more: Vec<_> = found.difference(&expected).take(8).collect();
    assert!(
        missing.is_empty() && more.is_empty(),
        "{} of {} found, missing {missing:x?}..., too many {more:x?}...",
        found.len(),
        expected.len()
    );
}

/// A machine with more pages than an accelerator has room for in any one list.
fn large(target: &Target, vcpus: u32) -> Machine {
    let machine = Machine::with_memory(target, vcpus, GuestMemory::flat(64 << 20).unwrap());
    machine.vm.set_dirty_tracking(true).unwrap();
    machine
}

pub fn more_dirty_pages_than_a_ring_holds(target: &Target) {
    let mut machine = large(target, 1);
    let range = 1 << 20..64 << 20;
    // What was reported is tracked anew, whether it was written in the round before or not.
    for stride in [0x2000, 0x1000, 0x3000, 0x3000] {
        write_pages(&machine, CODE, range.clone(), stride);
        machine.cpu.set_state(&flat32()).unwrap();
        machine.bus.again();
        machine.run_to_end();
        expect_dirty(&machine, pages(range.clone(), stride));
    }
    assert!(dirty(&machine).is_empty());
    // Nothing of before is left over to the next time.
    machine.bus.again();
    machine.cpu.set_state(&flat32()).unwrap();
    machine.run_to_end();
    machine.vm.set_dirty_tracking(false).unwrap();
    machine.vm.set_dirty_tracking(true).unwrap();
    assert!(dirty(&machine).is_empty());
}

pub fn dirty_pages_of_several_cpus(target: &Target) {
    const OTHER: u64 = CODE + 0x1000;
    let mut machine = large(target, 2);
    let (low, high) = (1 << 20..32 << 20, 32 << 20..64 << 20);
    write_pages(&machine, CODE, low.clone(), 0x1000);
    write_pages(&machine, OTHER, high.clone(), 0x2000);
    let mut other = machine.another_cpu(1);
    machine.cpu.set_state(&flat32()).unwrap();
    other.set_state(&CpuState { rip: OTHER, ..flat32() }).unwrap();
    for cpu in [&mut machine.cpu, &mut other] {
        machine.bus.again();
        run_to_end(&machine.bus, &mut **cpu);
    }
    expect_dirty(&machine, pages(low, 0x1000).chain(pages(high, 0x2000)));
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
