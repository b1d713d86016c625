//! Code that changes while processors run it, as kernels and just-in-time compilers do.

use std::sync::atomic::{AtomicBool, Ordering};

use iced_x86::code_asm::*;

use super::rig::*;
use super::smp::run_all;
use softcpu::{Budget, Exit};

/// A function that tests patch: mov eax, imm32; ret.
const FUNCTION: u64 = 0x10_0000;
const TEMPLATE: [u8; 6] = [0xb8, 0, 0, 0, 0, 0xc3];

/// A hot loop over several blocks of a page; one in the middle is patched from within, through another address.
#[test]
fn a_hot_loop_is_patched_through_an_alias() {
    let mut rig = Rig::new();
    rig.window(0, P | RW);
    // The window's first page is the page of the function.
    rig.put(WINDOW_PT, FUNCTION | P | RW);
    // inc rax; jmp +0; patched: add rbx, 0; jmp +0; ret
    let function = [0x48, 0xff, 0xc0, 0xeb, 0, 0x48, 0x83, 0xc3, 0x00, 0xeb, 0, 0xc3];
    rig.memory.write(FUNCTION, &function).unwrap();
    let end = rig.execute(&Rig::long_mode(), |a| {
        let mut outer = a.create_label();
        let mut inner = a.create_label();
        a.mov(rbp, FUNCTION).unwrap();
        a.mov(edi, WINDOW as u32).unwrap();
        a.xor(esi, esi).unwrap();
        a.set_label(&mut outer).unwrap();
        a.mov(byte_ptr(rdi + 8), sil).unwrap();
        a.mov(ecx, 100).unwrap();
        a.set_label(&mut inner).unwrap();
        a.call(rbp).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(inner).unwrap();
        a.inc(esi).unwrap();
        a.cmp(esi, 100).unwrap();
        a.jne(outer).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((end.gpr[0], end.gpr[3]), (10_000, 100 * (99 * 100 / 2)));
}

/// Data on the same page as the code that writes it: only what is code counts as changed.
#[test]
fn code_and_data_may_share_a_page() {
    let mut rig = Rig::new();
    let end = rig.execute(&Rig::long_mode(), |a| {
        let mut again = a.create_label();
        a.mov(rbx, CODE + 0x800).unwrap();
        a.set_label(&mut again).unwrap();
        a.inc(qword_ptr(rbx)).unwrap();
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.mov(qword_ptr(rbx + 64), rax).unwrap();
        a.cmp(eax, 20_000).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((end.gpr[0], rig.get(CODE + 0x840)), (20_000, 20_000));
}

/// A compiler writes a new function over an old one and calls it, again and again, of different lengths.
#[test]
fn generated_code_replaces_older_code() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    s.gpr[5] = FUNCTION;
    let end = rig.execute(&s, |a| {
        let mut again = a.create_label();
        let mut fill = a.create_label();
        a.mov(r12d, 300).unwrap();
        a.set_label(&mut again).unwrap();
        // R12 % 7 + 1 times "add rax, imm8", then RET.
        a.mov(eax, r12d).unwrap();
        a.xor(edx, edx).unwrap();
        a.mov(ecx, 7).unwrap();
        a.div(ecx).unwrap();
        a.lea(ecx, dword_ptr(rdx + 1)).unwrap();
        a.mov(r13d, ecx).unwrap();
        a.mov(rdi, rbp).unwrap();
        a.set_label(&mut fill).unwrap();
        a.mov(dword_ptr(rdi), 0x00c0_8348).unwrap();
        a.mov(byte_ptr(rdi + 3), cl).unwrap();
        a.add(rdi, 4).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(fill).unwrap();
        a.mov(byte_ptr(rdi), 0xc3).unwrap();
        a.xor(eax, eax).unwrap();
        a.call(rbp).unwrap();
        // The sum of 1 to n.
        a.lea(ecx, dword_ptr(r13 + 1)).unwrap();
        a.imul_2(ecx, r13d).unwrap();
        a.shr(ecx, 1).unwrap();
        a.cmp(eax, ecx).unwrap();
        a.setne(cl).unwrap();
        a.movzx(ecx, cl).unwrap();
        a.add(r14, rcx).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(end.gpr[14], 0, "stale code was executed");
}

/// A device writes code (as a disk that code is paged in from does) while the processor calls it.
#[test]
fn a_device_patches_code_that_runs() {
    let mut rig = Rig::new();
    rig.memory.write(FUNCTION, &TEMPLATE).unwrap();
    rig.code(|a| {
        let mut again = a.create_label();
        a.mov(rbp, FUNCTION).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(rbp).unwrap();
        a.mov(dword_ptr(rbx), eax).unwrap();
        a.cmp(eax, 200).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    });
    let mut s = Rig::long_mode();
    s.gpr[3] = WINDOW_RAM;
    rig.cpu.set_state(&s);
    let memory = rig.memory.clone();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (cpu, ended) = (&mut rig.cpu, &ended);
        let running = scope.spawn(move || {
            let exit = cpu.run(Budget { wait: false, ..Budget::UNLIMITED });
            ended.store(true, Ordering::SeqCst);
            exit
        });
        for value in 1..=200u32 {
            memory.write(FUNCTION + 1, &value.to_le_bytes()).unwrap();
            // Until the processor has seen it.
            let mut seen = [0; 4];
            while seen != value.to_le_bytes() && !ended.load(Ordering::SeqCst) {
                memory.read(WINDOW_RAM, &mut seen).unwrap();
                std::thread::yield_now();
            }
        }
        assert_eq!(running.join().unwrap(), Exit::Halted);
    });
    assert_eq!(rig.cpu.state().gpr[0], 200);
}

/// How Linux patches an instruction that other processors execute: a breakpoint over its first byte, then the rest,
/// then the first byte, with all processors serialised in between. The breakpoint's handler does what either version
/// of the instruction would.
#[test]
fn an_instruction_is_patched_behind_a_breakpoint() {
    const READERS: u64 = 3;
    const PATCHES: i32 = 60;
    let mut rig = Rig::new();
    // add qword [rsi], imm32; ret: eight bytes, patched between imm32 1 and 0x100.
    rig.memory.write(FUNCTION, &[0x48, 0x81, 0x06, 1, 0, 0, 0, 0xc3]).unwrap();
    // #BP: as if the function had been called: adds 1 and returns to its caller.
    let handler = assemble(0x1_0000, |a| {
        a.lock().inc(qword_ptr(rsi)).unwrap();
        a.mov(rax, qword_ptr(rsp + 24)).unwrap();
        a.mov(rax, qword_ptr(rax)).unwrap();
        a.mov(qword_ptr(rsp), rax).unwrap();
        a.add(qword_ptr(rsp + 24), 8).unwrap();
        a.iretq().unwrap();
    });
    rig.memory.write(0x1_0000, &handler).unwrap();
    rig.gate(3, 0x1_0000, 0x8e, 0);
    // Serialises all readers: a new number in [RBX + 8] asks each to execute CPUID and say so in its slot.
    let writer = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        let mut wait = a.create_label();
        let mut start = a.create_label();
        a.jmp(start).unwrap();
        // sync(): R15 counts.
        let mut sync = a.create_label();
        a.set_label(&mut sync).unwrap();
        a.inc(r15).unwrap();
        a.mov(qword_ptr(rbx + 8), r15).unwrap();
        a.mov(r14d, READERS as i32).unwrap();
        a.lea(r13, qword_ptr(rbx + 0x100)).unwrap();
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.cmp(qword_ptr(r13), r15).unwrap();
        a.jb(wait).unwrap();
        a.add(r13, 64).unwrap();
        a.dec(r14d).unwrap();
        a.jnz(wait).unwrap();
        a.ret().unwrap();
        a.set_label(&mut start).unwrap();
        a.mov(rbp, FUNCTION).unwrap();
        a.mov(r12d, PATCHES).unwrap();
        a.mov(r11d, 1).unwrap();
        a.set_label(&mut again).unwrap();
        a.xor(r11d, 0x101).unwrap();
        a.mov(byte_ptr(rbp), 0xcc).unwrap();
        a.call(sync).unwrap();
        a.mov(dword_ptr(rbp + 3), r11d).unwrap();
        a.call(sync).unwrap();
        a.mov(byte_ptr(rbp), 0x48).unwrap();
        a.call(sync).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.mov(qword_ptr(rbx + 8), -1).unwrap();
        a.hlt().unwrap();
    };
    let reader = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        let mut same = a.create_label();
        let mut end = a.create_label();
        a.mov(r8, rbx).unwrap();
        a.mov(rbp, FUNCTION).unwrap();
        // This processor's slot and sum.
        a.dec(edi).unwrap();
        a.shl(edi, 6).unwrap();
        a.lea(r10, qword_ptr(rbx + rdi + 0x100)).unwrap();
        a.lea(rsi, qword_ptr(r10 + 8)).unwrap();
        a.set_label(&mut again).unwrap();
        a.inc(r12).unwrap();
        a.call(rbp).unwrap();
        a.mov(r9, qword_ptr(r8 + 8)).unwrap();
        a.cmp(r9, -1).unwrap();
        a.je(end).unwrap();
        a.cmp(r9, qword_ptr(r10)).unwrap();
        a.je(same).unwrap();
        a.xor(eax, eax).unwrap();
        a.cpuid().unwrap();
        a.mov(qword_ptr(r10), r9).unwrap();
        a.set_label(&mut same).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut end).unwrap();
        a.hlt().unwrap();
    };
    let end = run_all(&mut rig, &[&writer, &reader, &reader, &reader]);
    for (number, cpu) in end.iter().enumerate().skip(1) {
        // Each call added 1 or 0x100: a torn instruction would have added something else, or nothing.
        let (calls, sum) = (cpu.gpr[12], rig.get(WINDOW_RAM + 0x100 + 64 * (number as u64 - 1) + 8));
        let fine = sum >= calls && (sum - calls).is_multiple_of(0xff) && (sum - calls) / 0xff <= calls;
        assert!(fine, "processor {number}: {calls} calls added {sum:#x}");
    }
}
