//! Several processors on one memory.

use std::sync::Arc;

use iced_x86::code_asm::*;

use super::rig::*;
use softcpu::{Budget, Clock, Cpu, CpuConfig, Exit};

/// Runs code on several processors, each on a thread, until all halt. RDI is the processor's number, RBX
/// [`WINDOW_RAM`].
pub fn run_all(rig: &mut Rig, programs: &[&dyn Fn(&mut CodeAssembler)]) -> Vec<softcpu::CpuState> {
    let clock = Arc::new(Clock::host(1_000_000));
    let mut others: Vec<Cpu> = (1..programs.len() as u32)
        .map(|index| {
            let config = CpuConfig { index, apic_id: index, ..CpuConfig::new(clock.clone()) };
            Cpu::new(translating(config), rig.memory.clone(), rig.ports.clone(), Box::new(Queue::default()))
        })
        .collect();
    let mut cpus: Vec<&mut Cpu> = std::iter::once(&mut rig.cpu).chain(&mut others).collect();
    for (number, (write, cpu)) in programs.iter().zip(&mut cpus).enumerate() {
        let at = CODE + 0x1_0000 * number as u64;
        rig.memory.write(at, &assemble(at, write)).unwrap();
        let mut s = Rig::long_mode();
        (s.rip, s.gpr[7], s.gpr[3]) = (at, number as u64, WINDOW_RAM);
        s.gpr[4] = STACK - 0x400 * number as u64;
        cpu.set_state(&s);
    }
    let budget = Budget { wait: false, ..Budget::UNLIMITED };
    std::thread::scope(|scope| {
        let running: Vec<_> = cpus.iter_mut().map(|cpu| scope.spawn(|| cpu.run(budget))).collect();
        for thread in running {
            assert_eq!(thread.join().unwrap(), Exit::Halted);
        }
    });
    cpus.iter().map(|cpu| cpu.state()).collect()
}

fn same(rig: &mut Rig, write: impl Fn(&mut CodeAssembler)) -> Vec<softcpu::CpuState> {
    run_all(rig, &[&write, &write])
}

#[test]
fn locked_instructions_lose_no_update() {
    let mut rig = Rig::new();
    same(&mut rig, |a| {
        let mut again = a.create_label();
        let mut retry = a.create_label();
        a.mov(ecx, 100_000).unwrap();
        a.set_label(&mut again).unwrap();
        a.lock().inc(dword_ptr(rbx)).unwrap();
        a.mov(edx, 1).unwrap();
        a.lock().xadd(qword_ptr(rbx + 8), rdx).unwrap();
        // Misaligned, within a page.
        a.lock().add(dword_ptr(rbx + 61), 1).unwrap();
        a.set_label(&mut retry).unwrap();
        a.mov(rax, qword_ptr(rbx + 128)).unwrap();
        a.lea(rdx, qword_ptr(rax + 1)).unwrap();
        a.lock().cmpxchg(qword_ptr(rbx + 128), rdx).unwrap();
        a.jne(retry).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(rig.get(WINDOW_RAM) as u32, 200_000);
    assert_eq!(rig.get(WINDOW_RAM + 8), 200_000);
    assert_eq!(rig.get(WINDOW_RAM + 61) as u32, 200_000);
    assert_eq!(rig.get(WINDOW_RAM + 128), 200_000);
}

#[test]
fn cmpxchg16b_changes_both_halves_at_once() {
    let mut rig = Rig::new();
    let end = same(&mut rig, |a| {
        let mut again = a.create_label();
        let mut retry = a.create_label();
        a.mov(rsi, rbx).unwrap();
        a.mov(ebp, 50_000).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(rax, qword_ptr(rsi)).unwrap();
        a.mov(rdx, qword_ptr(rsi + 8)).unwrap();
        a.set_label(&mut retry).unwrap();
        // What CMPXCHG16B loaded after a failure is never torn: the halves are equal.
        a.lea(rbx, qword_ptr(rax + 1)).unwrap();
        a.lea(rcx, qword_ptr(rdx + 1)).unwrap();
        a.lock().cmpxchg16b(xmmword_ptr(rsi)).unwrap();
        a.mov(r9d, 0).unwrap();
        a.setne(r9b).unwrap();
        a.mov(r8, rax).unwrap();
        a.xor(r8, rdx).unwrap();
        a.or(r10, r8).unwrap();
        a.test(r9d, r9d).unwrap();
        a.jnz(retry).unwrap();
        a.dec(ebp).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((rig.get(WINDOW_RAM), rig.get(WINDOW_RAM + 8)), (100_000, 100_000));
    assert_eq!((end[0].gpr[10], end[1].gpr[10]), (0, 0));
}

/// Message passing: data written before a flag is seen by whoever sees the flag.
#[test]
fn stores_become_visible_in_order() {
    let mut rig = Rig::new();
    let producer = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(eax, 1).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(qword_ptr(rbx), rax).unwrap();
        a.mov(qword_ptr(rbx + 64), rax).unwrap();
        a.inc(rax).unwrap();
        a.cmp(eax, 300_000).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    };
    let consumer = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        let mut fine = a.create_label();
        a.set_label(&mut again).unwrap();
        a.mov(rcx, qword_ptr(rbx + 64)).unwrap();
        a.mov(rdx, qword_ptr(rbx)).unwrap();
        a.cmp(rdx, rcx).unwrap();
        a.jae(fine).unwrap();
        a.inc(rsi).unwrap();
        a.set_label(&mut fine).unwrap();
        a.cmp(ecx, 299_999).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    };
    let end = run_all(&mut rig, &[&producer, &consumer]);
    assert_eq!(end[1].gpr[6], 0, "the flag was seen without its data");
}

/// One processor changes code that the other runs: patch, then flag; the other serialises before it calls.
#[test]
fn code_changed_by_another_processor_is_noticed() {
    let mut rig = Rig::new();
    const FUNCTION: u64 = 0x5_0000;
    // mov eax, imm32; ret
    rig.memory.write(FUNCTION, &[0xb8, 0, 0, 0, 0, 0xc3]).unwrap();
    let writer = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        let mut wait = a.create_label();
        a.mov(esi, 1).unwrap();
        a.mov(rbp, FUNCTION).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(dword_ptr(rbp + 1), esi).unwrap();
        a.mov(dword_ptr(rbx), esi).unwrap();
        a.set_label(&mut wait).unwrap();
        a.cmp(dword_ptr(rbx + 64), esi).unwrap();
        a.jne(wait).unwrap();
        a.inc(esi).unwrap();
        a.cmp(esi, 300).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    };
    let reader = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        let mut fine = a.create_label();
        a.mov(r8, rbx).unwrap();
        a.mov(esi, 1).unwrap();
        a.mov(rbp, FUNCTION).unwrap();
        a.set_label(&mut again).unwrap();
        a.cmp(dword_ptr(r8), esi).unwrap();
        a.jne(again).unwrap();
        a.xor(eax, eax).unwrap();
        a.cpuid().unwrap();
        a.call(rbp).unwrap();
        a.cmp(eax, esi).unwrap();
        a.je(fine).unwrap();
        a.inc(r9).unwrap();
        a.set_label(&mut fine).unwrap();
        a.mov(dword_ptr(r8 + 64), esi).unwrap();
        a.inc(esi).unwrap();
        a.cmp(esi, 300).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    };
    let end = run_all(&mut rig, &[&writer, &reader]);
    assert_eq!(end[1].gpr[9], 0, "old code was executed");
}

/// A sleeping processor wakes for an interrupt that another thread posts.
#[test]
fn a_halted_processor_wakes_for_an_interrupt() {
    let mut rig = Rig::new();
    let handler = assemble(HANDLERS + 0x300, |a| {
        a.inc(rax).unwrap();
        a.out(0x10, al).unwrap();
        a.iretq().unwrap();
    });
    rig.memory.write(HANDLERS + 0x300, &handler).unwrap();
    rig.code(|a| {
        let mut again = a.create_label();
        a.sti().unwrap();
        a.set_label(&mut again).unwrap();
        a.hlt().unwrap();
        a.jmp(again).unwrap();
    });
    rig.cpu.set_state(&Rig::long_mode());
    let (handle, queue, ports) = (rig.cpu.handle(), rig.queue.clone(), rig.ports.clone());
    std::thread::scope(|scope| {
        let cpu = &mut rig.cpu;
        let running = scope.spawn(move || cpu.run(Budget::UNLIMITED));
        for n in 1..=100 {
            queue.vectors.lock().unwrap().push_back(0x30);
            handle.interrupt();
            while ports.written.lock().unwrap().len() < n {
                std::thread::yield_now();
            }
        }
        handle.kick();
        assert_eq!(running.join().unwrap(), Exit::Kicked);
    });
    assert_eq!(rig.cpu.state().gpr[0], 100);
}
