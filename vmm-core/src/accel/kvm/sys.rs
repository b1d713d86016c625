//! The KVM system calls that kvm-ioctls has no wrapper for, or only one that needs other arguments than ours.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio, kvm_irqfd, kvm_signal_mask,
    kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr};

use super::xsave;
use crate::accel::IoAddress;
use crate::memory::MemoryRegion;

ioctl_io_nr!(KVM_RUN, KVMIO, 0x80);
ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_irqfd);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Enters the guest until it exits; the reason is in the vCPU's shared page.
pub fn run(vcpu: &VcpuFd) -> io::Result<()> {
    // SAFETY: a vCPU descriptor and a request without argument. The shared page is written by the kernel meanwhile:
    // the caller holds the vCPU mutably, so no reference to the page is alive.
    check(unsafe { ioctl(vcpu, KVM_RUN()) })
}

/// Sets the signals that are blocked while the guest runs (bit n-1 for signal n).
pub fn set_signal_mask(vcpu: &VcpuFd, blocked: u64) -> io::Result<()> {
    /// `kvm_signal_mask` with its array.
    #[repr(C)]
    struct Mask {
        len: u32,
        sigset: [u8; 8],
    }
    let mask = Mask { len: 8, sigset: blocked.to_ne_bytes() };
    // SAFETY: the kernel reads `len` and then `len` bytes, which are in `mask`.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_SIGNAL_MASK(), &mask) })
}

/// Gives a region of guest memory to the VM as slot `slot`, or changes whether its writes are tracked.
pub fn set_memory(
    vm: &VmFd,
    slot: u32,
    region: &MemoryRegion,
    track_writes: bool,
) -> Result<(), kvm_ioctls::Error> {
    let description = kvm_userspace_memory_region {
        slot,
        flags: if track_writes { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: region.guest_address(),
        memory_size: region.size(),
        userspace_addr: region.host_ptr() as u64,
    };
    // SAFETY: the mapping is `memory_size` bytes long, and the VM keeps its `GuestMemory` alive as long as its
    // descriptor.
    unsafe { vm.set_user_memory_region(description) }
}

/// Lets the kernel watch the pages again whose entries in dirty rings were harvested.
pub fn reset_dirty_rings(vm: &VmFd) -> io::Result<()> {
    // SAFETY: a request without argument.
    check(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) })
}

/// Adds or removes an ioeventfd.
pub fn ioeventfd(
    vm: &VmFd,
    address: IoAddress,
    len: u32,
    value: Option<u64>,
    event: BorrowedFd<'_>,
    remove: bool,
) -> io::Result<()> {
    let (addr, pio) = match address {
        IoAddress::Mmio(address) => (address, false),
        IoAddress::Port(port) => (u64::from(port), true),
    };
    let flag = |on: bool, bit: u32| u32::from(on) << bit;
    let request = kvm_ioeventfd {
        datamatch: value.unwrap_or(0),
        addr,
        len,
        fd: event.as_raw_fd(),
        flags: flag(pio, kvm_ioeventfd_flag_nr_pio)
            | flag(value.is_some(), kvm_ioeventfd_flag_nr_datamatch)
            | flag(remove, kvm_ioeventfd_flag_nr_deassign),
        ..Default::default()
    };
    // SAFETY: the kernel reads the structure only; it takes its own reference to the descriptor.
    check(unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), &request) })
}

/// A new event descriptor, with a count of 0.
pub fn event() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    check(fd)?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Connects a descriptor to a GSI, or disconnects it.
pub fn irqfd(vm: &VmFd, event: BorrowedFd<'_>, gsi: u32, remove: bool) -> io::Result<()> {
    let request = kvm_irqfd {
        fd: event.as_raw_fd() as u32,
        gsi,
        flags: if remove { kvm_bindings::KVM_IRQFD_FLAG_DEASSIGN } else { 0 },
        ..Default::default()
    };
    // SAFETY: the kernel reads the structure only; it takes its own reference to the descriptor.
    check(unsafe { ioctl_with_ref(vm, KVM_IRQFD(), &request) })
}

/// Loads the XSAVE area.
pub fn set_xsave(vcpu: &VcpuFd, area: &xsave::Area) -> Result<(), kvm_ioctls::Error> {
    let mut request = kvm_xsave::default();
    for (word, bytes) in request.region.iter_mut().zip(area.chunks_exact(4)) {
        *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    // SAFETY: the kernel reads more than the 4096 bytes only after a process asked for dynamic features (AMX), which
    // this crate never does.
    unsafe { vcpu.set_xsave(&request) }
}
