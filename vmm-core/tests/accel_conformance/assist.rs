//! KVM with the software CPU's assistance. Where KVM is hardware's, the same guests run without any.

use iced_x86::code_asm::*;
use vmm_core::accel::VcpuExit;
use vmm_core::accel::kvm::KvmHypervisor;

use crate::harness::*;

const ROUNDS: i32 = 50;
/// What the guest counts in: SSE, breakpoints, pairs of words.
const COUNTERS: u64 = 0x5000;
const HANDLER: u64 = 0x1_4000;

/// Kernel code with instructions that a software KVM does not know: SSE, INT3 and the way back, CMPXCHG16B, FXSAVE.
fn machine(target: &Target) -> Machine {
    let machine = Machine::long64(target, |a| {
        let mut again = a.create_label();
        let mut retry = a.create_label();
        a.mov(ebp, ROUNDS).unwrap();
        a.pxor(xmm0, xmm0).unwrap();
        a.pcmpeqd(xmm1, xmm1).unwrap();
        a.set_label(&mut again).unwrap();
        a.psubq(xmm0, xmm1).unwrap();
        a.int3().unwrap();
        a.mov(rax, qword_ptr(COUNTERS + 0x20)).unwrap();
        a.mov(rdx, qword_ptr(COUNTERS + 0x28)).unwrap();
        a.set_label(&mut retry).unwrap();
        a.lea(rbx, qword_ptr(rax + 1)).unwrap();
        a.lea(rcx, qword_ptr(rdx + 2)).unwrap();
        a.lock().cmpxchg16b(xmmword_ptr(COUNTERS + 0x20)).unwrap();
        a.jne(retry).unwrap();
        a.dec(ebp).unwrap();
        a.jnz(again).unwrap();
        a.movups(xmmword_ptr(COUNTERS), xmm0).unwrap();
        a.fxsave64(byte_ptr(COUNTERS + 0x200)).unwrap();
        done(a);
    });
    // Descriptors for the way into the handler and back, and a gate for #BP.
    machine.memory.write_obj(GDT, &[0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]).unwrap();
    let handler = assemble(64, HANDLER, |a| {
        a.inc(qword_ptr(COUNTERS + 0x10)).unwrap();
        a.iretq().unwrap();
    });
    machine.memory.write(HANDLER, &handler).unwrap();
    let gate = HANDLER & 0xffff | 8 << 16 | 0x8e00 << 32 | (HANDLER >> 16) << 48;
    machine.memory.write_obj(IDT + 16 * 3, &[gate, 0]).unwrap();
    machine
}

pub fn what_kvm_cannot_emulate_is_executed(target: &Target) {
    let mut machine = machine(target);
    machine.run_to_end();
    let word = |at: u64| machine.memory.read_obj::<u64>(COUNTERS + at).unwrap();
    let rounds = ROUNDS as u64;
    assert_eq!([word(0), word(8), word(0x10)], [rounds; 3]);
    assert_eq!([word(0x20), word(0x28)], [rounds, 2 * rounds]);
    // XMM0 in the FXSAVE image.
    assert_eq!(word(0x200 + 160), rounds);
    let assisted = machine.cpu.handle().assisted();
    assert_eq!(assisted >= 2 * rounds, KvmHypervisor::is_software(), "{assisted} instructions");
}

/// Assistance does not touch the guest's time: its counter goes on from instruction to instruction.
pub fn time_goes_on(target: &Target) {
    let mut machine = Machine::long64(target, |a| {
        let mut again = a.create_label();
        a.mov(ebp, ROUNDS).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut again).unwrap();
        a.rdtsc().unwrap();
        a.shl(rdx, 32).unwrap();
        a.or(rax, rdx).unwrap();
        // How much it went on since the last round, and whether it went back.
        a.mov(rcx, rax).unwrap();
        a.sub(rcx, rbx).unwrap();
        a.cmp(rax, rbx).unwrap();
        a.setb(dl).unwrap();
        a.movzx(edx, dl).unwrap();
        a.add(r12, rdx).unwrap();
        a.mov(rbx, rax).unwrap();
        a.mov(qword_ptr(rbp * 8 + COUNTERS as i32), rcx).unwrap();
        a.paddq(xmm0, xmm1).unwrap();
        a.dec(ebp).unwrap();
        a.jnz(again).unwrap();
        done(a);
    });
    let before = machine.cpu.state().unwrap().tsc;
    machine.run_to_end();
    let end = machine.cpu.state().unwrap();
    assert_eq!(end.gpr[12], 0, "the counter went back");
    assert!(end.tsc >= before);
    // Less than a minute between two rounds, at any frequency.
    for round in 1..ROUNDS as u64 {
        let passed = machine.memory.read_obj::<u64>(COUNTERS + 8 * round).unwrap();
        assert!(passed < 60 << 32, "{passed} in round {round}");
    }
}

/// What the software CPU writes for KVM is in the dirty pages that KVM reports.
pub fn assisted_writes_are_dirty(target: &Target) {
    let mut machine = machine(target);
    machine.vm.set_dirty_tracking(true).unwrap();
    assert!(machine.vm.take_dirty_pages(0).unwrap().iter().all(|word| *word == 0));
    machine.run_to_end();
    let dirty = machine.vm.take_dirty_pages(0).unwrap();
    let is_dirty = |page: u64| dirty[page as usize / 64] >> (page % 64) & 1 == 1;
    assert!(is_dirty(COUNTERS >> 12), "the counters");
    assert!(is_dirty((STACK - 8) >> 12), "the stack");
    assert!(!is_dirty(0x300), "nobody wrote there");
    machine.vm.set_dirty_tracking(false).unwrap();
}

/// An instruction beyond both ends the run with a fault, and the guest is not changed.
pub fn what_neither_knows_is_a_fault(target: &Target) {
    let mut machine = Machine::long64(target, |a| {
        a.mov(eax, 5).unwrap();
        // VADDPS ymm0, ymm0, ymm0.
        a.db(&[0xc5, 0xfc, 0x58, 0xc0]).unwrap();
        done(a);
    });
    // Where KVM is hardware's the processor answers by itself, with #UD as AVX is not switched on: here there is no
    // handler for it.
    match machine.run() {
        VcpuExit::Fault(fault) => {
            assert!(KvmHypervisor::is_software());
            assert_eq!((fault.rip, fault.bytes[..4].to_vec()), (CODE + 5, vec![0xc5, 0xfc, 0x58, 0xc0]));
            assert_eq!(machine.cpu.state().unwrap().gpr[0], 5);
            assert_eq!(machine.cpu.handle().assisted(), 0);
        }
        VcpuExit::TripleFault => {}
        other => panic!("{other:?}"),
    }
}
