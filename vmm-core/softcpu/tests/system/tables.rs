//! Page tables of every format against a model of what the architecture says: permissions that combine over the
//! levels, reserved bits, accessed and dirty bits.

use iced_x86::code_asm::*;

use super::protected::{self, Protected};
use super::rig::*;
use softcpu::CpuState;

const SMEP: u64 = 1 << 20;
const WP: u64 = 1 << 16;
const NXE: u64 = 1 << 11;
/// A large page.
const PS: u64 = 1 << 7;
/// Address bits that the processor does not have.
const BEYOND: u64 = 1 << 51;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    Execute,
}

const ACCESSES: [Access; 3] = [Access::Read, Access::Write, Access::Execute];

/// What paging depends on beside the entries.
#[derive(Debug, Clone, Copy)]
struct Regime {
    user: bool,
    wp: bool,
    smep: bool,
    nxe: bool,
}

/// All but those with SMEP and user code: handlers and user code share a page here.
fn regimes() -> impl Iterator<Item = Regime> {
    (0..16u32)
        .map(|n| Regime { user: n & 1 != 0, wp: n & 2 != 0, smep: n & 4 != 0, nxe: n & 8 != 0 })
        .filter(|regime| !(regime.user && regime.smep))
}

/// The error code of an access through `entries`, from the root to the page, or `None` if it is allowed.
fn model(entries: &[u64], access: Access, regime: Regime, has_nx: bool) -> Option<u64> {
    let Regime { user, wp, smep, nxe } = regime;
    let nx_on = nxe && has_nx;
    let mut error = u64::from(user) << 2;
    error |= match access {
        Access::Read => 0,
        Access::Write => 2,
        Access::Execute => u64::from(nx_on || smep) << 4,
    };
    for entry in entries {
        if entry & P == 0 {
            return Some(error);
        }
        if entry & BEYOND != 0 || has_nx && !nxe && entry & NX != 0 {
            return Some(error | 9);
        }
    }
    let all = entries.iter().fold(u64::MAX, |all, entry| all & entry);
    let never_execute = has_nx && entries.iter().any(|entry| entry & NX != 0);
    let denied = user && all & US == 0
        || access == Access::Write && all & RW == 0 && (user || wp)
        || access == Access::Execute && (never_execute || smep && !user && all & US != 0);
    denied.then_some(error | 1)
}

/// The vectors of the code that [`code`] assembles: a page fault, or INT 0x80 behind the access.
fn code(access: Access) -> impl Fn(&mut CodeAssembler) {
    move |a| {
        match access {
            Access::Read => a.mov(rax, qword_ptr(rbx)).unwrap(),
            Access::Write => a.mov(qword_ptr(rbx), rax).unwrap(),
            Access::Execute => a.jmp(rbx).unwrap(),
        }
        a.int(0x80).unwrap();
    }
}

/// A page of its own root entry, so that changes of it leave the code alone.
const PAGE: u64 = 1 << 39 | 3 << 30 | 5 << 21 | 7 << 12;
/// The entries that lead to it.
const SLOTS: [u64; 4] = [PML4 + 8, 0x10_0000 + 8 * 3, 0x10_1000 + 8 * 5, 0x10_2000 + 8 * 7];
/// What they contain beside flags.
const TARGETS: [u64; 4] = [0x10_0000, 0x10_1000, 0x10_2000, WINDOW_RAM];

fn state(regime: Regime) -> CpuState {
    let mut s = if regime.user { Rig::user_mode() } else { Rig::long_mode() };
    s.cr0 = s.cr0 & !WP | if regime.wp { WP } else { 0 };
    s.cr4 |= if regime.smep { SMEP } else { 0 };
    s.msrs.efer = s.msrs.efer & !NXE | if regime.nxe { NXE } else { 0 };
    s.gpr[3] = PAGE;
    s
}

/// Runs one access through entries with these flags, and compares everything with the model.
fn check(rig: &mut Rig, flags: [u64; 4], access: Access, regime: Regime) {
    for (slot, (target, flags)) in SLOTS.into_iter().zip(TARGETS.into_iter().zip(flags)) {
        rig.put(slot, target | flags);
    }
    // With SMEP the kernel's code must not be the user's.
    rig.put(0x6000, PS | P | RW | if regime.user { US } else { 0 });
    rig.cpu.set_state(&state(regime));
    rig.run();
    let frame = rig.frame().unwrap();
    let what = format!("{access:?}, {regime:?}, entries {flags:x?}");
    let wanted = model(&flags, access, regime, true);
    match wanted {
        None => assert_eq!(frame.vector, 0x80, "{what}"),
        Some(error) => {
            assert_eq!((frame.vector, frame.error), (14, Some(error)), "{what}");
            assert_eq!(rig.cpu.state().cr2, PAGE, "{what}");
        }
    }
    let after = SLOTS.map(|slot| rig.get(slot));
    if wanted.is_none() {
        assert!(after.iter().all(|entry| entry & A != 0), "{what}: not accessed");
    }
    let written = wanted.is_none() && access == Access::Write;
    assert_eq!(after[3] & D != 0, written, "{what}: dirty");
    assert!(after[..3].iter().all(|entry| entry & D == 0), "{what}: a table is dirty");
}

fn rig() -> Rig {
    let rig = Rig::new();
    // Everybody may end the access.
    rig.gate(0x80, HANDLERS + 0x800, 0xee, 0);
    rig
}

/// Execution of the page ends the access too.
fn ends_here(rig: &Rig) {
    rig.memory.write(WINDOW_RAM, &[0xcd, 0x80]).unwrap();
}

/// All permissions of the page and of the table above it.
#[test]
fn permissions_combine_over_the_levels() {
    let all = P | RW | US;
    let choices: Vec<u64> = (0..8u64).map(|n| P | (n & 3) << 1 | n >> 2 << 63).collect();
    let mut rig = rig();
    for access in ACCESSES {
        ends_here(&rig);
        rig.code(code(access));
        for regime in regimes() {
            for &table in &choices {
                for &page in &choices {
                    check(&mut rig, [all, all, table, page], access, regime);
                }
            }
        }
    }
}

/// Each permission is taken away, and each reserved bit set, at each level by itself.
#[test]
fn each_level_counts() {
    let all = P | RW | US;
    let mut rig = rig();
    for access in ACCESSES {
        ends_here(&rig);
        rig.code(code(access));
        for regime in regimes() {
            for level in 0..4 {
                for changed in [P, RW, US, NX, BEYOND] {
                    let mut flags = [all; 4];
                    flags[level] ^= changed;
                    check(&mut rig, flags, access, regime);
                }
            }
        }
    }
}

/// Pages of 2 MiB and 1 GiB: addresses, dirty bits, and the address bits that must be zero.
#[test]
fn large_pages_reach_all_their_memory() {
    let mut rig = rig();
    // The entry, the size of its page, and a reserved bit below the address.
    for (slot, size, reserved) in [(SLOTS[2], 1u64 << 21, 1u64 << 20), (SLOTS[1], 1 << 30, 1 << 29)] {
        for (slot, target) in SLOTS.into_iter().zip(TARGETS) {
            rig.put(slot, target | P | RW | US);
        }
        let base = PAGE & !(size - 1);
        rig.put(slot, PS | P | RW | US);
        let mut s = Rig::long_mode();
        s.gpr[0] = 0x5a5a;
        for offset in [0x10, 0x3_1008, 0x3f_fff0] {
            if offset >= size {
                continue;
            }
            s.gpr[3] = base + offset;
            rig.put(offset & 0x3f_ffff, 0);
            rig.execute(&s, code(Access::Write));
            assert_eq!(rig.frame().map(|f| f.vector), Some(0x80), "{size:#x}");
            assert_eq!(rig.get(offset), 0x5a5a, "{size:#x} + {offset:#x}");
        }
        assert_eq!(rig.get(slot) & (A | D), A | D);
        rig.put(slot, PS | P | RW | US | reserved);
        assert_eq!(rig.fault(&s, code(Access::Read)).map(|f| (f.0, f.1)), Some((14, Some(9))), "{size:#x}");
        // Without write permission, and for the kernel only.
        let mut user = Rig::user_mode();
        user.gpr[3] = base + 0x10;
        rig.put(slot, PS | P | US);
        assert_eq!(rig.fault(&user, code(Access::Write)).map(|f| (f.0, f.1)), Some((14, Some(7))));
        rig.put(slot, PS | P | RW);
        assert_eq!(rig.fault(&user, code(Access::Read)).map(|f| (f.0, f.1)), Some((14, Some(5))));
        // There is no large page at the root.
        rig.put(SLOTS[0], TARGETS[0] | PS | P | RW | US);
        assert_eq!(rig.fault(&s, code(Access::Read)).map(|f| (f.0, f.1)), Some((14, Some(9))));
        rig.put(SLOTS[0], TARGETS[0] | P | RW | US);
    }
}

/// 32-bit paging with 4 KiB and 4 MiB pages: all permissions of both levels.
#[test]
fn tables_of_32_bits() {
    const DIRECTORY: u64 = 0x10_3000;
    const TABLE: u64 = 0x10_4000;
    const AT: u64 = 0x4080_3000;
    let mut rig = Protected::new();
    let put =
        |rig: &Protected, at: u64, value: u64| rig.memory.write(at, &(value as u32).to_le_bytes()).unwrap();
    let (outer, inner) = (DIRECTORY + 4 * (AT >> 22), TABLE + 4 * (AT >> 12 & 1023));
    for access in ACCESSES {
        ends_here(&rig);
        rig.code(protected::access(access == Access::Write, access == Access::Execute));
        for regime in regimes() {
            for n in 0..64u64 {
                let (table, page) = (n & 7, n >> 3);
                put(&rig, DIRECTORY, PS | P | RW | if regime.user || !regime.smep { US } else { 0 });
                put(&rig, outer, TABLE | table);
                put(&rig, inner, WINDOW_RAM | page);
                let mut s = rig.state(regime.user);
                (s.gpr[3], s.cr3, s.cr4) = (AT, DIRECTORY, 0x10 | if regime.smep { SMEP } else { 0 });
                s.cr0 |= 1 << 31 | if regime.wp { WP } else { 0 };
                s.msrs.efer = if regime.nxe { NXE } else { 0 };
                let found = rig.run(&s);
                let what = format!("{access:?}, {regime:?}, entries {table:x} {page:x}");
                match model(&[table, page], access, regime, false) {
                    None => assert_eq!(found.vector, 0x80, "{what}"),
                    Some(error) => {
                        assert_eq!((found.vector, found.error), (14, Some(error as u32)), "{what}");
                        assert_eq!(rig.cpu.state().cr2, AT, "{what}");
                    }
                }
            }
        }
    }
    // A page of 4 MiB, and the one bit of its entry that is reserved.
    rig.code(protected::access(true, false));
    let mut s = rig.state(false);
    (s.gpr[0], s.gpr[3], s.cr3, s.cr4) = (0x77, 0x4080_5010, DIRECTORY, 0x10);
    s.cr0 |= 1 << 31;
    put(&rig, outer, PS | P | RW);
    assert_eq!(rig.run(&s).vector, 0x80);
    assert_eq!((rig.get(0x5010) as u32, rig.get(outer) & (A | D)), (0x77, A | D));
    put(&rig, outer, PS | P | RW | 1 << 21);
    let fault = rig.run(&s);
    assert_eq!((fault.vector, fault.error), (14, Some(0xb)));
    // Without CR4.PSE it is no page.
    s.cr4 = 0;
    put(&rig, DIRECTORY, TABLE | P | RW);
    for page in 0..64 {
        put(&rig, TABLE + 4 * page, page << 12 | P | RW);
    }
    put(&rig, outer, TABLE | PS | P | RW);
    put(&rig, TABLE + 4 * 5, WINDOW_RAM | P | RW);
    assert_eq!(rig.run(&s).vector, 0x80);
    assert_eq!(rig.get(WINDOW_RAM + 0x10) as u32, 0x77);
}

/// PAE paging: all permissions of both levels below the pointers, which CR3 loads.
#[test]
fn tables_with_physical_address_extension() {
    const POINTERS: u64 = 0x10_3020;
    const DIRECTORY: u64 = 0x10_4000;
    const LOW: u64 = 0x10_5000;
    const TABLE: u64 = 0x10_6000;
    const AT: u64 = 0x4080_3000;
    let mut rig = Protected::new();
    rig.put(POINTERS, LOW | P);
    rig.put(POINTERS + 8, DIRECTORY | P);
    let (outer, inner) = (DIRECTORY + 8 * (AT >> 21 & 511), TABLE + 8 * (AT >> 12 & 511));
    let flags = |n: u64| n & 7 | n >> 3 << 63;
    for access in ACCESSES {
        ends_here(&rig);
        rig.code(protected::access(access == Access::Write, access == Access::Execute));
        for regime in regimes() {
            for n in 0..256u64 {
                let (table, page) = (flags(n & 15), flags(n >> 4));
                rig.put(LOW, PS | P | RW | if regime.user || !regime.smep { US } else { 0 });
                rig.put(outer, TABLE | table);
                rig.put(inner, WINDOW_RAM | page);
                let mut s = rig.state(regime.user);
                (s.gpr[3], s.cr3, s.cr4) = (AT, POINTERS, 0x20 | if regime.smep { SMEP } else { 0 });
                s.cr0 |= 1 << 31 | if regime.wp { WP } else { 0 };
                s.msrs.efer = if regime.nxe { NXE } else { 0 };
                s.pdptes = [LOW | P, DIRECTORY | P, 0, 0];
                let found = rig.run(&s);
                let what = format!("{access:?}, {regime:?}, entries {table:x} {page:x}");
                match model(&[table, page], access, regime, true) {
                    None => assert_eq!(found.vector, 0x80, "{what}"),
                    Some(error) => {
                        assert_eq!((found.vector, found.error), (14, Some(error as u32)), "{what}");
                    }
                }
            }
        }
    }
    // The pointers are read when CR3 is written, and reserved bits in them are found then.
    let mut s = rig.state(false);
    (s.cr3, s.cr4, s.pdptes) = (POINTERS, 0x20, [LOW | P, 0, 0, 0]);
    s.cr0 |= 1 << 31;
    rig.put(LOW, PS | P | RW);
    rig.put(outer, TABLE | P | RW);
    rig.put(inner, WINDOW_RAM | P | RW);
    let reload = |a: &mut CodeAssembler| {
        a.mov(eax, cr3).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(dword_ptr(ebx), eax).unwrap();
        a.int(0x80).unwrap();
    };
    rig.code(reload);
    s.gpr[3] = AT;
    assert_eq!(rig.run(&s).vector, 0x80);
    assert_eq!(rig.get(WINDOW_RAM) as u32, POINTERS as u32);
    rig.put(POINTERS + 24, P | RW);
    let fault = rig.run(&s);
    assert_eq!((fault.vector, fault.error, fault.eip), (13, Some(0), CODE as u32 + 3));
}
