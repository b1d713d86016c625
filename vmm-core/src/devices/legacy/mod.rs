//! The chipset: serial port, clock, reset and power registers, and what else a PC guest finds at fixed addresses.

mod debug;
mod fw_cfg;
mod pm;
mod pvpanic;
mod reset;
mod rtc;
mod serial;
mod testdev;

use std::sync::Arc;

pub use debug::{DebugConsole, DebugExit};
pub use fw_cfg::{FW_CFG, FW_CFG_SIZE, FwCfg, FwCfgFile, file_name};
pub use pm::{AcpiPm, PM_BASE, PM_SIZE, RESET_PORT, RESET_VALUE, S5_SLEEP_TYPE};
pub use pvpanic::{PVPANIC_PORT, Pvpanic};
pub use reset::I8042;
pub use rtc::Rtc;
pub use serial::{Serial, SerialOutput};
pub use testdev::{
    TEST_FLUSH, TEST_IRQ, TEST_IRQS, TEST_MEMORY, TEST_MEMORY_SIZE, TEST_SCRATCH, TEST_SCRATCH_BYTES,
    TestFlush, TestIrqs, TestScratch,
};

/// What the guest asks of the machine through a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// ACPI S5: switch the machine off.
    PowerOff,
    /// A reset by one of the reset registers.
    Reset,
    /// The guest's kernel panicked (pvpanic).
    Panicked,
    /// The guest's kernel panicked and a crash kernel takes over (pvpanic).
    CrashLoaded,
    /// A test guest ends with this code (debug-exit port).
    Exit(u8),
}

/// Where devices send [`PowerEvent`]s. Called on vCPU threads.
pub type PowerSink = Arc<dyn Fn(PowerEvent) + Send + Sync>;
