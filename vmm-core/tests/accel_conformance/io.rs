//! Port I/O, MMIO and doorbells.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use iced_x86::code_asm::*;
use vmm_core::accel::IoAddress;

use crate::harness::*;

pub fn port_accesses_of_each_size(target: &Target) {
    let mut machine = Machine::flat32(target, |a| {
        a.mov(dx, 0x3f8).unwrap();
        a.mov(eax, 0x4433_2211).unwrap();
        a.out(dx, al).unwrap();
        a.out(dx, ax).unwrap();
        a.out(dx, eax).unwrap();
        a.out(0x70, al).unwrap();
        a.mov(eax, u32::MAX).unwrap();
        a.in_(al, dx).unwrap();
        a.mov(dword_ptr(0x3000), eax).unwrap();
        a.mov(eax, u32::MAX).unwrap();
        a.in_(ax, dx).unwrap();
        a.mov(dword_ptr(0x3004), eax).unwrap();
        a.in_(eax, dx).unwrap();
        a.mov(dword_ptr(0x3008), eax).unwrap();
        done(a);
    });
    machine.run_to_end();
    let port = 0x3f8;
    assert_eq!(
        machine.bus.accesses(),
        [
            Access::PortWrite(port, vec![0x11]),
            Access::PortWrite(port, vec![0x11, 0x22]),
            Access::PortWrite(port, vec![0x11, 0x22, 0x33, 0x44]),
            Access::PortWrite(0x70, vec![0x11]),
            Access::PortRead(port, 1),
            Access::PortRead(port, 2),
            Access::PortRead(port, 4),
        ]
    );
    let results: [u32; 3] = machine.memory.read_obj(0x3000).unwrap();
    assert_eq!(results, [0xffff_ff11, 0xffff_2312, 0x4635_2413]);
}

pub fn mmio_accesses_of_each_size(target: &Target) {
    const DEVICE: u64 = 0xd000_0000;
    let mut machine = Machine::long64(target, |a| {
        a.mov(rbx, DEVICE).unwrap();
        a.mov(rax, 0x8877_6655_4433_2211u64).unwrap();
        a.mov(byte_ptr(rbx), al).unwrap();
        a.mov(word_ptr(rbx + 2), ax).unwrap();
        a.mov(dword_ptr(rbx + 4), eax).unwrap();
        a.mov(qword_ptr(rbx + 8), rax).unwrap();
        a.movzx(ecx, byte_ptr(rbx + 1)).unwrap();
        a.mov(qword_ptr(0x3000), rcx).unwrap();
        a.mov(cx, word_ptr(rbx + 2)).unwrap();
        a.mov(qword_ptr(0x3008), rcx).unwrap();
        a.mov(ecx, dword_ptr(rbx + 4)).unwrap();
        a.mov(qword_ptr(0x3010), rcx).unwrap();
        a.mov(rcx, qword_ptr(rbx + 8)).unwrap();
        a.mov(qword_ptr(0x3018), rcx).unwrap();
        done(a);
    });
    machine.run_to_end();
    let bytes = 0x8877_6655_4433_2211u64.to_le_bytes();
    assert_eq!(
        machine.bus.accesses(),
        [
            Access::MmioWrite(DEVICE, bytes[..1].to_vec()),
            Access::MmioWrite(DEVICE + 2, bytes[..2].to_vec()),
            Access::MmioWrite(DEVICE + 4, bytes[..4].to_vec()),
            Access::MmioWrite(DEVICE + 8, bytes.to_vec()),
            Access::MmioRead(DEVICE + 1, 1),
            Access::MmioRead(DEVICE + 2, 2),
            Access::MmioRead(DEVICE + 4, 4),
            Access::MmioRead(DEVICE + 8, 8),
        ]
    );
    let results: [u64; 4] = machine.memory.read_obj(0x3000).unwrap();
    assert_eq!(results, [0x11, 0x2312, 0x4635_2413, 0x8b7a_6958_4736_2514]);
}

pub fn string_port_io(target: &Target) {
    // Long enough for several exits, and across a page.
    const COUNT: u32 = 3000;
    let mut machine = Machine::flat32(target, |a| {
        a.cld().unwrap();
        a.mov(dx, 0x300).unwrap();
        a.mov(esi, 0x2_0800).unwrap();
        a.mov(ecx, COUNT).unwrap();
        a.rep().outsw().unwrap();
        a.mov(edi, 0x3_0000).unwrap();
        a.mov(ecx, 5).unwrap();
        a.rep().insb().unwrap();
        a.mov(dword_ptr(0x3000), esi).unwrap();
        a.mov(dword_ptr(0x3004), edi).unwrap();
        a.mov(dword_ptr(0x3008), ecx).unwrap();
        done(a);
    });
    let data: Vec<u8> = (0..2 * COUNT).map(|n| (n * 7) as u8).collect();
    machine.memory.write(0x2_0800, &data).unwrap();
    machine.run_to_end();
    let accesses = machine.bus.accesses();
    let written: Vec<_> = accesses[..COUNT as usize]
        .iter()
        .map(|access| match access {
            Access::PortWrite(0x300, data) if data.len() == 2 => data.clone(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(written.concat(), data);
    assert_eq!(accesses[COUNT as usize..], vec![Access::PortRead(0x300, 1); 5]);
    let mut read = [0; 6];
    machine.memory.read(0x3_0000, &mut read).unwrap();
    assert_eq!(read, [0x11, 0x12, 0x13, 0x14, 0x15, 0]);
    let pointers: [u32; 3] = machine.memory.read_obj(0x3000).unwrap();
    assert_eq!(pointers, [0x2_0800 + 2 * COUNT, 0x3_0005, 0]);
}

fn event() -> OwnedFd {
    // SAFETY: a fresh descriptor that nobody else owns, checked.
    unsafe {
        let fd = libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    }
}

/// How often the event was signalled since the last call.
fn count(event: &OwnedFd) -> u64 {
    let mut value = [0; 8];
    match File::from(event.try_clone().unwrap()).read(&mut value) {
        Ok(_) => u64::from_ne_bytes(value),
        Err(e) if e.kind() == ErrorKind::WouldBlock => 0,
        Err(e) => panic!("{e}"),
    }
}

const DOORBELL: u64 = 0xd000_1000;

fn ring(a: &mut CodeAssembler, value: u32) {
    a.mov(eax, value).unwrap();
    a.mov(word_ptr(DOORBELL), ax).unwrap();
}

pub fn doorbells_replace_the_bus(target: &Target) {
    let mut machine = Machine::flat32(target, |a| {
        ring(a, 1);
        ring(a, 2);
        ring(a, 1);
        ring(a, 3);
        out_word(a, 0x600, 7);
        done(a);
    });
    let (one, two, port) = (event(), event(), event());
    let at = IoAddress::Mmio(DOORBELL);
    let mut taken = machine.vm.add_doorbell(at, 2, Some(1), one.as_fd()).unwrap();
    taken &= machine.vm.add_doorbell(at, 2, Some(2), two.as_fd()).unwrap();
    taken &= machine.vm.add_doorbell(IoAddress::Port(0x600), 2, None, port.as_fd()).unwrap();
    machine.run_to_end();
    let counts = [count(&one), count(&two), count(&port)];
    let seen = machine.bus.accesses();
    let write = |value| Access::MmioWrite(DOORBELL, vec![value, 0]);
    if taken {
        assert_eq!(counts, [2, 1, 1]);
        assert_eq!(seen, [write(3)], "a value without a doorbell reaches the bus");
    } else {
        assert_eq!(counts, [0; 3], "an accelerator without doorbells leaves the writes to the bus");
        assert_eq!(seen[..4], [write(1), write(2), write(1), write(3)]);
        assert_eq!(seen[4], Access::PortWrite(0x600, vec![7, 0]));
    }
}

pub fn doorbells_can_be_removed(target: &Target) {
    let mut machine = Machine::flat32(target, |a| {
        ring(a, 1);
        done(a);
    });
    let event = event();
    let at = IoAddress::Mmio(DOORBELL);
    let taken = machine.vm.add_doorbell(at, 2, None, event.as_fd()).unwrap();
    machine.vm.remove_doorbell(at, 2, None, event.as_fd()).unwrap();
    if taken {
        assert!(machine.vm.remove_doorbell(at, 2, None, event.as_fd()).is_err());
    }
    machine.run_to_end();
    assert_eq!(count(&event), 0);
    assert_eq!(machine.bus.accesses(), [Access::MmioWrite(DOORBELL, vec![1, 0])]);
}

pub fn queued_writes_keep_their_order(target: &Target) {
    const REGISTERS: u64 = 0xd000_2000;
    const FLAG: u64 = 0x3000;
    let mut machine = Machine::flat32(target, |a| {
        for index in [1, 2, 3] {
            a.mov(al, index).unwrap();
            a.out(0x70, al).unwrap();
        }
        a.mov(dword_ptr(REGISTERS + 4), 0x1234_5678).unwrap();
        a.in_(al, 0x71).unwrap();
        a.mov(al, 4).unwrap();
        a.out(0x70, al).unwrap();
        a.mov(dword_ptr(FLAG), 1).unwrap();
        let mut forever = a.create_label();
        a.set_label(&mut forever).unwrap();
        a.jmp(forever).unwrap();
    });
    let mut queued = machine.vm.coalesce_writes(IoAddress::Port(0x70), 1).unwrap();
    queued &= machine.vm.coalesce_writes(IoAddress::Mmio(REGISTERS), 8).unwrap();
    let handle = machine.cpu.handle();
    let (memory, bus) = (machine.memory.clone(), machine.bus.clone());
    let seen = std::thread::scope(|scope| {
        let watcher = scope.spawn(move || {
            while memory.read_obj::<u32>(FLAG).unwrap() == 0 {
                std::thread::yield_now();
            }
            let seen = bus.accesses().len();
            handle.kick();
            seen
        });
        machine.run();
        watcher.join().unwrap()
    });
    // The read brought what was queued before it; the kick brings the rest.
    assert_eq!(seen, if queued { 5 } else { 6 });
    let index = |value| Access::PortWrite(0x70, vec![value]);
    let register = Access::MmioWrite(REGISTERS + 4, vec![0x78, 0x56, 0x34, 0x12]);
    let expected = [index(1), index(2), index(3), register, Access::PortRead(0x71, 1), index(4)];
    assert_eq!(machine.bus.accesses(), expected);
}

pub fn more_writes_than_a_queue_holds(target: &Target) {
    const COUNT: u32 = 1000;
    let mut machine = Machine::flat32(target, |a| {
        let mut again = a.create_label();
        a.mov(ecx, COUNT).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(eax, ecx).unwrap();
        a.out(0x70, al).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        done(a);
    });
    machine.vm.coalesce_writes(IoAddress::Port(0x70), 1).unwrap();
    machine.run_to_end();
    let expected: Vec<_> = (1..=COUNT).rev().map(|n| Access::PortWrite(0x70, vec![n as u8])).collect();
    assert_eq!(machine.bus.accesses(), expected);
}

/// An access at the end of the address space and one at the end of RAM.
pub fn accesses_nobody_answers(target: &Target) {
    let mut machine = Machine::flat32(target, |a| {
        a.mov(eax, dword_ptr(RAM)).unwrap();
        a.mov(dword_ptr(0xffff_fffcu64), eax).unwrap();
        a.mov(dx, 0xfffe).unwrap();
        a.in_(ax, dx).unwrap();
        done(a);
    });
    machine.run_to_end();
    assert_eq!(
        machine.bus.accesses(),
        [
            Access::MmioRead(RAM, 4),
            Access::MmioWrite(0xffff_fffc, vec![0x11, 0x22, 0x33, 0x44]),
            Access::PortRead(0xfffe, 2),
        ]
    );
}
