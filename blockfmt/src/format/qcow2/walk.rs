//! Visiting everything that an L1 table refers to.

use super::Qcow2;
use super::header::be64;
use super::map::{COMPRESSED, ZERO};
use super::tables::{COPIED, OFFSET_MASK};
use crate::Result;
use std::collections::HashSet;

/// A reference from a table to host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reference {
    /// An L2 table: index in the L1 table and entry.
    Table { index: usize, entry: u64 },
    /// A cluster of payload: the guest cluster and its entry.
    Payload { cluster: u64, entry: u64 },
    /// An entry that the specification does not allow.
    Invalid { what: &'static str },
}

impl Qcow2 {
    /// Calls `f` for every reference below an L1 table, as it is on the disk.
    pub(super) fn walk(&self, l1: &[u64], mut f: impl FnMut(Reference) -> Result<()>) -> Result<()> {
        let mut table = vec![0; self.p.cluster as usize];
        let mut seen = HashSet::new();
        for (index, entry) in l1.iter().copied().enumerate() {
            let offset = entry & OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            if offset & (self.p.cluster - 1) != 0 {
                f(Reference::Invalid { what: "An L2 table is not aligned" })?;
                continue;
            }
            if !seen.insert(offset) {
                f(Reference::Invalid { what: "An L2 table is used twice" })?;
                continue;
            }
            f(Reference::Table { index, entry })?;
            self.storage.read_at(&mut table, offset)?;
            let step = if self.p.extended { 16 } else { 8 };
            for (i, raw) in table.chunks_exact(step).enumerate() {
                let (entry, bitmap) = (be64(raw, 0), if self.p.extended { be64(raw, 8) } else { 0 });
                let cluster = (index as u64) << self.p.l2_bits | i as u64;
                if let Some(what) = self.fault(entry, bitmap) {
                    f(Reference::Invalid { what })?;
                }
                // What a faulty entry refers to is in use nevertheless: the rest of the entry may be right.
                if self.refers(entry) {
                    f(Reference::Payload { cluster, entry })?;
                }
            }
        }
        Ok(())
    }

    /// Whether an L2 entry refers to host clusters of the image.
    fn refers(&self, entry: u64) -> bool {
        let offset = entry & OFFSET_MASK;
        self.data.is_none()
            && (entry & COMPRESSED != 0 || (offset != 0 && offset & (self.p.cluster - 1) == 0))
    }

    /// What the specification does not allow of an L2 entry.
    fn fault(&self, entry: u64, bitmap: u64) -> Option<&'static str> {
        if entry & COMPRESSED != 0 {
            return self.data.is_some().then_some("A compressed cluster is in an external data file");
        }
        if (entry & OFFSET_MASK) & (self.p.cluster - 1) != 0 {
            return Some("A guest cluster is not aligned in the image");
        }
        let zero_flag = if self.p.extended || self.p.version < 3 { 0 } else { ZERO };
        if entry & !(OFFSET_MASK | COPIED | zero_flag) != 0 {
            return Some("A reserved bit of an L2 entry is set");
        }
        if self.p.extended && bitmap & (bitmap >> 32) & 0xffff_ffff != 0 {
            return Some("A subcluster is both allocated and zero");
        }
        if self.p.extended && self.data.is_none() && entry & OFFSET_MASK == 0 && bitmap & 0xffff_ffff != 0 {
            return Some("A subcluster is allocated in no cluster");
        }
        None
    }

    /// The host clusters of a payload entry.
    pub(super) fn host_clusters(&self, entry: u64) -> std::ops::RangeInclusive<u64> {
        match entry & COMPRESSED != 0 {
            true => {
                let (start, end) = self.compressed_range(entry);
                start >> self.p.cluster_bits..=(end - 1) >> self.p.cluster_bits
            }
            false => {
                let cluster = (entry & OFFSET_MASK) >> self.p.cluster_bits;
                cluster..=cluster
            }
        }
    }

    /// The active L1 table.
    pub(super) fn active_l1(&self) -> Vec<u64> {
        let len = self.header.lock().l1_size as usize;
        (0..len).map(|index| self.l1.get(index)).collect()
    }

    /// Reads an L1 table of `len` entries.
    pub(super) fn read_l1(&self, offset: u64, len: u32) -> Result<Vec<u64>> {
        if u64::from(len) * 8 > super::header::MAX_L1_BYTES || offset & (self.p.cluster - 1) != 0 {
            return Err(self.corrupt("the L1 table of a snapshot is invalid"));
        }
        let mut bytes = vec![0; len as usize * 8];
        self.storage.read_at(&mut bytes, offset)?;
        Ok(bytes.chunks_exact(8).map(|e| be64(e, 0)).collect())
    }
}
