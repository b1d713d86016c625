//! Writes that matter to someone else: self-modifying code, dirty tracking.

use std::sync::atomic::{AtomicBool, Ordering};

use iced_x86::code_asm::*;

use super::rig::*;
use softcpu::Budget;

/// A loop patches the immediate of an instruction that follows in the same block.
#[test]
fn code_may_change_what_follows_at_once() {
    let mut rig = Rig::new();
    let end = rig.execute(&Rig::long_mode(), |a| {
        let mut patched = a.create_label();
        let mut again = a.create_label();
        a.mov(ecx, 100).unwrap();
        a.set_label(&mut again).unwrap();
        a.lea(rbx, ptr(patched)).unwrap();
        a.mov(dword_ptr(rbx + 1), ecx).unwrap();
        a.set_label(&mut patched).unwrap();
        a.mov(eax, 0x7fff_ffff).unwrap();
        a.add(rsi, rax).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(end.gpr[6], 5050);
}

/// The instruction that writes is itself overwritten, by a repeated string instruction.
#[test]
fn code_may_overwrite_the_running_instruction() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    (s.gpr[0], s.gpr[1], s.gpr[7]) = (0xf4, 16, CODE);
    rig.code(|a| {
        a.rep().stosb().unwrap();
        a.ud2().unwrap();
    });
    rig.cpu.set_state(&s);
    let end = rig.run();
    assert_eq!((end.rip, end.gpr[1]), (CODE + 3, 0), "{:?}", rig.frame());
}

#[test]
fn an_instruction_across_pages_notices_changes_in_both() {
    let mut rig = Rig::new();
    // mov eax, imm32 with its immediate in the next page; then hlt.
    let at = CODE + 0xffe;
    for value in [1u32, 2, 3] {
        let mut bytes = vec![0xb8];
        bytes.extend(value.to_le_bytes());
        bytes.push(0xf4);
        rig.memory.write(at, &bytes[..2]).unwrap();
        rig.memory.write(at + 2, &bytes[2..]).unwrap();
        let mut s = Rig::long_mode();
        s.rip = at;
        rig.cpu.set_state(&s);
        assert_eq!(rig.run().gpr[0], u64::from(value));
    }
    rig.memory.write(at + 2, &[0, 0, 1]).unwrap();
    let mut s = Rig::long_mode();
    s.rip = at;
    rig.cpu.set_state(&s);
    assert_eq!(rig.run().gpr[0], 0x0100_0003);
}

#[test]
fn a_device_may_write_code() {
    let mut rig = Rig::new();
    for value in 1..5u32 {
        let end = rig.execute(&Rig::long_mode(), |a| {
            a.mov(eax, value).unwrap();
            a.hlt().unwrap();
        });
        assert_eq!(end.gpr[0], u64::from(value));
    }
}

#[test]
fn written_pages_are_found_dirty_once() {
    let mut rig = Rig::new();
    rig.memory.set_dirty_tracking(true);
    let mut s = Rig::long_mode();
    s.gpr[3] = WINDOW_RAM;
    let write = |a: &mut CodeAssembler| {
        a.mov(qword_ptr(rbx + 0x10), rax).unwrap();
        a.mov(qword_ptr(rbx + 0x2ffc), rax).unwrap();
        a.mov(rcx, qword_ptr(rbx + 0x5000)).unwrap();
        a.mov(qword_ptr(rbx + 0x10), rax).unwrap();
        a.hlt().unwrap();
    };
    rig.execute(&s, write);
    assert_eq!(rig.memory.take_dirty(WINDOW_RAM, 0x8000).unwrap(), [0b1101]);
    assert_eq!(rig.memory.take_dirty(WINDOW_RAM, 0x8000).unwrap(), [0]);
    // The same translations again: the processor must not have kept a way around.
    rig.cpu.set_state(&s);
    rig.run();
    assert_eq!(rig.memory.take_dirty(WINDOW_RAM, 0x8000).unwrap(), [0b1101]);
    rig.memory.notify_written(WINDOW_RAM + 0x7fff, 2);
    assert_eq!(rig.memory.take_dirty(WINDOW_RAM, 0x9000).unwrap(), [0b1_1000_0000]);
    assert!(rig.memory.take_dirty(0x3f_f000, 0x2000).is_err());
}

/// Page tables are memory too: accessed and dirty bits that the processor sets make their page dirty. So do descriptors
/// that it marks, stacks that it pushes to, and clocks that it keeps.
#[test]
fn what_the_processor_itself_writes_is_dirty() {
    let mut rig = Rig::new();
    rig.window(0, P | RW);
    rig.put(GDT + 0x10, rig.get(GDT + 0x10) & !(1 << 40));
    let mut s = Rig::long_mode();
    (s.gpr[3], s.gpr[4]) = (WINDOW, STACK);
    s.rflags |= 0x200;
    rig.code(|a| {
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.mov(eax, u32::from(KERNEL_DATA)).unwrap();
        a.mov(ds, eax).unwrap();
        a.mov(ecx, 0x4b56_4d01).unwrap();
        a.mov(eax, WINDOW_RAM as u32 + 0x5001).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.ud2().unwrap();
    });
    rig.cpu.set_state(&s);
    rig.memory.set_dirty_tracking(true);
    rig.run();
    let dirty = rig.memory.take_dirty(0, 4 << 20).unwrap();
    let is_dirty = |address: u64| dirty[(address >> 12) as usize / 64] >> (address >> 12 & 63) & 1 != 0;
    for (what, address) in
        [("page table", WINDOW_PT), ("GDT", GDT), ("stack", STACK - 1), ("clock", WINDOW_RAM + 0x5000)]
    {
        assert!(is_dirty(address), "{what}");
    }
    // The window was only read.
    assert!(!is_dirty(WINDOW_RAM) && !is_dirty(IDT) && !is_dirty(CODE));
}

/// No write is lost while another thread takes the dirty pages of a running processor: the final contents of
/// a copy kept up to date from them equal the memory.
#[test]
fn copying_dirty_pages_of_a_running_processor_converges() {
    let mut rig = Rig::new();
    rig.code(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(rax).unwrap();
        a.mov(rcx, rax).unwrap();
        a.and(ecx, 0x7ff8).unwrap();
        a.mov(qword_ptr(rbx + rcx), rax).unwrap();
        a.jmp(again).unwrap();
    });
    let mut s = Rig::long_mode();
    s.gpr[3] = WINDOW_RAM;
    rig.cpu.set_state(&s);
    let memory = rig.memory.clone();
    memory.set_dirty_tracking(true);
    let mut copy = vec![0u8; 0x8000];
    let running = AtomicBool::new(true);
    let pass = |copy: &mut Vec<u8>| {
        let dirty = memory.take_dirty(WINDOW_RAM, 0x8000).unwrap()[0];
        for page in (0..8).filter(|p| dirty >> p & 1 != 0) {
            let range = page * 0x1000..(page + 1) * 0x1000;
            memory.read(WINDOW_RAM + range.start as u64, &mut copy[range]).unwrap();
        }
    };
    std::thread::scope(|scope| {
        let cpu = &mut rig.cpu;
        let running = &running;
        scope.spawn(move || {
            for _ in 0..200 {
                cpu.run(Budget::instructions(20_000));
            }
            running.store(false, Ordering::SeqCst);
        });
        while running.load(Ordering::SeqCst) {
            pass(&mut copy);
        }
    });
    pass(&mut copy);
    let mut now = vec![0u8; 0x8000];
    memory.read(WINDOW_RAM, &mut now).unwrap();
    assert!(copy == now);
}
