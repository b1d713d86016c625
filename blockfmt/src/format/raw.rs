//! The bytes of the disk, nothing else.

use super::LayerOptions;
use crate::disk::{CreateOptions, Preallocation};
use crate::{
    Below, Error, Extent, Format, Gather, Layer, LayerInfo, Result, Scatter, Source, Storage, Stored,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A raw image: a file or a block device.
#[derive(Debug)]
pub struct Raw {
    storage: Arc<dyn Storage>,
    size: AtomicU64,
    read_only: bool,
}

impl Raw {
    /// Opens a raw image. Its size is the storage's.
    pub fn open(storage: Arc<dyn Storage>, options: &LayerOptions) -> Result<Self> {
        let size = AtomicU64::new(storage.length()?);
        Ok(Raw { read_only: options.read_only || storage.read_only(), storage, size })
    }

    fn io<T>(&self, op: &'static str, result: std::io::Result<T>) -> Result<T> {
        result.map_err(|e| Error::io(op, self.storage.name(), e))
    }
}

impl Layer for Raw {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn info(&self) -> Result<LayerInfo> {
        Ok(LayerInfo {
            filename: self.storage.name(),
            format: Format::Raw,
            virtual_size: self.size(),
            actual_size: self.io("inspect", self.storage.allocated())?,
            cluster_size: None,
            backing: None,
            dirty_flag: false,
            format_specific: serde_json::Value::Null,
        })
    }

    fn resolve_read(&self, offset: u64, len: u64) -> Result<Extent> {
        Ok(Extent { len, source: Source::Data { file: 0, offset } })
    }

    fn map(&self, offset: u64, len: u64) -> Result<Extent> {
        let (data, len) = self.io("map", self.storage.data_at(offset, len))?;
        let source = match data {
            true => Source::Data { file: 0, offset },
            false => Source::Zero { allocated: false },
        };
        Ok(Extent { len, source })
    }

    fn read_opaque(&self, dst: Scatter<'_>, offset: u64) -> Result<()> {
        self.io("read", self.storage.readv(dst, offset))
    }

    fn write(&self, src: Gather<'_>, offset: u64, _below: Below<'_>) -> Result<()> {
        self.io("write", self.storage.writev(src, offset))
    }

    fn resolve_write(&self, offset: u64, _len: u64) -> Result<Option<u64>> {
        Ok(Some(offset))
    }

    fn write_stored(&self, src: Stored<'_>, offset: u64, _below: Below<'_>) -> Result<bool> {
        Ok(self.storage.copy_from(&**src.storage, src.offset, offset, src.len) == src.len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, _below: Below<'_>) -> Result<()> {
        self.storage.zero(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64, _below: Below<'_>) -> Result<()> {
        self.io("discard", self.storage.discard(offset, len))
    }

    fn flush(&self) -> Result<()> {
        self.storage.sync()
    }

    fn resize(&self, size: u64, _below: Below<'_>) -> Result<()> {
        self.storage.truncate(size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn check_preallocation(&self, how: Preallocation) -> Result<()> {
        match how {
            Preallocation::Metadata => Err(Error::InvalidOption(
                "A raw image has no metadata to preallocate; use falloc or full".into(),
            )),
            _ => Ok(()),
        }
    }

    fn preallocate(&self, from: u64, how: Preallocation) -> Result<()> {
        let len = self.size().saturating_sub(from);
        match how {
            Preallocation::Off | Preallocation::Metadata => self.check_preallocation(how),
            Preallocation::Falloc => self.io("allocate", self.storage.allocate(from, len)),
            Preallocation::Full => write_zero_bytes(&self.storage, from, len),
        }
    }
}

/// Makes `storage` a raw image.
pub(crate) fn create(storage: &Arc<dyn Storage>, options: &CreateOptions) -> Result<()> {
    if options.backing.is_some() {
        return Err(Error::InvalidOption("A raw image cannot have a backing file".into()));
    }
    storage.truncate(options.size)?;
    match options.preallocation {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => {
            storage.allocate(0, options.size).map_err(|e| Error::io("allocate", storage.name(), e))?;
        }
        Preallocation::Full => write_zero_bytes(storage, 0, options.size)?,
    }
    Ok(())
}

/// Writes zeros as data, so that every block is allocated and initialised.
pub(crate) fn write_zero_bytes(storage: &Arc<dyn Storage>, offset: u64, len: u64) -> Result<()> {
    let zeros = vec![0; len.min(1 << 20) as usize];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(zeros.len() as u64);
        storage.write_at(&zeros[..n as usize], offset + done)?;
        done += n;
    }
    Ok(())
}
