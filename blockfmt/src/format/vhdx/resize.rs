//! Growth, and changes of the parent.

use super::bat::{Entry, state};
use super::header::{MIB, PAGE, REGION_TABLES, Region};
use super::metadata::{MAX_SIZE, Metadata};
use super::{Journal, Meta, Vhdx, pages, parent};
use crate::format::blocks::Blocks;
use crate::{BackingRef, Below, Error, Result};
use std::sync::atomic::Ordering;

impl Vhdx {
    /// Grows the disk. No request is in flight.
    pub(super) fn grow(&self, size: u64, below: Below<'_>) -> Result<()> {
        let old = self.virtual_size();
        if size < old {
            return Err(Error::unsupported(&self.name, "a smaller size; VHDX disks only grow"));
        }
        if size > MAX_SIZE || !size.is_multiple_of(self.p.sector) {
            return Err(Error::InvalidOption(
                "The size of a VHDX is a multiple of its sector size and at most 64 TiB".into(),
            ));
        }
        if size == old {
            return Ok(());
        }
        self.begin(true)?;
        self.make_room(self.p.entries(size, self.is_differencing()))?;
        self.clear_beyond(old, size, below)?;
        if self.p.fixed {
            self.allocate_guest(old, size - old)?;
        }
        let mut journal = self.journal.lock();
        self.flush_with(&mut journal)?;
        let mut facts = self.facts.lock();
        let metadata = Metadata { size, ..facts.metadata.clone() };
        let (at, bytes) = metadata.size_patch(&facts.places);
        let region = self.meta.read().regions.metadata;
        self.commit_patches(&mut journal, &[(region.offset + at, bytes)])?;
        facts.metadata = metadata;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Makes bytes from `from` to `to`, which are beyond the end of the disk, zero.
    fn clear_beyond(&self, from: u64, to: u64, below: Below<'_>) -> Result<()> {
        // What is left of the last block may hold anything.
        let border = from.next_multiple_of(self.p.block).min(to);
        if border > from {
            self.zero_guest(from, border - from, true, below)?;
        }
        // Entries beyond the end mean nothing so far.
        let mut meta = self.meta.write();
        for block in from.div_ceil(self.p.block)..to.div_ceil(self.p.block) {
            let at = meta.payload_at(&self.p, block);
            meta.pages.load(&self.storage, at)?;
            if !matches!(meta.payload(&self.p, block), Ok(Entry(0))) {
                meta.pages.change(&self.storage, at, &[0; 8])?;
            }
            if meta.pages.crowded() {
                drop(meta);
                self.flush_all()?;
                meta = self.meta.write();
            }
        }
        drop(meta);
        // A parent that is larger would show in the new space.
        let shown = below.size().min(to);
        if self.is_differencing() && shown > border {
            self.zero_guest(border, shown - border, true, below)?;
        }
        Ok(())
    }

    /// Moves the block allocation table to the end of the file if it has no room for `entries`.
    fn make_room(&self, entries: u64) -> Result<()> {
        let old = self.meta.read().regions.bat;
        if entries * 8 <= old.len {
            return Ok(());
        }
        let mut journal = self.journal.lock();
        self.flush_with(&mut journal)?;
        let len = (entries * 8).next_multiple_of(MIB);
        let (offset, _) = self.reserve(len)?;
        let new = Region { offset, len };
        let mut buf = vec![0; MIB as usize];
        for at in (0..old.len).step_by(MIB as usize) {
            self.storage.read_at(&mut buf, old.offset + at)?;
            self.storage.write_at(&buf, offset + at)?;
        }
        self.storage.zero(offset + old.len, len - old.len, false)?;
        let regions = self.meta.read().regions.with_bat(new);
        self.commit_patches(&mut journal, &region_patches(&regions))?;
        let Meta { pages, regions: current, .. } = &mut *self.meta.write();
        *current = regions;
        pages.clear();
        Ok(())
    }

    /// Names another parent, or none. No request is in flight.
    pub(super) fn change_parent(&self, backing: Option<&BackingRef>) -> Result<()> {
        if self.p.fixed {
            return Err(Error::unsupported(&self.name, "a parent of a fixed disk"));
        }
        self.begin(false)?;
        let locator = match backing {
            Some(backing) => parent::locator(&self.name, backing)?,
            None => Vec::new(),
        };
        if backing.is_some() {
            self.make_room(self.p.entries(self.virtual_size(), true))?;
        } else {
            self.complete_blocks()?;
        }
        let mut journal = self.journal.lock();
        self.flush_with(&mut journal)?;
        let metadata = self.facts.lock().metadata.clone();
        let metadata = Metadata { has_parent: backing.is_some(), locator, ..metadata };
        self.replace_metadata(&mut journal, metadata, backing.cloned())?;
        self.differencing.store(backing.is_some(), Ordering::Release);
        Ok(())
    }

    /// Writes the parent's name, or its absence.
    pub(super) fn replace_metadata(
        &self,
        journal: &mut Journal,
        metadata: Metadata,
        backing: Option<BackingRef>,
    ) -> Result<()> {
        let region = self.meta.read().regions.metadata;
        let mut facts = self.facts.lock();
        let patches = metadata.parent_patches(&facts.places, region, &self.name)?;
        let patches: Vec<_> = patches.into_iter().map(|(at, bytes)| (region.offset + at, bytes)).collect();
        self.commit_patches(journal, &patches)?;
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            self.storage.read_at(&mut bytes, region.offset + at).map(|()| bytes)
        };
        (facts.metadata, facts.places) = Metadata::parse(region, &self.name, read)?;
        facts.backing = backing;
        Ok(())
    }

    /// Makes blocks that are there in part complete, with zeros where the parent showed.
    fn complete_blocks(&self) -> Result<()> {
        let blocks = self.virtual_size().div_ceil(self.p.block);
        for block in 0..blocks {
            let entry = self.with_pages(|meta| meta.payload(&self.p, block))?;
            if entry.state() != state::PARTIAL {
                continue;
            }
            let mut sector = 0;
            let sectors = self.p.block / self.p.sector;
            while sector < sectors {
                let (set, n) = self.with_pages(|meta| {
                    let Some(bitmap) = meta.bitmap(&self.p, block)? else {
                        return Ok((false, sectors - sector));
                    };
                    let at = bitmap + sector / 8;
                    let bit = at % PAGE * 8 + sector % 8;
                    let limit = (sectors - sector).min(PAGE * 8 - bit);
                    Ok(pages::run(meta.pages.get(at)?, bit, limit))
                })?;
                if !set {
                    let at = entry.offset() + sector * self.p.sector;
                    self.storage.zero(at, n * self.p.sector, true)?;
                }
                sector += n;
            }
            let mut meta = self.meta.write();
            let at = meta.payload_at(&self.p, block);
            let entry = Entry::new(state::PRESENT, entry.offset());
            meta.pages.change(&self.storage, at, &entry.0.to_le_bytes())?;
            let crowded = meta.pages.crowded();
            drop(meta);
            if crowded {
                self.flush_all()?;
            }
        }
        Ok(())
    }
}

/// The pages of both region tables that differ after a move of the block allocation table.
fn region_patches(regions: &super::Regions) -> Vec<(u64, Vec<u8>)> {
    let mut pages = vec![0, regions.bat_entry_page()];
    pages.dedup();
    let page = |n: usize| regions.table[n * PAGE as usize..(n + 1) * PAGE as usize].to_vec();
    let of_copy = |at: u64| pages.iter().map(move |n| (at + *n as u64 * PAGE, *n));
    REGION_TABLES.into_iter().flat_map(of_copy).map(|(at, n)| (at, page(n))).collect()
}
