//! The block device (virtio 1.2, section 5.2).

mod backend;
mod deferred;
mod handler;
mod request;

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use zerocopy::{FromZeros, Immutable, IntoBytes};

pub use backend::{BlockBackend, MemoryDisk};

use super::device::{Activation, ConfigNotifier, DeviceError, HandlerSpec, VirtioDevice, copy_config};
use super::rate::{Limits, RateLimiter};
use crate::lifecycle::LifecycleError;
use handler::Requests;

/// Bytes of a sector, the unit of addresses.
pub const SECTOR: u64 = 512;
const SEG_MAX: u64 = 1 << 2;
const GEOMETRY: u64 = 1 << 4;
const RO: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const TOPOLOGY: u64 = 1 << 10;
const CONFIG_WCE: u64 = 1 << 11;
const MQ: u64 = 1 << 12;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;
/// Offset of the writeback byte in the configuration space.
const WRITEBACK_OFFSET: u64 = 32;
/// Ranges of one discard or write-zeroes request.
const MAX_RANGES: u32 = 32;
/// Sectors of one such range: 1 GiB.
const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// What a block device is made of besides its back-end.
#[derive(Clone, Debug)]
pub struct BlkOptions {
    /// The serial number that the guest sees, cut to 20 bytes.
    pub serial: String,
    /// Number of queues, each served by a thread of its own.
    pub queues: u16,
    /// Entries of each queue.
    pub queue_size: u16,
    /// Refuse writes even when the back-end would take them.
    pub read_only: bool,
    /// Rate limits, over all queues.
    pub limits: Limits,
}

impl Default for BlkOptions {
    fn default() -> Self {
        Self {
            serial: String::new(),
            queues: 1,
            queue_size: 256,
            read_only: false,
            limits: Limits::default(),
        }
    }
}

/// Counters of a block device since it was made.
#[derive(Debug, Default)]
pub struct BlkCounters {
    /// Requests taken from the guest.
    pub requests: AtomicU64,
    /// Requests answered, well or not. Those that were taken and not answered are under way.
    pub answered: AtomicU64,
    /// Reads completed.
    pub reads: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Writes completed.
    pub writes: AtomicU64,
    /// Bytes written.
    pub write_bytes: AtomicU64,
    /// Flushes completed.
    pub flushes: AtomicU64,
    /// Discards and write-zeroes completed.
    pub discards: AtomicU64,
    /// Requests that failed.
    pub errors: AtomicU64,
    /// Times that a rate limit made requests wait.
    pub throttled: AtomicU64,
    /// Operations on the back-end that were left to a queue of it, because it answers late.
    pub deferred: AtomicU64,
}

#[derive(Clone, Copy, FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    capacity: u64,
    size_max: u32,
    seg_max: u32,
    cylinders: u16,
    heads: u8,
    sectors: u8,
    blk_size: u32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: u16,
    opt_io_size: u32,
    writeback: u8,
    unused0: u8,
    num_queues: u16,
    max_discard_sectors: u32,
    max_discard_seg: u32,
    discard_sector_alignment: u32,
    max_write_zeroes_sectors: u32,
    max_write_zeroes_seg: u32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
    secure_erase: [u32; 3],
}

/// What the device and its handlers share.
struct Core {
    backend: Arc<dyn BlockBackend>,
    read_only: bool,
    serial: [u8; 20],
    config: Mutex<Config>,
    writeback: AtomicBool,
    limiter: Mutex<RateLimiter>,
    counters: BlkCounters,
    notifier: OnceLock<ConfigNotifier>,
}

impl Core {
    fn resized(&self, size: u64) {
        self.config.lock().capacity = size / SECTOR;
        if let Some(notifier) = self.notifier.get() {
            notifier.changed();
        }
    }
}

/// A virtio block device.
pub struct Blk {
    core: Arc<Core>,
    queues: u16,
    queue_size: u16,
}

impl Blk {
    /// A device over `backend`. It follows the back-end's resizes.
    pub fn new(backend: Arc<dyn BlockBackend>, options: &BlkOptions) -> Arc<Self> {
        let geometry = backend.geometry();
        let block = geometry.logical_block.max(SECTOR as u32);
        let queues = options.queues.max(1);
        let queue_size = options.queue_size.clamp(2, 1 << 15).next_power_of_two();
        let blocks = |bytes: u32| bytes / block;
        let config = Config {
            capacity: backend.size() / SECTOR,
            size_max: 0,
            seg_max: u32::from(queue_size) - 2,
            cylinders: geometry.cylinders,
            heads: geometry.heads,
            sectors: geometry.sectors,
            blk_size: block,
            physical_block_exp: blocks(geometry.physical_block).max(1).ilog2() as u8,
            alignment_offset: 0,
            min_io_size: u16::try_from(blocks(geometry.physical_block)).unwrap_or(0),
            opt_io_size: blocks(geometry.cluster),
            writeback: 1,
            unused0: 0,
            num_queues: queues,
            max_discard_sectors: MAX_RANGE_SECTORS,
            max_discard_seg: MAX_RANGES,
            discard_sector_alignment: geometry.cluster.max(block) / SECTOR as u32,
            max_write_zeroes_sectors: MAX_RANGE_SECTORS,
            max_write_zeroes_seg: MAX_RANGES,
            write_zeroes_may_unmap: 1,
            unused1: [0; 3],
            secure_erase: [0; 3],
        };
        let mut serial = [0; 20];
        let n = options.serial.len().min(serial.len());
        serial[..n].copy_from_slice(&options.serial.as_bytes()[..n]);
        let core = Arc::new(Core {
            read_only: options.read_only || backend.read_only(),
            backend,
            serial,
            config: Mutex::new(config),
            writeback: AtomicBool::new(true),
            limiter: Mutex::new(RateLimiter::new(&options.limits, Instant::now())),
            counters: BlkCounters::default(),
            notifier: OnceLock::new(),
        });
        let weak = Arc::downgrade(&core);
        core.backend.on_resize(Box::new(move |size| {
            if let Some(core) = weak.upgrade() {
                core.resized(size);
            }
        }));
        Arc::new(Self { core, queues, queue_size })
    }

    /// Replaces the rate limits while the device works.
    pub fn set_limits(&self, limits: &Limits) {
        *self.core.limiter.lock() = RateLimiter::new(limits, Instant::now());
    }

    /// The counters.
    pub fn counters(&self) -> &BlkCounters {
        &self.core.counters
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        2
    }

    fn name(&self) -> &'static str {
        "virtio-blk"
    }

    fn features(&self) -> u64 {
        let common = SEG_MAX | GEOMETRY | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE | MQ;
        common | if self.core.read_only { RO } else { DISCARD | WRITE_ZEROES }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; usize::from(self.queues)]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(self.core.config.lock().as_bytes(), offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (WRITEBACK_OFFSET, &[value]) = (offset, data) {
            self.core.config.lock().writeback = u8::from(value != 0);
            self.core.writeback.store(value != 0, Ordering::Release);
        }
    }

    fn connect(&self, notifier: ConfigNotifier) {
        // One transport owns the device.
        let _ = self.core.notifier.set(notifier);
    }

    fn activate(&self, activation: Activation<'_>) -> Result<Vec<HandlerSpec>, DeviceError> {
        // A driver that cannot flush gets a write-through disk (virtio 1.2, section 5.2.6.2).
        let can_flush = activation.features & FLUSH != 0;
        let handler = |index| Requests::new(Arc::clone(&self.core), can_flush, index);
        Ok((0..usize::from(self.queues)).map(|index| HandlerSpec::new([index], handler(index))).collect())
    }

    fn reset(&self) {
        self.core.config.lock().writeback = 1;
        self.core.writeback.store(true, Ordering::Release);
    }

    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        let config = self.core.config.lock();
        Ok(serde_json::json!({ "capacity": config.capacity, "writeback": config.writeback != 0 }))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
        let mut config = self.core.config.lock();
        if state["capacity"].as_u64() != Some(config.capacity) {
            return Err(LifecycleError::State("its disk has another size".into()));
        }
        let writeback = state["writeback"].as_bool().unwrap_or(true);
        config.writeback = u8::from(writeback);
        self.core.writeback.store(writeback, Ordering::Release);
        Ok(())
    }
}
