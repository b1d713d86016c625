//! How a device raises an interrupt, independent of the accelerator.

use std::os::fd::OwnedFd;

/// A message-signalled interrupt: a 32-bit write to the local APICs' address window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Msi {
    /// The address that the message is written to (`0xFEEx_xxxx` and the upper half).
    pub address: u64,
    /// The data written.
    pub data: u32,
    /// The requester ID (PCI bus, device, function), for interrupt remapping.
    pub requester: u16,
}

/// A wired interrupt input of the interrupt controllers: an IO-APIC pin, and the PIC input of the same number.
pub trait IrqLine: Send + Sync {
    /// Drives the line. Edge-triggered sources raise it and lower it again.
    fn set_level(&self, asserted: bool);

    /// Raises and lowers the line: one edge.
    fn pulse(&self) {
        self.set_level(true);
        self.set_level(false);
    }
}

/// One message-signalled interrupt vector of a device (an entry of its MSI-X table).
pub trait MsiVector: Send + Sync {
    /// Programs the message, or `None` while the vector is masked. A trigger while masked is the caller's to remember
    /// (the MSI-X pending bit).
    fn set_message(&self, message: Option<Msi>);

    /// Sends the programmed message; without one it does nothing.
    fn trigger(&self);

    /// An event descriptor that sends the message whenever it is written, for back-ends in other processes
    /// (an irqfd where the accelerator has them).
    ///
    /// # Errors
    /// Fails when no descriptor or accelerator route can be had.
    fn event_fd(&self) -> std::io::Result<OwnedFd>;
}
