//! Paging: permissions, accessed and dirty bits, translation caches.

use iced_x86::code_asm::*;

use super::rig::*;
use softcpu::CpuState;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    Execute,
}

fn access(rig: &mut Rig, state: &CpuState, access: Access, address: u64) -> Option<(u8, Option<u64>, u64)> {
    let mut s = state.clone();
    s.gpr[3] = address;
    rig.fault(&s, |a| {
        match access {
            Access::Read => a.mov(rax, qword_ptr(rbx)).unwrap(),
            Access::Write => a.mov(qword_ptr(rbx), rax).unwrap(),
            Access::Execute => a.jmp(rbx).unwrap(),
        }
        // Only the kernel may halt: everyone ends in vector 0x80.
        a.int(0x80).unwrap();
    })
}

/// The error code that the architecture asks for, or `None` if the access is allowed.
fn expected(flags: u64, access: Access, user: bool, wp: bool) -> Option<u64> {
    let mut error = if user { 4 } else { 0 };
    match access {
        Access::Read => {}
        Access::Write => error |= 2,
        Access::Execute => error |= 16,
    }
    if flags & P == 0 {
        return Some(error);
    }
    if flags & 1 << 51 != 0 {
        return Some(error | 9);
    }
    let denied = user && flags & US == 0
        || access == Access::Write && flags & RW == 0 && (user || wp)
        || access == Access::Execute && flags & NX != 0;
    denied.then_some(error | 1)
}

#[test]
fn every_permission_is_checked() {
    let mut rig = Rig::new();
    rig.gate(0x80, HANDLERS + 0x800, 0xee, 0);
    let flags = [0, P].into_iter().flat_map(|p| [0, RW].map(|w| p | w));
    let flags = flags.flat_map(|f| [0, US].map(|u| f | u)).flat_map(|f| [0, NX].map(|n| f | n));
    for flags in flags.flat_map(|f| [0, 1 << 51].map(|r| f | r)) {
        for kind in [Access::Read, Access::Write, Access::Execute] {
            for (user, wp) in [(false, false), (false, true), (true, false), (true, true)] {
                rig.window(0, flags);
                // What execution finds in the window: INT 0x80.
                rig.memory.write(WINDOW_RAM, &[0xcd, 0x80]).unwrap();
                let mut s = if user { Rig::user_mode() } else { Rig::long_mode() };
                if !wp {
                    s.cr0 &= !(1 << 16);
                }
                let got = access(&mut rig, &s, kind, WINDOW).unwrap();
                let what = format!("{kind:?} user {user} wp {wp} entry {flags:#x}");
                match expected(flags, kind, user, wp) {
                    None => assert_eq!(got.0, 0x80, "{what}"),
                    Some(error) => {
                        assert_eq!((got.0, got.1), (14, Some(error)), "{what}");
                        assert_eq!(rig.cpu.state().cr2, WINDOW, "{what}");
                        let at = if kind == Access::Execute { WINDOW - CODE } else { 0 };
                        assert_eq!(got.2, at, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn smep_keeps_the_kernel_out_of_user_pages() {
    let mut rig = Rig::new();
    rig.memory.write(WINDOW_RAM, &[0xf4]).unwrap();
    rig.window(0, P | RW | US);
    // The code itself must be a supervisor page then.
    let mut s = Rig::long_mode();
    s.cr4 |= 1 << 20;
    rig.put(0x6000, 0x80 | P | RW);
    assert_eq!(access(&mut rig, &s, Access::Execute, WINDOW).map(|f| (f.0, f.1)), Some((14, Some(17))));
}

#[test]
fn accessed_and_dirty_bits_are_set() {
    let mut rig = Rig::new();
    rig.window(0, P | RW);
    access(&mut rig, &Rig::long_mode(), Access::Read, WINDOW);
    assert_eq!(rig.get(WINDOW_PT) & (A | D), A);
    access(&mut rig, &Rig::long_mode(), Access::Write, WINDOW);
    assert_eq!(rig.get(WINDOW_PT) & (A | D), A | D);
    assert_ne!(rig.get(PML4) & A, 0);
}

/// A read makes the translation known; the first write through it still has to set the dirty bit.
#[test]
fn a_write_after_a_read_sets_the_dirty_bit() {
    let mut rig = Rig::new();
    rig.window(0, P | RW);
    let mut s = Rig::long_mode();
    s.gpr[3] = WINDOW;
    rig.execute(&s, |a| {
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.mov(qword_ptr(rbx), rax).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(rig.get(WINDOW_PT) & (A | D), A | D);
}

#[test]
fn invlpg_and_cr3_end_old_translations() {
    for (global, flush_by_cr3, sees_new) in [(false, true, true), (true, true, false), (true, false, true)] {
        let mut rig = Rig::new();
        rig.window(0, P | RW | if global { G } else { 0 });
        rig.put(WINDOW_RAM, 1);
        rig.put(WINDOW_RAM + 0x1000, 2);
        let mut s = Rig::long_mode();
        s.gpr[3] = WINDOW;
        s.gpr[6] = WINDOW_PT;
        let end = rig.execute(&s, |a| {
            a.mov(rax, qword_ptr(rbx)).unwrap();
            a.mov(rdx, qword_ptr(rsi)).unwrap();
            a.add(rdx, 0x1000).unwrap();
            a.mov(qword_ptr(rsi), rdx).unwrap();
            if flush_by_cr3 {
                a.mov(rcx, cr3).unwrap();
                a.mov(cr3, rcx).unwrap();
            } else {
                a.invlpg(byte_ptr(rbx)).unwrap();
            }
            a.mov(rdi, qword_ptr(rbx)).unwrap();
            a.hlt().unwrap();
        });
        assert_eq!(end.gpr[0], 1);
        assert_eq!(end.gpr[7], if sees_new { 2 } else { 1 }, "global {global}, CR3 {flush_by_cr3}");
    }
}

#[test]
fn an_access_across_pages_is_all_or_nothing() {
    let mut rig = Rig::new();
    rig.window(0, P | RW);
    rig.window(1, 0);
    let mut s = Rig::long_mode();
    s.gpr[0] = u64::MAX;
    let at = WINDOW + 0xffd;
    assert_eq!(access(&mut rig, &s, Access::Write, at), Some((14, Some(2), 0)));
    assert_eq!(rig.cpu.state().cr2, WINDOW + 0x1000);
    assert_eq!(rig.get(WINDOW_RAM + 0xff8), 0);
    rig.window(1, P | RW);
    access(&mut rig, &s, Access::Write, at);
    assert_eq!(rig.get(WINDOW_RAM + 0xff8), 0xffff_ff00_0000_0000);
    assert_eq!(rig.get(WINDOW_RAM + 0x1000), 0xff_ffff_ffff);
}

#[test]
fn a_repeated_store_stops_at_the_fault_and_goes_on() {
    let mut rig = Rig::new();
    rig.window(0, P | RW);
    rig.window(1, 0);
    let mut s = Rig::long_mode();
    (s.gpr[0], s.gpr[1], s.gpr[7]) = (0xab, 0x1800, WINDOW);
    rig.execute(&s, |a| {
        a.rep().stosb().unwrap();
        a.hlt().unwrap();
    });
    let frame = rig.frame().unwrap();
    assert_eq!((frame.vector, frame.rip), (14, CODE));
    let state = rig.cpu.state();
    assert_eq!((state.gpr[1], state.gpr[7]), (0x800, WINDOW + 0x1000));
    rig.window(1, P | RW);
    let mut again = s.clone();
    (again.gpr[1], again.gpr[7]) = (state.gpr[1], state.gpr[7]);
    rig.cpu.set_state(&again);
    let end = rig.run();
    assert_eq!((end.gpr[1], end.gpr[7]), (0, WINDOW + 0x1800));
    assert_eq!(rig.get(WINDOW_RAM + 0x17f8), 0xabab_abab_abab_abab);
    assert_eq!(rig.get(WINDOW_RAM + 0x1800), 0);
}
