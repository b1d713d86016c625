//! The memory balloon (virtio 1.2, section 5.5): the guest gives pages back to the host.

mod discard;
mod handler;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::{Immutable, IntoBytes};

use super::device::{
    Activation, ConfigNotifier, DeviceError, HandlerSpec, VirtioDevice, copy_config, write_config_bytes,
};
use crate::lifecycle::LifecycleError;
use handler::{Pages, Queues};

const STATISTICS: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const FREE_PAGE_HINT: u64 = 1 << 3;
const REPORTING: u64 = 1 << 5;
/// Size of the pages that the configuration space counts in, whatever the guest's own are.
const PAGE: u64 = 4096;
/// Hint commands below this one have a meaning of their own.
const FIRST_HINT: u32 = 2;
const HINT_DONE: u32 = 1;
const QUEUE_SIZE: u16 = 128;

/// What a balloon is made of.
#[derive(Clone, Copy, Debug)]
pub struct BalloonOptions {
    /// The guest may take pages back when it would run out of memory otherwise.
    pub deflate_on_oom: bool,
    /// The guest reports pages as they become free.
    pub reporting: bool,
}

impl Default for BalloonOptions {
    fn default() -> Self {
        Self { deflate_on_oom: true, reporting: true }
    }
}

/// What the guest says of its memory, in bytes or events; `None` for what it does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStatistics {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Major page faults.
    pub major_faults: Option<u64>,
    /// Minor page faults.
    pub minor_faults: Option<u64>,
    /// Unused bytes.
    pub free: Option<u64>,
    /// Bytes of memory.
    pub total: Option<u64>,
    /// Bytes that programs could get without swapping.
    pub available: Option<u64>,
    /// Bytes of caches that can be dropped.
    pub caches: Option<u64>,
    /// Huge pages allocated.
    pub huge_allocated: Option<u64>,
    /// Huge pages that could not be allocated.
    pub huge_failed: Option<u64>,
}

#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    target: u32,
    actual: u32,
    hint: u32,
    poison: u32,
}

/// What the device and its handler share.
struct Core {
    config: Mutex<Config>,
    statistics: Mutex<Option<MemoryStatistics>>,
    /// Asks the handler to fetch statistics.
    wake: EventFd,
    wanted: AtomicBool,
    /// Bytes given back to the host so far, however.
    discarded: AtomicU64,
    next_hint: Mutex<u32>,
    notifier: OnceLock<ConfigNotifier>,
}

impl Core {
    fn changed(&self) {
        if let Some(notifier) = self.notifier.get() {
            notifier.changed();
        }
    }
}

/// A virtio memory balloon.
pub struct Balloon {
    core: Arc<Core>,
    features: u64,
}

impl Balloon {
    /// An empty balloon.
    ///
    /// # Errors
    /// Fails when the host gives no event descriptor.
    pub fn new(options: BalloonOptions) -> io::Result<Arc<Self>> {
        let optional = [(options.deflate_on_oom, DEFLATE_ON_OOM), (options.reporting, REPORTING)];
        let features =
            optional.iter().filter(|(on, _)| *on).fold(STATISTICS | FREE_PAGE_HINT, |all, (_, f)| all | f);
        let core = Core {
            config: Mutex::new(Config { target: 0, actual: 0, hint: 0, poison: 0 }),
            statistics: Mutex::new(None),
            wake: EventFd::new(EFD_NONBLOCK)?,
            wanted: AtomicBool::new(false),
            discarded: AtomicU64::new(0),
            next_hint: Mutex::new(FIRST_HINT),
            notifier: OnceLock::new(),
        };
        Ok(Arc::new(Self { core: Arc::new(core), features }))
    }

    /// Asks the guest to give back `bytes` of its memory in total, rounded down to pages.
    pub fn set_target(&self, bytes: u64) {
        self.core.config.lock().target = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        self.core.changed();
    }

    /// Bytes that the guest has given back by inflating.
    pub fn actual(&self) -> u64 {
        u64::from(self.core.config.lock().actual) * PAGE
    }

    /// Bytes given back to the host since the balloon was made: inflated, reported and hinted. A page that the guest
    /// used again and gave back again counts again.
    pub fn discarded(&self) -> u64 {
        self.core.discarded.load(Ordering::Relaxed)
    }

    /// Asks the guest for statistics; [`Self::statistics`] has them some time later.
    pub fn request_statistics(&self) {
        self.core.wanted.store(true, Ordering::Release);
        // A full counter is signalled already.
        let _ = self.core.wake.write(1);
    }

    /// The last statistics that the guest sent.
    pub fn statistics(&self) -> Option<MemoryStatistics> {
        *self.core.statistics.lock()
    }

    /// Asks the guest to name all its free pages once (before a migration, say); they are given back to the host.
    pub fn request_free_pages(&self) {
        {
            let mut next = self.core.next_hint.lock();
            self.core.config.lock().hint = *next;
            *next = next.checked_add(1).unwrap_or(FIRST_HINT);
        }
        self.core.changed();
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        5
    }

    fn name(&self) -> &'static str {
        "virtio-balloon"
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let optional = [STATISTICS, FREE_PAGE_HINT, REPORTING];
        vec![QUEUE_SIZE; 2 + optional.iter().filter(|&&f| self.features & f != 0).count()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(self.core.config.lock().as_bytes(), offset, data);
    }

    /// The driver writes how many pages it gave back.
    fn write_config(&self, offset: u64, data: &[u8]) {
        let mut config = self.core.config.lock();
        let mut actual = config.actual.to_le_bytes();
        if let Some(within) = offset.checked_sub(4) {
            write_config_bytes(&mut actual, within, data);
        }
        config.actual = u32::from_le_bytes(actual);
    }

    fn connect(&self, notifier: ConfigNotifier) {
        // One transport owns the device.
        let _ = self.core.notifier.set(notifier);
    }

    fn activate(&self, activation: Activation<'_>) -> Result<Vec<HandlerSpec>, DeviceError> {
        // Optional queues take the next index only when they are used, as drivers number them.
        let mut next = 2;
        let mut optional = |feature| {
            (activation.features & feature != 0).then(|| {
                next += 1;
                next - 1
            })
        };
        let queues = Queues {
            statistics: optional(STATISTICS),
            hints: optional(FREE_PAGE_HINT),
            reports: optional(REPORTING),
        };
        Ok(vec![HandlerSpec::new(0..next, Pages::new(Arc::clone(&self.core), queues))])
    }

    fn reset(&self) {
        let mut config = self.core.config.lock();
        (config.actual, config.hint) = (0, 0);
        *self.core.statistics.lock() = None;
    }

    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        let config = self.core.config.lock();
        let next_hint = *self.core.next_hint.lock();
        let saved = Saved { target: config.target, actual: config.actual, hint: config.hint, next_hint };
        Ok(serde_json::json!(saved))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
        let saved = Saved::deserialize(state).map_err(|e| LifecycleError::State(e.to_string()))?;
        let mut config = self.core.config.lock();
        (config.target, config.actual, config.hint) = (saved.target, saved.actual, saved.hint);
        *self.core.next_hint.lock() = saved.next_hint.max(FIRST_HINT);
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    target: u32,
    actual: u32,
    hint: u32,
    next_hint: u32,
}
