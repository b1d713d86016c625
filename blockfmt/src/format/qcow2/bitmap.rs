//! Persistent dirty bitmaps.
//!
//! While an image is open for writing, its enabled bitmaps are in memory and marked "in use" on the disk:
//! after a crash they count as inconsistent. Closing the image stores them.

use super::header::{Header, autoclear, be32, be64, extension};
use super::tables::OFFSET_MASK;
use super::{Qcow2, Repair};
use crate::job::DirtyMap;
use crate::{Error, Result};
use parking_lot::RwLock;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const IN_USE: u32 = 1;
const AUTO: u32 = 1 << 1;
/// Limits of the specification's readers; larger ones are refused.
const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY: u64 = 64 << 20;
const MAX_TABLE: u32 = 8 << 20;

/// A persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapInfo {
    /// Name.
    pub name: String,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u64,
    /// Whether it records changes.
    pub enabled: bool,
    /// Whether it was not stored properly, so that it says nothing.
    pub inconsistent: bool,
}

/// An entry of the bitmap directory.
#[derive(Clone, Debug)]
struct Entry {
    table: u64,
    table_len: u32,
    flags: u32,
    granularity_bits: u8,
    name: Vec<u8>,
    extra: Vec<u8>,
}

/// The bitmaps that record changes now.
#[derive(Debug, Default)]
pub(super) struct Recording {
    maps: RwLock<Vec<(String, Arc<DirtyMap>)>>,
    /// Whether the disk has the present state of the maps, not marked as in use.
    stored: AtomicBool,
    active: AtomicBool,
}

impl Qcow2 {
    /// Where the directory is, and its length; `None` if there are no (valid) bitmaps.
    fn bitmap_directory(&self, header: &Header) -> Result<Option<(u64, u64)>> {
        let Some(e) = header.extension(extension::BITMAPS) else { return Ok(None) };
        if header.autoclear & autoclear::BITMAPS == 0 {
            return Ok(None); // someone wrote to the image without keeping them up to date
        }
        if e.len() < 24 || be32(e, 0) > MAX_BITMAPS || be64(e, 8) > MAX_DIRECTORY {
            return Err(self.corrupt("its bitmaps extension is invalid"));
        }
        Ok(Some((be64(e, 16) & OFFSET_MASK, be64(e, 8))))
    }

    fn read_directory(&self, header: &Header) -> Result<Vec<Entry>> {
        let Some((offset, len)) = self.bitmap_directory(header)? else { return Ok(Vec::new()) };
        let mut bytes = vec![0; len as usize];
        self.storage.read_at(&mut bytes, offset)?;
        let mut out = Vec::new();
        let mut at = 0;
        while at + 24 <= bytes.len() {
            let e = &bytes[at..];
            let (name_len, extra_len) = ((be32(e, 16) & 0xffff) as usize, be32(e, 20) as usize);
            let end = 24usize.saturating_add(extra_len).saturating_add(name_len);
            let granularity_bits = e[17];
            let valid = end <= e.len() && e[16] == 1 && (9..=31).contains(&granularity_bits);
            if !valid || be32(e, 8) > MAX_TABLE {
                return Err(self.corrupt("an entry of the bitmap directory is invalid"));
            }
            out.push(Entry {
                table: be64(e, 0) & OFFSET_MASK,
                table_len: be32(e, 8),
                flags: be32(e, 12),
                granularity_bits,
                name: e[24 + extra_len..end].to_vec(),
                extra: e[24..24 + extra_len].to_vec(),
            });
            at += end.next_multiple_of(8);
        }
        Ok(out)
    }

    fn encode_directory(entries: &[Entry]) -> Vec<u8> {
        let mut out = Vec::new();
        for e in entries {
            out.extend_from_slice(&e.table.to_be_bytes());
            out.extend_from_slice(&e.table_len.to_be_bytes());
            out.extend_from_slice(&e.flags.to_be_bytes());
            out.extend_from_slice(&[1, e.granularity_bits]);
            out.extend_from_slice(&(e.name.len() as u16).to_be_bytes());
            out.extend_from_slice(&(e.extra.len() as u32).to_be_bytes());
            out.extend_from_slice(&e.extra);
            out.extend_from_slice(&e.name);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out
    }

    /// The persistent bitmaps.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        let header = self.header.lock().clone();
        let recording = self.recording.maps.read();
        let list = self.read_directory(&header)?.into_iter().map(|e| {
            let name = String::from_utf8_lossy(&e.name).into_owned();
            // One that we record ourselves is in use for a good reason.
            let ours = recording.iter().any(|(n, _)| *n == name);
            BitmapInfo {
                granularity: 1 << e.granularity_bits,
                enabled: e.flags & AUTO != 0,
                inconsistent: e.flags & IN_USE != 0 && !ours,
                name,
            }
        });
        Ok(list.collect())
    }

    /// The contents of a bitmap. One that records changes is live.
    pub fn bitmap(&self, name: &str) -> Result<Arc<DirtyMap>> {
        if let Some((_, map)) = self.recording.maps.read().iter().find(|(n, _)| n == name) {
            return Ok(map.clone());
        }
        let header = self.header.lock().clone();
        let entry = self.read_directory(&header)?.into_iter().find(|e| e.name == name.as_bytes());
        let entry = entry.ok_or_else(|| Error::NotFound { what: "bitmap", name: name.into() })?;
        if entry.flags & IN_USE != 0 {
            return Err(self.corrupt("the bitmap was not stored properly"));
        }
        self.load_map(&entry).map(Arc::new)
    }

    fn load_map(&self, entry: &Entry) -> Result<DirtyMap> {
        let map = DirtyMap::new(self.virtual_size(), 1 << entry.granularity_bits)?;
        let per_cluster = self.p.cluster * 8;
        if u64::from(entry.table_len) != map.granules().div_ceil(per_cluster) {
            return Err(self.corrupt("a bitmap has the wrong size"));
        }
        let mut table = vec![0; entry.table_len as usize * 8];
        self.storage.read_at(&mut table, entry.table)?;
        let mut data = vec![0; self.p.cluster as usize];
        for (n, raw) in table.chunks_exact(8).map(|e| be64(e, 0)).enumerate() {
            match (raw & OFFSET_MASK, raw & 1) {
                (0, 0) => continue,
                (0, _) => data.fill(0xff),
                (offset, _) => self.storage.read_at(&mut data, offset)?,
            }
            for (i, byte) in data.iter().enumerate().filter(|(_, b)| **b != 0) {
                for bit in (0..8).filter(|bit| byte >> bit & 1 != 0) {
                    let granule = n as u64 * per_cluster + i as u64 * 8 + bit;
                    if granule < map.granules() {
                        map.mark(granule << entry.granularity_bits, 1);
                    }
                }
            }
        }
        Ok(map)
    }

    /// Writes the contents of a map to new clusters and lets `entry` refer to them.
    fn store_map(&self, map: &DirtyMap, entry: &mut Entry) -> Result<()> {
        let per_cluster = self.p.cluster * 8;
        let count = map.granules().div_ceil(per_cluster);
        let mut table = vec![0u8; ((count * 8).next_multiple_of(self.p.cluster)) as usize];
        for n in 0..count {
            let mut data = vec![0u8; self.p.cluster as usize];
            let mut any = false;
            let mut granule = map.next(n * per_cluster);
            while let Some(g) = granule.filter(|g| *g < (n + 1) * per_cluster) {
                let bit = g - n * per_cluster;
                data[(bit / 8) as usize] |= 1 << (bit % 8);
                any = true;
                granule = map.next(g + 1);
            }
            if any {
                let offset = self.allocate_metadata(1)?.start << self.p.cluster_bits;
                self.storage.write_at(&data, offset)?;
                table[n as usize * 8..n as usize * 8 + 8].copy_from_slice(&offset.to_be_bytes());
            }
        }
        let run = self.allocate_metadata(table.len() as u64 / self.p.cluster)?;
        self.storage.write_at(&table, run.start << self.p.cluster_bits)?;
        (entry.table, entry.table_len) = (run.start << self.p.cluster_bits, count as u32);
        Ok(())
    }

    /// Lets go of the clusters of a bitmap's table and data.
    fn unlink_map(&self, entry: &Entry) -> Result<()> {
        let mut table = vec![0; entry.table_len as usize * 8];
        self.storage.read_at(&mut table, entry.table)?;
        for offset in table.chunks_exact(8).map(|e| be64(e, 0) & OFFSET_MASK).filter(|o| *o != 0) {
            self.unlink(offset >> self.p.cluster_bits, 1);
        }
        let clusters = (u64::from(entry.table_len) * 8).div_ceil(self.p.cluster);
        self.unlink(entry.table >> self.p.cluster_bits, clusters);
        Ok(())
    }

    /// Writes a new directory and makes the header refer to it. `gone` are old entries whose clusters nobody
    /// refers to afterwards.
    fn store_directory(&self, entries: &[Entry], gone: &[Entry]) -> Result<()> {
        let old = self.bitmap_directory(&self.header.lock())?;
        let bytes = Self::encode_directory(entries);
        let mut offset = 0;
        if !bytes.is_empty() {
            let run = self.allocate_metadata((bytes.len() as u64).div_ceil(self.p.cluster))?;
            offset = run.start << self.p.cluster_bits;
            self.storage.write_at(&bytes, offset)?;
        }
        self.write_back()?;
        let mut header = self.header.lock();
        if entries.is_empty() {
            header.set_extension(extension::BITMAPS, None);
            header.autoclear &= !autoclear::BITMAPS;
        } else {
            let mut data = Vec::with_capacity(24);
            data.extend_from_slice(&(entries.len() as u32).to_be_bytes());
            data.extend_from_slice(&[0; 4]);
            data.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
            data.extend_from_slice(&offset.to_be_bytes());
            header.set_extension(extension::BITMAPS, Some(data));
            header.autoclear |= autoclear::BITMAPS;
        }
        self.write_header(&mut header)?;
        drop(header);
        self.storage.sync()?;
        for entry in gone {
            self.unlink_map(entry)?;
        }
        if let Some((offset, len)) = old {
            self.unlink(offset >> self.p.cluster_bits, len.div_ceil(self.p.cluster));
        }
        self.flush_all()
    }

    /// Adds an empty bitmap that records changes from now on.
    pub fn add_bitmap(&self, name: &str, granularity: u64) -> Result<()> {
        if self.p.version < 3 {
            return Err(Error::unsupported(&self.name, "bitmaps in version 2 (compat=0.10)"));
        }
        if name.is_empty() || name.len() > 1023 || !(512..=1 << 31).contains(&granularity) {
            return Err(Error::InvalidOption("A bitmap has a name and a granularity from 512 to 2G".into()));
        }
        let map = Arc::new(DirtyMap::new(self.virtual_size(), granularity)?);
        self.change_bitmaps(|entries| {
            if entries.iter().any(|e| e.name == name.as_bytes()) {
                return Err(Error::Exists { what: "bitmap", name: name.into() });
            }
            let mut entry = Entry {
                table: 0,
                table_len: 0,
                flags: AUTO,
                granularity_bits: granularity.trailing_zeros() as u8,
                name: name.into(),
                extra: Vec::new(),
            };
            self.store_map(&map, &mut entry)?;
            entries.push(entry);
            Ok(Vec::new())
        })
    }

    /// Removes a bitmap.
    pub fn remove_bitmap(&self, name: &str) -> Result<()> {
        self.change_bitmaps(|entries| {
            let at = entries.iter().position(|e| e.name == name.as_bytes());
            let at = at.ok_or_else(|| Error::NotFound { what: "bitmap", name: name.into() })?;
            Ok(vec![entries.remove(at)])
        })
    }

    /// Clears a bitmap: it says that nothing changed.
    pub fn clear_bitmap(&self, name: &str) -> Result<()> {
        self.change_bitmap(name, |entry| {
            let old = entry.clone();
            self.store_map(&DirtyMap::new(self.virtual_size(), 1 << entry.granularity_bits)?, entry)?;
            Ok(vec![old])
        })
    }

    /// Lets a bitmap record changes from now on, or stay as it is.
    pub fn enable_bitmap(&self, name: &str, enabled: bool) -> Result<()> {
        self.change_bitmap(name, |entry| {
            if enabled {
                self.load_map(entry)?; // an image whose enabled bitmaps are damaged cannot be written
            }
            entry.flags = if enabled { entry.flags | AUTO } else { entry.flags & !AUTO };
            Ok(Vec::new())
        })
    }

    /// Marks in a bitmap what another one has marked, of this image or of one of the same size. Their granularities may
    /// differ.
    pub fn merge_bitmap(&self, name: &str, other: &DirtyMap) -> Result<()> {
        self.change_bitmap(name, |entry| {
            let (old, map) = (entry.clone(), self.load_map(entry)?);
            for granule in other.marked() {
                let (offset, len) = other.bytes(granule, self.virtual_size());
                map.mark(offset, len);
            }
            self.store_map(&map, entry)?;
            Ok(vec![old])
        })
    }

    /// Changes the entry of a bitmap that was stored properly; `change` returns what nobody refers to any more.
    fn change_bitmap(&self, name: &str, change: impl FnOnce(&mut Entry) -> Result<Vec<Entry>>) -> Result<()> {
        self.change_bitmaps(|entries| {
            let entry = entries.iter_mut().find(|e| e.name == name.as_bytes());
            let entry = entry.ok_or_else(|| Error::NotFound { what: "bitmap", name: name.into() })?;
            if entry.flags & IN_USE != 0 {
                return Err(self.corrupt("the bitmap was not stored properly: it can only be removed"));
            }
            change(entry)
        })
    }

    /// Changes the directory: what is recorded is stored before and loaded again afterwards.
    fn change_bitmaps(&self, change: impl FnOnce(&mut Vec<Entry>) -> Result<Vec<Entry>>) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        self.store_bitmaps()?;
        let header = self.header.lock().clone();
        let mut entries = self.read_directory(&header)?;
        let gone = change(&mut entries)?;
        self.store_directory(&entries, &gone)?;
        self.record_bitmaps()
    }

    /// Loads the enabled bitmaps and marks them as in use, before the first write.
    pub(super) fn record_bitmaps(&self) -> Result<()> {
        let mut maps = self.recording.maps.write();
        let header = self.header.lock().clone();
        let mut entries = self.read_directory(&header)?;
        maps.clear();
        for entry in entries.iter_mut().filter(|e| e.flags & (AUTO | IN_USE) == AUTO) {
            let map = Arc::new(self.load_map(entry)?);
            maps.push((String::from_utf8_lossy(&entry.name).into_owned(), map));
            entry.flags |= IN_USE;
        }
        self.recording.active.store(!maps.is_empty(), Ordering::Release);
        if !maps.is_empty()
            && let Some((offset, _)) = self.bitmap_directory(&header)?
        {
            self.storage.write_at(&Self::encode_directory(&entries), offset)?;
            self.storage.sync()?;
        }
        self.recording.stored.store(false, Ordering::Release);
        Ok(())
    }

    /// Makes sure, before a change, that stored bitmaps are not taken for complete any more.
    pub(super) fn expect_change(&self) -> Result<()> {
        match self.recording.stored.load(Ordering::Acquire) {
            true => self.record_bitmaps(),
            false => Ok(()),
        }
    }

    /// Notes a change in the bitmaps.
    pub(super) fn record(&self, offset: u64, len: u64) {
        if self.recording.active.load(Ordering::Acquire) {
            self.recording.maps.read().iter().for_each(|(_, map)| map.mark(offset, len));
        }
    }

    /// Stores what was recorded and marks it as valid.
    pub(super) fn store_bitmaps(&self) -> Result<()> {
        if !self.recording.active.load(Ordering::Acquire)
            || self.recording.stored.swap(true, Ordering::AcqRel)
        {
            return Ok(());
        }
        let maps = self.recording.maps.read();
        let header = self.header.lock().clone();
        let mut entries = self.read_directory(&header)?;
        let mut gone = Vec::new();
        for entry in &mut entries {
            let Some((_, map)) = maps.iter().find(|(name, _)| name.as_bytes() == entry.name) else {
                continue;
            };
            gone.push(entry.clone());
            entry.flags &= !IN_USE;
            self.store_map(map, entry)?;
        }
        self.store_directory(&entries, &gone)
    }

    /// Repairs the image if it was left dirty, then starts to record.
    pub(super) fn prepare_for_writing(&self, stale: bool) -> Result<()> {
        if stale {
            // Whoever wrote last did not come to update the refcounts.
            let report = self.check(Repair::All)?;
            if report.corruptions != 0 {
                return Err(self.corrupt("it was not closed properly and cannot be repaired automatically"));
            }
        }
        self.record_bitmaps()
    }
}
