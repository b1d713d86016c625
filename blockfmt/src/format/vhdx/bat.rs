//! The block allocation table.
//!
//! Entries of payload blocks come in groups, one group for each bitmap block, whose entry follows them.

use super::header::{Header, MIB, PAGE, Region, Regions, le64};
use super::log::Replay;
use super::metadata::Metadata;
use super::{Meta, Missing, Params};
use crate::{Result, Storage};
use std::sync::Arc;

/// Findings that are kept.
const MAX_FINDINGS: usize = 100;
/// Bytes in a bitmap block.
pub(super) const BITMAP_BLOCK: u64 = MIB;

/// States of blocks. Others mean that the contents do not matter, which reads as zeros.
pub(super) mod state {
    /// No data here: the parent's, or zeros.
    pub const NOT_PRESENT: u64 = 0;
    pub const UNDEFINED: u64 = 1;
    pub const ZERO: u64 = 2;
    pub const UNMAPPED: u64 = 3;
    /// What images of preliminary versions of the format have for UNMAPPED.
    pub const UNMAPPED_OLD: u64 = 5;
    pub const PRESENT: u64 = 6;
    pub const PARTIAL: u64 = 7;
}

/// An entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(pub u64);

impl Entry {
    pub fn new(state: u64, offset: u64) -> Self {
        Entry(state | offset)
    }

    pub fn state(self) -> u64 {
        self.0 & 7
    }

    pub fn offset(self) -> u64 {
        self.0 & !(MIB - 1)
    }

    /// Whether the block takes space.
    pub fn present(self) -> bool {
        self.state() >= state::PRESENT
    }
}

impl Params {
    /// Number of a payload block's entry.
    pub fn payload_entry(&self, block: u64) -> u64 {
        block + block / self.ratio
    }

    /// Number of a bitmap block's entry.
    pub fn bitmap_entry(&self, chunk: u64) -> u64 {
        chunk * (self.ratio + 1) + self.ratio
    }

    /// Bytes of bitmap that belong to one block.
    pub fn bitmap_bytes(&self) -> u64 {
        self.block / self.sector / 8
    }
}

impl Meta {
    /// Where the entry of a payload block is in the file.
    pub fn payload_at(&self, p: &Params, block: u64) -> u64 {
        self.regions.bat.offset + p.payload_entry(block) * 8
    }

    /// Where the entry of the bitmap block of a payload block is.
    pub fn bitmap_at(&self, p: &Params, block: u64) -> u64 {
        self.regions.bat.offset + p.bitmap_entry(block / p.ratio) * 8
    }

    /// The entry of a payload block.
    pub fn payload(&self, p: &Params, block: u64) -> Result<Entry, Missing> {
        self.pages.word(self.payload_at(p, block)).map(Entry)
    }

    /// Where the bitmap of a payload block starts; `None` if there is none.
    pub fn bitmap(&self, p: &Params, block: u64) -> Result<Option<u64>, Missing> {
        let entry = Entry(self.pages.word(self.bitmap_at(p, block))?);
        let within = block % p.ratio * p.bitmap_bytes();
        Ok((entry.state() == state::PRESENT).then(|| entry.offset() + within))
    }
}

/// What the table says about the space of the file.
#[derive(Debug, Default)]
pub(super) struct Usage {
    /// One bit for each mebibyte of the file.
    used: Vec<u64>,
    /// First byte after everything that is in use.
    pub end: u64,
    /// Contradictions: the number of the entry in the table, if it is one's, and a description.
    pub findings: Vec<String>,
    /// Entries with contradictions.
    pub bad_entries: Vec<u64>,
    /// Payload blocks that take space.
    pub blocks: u64,
}

impl Usage {
    /// Reads and checks the whole table.
    pub fn of(
        storage: &Arc<dyn Storage>,
        name: &str,
        header: &Header,
        regions: &Regions,
        metadata: &Metadata,
        replay: &Replay,
    ) -> Result<Self> {
        let p = Params::new(metadata);
        let len = storage.length()?;
        let mut usage = Usage { used: vec![0; len.div_ceil(MIB).div_ceil(64) as usize], ..Usage::default() };
        let log = Region { offset: header.log_offset, len: header.log_length.into() };
        for region in regions.all.iter().chain([&Region { offset: 0, len: MIB }, &log]) {
            if !usage.take(region.offset, region.len, len) {
                usage.findings.push("its regions overlap or are out of bounds".into());
            }
        }
        let entries = p.entries(metadata.size, metadata.has_parent);
        let blocks = metadata.size.div_ceil(p.block);
        let mut buf = vec![0; MIB as usize];
        let mut first = 0;
        while first < entries {
            let count = (entries - first).min(MIB / 8);
            let at = regions.bat.offset + first * 8;
            let bytes = &mut buf[..(count * 8).next_multiple_of(PAGE) as usize];
            replay.read_at(storage, bytes, at)?;
            for n in 0..count {
                let entry = Entry(le64(bytes, n as usize * 8));
                if entry.0 != 0 {
                    usage.account(&p, first + n, entry, blocks, metadata.has_parent, len);
                }
            }
            first += count;
        }
        if !usage.findings.is_empty() {
            tracing::warn!(image = name, findings = usage.findings.len(), "The image contradicts itself");
        }
        Ok(usage)
    }

    fn account(&mut self, p: &Params, number: u64, entry: Entry, blocks: u64, child: bool, len: u64) {
        let (group, within) = (number / (p.ratio + 1), number % (p.ratio + 1));
        let is_bitmap = within == p.ratio;
        let bad = if is_bitmap {
            match entry.state() {
                state::NOT_PRESENT => None,
                state::PRESENT if !child => None, // of no use, and of no harm
                state::PRESENT if self.take(entry.offset(), BITMAP_BLOCK, len) => None,
                state::PRESENT => Some("overlaps or is out of bounds"),
                _ => Some("has an unknown state"),
            }
        } else if group * p.ratio + within >= blocks {
            None
        } else {
            match entry.state() {
                state::PARTIAL if !child => Some("is there in part, but there is no parent"),
                state::PRESENT | state::PARTIAL => {
                    self.blocks += 1;
                    let free = self.take(entry.offset(), p.block, len);
                    (!free).then_some("overlaps or is out of bounds")
                }
                state::NOT_PRESENT
                | state::UNDEFINED
                | state::ZERO
                | state::UNMAPPED
                | state::UNMAPPED_OLD => None,
                _ => Some("has an unknown state"),
            }
        };
        if let Some(what) = bad {
            let kind = if is_bitmap { "bitmap block" } else { "payload block" };
            if self.findings.len() < MAX_FINDINGS {
                self.findings.push(format!("the {kind} of table entry {number} {what}"));
            }
            self.bad_entries.push(number);
        }
    }

    /// Marks space as used; fails if it is used already or beyond the end of the file.
    fn take(&mut self, offset: u64, size: u64, file_len: u64) -> bool {
        let Some(end) = offset.checked_add(size).filter(|end| *end <= file_len) else { return false };
        let units = offset / MIB..end.div_ceil(MIB);
        if units.clone().any(|u| self.is_used(u)) {
            return false;
        }
        units.for_each(|u| self.used[(u / 64) as usize] |= 1 << (u % 64));
        self.end = self.end.max(end.next_multiple_of(MIB));
        true
    }

    fn is_used(&self, unit: u64) -> bool {
        self.used[(unit / 64) as usize] >> (unit % 64) & 1 != 0
    }

    /// Mebibytes of the file before its end that nothing uses.
    pub fn unused(&self, file_len: u64) -> u64 {
        let taken: u64 = self.used.iter().map(|w| u64::from(w.count_ones())).sum();
        file_len.div_ceil(MIB) - taken
    }
}
