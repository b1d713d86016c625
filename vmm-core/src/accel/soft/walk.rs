//! Page table walks for debuggers: no access rights, no accessed and dirty bits.

use crate::accel::CpuState;
use crate::memory::GuestMemory;

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The guest-physical address of `linear`, or `None` when it is not mapped.
pub(super) fn translate(memory: &GuestMemory, state: &CpuState, linear: u64) -> Option<u64> {
    if state.cr0 & CR0_PG == 0 {
        return Some(linear & 0xffff_ffff);
    }
    if state.msrs.efer & EFER_LMA != 0 {
        return walk(memory, state.cr3 & ADDRESS, linear, 4);
    }
    let linear = linear & 0xffff_ffff;
    if state.cr4 & CR4_PAE != 0 {
        let directory = state.pdptes[(linear >> 30) as usize];
        return (directory & PRESENT != 0).then(|| walk(memory, directory & ADDRESS, linear, 2)).flatten();
    }
    let entry = memory.read_obj::<u32>((state.cr3 & 0xffff_f000) + (linear >> 22) * 4).ok()?;
    if u64::from(entry) & PRESENT == 0 {
        return None;
    }
    if u64::from(entry) & LARGE != 0 {
        return Some(u64::from(entry & 0xffc0_0000) | linear & 0x3f_ffff);
    }
    let page = memory.read_obj::<u32>(u64::from(entry & 0xffff_f000) + (linear >> 12 & 1023) * 4).ok()?;
    (u64::from(page) & PRESENT != 0).then(|| u64::from(page & 0xffff_f000) | linear & 0xfff)
}

/// Walks `levels` levels of 64-bit entries.
fn walk(memory: &GuestMemory, mut table: u64, linear: u64, levels: u32) -> Option<u64> {
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let entry = memory.read_obj::<u64>(table + (linear >> shift & 511) * 8).ok()?;
        if entry & PRESENT == 0 {
            return None;
        }
        let offset = (1u64 << shift) - 1;
        if level == 0 || level < 3 && entry & LARGE != 0 {
            return Some(entry & ADDRESS & !offset | linear & offset);
        }
        table = entry & ADDRESS;
    }
    None
}
