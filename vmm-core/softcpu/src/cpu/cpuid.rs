//! CPUID.

use super::Cpu;
use crate::config::{CpuModel, SIGNATURE};
use crate::mmu::walk::PHYSICAL_BITS;

const VENDOR: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];
const BRAND: &[u8; 48] = b"Nacre software CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// "KVMKVMKVM\0\0\0".
const KVM: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];
/// CLOCKSOURCE2, NOP_IO_DELAY and CLOCKSOURCE_STABLE_BIT.
const KVM_FEATURES: u32 = 1 << 3 | 1 << 1 | 1 << 24;

/// Function 1, EDX: FPU DE PSE TSC MSR PAE CX8 APIC SEP PGE CMOV PAT PSE36 CLFLUSH MMX FXSR SSE SSE2.
const EDX: u32 = 0x078b_a97d;
/// Function 1, ECX: SSE3 CX16 X2APIC TSC-deadline RDRAND HYPERVISOR.
const ECX_V1: u32 = 1 | 1 << 13 | 1 << 21 | 1 << 24 | 1 << 30 | 1 << 31;
/// SSSE3 SSE4.1 SSE4.2 POPCNT.
const ECX_V2: u32 = ECX_V1 | 1 << 9 | 1 << 19 | 1 << 20 | 1 << 23;
/// Function 7, EBX: FSGSBASE SMEP ERMS RDSEED.
const EBX_7: u32 = 1 | 1 << 7 | 1 << 9 | 1 << 18;
/// Function 7, EDX: FSRM.
const EDX_7: u32 = 1 << 4;
/// 0x80000001, EDX beyond what function 1 has: SYSCALL NX 1-GiB-pages RDTSCP LM.
const EDX_EXTENDED: u32 = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29;
/// 0x80000001, ECX: LAHF CR8-legacy 3DNow-prefetch.
const ECX_EXTENDED: u32 = 1 | 1 << 4 | 1 << 8;

/// What function 0x80000001 repeats of function 1, EDX.
const EDX_SHARED: u32 = EDX & 0x0183_f3ff | APIC;
/// Function 1, EDX: a local APIC that is enabled.
const APIC: u32 = 1 << 9;

impl CpuModel {
    fn ecx(self) -> u32 {
        match self {
            Self::V1 => ECX_V1,
            Self::V2 => ECX_V2,
        }
    }

    /// The bits of EAX, EBX, ECX and EDX that the model allows in a leaf with feature flags; bits that say something
    /// else are set. `None` for other leaves. Another accelerator that masks its CPUID with them shows its guests no
    /// feature that this processor lacks.
    pub fn features(self, leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
        const ANY: u32 = u32::MAX;
        Some(match (leaf, subleaf) {
            (1, _) => [ANY, ANY, self.ecx(), EDX | APIC],
            (7, 0) => [0, EBX_7, 0, EDX_7],
            // Sub-leaves of function 7; XSAVE and what builds on it.
            (7 | 0xd | 0x12 | 0x14 | 0x19 | 0x1d | 0x1e | 0x24, _) => [0; 4],
            (0x8000_0001, _) => [ANY, ANY, ECX_EXTENDED, EDX_SHARED | EDX_EXTENDED],
            _ => return None,
        })
    }
}

impl Cpu {
    /// EAX, EBX, ECX and EDX for a leaf and sub-leaf.
    pub(crate) fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let entry = |e: &&crate::config::CpuidEntry| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf);
        if let Some(entry) = self.config.cpuid.iter().find(entry) {
            return entry.output;
        }
        let (id, count) = (self.config.apic_id, self.config.processors.max(1));
        match leaf {
            0 => [0x16, VENDOR[0], VENDOR[2], VENDOR[1]],
            1 => {
                let apic = if self.apic_enabled { APIC } else { 0 };
                let ecx = self.config.model.ecx();
                let htt = u32::from(count > 1) << 28;
                [SIGNATURE, id << 24 | count.min(255) << 16 | 8 << 8, ecx, EDX | apic | htt]
            }
            7 if subleaf == 0 => [0, EBX_7, 0, EDX_7],
            0xb => {
                let bits = 32 - (count - 1).leading_zeros();
                match subleaf {
                    0 => [0, 1, 1 << 8, id],
                    1 => [bits, count, 1 | 2 << 8, id],
                    n => [0, 0, n & 0xff, id],
                }
            }
            0x15 => [1, 1, self.config.clock.khz().saturating_mul(1000), 0],
            0x16 => {
                let mhz = self.config.clock.khz() / 1000;
                [mhz, mhz, 100, 0]
            }
            0x4000_0000 if self.config.kvm_leaves => [0x4000_0001, KVM[0], KVM[1], KVM[2]],
            0x4000_0001 if self.config.kvm_leaves => [KVM_FEATURES, 0, 0, 0],
            0x8000_0000 => [0x8000_0021, VENDOR[0], VENDOR[2], VENDOR[1]],
            0x8000_0001 => [SIGNATURE, 0, ECX_EXTENDED, EDX_SHARED | EDX_EXTENDED],
            0x8000_0002..=0x8000_0004 => {
                let at = (leaf - 0x8000_0002) as usize * 16;
                std::array::from_fn(|i| {
                    let b = &BRAND[at + 4 * i..at + 4 * i + 4];
                    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
                })
            }
            // 32 KiB of L1 data and instruction cache, 512 KiB of L2, 64-byte lines.
            0x8000_0005 => [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140],
            0x8000_0006 => [0, 0x4200_4200, 0x0200_8140, 0],
            0x8000_0007 => [0, 0, 0, 1 << 8],
            // SSB_NO: no speculative store bypass.
            0x8000_0008 => {
                let bits = 32 - (count - 1).leading_zeros();
                [PHYSICAL_BITS | 48 << 8, 1 << 26, (count - 1).min(255) | bits << 12, 0]
            }
            // LFENCE serialises, null selectors clear the base, AutoIBRS.
            0x8000_0021 => [1 << 2 | 1 << 6 | 1 << 8, 0, 0, 0],
            _ => [0; 4],
        }
    }
}
