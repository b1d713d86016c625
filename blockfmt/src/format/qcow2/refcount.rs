//! Reference counts of host clusters, and the allocator on top of them.
//!
//! Everything here happens in memory under one lock; [`super::flush`] writes changes back in the order
//! that keeps the image consistent after a crash.

use super::header::{Header, MAX_REFTABLE_BYTES};
use crate::{Error, Result, Storage};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Granularity of write-back within a refcount block.
const PIECE: usize = 4096;
/// Refcount blocks kept in memory, in bytes.
const CACHE_BYTES: usize = 32 << 20;
/// Valid bits of an entry of the refcount table.
const OFFSET_MASK: u64 = !511;

/// A run of newly allocated clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// First cluster.
    pub start: u64,
    /// Number of clusters.
    pub count: u64,
    /// Whether the clusters lie where nothing was ever written, so that they read as zeros.
    pub fresh: bool,
}

/// Unwritten changes, copied for a write-back.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    /// Refcount blocks, or pieces of them: offset in the image and bytes.
    pub blocks: Vec<(u64, Vec<u8>)>,
    /// Entries of the refcount table, the same way.
    pub table: Vec<(u64, Vec<u8>)>,
}

/// What was changed: ranges of bytes of refcount blocks, and entries of the table.
#[derive(Debug, Default)]
struct Changes {
    blocks: BTreeMap<usize, (usize, usize)>,
    table: Vec<usize>,
}

impl Changes {
    fn touch(&mut self, block: usize, from: usize, to: usize) {
        let range = self.blocks.entry(block).or_insert((from, to));
        *range = (range.0.min(from), range.1.max(to));
    }
}

impl Dirty {
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.table.is_empty()
    }
}

/// The refcounts of an image.
#[derive(Debug)]
pub(super) struct Refcounts {
    storage: Arc<dyn Storage>,
    name: String,
    cluster_bits: u32,
    order: u32,
    table: Vec<u64>,
    table_offset: u64,
    blocks: HashMap<usize, Vec<u8>>,
    dirty: Changes,
    /// What a write-back took and has not written for certain.
    taken: Changes,
    /// Held from the moment when changes are taken until they are written, so that they cannot overwrite newer
    /// ones. Locked by whoever has locked the refcounts.
    pub writing: Arc<Mutex<()>>,
    /// No cluster below this one is free.
    hint: u64,
    /// No cluster from this one on was ever written.
    high_water: u64,
    /// The length in clusters that the file had, to which it is cut at most.
    opened_length: u64,
    /// Clusters of the header and of active tables: never handed out, whatever their refcount says.
    pub metadata: HashSet<u64>,
}

impl Refcounts {
    pub fn open(storage: &Arc<dyn Storage>, header: &Header) -> Result<Self> {
        let mut bytes = vec![0; (header.reftable_clusters as usize) << header.cluster_bits];
        storage.read_at(&mut bytes, header.reftable_offset)?;
        let table: Vec<u64> =
            bytes.chunks_exact(8).map(|e| super::header::be64(e, 0) & OFFSET_MASK).collect();
        let cluster = 1u64 << header.cluster_bits;
        let name = storage.name();
        if table.iter().any(|offset| !offset.is_multiple_of(cluster)) {
            return Err(Error::corrupt(name, "a refcount block is not aligned"));
        }
        let high_water = match storage.zero_beyond_end() {
            true => storage.length()?.div_ceil(cluster),
            false => u64::MAX,
        };
        let mut metadata: HashSet<u64> =
            table.iter().filter(|o| **o != 0).map(|o| o >> header.cluster_bits).collect();
        let start = header.reftable_offset >> header.cluster_bits;
        metadata.extend(start..start + u64::from(header.reftable_clusters));
        metadata.insert(0);
        Ok(Refcounts {
            storage: storage.clone(),
            name,
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            table,
            table_offset: header.reftable_offset,
            blocks: HashMap::new(),
            dirty: Changes::default(),
            taken: Changes::default(),
            writing: Arc::default(),
            hint: 1,
            high_water,
            opened_length: high_water,
            metadata,
        })
    }

    /// Offset and length in clusters of the refcount table.
    pub fn table_place(&self) -> (u64, u32) {
        (self.table_offset, ((self.table.len() * 8) >> self.cluster_bits) as u32)
    }

    /// Offsets of all refcount blocks, by number.
    pub fn block_offsets(&self) -> impl Iterator<Item = (usize, u64)> {
        self.table.iter().copied().enumerate().filter(|(_, offset)| *offset != 0)
    }

    /// The clusters of a block whose refcount is not zero, with it.
    pub fn counted(&mut self, block: usize) -> Result<Vec<(u64, u64)>> {
        let (first, order) = (block as u64 * self.per_block(), self.order);
        // Entries in a group of eight bytes.
        let group = 64usize >> order;
        let Some(bytes) = self.load(block)? else { return Ok(Vec::new()) };
        let mut out = Vec::new();
        for (n, word) in bytes.chunks_exact(8).enumerate() {
            if word != [0; 8] {
                let entries =
                    (n * group..(n + 1) * group).map(|i| (first + i as u64, read_entry(bytes, i, order)));
                out.extend(entries.filter(|(_, count)| *count != 0));
            }
        }
        Ok(out)
    }

    /// Looks for free clusters from the start again.
    pub fn restart(&mut self) {
        self.hint = 1;
    }

    /// Clusters that one refcount block describes.
    pub fn per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.order)
    }

    /// Largest value of a refcount.
    pub fn max(&self) -> u64 {
        if self.order == 6 { u64::MAX } else { (1 << (1 << self.order)) - 1 }
    }

    fn load(&mut self, block: usize) -> Result<Option<&Vec<u8>>> {
        let offset = self.table.get(block).copied().unwrap_or(0);
        if offset == 0 {
            return Ok(None);
        }
        if !self.blocks.contains_key(&block) {
            let mut bytes = vec![0; 1 << self.cluster_bits];
            self.storage.read_at(&mut bytes, offset)?;
            self.blocks.insert(block, bytes);
        }
        Ok(self.blocks.get(&block))
    }

    fn place(&self, cluster: u64) -> (usize, usize) {
        let per_block = self.per_block();
        ((cluster / per_block) as usize, (cluster % per_block) as usize)
    }

    /// The refcount of a cluster.
    pub fn get(&mut self, cluster: u64) -> Result<u64> {
        let ((block, index), order) = (self.place(cluster), self.order);
        Ok(self.load(block)?.map_or(0, |bytes| read_entry(bytes, index, order)))
    }

    /// Sets the refcount of a cluster, making a refcount block for it if there is none.
    pub fn set(&mut self, cluster: u64, value: u64) -> Result<()> {
        let ((block, index), order) = (self.place(cluster), self.order);
        if value > self.max() {
            return Err(Error::unsupported(&self.name, format!("refcounts above {}", self.max())));
        }
        if self.load(block)?.is_none() {
            self.new_block(block)?;
        }
        if let Some(bytes) = self.blocks.get_mut(&block) {
            write_entry(bytes, index, order, value);
        }
        let at = (index << order) / 8;
        self.dirty.touch(block, at, at + (1usize << order).div_ceil(8));
        Ok(())
    }

    /// Changes the refcount of a cluster and returns the new value.
    pub fn add(&mut self, cluster: u64, delta: i64) -> Result<u64> {
        let value = self.get(cluster)?.checked_add_signed(delta);
        let value = value.ok_or_else(|| Error::corrupt(&self.name, "a refcount is too small"))?;
        self.set(cluster, value)?;
        if value == 0 {
            self.hint = self.hint.min(cluster);
        }
        Ok(value)
    }

    /// Makes a refcount block in a free cluster.
    fn new_block(&mut self, block: usize) -> Result<()> {
        if block >= self.table.len() {
            self.grow(block)?;
            if self.table[block] != 0 {
                return Ok(());
            }
        }
        // A free cluster of the block's own range describes itself; no other block has to change.
        let first = block as u64 * self.per_block();
        let mut own = first;
        while self.metadata.contains(&own) {
            own += 1;
            if own == first + self.per_block() {
                return Err(Error::corrupt(&self.name, "no space for a refcount block"));
            }
        }
        let mut bytes = vec![0; 1 << self.cluster_bits];
        write_entry(&mut bytes, (own - first) as usize, self.order, 1);
        self.blocks.insert(block, bytes);
        self.dirty.touch(block, 0, 1 << self.cluster_bits);
        self.table[block] = own << self.cluster_bits;
        self.dirty.table.push(block);
        self.metadata.insert(own);
        self.raise_high_water(own + 1);
        Ok(())
    }

    fn raise_high_water(&mut self, end: u64) {
        self.high_water = self.high_water.max(end);
    }

    /// Moves the refcount table to a larger place that covers at least `block`.
    fn grow(&mut self, block: usize) -> Result<()> {
        let cluster = 1u64 << self.cluster_bits;
        let per_block = self.per_block();
        let old_len = self.table.len();
        let mut len = (block + 2).max(old_len + old_len / 2);
        // The first cluster that the old table does not describe: nothing lives there yet.
        let start = old_len as u64 * per_block;
        let (table_clusters, blocks) = loop {
            let table_clusters = (len as u64 * 8).div_ceil(cluster);
            let mut blocks = 1;
            while blocks * per_block < table_clusters + blocks {
                blocks += 1;
            }
            if old_len as u64 + blocks <= table_clusters * cluster / 8 {
                break (table_clusters, blocks);
            }
            len = old_len + blocks as usize;
        };
        if table_clusters * cluster > MAX_REFTABLE_BYTES {
            return Err(Error::unsupported(&self.name, "an image file of this size"));
        }
        let mut table = self.table.clone();
        table.resize((table_clusters * cluster / 8) as usize, 0);
        let used = blocks + table_clusters;
        let mut new_blocks = Vec::new();
        for i in 0..blocks {
            let mut bytes = vec![0; cluster as usize];
            for c in 0..used.saturating_sub(i * per_block).min(per_block) {
                write_entry(&mut bytes, c as usize, self.order, 1);
            }
            table[old_len + i as usize] = (start + i) << self.cluster_bits;
            new_blocks.push(bytes);
        }
        let offset = (start + blocks) << self.cluster_bits;
        self.raise_high_water(start + used);
        let writing = self.writing.clone();
        let _writing = writing.lock();
        self.untake();
        let dirty = self.take_dirty();
        let written = (|| {
            // Everything that the new table points to must be on disk before it.
            for (i, bytes) in new_blocks.iter().enumerate() {
                self.storage.write_at(bytes, (start + i as u64) << self.cluster_bits)?;
            }
            for (offset, bytes) in &dirty.blocks {
                self.storage.write_at(bytes, *offset)?;
            }
            let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
            self.storage.write_at(&bytes, offset)?;
            self.storage.sync()?;
            let mut place = [0; 12];
            place[..8].copy_from_slice(&offset.to_be_bytes());
            place[8..].copy_from_slice(&(table_clusters as u32).to_be_bytes());
            self.storage.write_at(&place, 48)?;
            self.storage.sync()
        })();
        if let Err(error) = written {
            self.untake();
            return Err(error);
        }
        self.taken = Changes::default();

        self.blocks.extend((old_len..).zip(new_blocks));
        let (old_offset, old_clusters) = self.table_place();
        (self.table, self.table_offset) = (table, offset);
        self.metadata.extend(start..start + used);
        for c in
            (old_offset >> self.cluster_bits)..(old_offset >> self.cluster_bits) + u64::from(old_clusters)
        {
            self.metadata.remove(&c);
            self.add(c, -1)?;
        }
        Ok(())
    }

    /// Allocates up to `want` contiguous clusters, at least one; exactly `want` if `exact`.
    pub fn allocate(&mut self, want: u64, exact: bool) -> Result<Run> {
        let mut start = self.hint;
        let mut first_free = true;
        loop {
            // Find a free cluster.
            while !self.is_free(start)? {
                start += 1;
            }
            if std::mem::take(&mut first_free) {
                self.hint = start;
            }
            // The first free cluster of an undescribed range becomes its refcount block.
            let (block, _) = self.place(start);
            if self.load(block)?.is_none() {
                self.new_block(block)?;
                continue;
            }
            let mut count = 1;
            while count < want && self.described(start + count)? && self.is_free(start + count)? {
                count += 1;
            }
            if exact && count < want {
                if !self.described(start + count)? {
                    // Only the refcount block of the next range is in the way: make it elsewhere first.
                    let (next, _) = self.place(start + count);
                    self.new_block(next)?;
                }
                start += count;
                continue;
            }
            if (start + count) << self.cluster_bits > 1 << 55 {
                return Err(Error::unsupported(&self.name, "an image file of this size"));
            }
            let fresh = start >= self.high_water;
            if start + count > self.high_water {
                self.lengthen(start + count)?;
            }
            for c in start..start + count {
                self.set(c, 1)?;
            }
            if self.hint == start {
                self.hint = start + count;
            }
            return Ok(Run { start, count, fresh });
        }
    }

    /// Makes the file as long as `end` clusters. Entries may refer to clusters that are not written yet, and payload
    /// and entries reach the disk in any order: as the length does so before refcounts, they never refer to what
    /// lies beyond the end. Nobody writes there yet, so the file cannot become shorter.
    fn lengthen(&mut self, end: u64) -> Result<()> {
        let bytes = end << self.cluster_bits;
        if self.storage.length()? < bytes {
            self.storage.truncate(bytes)?;
        }
        self.raise_high_water(end);
        Ok(())
    }

    /// Cuts free clusters off the end of the file that were not there when it was opened.
    pub fn cut(&mut self) -> Result<()> {
        let mut end = self.high_water;
        while end > self.opened_length && self.is_free(end - 1)? {
            end -= 1;
        }
        if end < self.high_water {
            let bytes = end << self.cluster_bits;
            if self.storage.length()? > bytes {
                self.storage.truncate(bytes)?;
            }
            self.high_water = end;
        }
        Ok(())
    }

    fn described(&mut self, cluster: u64) -> Result<bool> {
        let (block, _) = self.place(cluster);
        Ok(self.load(block)?.is_some())
    }

    fn is_free(&mut self, cluster: u64) -> Result<bool> {
        Ok(self.get(cluster)? == 0 && !self.metadata.contains(&cluster))
    }

    /// Copies all unwritten changes. The caller holds [`writing`](Self::writing) until they are written.
    pub fn take_dirty(&mut self) -> Dirty {
        self.taken = std::mem::take(&mut self.dirty);
        self.taken.table.sort_unstable();
        self.taken.table.dedup();
        let mut out = Dirty::default();
        for (block, (from, to)) in &self.taken.blocks {
            let Some(bytes) = self.blocks.get(block) else { continue };
            let piece = PIECE.min(bytes.len());
            let (from, to) = (from / piece * piece, to.next_multiple_of(piece));
            out.blocks.push((self.table[*block] + from as u64, bytes[from..to].to_vec()));
        }
        for entry in &self.taken.table {
            let bytes = self.table[*entry].to_be_bytes().to_vec();
            out.table.push((self.table_offset + *entry as u64 * 8, bytes));
        }
        out
    }

    /// Marks what was taken last, and may not be written, as changed again.
    pub fn untake(&mut self) {
        let taken = std::mem::take(&mut self.taken);
        for (block, (from, to)) in taken.blocks {
            self.dirty.touch(block, from, to);
        }
        self.dirty.table.extend(taken.table);
    }

    /// What was taken last is written.
    pub fn written(&mut self) {
        self.taken = Changes::default();
        self.trim();
    }

    /// Drops blocks from memory when there are many; only after a write-back, with nothing in flight.
    pub fn trim(&mut self) {
        let keep = CACHE_BYTES >> self.cluster_bits;
        if self.blocks.len() > keep {
            let (dirty, taken) = (&self.dirty.blocks, &self.taken.blocks);
            self.blocks.retain(|block, _| dirty.contains_key(block) || taken.contains_key(block));
        }
    }
}

/// Reads entry `index` of a refcount block; sub-byte entries start at the least significant bits.
pub(super) fn read_entry(bytes: &[u8], index: usize, order: u32) -> u64 {
    match order {
        0..=2 => {
            let bits = 1 << order;
            let at = index * bits;
            u64::from(bytes[at / 8] >> (at % 8)) & ((1 << bits) - 1)
        }
        _ => {
            let width = 1 << (order - 3);
            bytes[index * width..(index + 1) * width].iter().fold(0, |v, b| v << 8 | u64::from(*b))
        }
    }
}

/// Writes entry `index` of a refcount block; `value` fits.
pub(super) fn write_entry(bytes: &mut [u8], index: usize, order: u32, value: u64) {
    match order {
        0..=2 => {
            let bits = 1 << order;
            let (at, mask) = (index * bits, (1u8 << bits) - 1);
            bytes[at / 8] = bytes[at / 8] & !(mask << (at % 8)) | (value as u8) << (at % 8);
        }
        _ => {
            let width = 1 << (order - 3);
            bytes[index * width..(index + 1) * width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_every_width() {
        for order in 0..=6 {
            let max = if order == 6 { u64::MAX } else { (1u64 << (1 << order)) - 1 };
            let mut bytes = vec![0; 64];
            for index in 0..8 {
                write_entry(&mut bytes, index, order, max.min(index as u64 + 1) & max);
            }
            write_entry(&mut bytes, 3, order, max);
            for index in 0..8 {
                let expect = if index == 3 { max } else { max.min(index as u64 + 1) };
                assert_eq!(read_entry(&bytes, index, order), expect, "order {order} index {index}");
            }
        }
    }
}
