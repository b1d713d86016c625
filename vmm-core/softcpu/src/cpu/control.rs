//! Control and debug registers.

use super::{CR0_PE, CR4_DE, Cpu, EFER_LMA, EFER_LME, Fault, seg, vector};
use crate::CpuState;
use crate::mmu::walk::{CR0_PG, CR0_WP, CR4_PAE, CR4_PGE, CR4_PSE, CR4_SMEP};

const CR0_ET: u64 = 1 << 4;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
/// CR0 bits that exist.
const CR0_KNOWN: u64 = 0xe005_003f;
const DR7_GD: u64 = 1 << 13;

impl Cpu {
    /// MOV to CR0.
    pub(crate) fn set_cr0(&mut self, value: u64) -> Result<(), Fault> {
        if value >> 32 != 0
            || value & CR0_PG != 0 && value & CR0_PE == 0
            || value & CR0_NW != 0 && value & CR0_CD == 0
        {
            return Err(self.gp());
        }
        let value = value & CR0_KNOWN | CR0_ET;
        let changed = value ^ self.cr0;
        if changed & CR0_PG != 0 {
            if value & CR0_PG == 0 {
                if self.code64 {
                    return Err(self.gp());
                }
                self.efer &= !EFER_LMA;
            } else if self.efer & EFER_LME != 0 {
                if self.cr4 & CR4_PAE == 0 || self.segs[seg::CS].attributes.long() {
                    return Err(self.gp());
                }
                self.efer |= EFER_LMA;
            } else if self.cr4 & CR4_PAE != 0 {
                self.load_pdptes(self.cr3)?;
            }
        }
        self.cr0 = value;
        if changed & CR0_PE != 0 && value & CR0_PE == 0 {
            self.cpl = 0;
        }
        if changed & (CR0_PG | CR0_WP | CR0_PE) != 0 {
            self.flush_tlb();
        }
        self.update_mode();
        Ok(())
    }

    /// MOV to CR3.
    pub(crate) fn set_cr3(&mut self, value: u64) -> Result<(), Fault> {
        if self.long_mode() && value >> crate::mmu::walk::PHYSICAL_BITS != 0 {
            return Err(self.gp());
        }
        if self.cr0 & CR0_PG != 0 && self.cr4 & CR4_PAE != 0 && !self.long_mode() {
            self.load_pdptes(value)?;
        }
        self.cr3 = value;
        self.flush_tlb_local();
        Ok(())
    }

    fn load_pdptes(&mut self, cr3: u64) -> Result<(), Fault> {
        let mut entries = [0; 4];
        for (i, entry) in entries.iter_mut().enumerate() {
            let slot = (cr3 & 0xffff_ffe0) + 8 * i as u64;
            // SAFETY: an aligned slot within a mapped region.
            *entry = self.ram(slot).map_or(0, |host| unsafe { crate::mmu::host::load(host, 8) });
            let reserved = 0x1e6 | !((1 << crate::mmu::walk::PHYSICAL_BITS) - 1);
            if *entry & 1 != 0 && *entry & reserved != 0 {
                return Err(self.gp());
            }
        }
        self.pdptes = entries;
        Ok(())
    }

    /// MOV to CR4.
    pub(crate) fn set_cr4(&mut self, value: u64) -> Result<(), Fault> {
        if value & !CpuState::CR4_KNOWN != 0 || self.long_mode() && value & CR4_PAE == 0 {
            return Err(self.gp());
        }
        let changed = value ^ self.cr4;
        if changed & CR4_PAE != 0 && value & CR4_PAE != 0 && self.cr0 & CR0_PG != 0 {
            self.load_pdptes(self.cr3)?;
        }
        self.cr4 = value;
        if changed & (CR4_PAE | CR4_PSE | CR4_PGE | CR4_SMEP) != 0 {
            self.flush_tlb();
        }
        Ok(())
    }

    /// Reads a control register; `None` for one that does not exist.
    pub(crate) fn control(&mut self, number: u8) -> Option<u64> {
        Some(match number {
            0 => self.cr0,
            2 => self.cr2,
            3 => self.cr3,
            4 => self.cr4,
            8 => u64::from(self.local.cr8()),
            _ => return None,
        })
    }

    /// Writes a control register.
    pub(crate) fn set_control(&mut self, number: u8, value: u64) -> Result<(), Fault> {
        match number {
            0 => self.set_cr0(value),
            2 => {
                self.cr2 = value;
                Ok(())
            }
            3 => self.set_cr3(value),
            4 => self.set_cr4(value),
            8 if value >> 4 == 0 => {
                self.local.set_cr8(value as u8);
                self.local_changed();
                Ok(())
            }
            8 => Err(self.gp()),
            _ => Err(self.ud()),
        }
    }

    /// Resolves the aliases of debug registers 4 and 5 and checks for general detect.
    pub(crate) fn debug_register(&mut self, number: u8) -> Result<usize, Fault> {
        let number = match number {
            4 | 5 if self.cr4 & CR4_DE != 0 => return Err(self.ud()),
            4 | 5 => number + 2,
            n @ 0..=7 => n,
            _ => return Err(self.ud()),
        };
        if self.dr[7] & DR7_GD != 0 {
            self.dr[6] |= DR7_GD;
            self.dr[7] &= !DR7_GD;
            return Err(self.raise(vector::DB, None));
        }
        Ok(usize::from(number))
    }

    /// Writes a debug register.
    pub(crate) fn set_debug_register(&mut self, number: u8, value: u64) -> Result<(), Fault> {
        let number = self.debug_register(number)?;
        if number >= 6 && value >> 32 != 0 {
            return Err(self.gp());
        }
        self.dr[number] = match number {
            6 => value & 0xe00f | 0xffff_0ff0,
            7 => value & 0xffff_2bff | 0x400,
            _ => value,
        };
        self.update_mode();
        Ok(())
    }
}
