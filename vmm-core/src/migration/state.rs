//! What a machine is, and the state that it is in, without its memory.

use std::collections::BTreeMap;

use blockfmt::Geometry;
use serde::{Deserialize, Serialize};

use crate::accel::{AccelKind, ChipsetState, CpuProfile, CpuState, ExtraState};
use crate::memory::GuestMemory;

/// What does not change while a machine runs and must be the same where it goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// The accelerator that ran it.
    pub accelerator: AccelKind,
    /// Number of vCPUs.
    pub cpus: u32,
    /// What they can do.
    pub profile: CpuProfile,
    /// RAM: guest address and size of each region.
    pub memory: Vec<(u64, u64)>,
    /// Disks that the machine's process opens, in their order.
    pub disks: Vec<DiskShape>,
    /// MAC addresses of the network cards, in their order.
    pub macs: Vec<[u8; 6]>,
}

/// What a guest knows of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskShape {
    /// Size in bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Addressing facts.
    pub geometry: Geometry,
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// Registers.
    pub registers: CpuState,
    /// The local APIC and what else the accelerator holds.
    pub extra: ExtraState,
    /// When the registers were read, in nanoseconds after those of the first vCPU: the time-stamp counter went on
    /// between them.
    pub read_after: u64,
}

/// A machine that is paused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// It ran before it was paused for this.
    pub running: bool,
    /// The vCPUs by their numbers.
    pub cpus: Vec<VcpuState>,
    /// Interrupt controllers, timer and clock.
    pub chipset: ChipsetState,
    /// The devices by their names.
    pub devices: BTreeMap<String, serde_json::Value>,
}

impl Description {
    /// The regions of `memory`.
    pub(crate) fn regions(memory: &GuestMemory) -> Vec<(u64, u64)> {
        memory.regions().iter().map(|r| (r.guest_address(), r.size())).collect()
    }

    /// Why a machine of description `own` cannot go on where one of this description stopped, if it cannot. Disks are
    /// compared when they open.
    pub(crate) fn mismatch(&self, own: &Self, check_processors: bool) -> Option<String> {
        let missing = own.profile.lacks(&self.profile);
        Some(if own.cpus != self.cpus {
            format!("it has {} vCPUs, not {}", self.cpus, own.cpus)
        } else if own.memory != self.memory {
            let sum = |regions: &[(u64, u64)]| regions.iter().fold(0u64, |n, r| n.saturating_add(r.1)) >> 20;
            format!("its RAM is another ({} MiB, not {} MiB)", sum(&self.memory), sum(&own.memory))
        } else if own.disks.len() != self.disks.len() {
            format!("it has {} disks, not {}", self.disks.len(), own.disks.len())
        } else if own.macs != self.macs {
            "its network cards are others (number or MAC address)".into()
        } else if check_processors && let Some(first) = missing.first() {
            format!(
                "its guest may use processor features that are missing here (CPUID {first} and {} more); start guests \
                 that are to move with a CPU model",
                missing.len() - 1
            )
        } else if check_processors && own.profile.tsc_khz != self.profile.tsc_khz {
            format!(
                "its guest knows a time-stamp counter of {} kHz, and here it has {} kHz",
                self.profile.tsc_khz, own.profile.tsc_khz
            )
        } else {
            return None;
        })
    }
}
