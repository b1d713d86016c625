//! Checking and repairing.

use super::Vhdx;
use super::bat::Usage;
use super::header::REGION_TABLES;
use crate::format::check::{CheckReport, Repair};
use crate::{Error, Result};
use std::sync::atomic::Ordering;

impl Vhdx {
    /// Checks the image: both headers, both region tables, and every entry of the block allocation table.
    /// A repair rewrites damaged copies, cuts unused space off the end of the file (leaks), and removes
    /// entries that contradict others (their contents are lost).
    pub(super) fn check_image(&self, repair: Repair) -> Result<CheckReport> {
        if repair != Repair::Nothing {
            if self.read_only {
                return Err(Error::ReadOnly);
            }
            self.close_image()?;
        }
        let mut report = self.check_once()?;
        let before = (report.corruptions, report.leaks);
        if repair == Repair::All && report.corruptions > 0 {
            self.repair_copies()?;
            self.remove_bad_entries()?;
            self.close_image()?;
            report = self.check_once()?;
            self.damaged.store(report.corruptions > 0, Ordering::Release);
        }
        if repair != Repair::Nothing && report.leaks > 0 && report.corruptions == 0 {
            let mut meta = self.meta.write();
            self.storage.truncate(report.image_end_offset)?;
            self.storage.sync()?;
            (meta.end, meta.stale_end) = (report.image_end_offset, report.image_end_offset);
            drop(meta);
            report = self.check_once()?;
        }
        report.corruptions_fixed = before.0.saturating_sub(report.corruptions);
        report.leaks_fixed = before.1.saturating_sub(report.leaks);
        Ok(report)
    }

    fn usage(&self) -> Result<Usage> {
        let journal = self.journal.lock();
        let facts = self.facts.lock();
        let meta = self.meta.read();
        let header = &journal.headers.current;
        Usage::of(&self.storage, &self.name, header, &meta.regions, &facts.metadata, &self.replay)
    }

    fn check_once(&self) -> Result<CheckReport> {
        let usage = self.usage()?;
        let len = self.storage.length()?;
        let mut report = CheckReport {
            corruptions: usage.findings.len() as u64,
            leaks: usage.unused(len),
            total_clusters: self.virtual_size().div_ceil(self.p.block),
            allocated_clusters: usage.blocks,
            image_end_offset: usage.end,
            findings: usage.findings,
            ..CheckReport::default()
        };
        if self.journal.lock().headers.copies < 2 {
            report.corruptions += 1;
            report.findings.push("one of the headers is damaged".into());
        }
        if !self.meta.read().regions.copies_agree {
            report.corruptions += 1;
            report.findings.push("one of the region tables is damaged".into());
        }
        if report.leaks > 0 {
            report.findings.push(format!("{} MiB of the file are not in use", report.leaks));
        }
        Ok(report)
    }

    fn repair_copies(&self) -> Result<()> {
        let mut journal = self.journal.lock();
        journal.headers.update(&self.storage, |_| ())?;
        let mut meta = self.meta.write();
        for at in REGION_TABLES {
            self.storage.write_at(&meta.regions.table, at)?;
            self.storage.sync()?;
        }
        meta.regions.copies_agree = true;
        Ok(())
    }

    fn remove_bad_entries(&self) -> Result<()> {
        let bad = self.usage()?.bad_entries;
        if bad.is_empty() {
            return Ok(());
        }
        self.begin_repair(true)?;
        for entry in bad {
            let mut meta = self.meta.write();
            let at = meta.regions.bat.offset + entry * 8;
            meta.pages.change(&self.storage, at, &[0; 8])?;
            let crowded = meta.pages.crowded();
            drop(meta);
            if crowded {
                self.flush_all()?;
            }
        }
        self.flush_all()
    }
}
