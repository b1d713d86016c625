//! Real mode, protected mode, and the way to long mode.

use iced_x86::code_asm::*;

use super::rig::*;
use softcpu::{Budget, CpuConfig, CpuState, Exit, MpState};

fn assemble_16(at: u64, write: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(16).unwrap();
    write(&mut a);
    a.assemble(at).unwrap()
}

/// Real mode to 32-bit protected mode to long mode, as a kernel's trampoline does it.
#[test]
fn a_trampoline_reaches_long_mode() {
    let mut rig = Rig::new();
    let (real, protected, long) = (0x1_0000u64, 0x1_1000u64, 0x1_2000u64);
    // Descriptor 0x28: 32-bit code.
    rig.put(GDT + 0x28, 0x00cf_9b00_0000_ffff);
    rig.memory.write(0x500, &0x3fu16.to_le_bytes()).unwrap();
    rig.memory.write(0x502, &(GDT as u32).to_le_bytes()).unwrap();
    let code = assemble_16(0, |a| {
        a.xor(ax, ax).unwrap();
        a.mov(ds, eax).unwrap();
        a.db(&[0x66, 0x0f, 0x01, 0x16, 0x00, 0x05]).unwrap(); // lgdtd [0x500]
        a.mov(eax, cr0).unwrap();
        a.or(eax, 1).unwrap();
        a.mov(cr0, eax).unwrap();
        a.db(&[0x66, 0xea]).unwrap(); // jmp far 0x28:protected
        a.db(&(protected as u32).to_le_bytes()).unwrap();
        a.db(&0x28u16.to_le_bytes()).unwrap();
    });
    rig.memory.write(real, &code).unwrap();
    let mut a = CodeAssembler::new(32).unwrap();
    a.mov(eax, 0x10).unwrap();
    a.mov(ds, eax).unwrap();
    a.mov(ss, eax).unwrap();
    a.mov(esp, 0x1_d000).unwrap();
    a.push(0x1234_5678).unwrap();
    a.pop(esi).unwrap();
    a.mov(eax, 0xa0).unwrap();
    a.mov(cr4, eax).unwrap();
    a.mov(eax, PML4 as u32).unwrap();
    a.mov(cr3, eax).unwrap();
    a.mov(ecx, 0xc000_0080u32).unwrap();
    a.rdmsr().unwrap();
    a.or(eax, 0x100).unwrap();
    a.wrmsr().unwrap();
    a.mov(eax, 0x8000_0001u32).unwrap();
    a.mov(cr0, eax).unwrap();
    a.db(&[0xea]).unwrap();
    a.db(&(long as u32).to_le_bytes()).unwrap();
    a.db(&KERNEL_CODE.to_le_bytes()).unwrap();
    rig.memory.write(protected, &a.assemble(protected).unwrap()).unwrap();
    let code = assemble(long, |a| {
        a.mov(rax, 0x1122_3344_5566_7788u64).unwrap();
        a.mov(rdi, cr0).unwrap();
        a.hlt().unwrap();
    });
    rig.memory.write(long, &code).unwrap();
    let mut s = CpuState::reset();
    s.segments[1].selector = (real >> 4) as u16;
    s.segments[1].base = real;
    s.rip = 0;
    rig.cpu.set_state(&s);
    let end = rig.run();
    assert_eq!(end.gpr[0], 0x1122_3344_5566_7788);
    assert_eq!(end.gpr[6], 0x1234_5678);
    assert_eq!(end.gpr[7], 0x8000_0011);
    assert_eq!(end.msrs.efer & 0x500, 0x500);
}

#[test]
fn real_mode_interrupts_use_the_vector_table() {
    let mut rig = Rig::new();
    rig.memory.write(0x21 * 4, &[0x34, 0x12, 0x00, 0x10]).unwrap();
    rig.memory.write(0x1_1234, &[0x41, 0xcf]).unwrap(); // inc cx; iret
    let code = assemble_16(0x7c00, |a| {
        a.mov(sp, 0x7000).unwrap();
        a.int(0x21).unwrap();
        a.int(0x21).unwrap();
        a.hlt().unwrap();
    });
    rig.memory.write(0x7c00, &code).unwrap();
    let mut s = CpuState::reset();
    s.segments[1].selector = 0;
    s.segments[1].base = 0;
    s.rip = 0x7c00;
    s.gpr = [0; 16];
    rig.cpu.set_state(&s);
    let end = rig.run();
    assert_eq!((end.gpr[1], end.gpr[4]), (2, 0x7000));
}

/// "Unreal" mode: a segment limit loaded in protected mode stays in real mode.
#[test]
fn real_mode_keeps_large_limits() {
    let mut rig = Rig::new();
    let code = [0x66, 0x67, 0xa1, 0x00, 0x00, 0x20, 0x00, 0xf4]; // mov eax, [dword 0x200000]; hlt
    rig.memory.write(0x7c00, &code).unwrap();
    rig.put(0x20_0000, 0xcafe);
    let mut s = CpuState::reset();
    s.segments[1].base = 0;
    s.rip = 0x7c00;
    s.idtr.limit = 0;
    rig.cpu.set_state(&s);
    assert_eq!(rig.cpu.run(Budget::instructions(10)), Exit::TripleFault, "beyond the limit");
    s.segments[3].limit = 0xffff_ffff;
    rig.cpu.set_state(&s);
    assert_eq!(rig.run().gpr[0], 0xcafe);
}

#[test]
fn compatibility_mode_has_32_bit_addresses() {
    let mut rig = Rig::new();
    rig.put(GDT + 0x28, 0x00cf_fb00_0000_ffff);
    let mut s = Rig::user_mode();
    s.segments[1] = flat(0x2b, 0xc0fb);
    s.gpr[3] = 0xffff_ffff_0000_0000 | USER_STACK;
    rig.put(USER_STACK, 0x55aa);
    // mov eax, [ebx]; dec ebx (0x4b, a REX prefix in 64-bit mode); ud2
    rig.memory.write(CODE, &[0x8b, 0x03, 0x4b, 0x0f, 0x0b]).unwrap();
    rig.cpu.set_state(&s);
    let end = rig.run();
    assert_eq!((end.gpr[0], end.gpr[3]), (0x55aa, USER_STACK - 1));
    assert_eq!(rig.frame().map(|f| (f.vector, f.cs)), Some((6, 0x2b)));
}

#[test]
fn a_start_up_ipi_starts_a_waiting_processor() {
    let mut rig = Rig::new();
    rig.memory.write(0x3_4000, &[0xb8, 0x34, 0x12, 0xf4]).unwrap();
    let handle = rig.cpu.handle();
    let mut s = Rig::long_mode();
    s.mp_state = MpState::WaitForSipi;
    rig.cpu.set_state(&s);
    assert_eq!(rig.cpu.run(Budget::instructions(10)), Exit::Halted);
    assert_eq!(rig.cpu.state().mp_state, MpState::WaitForSipi);
    // INIT resets the bootstrap processor to its reset vector.
    handle.init();
    rig.cpu.run(Budget::instructions(0));
    assert_eq!(rig.cpu.state().segments[1].base, 0xffff_0000);
    s.mp_state = MpState::WaitForSipi;
    s.segments = CpuState::reset().segments;
    (s.cr0, s.msrs.efer) = (0x10, 0);
    rig.cpu.set_state(&s);
    handle.sipi(0x34);
    let end = rig.run();
    assert_eq!((end.gpr[0], end.segments[1].selector), (0x1234, 0x3400));
}

/// INIT takes a running processor out of whatever it does; a start-up IPI is for processors that wait for one.
#[test]
fn init_stops_a_running_processor() {
    let mut rig = Rig::with_config(CpuConfig {
        index: 1,
        apic_id: 1,
        bootstrap: false,
        ..CpuConfig::new(std::sync::Arc::new(softcpu::Clock::host(1_000_000)))
    });
    rig.memory.write(0x3_4000, &[0xb8, 0x34, 0x12, 0xf4]).unwrap();
    rig.code(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(rax).unwrap();
        a.jmp(again).unwrap();
    });
    let mut s = Rig::long_mode();
    s.msrs.lstar = 0x1234;
    s.dr[7] = 0x402;
    rig.cpu.set_state(&s);
    let handle = rig.cpu.handle();
    rig.cpu.run(Budget::instructions(1000));
    handle.sipi(0x34);
    rig.cpu.run(Budget::instructions(1000));
    let still = rig.cpu.state();
    assert_eq!((still.mp_state, still.segments[1].selector), (MpState::Running, KERNEL_CODE), "ignored");
    assert!(still.gpr[0] > 900);
    handle.init();
    assert_eq!(rig.cpu.run(Budget::instructions(10)), Exit::Halted);
    let after = rig.cpu.state();
    assert_eq!(after.mp_state, MpState::WaitForSipi);
    assert_eq!((after.cr0 & 0x8000_0001, after.msrs.efer, after.gpr[0], after.dr[7]), (0, 0, 0, 0x400));
    assert_eq!(after.msrs.lstar, 0x1234, "INIT leaves model-specific registers alone");
    // Not even an NMI wakes it, and a second INIT only takes that back.
    for event in [softcpu::CpuHandle::nmi, softcpu::CpuHandle::init] {
        event(&handle);
        assert_eq!(rig.cpu.run(Budget::instructions(10)), Exit::Halted);
        assert_eq!(rig.cpu.state().mp_state, MpState::WaitForSipi);
    }
    handle.sipi(0x34);
    rig.cpu.run(Budget { wait: false, instructions: 2 });
    let end = rig.cpu.state();
    assert_eq!((end.gpr[0], end.segments[1].selector), (0x1234, 0x3400));
}

/// A processor in shutdown reacts to INIT.
#[test]
fn init_ends_a_shutdown() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    s.idtr.limit = 0;
    rig.code(|a| a.ud2().unwrap());
    rig.cpu.set_state(&s);
    assert_eq!(rig.cpu.run(Budget::UNLIMITED), Exit::TripleFault);
    rig.cpu.handle().init();
    rig.cpu.run(Budget::instructions(0));
    let after = rig.cpu.state();
    assert_eq!((after.mp_state, after.rip, after.segments[1].base), (MpState::Running, 0xfff0, 0xffff_0000));
}
