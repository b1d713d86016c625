//! Bringing changes to the disk, in an order that survives crashes.
//!
//! A write-back takes a copy of everything that is changed, in the reverse order of dependence: L2 slices
//! first, then L1 entries, then refcounts, so that whatever a copied entry relies on is in the copy too.
//! It then writes, with barriers between the steps that need them:
//!
//! 1. refcount blocks,
//! 2. the refcount table; barrier for these and for payload,
//! 3. L2 slices; barrier if there are new L2 tables,
//! 4. L1 entries; barrier.
//!
//! Clusters that the copied entries no longer refer to are released after all of this, and only when every
//! request that may still use them has ended. A crash at any point leaks clusters at worst.

use super::Qcow2;
use super::refcount::Dirty;
use crate::Result;
use crate::turns::Turns;
use parking_lot::Mutex;
use std::sync::atomic::Ordering;

/// Keeps flushes apart.
#[derive(Debug, Default)]
pub(super) struct Flusher {
    turns: Turns,
    /// Held during a write-back.
    write_back: Mutex<()>,
}

impl Qcow2 {
    /// Makes everything that was acknowledged before survive a crash. The caller is not inside the gate.
    pub(super) fn flush_all(&self) -> Result<()> {
        self.flusher.turns.share(|| self.flush_once())
    }

    fn flush_once(&self) -> Result<()> {
        let unlinked = std::mem::take(&mut *self.unlinked.lock());
        if let Err(error) = self.write_back() {
            self.unlinked.lock().extend(unlinked);
            return Err(error);
        }
        if !unlinked.is_empty() {
            // Requests that found the old mapping may still be using the clusters.
            self.gate.synchronize();
            self.release(&unlinked)?;
        }
        Ok(())
    }

    /// Gives clusters back to the allocator, and their space to the host.
    pub(super) fn release(&self, unlinked: &[(u64, u64)]) -> Result<()> {
        let mut next = self.compressed.next.lock();
        let mut refcounts = self.refcounts.lock();
        for &(start, count) in unlinked {
            let mut unused = 0;
            for cluster in start..start + count {
                refcounts.metadata.remove(&cluster);
                if refcounts.get(cluster)? == 1 {
                    unused += 1;
                }
            }
            if unused == count {
                // Best effort: the clusters are free even if their space is not.
                let (offset, len) = (start << self.p.cluster_bits, count << self.p.cluster_bits);
                if let Err(error) = self.storage.discard(offset, len) {
                    tracing::debug!(%error, offset, len, "Cannot release the space of free clusters");
                }
            }
            for cluster in start..start + count {
                if refcounts.add(cluster, -1)? == 0 {
                    self.compressed.forget();
                    if *next >> self.p.cluster_bits == cluster {
                        *next = 0; // compressed bytes must not be appended to someone else's cluster
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes all changes of metadata and makes them, and all payload before them, durable.
    pub(super) fn write_back(&self) -> Result<()> {
        let _turn = self.flusher.write_back.lock();
        let slices = self.cache.take_dirty();
        let tables = std::mem::take(&mut *self.l1.dirty.lock());
        let mut refcounts = self.refcounts.lock();
        let lock = refcounts.writing.clone();
        let writing = lock.lock();
        let dirty = refcounts.take_dirty();
        drop(refcounts);
        let barrier = self.barrier.swap(false, Ordering::AcqRel) || !dirty.is_empty();
        let counted = self.write_counts(&dirty);
        drop(writing);
        match counted.and_then(|()| self.write_copies(&slices, &tables, barrier)) {
            Ok(()) => {
                slices.iter().for_each(|(slice, _)| self.cache.written(*slice, true));
                self.refcounts.lock().written();
                Ok(())
            }
            Err(error) => {
                slices.iter().for_each(|(slice, _)| self.cache.written(*slice, false));
                self.l1.dirty.lock().extend(tables);
                self.refcounts.lock().untake();
                self.barrier.store(true, Ordering::Release);
                Err(error)
            }
        }
    }

    fn write_counts(&self, dirty: &Dirty) -> Result<()> {
        if !dirty.blocks.is_empty() {
            for (offset, bytes) in &dirty.blocks {
                self.storage.write_at(bytes, *offset)?;
            }
            if !dirty.table.is_empty() {
                self.storage.sync()?;
                for (offset, bytes) in &dirty.table {
                    self.storage.write_at(bytes, *offset)?;
                }
            }
        }
        Ok(())
    }

    fn write_copies(&self, slices: &[(u64, Vec<u64>)], tables: &[usize], barrier: bool) -> Result<()> {
        if let Some(data) = &self.data {
            data.sync()?;
        }
        if slices.is_empty() && tables.is_empty() {
            return self.storage.sync();
        }
        if barrier {
            self.storage.sync()?;
        }
        let mut bytes = Vec::new();
        for (slice, words) in slices {
            let Some(offset) = self.slice_place(*slice) else { continue };
            bytes.clear();
            bytes.extend(words.iter().flat_map(|w| w.to_be_bytes()));
            self.storage.write_at(&bytes, offset)?;
        }
        if !tables.is_empty() {
            self.storage.sync()?;
            let start = self.header.lock().l1_offset;
            for index in tables {
                let entry = self.l1.get(*index).to_be_bytes();
                self.storage.write_at(&entry, start + *index as u64 * 8)?;
            }
        }
        self.storage.sync()
    }

    /// Writes the header with the current place of the refcount table. The caller flushes.
    pub(super) fn write_header(&self, header: &mut super::Header) -> Result<()> {
        // The table must not move before its place is written.
        let refcounts = self.refcounts.lock();
        (header.reftable_offset, header.reftable_clusters) = refcounts.table_place();
        header.write(&self.storage)
    }

    /// Brings the image into the state of a closed one.
    pub(super) fn close_image(&self) -> Result<()> {
        self.flush_all()?;
        self.drop_reservations();
        // The release of clusters is a change of its own.
        self.flush_all()?;
        self.flush_all()?;
        self.refcounts.lock().cut()
    }
}
