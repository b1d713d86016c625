//! Translated code where it must not differ from the interpreter, and its own limits.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use iced_x86::code_asm::*;

use crate::system::debug::timed_run;
use crate::system::rig::*;
use softcpu::{Budget, Bus, Clock, Cpu, CpuConfig, CpuState, Exit};

fn rig(translate_after: Option<u32>) -> Rig {
    let clock = Arc::new(Clock::deterministic(1_000_000));
    Rig::exactly(CpuConfig { translate_after, seed: Some(1), ..CpuConfig::new(clock) })
}

/// Calls, stack, memory, flags across accesses, SSE, an instruction for the interpreter, and RDTSC, which shows the
/// number of executed instructions.
fn mixture(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    let mut again = a.create_label();
    let mut function = a.create_label();
    let mut skip = a.create_label();
    let mut end = a.create_label();
    a.mov(ecx, 300)?;
    a.mov(rbx, WINDOW_RAM)?;
    a.set_label(&mut again)?;
    a.push(rcx)?;
    a.call(function)?;
    a.pop(rcx)?;
    a.cmp(rax, r12)?;
    a.mov(qword_ptr(rbx + rcx * 8), rax)?;
    a.setb(dl)?;
    a.adc(r13, qword_ptr(rbx + 8))?;
    a.jae(skip)?;
    a.inc(r14)?;
    a.set_label(&mut skip)?;
    a.dec(rcx)?;
    a.jne(again)?;
    a.jmp(end)?;
    a.set_label(&mut function)?;
    a.imul_3(rax, rcx, 0x1234_5677)?;
    a.add(r12, rax)?;
    a.rol(r12, 7)?;
    a.movq(xmm1, rax)?;
    a.paddq(xmm2, xmm1)?;
    a.movups(xmmword_ptr(rbx + 1), xmm2)?;
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    a.xor(rax, r12)?;
    a.ret()?;
    a.set_label(&mut end)?;
    a.hlt()
}

/// Runs the mixture in slices of `slice` instructions: the count and the registers after each.
fn trace(translate_after: Option<u32>, slice: u64) -> (Vec<(u64, CpuState)>, u64) {
    let mut rig = rig(translate_after);
    rig.code(|a| mixture(a).unwrap());
    let mut state = Rig::long_mode();
    state.cr4 |= 0x600;
    rig.cpu.set_state(&state);
    let mut result = Vec::new();
    loop {
        let exit = rig.cpu.run(Budget::instructions(slice));
        result.push((rig.cpu.executed(), rig.cpu.state()));
        if exit == Exit::Halted {
            return (result, rig.cpu.translated());
        }
        assert_eq!(exit, Exit::Budget);
    }
}

#[test]
fn translation_changes_neither_counts_nor_state() {
    for slice in [7, 61, 1000, u64::MAX] {
        let (expected, none) = trace(None, slice);
        assert_eq!(none, 0);
        for threshold in [0, 3, 100] {
            let (found, translated) = trace(Some(threshold), slice);
            assert!(translated > 0 || slice == 7, "slice {slice}, threshold {threshold}");
            assert_eq!(found.len(), expected.len());
            for (n, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(found.0, expected.0, "instructions after slice {n} of {slice}");
                assert_eq!(found.1, expected.1, "state after slice {n} of {slice}, threshold {threshold}");
            }
        }
    }
}

/// A deterministic run with timer interrupts and random numbers comes to the same end, after as many instructions,
/// whatever part of it is translated: a recording does not depend on how it is replayed.
#[test]
fn deterministic_runs_do_not_depend_on_translation() {
    let interpreted = timed_run(7, u64::MAX, None);
    for threshold in [0, 1, 50, 1000] {
        assert_eq!(timed_run(7, u64::MAX, Some(threshold)), interpreted, "threshold {threshold}");
        assert_eq!(timed_run(7, 501, Some(threshold)), interpreted, "threshold {threshold}, in slices");
    }
}

/// More code than there is room for its translation: everything is dropped, and the guest goes on.
#[test]
fn a_full_code_memory_is_emptied() {
    const ROUNDS: u64 = 4;
    const LENGTH: u64 = 0x10_0000;
    let mut rig = rig(Some(0));
    let code = WINDOW_RAM + 0x1000;
    // add [rbx + 8], rax, over and over; then hlt.
    let mut bytes = [0x48u8, 0x01, 0x43, 0x08].repeat((LENGTH / 4) as usize);
    bytes.push(0xf4);
    let mut sum = 0u64;
    for round in 0..ROUNDS {
        // Writing makes the processor forget what it knows of the code.
        rig.memory.write(code, &bytes).unwrap();
        let mut state = Rig::long_mode();
        (state.rip, state.gpr[3], state.gpr[0]) = (code, WINDOW_RAM, round + 1);
        rig.cpu.set_state(&state);
        rig.run();
        sum += (round + 1) * (LENGTH / 4);
        assert_eq!(rig.get(WINDOW_RAM + 8), sum, "round {round}");
    }
}

struct Panics;

impl Bus for Panics {
    fn mmio_read(&self, _: u32, _: u64, _: &mut [u8]) {
        panic!("a device is broken");
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
    fn io_read(&self, _: u32, _: u16, _: &mut [u8]) {}
    fn io_write(&self, _: u32, _: u16, _: &[u8]) {}
}

#[test]
fn a_panic_of_a_device_passes_through_translated_code() {
    let rig = Rig::new();
    rig.code(|a| {
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.hlt().unwrap();
    });
    let config = CpuConfig { translate_after: Some(0), ..CpuConfig::new(Arc::new(Clock::host(1_000_000))) };
    let mut cpu = Cpu::new(config, rig.memory.clone(), Arc::new(Panics), Box::new(Queue::default()));
    let mut state = Rig::long_mode();
    state.gpr[3] = 0x1000_0000; // no RAM
    cpu.set_state(&state);
    let panic = catch_unwind(AssertUnwindSafe(|| cpu.run(Budget::instructions(10)))).unwrap_err();
    assert_eq!(panic.downcast_ref(), Some(&"a device is broken"));
    assert!(cpu.translated() > 0);
}
