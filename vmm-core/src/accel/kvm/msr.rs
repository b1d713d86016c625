//! Model-specific registers: which ones hold guest state, and their transfer.

use std::io;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// Architectural MSRs by number (Intel SDM volume 4, AMD APM volume 2 appendix A).
pub mod index {
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const PAT: u32 = 0x277;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
    pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
}

/// Registers that [`CpuState`](crate::accel::CpuState) or the APIC state already hold.
const NAMED: [u32; 20] = [
    index::TSC,
    index::APIC_BASE,
    index::SPEC_CTRL,
    index::SYSENTER_CS,
    index::SYSENTER_ESP,
    index::SYSENTER_EIP,
    index::MISC_ENABLE,
    index::PAT,
    index::TSC_DEADLINE,
    index::EFER,
    index::STAR,
    index::LSTAR,
    index::CSTAR,
    index::SFMASK,
    index::FS_BASE,
    index::GS_BASE,
    index::KERNEL_GS_BASE,
    index::TSC_AUX,
    index::KVM_WALL_CLOCK,
    index::KVM_SYSTEM_TIME,
];

/// Of the MSRs that KVM lists, those to be saved beside the named ones. The list repeats the old numbers of the
/// kvmclock MSRs (0x11, 0x12), which write the same registers as the new ones.
pub fn guest_state(listed: &[u32]) -> Vec<u32> {
    listed.iter().copied().filter(|m| !NAMED.contains(m) && !matches!(m, 0x11 | 0x12)).collect()
}

/// Reads `wanted`, leaving out what this vCPU does not have.
pub fn read(vcpu: &VcpuFd, wanted: &[u32]) -> io::Result<Vec<(u32, u64)>> {
    let mut read = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> =
            chunk.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // The kernel stops at the first register that it cannot read and returns how many it did.
        let done = vcpu.get_msrs(&mut msrs)?.min(chunk.len());
        read.extend(msrs.as_slice()[..done].iter().map(|e| (e.index, e.data)));
        let skip = usize::from(done < chunk.len());
        rest = &rest[done + skip..];
    }
    Ok(read)
}

/// Writes all of `values`; returns those that the kernel refused.
pub fn write(vcpu: &VcpuFd, values: &[(u32, u64)]) -> io::Result<Vec<(u32, u64)>> {
    let mut refused = Vec::new();
    let mut rest = values;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> =
            chunk.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let done = vcpu.set_msrs(&msrs)?.min(chunk.len());
        let mut next = done;
        if let Some(value) = chunk.get(done) {
            refused.push(*value);
            next += 1;
        }
        rest = &rest[next..];
    }
    Ok(refused)
}
