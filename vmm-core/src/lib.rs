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
//! - [`machine`]: composes all of these into a running virtual machine.

pub mod accel;
pub mod acpi;
pub mod boot;
pub mod bus;
pub mod devices;
pub mod interrupt;
pub mod lifecycle;
pub mod machine;
pub mod memory;
pub mod pci;
