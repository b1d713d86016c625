//! Page table walks (APM volume 2, chapter 5).

use super::host;
use crate::cpu::{Cpu, Fault, vector};
use crate::memory::Region;

/// Bits of a guest-physical address, as CPUID announces.
pub(crate) const PHYSICAL_BITS: u32 = 46;

const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

pub(crate) const CR0_WP: u64 = 1 << 16;
pub(crate) const CR0_PG: u64 = 1 << 31;
pub(crate) const CR4_PSE: u64 = 1 << 4;
pub(crate) const CR4_PAE: u64 = 1 << 5;
pub(crate) const CR4_PGE: u64 = 1 << 7;
pub(crate) const CR4_SMEP: u64 = 1 << 20;
pub(crate) const EFER_NXE: u64 = 1 << 11;

/// What an access wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Execute,
}

/// The result of a walk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Translation {
    /// Guest-physical address of the 4 KiB page.
    pub page: u64,
    /// A write by the same privilege level is allowed and the dirty bit is set already.
    pub writable: bool,
    pub executable: bool,
    pub global: bool,
    pub large: bool,
}

/// Page-fault error code bits.
const ERROR_PRESENT: u32 = 1;
const ERROR_WRITE: u32 = 2;
const ERROR_USER: u32 = 4;
const ERROR_RESERVED: u32 = 8;
const ERROR_FETCH: u32 = 16;

/// Why a walk failed: the P and RSVD bits of the error code. `Retry` if a table changed under the walk.
enum Miss {
    Error(u32),
    Retry,
}

impl Cpu {
    /// Translates a linear address, setting accessed and dirty bits, or raises `#PF`. The address is
    /// canonical (64-bit mode) or below 4 GiB.
    pub(crate) fn walk(&mut self, address: u64, access: Access, user: bool) -> Result<Translation, Fault> {
        if self.cr0 & CR0_PG == 0 {
            return Ok(Translation {
                page: address & !0xfff,
                writable: true,
                executable: true,
                global: false,
                large: false,
            });
        }
        loop {
            let result = if self.cr4 & CR4_PAE != 0 {
                self.walk_long(address, access, user)
            } else {
                self.walk_32(address, access, user)
            };
            match result {
                Ok(translation) => return Ok(translation),
                Err(Miss::Retry) => {}
                Err(Miss::Error(bits)) => {
                    let mut error = bits;
                    if access == Access::Write {
                        error |= ERROR_WRITE;
                    }
                    if user {
                        error |= ERROR_USER;
                    }
                    let nx = self.cr4 & CR4_PAE != 0 && self.efer & EFER_NXE != 0;
                    if access == Access::Execute && (nx || self.cr4 & CR4_SMEP != 0) {
                        error |= ERROR_FETCH;
                    }
                    self.pending_cr2 = address;
                    return Err(self.raise(vector::PF, Some(error)));
                }
            }
        }
    }

    /// PAE and 4-level paging: 8-byte entries.
    fn walk_long(&mut self, address: u64, access: Access, user: bool) -> Result<Translation, Miss> {
        let mut reserved = ((1 << 52) - 1) & !((1 << PHYSICAL_BITS) - 1);
        if self.efer & EFER_NXE == 0 {
            reserved |= NX;
        }
        let mut permissions = RW | US;
        let mut nx = false;
        let (mut table, mut level) = if self.long_mode() {
            (self.cr3 & 0x000f_ffff_ffff_f000, 3)
        } else {
            let pdpte = self.pdptes[(address >> 30) as usize & 3];
            if pdpte & P == 0 {
                return Err(Miss::Error(0));
            }
            (pdpte & 0x000f_ffff_ffff_f000, 1)
        };
        loop {
            let shift = 12 + 9 * level;
            let slot = table + (address >> shift & 511) * 8;
            let entry = self.table_entry(slot, 8);
            if entry & P == 0 {
                return Err(Miss::Error(0));
            }
            let leaf = level == 0 || entry & PS != 0 && level < 3;
            let mut bad = reserved;
            if level == 3 {
                bad |= PS;
            } else if leaf && level > 0 {
                // Bit 12 of a large page is PAT; the address bits below the page size must be zero.
                bad |= ((1 << shift) - 1) & !0x1fff;
            }
            if level == 2 && leaf && !self.long_mode() {
                bad |= PS;
            }
            if entry & bad != 0 {
                return Err(Miss::Error(ERROR_PRESENT | ERROR_RESERVED));
            }
            permissions &= entry;
            nx |= entry & NX != 0;
            if leaf {
                let base = entry & 0x000f_ffff_ffff_f000 & !((1 << shift) - 1);
                let page = base | address & ((1 << shift) - 1) & !0xfff;
                return self.finish(slot, entry, 8, access, user, permissions, nx, page, level > 0);
            }
            if entry & A == 0 {
                self.set_bits(slot, entry, A, 8)?;
            }
            table = entry & 0x000f_ffff_ffff_f000;
            level -= 1;
        }
    }

    /// 32-bit paging: 4-byte entries.
    fn walk_32(&mut self, address: u64, access: Access, user: bool) -> Result<Translation, Miss> {
        let slot = (self.cr3 & 0xffff_f000) + (address >> 22 & 1023) * 4;
        let entry = self.table_entry(slot, 4);
        if entry & P == 0 {
            return Err(Miss::Error(0));
        }
        if entry & PS != 0 && self.cr4 & CR4_PSE != 0 {
            // PSE-36: bits 20:13 are address bits 39:32; bit 21 is reserved.
            if entry & 1 << 21 != 0 {
                return Err(Miss::Error(ERROR_PRESENT | ERROR_RESERVED));
            }
            let base = entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32;
            let page = base | address & 0x3f_f000;
            return self.finish(slot, entry, 4, access, user, entry, false, page, true);
        }
        if entry & A == 0 {
            self.set_bits(slot, entry, A, 4)?;
        }
        let slot = (entry & 0xffff_f000) + (address >> 12 & 1023) * 4;
        let leaf = self.table_entry(slot, 4);
        if leaf & P == 0 {
            return Err(Miss::Error(0));
        }
        self.finish(slot, leaf, 4, access, user, entry & leaf, false, leaf & 0xffff_f000, false)
    }

    /// Checks the permissions of a leaf and sets its accessed and dirty bits.
    #[expect(clippy::too_many_arguments, reason = "the two callers share the end of their walk")]
    fn finish(
        &mut self,
        slot: u64,
        entry: u64,
        size: u64,
        access: Access,
        user: bool,
        permissions: u64,
        nx: bool,
        page: u64,
        large: bool,
    ) -> Result<Translation, Miss> {
        let may_write = permissions & RW != 0 || !user && self.cr0 & CR0_WP == 0;
        let executable = !nx && (user || permissions & US == 0 || self.cr4 & CR4_SMEP == 0);
        let allowed = (!user || permissions & US != 0)
            && match access {
                Access::Read => true,
                Access::Write => may_write,
                Access::Execute => executable,
            };
        if !allowed {
            return Err(Miss::Error(ERROR_PRESENT));
        }
        let wanted = if access == Access::Write { A | D } else { A };
        if entry & wanted != wanted {
            self.set_bits(slot, entry, wanted, size)?;
        }
        Ok(Translation {
            page,
            writable: may_write && (entry | wanted) & D != 0,
            executable,
            global: entry & G != 0 && self.cr4 & CR4_PGE != 0,
            large,
        })
    }

    /// Reads a page table entry. Tables outside of RAM read as not present.
    fn table_entry(&mut self, slot: u64, size: u64) -> u64 {
        match self.ram(slot) {
            // SAFETY: the slot is naturally aligned, so it lies within one page of a mapped region.
            Some(host) => unsafe { host::load(host, size) },
            None => 0,
        }
    }

    fn set_bits(&mut self, slot: u64, entry: u64, bits: u64, size: u64) -> Result<(), Miss> {
        let Some((region, host)) = self.find_ram(slot) else { return Err(Miss::Retry) };
        if region.readonly {
            return Ok(());
        }
        if self.memory.dirty_tracking() {
            region.set_dirty(slot);
        }
        // SAFETY: as in `table_entry`.
        unsafe { host::compare_exchange(host, size, entry, entry | bits) }.map_err(|_| Miss::Retry)
    }

    /// The host address of a guest-physical one, if it is RAM or ROM.
    #[inline]
    pub(crate) fn ram(&self, gpa: u64) -> Option<u64> {
        let region = self.map.find(gpa)?;
        Some(region.host as u64 + (gpa - region.gpa))
    }

    /// The same with its region.
    #[inline]
    pub(crate) fn find_ram(&self, gpa: u64) -> Option<(std::sync::Arc<Region>, u64)> {
        let region = self.map.find(gpa)?;
        Some((region.clone(), region.host as u64 + (gpa - region.gpa)))
    }
}
