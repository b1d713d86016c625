//! Guests that use local APICs and several processors as an operating system does.

use std::time::Duration;

use iced_x86::code_asm::*;
use vmm_core::accel::Vcpu;

use crate::harness::*;

/// Where start-up IPIs let processors begin.
const TRAMPOLINE: u64 = 0x6000;
/// A word that processors count up when they are ready.
const READY: u64 = 0x5000;
/// Words that handlers count up, one for each processor: 64 bytes apart.
const HITS: u64 = 0x20_0000;
/// Interrupt descriptors of 64-bit mode.
const IDT64: u64 = 0x3000;
/// The first stack; the others are 0x800 below each other.
const STACKS: u64 = 0x30_0000;
/// 64-bit code of all processors but the first.
const SECONDARY: u64 = 0x1_8000;
const HANDLERS: u64 = 0x1_c000;

/// A machine whose other processors run `secondary` in 64-bit mode, on stacks of their own and with the number of the
/// processor in EDI; the first runs `primary` when all of them do. All use x2APIC mode.
fn machine(
    target: &Target,
    cpus: u32,
    primary: impl FnOnce(&mut CodeAssembler),
    secondary: impl FnOnce(&mut CodeAssembler),
) -> (Machine, Vec<Box<dyn Vcpu>>) {
    let code = assemble(64, CODE, |a| {
        x2apic(a);
        a.xor(edi, edi).unwrap();
        // INIT and SIPI to all others.
        for command in [0xc_4500u32, 0xc_4600 | (TRAMPOLINE >> 12) as u32] {
            send(a, command, 0);
        }
        let mut wait = a.create_label();
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.cmp(dword_ptr(READY), cpus as i32 - 1).unwrap();
        a.jne(wait).unwrap();
        primary(a);
        done(a);
    });
    let mut machine = Machine::new(target, cpus, &code);
    write_page_tables(&machine.memory);
    machine.memory.write_obj(GDT, &[0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]).unwrap();
    let mut state = long64();
    state.idtr = softcpu::DescriptorTable { base: IDT64, limit: 0xfff };
    state.gpr[4] = STACKS;
    machine.cpu.set_state(&state).unwrap();
    let code = assemble(64, SECONDARY, |a| {
        x2apic(a);
        a.mov(ecx, 0x802).unwrap();
        a.rdmsr().unwrap();
        a.mov(edi, eax).unwrap();
        a.shl(eax, 11).unwrap();
        a.mov(esp, STACKS as u32).unwrap();
        a.sub(esp, eax).unwrap();
        secondary(a);
        halt_forever(a);
    });
    machine.memory.write(SECONDARY, &code).unwrap();
    write_trampoline(&machine);
    let others: Vec<_> = (1..cpus).map(|id| machine.another_cpu(id)).collect();
    (machine, others)
}

/// Real mode to 64-bit mode at [`SECONDARY`].
fn write_trampoline(machine: &Machine) {
    // Descriptor tables: the limit and base of the GDT and of the IDT.
    machine.memory.write_obj(0x7f00, &0x17u16).unwrap();
    machine.memory.write_obj(0x7f02, &(GDT as u32)).unwrap();
    machine.memory.write_obj(0x7f08, &0xfffu16).unwrap();
    machine.memory.write_obj(0x7f0a, &(IDT64 as u32)).unwrap();
    let code = assemble(16, TRAMPOLINE, |a| {
        a.xor(ax, ax).unwrap();
        a.mov(ds, eax).unwrap();
        a.db(&[0x66, 0x0f, 0x01, 0x16, 0x00, 0x7f]).unwrap(); // lgdt [0x7f00]
        a.db(&[0x66, 0x0f, 0x01, 0x1e, 0x08, 0x7f]).unwrap(); // lidt [0x7f08]
        a.mov(eax, 0x620).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(eax, PAGE_TABLES as u32).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(ecx, 0xc000_0080u32).unwrap();
        a.rdmsr().unwrap();
        a.or(eax, 0x100).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, 0x8000_0011u32).unwrap();
        a.mov(cr0, eax).unwrap();
        a.db(&[0x66, 0xea]).unwrap(); // jmp far
        a.db(&(SECONDARY as u32).to_le_bytes()).unwrap();
        a.db(&8u16.to_le_bytes()).unwrap();
    });
    machine.memory.write(TRAMPOLINE, &code).unwrap();
}

/// Installs a handler of 64-bit code.
fn handler(machine: &Machine, vector: u8, code: impl FnOnce(&mut CodeAssembler)) {
    let at = HANDLERS + 0x100 * u64::from(vector % 16);
    machine.memory.write(at, &assemble(64, at, code)).unwrap();
    let gate = at & 0xffff | 8 << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48;
    machine.memory.write_obj(IDT64 + 16 * u64::from(vector), &[gate, 0]).unwrap();
}

/// Counts a hit of this processor (its number is in EDI), ends the interrupt and returns.
fn count_hit(a: &mut CodeAssembler) {
    a.push(rax).unwrap();
    a.push(rcx).unwrap();
    a.push(rdx).unwrap();
    a.mov(eax, edi).unwrap();
    a.shl(eax, 6).unwrap();
    a.lock().inc(qword_ptr(rax + HITS as i32)).unwrap();
    write_msr(a, 0x80b, 0);
    a.pop(rdx).unwrap();
    a.pop(rcx).unwrap();
    a.pop(rax).unwrap();
    a.iretq().unwrap();
}

fn write_msr(a: &mut CodeAssembler, msr: u32, value: u64) {
    a.mov(ecx, msr).unwrap();
    a.mov(eax, value as u32).unwrap();
    a.mov(edx, (value >> 32) as u32).unwrap();
    a.wrmsr().unwrap();
}

/// Switches this processor's APIC to x2APIC mode, enabled.
fn x2apic(a: &mut CodeAssembler) {
    a.mov(ecx, 0x1b).unwrap();
    a.rdmsr().unwrap();
    a.or(eax, 0xc00).unwrap();
    a.wrmsr().unwrap();
    write_msr(a, 0x80f, 0x1ff);
}

/// Writes the interrupt command register.
fn send(a: &mut CodeAssembler, command: u32, destination: u32) {
    write_msr(a, 0x830, u64::from(destination) << 32 | u64::from(command));
}

fn ready(a: &mut CodeAssembler) {
    a.lock().inc(dword_ptr(READY)).unwrap();
}

/// Waits until the hits of a processor are `count`.
fn wait_for_hits(a: &mut CodeAssembler, cpu: u64, count: i32) {
    let mut wait = a.create_label();
    a.set_label(&mut wait).unwrap();
    a.pause().unwrap();
    a.cmp(qword_ptr(HITS + 64 * cpu), count).unwrap();
    a.jb(wait).unwrap();
}

/// Runs all processors until the first one ends the guest.
fn run(machine: &mut Machine, others: &mut [Box<dyn Vcpu>]) {
    let bus = machine.bus.clone();
    std::thread::scope(|scope| {
        for cpu in others {
            let bus = &bus;
            scope.spawn(move || run_to_end(bus, &mut **cpu));
        }
        machine.run_to_end();
    });
}

fn hits(machine: &Machine, cpus: u64) -> Vec<u64> {
    (0..cpus).map(|cpu| machine.memory.read_obj(HITS + 64 * cpu).unwrap()).collect()
}

/// Fixed interrupts to one processor, to itself, to all, to all others, to a logical group, by lowest priority.
pub fn ipis_reach_whom_they_address(target: &Target) {
    let primary = |a: &mut CodeAssembler| {
        a.sti().unwrap();
        send(a, 0x41, 2);
        wait_for_hits(a, 2, 1);
        send(a, 0x4_0041, 0);
        wait_for_hits(a, 0, 1);
        send(a, 0x8_0041, 0);
        for cpu in 0..4 {
            wait_for_hits(a, cpu, if cpu == 1 || cpu == 3 { 1 } else { 2 });
        }
        send(a, 0xc_0041, 0);
        for (cpu, count) in [(1, 2), (2, 3), (3, 2)] {
            wait_for_hits(a, cpu, count);
        }
        // Logical: bits 1 and 3 of cluster 0. Broadcast: everybody. Nobody: processor 77.
        send(a, 0x841, 0b1010);
        wait_for_hits(a, 1, 3);
        wait_for_hits(a, 3, 3);
        send(a, 0x41, u32::MAX);
        for (cpu, count) in [(0, 3), (1, 4), (2, 4), (3, 4)] {
            wait_for_hits(a, cpu, count);
        }
        send(a, 0x41, 77);
    };
    let secondary = |a: &mut CodeAssembler| {
        ready(a);
        a.sti().unwrap();
    };
    let (mut machine, mut others) = machine(target, 4, primary, secondary);
    handler(&machine, 0x41, count_hit);
    run(&mut machine, &mut others);
    assert_eq!(hits(&machine, 4), [3, 4, 4, 4]);
}

/// NMIs reach a processor that has interrupts disabled and spins.
pub fn an_nmi_by_ipi(target: &Target) {
    let primary = |a: &mut CodeAssembler| {
        for n in 1..=20 {
            send(a, 0x400, 1);
            wait_for_hits(a, 1, n);
        }
    };
    let secondary = |a: &mut CodeAssembler| {
        ready(a);
        let mut spin = a.create_label();
        a.set_label(&mut spin).unwrap();
        a.inc(rbx).unwrap();
        a.jmp(spin).unwrap();
    };
    let (mut machine, mut others) = machine(target, 2, primary, secondary);
    handler(&machine, 2, count_hit);
    run(&mut machine, &mut others);
    assert_eq!(hits(&machine, 2), [0, 20]);
}

/// The timer in TSC-deadline mode: for the future, and for the past at once; the register reads zero afterwards.
pub fn tsc_deadlines_fire_in_x2apic_mode(target: &Target) {
    let primary = |a: &mut CodeAssembler| {
        write_msr(a, 0x832, 0x4_0042);
        for n in 1..=3 {
            a.rdtsc().unwrap();
            a.add(eax, 200_000).unwrap();
            a.adc(edx, 0).unwrap();
            a.mov(ecx, 0x6e0).unwrap();
            a.wrmsr().unwrap();
            a.sti().unwrap();
            a.hlt().unwrap();
            a.cli().unwrap();
            wait_for_hits(a, 0, n);
        }
        write_msr(a, 0x6e0, 1);
        a.sti().unwrap();
        wait_for_hits(a, 0, 4);
        a.mov(ecx, 0x6e0).unwrap();
        a.rdmsr().unwrap();
        a.or(eax, edx).unwrap();
        report(a);
    };
    let (mut machine, mut others) = machine(target, 1, primary, |_| {});
    handler(&machine, 0x42, count_hit);
    run(&mut machine, &mut others);
    assert_eq!((hits(&machine, 1), machine.bus.reports()), (vec![4], vec![0]));
}

/// One processor changes a mapping that others use, tells them by IPI, and frees the old page only when all have
/// answered: no store of theirs may reach it afterwards.
pub fn a_tlb_shoot_down_by_ipi(target: &Target) {
    const CPUS: u64 = 3;
    const ROUNDS: i32 = 300;
    /// The entry for linear address 16 MiB, which alternates between two large pages of RAM.
    const ENTRY: u64 = PAGE_TABLES + 0x2000 + 8 * 8;
    const LINEAR: u64 = 16 << 20;
    const PAGES: [u64; 2] = [0, 2 << 20];
    /// Within both pages: what the others store to, and what no one may change then.
    const WORD: u64 = 0x10_0000;
    let primary = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        let mut answers = a.create_label();
        let mut settle = a.create_label();
        a.mov(r12d, ROUNDS).unwrap();
        a.xor(r13d, r13d).unwrap();
        a.xor(r15d, r15d).unwrap();
        a.set_label(&mut again).unwrap();
        // R13: the page that is mapped now; R14: the answers that will have come.
        a.mov(rax, r13).unwrap();
        a.xor(rax, PAGES[1] as i32).unwrap();
        a.or(rax, 0x83).unwrap();
        a.mov(qword_ptr(ENTRY), rax).unwrap();
        send(a, 0xc_0043, 0);
        a.inc(r15).unwrap();
        for cpu in 1..CPUS {
            a.mov(rbx, HITS + 64 * cpu).unwrap();
            let mut wait = a.create_label();
            a.set_label(&mut wait).unwrap();
            a.pause().unwrap();
            a.cmp(qword_ptr(rbx), r15).unwrap();
            a.jb(wait).unwrap();
        }
        // The old page is ours: nobody changes what we put there.
        a.mov(qword_ptr(r13 + WORD as i32), -1).unwrap();
        a.mov(ecx, 500).unwrap();
        a.set_label(&mut settle).unwrap();
        a.cmp(qword_ptr(r13 + WORD as i32), -1).unwrap();
        a.setne(al).unwrap();
        a.movzx(eax, al).unwrap();
        a.add(rbp, rax).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(settle).unwrap();
        a.xor(r13, PAGES[1] as i32).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.set_label(&mut answers).unwrap();
        a.mov(eax, ebp).unwrap();
        report(a);
    };
    let secondary = |a: &mut CodeAssembler| {
        ready(a);
        a.sti().unwrap();
        let mut again = a.create_label();
        a.mov(ebx, (LINEAR + WORD) as u32).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(qword_ptr(rbx), rsi).unwrap();
        a.inc(rsi).unwrap();
        a.jmp(again).unwrap();
    };
    let (mut machine, mut others) = machine(target, CPUS as u32, primary, secondary);
    machine.memory.write_obj(ENTRY, &0x83u64).unwrap();
    handler(&machine, 0x43, |a| {
        a.invlpg(byte_ptr(LINEAR)).unwrap();
        count_hit(a);
    });
    run(&mut machine, &mut others);
    assert_eq!(machine.bus.reports(), [0], "stores through an old translation");
    assert_eq!(hits(&machine, CPUS)[1..], [ROUNDS as u64; 2]);
}

/// Each processor adds to one counter, under a lock and by itself, and everything is counted.
fn count_together(target: &Target, cpus: u32, each: i32) {
    const LOCK: u64 = 0x20_8000;
    const PLAIN: u64 = 0x20_8040;
    const ATOMIC: u64 = 0x20_8080;
    const FINISHED: u64 = 0x20_80c0;
    let work = move |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        let mut acquire = a.create_label();
        let mut acquired = a.create_label();
        a.mov(r12d, each).unwrap();
        a.set_label(&mut again).unwrap();
        a.lock().inc(qword_ptr(ATOMIC)).unwrap();
        a.set_label(&mut acquire).unwrap();
        a.lock().bts(dword_ptr(LOCK), 0).unwrap();
        a.jae(acquired).unwrap();
        a.pause().unwrap();
        a.jmp(acquire).unwrap();
        a.set_label(&mut acquired).unwrap();
        a.mov(rax, qword_ptr(PLAIN)).unwrap();
        a.inc(rax).unwrap();
        a.mov(qword_ptr(PLAIN), rax).unwrap();
        a.mov(dword_ptr(LOCK), 0).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.lock().inc(dword_ptr(FINISHED)).unwrap();
    };
    let primary = |a: &mut CodeAssembler| {
        work(a);
        let mut wait = a.create_label();
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.cmp(dword_ptr(FINISHED), cpus as i32).unwrap();
        a.jne(wait).unwrap();
    };
    let secondary = |a: &mut CodeAssembler| {
        ready(a);
        work(a);
        a.cli().unwrap();
    };
    let (mut machine, mut others) = machine(target, cpus, primary, secondary);
    run(&mut machine, &mut others);
    let total = u64::from(cpus) * each as u64;
    assert_eq!(machine.memory.read_obj::<[u64; 1]>(PLAIN).unwrap(), [total]);
    assert_eq!(machine.memory.read_obj::<[u64; 1]>(ATOMIC).unwrap(), [total]);
}

pub fn eight_cpus_count_together(target: &Target) {
    count_together(target, 8, 2000);
}

pub fn two_hundred_and_fifty_five_cpus(target: &Target) {
    count_together(target, 255, 20);
}

/// All processors of a machine sleep in HLT: the process uses no time for them.
pub fn a_halted_machine_uses_no_time(target: &Target) {
    let primary = |a: &mut CodeAssembler| {
        report_value(a, 1);
        a.sti().unwrap();
        halt_forever(a);
    };
    let (mut machine, mut others) = machine(target, 4, primary, ready);
    let bus = machine.bus.clone();
    let handles: Vec<_> = others.iter().map(|cpu| cpu.handle()).chain([machine.cpu.handle()]).collect();
    let slept = Duration::from_millis(300);
    let used = std::thread::scope(|scope| {
        let cpus = others.iter_mut().chain([&mut machine.cpu]);
        let threads: Vec<_> = cpus
            .map(|cpu| {
                scope.spawn(|| {
                    let start = thread_time();
                    cpu.run().unwrap();
                    thread_time() - start
                })
            })
            .collect();
        bus.wait_for_reports(1);
        std::thread::sleep(slept);
        handles.iter().for_each(|handle| handle.kick());
        threads.into_iter().map(|thread| thread.join().unwrap()).sum::<Duration>()
    });
    assert!(used < slept / 2, "{used:?} of processor time in {slept:?} of sleep");
}

/// Processor time of the calling thread.
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a live variable of the type that the call fills.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// A guest that switched on all that EFER has on this processor can be saved and loaded.
pub fn a_state_with_all_of_efer(target: &Target) {
    const ALL: u64 = 1 << 21 | 0xd01;
    let mut machine = Machine::long64(target, |a| {
        write_msr(a, 0xc000_0080, ALL);
        done(a);
    });
    machine.run_to_end();
    let state = machine.cpu.state().unwrap();
    assert_eq!(state.msrs.efer, ALL);
    machine.cpu.set_state(&state).unwrap();
}
