//! Notifications of queues that the accelerator signals directly, without a call of the bus.
//!
//! They are added when a driver is ready, not before: a machine has more devices than its guest uses at first, and each
//! doorbell makes some kernels wait until nobody looks at the list of them.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::iov::borrow;
use super::state::{Status, Virtio};
use crate::accel::{IoAddress, Vm};

/// A write that notifies a queue: its address, length, and value where several queues share the address.
pub(super) type Notification = (IoAddress, u32, Option<u64>);

/// The doorbells of one device.
pub(super) struct Doorbells {
    vm: Weak<dyn Vm>,
    /// Index of the queue and what notifies it, for each doorbell that the accelerator took.
    added: Mutex<Vec<(usize, Notification)>>,
}

impl Doorbells {
    pub(super) fn new(vm: &Arc<dyn Vm>) -> Self {
        Self { vm: Arc::downgrade(vm), added: Mutex::default() }
    }

    /// Adds a doorbell for each queue, unless the driver is not ready or they are there.
    pub(super) fn add(&self, virtio: &Virtio, notification: impl Fn(usize) -> Notification) {
        let mut added = self.added.lock();
        if virtio.status() & Status::DRIVER_OK == 0 || !added.is_empty() {
            return;
        }
        let Some(vm) = self.vm.upgrade() else { return };
        for (index, kick) in virtio.kicks().iter().enumerate() {
            let (address, len, value) = notification(index);
            match vm.add_doorbell(address, len, value, borrow(kick)) {
                Ok(true) => added.push((index, (address, len, value))),
                Ok(false) => {}
                Err(error) => tracing::debug!(%error, "No doorbell; notifications take the slow path"),
            }
        }
    }

    /// Removes them all.
    pub(super) fn remove(&self, virtio: &Virtio) {
        let added = std::mem::take(&mut *self.added.lock());
        // A VM that is gone has none.
        let Some(vm) = self.vm.upgrade() else { return };
        for (index, (address, len, value)) in added {
            if let Err(error) = vm.remove_doorbell(address, len, value, borrow(&virtio.kicks()[index])) {
                tracing::warn!(%error, "A doorbell is stuck");
            }
        }
    }
}
