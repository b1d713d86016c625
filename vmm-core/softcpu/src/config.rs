//! What kind of processor to build.

use std::sync::Arc;

use crate::Clock;

/// Which instruction set extensions CPUID announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CpuModel {
    /// The x86-64 baseline: up to SSE2 (and SSE3, CMPXCHG16B, RDRAND).
    V1,
    /// x86-64-v2: adds SSSE3, SSE4.1, SSE4.2 and POPCNT.
    #[default]
    V2,
}

/// Replaces what CPUID answers for one leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidEntry {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input; `None` matches all sub-leaves.
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX and EDX on output.
    pub output: [u32; 4],
}

/// What [`Cpu::new`](crate::Cpu::new) needs to know.
#[derive(Debug, Clone)]
pub struct CpuConfig {
    /// Index of this processor; passed to [`Bus`](crate::Bus).
    pub index: u32,
    /// Initial local APIC identifier.
    pub apic_id: u32,
    /// Number of processors in the machine, for CPUID's topology leaves (one package, one thread a core).
    pub processors: u32,
    /// Starts executing at the reset vector. Other processors wait for a start-up IPI.
    pub bootstrap: bool,
    /// Announced instruction set extensions.
    pub model: CpuModel,
    /// Entries that replace or extend the model's CPUID answers.
    pub cpuid: Vec<CpuidEntry>,
    /// Announce the KVM paravirtual leaves (kvmclock with the stable bit).
    pub kvm_leaves: bool,
    /// The machine's time source, the same for all its processors.
    pub clock: Arc<Clock>,
    /// Translate a block of 64-bit code to machine code of the host after it was entered this often; `None` leaves all
    /// to the interpreter, as does a crate without the feature `native`. Changes nothing that the guest can see but its
    /// speed.
    pub translate_after: Option<u32>,
    /// Seeds what the guest can observe as random (RDRAND, RDSEED). `None` uses the host's entropy.
    pub seed: Option<u64>,
}

impl CpuConfig {
    /// The bootstrap processor of a machine with one processor.
    pub fn new(clock: Arc<Clock>) -> Self {
        Self {
            index: 0,
            apic_id: 0,
            processors: 1,
            bootstrap: true,
            model: CpuModel::default(),
            cpuid: Vec::new(),
            kvm_leaves: true,
            translate_after: cfg!(feature = "native").then_some(TRANSLATE_AFTER),
            clock,
            seed: None,
        }
    }
}

/// Entries after which a block is worth its translation.
const TRANSLATE_AFTER: u32 = 64;

/// Family, model and stepping as CPUID function 1 and EDX after a reset report them: family 0x1a, whose
/// members need the fewest work-arounds in guests.
pub(crate) const SIGNATURE: u32 = 0x00b0_0f21;
