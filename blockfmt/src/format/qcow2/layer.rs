//! The image as a layer.

use super::header::{Header, compatible, extension, incompatible};
use super::write::Payload;
use super::{Qcow2, map, parent};
use crate::disk::Preallocation;
use crate::format::check::{CheckReport, Repair};
use crate::layer::{LayerHold, LayerPass};
use crate::{
    BackingRef, Below, Error, Extent, Format, Gather, Layer, LayerInfo, Result, Scatter, Storage, Stored,
};
use std::sync::Arc;

/// The external data file that an image names, if it has one.
pub(crate) fn data_file_name(storage: &Arc<dyn Storage>) -> Result<Option<String>> {
    let header = Header::read(storage)?;
    if header.incompatible & incompatible::DATA_FILE == 0 {
        return Ok(None);
    }
    let name = header.extension(extension::DATA_FILE).and_then(|n| std::str::from_utf8(n).ok());
    match name {
        Some(name) => Ok(Some(name.to_owned())),
        None => Err(Error::corrupt(storage.name(), "it does not name its external data file")),
    }
}

impl Layer for Qcow2 {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn size(&self) -> u64 {
        self.virtual_size()
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn data_file(&self, _file: u32) -> &Arc<dyn Storage> {
        self.payload()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn info(&self) -> Result<LayerInfo> {
        let header = self.header.lock().clone();
        let data_file = header.extension(extension::DATA_FILE);
        let mut data = serde_json::json!({
            "compat": if header.version >= 3 { "1.1" } else { "0.10" },
            "compression-type": header.compression,
            "refcount-bits": 1 << header.refcount_order,
            "extended-l2": self.p.extended,
            "lazy-refcounts": header.compatible & compatible::LAZY_REFCOUNTS != 0,
            "corrupt": header.incompatible & incompatible::CORRUPT != 0,
        });
        let bitmaps = self.bitmaps()?;
        if !bitmaps.is_empty() {
            data["bitmaps"] = serde_json::json!(bitmaps);
        }
        if let Some((_, facts)) = &self.plain {
            data["encrypt"] = facts.clone();
            data["encrypt"]["format"] = "luks".into();
        }
        if let Some(name) = data_file {
            data["data-file"] = String::from_utf8_lossy(name).into();
        }
        Ok(LayerInfo {
            filename: self.name.clone(),
            format: Format::Qcow2,
            virtual_size: self.virtual_size(),
            actual_size: self.storage.allocated().map_err(|e| self.io("inspect", e))?,
            cluster_size: Some(self.p.cluster),
            backing: header.backing_ref(),
            dirty_flag: header.incompatible & incompatible::DIRTY != 0,
            format_specific: serde_json::json!({ "type": "qcow2", "data": data }),
        })
    }

    fn backing(&self) -> Option<BackingRef> {
        self.header.lock().backing_ref()
    }

    fn check_parent(&self, below: &dyn Layer) -> Result<()> {
        let changed = parent::changed(&self.storage, &self.header.lock(), below);
        match changed {
            Some(what) => Err(Error::parent_changed(self, below, what)),
            None => Ok(()),
        }
    }

    fn note_parent(&self, below: Option<&dyn Layer>) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        let known = {
            let header = self.header.lock();
            let known = below.and_then(|below| parent::of_layer(&self.storage, &header, below));
            if header.extension(extension::PARENT) == known.as_deref() {
                return Ok(());
            }
            known
        };
        self.flush_all()?;
        let mut header = self.header.lock();
        header.set_extension(extension::PARENT, known);
        self.write_header(&mut header)?;
        self.storage.sync()
    }

    fn cluster_size(&self) -> u64 {
        self.p.cluster
    }

    fn enter(&self) -> LayerPass<'_> {
        LayerPass(Some(self.gate.enter()))
    }

    fn try_hold(&self) -> Option<LayerHold> {
        self.gate.try_hold().map(|hold| LayerHold(Some(hold)))
    }

    fn resolve_read(&self, offset: u64, len: u64) -> Result<Extent> {
        self.resolve(offset, len)
    }

    fn read_opaque(&self, mut dst: Scatter<'_>, offset: u64) -> Result<()> {
        let mut done = 0;
        while done < dst.len() {
            let at = offset + done as u64;
            let (kind, len) = self.lookup(at, (dst.len() - done) as u64)?;
            let map::Kind::Compressed { entry } = kind else {
                // The cluster was written since it was resolved.
                let left = dst.len() - done;
                return self.read_guest(dst.slice(done, left), at, Below::new(&[]));
            };
            self.read_compressed(dst.slice(done, len as usize), at, entry)?;
            done += len as usize;
        }
        Ok(())
    }

    fn write(&self, src: Gather<'_>, offset: u64, below: Below<'_>) -> Result<()> {
        let _pass = self.enter_to_change()?;
        let result = self.write_guest(Payload::Memory(src), offset, below);
        self.record(offset, src.len() as u64);
        result
    }

    fn resolve_write(&self, offset: u64, len: u64) -> Result<Option<u64>> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        if self.bitmaps_are_stored() {
            return Ok(None); // inside the gate one must not wait for that
        }
        match self.lookup(offset, len)? {
            (map::Kind::Data { host, copied: true }, n) if n == len => Ok(Some(host)),
            _ => Ok(None),
        }
    }

    fn written(&self, offset: u64, len: u64) {
        self.record(offset, len);
    }

    fn write_stored(&self, src: Stored<'_>, offset: u64, below: Below<'_>) -> Result<bool> {
        let _pass = self.enter_to_change()?;
        let result = self.write_guest(Payload::Stored(src), offset, below);
        self.record(offset, src.len);
        result.map(|()| true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, below: Below<'_>) -> Result<()> {
        let _pass = self.enter_to_change()?;
        let result = self.zero_guest(offset, len, unmap, below);
        self.record(offset, len);
        result
    }

    fn discard(&self, offset: u64, len: u64, below: Below<'_>) -> Result<()> {
        let _pass = self.enter_to_change()?;
        let result = self.discard_guest(offset, len, below);
        self.record(offset, len);
        result
    }

    fn flush(&self) -> Result<()> {
        if self.read_only { Ok(()) } else { self.flush_all() }
    }

    fn close(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.store_bitmaps()?;
        self.close_image()
    }

    fn resize(&self, size: u64, below: Below<'_>) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        let _directory = self.use_bitmaps()?; // nobody adds a bitmap of the old size
        if size != self.virtual_size() && !self.read_directory()?.is_empty() {
            return Err(Error::unsupported(&self.name, "resizing an image with bitmaps"));
        }
        self.resize_image(size, below)
    }

    fn check_preallocation(&self, how: Preallocation) -> Result<()> {
        match how != Preallocation::Off && self.plain.is_some() {
            true => Err(Error::unsupported(&self.name, "preallocation of an encrypted image")),
            false => Ok(()),
        }
    }

    fn preallocate(&self, from: u64, how: Preallocation) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        self.check_preallocation(how)?;
        self.preallocate_from(from, how)
    }

    fn populate(&self, offset: u64, len: u64, below: Below<'_>) -> Result<()> {
        let _pass = self.enter_to_change()?;
        self.populate_guest(offset, len, below)
    }

    fn set_backing(&self, backing: Option<&BackingRef>) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        let _directory = self.use_bitmaps()?;
        self.flush_all()?;
        let mut header = self.header.lock();
        header.set_backing(backing)?;
        let known = backing.and_then(|backing| parent::of_file(&self.storage, backing));
        header.set_extension(extension::PARENT, known);
        header.warn_if_unguarded(&self.name);
        self.write_header(&mut header)?;
        self.storage.sync()
    }

    fn check(&self, repair: Repair) -> Result<CheckReport> {
        Qcow2::check(self, repair)
    }

    fn as_qcow2(&self) -> Option<&Qcow2> {
        Some(self)
    }
}
