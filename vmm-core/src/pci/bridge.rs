//! The host bridge at 00:00.0.

use parking_lot::Mutex;

use super::{ConfigSpace, Identity, PciFunction};
use crate::lifecycle::{Lifecycle, LifecycleError};

/// A host bridge without registers of its own: operating systems expect one.
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    /// The generic PCI Express host bridge.
    pub fn generic() -> Self {
        Self::new(Identity { vendor: 0x1b36, device: 0x0008, class: 0x06_0000, ..Default::default() })
    }

    /// A host bridge with another identity: firmware recognises its chipset by it.
    pub fn new(identity: Identity) -> Self {
        Self { config: Mutex::new(ConfigSpace::new(identity)) }
    }
}

impl Lifecycle for HostBridge {
    fn reset(&self) {
        self.config.lock().reset();
    }

    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        Ok(serde_json::json!(self.config.lock().save()))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
        let bytes: Vec<u8> =
            serde::Deserialize::deserialize(state).map_err(|_| LifecycleError::State("not bytes".into()))?;
        self.config.lock().restore(&bytes)
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }
    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
}
