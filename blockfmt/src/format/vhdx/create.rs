//! Creation of images.

use super::bat::{Entry, state};
use super::header::{Header, MIB, REGION_TABLES, Region, Regions, put};
use super::metadata::{MAX_SIZE, Metadata};
use super::{Params, parent};
use crate::disk::{CreateOptions, Preallocation};
use crate::format::raw;
use crate::{Error, Result, Storage};
use std::sync::Arc;
use uuid::Uuid;

/// Whether space is taken at once or with the first write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VhdxKind {
    /// Blocks get space when they are written first; with a parent, a differencing disk.
    #[default]
    Dynamic,
    /// Every block has its space from the start.
    Fixed,
}

/// Options that only VHDX has.
#[derive(Clone, Debug)]
pub struct VhdxOptions {
    /// The kind of the image.
    pub kind: VhdxKind,
    /// Bytes in a block: a power of two from 1 to 256 MiB. By default 32 MiB, and 2 MiB with a parent.
    pub block_size: Option<u32>,
    /// Bytes in the log: a multiple of 1 MiB, at most 64 MiB.
    pub log_size: u32,
    /// Bytes in a sector that a guest sees: 512 or 4096. QEMU reads 512 only.
    pub logical_sector: u32,
    /// Mark blocks without space as zero instead of as absent.
    pub zero_blocks: bool,
}

impl Default for VhdxOptions {
    fn default() -> Self {
        VhdxOptions {
            kind: VhdxKind::Dynamic,
            block_size: None,
            log_size: 1 << 20,
            logical_sector: 512,
            zero_blocks: false,
        }
    }
}

fn check(options: &CreateOptions, block: u32) -> Result<()> {
    let (o, size) = (&options.vhdx, options.size);
    let problem = if size > MAX_SIZE {
        "A VHDX holds at most 64 TiB"
    } else if o.logical_sector != 512 && o.logical_sector != 4096 {
        "The sectors of a VHDX have 512 or 4096 bytes"
    } else if !size.is_multiple_of(o.logical_sector.into()) {
        "The size of a VHDX is a multiple of its sector size"
    } else if !block.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block) {
        "The block size of a VHDX is a power of two from 1 MiB to 256 MiB"
    } else if !u64::from(o.log_size).is_multiple_of(MIB) || !(1 << 20..=64 << 20).contains(&o.log_size) {
        "The log of a VHDX has a multiple of 1 MiB, at most 64 MiB"
    } else if o.kind == VhdxKind::Fixed && options.backing.is_some() {
        "A fixed VHDX cannot have a parent"
    } else if o.zero_blocks && options.backing.is_some() {
        "Blocks marked as zero would hide the parent"
    } else if o.kind == VhdxKind::Dynamic && options.preallocation != Preallocation::Off {
        "Only fixed VHDX images can be preallocated"
    } else {
        return Ok(());
    };
    Err(Error::InvalidOption(problem.into()))
}

/// Makes `storage` a VHDX image.
pub(crate) fn create(storage: &Arc<dyn Storage>, options: &CreateOptions) -> Result<()> {
    let o = &options.vhdx;
    let block = o.block_size.unwrap_or(if options.backing.is_some() { 2 << 20 } else { 32 << 20 });
    check(options, block)?;
    let fixed = o.kind == VhdxKind::Fixed;
    let locator = match &options.backing {
        Some(backing) => parent::locator(&storage.name(), backing)?,
        None => Vec::new(),
    };
    let metadata = Metadata {
        block_size: block,
        fixed,
        has_parent: options.backing.is_some(),
        size: options.size,
        id: Uuid::new_v4(),
        logical_sector: o.logical_sector,
        physical_sector: 4096,
        locator,
    };
    let p = Params::new(&metadata);
    let entries = p.entries(metadata.size, metadata.has_parent);
    let blocks = metadata.size.div_ceil(p.block);
    let metadata_region = Region { offset: MIB + u64::from(o.log_size), len: MIB };
    let bat = Region { offset: metadata_region.end(), len: (entries.max(1) * 8).next_multiple_of(MIB) };
    let payload = bat.end();
    let end = if fixed { payload + blocks * p.block } else { payload };
    if !storage.zero_beyond_end() {
        storage.zero(0, end, true)?;
    } else {
        storage.truncate(end)?;
    }
    match options.preallocation {
        Preallocation::Falloc => {
            storage.allocate(payload, end - payload).map_err(|e| Error::io("allocate", storage.name(), e))?
        }
        Preallocation::Full => raw::write_zero_bytes(storage, payload, end - payload)?,
        Preallocation::Off | Preallocation::Metadata => {}
    }
    if fixed || o.zero_blocks {
        let entry = |n: u64| match n % (p.ratio + 1) == p.ratio {
            true => Entry(0), // a bitmap, which such disks do not have
            false if fixed => Entry::new(state::PRESENT, payload + (n - n / (p.ratio + 1)) * p.block),
            false => Entry::new(state::ZERO, 0),
        };
        let mut first = 0;
        while first < entries {
            let last = (first + MIB / 8).min(entries);
            let bytes: Vec<u8> = (first..last).flat_map(|n| entry(n).0.to_le_bytes()).collect();
            storage.write_at(&bytes, bat.offset + first * 8)?;
            first = last;
        }
    }
    storage.write_at(&metadata.to_bytes()?, metadata_region.offset)?;
    let table = Regions::table(bat, metadata_region);
    for at in REGION_TABLES {
        storage.write_at(&table, at)?;
    }
    let header = Header {
        sequence: 1,
        file_write: Uuid::new_v4(),
        data_write: Uuid::new_v4(),
        log: Uuid::nil(),
        log_length: o.log_size,
        log_offset: MIB,
    };
    header.write_new(storage)?;
    storage.sync()?;
    // Last, so that a half-written image is no image.
    let mut identifier = vec![0; 520];
    put(&mut identifier, 0, b"vhdxfile");
    let creator: Vec<u8> = "Nacre".encode_utf16().flat_map(u16::to_le_bytes).collect();
    put(&mut identifier, 8, &creator);
    storage.write_at(&identifier, 0)?;
    storage.sync()
}
