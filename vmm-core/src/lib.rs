//! One virtual machine: accelerator, guest memory, vCPUs, boot, devices and lifecycle.
//!
//! The layers, from the bottom up:
//!
//! - [`memory`]: guest-physical RAM, shared with the accelerator and with device back-ends.
//! - [`bus`]: the MMIO and port I/O address spaces, and the [`bus::BusDevice`] that answers in them.
//! - [`accel`]: the traits of a hypervisor, a VM and a vCPU, implemented by KVM and by the software CPU.
//! - [`interrupt`]: how a device raises an interrupt, whatever the accelerator.
//! - [`pci`] and [`devices`]: PCI, the chipset's legacy devices, and virtio.
//! - [`acpi`]: the tables that describe the machine to the guest.
//! - [`boot`]: kernel and firmware loaders.
//! - [`socket`]: Unix sockets that clients connect to.
//! - [`migration`]: the stream that carries a machine to a file or to another host.
//! - [`machine`]: composes all of these into a running virtual machine.
//!
//! Most programs want a [`machine::Vm`]. Which accelerators work on this host, and how fast, is measured, not assumed:
//!
//! ```
//! let report = vmm_core::accel::probe::probe();
//! for found in &report.accelerators {
//!     println!("{:?}: usable {}, {:?} million instructions a second", found.kind, found.usable, found.kernel_mips);
//! }
//! assert!(report.chosen.is_some(), "the software CPU works everywhere");
//! ```
//!
//! # Specifications
//!
//! [Virtio 1.2](https://docs.oasis-open.org/virtio/virtio/v1.2/virtio-v1.2.html): basic facilities (section 2), PCI and
//! MMIO transports (4.1, 4.2), network, block, console, entropy, balloon and socket devices (5.1 to 5.5, 5.10). ACPI 6.5;
//! PCI Express 5.0 (ECAM, MSI-X); the
//! [PVH boot protocol](https://xenbits.xen.org/docs/unstable/misc/pvh.html) and the Linux
//! [x86 boot protocol](https://docs.kernel.org/arch/x86/boot.html); the
//! [KVM API](https://docs.kernel.org/virt/kvm/api.html); the
//! [vhost-user protocol](https://qemu-project.gitlab.io/qemu/interop/vhost-user.html) (front-end).

pub mod accel;
pub mod acpi;
pub mod boot;
pub mod bus;
pub mod devices;
pub mod interrupt;
pub mod lifecycle;
pub mod machine;
pub mod memory;
pub mod migration;
pub mod pci;
pub mod socket;
