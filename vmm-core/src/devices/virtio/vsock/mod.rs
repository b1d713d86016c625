//! The socket device (virtio 1.2, section 5.10), bridged to Unix sockets of the host.
//!
//! A guest that connects to port `P` of the host (CID 2) reaches who listens on `PATH_P`. A program of the host that
//! wants port `P` of the guest connects to `PATH` and sends `CONNECT P\n`; it reads `OK Q\n` when the guest accepted,
//! with the host's port `Q`, and bytes of the connection after that.

mod bridge;
mod connection;
mod packet;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::device::{Activation, DeviceError, HandlerSpec, VirtioDevice, copy_config};
use crate::lifecycle::LifecycleError;
use bridge::Bridge;

/// What the device and its handler share.
struct Core {
    cid: u64,
    path: PathBuf,
    listener: UnixListener,
    /// The guest's connections were lost (after a restore) and it must be told.
    transport_reset: AtomicBool,
}

impl Drop for Core {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A virtio socket device.
pub struct Vsock {
    core: Arc<Core>,
}

impl Vsock {
    /// A device whose guest has this CID (3 to 2^32 - 2), bridged at `path`; see [`socket::listen`](crate::socket::listen).
    ///
    /// # Errors
    /// Fails when the CID is reserved or the socket cannot be made.
    pub fn new(cid: u64, path: &Path) -> io::Result<Arc<Self>> {
        if !(3..u64::from(u32::MAX)).contains(&cid) {
            let message = format!("CID {cid} is reserved; use 3 to 4294967294");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let listener = crate::socket::listen(path)?;
        listener.set_nonblocking(true)?;
        let path = path.to_owned();
        Ok(Arc::new(Self {
            core: Arc::new(Core { cid, path, listener, transport_reset: AtomicBool::new(false) }),
        }))
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        19
    }

    fn name(&self) -> &'static str {
        "virtio-vsock"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![128, 128, 16]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.core.cid.to_le_bytes(), offset, data);
    }

    fn activate(&self, _activation: Activation<'_>) -> Result<Vec<HandlerSpec>, DeviceError> {
        Ok(vec![HandlerSpec::new(0..3, Bridge::new(Arc::clone(&self.core)))])
    }

    fn reset(&self) {
        self.core.transport_reset.store(false, Ordering::Release);
    }

    /// Connections do not move with the guest: their other ends are on this host.
    fn restore(&self, _state: &serde_json::Value) -> Result<(), LifecycleError> {
        self.core.transport_reset.store(true, Ordering::Release);
        Ok(())
    }
}
