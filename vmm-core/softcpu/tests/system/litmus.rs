//! Litmus tests of the memory model (AMD64 Architecture Programmer's Manual, volume 2, 7.2) and of atomic
//! instructions under contention.
//!
//! Each processor runs the same number of rounds. A round has memory of its own (four lines), so nothing has
//! to be reset in between, and its outcomes stay there for the test to look at.

use iced_x86::code_asm::*;

use super::rig::*;
use super::smp::run_all;

const ROUNDS: u64 = 6000;
/// Memory of one round: a line with X, one with Y, one with the outcomes.
const ROUND: u64 = 256;
const X: i32 = 0;
const Y: i32 = 64;
const OUT: i32 = 128;
/// Behind all rounds.
const BARRIER: u64 = WINDOW_RAM + ROUNDS * ROUND;

/// The rounds of one processor: `body` runs with RBX at the memory of the round. Every 16 rounds all processors meet.
fn rounds(processors: u64, body: impl Fn(&mut CodeAssembler)) -> impl Fn(&mut CodeAssembler) {
    move |a| {
        let mut again = a.create_label();
        let mut wait = a.create_label();
        let mut go = a.create_label();
        a.mov(rbp, BARRIER).unwrap();
        a.xor(r15d, r15d).unwrap();
        a.xor(r14d, r14d).unwrap();
        a.set_label(&mut again).unwrap();
        a.test(r15d, 15).unwrap();
        a.jnz(go).unwrap();
        a.add(r14, processors as i32).unwrap();
        a.lock().inc(qword_ptr(rbp)).unwrap();
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.cmp(qword_ptr(rbp), r14).unwrap();
        a.jb(wait).unwrap();
        a.set_label(&mut go).unwrap();
        body(a);
        a.add(rbx, ROUND as i32).unwrap();
        a.inc(r15d).unwrap();
        a.cmp(r15d, ROUNDS as i32).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    }
}

/// The outcomes of a round: `n` values.
fn outcomes<const N: usize>(rig: &Rig, round: u64) -> [u64; N] {
    std::array::from_fn(|i| rig.get(WINDOW_RAM + round * ROUND + OUT as u64 + 8 * i as u64))
}

/// Stores 1 to one location, then (after `fence`) loads the other.
fn store_then_load(
    store: i32,
    load: i32,
    out: i32,
    fence: fn(&mut CodeAssembler),
) -> impl Fn(&mut CodeAssembler) {
    move |a| {
        a.mov(dword_ptr(rbx + store), 1).unwrap();
        fence(a);
        a.mov(eax, dword_ptr(rbx + load)).unwrap();
        a.mov(dword_ptr(rbx + out), eax).unwrap();
    }
}

/// Store buffering: with a fence between, at least one processor sees the other's store.
#[test]
fn fences_order_stores_before_loads() {
    let fences: [fn(&mut CodeAssembler); 3] = [
        |a| a.mfence().unwrap(),
        |a| a.lock().add(dword_ptr(rsp - 8), 0).unwrap(),
        |a| a.xchg(qword_ptr(rsp - 8), rcx).unwrap(),
    ];
    for fence in fences {
        let mut rig = Rig::new();
        let one = rounds(2, store_then_load(X, Y, OUT, fence));
        let other = rounds(2, store_then_load(Y, X, OUT + 8, fence));
        run_all(&mut rig, &[&one, &other]);
        for round in 0..ROUNDS {
            assert_ne!(outcomes(&rig, round), [0, 0], "round {round}");
        }
    }
}

/// Load buffering: a load never sees a store that follows it in program order, even around two processors.
#[test]
fn loads_do_not_see_later_stores() {
    let load_then_store = |load: i32, store: i32, out: i32| {
        move |a: &mut CodeAssembler| {
            a.mov(eax, dword_ptr(rbx + load)).unwrap();
            a.mov(dword_ptr(rbx + store), 1).unwrap();
            a.mov(dword_ptr(rbx + out), eax).unwrap();
        }
    };
    let mut rig = Rig::new();
    let one = rounds(2, load_then_store(X, Y, OUT));
    let other = rounds(2, load_then_store(Y, X, OUT + 8));
    run_all(&mut rig, &[&one, &other]);
    for round in 0..ROUNDS {
        assert_ne!(outcomes(&rig, round), [1, 1], "round {round}");
    }
}

/// Independent reads of independent writes: all processors see the two stores in one order.
#[test]
fn all_processors_agree_on_the_order_of_stores() {
    let write = |at: i32| move |a: &mut CodeAssembler| a.mov(dword_ptr(rbx + at), 1).unwrap();
    let read = |first: i32, second: i32, out: i32| {
        move |a: &mut CodeAssembler| {
            a.mov(eax, dword_ptr(rbx + first)).unwrap();
            a.mov(ecx, dword_ptr(rbx + second)).unwrap();
            a.mov(dword_ptr(rbx + out), eax).unwrap();
            a.mov(dword_ptr(rbx + out + 8), ecx).unwrap();
        }
    };
    let mut rig = Rig::new();
    let programs = [rounds(4, write(X)), rounds(4, write(Y))];
    let readers = [rounds(4, read(X, Y, OUT)), rounds(4, read(Y, X, OUT + 16))];
    run_all(&mut rig, &[&programs[0], &readers[0], &programs[1], &readers[1]]);
    for round in 0..ROUNDS {
        assert_ne!(outcomes(&rig, round), [1, 0, 1, 0], "round {round}");
    }
}

/// Every locked form, at an offset from the start of a page: aligned, across lines, across pages.
fn contended(offset: i32) {
    const EACH: u64 = 3000;
    const CPUS: u64 = 4;
    let at = WINDOW_RAM + 0x1_0000 + 0x1000;
    let program = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        let mut retry = a.create_label();
        let mut retry_8b = a.create_label();
        a.mov(rsi, at.wrapping_add_signed(i64::from(offset))).unwrap();
        a.mov(r15d, EACH as i32).unwrap();
        a.set_label(&mut again).unwrap();
        a.lock().add(qword_ptr(rsi), 1).unwrap();
        a.mov(edx, 1).unwrap();
        a.lock().xadd(qword_ptr(rsi + 0x1000), rdx).unwrap();
        a.mov(eax, dword_ptr(rsi + 0x2000)).unwrap();
        a.set_label(&mut retry).unwrap();
        a.lea(edx, dword_ptr(rax + 1)).unwrap();
        a.lock().cmpxchg(dword_ptr(rsi + 0x2000), edx).unwrap();
        a.jne(retry).unwrap();
        a.mov(eax, dword_ptr(rsi + 0x3000)).unwrap();
        a.mov(edx, dword_ptr(rsi + 0x3004)).unwrap();
        a.set_label(&mut retry_8b).unwrap();
        // Both halves count; what was loaded is never torn.
        a.cmp(eax, edx).unwrap();
        a.setne(cl).unwrap();
        a.movzx(ecx, cl).unwrap();
        a.add(r14d, ecx).unwrap();
        a.lea(ebx, dword_ptr(rax + 1)).unwrap();
        a.mov(ecx, ebx).unwrap();
        a.lock().cmpxchg8b(qword_ptr(rsi + 0x3000)).unwrap();
        a.jne(retry_8b).unwrap();
        // Each processor toggles a bit of its own, by the same word: nobody's change is lost.
        a.lock().btc(dword_ptr(rsi + 0x4000), edi).unwrap();
        a.dec(r15d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    };
    let mut rig = Rig::new();
    let end = run_all(&mut rig, &[&program, &program, &program, &program]);
    let value = |page: u64| rig.get(at.wrapping_add_signed(i64::from(offset)) + page * 0x1000);
    let total = CPUS * EACH;
    assert_eq!((value(0), value(1), value(2) as u32), (total, total, total as u32), "offset {offset}");
    assert_eq!(value(3), total << 32 | total, "offset {offset}");
    assert_eq!(value(4) as u32, 0, "offset {offset}: each bit was toggled an even number of times");
    // The first, unlocked loads of CMPXCHG8B's halves may be torn, its own must not be.
    for cpu in &end {
        assert!(cpu.gpr[14] <= EACH, "offset {offset}: torn loads");
    }
}

#[test]
fn locked_instructions_are_atomic_when_aligned() {
    contended(0);
}

#[test]
fn locked_instructions_are_atomic_across_lines() {
    contended(61);
}

#[test]
fn locked_instructions_are_atomic_across_pages() {
    contended(-3);
}
