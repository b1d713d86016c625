//! Persistent dirty bitmaps: what the disk holds of them. `recording` has those that record changes.

use super::Qcow2;
use super::header::{Header, autoclear, be32, be64, extension};
use super::tables::OFFSET_MASK;
use crate::job::DirtyMap;
use crate::{Error, Result};
use std::collections::HashSet;

/// It was not stored since its image was opened for writing.
pub(super) const IN_USE: u32 = 1;
/// It records changes.
pub(super) const AUTO: u32 = 1 << 1;
/// Limits of the specification's readers; larger ones are refused.
const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY: u64 = 64 << 20;
const MAX_TABLE: u32 = 8 << 20;
/// Most memory for the contents of one bitmap, as QEMU's, and of those together that record changes.
pub(super) const MAX_BYTES: u64 = 512 << 20;

/// An entry of the bitmap directory.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    table: u64,
    table_len: u32,
    pub flags: u32,
    pub granularity_bits: u8,
    pub name: Vec<u8>,
    extra: Vec<u8>,
}

impl Entry {
    /// An entry without contents.
    pub fn new(name: &str, granularity: u64) -> Self {
        Entry {
            table: 0,
            table_len: 0,
            flags: AUTO,
            granularity_bits: granularity.trailing_zeros() as u8,
            name: name.into(),
            extra: Vec::new(),
        }
    }
}

/// A directory that is about to replace the one on the disk.
#[derive(Debug)]
pub(super) struct Draft {
    pub entries: Vec<Entry>,
    /// Old entries to whose clusters nobody refers afterwards.
    gone: Vec<Entry>,
    /// First cluster and number of clusters of each piece that was allocated for it.
    fresh: Vec<(u64, u64)>,
}

impl Draft {
    /// The number of the entry with this name.
    pub fn find(&self, name: &str) -> Result<usize> {
        let at = self.entries.iter().position(|e| e.name == name.as_bytes());
        at.ok_or_else(|| Error::NotFound { what: "bitmap", name: name.into() })
    }

    /// Takes an entry out.
    pub fn remove(&mut self, at: usize) {
        self.gone.push(self.entries.remove(at));
    }
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

    /// The entries of the directory that the header refers to.
    pub(super) fn read_directory(&self) -> Result<Vec<Entry>> {
        let header = self.header.lock().clone();
        let Some((offset, len)) = self.bitmap_directory(&header)? else { return Ok(Vec::new()) };
        let mut bytes = vec![0; len as usize];
        self.storage.read_at(&mut bytes, offset)?;
        let mut out: Vec<Entry> = Vec::new();
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
        let mut names = HashSet::new();
        if !out.iter().all(|e| names.insert(&e.name)) {
            return Err(self.corrupt("two of its bitmaps have the same name"));
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

    /// Fails unless a bitmap was stored properly.
    pub(super) fn check_stored(&self, entry: &Entry) -> Result<()> {
        match entry.flags & IN_USE != 0 {
            true => Err(self.corrupt("the bitmap was not stored properly: it can only be removed")),
            false => Ok(()),
        }
    }

    /// The contents of a bitmap, as it was stored.
    pub(super) fn load_map(&self, entry: &Entry) -> Result<DirtyMap> {
        self.check_stored(entry)?;
        let granules = self.virtual_size().div_ceil(1 << entry.granularity_bits);
        let per_cluster = self.p.cluster * 8;
        if u64::from(entry.table_len) != granules.div_ceil(per_cluster) {
            return Err(self.corrupt("a bitmap has the wrong size"));
        }
        let map = self.new_map(1 << entry.granularity_bits)?;
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

    /// A clear bitmap of the disk.
    pub(super) fn new_map(&self, granularity: u64) -> Result<DirtyMap> {
        if self.virtual_size().div_ceil(granularity) > MAX_BYTES * 8 {
            return Err(Error::InvalidOption("The granularity is too small for a disk of this size".into()));
        }
        DirtyMap::new(self.virtual_size(), granularity)
    }

    /// A copy of the directory.
    pub(super) fn draft(&self) -> Result<Draft> {
        Ok(Draft { entries: self.read_directory()?, gone: Vec::new(), fresh: Vec::new() })
    }

    /// Allocates clusters for what `draft` refers to and returns the place of the first one.
    fn allocate_for(&self, draft: &mut Draft, clusters: u64) -> Result<u64> {
        let run = self.allocate_metadata(clusters)?;
        draft.fresh.push((run.start, run.count));
        Ok(run.start << self.p.cluster_bits)
    }

    /// Writes the contents of a map to new clusters and lets entry number `at` refer to them.
    pub(super) fn store_map(&self, draft: &mut Draft, at: usize, map: &DirtyMap) -> Result<()> {
        let per_cluster = self.p.cluster * 8;
        let count = map.granules().div_ceil(per_cluster);
        let mut table = vec![0u8; ((count * 8).next_multiple_of(self.p.cluster)) as usize];
        let marks = map.all_marks();
        for n in 0..count {
            let mut data = vec![0u8; self.p.cluster as usize];
            let mut any = false;
            let mut granule = marks.next(n * per_cluster);
            while let Some(g) = granule.filter(|g| *g < (n + 1) * per_cluster) {
                let bit = g - n * per_cluster;
                data[(bit / 8) as usize] |= 1 << (bit % 8);
                any = true;
                granule = marks.next(g + 1);
            }
            if any {
                let offset = self.allocate_for(draft, 1)?;
                self.storage.write_at(&data, offset)?;
                table[n as usize * 8..n as usize * 8 + 8].copy_from_slice(&offset.to_be_bytes());
            }
        }
        let offset = self.allocate_for(draft, table.len() as u64 / self.p.cluster)?;
        self.storage.write_at(&table, offset)?;
        let entry = &mut draft.entries[at];
        if entry.table != 0 {
            draft.gone.push(entry.clone());
        }
        (entry.table, entry.table_len) = (offset, count as u32);
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

    /// Writes a new directory and makes the header refer to it. If that fails, the old one remains in force, though the
    /// disk may have either of them: [`mark_bitmaps`](Self::mark_bitmaps) decides that.
    pub(super) fn commit_bitmaps(&self, mut draft: Draft) -> Result<()> {
        let old = self.bitmap_directory(&self.header.lock())?;
        let bytes = Self::encode_directory(&draft.entries);
        let offset = self.write_directory(&mut draft, &bytes);
        let offset = offset.inspect_err(|_| self.abandon_bitmaps(&draft))?;
        let mut header = self.header.lock();
        let before = Header::clone(&header);
        if draft.entries.is_empty() {
            header.set_extension(extension::BITMAPS, None);
            header.autoclear &= !autoclear::BITMAPS;
        } else {
            let mut data = Vec::with_capacity(24);
            data.extend_from_slice(&(draft.entries.len() as u32).to_be_bytes());
            data.extend_from_slice(&[0; 4]);
            data.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
            data.extend_from_slice(&offset.to_be_bytes());
            header.set_extension(extension::BITMAPS, Some(data));
            header.autoclear |= autoclear::BITMAPS;
        }
        let written = self.write_header(&mut header).and_then(|()| self.storage.sync());
        if let Err(error) = written {
            // What was allocated stays so: the disk may refer to it.
            let extension = before.extension(extension::BITMAPS).map(<[u8]>::to_vec);
            header.set_extension(extension::BITMAPS, extension);
            header.autoclear = before.autoclear;
            return Err(error);
        }
        drop(header);
        // From here on it has happened.
        for entry in &draft.gone {
            if let Err(error) = self.unlink_map(entry) {
                tracing::warn!(%error, image = self.name, "The clusters of an old bitmap are lost until a check");
            }
        }
        if let Some((offset, len)) = old {
            self.unlink(offset >> self.p.cluster_bits, len.div_ceil(self.p.cluster));
        }
        if let Err(error) = self.flush_all() {
            tracing::warn!(%error, image = self.name, "The clusters of old bitmaps are released later");
        }
        Ok(())
    }

    fn write_directory(&self, draft: &mut Draft, bytes: &[u8]) -> Result<u64> {
        let mut offset = 0;
        if !bytes.is_empty() {
            offset = self.allocate_for(draft, (bytes.len() as u64).div_ceil(self.p.cluster))?;
            self.storage.write_at(bytes, offset)?;
        }
        self.write_back()?;
        Ok(offset)
    }

    /// Releases what was allocated for a directory that the disk does not refer to.
    pub(super) fn abandon_bitmaps(&self, draft: &Draft) {
        draft.fresh.iter().for_each(|(start, count)| self.unlink(*start, *count));
    }

    /// Marks the bitmaps that `which` selects as in use, on the disk, and makes sure that the disk has this directory
    /// if it may have another one.
    pub(super) fn mark_bitmaps(&self, which: impl Fn(&[u8]) -> bool, unsure: bool) -> Result<()> {
        let mut entries = self.read_directory()?;
        for entry in entries.iter_mut().filter(|e| which(&e.name)) {
            entry.flags |= IN_USE;
        }
        let mut header = self.header.lock();
        if let Some((offset, _)) = self.bitmap_directory(&header)? {
            self.storage.write_at(&Self::encode_directory(&entries), offset)?;
        }
        if unsure {
            self.storage.sync()?;
            self.write_header(&mut header)?;
        }
        drop(header);
        self.storage.sync()
    }
}
