//! Model-specific registers, and the KVM clock that two of them control.

use super::segment::canonical;
use super::{Cpu, EFER_LMA, EFER_LME, EFER_SCE, Fault, seg};
use crate::mmu::walk::{CR0_PG, EFER_NXE};

pub(super) const APIC_BASE: u32 = 0x1b;
/// IA32_APIC_BASE: the APIC is enabled.
pub(super) const APIC_ENABLED: u64 = 1 << 11;
const EFER_AUTO_IBRS: u64 = 1 << 21;
const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// kvmclock's flag byte: the clock is stable across processors.
const TSC_STABLE: u8 = 1;

impl Cpu {
    /// RDMSR.
    pub(crate) fn read_msr(&mut self, msr: u32) -> Result<u64, Fault> {
        let tsc = self.tsc_now();
        Ok(match msr {
            0x10 => tsc,
            APIC_BASE | 0x6e0 | 0x800..=0x8ff => {
                let value = self.local.read_msr(msr, tsc);
                return value.map_err(|_| self.gp());
            }
            // IA32_FEATURE_CONTROL (locked), TSC_ADJUST, microcode revision, MTRRcap (none).
            0x3a => 1,
            0x3b | 0xfe | 0x179 | 0x17a => 0,
            0x8b => 0x0b00_0000,
            0x174 => self.msrs.sysenter_cs,
            0x175 => self.msrs.sysenter_esp,
            0x176 => self.msrs.sysenter_eip,
            0x1a0 => self.msrs.misc_enable,
            0x277 => self.msrs.pat,
            0xc000_0080 => self.efer,
            0xc000_0081 => self.msrs.star,
            0xc000_0082 => self.msrs.lstar,
            0xc000_0083 => self.msrs.cstar,
            0xc000_0084 => self.msrs.sfmask,
            0xc000_0100 => self.segs[seg::FS].base,
            0xc000_0101 => self.segs[seg::GS].base,
            0xc000_0102 => self.msrs.kernel_gs_base,
            0xc000_0103 => self.msrs.tsc_aux,
            // AMD: SYSCFG, HWCR (TSC frequency locked to P0), NB_CFG, VM_CR, patch loader, DE_CFG
            // (LFENCE serialises).
            0xc001_0010 | 0xc001_001f | 0xc001_0114 | 0xc001_0020 => 0,
            0xc001_0015 => 1 << 24,
            0xc001_1029 => 2,
            KVM_WALL_CLOCK if self.config.kvm_leaves => self.msrs.kvm_wall_clock,
            KVM_SYSTEM_TIME if self.config.kvm_leaves => self.msrs.kvm_system_time,
            _ => {
                tracing::debug!(msr = format_args!("{msr:#x}"), "Unknown MSR read");
                return Err(self.gp());
            }
        })
    }

    /// WRMSR.
    pub(crate) fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), Fault> {
        let address = |cpu: &mut Self| if canonical(value) { Ok(value) } else { Err(cpu.gp()) };
        match msr {
            0x10 => self.set_tsc(value),
            APIC_BASE | 0x6e0 | 0x800..=0x8ff => {
                let tsc = self.tsc_now();
                let result = self.local.write_msr(msr, value, tsc);
                if msr == APIC_BASE {
                    self.follow_apic_base();
                }
                self.local_changed();
                return result.map_err(|_| self.gp());
            }
            0x3b if value == 0 => {}
            // Microcode updates: nothing to do.
            0x8b | 0x79 => {}
            0x174 => self.msrs.sysenter_cs = value,
            0x175 => self.msrs.sysenter_esp = address(self)?,
            0x176 => self.msrs.sysenter_eip = address(self)?,
            0x1a0 => self.msrs.misc_enable = value,
            0x277 => {
                if value.to_le_bytes().iter().any(|t| !matches!(t, 0 | 1 | 4..=7)) {
                    return Err(self.gp());
                }
                self.msrs.pat = value;
            }
            0xc000_0080 => return self.set_efer(value),
            0xc000_0081 => self.msrs.star = value,
            0xc000_0082 => self.msrs.lstar = address(self)?,
            0xc000_0083 => self.msrs.cstar = address(self)?,
            0xc000_0084 => self.msrs.sfmask = value & 0xffff_ffff,
            0xc000_0100 => {
                self.segs[seg::FS].base = address(self)?;
                self.update_mode();
            }
            0xc000_0101 => {
                self.segs[seg::GS].base = address(self)?;
                self.update_mode();
            }
            0xc000_0102 => self.msrs.kernel_gs_base = address(self)?,
            0xc000_0103 => self.msrs.tsc_aux = value & 0xffff_ffff,
            0xc001_0010 | 0xc001_0015 | 0xc001_001f | 0xc001_0020 | 0xc001_0114 | 0xc001_1029 => {}
            KVM_WALL_CLOCK if self.config.kvm_leaves => {
                self.msrs.kvm_wall_clock = value;
                self.write_wall_clock(value);
            }
            KVM_SYSTEM_TIME if self.config.kvm_leaves => {
                self.msrs.kvm_system_time = value;
                self.update_kvm_clock();
            }
            _ => {
                tracing::debug!(msr = format_args!("{msr:#x}"), value, "Unknown MSR written");
                return Err(self.gp());
            }
        }
        Ok(())
    }

    fn set_efer(&mut self, value: u64) -> Result<(), Fault> {
        let known = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_AUTO_IBRS;
        let changed = value ^ self.efer;
        if value & !known != 0 || changed & EFER_LME != 0 && self.cr0 & CR0_PG != 0 {
            return Err(self.gp());
        }
        self.efer = value & !EFER_LMA | self.efer & EFER_LMA;
        if changed & EFER_NXE != 0 {
            self.flush_tlb();
        }
        self.update_mode();
        Ok(())
    }

    /// Fills the page that MSR_KVM_SYSTEM_TIME_NEW points to (`pvclock_vcpu_time_info`, 32 bytes): how to
    /// get nanoseconds from the time-stamp counter.
    pub(crate) fn update_kvm_clock(&mut self) {
        let msr = self.msrs.kvm_system_time;
        if msr & 1 == 0 {
            return;
        }
        let (multiplier, shift) = scale(u64::from(self.config.clock.khz()));
        let tsc = self.tsc_now();
        // By the clock that all processors share.
        let now = self.config.clock.system_time_at(tsc.wrapping_sub(self.tsc_offset()));
        let mut page = [0u8; 32];
        page[0..4].copy_from_slice(&2u32.to_le_bytes());
        page[8..16].copy_from_slice(&tsc.to_le_bytes());
        page[16..24].copy_from_slice(&now.to_le_bytes());
        page[24..28].copy_from_slice(&multiplier.to_le_bytes());
        page[28] = shift as u8;
        page[29] = TSC_STABLE;
        if self.memory.write(msr & !1, &page).is_err() {
            tracing::debug!(msr, "The KVM clock page is not RAM");
        }
    }

    /// `pvclock_wall_clock`: the time of day at which system time was zero.
    fn write_wall_clock(&mut self, gpa: u64) {
        let now = if self.config.clock.is_deterministic() {
            std::time::Duration::from_secs(1_700_000_000)
        } else {
            let since =
                std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            since.saturating_sub(std::time::Duration::from_nanos(self.config.clock.system_time()))
        };
        let mut page = [0u8; 12];
        page[0..4].copy_from_slice(&2u32.to_le_bytes());
        page[4..8].copy_from_slice(&(now.as_secs() as u32).to_le_bytes());
        page[8..12].copy_from_slice(&now.subsec_nanos().to_le_bytes());
        if self.memory.write(gpa & !1, &page).is_err() {
            tracing::debug!(gpa, "The KVM wall clock is not RAM");
        }
    }
}

/// Multiplier and shift of `ns = (ticks << shift) * multiplier >> 32`.
fn scale(khz: u64) -> (u32, i8) {
    let mut shift = 0i8;
    let mut rate = khz.max(1) * 1000;
    while rate > 2_000_000_000 {
        rate >>= 1;
        shift -= 1;
    }
    while rate <= 1_000_000_000 {
        rate <<= 1;
        shift += 1;
    }
    // `rate` is in (1e9, 2e9], so the quotient is in [2^31, 2^32).
    (((1_000_000_000u128 << 32) / u128::from(rate)) as u32, shift)
}
