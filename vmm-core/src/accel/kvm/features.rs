//! What a host's KVM offers beyond what is needed.

use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use super::KvmHypervisor;
use super::dirty_ring::DirtyRings;

/// Of `KVM_CAP_GUEST_MEMFD_FLAGS`: the memory can be mapped, hence shared with the guest. Capability 244, which is
/// younger than the bindings.
const CAP_GUEST_MEMFD_FLAGS: u64 = 244;
const GUEST_MEMFD_MMAP: i32 = 1;
/// `KVM_CAP_VM_TYPES`: a bit for each type; type 0 is the ordinary one, and the only one without private memory.
const CAP_VM_TYPES: u64 = 235;
const ORDINARY: i32 = 1;

/// What a host's KVM offers beyond what is needed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmFeatures {
    /// It is itself software (the module `kvm_pvm`): guest kernel code is emulated.
    pub software: bool,
    /// Most vCPUs of a machine, of which at most 255 are used.
    pub vcpus: u32,
    /// Most entries of a vCPU's dirty ring; `None` when there are only dirty logs. [`KvmOptions::dirty_ring`] says when
    /// rings are used.
    ///
    /// [`KvmOptions::dirty_ring`]: super::KvmOptions::dirty_ring
    pub dirty_ring: Option<u32>,
    /// Writes to some ports and memory-mapped registers can be queued.
    pub coalesced_io: bool,
    /// Guest memory of its own kind (`guest_memfd`). Machines here do not use it. What the host cannot see needs
    /// `private_memory`. For what it can see, the memory files that are used instead do more: KVM keeps no dirty log of
    /// a slot on a `guest_memfd`, without which a running machine cannot be moved, and it has neither huge pages nor
    /// swap.
    pub guest_memfd: bool,
    /// Such memory can be mapped by the host.
    pub guest_memfd_shared: bool,
    /// There is a type of machine whose memory the host cannot see.
    pub private_memory: bool,
}

impl KvmFeatures {
    pub(super) fn of(kvm: &Kvm) -> Self {
        let flags = kvm.check_extension_raw(CAP_GUEST_MEMFD_FLAGS).max(0);
        Self {
            software: KvmHypervisor::is_software(),
            vcpus: kvm.get_max_vcpus() as u32,
            dirty_ring: DirtyRings::most(kvm),
            coalesced_io: kvm.check_extension(Cap::CoalescedMmio) && kvm.check_extension(Cap::CoalescedPio),
            guest_memfd: kvm.check_extension(Cap::GuestMemfd),
            guest_memfd_shared: flags & GUEST_MEMFD_MMAP != 0,
            private_memory: kvm.check_extension_raw(CAP_VM_TYPES).max(0) & !ORDINARY != 0,
        }
    }
}
