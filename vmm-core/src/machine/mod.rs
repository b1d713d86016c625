//! A whole virtual machine: it composes an accelerator, RAM, devices and a kernel, and runs them.
//!
//! ```no_run
//! use vmm_core::machine::{StopReason, Vm, VmConfig};
//!
//! let mut config = VmConfig::default();
//! config.boot.kernel = "/boot/vmlinuz".into();
//! config.boot.command_line = "console=ttyS0".into();
//! let vm = Vm::builder(config).build()?;
//! vm.start()?;
//! assert_eq!(vm.wait(), StopReason::PowerOff);
//! # Ok::<(), vmm_core::machine::VmError>(())
//! ```
//! A machine that stopped stays stopped: after a reset its owner builds a new one from the same configuration. Dropping
//! a [`Vm`] stops it; no thread, descriptor or mapping remains.

mod build;
mod config;
mod console;
mod devices;
mod disk;
mod entry;
mod events;
mod firmware;
mod gdb;
mod layout;
mod metrics;
mod transfer;
mod vcpu;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

pub use self::build::VmBuilder;
pub use self::config::{
    AccelChoice, BootConfig, ConsoleConfig, ConsolePortConfig, CpuModelChoice, DiskConfig, GdbConfig,
    LimitConfig, MemoryConfig, NetBackendConfig, NetConfig, NumaConfig, PageConfig, VmConfig, VsockConfig,
};
use self::console::RunningConsole;
pub use self::console::{ConsoleError, InputFilter};
pub use self::devices::mac_address;
use self::disk::MachineDisk;
pub use self::events::{Events, StopReason, VmEvent};
pub use self::gdb::GdbError;
use self::gdb::GdbServer;
use self::metrics::Sources;
pub use self::metrics::{BusMetrics, CpuMetrics, DiskMetrics, Metrics, NetMetrics};
pub use self::transfer::{AfterSnapshot, RestoreOptions, SnapshotReport};
use self::vcpu::{Control, VcpuThread};
use crate::accel::{self, AccelError, AccelKind};
use crate::acpi::AcpiError;
use crate::boot::BootError;
use crate::bus::{Bus, BusError};
use crate::devices::legacy::AcpiPm;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::net::TapError;
use crate::devices::virtio::pci::VirtioPciError;
use crate::devices::virtio::vhost_user::VhostUserError;
use crate::lifecycle::{Lifecycle, LifecycleError};
use crate::memory::{GuestMemory, MapError};
use crate::migration::{MigrationError, StreamError};
use crate::pci::PciError;

/// Why a machine cannot be built or controlled.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The configuration asks for something impossible.
    #[error("Invalid configuration: {0}")]
    Config(String),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MapError),
    /// The accelerator.
    #[error(transparent)]
    Accel(#[from] AccelError),
    /// The kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The serial console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The debugger's address.
    #[error(transparent)]
    Gdb(#[from] GdbError),
    /// Two devices at one address.
    #[error("Two devices answer at one address; this is a bug, please report it")]
    Bus(#[from] BusError),
    /// PCI.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] VirtioPciError),
    /// A disk image.
    #[error("Cannot use the disk {}", path.display())]
    Disk {
        /// The image.
        path: PathBuf,
        /// The reason.
        #[source]
        source: blockfmt::Error,
    },
    /// A device did not follow a change of the machine's state.
    #[error(transparent)]
    Lifecycle(#[from] LifecycleError),
    /// A tap interface.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A vhost-user back-end.
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
    /// The virtio socket device.
    #[error("Cannot offer the socket device at {}; check the CID and the path", path.display())]
    Vsock {
        /// The Unix socket.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// Nobody listens at the socket of a network device.
    #[error("Nobody listens at {}; start the switch or passt first", path.display())]
    NetSocket {
        /// The socket.
        path: PathBuf,
    },
    /// The host refused a thread or descriptor.
    #[error("Cannot get {what} from the host; raise its limits")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// A vCPU's thread cannot run where the configuration wants it.
    #[error("Cannot bind vCPU {vcpu} to its host CPUs; give CPUs that exist and that this process may use")]
    Affinity {
        /// The vCPU.
        vcpu: u32,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// The machine has stopped.
    #[error("The machine has stopped; build a new one")]
    Stopped,
    /// A saved machine, or one that is received, cannot be read, or the state cannot be written.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A file for a machine's state cannot be opened or made.
    #[error("Cannot use the snapshot {}", path.display())]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// The saved or received machine does not fit this configuration or this host.
    #[error("This machine cannot go on here: {0}")]
    Incompatible(String),
    /// The machine has a part whose state cannot be saved.
    #[error("This machine cannot be saved or moved: {0}")]
    CannotSave(String),
    /// A live migration failed.
    #[error(transparent)]
    Migration(#[from] MigrationError),
}

/// A virtual machine. All methods may be called from any thread.
pub struct Vm {
    control: Arc<Control>,
    threads: Vec<VcpuThread>,
    /// Serialises changes of the machine's state.
    lifecycle: Mutex<bool>,
    kind: AccelKind,
    cpus: u32,
    memory: GuestMemory,
    devices: Devices,
    sources: Sources,
    accel: Arc<dyn accel::Vm>,
    /// One snapshot or migration at a time.
    moving: Mutex<()>,
}

/// A part of the machine with a lifecycle, by the name that its state has in a snapshot.
struct Unit {
    name: String,
    lifecycle: Arc<dyn Lifecycle>,
}

impl Unit {
    fn new(name: impl Into<String>, lifecycle: Arc<dyn Lifecycle>) -> Self {
        Self { name: name.into(), lifecycle }
    }
}

/// What is connected to the machine. Dropped before the accelerator's VM.
struct Devices {
    mmio: Arc<Bus>,
    ports: Arc<Bus>,
    /// Everything with a lifecycle, in the order in which it starts.
    units: Vec<Unit>,
    disks: Vec<Arc<MachineDisk>>,
    macs: Vec<[u8; 6]>,
    /// Guest-physical address of the VM generation ID.
    generation_id: u64,
    /// Why the machine cannot be saved, or cannot move while it runs, if it cannot.
    unsaved: Option<&'static str>,
    unobserved: Option<&'static str>,
    pm: Arc<AcpiPm>,
    consoles: Mutex<Vec<RunningConsole>>,
    gdb: Mutex<Option<GdbServer>>,
}

impl Vm {
    /// Begins to build a machine.
    pub fn builder(config: VmConfig) -> VmBuilder {
        VmBuilder::new(config)
    }

    /// Starts the devices and lets the vCPUs run. Also continues after [`Vm::pause`], and opens the disks of a machine that
    /// was parked in a migration.
    ///
    /// # Errors
    /// Fails when the machine has stopped, a disk cannot be opened again or a device's back-end cannot be started; and when
    /// the host has no thread for the console, which stops the machine.
    pub fn start(&self) -> Result<(), VmError> {
        let mut started = self.lifecycle.lock();
        if self.control.ending().is_some() {
            return Err(VmError::Stopped);
        }
        self.open_disks()?;
        self.start_units()?;
        let event = if *started { VmEvent::Resumed } else { VmEvent::Started };
        // The first run of a machine that is debugged is the debugger's to start.
        let held = !*started && self.devices.gdb.lock().is_some();
        // Reported before anything that the guest then does.
        if self.control.reason().is_some() {
            return Err(VmError::Stopped);
        }
        self.control.events.push(event);
        if !held && !self.control.run() {
            return Err(VmError::Stopped);
        }
        *started = true;
        // The guest is on its way: it does not wait for the console's thread.
        let reading = self.devices.consoles.lock().iter_mut().try_for_each(RunningConsole::start);
        reading.inspect_err(|_| self.stop()).map_err(VmError::from)
    }

    /// Stops the vCPUs, then the devices: afterwards guest memory does not change.
    ///
    /// # Errors
    /// Fails when the machine has stopped or a device cannot complete what is in flight.
    pub fn pause(&self) -> Result<(), VmError> {
        let _serial = self.lifecycle.lock();
        if !self.control.pause() {
            return Err(VmError::Stopped);
        }
        self.pause_units()?;
        self.control.events.push(VmEvent::Paused);
        Ok(())
    }

    fn start_units(&self) -> Result<(), LifecycleError> {
        self.devices.units.iter().try_for_each(|unit| unit.lifecycle.start())
    }

    fn pause_units(&self) -> Result<(), LifecycleError> {
        self.devices.units.iter().try_for_each(|unit| unit.lifecycle.pause())
    }

    /// Presses the power button; a guest that listens shuts down.
    pub fn press_power_button(&self) {
        self.devices.pm.press_power_button();
    }

    /// Stops the vCPUs at once, as if the power failed. [`Vm::wait`] returns afterwards.
    pub fn stop(&self) {
        self.control.stop(StopReason::Stopped);
    }

    /// Something that stops the machine from places that must not keep it alive, such as a signal handler's thread.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.control.clone())
    }

    /// Waits until all vCPUs have stopped and says why.
    pub fn wait(&self) -> StopReason {
        loop {
            // Without a deadline there is always a reason.
            if let Some(reason) = self.control.wait(None) {
                return reason;
            }
        }
    }

    /// As [`Vm::wait`], for at most `timeout`; `None` when the machine still runs then.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<StopReason> {
        self.control.wait(Instant::now().checked_add(timeout))
    }

    /// Why the machine stopped, or `None` while it has not.
    pub fn stop_reason(&self) -> Option<StopReason> {
        self.control.reason()
    }

    /// What happens to the machine, with a descriptor to poll.
    pub fn events(&self) -> &Events {
        &self.control.events
    }

    /// What the machine has counted since it was built.
    pub fn metrics(&self) -> Metrics {
        Metrics { cpu: self.control.cpu_metrics(), ..self.sources.read() }
    }

    /// The memory balloon, when there is one.
    pub fn balloon(&self) -> Option<&Arc<Balloon>> {
        self.sources.balloon.as_ref()
    }

    /// The accelerator in use.
    pub fn accelerator(&self) -> AccelKind {
        self.kind
    }

    /// The guest's RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The accelerator's machine, for back-ends that are added by its owner.
    pub fn accel(&self) -> &Arc<dyn accel::Vm> {
        &self.accel
    }
}

/// Stops a machine without keeping it alive.
#[derive(Clone)]
pub struct Stopper(Arc<Control>);

impl Stopper {
    /// As [`Vm::stop`].
    pub fn stop(&self) {
        self.0.stop(StopReason::Stopped);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.control.stop(StopReason::Stopped);
        self.threads.clear();
        for unit in &self.devices.units {
            if let Err(error) = unit.lifecycle.pause() {
                tracing::error!(%error, "A device did not complete its requests");
            }
        }
        self.devices.consoles.get_mut().clear();
        *self.devices.gdb.get_mut() = None;
        // Devices and buses refer to each other; cut that here.
        self.devices.mmio.clear();
        self.devices.ports.clear();
    }
}

#[cfg(test)]
mod tests;
