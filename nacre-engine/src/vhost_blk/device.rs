//! The device behind a socket: its features and its configuration space.

use super::request::Limits;
use blockfmt::Disk;
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;

/// Most queues of a device.
pub const MAX_QUEUES: u16 = 64;
/// Buffers of one request, as told to drivers.
const SEG_MAX: u32 = 126;

/// Feature bits of virtio 1.2, sections 5.2.3 and 6, and of vhost-user.
pub(super) mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
}

/// A device has 1 to 64 queues.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("A device has 1 to {MAX_QUEUES} queues, not {0}")]
pub struct TooManyQueues(pub u16);

/// A block device on a disk.
pub struct Device {
    pub(super) disk: Disk,
    pub(super) serial: [u8; 20],
    pub(super) read_only: bool,
    pub(super) queues: u16,
    /// The driver does not flush: what is written is durable before it is acknowledged.
    write_through: AtomicBool,
}

impl Device {
    /// A device whose serial number is the beginning of `name`.
    ///
    /// # Errors
    /// When `queues` is 0 or more than [`MAX_QUEUES`].
    pub fn new(disk: Disk, name: &str, read_only: bool, queues: u16) -> Result<Self, TooManyQueues> {
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(TooManyQueues(queues));
        }
        let mut serial = [0; 20];
        let len = name.len().min(serial.len());
        serial[..len].copy_from_slice(&name.as_bytes()[..len]);
        let read_only = read_only || disk.is_read_only();
        Ok(Device { disk, serial, read_only, queues, write_through: AtomicBool::new(true) })
    }

    /// What is offered to drivers.
    pub(super) fn features(&self) -> u64 {
        use feature::{
            BLK_SIZE, DISCARD, EVENT_IDX, FLUSH, INDIRECT_DESC, MQ, PROTOCOL_FEATURES, RO, SEG_MAX, TOPOLOGY,
            VERSION_1, WRITE_ZEROES,
        };
        let common = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | MQ | INDIRECT_DESC | EVENT_IDX | VERSION_1;
        common | PROTOCOL_FEATURES | if self.read_only { RO } else { DISCARD | WRITE_ZEROES }
    }

    /// Sets what the driver chose.
    pub(super) fn set_features(&self, features: u64) {
        self.write_through.store(features & feature::FLUSH == 0, Ordering::Release);
    }

    pub(super) fn write_through(&self) -> bool {
        self.write_through.load(Ordering::Acquire)
    }

    /// The configuration space (virtio 1.2, section 5.2.4).
    pub(super) fn config(&self) -> [u8; 60] {
        let geometry = self.disk.geometry();
        let sectors = |bytes: u32| (bytes / 512).max(1);
        let blocks = |bytes: u32| (bytes / geometry.logical_block).max(1);
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.disk.size() / 512).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &geometry.logical_block.to_le_bytes());
        put(24, &[blocks(geometry.physical_block).ilog2() as u8]);
        put(26, &(blocks(geometry.physical_block) as u16).to_le_bytes());
        put(28, &blocks(geometry.cluster).to_le_bytes());
        put(32, &[1]); // writes are cached until a flush
        put(34, &self.queues.to_le_bytes());
        put(36, &Limits::RANGE_SECTORS.to_le_bytes());
        put(40, &Limits::RANGES.to_le_bytes());
        put(44, &sectors(geometry.cluster).to_le_bytes());
        put(48, &Limits::RANGE_SECTORS.to_le_bytes());
        put(52, &Limits::RANGES.to_le_bytes());
        put(56, &[1]); // zeroes may be holes
        config
    }
}
