//! The L1 table, and access to L2 slices below it.

use super::cache::{Access, SliceMut};
use super::header::{Header, be64};
use super::{Qcow2, map};
use crate::{Error, Result, Storage};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

pub(super) const COPIED: u64 = 1 << 63;
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

const CHUNK: usize = 4096;
const CHUNKS: usize = 1024;

type Chunk = Box<[AtomicU64]>;

/// The L1 table: read without a lock, growing without moving.
#[derive(Debug)]
pub(super) struct L1 {
    chunks: Box<[OnceLock<Chunk>]>,
    /// Serialises the making of L2 tables; lists entries that are not on disk yet.
    pub dirty: Mutex<Vec<usize>>,
}

impl L1 {
    pub fn read(storage: &Arc<dyn Storage>, header: &Header) -> Result<Self> {
        let l1 = L1 { chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(), dirty: Mutex::default() };
        let mut bytes = vec![0; header.l1_size as usize * 8];
        storage.read_at(&mut bytes, header.l1_offset)?;
        let cluster = 1u64 << header.cluster_bits;
        for (index, entry) in bytes.chunks_exact(8).map(|e| be64(e, 0)).enumerate() {
            if entry & !(OFFSET_MASK | COPIED) != 0 || !(entry & OFFSET_MASK).is_multiple_of(cluster) {
                return Err(Error::corrupt(storage.name(), format!("L1 entry {index} is invalid")));
            }
            if entry != 0 {
                l1.set(index, entry);
            }
        }
        Ok(l1)
    }

    pub fn get(&self, index: usize) -> u64 {
        let chunk = self.chunks.get(index / CHUNK).and_then(OnceLock::get);
        chunk.map_or(0, |c| c[index % CHUNK].load(Ordering::Acquire))
    }

    pub fn set(&self, index: usize, entry: u64) {
        let chunk =
            self.chunks[index / CHUNK].get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
        chunk[index % CHUNK].store(entry, Ordering::Release);
    }

    /// All L2 tables: index and offset.
    pub fn tables(&self) -> impl Iterator<Item = (usize, u64)> {
        let chunks = self.chunks.iter().enumerate().filter_map(|(n, c)| Some((n, c.get()?)));
        chunks.flat_map(|(n, chunk)| {
            let entries = chunk.iter().enumerate();
            entries.filter_map(move |(i, e)| {
                let offset = e.load(Ordering::Acquire) & OFFSET_MASK;
                (offset != 0).then_some((n * CHUNK + i, offset))
            })
        })
    }
}

impl Qcow2 {
    /// The slice and the entry in it of a guest cluster.
    pub(super) fn slice_of(&self, cluster: u64) -> (u64, usize) {
        (cluster / self.p.slice_entries, (cluster % self.p.slice_entries) as usize)
    }

    pub(super) fn l1_index(&self, cluster: u64) -> usize {
        (cluster >> self.p.l2_bits) as usize
    }

    /// Where a slice is stored; `None` if its L2 table does not exist.
    pub(super) fn slice_place(&self, slice: u64) -> Option<u64> {
        let cluster = slice * self.p.slice_entries;
        let table = self.l1.get(self.l1_index(cluster)) & OFFSET_MASK;
        let entry = cluster & ((1 << self.p.l2_bits) - 1);
        (table != 0).then(|| table + entry * if self.p.extended { 16 } else { 8 })
    }

    fn load_slice(&self, slice: u64, words: &mut [u64]) -> Result<()> {
        let Some(offset) = self.slice_place(slice) else { return Ok(()) };
        let mut bytes = vec![0; words.len() * 8];
        self.storage.read_at(&mut bytes, offset)?;
        for (word, raw) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = be64(raw, 0);
        }
        if !self.read_only && self.data.is_none() {
            self.check_slice(words)?;
        }
        Ok(())
    }

    /// Refuses entries that would let the guest write over metadata.
    fn check_slice(&self, words: &[u64]) -> Result<()> {
        let refcounts = self.refcounts.lock();
        let step = if self.p.extended { 2 } else { 1 };
        for entry in words.iter().step_by(step) {
            let host = (entry & OFFSET_MASK) >> self.p.cluster_bits;
            if entry & map::COMPRESSED == 0 && host != 0 && refcounts.metadata.contains(&host) {
                return Err(self.corrupt("a guest cluster overlaps metadata"));
            }
        }
        Ok(())
    }

    /// Runs `f` on the words of a slice, loading it if needed.
    pub(super) fn read_slice<R>(&self, slice: u64, mut f: impl FnMut(&[AtomicU64]) -> R) -> Result<R> {
        loop {
            if let Some(result) = self.cache.read(slice, &mut f) {
                return Ok(result);
            }
            self.with_slice(slice, |_| ())?;
        }
    }

    /// Runs `f` on a slice under its lock, loading it if needed. The L2 table must exist if `f` changes it.
    pub(super) fn with_slice<R>(&self, slice: u64, f: impl FnOnce(&mut SliceMut<'_>) -> R) -> Result<R> {
        let mut f = Some(f);
        loop {
            let run = |s: &mut SliceMut<'_>| f.take().map(|f| f(s));
            match self.cache.with_slice(slice, |words| self.load_slice(slice, words), run)? {
                Access::Done(Some(result)) => return Ok(result),
                Access::Done(None) => return Err(self.corrupt("a slice was visited twice")),
                Access::Full => self.write_back()?,
            }
        }
    }

    /// Makes sure that the L2 table of a guest cluster exists and is not shared with a snapshot.
    pub(super) fn ensure_table(&self, cluster: u64) -> Result<()> {
        let index = self.l1_index(cluster);
        if self.l1.get(index) & COPIED != 0 {
            return Ok(());
        }
        let mut dirty = self.l1.dirty.lock();
        let old = self.l1.get(index);
        if old & COPIED != 0 {
            return Ok(());
        }
        let run = self.allocate_metadata(1)?;
        let offset = run.start << self.p.cluster_bits;
        let mut table = vec![0; self.p.cluster as usize];
        if old & OFFSET_MASK != 0 {
            // Shared tables are never dirty: taking a snapshot writes everything back.
            self.storage.read_at(&mut table, old & OFFSET_MASK)?;
        }
        if old & OFFSET_MASK != 0 || !run.fresh {
            self.storage.write_at(&table, offset)?;
        }
        self.barrier.store(true, Ordering::Release);
        self.l1.set(index, offset | COPIED);
        dirty.push(index);
        if old & OFFSET_MASK != 0 {
            self.unlink((old & OFFSET_MASK) >> self.p.cluster_bits, 1);
        }
        Ok(())
    }

    /// Allocates contiguous clusters for metadata.
    pub(super) fn allocate_metadata(&self, count: u64) -> Result<super::refcount::Run> {
        let mut refcounts = self.refcounts.lock();
        let run = refcounts.allocate(count, true)?;
        refcounts.metadata.extend(run.start..run.start + run.count);
        Ok(run)
    }

    /// Remembers that a reference to host clusters is gone in memory. They are released once the disk
    /// knows as well.
    pub(super) fn unlink(&self, start: u64, count: u64) {
        let mut unlinked = self.unlinked.lock();
        match unlinked.last_mut() {
            Some((first, n)) if *first + *n == start => *n += count,
            _ => unlinked.push((start, count)),
        }
    }
}
