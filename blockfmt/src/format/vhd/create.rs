//! Creation of images.

use super::footer::{Footer, Header, Kind, MAX_SIZE, SECTOR};
use super::parent;
use crate::disk::{CreateOptions, Preallocation};
use crate::format::raw;
use crate::{Error, Result, Storage};
use std::sync::Arc;

/// Whether space is taken at once or with the first write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VhdKind {
    /// Blocks get space when they are written first; with a parent, a differencing disk.
    #[default]
    Dynamic,
    /// The bytes of the disk and a footer.
    Fixed,
}

/// Options that only VHD has.
#[derive(Clone, Debug)]
pub struct VhdOptions {
    /// The kind of the image.
    pub kind: VhdKind,
    /// Bytes in a block: a power of two from 512 KiB to 64 MiB. QEMU reads 2 MiB only.
    pub block_size: u32,
}

impl Default for VhdOptions {
    fn default() -> Self {
        VhdOptions { kind: VhdKind::Dynamic, block_size: 2 << 20 }
    }
}

/// Makes `storage` a VHD image.
pub(crate) fn create(storage: &Arc<dyn Storage>, options: &CreateOptions) -> Result<()> {
    let invalid = |what: &str| Err(Error::InvalidOption(what.into()));
    let size = options.size;
    if size > MAX_SIZE {
        return invalid("A VHD holds at most 2040 GiB; use VHDX or qcow2");
    }
    if !size.is_multiple_of(SECTOR) {
        return invalid("The size of a VHD is a multiple of 512 bytes");
    }
    if options.vhd.kind == VhdKind::Fixed {
        if options.backing.is_some() {
            return invalid("A fixed VHD cannot have a parent");
        }
        match options.preallocation {
            Preallocation::Off | Preallocation::Metadata => storage.truncate(size + SECTOR)?,
            Preallocation::Falloc => {
                storage.allocate(0, size + SECTOR).map_err(|e| Error::io("allocate", storage.name(), e))?
            }
            Preallocation::Full => raw::write_zero_bytes(storage, 0, size)?,
        }
        storage.write_at(Footer::new(Kind::Fixed, size).bytes(), size)?;
        return storage.sync();
    }
    if options.preallocation != Preallocation::Off {
        return invalid("Only fixed VHDs can be preallocated");
    }
    let block = options.vhd.block_size;
    if !block.is_power_of_two() || !(512 << 10..=64 << 20).contains(&block) {
        return invalid("The block size of a VHD is a power of two from 512 KiB to 64 MiB");
    }
    let kind = if options.backing.is_some() { Kind::Differencing } else { Kind::Dynamic };
    let footer = Footer::new(kind, size);
    let table = SECTOR + 1024;
    // Room to grow: at least 4 sectors of entries.
    let entries = size.div_ceil(block.into()).next_multiple_of(SECTOR / 4).max(SECTOR);
    let mut header = Header::new(table, entries as u32, block);
    let mut end = table + entries * 4;
    storage.write_at(&vec![0xff; (entries * 4) as usize], table)?;
    if let Some(backing) = &options.backing {
        end = parent::write(storage, &mut header, backing, end)?;
    }
    storage.write_at(&header.0, SECTOR)?;
    storage.write_at(footer.bytes(), end)?;
    storage.sync()?;
    // Last, so that a half-written image is no image.
    storage.write_at(footer.bytes(), 0)?;
    storage.sync()
}
