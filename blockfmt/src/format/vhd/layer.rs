//! The image as a layer.

use super::Vhd;
use super::footer::{Kind, MAX_SIZE, SECTOR, put, timestamp_of_nanos};
use super::meta::UNUSED;
use super::parent;
use crate::format::blocks::Blocks;
use crate::{
    BackingRef, Below, Error, Extent, Format, Gather, Layer, LayerInfo, Result, Scatter, Source, Storage,
};
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Vhd {
    fn check_writable(&self) -> Result<()> {
        if self.read_only { Err(Error::ReadOnly) } else { Ok(()) }
    }

    fn write_footers(&self) -> Result<()> {
        let footer = *self.headers.lock().footer.bytes();
        let end = self.meta.read().end;
        if !self.p.fixed {
            self.storage.write_at(&footer, 0)?;
            self.storage.sync()?;
        }
        self.storage.write_at(&footer, end)?;
        self.storage.sync()
    }
}

impl Layer for Vhd {
    fn format(&self) -> Format {
        Format::Vhd
    }

    fn size(&self) -> u64 {
        self.virtual_size()
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn info(&self) -> Result<LayerInfo> {
        let headers = self.headers.lock();
        let data = serde_json::json!({
            "subformat": headers.footer.kind(&self.name)?.name(),
            "creator": headers.footer.creator(),
            "uuid": uuid::Uuid::from_bytes(headers.footer.uuid()).to_string(),
        });
        Ok(LayerInfo {
            filename: self.name.clone(),
            format: Format::Vhd,
            virtual_size: self.virtual_size(),
            actual_size: self.storage.allocated().map_err(|e| self.io("inspect", e))?,
            cluster_size: (!self.p.fixed).then_some(self.p.block),
            backing: headers.backing.clone(),
            dirty_flag: false,
            format_specific: serde_json::json!({ "type": "vpc", "data": data }),
        })
    }

    fn backing(&self) -> Option<BackingRef> {
        self.headers.lock().backing.clone()
    }

    fn identity(&self) -> Option<[u8; 16]> {
        Some(self.headers.lock().footer.uuid())
    }

    fn check_parent(&self, below: &dyn Layer) -> Result<()> {
        let headers = self.headers.lock();
        let Some(header) = headers.header.as_ref() else { return Ok(()) };
        let (uuid, time) = (header.parent_uuid(), header.parent_timestamp());
        let other_uuid = below.format() == Format::Vhd && below.identity() != Some(uuid);
        let modified = below.storage().modified().map(timestamp_of_nanos);
        // A copy may have an older time; a write makes it newer.
        let written = time != 0 && modified.is_some_and(|m| m > time);
        match other_uuid || written {
            true => Err(Error::parent_changed(self, below, "changed since its child was made")),
            false => Ok(()),
        }
    }

    fn note_parent(&self, below: Option<&dyn Layer>) -> Result<()> {
        let modified = below.and_then(|below| below.storage().modified()).map_or(0, timestamp_of_nanos);
        let mut headers = self.headers.lock();
        let at = headers.footer.header_offset();
        let Some(header) = headers.header.as_mut() else { return Ok(()) };
        put(&mut header.0, 56, &modified.to_be_bytes());
        header.seal();
        // Time and checksum are in one sector, which is written whole or not at all.
        self.storage.write_at(&header.0[..SECTOR as usize], at)?;
        self.storage.sync()
    }

    fn cluster_size(&self) -> u64 {
        self.p.block
    }

    fn resolve_read(&self, offset: u64, len: u64) -> Result<Extent> {
        match self.p.fixed {
            true => Ok(Extent { len, source: Source::Data { file: 0, offset } }),
            false => self.lookup(offset, len),
        }
    }

    fn map(&self, offset: u64, len: u64) -> Result<Extent> {
        let extent = self.resolve_read(offset, len)?;
        let Source::Data { offset: host, .. } = extent.source else { return Ok(extent) };
        let (data, len) = self.storage.data_at(host, extent.len).map_err(|e| self.io("map", e))?;
        Ok(Extent { len, source: if data { extent.source } else { Source::Zero { allocated: true } } })
    }

    fn read_opaque(&self, _dst: Scatter<'_>, _offset: u64) -> Result<()> {
        Err(Error::unsupported(&self.name, "compression"))
    }

    fn write(&self, src: Gather<'_>, offset: u64, below: Below<'_>) -> Result<()> {
        self.check_writable()?;
        match self.p.fixed {
            true => self.storage.writev(src, offset).map_err(|e| self.io("write", e)),
            false => self.write_guest(src, offset, below),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, below: Below<'_>) -> Result<()> {
        self.check_writable()?;
        match self.p.fixed {
            true => self.storage.zero(offset, len, unmap),
            false => self.zero_guest(offset, len, unmap, below),
        }
    }

    fn discard(&self, offset: u64, len: u64, _below: Below<'_>) -> Result<()> {
        self.check_writable()?;
        match self.p.fixed {
            true => self.storage.discard(offset, len).map_err(|e| self.io("discard", e)),
            false => self.discard_guest(offset, len),
        }
    }

    fn flush(&self) -> Result<()> {
        match (self.read_only, self.p.fixed) {
            (true, _) => Ok(()),
            (false, true) => self.storage.sync(),
            (false, false) => self.flush_all(),
        }
    }

    /// Grows the disk. A dynamic disk grows as far as its block allocation table reaches.
    fn resize(&self, size: u64, _below: Below<'_>) -> Result<()> {
        self.check_writable()?;
        let old = self.virtual_size();
        if size < old {
            return Err(Error::unsupported(&self.name, "a smaller size; VHD disks only grow"));
        }
        if size > MAX_SIZE || !size.is_multiple_of(SECTOR) {
            return Err(Error::InvalidOption(
                "The size of a VHD is a multiple of 512 bytes and at most 2040 GiB".into(),
            ));
        }
        if size == old {
            return Ok(());
        }
        if !self.p.fixed {
            let entries = self.headers.lock().header.as_ref().map_or(0, |h| h.entries());
            let blocks = size.div_ceil(self.p.block);
            if blocks > entries.into() {
                let feature = "growth beyond its block allocation table (convert the image instead)";
                return Err(Error::unsupported(&self.name, feature));
            }
            self.flush_all()?;
            // The part of the table that was not in use so far need not be empty.
            let table = self.headers.lock().header.as_ref().map_or(0, |h| h.table_offset());
            let mut meta = self.meta.write();
            let first = meta.bat.len();
            meta.bat.resize(blocks as usize, UNUSED);
            let empty = vec![0xff; (blocks as usize - first) * 4];
            self.storage.write_at(&empty, table + first as u64 * 4)?;
        }
        self.headers.lock().footer.set_size(size);
        if self.p.fixed {
            self.meta.write().end = size;
        }
        self.write_footers()?;
        if self.p.fixed {
            // The old footer is a sector of the disk now.
            self.storage.zero(old, SECTOR, false)?;
            self.storage.sync()?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn populate(&self, offset: u64, len: u64, below: Below<'_>) -> Result<()> {
        self.check_writable()?;
        if self.p.fixed { Ok(()) } else { self.populate_guest(offset, len, below) }
    }

    fn set_backing(&self, backing: Option<&BackingRef>) -> Result<()> {
        self.check_writable()?;
        if self.p.fixed {
            return Err(Error::unsupported(&self.name, "a parent of a fixed disk"));
        }
        self.flush_all()?;
        let Some(mut header) = self.headers.lock().header.clone() else { return Ok(()) };
        let header_offset = self.headers.lock().footer.header_offset();
        match backing {
            None => {
                self.complete_blocks()?;
                // First the footers: with the header of a differencing disk they mean a dynamic one.
                self.headers.lock().footer.set_kind(Kind::Dynamic);
                self.write_footers()?;
                parent::clear(&mut header);
                self.storage.write_at(&header.0, header_offset)?;
                self.storage.sync()?;
            }
            Some(backing) => {
                let end = self.meta.read().end;
                let end = parent::write(&self.storage, &mut header, backing, end)?;
                self.meta.write().end = end;
                self.storage.sync()?;
                self.storage.write_at(&header.0, header_offset)?;
                self.storage.sync()?;
                self.headers.lock().footer.set_kind(Kind::Differencing);
                self.write_footers()?;
            }
        }
        let mut headers = self.headers.lock();
        headers.header = Some(header);
        headers.backing = backing.cloned();
        Ok(())
    }
}
