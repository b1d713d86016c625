//! VHDX (Hyper-V's second format): fixed, dynamic and differencing disks.
//!
//! Metadata (the block allocation table, sector bitmaps, sizes, the parent's name) lives in pages of 4 KiB and
//! changes only through the log. A flush makes the payload durable, then writes one log entry with the
//! changed pages and makes it durable, then writes the pages to their places; the next flush makes those
//! durable before it writes another entry, so that only the newest entry ever counts. Blocks never move and
//! are never freed while the image is open, so that readers need no protection from writers.
//!
//! The log is in use, and the header says so, from the first change to [`close`](crate::Layer::close).

mod bat;
mod check;
mod create;
mod header;
mod layer;
mod log;
mod metadata;
mod pages;
mod parent;
mod resize;
mod write;

pub(crate) use create::create;
pub use create::{VhdxKind, VhdxOptions};

use super::LayerOptions;
use crate::ranges::RangeLocks;
use crate::{BackingRef, Error, Result, Storage};
use bat::Usage;
use header::{Headers, PAGE, REGION_TABLE_BYTES, REGION_TABLES, Regions};
use log::{Log, MAX_PAGES, Replay};
use metadata::{Metadata, Places};
use pages::{Image, Missing, Pages};
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use uuid::Uuid;

/// Numbers that do not change while the image is open.
#[derive(Clone, Copy, Debug)]
struct Params {
    /// Bytes of payload in a block.
    block: u64,
    /// Bytes in a sector, the unit of a differencing disk.
    sector: u64,
    /// Payload blocks whose sectors one bitmap block describes.
    ratio: u64,
    fixed: bool,
}

impl Params {
    fn new(m: &Metadata) -> Self {
        let (block, sector) = (u64::from(m.block_size), u64::from(m.logical_sector));
        Params { block, sector, ratio: (sector << 23) / block, fixed: m.fixed }
    }

    /// Entries in the block allocation table of a disk of `size` bytes.
    fn entries(&self, size: u64, has_parent: bool) -> u64 {
        let blocks = size.div_ceil(self.block);
        let chunks = blocks.div_ceil(self.ratio);
        if has_parent { chunks * (self.ratio + 1) } else { blocks + blocks.saturating_sub(1) / self.ratio }
    }
}

/// Pages and the allocation of file space.
#[derive(Debug)]
struct Meta {
    pages: Pages,
    regions: Regions,
    /// Where the next block goes.
    end: u64,
    /// The file may hold stale bytes from `end` to here.
    stale_end: u64,
}

/// What changes with headers and log. Holding it keeps others from flushing.
#[derive(Debug)]
struct Journal {
    headers: Headers,
    log: Log,
}

/// What the metadata region says, and where.
#[derive(Debug)]
struct Facts {
    metadata: Metadata,
    places: Places,
    backing: Option<BackingRef>,
}

/// States of an open image; see [`Vhdx::begin`].
const UNTOUCHED: u8 = 0;
const METADATA_CHANGED: u8 = 1;
const DATA_CHANGED: u8 = 2;

/// A VHDX image.
#[derive(Debug)]
pub struct Vhdx {
    storage: Arc<dyn Storage>,
    name: String,
    read_only: bool,
    /// The table contradicts itself, and the image was opened nevertheless.
    damaged: AtomicBool,
    /// Whether the log was not empty when the image was opened.
    dirty: bool,
    p: Params,
    size: AtomicU64,
    differencing: AtomicBool,
    touched: AtomicU8,
    /// What a log that cannot be replayed, because the image is read-only, adds to the metadata.
    replay: Replay,
    meta: RwLock<Meta>,
    facts: Mutex<Facts>,
    /// Locked before `meta`, if both are.
    journal: Mutex<Journal>,
    /// Blocks that are being allocated or whose bitmap changes.
    ranges: RangeLocks,
}

impl Vhdx {
    /// Opens an image. A log that is not empty is replayed: into the file, or, if the image is opened for
    /// reading, in memory.
    pub fn open(storage: Arc<dyn Storage>, options: &LayerOptions) -> Result<Self> {
        let name = storage.name();
        let read_only = options.read_only || storage.read_only();
        let mut headers = Headers::read(&storage, &name)?;
        let h = headers.current.clone();
        let dirty = !h.log.is_nil();
        let mut replay = Replay::default();
        if dirty {
            replay = Replay::read(&storage, &name, h.log_offset, h.log_length, h.log)?;
            if !read_only {
                replay.apply(&storage)?;
                headers.update(&storage, |h| h.log = Uuid::nil())?;
                replay = Replay::default();
            }
        }
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            replay.read_at(&storage, &mut bytes, at).map(|()| bytes)
        };
        let [first, second] = REGION_TABLES;
        let tables = [read(first, REGION_TABLE_BYTES)?, read(second, REGION_TABLE_BYTES)?];
        let regions = Regions::parse(tables, &name)?;
        let within = |at: u64, len: usize| read(regions.metadata.offset + at, len);
        let (metadata, places) = Metadata::parse(regions.metadata, &name, within)?;
        let p = Params::new(&metadata);
        if p.entries(metadata.size, metadata.has_parent) * 8 > regions.bat.len {
            return Err(Error::corrupt(&name, "its block allocation table is too small for the disk"));
        }
        let usage = Usage::of(&storage, &name, &headers.current, &regions, &metadata, &replay)?;
        if let Some(finding) = usage.findings.first().filter(|_| !options.repair) {
            return Err(Error::corrupt(&name, finding.as_str()));
        }
        let backing = metadata.has_parent.then(|| parent::reference(&metadata, &name)).transpose()?;
        let len = storage.length()?;
        let log = Log::new(h.log_offset, h.log_length);
        Ok(Vhdx {
            read_only,
            damaged: AtomicBool::new(!usage.findings.is_empty()),
            dirty,
            p,
            size: AtomicU64::new(metadata.size),
            differencing: AtomicBool::new(metadata.has_parent),
            touched: AtomicU8::new(UNTOUCHED),
            replay,
            meta: RwLock::new(Meta { pages: Pages::default(), regions, end: usage.end, stale_end: len }),
            facts: Mutex::new(Facts { metadata, places, backing }),
            journal: Mutex::new(Journal { headers, log }),
            ranges: RangeLocks::default(),
            name,
            storage,
        })
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn is_differencing(&self) -> bool {
        self.differencing.load(Ordering::Acquire)
    }

    fn io(&self, op: &'static str, error: std::io::Error) -> Error {
        Error::io(op, &self.name, error)
    }

    /// Calls `f` until it finds all pages that it needs.
    fn with_pages<R>(&self, f: impl Fn(&Meta) -> Result<R, Missing>) -> Result<R> {
        loop {
            let missing = match f(&self.meta.read()) {
                Ok(out) => return Ok(out),
                Err(Missing(at)) => at,
            };
            let mut meta = self.meta.write();
            if meta.pages.get(missing).is_err() {
                // The lock is held meanwhile, so that nobody can write a newer one.
                let mut bytes = vec![0; PAGE as usize];
                self.replay.read_at(&self.storage, &mut bytes, missing)?;
                meta.pages.insert(missing, bytes.into());
            }
        }
    }

    /// Takes the log into use and marks the file, and with `data` the disk, as different from what it was.
    fn begin_repair(&self, data: bool) -> Result<()> {
        let wanted = if data { DATA_CHANGED } else { METADATA_CHANGED };
        if self.touched.load(Ordering::Acquire) >= wanted {
            return Ok(());
        }
        let mut journal = self.journal.lock();
        let touched = self.touched.load(Ordering::Acquire);
        if touched >= wanted {
            return Ok(());
        }
        let Journal { headers, log } = &mut *journal;
        if touched == UNTOUCHED {
            log.start(&self.storage, self.storage.length()?)?;
        }
        headers.update(&self.storage, |h| {
            h.log = log.id;
            h.file_write = if touched == UNTOUCHED { Uuid::new_v4() } else { h.file_write };
            h.data_write = if data { Uuid::new_v4() } else { h.data_write };
        })?;
        self.touched.store(wanted, Ordering::Release);
        Ok(())
    }

    /// Brings everything to disk in the order that a crash cannot hurt.
    fn flush_all(&self) -> Result<()> {
        self.flush_with(&mut self.journal.lock())
    }

    fn flush_with(&self, journal: &mut Journal) -> Result<()> {
        // What is published by now was written by now.
        let pages = {
            let mut meta = self.meta.write();
            let table = meta.regions.bat;
            meta.pages.take_dirty(table)
        };
        let result = self.commit(journal, &pages);
        self.meta.write().pages.settle(&pages, result.is_ok());
        result
    }

    /// Makes everything written so far durable, and then the pages, [`MAX_PAGES`] at a time.
    fn commit(&self, journal: &mut Journal, pages: &[Image]) -> Result<()> {
        let file_len = self.storage.length()?;
        self.storage.sync()?;
        for (n, entry) in pages.chunks(MAX_PAGES).enumerate() {
            if n > 0 {
                self.storage.sync()?; // the entry before is in its place
            }
            journal.log.append(&self.storage, entry, file_len)?;
            for (at, bytes) in entry {
                self.storage.write_at(bytes, *at)?;
            }
        }
        Ok(())
    }

    /// Changes bytes of metadata outside of the cached pages, all or nothing across a crash.
    fn commit_patches(&self, journal: &mut Journal, patches: &[(u64, Vec<u8>)]) -> Result<()> {
        let mut scratch = Pages::default();
        for (at, bytes) in patches {
            let mut done = 0;
            while done < bytes.len() {
                let from = at + done as u64;
                let n = (bytes.len() - done).min((PAGE - from % PAGE) as usize);
                scratch.change(&self.storage, from, &bytes[done..done + n])?;
                done += n;
            }
        }
        let pages = scratch.take_dirty(header::Region { offset: 0, len: 0 });
        if pages.len() > MAX_PAGES {
            return Err(Error::unsupported(&self.name, "so large a change of metadata"));
        }
        self.commit(journal, &pages)
    }

    /// Writes everything back and empties the log.
    fn close_image(&self) -> Result<()> {
        let mut journal = self.journal.lock();
        self.flush_with(&mut journal)?;
        if self.touched.load(Ordering::Acquire) != UNTOUCHED {
            self.storage.sync()?;
            journal.headers.update(&self.storage, |h| h.log = Uuid::nil())?;
            // Further requests mark the image again.
            self.touched.store(UNTOUCHED, Ordering::Release);
        }
        Ok(())
    }
}
