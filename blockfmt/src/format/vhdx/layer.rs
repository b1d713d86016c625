//! The image as a layer.

use super::Vhdx;
use super::metadata::Metadata;
use super::parent;
use crate::format::blocks::Blocks;
use crate::format::check::{CheckReport, Repair};
use crate::{
    BackingRef, Below, Error, Extent, Format, Gather, Layer, LayerInfo, Result, Scatter, Source, Storage,
};
use std::sync::Arc;

impl Vhdx {
    fn check_writable(&self) -> Result<()> {
        if self.read_only { Err(Error::ReadOnly) } else { Ok(()) }
    }

    fn subformat(&self) -> &'static str {
        match (self.p.fixed, self.is_differencing()) {
            (true, _) => "fixed",
            (_, true) => "differencing",
            _ => "dynamic",
        }
    }
}

impl Layer for Vhdx {
    fn format(&self) -> Format {
        Format::Vhdx
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
        let facts = self.facts.lock();
        let data = serde_json::json!({
            "subformat": self.subformat(),
            "uuid": facts.metadata.id.to_string(),
            "block-size": self.p.block,
            "logical-sector-size": facts.metadata.logical_sector,
            "physical-sector-size": facts.metadata.physical_sector,
        });
        Ok(LayerInfo {
            filename: self.name.clone(),
            format: Format::Vhdx,
            virtual_size: self.virtual_size(),
            actual_size: self.storage.allocated().map_err(|e| self.io("inspect", e))?,
            cluster_size: Some(self.p.block),
            backing: facts.backing.clone(),
            dirty_flag: self.dirty,
            format_specific: serde_json::json!({ "type": "vhdx", "data": data }),
        })
    }

    fn backing(&self) -> Option<BackingRef> {
        self.facts.lock().backing.clone()
    }

    /// The identifier that the contents have had since they were last changed.
    fn identity(&self) -> Option<[u8; 16]> {
        Some(self.journal.lock().headers.current.data_write.into_bytes())
    }

    fn check_parent(&self, below: &dyn Layer) -> Result<()> {
        let changed = parent::changed(&self.facts.lock().metadata, below);
        match changed {
            true => Err(Error::parent_changed(self, below, "changed since its child was made")),
            false => Ok(()),
        }
    }

    fn note_parent(&self, below: Option<&dyn Layer>) -> Result<()> {
        self.check_writable()?;
        let (metadata, backing) = {
            let facts = self.facts.lock();
            (facts.metadata.clone(), facts.backing.clone())
        };
        if !metadata.has_parent {
            return Ok(());
        }
        self.begin(false)?;
        let metadata = Metadata { locator: parent::noted(&metadata, below), ..metadata };
        let mut journal = self.journal.lock();
        self.flush_with(&mut journal)?;
        self.replace_metadata(&mut journal, metadata, backing)
    }

    fn cluster_size(&self) -> u64 {
        self.p.block
    }

    fn resolve_read(&self, offset: u64, len: u64) -> Result<Extent> {
        self.lookup(offset, len)
    }

    fn map(&self, offset: u64, len: u64) -> Result<Extent> {
        let extent = self.lookup(offset, len)?;
        let Source::Data { offset: host, .. } = extent.source else { return Ok(extent) };
        let (data, len) = self.storage.data_at(host, extent.len).map_err(|e| self.io("map", e))?;
        Ok(Extent { len, source: if data { extent.source } else { Source::Zero { allocated: true } } })
    }

    fn read_opaque(&self, _dst: Scatter<'_>, _offset: u64) -> Result<()> {
        Err(Error::unsupported(&self.name, "compression"))
    }

    fn write(&self, src: Gather<'_>, offset: u64, below: Below<'_>) -> Result<()> {
        self.check_writable()?;
        self.write_guest(src, offset, below)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, below: Below<'_>) -> Result<()> {
        self.check_writable()?;
        self.zero_guest(offset, len, unmap && !self.p.fixed, below)
    }

    fn discard(&self, offset: u64, len: u64, _below: Below<'_>) -> Result<()> {
        self.check_writable()?;
        // A fixed disk keeps its space.
        if self.p.fixed { Ok(()) } else { self.discard_guest(offset, len) }
    }

    fn flush(&self) -> Result<()> {
        if self.read_only { Ok(()) } else { self.flush_all() }
    }

    fn close(&self) -> Result<()> {
        if self.read_only { Ok(()) } else { self.close_image() }
    }

    fn resize(&self, size: u64, below: Below<'_>) -> Result<()> {
        self.check_writable()?;
        self.grow(size, below)
    }

    fn populate(&self, offset: u64, len: u64, below: Below<'_>) -> Result<()> {
        self.check_writable()?;
        self.populate_guest(offset, len, below)
    }

    fn set_backing(&self, backing: Option<&BackingRef>) -> Result<()> {
        self.check_writable()?;
        self.change_parent(backing)
    }

    fn check(&self, repair: Repair) -> Result<CheckReport> {
        self.check_image(repair)
    }
}
