//! The console device with one or more ports (virtio 1.2, section 5.3).

mod handler;
mod port;

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::{Immutable, IntoBytes};

pub use port::ConsolePort;

use super::device::{Activation, ConfigNotifier, DeviceError, HandlerSpec, VirtioDevice, copy_config};
use crate::lifecycle::LifecycleError;
use handler::Ports;

const SIZE: u64 = 1;
const MULTIPORT: u64 = 1 << 1;
/// What the configuration space has room for is more than anyone needs.
const MAX_PORTS: usize = 31;

#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    columns: u16,
    rows: u16,
    max_ports: u32,
    emergency: u32,
}

/// What the device and its handler share.
struct Core {
    ports: Vec<Arc<ConsolePort>>,
    config: Mutex<Config>,
    /// Tells the handler that the size changed.
    wake: EventFd,
    /// What the driver opened, by port; part of the state because the driver says it only once.
    opened: Mutex<Vec<bool>>,
    notifier: OnceLock<ConfigNotifier>,
}

/// A virtio console. Port 0 is the guest's `hvc0`.
pub struct Console {
    core: Arc<Core>,
}

impl Console {
    /// A console with these ports. With one port the driver needs no control queues.
    ///
    /// # Errors
    /// Fails when there is no port or more than 31, or the host gives no event descriptor.
    pub fn new(ports: Vec<ConsolePort>) -> std::io::Result<Arc<Self>> {
        if !(1..=MAX_PORTS).contains(&ports.len()) {
            return Err(std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                format!("A console has 1 to {MAX_PORTS} ports, not {}", ports.len()),
            ));
        }
        let config = Config { columns: 80, rows: 25, max_ports: ports.len() as u32, emergency: 0 };
        let core = Core {
            opened: Mutex::new(vec![false; ports.len()]),
            ports: ports.into_iter().map(Arc::new).collect(),
            config: Mutex::new(config),
            wake: EventFd::new(EFD_NONBLOCK)?,
            notifier: OnceLock::new(),
        };
        Ok(Arc::new(Self { core: Arc::new(core) }))
    }

    /// Tells the guest the size of the terminal behind port 0, in characters.
    pub fn resize(&self, columns: u16, rows: u16) {
        {
            let mut config = self.core.config.lock();
            (config.columns, config.rows) = (columns, rows);
        }
        // A full counter is signalled already.
        let _ = self.core.wake.write(1);
        if let Some(notifier) = self.core.notifier.get() {
            notifier.changed();
        }
    }

    fn multiport(&self) -> bool {
        self.core.ports.len() > 1
    }
}

/// Queue of a port towards the guest; the one from the guest follows it.
fn input_queue(port: usize) -> usize {
    if port == 0 { 0 } else { 2 + 2 * port }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        3
    }

    fn name(&self) -> &'static str {
        "virtio-console"
    }

    fn features(&self) -> u64 {
        SIZE | if self.multiport() { MULTIPORT } else { 0 }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let queues = if self.multiport() { 2 + 2 * self.core.ports.len() } else { 2 };
        vec![64; queues]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(self.core.config.lock().as_bytes(), offset, data);
    }

    fn connect(&self, notifier: ConfigNotifier) {
        // One transport owns the device.
        let _ = self.core.notifier.set(notifier);
    }

    fn activate(&self, activation: Activation<'_>) -> Result<Vec<HandlerSpec>, DeviceError> {
        let multiport = activation.features & MULTIPORT != 0;
        let count = if multiport { activation.queues.len() } else { 2 };
        Ok(vec![HandlerSpec::new(0..count, Ports::new(Arc::clone(&self.core), multiport))])
    }

    fn reset(&self) {
        self.core.opened.lock().fill(false);
    }

    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        Ok(serde_json::json!({ "opened": *self.core.opened.lock() }))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
        let opened: Vec<bool> = serde::Deserialize::deserialize(&state["opened"])
            .map_err(|e: serde_json::Error| LifecycleError::State(e.to_string()))?;
        if opened.len() != self.core.ports.len() {
            return Err(LifecycleError::State("its console ports are others".into()));
        }
        *self.core.opened.lock() = opened;
        Ok(())
    }
}
