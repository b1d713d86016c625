//! What a device and the handlers of its queues implement.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Queue, QueueError};
use super::state::Shared;
use super::worker::Context;
use crate::lifecycle::LifecycleError;
use crate::memory::{AccessError, GuestMemory};

/// Feature bits that are not particular to one kind of device (virtio 1.2, section 6).
pub mod features {
    /// Descriptors may point to tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are suppressed by index instead of by flag.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The device follows virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// Queues can be reset one by one.
    pub const RING_RESET: u64 = 1 << 40;
}

/// A failure that stops a device until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the rules of a queue.
    #[error("The driver made a malformed queue")]
    Queue(#[from] QueueError),
    /// The driver sent a request that breaks the rules of the device.
    #[error("The driver made a malformed request: {0}")]
    Request(&'static str),
    /// The back-end failed for good.
    #[error("The device's back-end failed")]
    Backend(#[from] io::Error),
}

impl From<AccessError> for DeviceError {
    fn from(error: AccessError) -> Self {
        Self::Queue(error.into())
    }
}

/// How a transport interrupts the guest.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `index` were used.
    fn queue(&self, index: usize);
    /// The configuration or the status changed.
    fn config(&self);
    /// A descriptor that interrupts for queue `index` when it is written, for a back-end in another process; `None`
    /// when the transport has none, and [`Self::queue`] must be called.
    ///
    /// # Errors
    /// Fails when the host gives no descriptor.
    fn queue_event(&self, index: usize) -> io::Result<Option<OwnedFd>>;
}

/// Tells the driver that a device changed its configuration space.
#[derive(Clone)]
pub struct ConfigNotifier(pub(super) Arc<Shared>);

impl ConfigNotifier {
    /// The configuration changed (it must read as the new one already).
    pub fn changed(&self) {
        self.0.config_changed();
    }
}

/// What a device gets when its driver is ready.
pub struct Activation<'a> {
    /// Guest RAM.
    pub memory: &'a GuestMemory,
    /// The negotiated features.
    pub features: u64,
    /// The queues that the driver enabled, by index.
    pub queues: &'a [Option<Queue>],
    /// The descriptors that the driver's notifications signal, by queue index.
    pub kicks: &'a [EventFd],
    /// How to interrupt the guest.
    pub interrupt: &'a Arc<dyn Interrupt>,
}

/// A handler and the queues it serves: one worker thread.
pub struct HandlerSpec {
    /// Indices of its queues. Those that the driver did not enable are absent from the handler's context.
    pub queues: Vec<usize>,
    /// Whether a back-end elsewhere watches the queues' notifications; the worker then does not.
    pub external: bool,
    /// The handler.
    pub handler: Box<dyn QueueHandler>,
}

impl HandlerSpec {
    /// A handler that serves `queues` in this process.
    pub fn new(queues: impl IntoIterator<Item = usize>, handler: impl QueueHandler + 'static) -> Self {
        Self { queues: queues.into_iter().collect(), external: false, handler: Box::new(handler) }
    }
}

/// Serves queues on a worker thread. An error stops the device until it is reset.
pub trait QueueHandler: Send {
    /// Called when the worker starts and when it resumes after a pause, before any other call: registers descriptors
    /// to watch. Every queue is served once afterwards.
    ///
    /// # Errors
    /// Fails when the back-end cannot be started.
    fn start(&mut self, _context: &mut Context) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The driver notified queue `index`.
    ///
    /// # Errors
    /// Fails when the driver broke the rules or the back-end failed for good.
    fn queue(&mut self, index: usize, context: &mut Context) -> Result<(), DeviceError>;

    /// A descriptor registered with [`Context::watch`] is ready, for `ready`.
    ///
    /// # Errors
    /// As [`Self::queue`].
    fn event(&mut self, _token: u32, _ready: EventSet, _context: &mut Context) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The time in [`Context::deadline`] came.
    ///
    /// # Errors
    /// As [`Self::queue`].
    fn timer(&mut self, _context: &mut Context) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Completes what is in flight. Nothing is called any more until [`Self::start`].
    fn stop(&mut self, _context: &mut Context) {}
}

/// One kind of virtio device. Configuration accesses come from vCPU threads while handlers run.
pub trait VirtioDevice: Send + Sync {
    /// The device ID of virtio 1.2, section 5.
    fn device_type(&self) -> u32;

    /// A short name for threads and messages.
    fn name(&self) -> &'static str;

    /// The features offered, beyond [`Self::ring_features`].
    fn features(&self) -> u64;

    /// What its queues can do: all that they can when they are served in this process.
    fn ring_features(&self) -> u64 {
        features::INDIRECT_DESC | features::EVENT_IDX | features::RING_RESET
    }

    /// The largest size of each queue.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Fills `data` from `offset` of the configuration space; zeros beyond its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes the configuration space.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// Receives the means to announce configuration changes, once.
    fn connect(&self, _notifier: ConfigNotifier) {}

    /// The driver is ready: makes the handlers of all queues.
    ///
    /// # Errors
    /// Fails when the back-end cannot serve this driver.
    fn activate(&self, activation: Activation<'_>) -> Result<Vec<HandlerSpec>, DeviceError>;

    /// The driver reset the device; its handlers are gone.
    fn reset(&self) {}

    /// Whether something outside of this process writes to guest memory without the memory's observer hearing of it, so
    /// that a machine with this device cannot move while it runs.
    fn writes_unobserved(&self) -> bool {
        false
    }

    /// State beyond the queues and the transport's registers.
    ///
    /// # Errors
    /// Fails when the device cannot describe its state.
    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        Ok(serde_json::Value::Null)
    }

    /// Loads what [`Self::save`] returned, before [`Self::activate`].
    ///
    /// # Errors
    /// Fails when the state belongs to another configuration.
    fn restore(&self, _state: &serde_json::Value) -> Result<(), LifecycleError> {
        Ok(())
    }
}

/// Fills `data` from `offset` of a configuration structure; zeros beyond its end.
pub fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    for (i, byte) in data.iter_mut().enumerate() {
        let at = usize::try_from(offset).ok().and_then(|o| o.checked_add(i));
        *byte = at.and_then(|at| config.get(at)).copied().unwrap_or(0);
    }
}

/// Writes the part of `data` at `offset` that lies within a configuration structure.
pub fn write_config_bytes(config: &mut [u8], offset: u64, data: &[u8]) {
    for (i, value) in data.iter().enumerate() {
        let at = usize::try_from(offset).ok().and_then(|o| o.checked_add(i));
        if let Some(byte) = at.and_then(|at| config.get_mut(at)) {
            *byte = *value;
        }
    }
}
