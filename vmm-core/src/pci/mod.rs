//! PCI: configuration space, base address registers, MSI-X, ECAM and the 0xCF8 ports.
//!
//! One root complex with one bus ([`PciRoot`]): up to 32 devices of 8 functions. A function implements
//! [`PciFunction`] and keeps its registers in a [`ConfigSpace`]; the root answers configuration accesses, assigns
//! addresses to BARs as firmware would (a guest that boots without firmware finds them set), and follows the guest
//! when it moves or disables them.

mod bridge;
mod config;
mod intx;
mod msix;
mod root;

use parking_lot::Mutex;

pub use bridge::HostBridge;
pub use config::{BarKind, Command, ConfigSpace, Identity};
pub use intx::IntxPin;
pub use msix::{MSIX_ENTRY_SIZE, Msix};
pub use root::{ECAM_SIZE, PciRoot, PciWindows};

use crate::lifecycle::Lifecycle;

/// Number of base address registers of a type 0 function.
pub const BARS: usize = 6;

/// Where a function sits on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Device number, 0 to 31.
    pub slot: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl PciAddress {
    /// Device and function in one byte, as in a requester ID.
    pub fn devfn(self) -> u8 {
        self.slot << 3 | self.function
    }
}

impl std::fmt::Display for PciAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "00:{:02x}.{}", self.slot, self.function)
    }
}

/// Why a function cannot be described or added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// The device or function number does not exist, or all are taken.
    #[error("No free PCI slot at {0}; use another one of 32 slots with 8 functions")]
    NoSlot(PciAddress),
    /// A BAR's index, size or kind is malformed or its register is taken.
    #[error("BAR {index} of {size:#x} bytes is malformed or overlaps another")]
    BadBar {
        /// Index of the register.
        index: usize,
        /// Size in bytes.
        size: u64,
    },
    /// No capability fits into the 256 bytes of configuration space.
    #[error("PCI configuration space has no room for a capability of {0} bytes")]
    NoCapabilitySpace(usize),
    /// The address window for BARs of this kind is full.
    #[error("No room for a BAR of {size:#x} bytes; enlarge the PCI address windows")]
    WindowFull {
        /// Size in bytes.
        size: u64,
    },
}

/// One PCI function. The root calls it from vCPU threads, several at once.
pub trait PciFunction: Lifecycle {
    /// The function's registers. The root locks them briefly; the function never calls the root with them locked.
    fn config(&self) -> &Mutex<ConfigSpace>;

    /// A guest read of 1 to 8 bytes within BAR `bar`.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// A guest write of 1 to 8 bytes within BAR `bar`.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);

    /// BAR `bar` now answers at `base`, or nowhere.
    fn bar_mapped(&self, _bar: usize, _base: Option<u64>) {}

    /// Called before a configuration read of 1 to 4 bytes: a function with registers that are windows to something
    /// else fills `data` and returns true.
    fn config_read(&self, _offset: usize, _data: &mut [u8]) -> bool {
        false
    }

    /// Called after a configuration write of 1 to 4 bytes was taken by [`ConfigSpace::write`].
    fn config_written(&self, _offset: usize, _len: usize) {}

    /// The function was added at `address`.
    fn placed(&self, _address: PciAddress) {}

    /// Receives its interrupt pin, when the root routes INTx.
    fn connect_intx(&self, _pin: IntxPin) {}
}
