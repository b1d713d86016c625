//! Segments, descriptor tables and system registers of long mode.

use iced_x86::code_asm::*;

use super::rig::*;

const CR4_FSGSBASE: u64 = 1 << 16;
const NON_CANONICAL: u64 = 0x8000_0000_0000_0000;
/// A descriptor that tests fill.
const SPARE: u64 = 0x28;

#[test]
fn bases_of_fs_and_gs_can_be_read_and_written() {
    let mut rig = Rig::new();
    let mut s = Rig::user_mode();
    s.cr4 |= CR4_FSGSBASE;
    s.gpr[3] = WINDOW_RAM;
    rig.put(WINDOW_RAM + 0x20, 0x1111);
    rig.put(WINDOW_RAM + 0x120, 0x2222);
    rig.execute(&s, |a| {
        a.wrfsbase(rbx).unwrap();
        a.lea(rcx, qword_ptr(rbx + 0x100)).unwrap();
        a.wrgsbase(rcx).unwrap();
        a.mov(rsi, qword_ptr(0x20).fs()).unwrap();
        a.mov(rdi, qword_ptr(0x20).gs()).unwrap();
        a.rdfsbase(r8).unwrap();
        a.rdgsbase(r9).unwrap();
        a.mov(r10, -1i64).unwrap();
        a.rdgsbase(r10d).unwrap();
        a.ud2().unwrap();
    });
    let end = rig.cpu.state();
    assert_eq!((end.gpr[6], end.gpr[7]), (0x1111, 0x2222));
    assert_eq!((end.gpr[8], end.gpr[9], end.gpr[10]), (WINDOW_RAM, WINDOW_RAM + 0x100, WINDOW_RAM + 0x100));
    s.gpr[3] = NON_CANONICAL;
    assert_eq!(rig.fault(&s, |a| a.wrgsbase(rbx).unwrap()), Some((13, Some(0), 0)));
    s.cr4 &= !CR4_FSGSBASE;
    assert_eq!(rig.fault(&s, |a| a.rdfsbase(rbx).unwrap()), Some((6, None, 0)));
}

#[test]
fn swapgs_exchanges_the_base() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    s.segments[5].base = 0x1000;
    s.msrs.kernel_gs_base = WINDOW_RAM;
    rig.put(WINDOW_RAM + 8, 0x77);
    let end = rig.execute(&s, |a| {
        a.swapgs().unwrap();
        a.mov(rsi, qword_ptr(8).gs()).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((end.gpr[6], end.segments[5].base, end.msrs.kernel_gs_base), (0x77, WINDOW_RAM, 0x1000));
}

/// A null stack segment is for the kernel alone, and with the RPL of its privilege level.
#[test]
fn the_stack_segment_may_be_null() {
    let mut rig = Rig::new();
    let load = |selector: u16| {
        move |a: &mut CodeAssembler| {
            a.mov(eax, u32::from(selector)).unwrap();
            a.mov(ss, eax).unwrap();
            a.push(rax).unwrap();
            a.pop(rbx).unwrap();
            a.int(0x80).unwrap();
        }
    };
    rig.gate(0x80, HANDLERS + 0x800, 0xee, 0);
    let (kernel, user) = (Rig::long_mode(), Rig::user_mode());
    for (state, selector, expected) in [
        (&kernel, 0, (0x80, None)),
        (&kernel, 3, (13, Some(0))),
        (&kernel, KERNEL_DATA | 3, (13, Some(u64::from(KERNEL_DATA)))),
        (&kernel, KERNEL_CODE, (13, Some(u64::from(KERNEL_CODE)))),
        (&user, 3, (13, Some(0))),
        (&user, USER_DATA, (0x80, None)),
    ] {
        assert_eq!(rig.fault(state, load(selector)).map(|f| (f.0, f.1)), Some(expected), "{selector:#x}");
    }
    // Programs cannot load what belongs to the kernel.
    let fs_of_kernel = |a: &mut CodeAssembler| {
        a.mov(eax, u32::from(KERNEL_DATA)).unwrap();
        a.mov(fs, eax).unwrap();
    };
    assert_eq!(rig.fault(&user, fs_of_kernel), Some((13, Some(u64::from(KERNEL_DATA)), 5)));
}

/// LAR, LSL, VERR and VERW for descriptors of each kind, seen from both privilege levels.
#[test]
fn descriptors_can_be_inspected() {
    let mut rig = Rig::new();
    rig.gate(0x80, HANDLERS + 0x800, 0xee, 0);
    // Type and S of a descriptor; whether LAR and LSL, VERR, VERW know it, for the kernel.
    let kinds: [(u64, [bool; 4]); 12] = [
        (0x10, [true, true, true, false]),    // data, read-only
        (0x12, [true, true, true, true]),     // data, writable
        (0x18, [true, true, false, false]),   // code, execute-only
        (0x1a, [true, true, true, false]),    // code, readable
        (0x1e, [true, true, true, false]),    // code, conforming
        (0x02, [true, true, false, false]),   // LDT
        (0x09, [true, true, false, false]),   // available TSS
        (0x0b, [true, true, false, false]),   // busy TSS
        (0x0c, [true, false, false, false]),  // call gate
        (0x0e, [false, false, false, false]), // interrupt gate
        (0x01, [false, false, false, false]), // 16-bit TSS
        (0x05, [false, false, false, false]), // task gate
    ];
    for (kind, known) in kinds {
        for (dpl, user) in [(0, false), (3, false), (0, true), (3, true)] {
            let access = 0x80 | dpl << 5 | kind;
            // Limit 0x12345, counted in bytes.
            rig.put(GDT + SPARE, 0x2345 | access << 40 | 1 << 48);
            rig.put(GDT + SPARE + 8, 0);
            let s = if user { Rig::user_mode() } else { Rig::long_mode() };
            rig.execute(&s, |a| {
                a.mov(ecx, SPARE as u32).unwrap();
                a.mov(eax, 0x5555).unwrap();
                a.mov(ebx, 0x5555).unwrap();
                a.lar(eax, ecx).unwrap();
                a.setz(sil).unwrap();
                a.lsl(ebx, ecx).unwrap();
                a.setz(dil).unwrap();
                a.verr(cx).unwrap();
                a.setz(r8b).unwrap();
                a.verw(cx).unwrap();
                a.setz(r9b).unwrap();
                a.int(0x80).unwrap();
            });
            let end = rig.cpu.state();
            let conforming = kind == 0x1e;
            let wanted = known.map(|known| known && (!user || dpl == 3 || conforming));
            let found = [6, 7, 8, 9].map(|register: usize| end.gpr[register] & 0xff != 0);
            let what = format!("type {kind:#x}, DPL {dpl}, user {user}");
            assert_eq!(found, wanted, "{what}");
            assert_eq!(end.gpr[0], if wanted[0] { access << 8 | 1 << 16 } else { 0x5555 }, "{what}");
            assert_eq!(end.gpr[3], if wanted[1] { 0x1_2345 } else { 0x5555 }, "{what}");
        }
        rig.put(GDT + 0x30, 0x67 | (TSS & 0xffff) << 16 | 0x89 << 40);
        rig.put(GDT + 0x38, 0);
    }
}

#[test]
fn tables_and_registers_can_be_stored() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    s.gpr[3] = WINDOW_RAM;
    s.ldtr.selector = 0x48;
    let end = rig.execute(&s, |a| {
        a.sgdt(byte_ptr(rbx)).unwrap();
        a.sidt(byte_ptr(rbx + 16)).unwrap();
        a.mov(rsi, -1i64).unwrap();
        a.str(esi).unwrap();
        a.sldt(dword_ptr(rbx + 32)).unwrap();
        a.mov(rdi, -1i64).unwrap();
        a.smsw(rdi).unwrap();
        a.mov(r8, -1i64).unwrap();
        a.smsw(r8w).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(rig.get(WINDOW_RAM), 0x3f | GDT << 16);
    assert_eq!(rig.get(WINDOW_RAM + 16), 0xfff | IDT << 16);
    assert_eq!((end.gpr[6], rig.get(WINDOW_RAM + 32)), (u64::from(TASK), 0x48));
    assert_eq!((end.gpr[7], end.gpr[8]), (s.cr0, 0xffff_ffff_ffff_0000 | s.cr0 & 0xffff));
}

#[test]
fn tables_can_be_loaded() {
    let mut rig = Rig::new();
    let mut s = Rig::long_mode();
    s.gpr[3] = WINDOW_RAM;
    rig.put(WINDOW_RAM, 0x1f | (GDT + 0x100) << 16);
    rig.put(GDT + 0x108, rig.get(GDT + 8));
    // A system descriptor of 16 bytes for the LDT.
    rig.put(GDT + 0x110, 0xf | (WINDOW_RAM & 0xff_ffff) << 16 | 0x82 << 40);
    rig.put(GDT + 0x118, 0x1234);
    let end = rig.execute(&s, |a| {
        a.lgdt(byte_ptr(rbx)).unwrap();
        a.mov(eax, 0x10).unwrap();
        a.lldt(ax).unwrap();
        a.mov(rax, cr0).unwrap();
        a.mov(ecx, 0xe).unwrap();
        a.lmsw(cx).unwrap();
        a.mov(rdx, cr0).unwrap();
        a.clts().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((end.gdtr.base, end.gdtr.limit), (GDT + 0x100, 0x1f));
    assert_eq!((end.ldtr.base, end.ldtr.limit), (0x1234_0000_0000 | WINDOW_RAM, 0xf));
    assert_eq!(end.gpr[2], end.gpr[0] | 0xf, "LMSW sets MP, EM and TS, and cannot clear PE");
    assert_eq!(end.cr0, (end.gpr[0] | 0xf) & !8, "CLTS");
    rig.put(WINDOW_RAM + 2, NON_CANONICAL);
    assert_eq!(rig.fault(&s, |a| a.lidt(byte_ptr(rbx)).unwrap()), Some((13, Some(0), 0)));
}

/// Bits that do not exist, and combinations that are not allowed.
#[test]
fn control_registers_refuse_what_does_not_exist() {
    let mut rig = Rig::new();
    let s = Rig::long_mode();
    type Write = fn(&mut CodeAssembler);
    let refused: [Write; 9] = [
        // Paging without protection, NW without CD, upper bits.
        |a| a.btr(rax, 0).unwrap(),
        |a| a.bts(rax, 29).unwrap(),
        |a| a.bts(rax, 32).unwrap(),
        // Paging cannot be switched off in 64-bit mode.
        |a| a.btr(rax, 31).unwrap(),
        |a| a.bts(rax, 63).unwrap(),
        |a| a.bts(rax, 40).unwrap(),
        |a| a.bts(rax, 33).unwrap(),
        |a| a.bts(rax, 50).unwrap(),
        |a| a.bts(rax, 62).unwrap(),
    ];
    for write in refused {
        rig.execute(&s, |a| {
            a.mov(rax, cr0).unwrap();
            write(a);
            a.mov(cr0, rax).unwrap();
        });
        assert_eq!(rig.frame().map(|f| (f.vector, f.error)), Some((13, Some(0))));
        assert_eq!(rig.cpu.state().cr0, s.cr0);
    }
    // CR4.PAE holds long mode up; CR3 has no more address bits than CPUID says.
    let pae = |a: &mut CodeAssembler| {
        a.mov(rax, cr4).unwrap();
        a.btr(rax, 5).unwrap();
        a.mov(cr4, rax).unwrap();
    };
    assert_eq!(rig.fault(&s, pae).map(|f| f.0), Some(13));
    let wide = |a: &mut CodeAssembler| {
        a.mov(rax, cr3).unwrap();
        a.bts(rax, 51).unwrap();
        a.mov(cr3, rax).unwrap();
    };
    assert_eq!(rig.fault(&s, wide).map(|f| f.0), Some(13));
    // CR8 has four bits, CR1 and CR5 do not exist.
    let priority = |a: &mut CodeAssembler| {
        a.mov(eax, 0x10).unwrap();
        a.mov(cr8, rax).unwrap();
    };
    assert_eq!(rig.fault(&s, priority).map(|f| f.0), Some(13));
    for number in [1u8, 5, 7] {
        let read = |a: &mut CodeAssembler| a.db(&[0x0f, 0x20, 0xc0 | number << 3]).unwrap();
        assert_eq!(rig.fault(&s, read).map(|f| f.0), Some(6), "CR{number}");
    }
}

/// Model-specific registers keep what fits, and fault for what does not.
#[test]
fn msrs_are_checked() {
    let mut rig = Rig::new();
    let s = Rig::long_mode();
    let mut write = |msr: u32, value: u64| {
        rig.fault(&s, |a| {
            a.mov(ecx, msr).unwrap();
            a.mov(eax, value as u32).unwrap();
            a.mov(edx, (value >> 32) as u32).unwrap();
            a.wrmsr().unwrap();
            a.rdmsr().unwrap();
            a.hlt().unwrap();
        });
        let end = rig.cpu.state();
        match rig.frame() {
            Some(frame) => Err((frame.vector, frame.error)),
            None => Ok(end.gpr[2] << 32 | end.gpr[0]),
        }
    };
    let canonical = 0x0000_1234_5678_9abc;
    for msr in [0xc000_0082, 0xc000_0083, 0xc000_0100, 0xc000_0101, 0xc000_0102, 0x175, 0x176] {
        assert_eq!(write(msr, canonical), Ok(canonical), "{msr:#x}");
        assert_eq!(write(msr, NON_CANONICAL), Err((13, Some(0))), "{msr:#x}");
    }
    assert_eq!(write(0x174, 0x1234), Ok(0x1234));
    assert_eq!(write(0x277, 0x0007_0406_0007_0401), Ok(0x0007_0406_0007_0401));
    assert_eq!(write(0x277, 2), Err((13, Some(0))), "a memory type that does not exist");
    assert_eq!(write(0xc000_0080, 0xd01 | 1 << 16), Err((13, Some(0))), "an unknown bit of EFER");
    assert_eq!(
        write(0xc000_0080, 0x800),
        Err((13, Some(0))),
        "long mode cannot be switched off under paging"
    );
    // What CPUID does not announce: speculation control, memory type ranges, performance counters.
    for msr in [0x48, 0x49, 0x200, 0x2ff, 0xc1, 0xc001_0200, 0x1d9] {
        assert_eq!(write(msr, 0), Err((13, Some(0))), "{msr:#x}");
    }
}
