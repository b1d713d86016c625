//! What CPUID shows to the guest: what the host's KVM supports, adjusted for one vCPU.
//!
//! The guest sees one package with one core a vCPU and one thread a core, whatever the host's topology. Register and
//! bit names follow Intel's SDM volume 2A and AMD's APM volume 3, appendix E.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::failed;
use crate::accel::{AccelError, CpuModel};

/// ECX of leaf 1.
mod leaf1_ecx {
    pub const MONITOR: u32 = 1 << 3;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const HYPERVISOR: u32 = 1 << 31;
}
/// EDX of leaf 1: several logical processors in the package.
const HTT: u32 = 1 << 28;
/// EAX of leaf 6: the APIC timer always runs.
const ARAT: u32 = 1 << 2;
/// ECX of leaf 0x8000_0001: the package's processors are cores, not threads.
const CMP_LEGACY: u32 = 1 << 1;
/// ECX of leaf 0x8000_0001: extended performance counters.
const PERF_CTR_EXT: u32 = 1 << 23 | 1 << 24;

/// What a vCPU's CPUID is made for.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// The vCPU's APIC ID.
    pub apic_id: u32,
    /// Number of vCPUs in the machine.
    pub cpus: u32,
    /// Whether the in-kernel APIC offers the TSC-deadline timer.
    pub tsc_deadline: bool,
    /// The features that the guest sees at most.
    pub model: Option<CpuModel>,
}

impl Topology {
    /// Number of APIC ID bits that count cores.
    fn core_bits(self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }
}

/// The CPUID of one vCPU.
pub fn for_vcpu(supported: &CpuId, topology: Topology) -> Result<CpuId, AccelError> {
    let mut entries = supported.as_slice().to_vec();
    // The topology leaves have a sub-leaf a level: replace what the host has.
    let max_leaf = entries.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    entries.retain(|e| !matches!(e.function, 0xb | 0x1f));
    if max_leaf >= 0xb {
        entries.extend(topology_leaf(0xb, topology));
    }
    if max_leaf >= 0x1f {
        entries.extend(topology_leaf(0x1f, topology));
    }
    let amd = entries.iter().any(|e| e.function == 0 && is_amd(e));
    if let Some(model) = topology.model {
        entries.iter_mut().for_each(|entry| restrict(entry, model));
    }
    for entry in &mut entries {
        adjust(entry, topology, amd);
    }
    CpuId::from_entries(&entries)
        .map_err(|_| failed("building of CPUID")(kvm_ioctls::Error::new(libc::ENOMEM)))
}

fn is_amd(leaf0: &kvm_cpuid_entry2) -> bool {
    let vendor = [leaf0.ebx, leaf0.edx, leaf0.ecx].map(u32::to_le_bytes).concat();
    vendor == b"AuthenticAMD" || vendor == b"HygonGenuine"
}

/// Hides what the model does not have.
fn restrict(entry: &mut kvm_cpuid_entry2, model: CpuModel) {
    if let Some([eax, ebx, ecx, edx]) = model.features(entry.function, entry.index) {
        entry.eax &= eax;
        entry.ebx &= ebx;
        entry.ecx &= ecx;
        entry.edx &= edx;
    }
}

fn adjust(entry: &mut kvm_cpuid_entry2, topology: Topology, amd: bool) {
    let Topology { apic_id, cpus, tsc_deadline, .. } = topology;
    let set = |word: &mut u32, bits: u32, on: bool| *word = if on { *word | bits } else { *word & !bits };
    match entry.function {
        1 => {
            // CLFLUSH size stays; the count and the ID have eight bits each.
            entry.ebx = entry.ebx & 0xffff | cpus.min(255) << 16 | (apic_id & 0xff) << 24;
            set(&mut entry.ecx, leaf1_ecx::MONITOR, false);
            set(&mut entry.ecx, leaf1_ecx::TSC_DEADLINE, tsc_deadline);
            set(&mut entry.ecx, leaf1_ecx::HYPERVISOR, true);
            set(&mut entry.edx, HTT, cpus > 1);
        }
        // Caches, Intel's and AMD's leaf: the first two levels belong to one core, the others to all.
        4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level <= 2 { 0 } else { (1 << topology.core_bits()) - 1 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
            if entry.function == 4 {
                entry.eax |= ((1 << topology.core_bits()) - 1u32).min(63) << 26;
            }
        }
        // Power management is the host's; performance counters are not virtualised.
        6 => *entry = kvm_cpuid_entry2 { eax: entry.eax & ARAT, ebx: 0, ecx: 0, edx: 0, ..*entry },
        0xa | 0x8000_0022 => *entry = kvm_cpuid_entry2 { eax: 0, ebx: 0, ecx: 0, edx: 0, ..*entry },
        0x8000_0001 => {
            set(&mut entry.ecx, CMP_LEGACY, amd && cpus > 1);
            set(&mut entry.ecx, PERF_CTR_EXT, false);
        }
        // AMD: number of processors less one, and of APIC ID bits.
        0x8000_0008 if amd => {
            entry.ecx = entry.ecx & !0xf0ff | (cpus - 1).min(255) | topology.core_bits() << 12;
        }
        // AMD: APIC ID, core ID with one thread a core, one node.
        0x8000_001e => {
            entry.eax = apic_id;
            entry.ebx = apic_id & 0xff;
            entry.ecx = 0;
            entry.edx = 0;
        }
        _ => {}
    }
}

/// The two levels of leaf 0xb or 0x1f: threads (one a core), cores, and the level 0 that ends the list.
fn topology_leaf(function: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: topology.apic_id,
        ..Default::default()
    };
    [level(0, 1, 0, 1), level(1, 2, topology.core_bits(), topology.cpus), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = regs;
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn topology_is_one_package_of_single_threaded_cores() {
        let vendor = [0x6874_7541, 0x444d_4163, 0x6974_6e65];
        let host = [
            leaf(0, [0x10, vendor[0], vendor[1], vendor[2]]),
            leaf(1, [0, 0x0710_0800, 1 << 3, 0]),
            leaf(4, [3 << 26 | 7 << 14 | 3 << 5 | 3, 0, 0, 0]),
            leaf(0xb, [1, 2, 0x100, 7]),
            leaf(6, [0xff, 9, 9, 9]),
            leaf(0x8000_0001, [0, 0, 0, 0]),
            leaf(0x8000_0008, [48, 0, 0x7007, 0]),
            leaf(0x8000_001e, [7, 0x103, 1, 0]),
        ];
        let host = CpuId::from_entries(&host).unwrap();
        let topology = Topology { apic_id: 5, cpus: 6, tsc_deadline: true, model: None };
        let guest = for_vcpu(&host, topology).unwrap();
        let one = find(&guest, 1, 0);
        assert_eq!(one.ebx, 0x0506_0800);
        assert_eq!(one.ecx, 1 << 31 | 1 << 24);
        assert_eq!(one.edx, HTT);
        assert_eq!(find(&guest, 4, 0).eax, 7 << 26 | 7 << 14 | 3 << 5 | 3);
        assert_eq!(find(&guest, 6, 0).eax, ARAT);
        let cores = find(&guest, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, 0x201, 5));
        assert_eq!(find(&guest, 0xb, 2).ebx, 0);
        assert_eq!(find(&guest, 0x8000_0008, 0).ecx, 3 << 12 | 5);
        assert_eq!(find(&guest, 0x8000_0001, 0).ecx, CMP_LEGACY);
        let ids = find(&guest, 0x8000_001e, 0);
        assert_eq!((ids.eax, ids.ebx, ids.ecx), (5, 5, 0));
        assert!(!guest.as_slice().iter().any(|e| e.function == 0x1f), "leaf 0x1f is beyond the maximum");
    }

    #[test]
    fn a_single_cpu_has_no_siblings() {
        let host = CpuId::from_entries(&[leaf(0, [0x1f, 0, 0, 0]), leaf(1, [0, !0, !0, !0])]).unwrap();
        let guest =
            for_vcpu(&host, Topology { apic_id: 0, cpus: 1, tsc_deadline: false, model: None }).unwrap();
        let one = find(&guest, 1, 0);
        assert_eq!(one.ebx >> 16, 1);
        assert_eq!(one.edx & HTT, 0);
        assert_eq!(one.ecx & leaf1_ecx::TSC_DEADLINE, 0);
        assert_eq!(find(&guest, 0x1f, 1).eax, 0);
    }

    #[test]
    fn a_model_hides_later_extensions() {
        let host = [
            leaf(0, [0x1f, 0, 0, 0]),
            leaf(1, [0x1234, 0, !0, !0]),
            leaf(7, [2, !0, !0, !0]),
            leaf(0xd, [7, 832, 832, 0]),
            leaf(0x8000_0001, [0x1234, 0, !0, !0]),
        ];
        let host = CpuId::from_entries(&host).unwrap();
        let guest = |model| {
            for_vcpu(&host, Topology { apic_id: 0, cpus: 1, tsc_deadline: true, model: Some(model) }).unwrap()
        };
        let (v1, v2) = (guest(CpuModel::V1), guest(CpuModel::V2));
        const SSE4_2: u32 = 1 << 20;
        const AVX_XSAVE: u32 = 1 << 28 | 1 << 26;
        assert_eq!(find(&v1, 1, 0).ecx & (SSE4_2 | AVX_XSAVE), 0);
        assert_eq!(find(&v2, 1, 0).ecx & (SSE4_2 | AVX_XSAVE), SSE4_2);
        assert_eq!(find(&v2, 1, 0).eax, 0x1234);
        const AVX2: u32 = 1 << 5;
        assert_eq!(find(&v2, 7, 0).ebx & AVX2, 0);
        assert_eq!(find(&v2, 0xd, 0).eax, 0);
        const LONG_MODE: u32 = 1 << 29;
        assert_eq!(find(&v1, 0x8000_0001, 0).edx & LONG_MODE, LONG_MODE);
    }
}
