//! Checking and repairing refcounts.

use super::header::{Header, MAX_REFTABLE_BYTES, autoclear, be32, be64, extension, incompatible};
use super::map::COMPRESSED;
use super::refcount::{read_entry, write_entry};
use super::tables::{COPIED, OFFSET_MASK};
use super::walk::Reference;
use super::{Qcow2, Refcounts};
use crate::format::check::{CheckReport, Repair};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};

/// Counts per chunk of the sparse array below.
const CHUNK: u64 = 256;

/// References per host cluster, counted from the tables. Sparse, as the image may be.
#[derive(Debug, Default)]
struct Counts(BTreeMap<u64, Box<[u32]>>);

impl Counts {
    fn add(&mut self, cluster: u64) {
        let chunk = self.0.entry(cluster / CHUNK).or_insert_with(|| vec![0; CHUNK as usize].into());
        let count = &mut chunk[(cluster % CHUNK) as usize];
        *count = count.saturating_add(1);
    }

    fn get(&self, cluster: u64) -> u64 {
        self.0.get(&(cluster / CHUNK)).map_or(0, |c| c[(cluster % CHUNK) as usize].into())
    }

    fn used(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().flat_map(|(n, chunk)| {
            let counts = chunk.iter().enumerate().filter(|(_, c)| **c != 0);
            counts.map(move |(i, c)| (n * CHUNK + i as u64, u64::from(*c)))
        })
    }
}

impl Qcow2 {
    /// Checks the image and repairs what `repair` allows. Nobody else may use the image meanwhile.
    pub fn check(&self, repair: Repair) -> Result<CheckReport> {
        if repair != Repair::Nothing && self.read_only {
            return Err(Error::ReadOnly);
        }
        if !self.read_only {
            self.close_image()?;
        }
        let _closed = self.gate.close();
        let mut report = self.check_once(repair)?;
        if report.corruptions_fixed + report.leaks_fixed > 0 {
            self.write_back()?;
            let again = self.check_once(Repair::Nothing)?;
            report.corruptions_fixed = report.corruptions.saturating_sub(again.corruptions);
            report.leaks_fixed = report.leaks.saturating_sub(again.leaks);
            (report.corruptions, report.leaks) = (again.corruptions, again.leaks);
        }
        if repair == Repair::All && report.corruptions == 0 {
            let mut header = self.header.lock();
            if header.incompatible & (incompatible::DIRTY | incompatible::CORRUPT) != 0 {
                header.incompatible &= !(incompatible::DIRTY | incompatible::CORRUPT);
                self.write_header(&mut header)?;
                self.storage.sync()?;
            }
        }
        Ok(report)
    }

    fn check_once(&self, repair: Repair) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        let header = self.header.lock().clone();
        let mut counts = Counts::default();
        self.count_references(&header, &mut counts, &mut report)?;
        let broken = self.count_refcount_structures(&mut counts, &mut report);
        report.total_clusters = header.size.div_ceil(self.p.cluster);
        let end = counts.used().last().map_or(0, |(cluster, _)| cluster + 1);
        report.image_end_offset = end << self.p.cluster_bits;
        self.check_end(&counts, repair, &mut report)?;
        if broken && repair == Repair::All {
            self.rebuild_refcounts(&header, end)?;
            report.corruptions_fixed += 1;
        } else {
            self.compare_refcounts(&counts, repair, &mut report)?;
        }
        if repair == Repair::All {
            self.update_flags()?;
        } else {
            self.check_flags(&mut report)?;
        }
        Ok(report)
    }

    /// Looks for references beyond the end of the file.
    fn check_end(&self, counts: &Counts, repair: Repair, report: &mut CheckReport) -> Result<()> {
        let inside = self.storage.length()?.div_ceil(self.p.cluster);
        let mut beyond = 0;
        for (cluster, _) in counts.used().filter(|(cluster, _)| *cluster >= inside) {
            report.corruption(format!("Cluster {cluster} is used but lies beyond the end of the file"));
            beyond += 1;
        }
        if beyond > 0 && repair == Repair::All && self.storage.zero_beyond_end() {
            // What is there reads as zeros already.
            self.storage.truncate(report.image_end_offset)?;
            report.corruptions_fixed += beyond;
        }
        Ok(())
    }

    /// Counts what the header, the active tables, snapshots and bitmaps refer to.
    fn count_references(&self, header: &Header, counts: &mut Counts, report: &mut CheckReport) -> Result<()> {
        let bits = self.p.cluster_bits;
        let region = |offset: u64, len: u64, counts: &mut Counts| {
            for cluster in offset >> bits..(offset + len).div_ceil(self.p.cluster) {
                counts.add(cluster);
            }
        };
        region(0, 1, counts);
        region(header.l1_offset, u64::from(header.l1_size) * 8, counts);
        if let Some((offset, len)) = header.luks_place() {
            region(offset, len, counts);
        }
        let (snapshots, table_len) = self.read_snapshots(header)?;
        region(header.snapshots_offset, table_len, counts);
        let mut last_host = None;
        self.walk(&self.active_l1(), |reference| {
            if let Reference::Payload { entry, .. } = reference {
                report.allocated_clusters += 1;
                let host = self.host_clusters(entry);
                report.compressed_clusters += u64::from(entry & COMPRESSED != 0);
                let follows = last_host.is_none_or(|last| *host.start() == last || *host.start() == last + 1);
                report.fragmented_clusters += u64::from(!follows || entry & COMPRESSED != 0);
                last_host = Some(*host.end());
            }
            self.count(reference, counts, report);
            Ok(())
        })?;
        for snapshot in snapshots {
            let l1 = self.read_l1(snapshot.l1_offset, snapshot.l1_size)?;
            region(snapshot.l1_offset, l1.len() as u64 * 8, counts);
            self.walk(&l1, |reference| {
                self.count(reference, counts, report);
                Ok(())
            })?;
        }
        if header.autoclear & autoclear::BITMAPS != 0
            && let Some(bitmaps) = header.extension(extension::BITMAPS)
        {
            self.count_bitmaps(bitmaps, &mut |offset, len| region(offset, len, counts), report)?;
        }
        Ok(())
    }

    fn count(&self, reference: Reference, counts: &mut Counts, report: &mut CheckReport) {
        match reference {
            Reference::Table { entry, .. } => counts.add((entry & OFFSET_MASK) >> self.p.cluster_bits),
            Reference::Payload { entry, .. } => self.host_clusters(entry).for_each(|c| counts.add(c)),
            Reference::Invalid { what } => report.corruption(what.into()),
        }
    }

    /// Counts the bitmap directory, the bitmap tables and their data.
    fn count_bitmaps(
        &self,
        bitmaps: &[u8],
        region: &mut dyn FnMut(u64, u64),
        report: &mut CheckReport,
    ) -> Result<()> {
        if bitmaps.len() < 24 {
            report.corruption("The bitmaps extension is too short".into());
            return Ok(());
        }
        let (len, offset) = (be64(bitmaps, 8), be64(bitmaps, 16));
        if len > 64 << 20 || offset > OFFSET_MASK {
            report.corruption("The bitmap directory is out of bounds".into());
            return Ok(());
        }
        region(offset, len);
        let mut directory = vec![0; len as usize];
        self.storage.read_at(&mut directory, offset)?;
        let mut at = 0;
        while at + 24 <= directory.len() {
            let (table, entries) = (be64(&directory, at), be32(&directory, at + 8));
            let names = u32::from(directory[at + 18]) << 8 | u32::from(directory[at + 19]);
            let entry_len = (24 + be32(&directory, at + 20) + names).next_multiple_of(8);
            if entries > 8 << 20 || table > OFFSET_MASK {
                report.corruption("A bitmap table is out of bounds".into());
                return Ok(());
            }
            region(table, u64::from(entries) * 8);
            let mut bytes = vec![0; entries as usize * 8];
            self.storage.read_at(&mut bytes, table)?;
            for entry in bytes.chunks_exact(8).map(|e| be64(e, 0) & OFFSET_MASK).filter(|e| *e != 0) {
                region(entry, 1);
            }
            at += entry_len as usize;
        }
        Ok(())
    }

    /// Counts the refcount table and blocks. Returns whether they are beyond use.
    fn count_refcount_structures(&self, counts: &mut Counts, report: &mut CheckReport) -> bool {
        let refcounts = self.refcounts.lock();
        let (offset, clusters) = refcounts.table_place();
        let start = offset >> self.p.cluster_bits;
        (start..start + u64::from(clusters)).for_each(|c| counts.add(c));
        let file_end = self.storage.len().unwrap_or(u64::MAX);
        let mut broken = false;
        let blocks: Vec<_> = refcounts.block_offsets().collect();
        for (_, offset) in &blocks {
            counts.add(offset >> self.p.cluster_bits);
        }
        for (block, offset) in blocks {
            if offset >= file_end || counts.get(offset >> self.p.cluster_bits) > 1 {
                report.corruption(format!("Refcount block {block} is outside of the image or shared"));
                broken = true;
            }
        }
        broken
    }

    fn compare_refcounts(&self, counts: &Counts, repair: Repair, report: &mut CheckReport) -> Result<()> {
        let mut refcounts = self.refcounts.lock();
        for (cluster, count) in counts.used() {
            let refcount = refcounts.get(cluster)?;
            if refcount < count {
                report
                    .corruption(format!("Cluster {cluster} has refcount {refcount} but {count} references"));
                if repair == Repair::All {
                    refcounts.set(cluster, count)?;
                    report.corruptions_fixed += 1;
                }
            }
        }
        let blocks: Vec<_> = refcounts.block_offsets().map(|(block, _)| block).collect();
        for block in blocks {
            for (cluster, refcount) in refcounts.counted(block)? {
                let count = counts.get(cluster);
                if refcount <= count {
                    continue;
                }
                report.leaks += 1;
                report.note(format!("Cluster {cluster} has refcount {refcount} but {count} references"));
                if repair != Repair::Nothing {
                    refcounts.set(cluster, count)?;
                    report.leaks_fixed += 1;
                }
            }
            if repair == Repair::Nothing {
                refcounts.trim();
            }
        }
        refcounts.restart();
        Ok(())
    }

    fn check_flags(&self, report: &mut CheckReport) -> Result<()> {
        self.walk(&self.active_l1(), |reference| {
            let (entry, what) = match reference {
                Reference::Table { entry, .. } => (entry, "L2 table"),
                Reference::Payload { entry, .. } if entry & COMPRESSED == 0 => (entry, "guest cluster"),
                _ => return Ok(()),
            };
            let host = (entry & OFFSET_MASK) >> self.p.cluster_bits;
            let refcount = self.refcounts.lock().get(host)?;
            if (refcount == 1) != (entry & COPIED != 0) {
                report.corruption(format!("The copied flag of a {what} at cluster {host} is wrong"));
            }
            Ok(())
        })
    }

    /// Builds new refcount structures behind everything that is in use, and switches over to them.
    fn rebuild_refcounts(&self, header: &Header, end: u64) -> Result<()> {
        let bits = self.p.cluster_bits;
        let mut counts = Counts::default();
        self.count_references(header, &mut counts, &mut CheckReport::default())?;
        let per_block = 1u64 << (bits + 3 - header.refcount_order);
        let start = end.max(self.storage.length()?.div_ceil(self.p.cluster));
        // Blocks for everything that is used, and for themselves.
        let mut needed: BTreeSet<u64> = counts.used().map(|(cluster, _)| cluster / per_block).collect();
        let (table_clusters, total) = loop {
            let last = needed.last().copied().unwrap_or(0);
            let table_clusters = ((last + 1) * 8).div_ceil(self.p.cluster);
            if table_clusters << bits > MAX_REFTABLE_BYTES {
                return Err(self.corrupt("it refers to clusters far beyond its end"));
            }
            let total = needed.len() as u64 + table_clusters;
            match (start / per_block..=(start + total - 1) / per_block).find(|b| !needed.contains(b)) {
                Some(block) => needed.insert(block),
                None => break (table_clusters, total),
            };
        };
        (start..start + total).for_each(|c| counts.add(c));
        let mut table = vec![0u8; (table_clusters * self.p.cluster) as usize];
        for (i, block) in needed.iter().enumerate() {
            let mut bytes = vec![0; self.p.cluster as usize];
            for index in 0..per_block {
                let count = counts.get(block * per_block + index);
                if count != 0 {
                    write_entry(&mut bytes, index as usize, header.refcount_order, count);
                    if read_entry(&bytes, index as usize, header.refcount_order) != count {
                        return Err(Error::unsupported(&self.name, "refcounts of this width"));
                    }
                }
            }
            let offset = (start + i as u64) << bits;
            self.storage.write_at(&bytes, offset)?;
            table[*block as usize * 8..*block as usize * 8 + 8].copy_from_slice(&offset.to_be_bytes());
        }
        let table_offset = (start + needed.len() as u64) << bits;
        self.storage.write_at(&table, table_offset)?;
        self.storage.sync()?;
        let mut header = self.header.lock();
        (header.reftable_offset, header.reftable_clusters) = (table_offset, table_clusters as u32);
        header.write(&self.storage)?;
        self.storage.sync()?;
        *self.refcounts.lock() = Refcounts::open(&self.storage, &header)?;
        Ok(())
    }
}
