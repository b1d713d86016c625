//! VHD (Virtual PC): fixed, dynamic and differencing disks.
//!
//! The format has no log. A block is allocated in this order: payload and sector bitmap, flush, entry in the
//! block allocation table, footer. Bits of blocks that exist already are written after the payload is
//! durable as well. Blocks never move and are never freed, so that readers need no protection from writers.

mod create;
mod footer;
mod layer;
mod meta;
mod parent;
mod write;

pub(crate) use create::create;
pub use create::{VhdKind, VhdOptions};

use super::LayerOptions;
use crate::ranges::RangeLocks;
use crate::{BackingRef, Error, Result, Storage};
use footer::{Footer, Header, Kind, SECTOR};
use meta::{Bits, Meta, UNUSED};
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the headers say and may change.
#[derive(Debug)]
struct Headers {
    footer: Footer,
    /// Only of dynamic and differencing disks.
    header: Option<Header>,
    backing: Option<BackingRef>,
}

/// Numbers that do not change while the image is open.
#[derive(Clone, Copy, Debug)]
struct Params {
    fixed: bool,
    /// Bytes of payload in a block.
    block: u64,
    /// Bytes of the bitmap before each block, a multiple of the sector size.
    bitmap: u64,
}

/// A VHD image.
#[derive(Debug)]
pub struct Vhd {
    storage: Arc<dyn Storage>,
    name: String,
    read_only: bool,
    p: Params,
    size: AtomicU64,
    headers: Mutex<Headers>,
    meta: RwLock<Meta>,
    /// Blocks that are being allocated or whose bitmap changes.
    ranges: RangeLocks,
    flushing: Mutex<()>,
}

impl Vhd {
    /// Opens an image.
    pub fn open(storage: Arc<dyn Storage>, options: &LayerOptions) -> Result<Self> {
        let name = storage.name();
        let (footer, kind) = read_footer(&storage, &name)?;
        let size = footer.size();
        let mut p = Params { fixed: true, block: 0, bitmap: 0 };
        let mut meta = Meta {
            bat: Vec::new(),
            bits: Default::default(),
            pending: Default::default(),
            dirty: Default::default(),
            end: size,
            stale_end: 0,
            footer_dirty: false,
        };
        let (mut header, mut backing) = (None, None);
        if kind != Kind::Fixed {
            let mut bytes = [0; 1024];
            storage.read_at(&mut bytes, footer.header_offset())?;
            let h = Header::parse(bytes, &name)?;
            let block = h.block_size();
            p = Params { fixed: false, block, bitmap: (block / SECTOR / 8).next_multiple_of(SECTOR) };
            read_table(&storage, &name, &footer, &h, p, &mut meta)?;
            if kind == Kind::Differencing {
                backing = Some(parent::read(&storage, &h)?);
            }
            header = Some(h);
        }
        let read_only = options.read_only || storage.read_only();
        Ok(Vhd {
            read_only,
            p,
            size: AtomicU64::new(size),
            headers: Mutex::new(Headers { footer, header, backing }),
            meta: RwLock::new(meta),
            ranges: RangeLocks::default(),
            flushing: Mutex::new(()),
            name,
            storage,
        })
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn differencing(&self) -> bool {
        self.headers.lock().backing.is_some()
    }

    fn io(&self, op: &'static str, error: std::io::Error) -> Error {
        Error::io(op, &self.name, error)
    }

    /// Where the payload of a block starts, if it has space.
    fn payload_of(&self, entry: u32) -> Option<u64> {
        (entry != UNUSED).then(|| u64::from(entry) * SECTOR + self.p.bitmap)
    }

    /// Calls `f` with the table and, if the block has space, its bitmap.
    fn with_block<R>(&self, block: u32, f: impl Fn(&Meta, Option<(u64, &Bits)>) -> R) -> Result<R> {
        {
            let meta = self.meta.read();
            match self.payload_of(meta.bat[block as usize]) {
                None => return Ok(f(&meta, None)),
                Some(at) => {
                    if let Some(bits) = meta.bits.get(&block) {
                        return Ok(f(&meta, Some((at, bits))));
                    }
                }
            }
        }
        // The lock is held while the bitmap is read, so that nobody can write a newer one meanwhile.
        let mut meta = self.meta.write();
        let Some(at) = self.payload_of(meta.bat[block as usize]) else { return Ok(f(&meta, None)) };
        if !meta.bits.contains_key(&block) {
            let mut bytes = vec![0; (self.p.block / SECTOR / 8) as usize];
            self.storage.read_at(&mut bytes, at - self.p.bitmap)?;
            meta.cache(block, Bits::from_bytes(bytes), self.p.bitmap as usize);
        }
        Ok(f(&meta, meta.bits.get(&block).map(|bits| (at, bits))))
    }
}

/// Finds the footer. The one at the end decides for fixed disks, whose first sector belongs to the guest.
fn read_footer(storage: &Arc<dyn Storage>, name: &str) -> Result<(Footer, Kind)> {
    let len = storage.length()?;
    let mut bytes = [0; 512];
    storage.read_at(&mut bytes, len.saturating_sub(SECTOR))?;
    let trailing = Footer::parse(&bytes);
    storage.read_at(&mut bytes, 0)?;
    let leading = Footer::parse(&bytes);
    let kind_of = |f: &Option<Footer>| f.as_ref().map(|f| f.kind(name)).transpose();
    let footer = match (kind_of(&trailing)?, kind_of(&leading)?) {
        (Some(Kind::Fixed), None | Some(Kind::Fixed)) => trailing,
        (Some(Kind::Fixed), Some(_)) => {
            return Err(Error::corrupt(name, "the footer at its end and the copy at its start contradict"));
        }
        (_, Some(Kind::Dynamic | Kind::Differencing)) => leading,
        (Some(_), _) => trailing, // only the copy is damaged
        _ => None,
    };
    let footer = footer.ok_or_else(|| Error::wrong_format(name, "VHD"))?;
    footer.check(name)?;
    let kind = footer.kind(name)?;
    if kind == Kind::Fixed && footer.size() > len.saturating_sub(SECTOR) {
        return Err(Error::corrupt(name, "it is shorter than the disk that it describes"));
    }
    Ok((footer, kind))
}

/// Reads and checks the block allocation table.
fn read_table(
    storage: &Arc<dyn Storage>,
    name: &str,
    footer: &Footer,
    header: &Header,
    p: Params,
    meta: &mut Meta,
) -> Result<()> {
    let blocks = footer.size().div_ceil(p.block); // at most 2040 GiB / 512 KiB
    let (start, len) = (header.table_offset(), storage.length()?);
    let table_bytes = (u64::from(header.entries()) * 4).next_multiple_of(SECTOR);
    let header_end = footer.header_offset().saturating_add(1024);
    if blocks > header.entries().into() {
        return Err(Error::corrupt(name, "its block allocation table is too small for the disk"));
    }
    let table_end = start.saturating_add(blocks * 4);
    if start < SECTOR || !start.is_multiple_of(SECTOR) || table_end > len || header_end > len {
        return Err(Error::corrupt(name, "its block allocation table is out of bounds"));
    }
    let mut bytes = vec![0; blocks as usize * 4];
    storage.read_at(&mut bytes, start)?;
    meta.bat = (0..blocks as usize).map(|b| footer::be32(&bytes, b * 4)).collect();
    let mut used: Vec<u32> = meta.bat.iter().copied().filter(|e| *e != UNUSED).collect();
    used.sort_unstable();
    let span = (p.bitmap + p.block) / SECTOR;
    if used.windows(2).any(|w| u64::from(w[1] - w[0]) < span) {
        return Err(Error::corrupt(name, "two of its blocks overlap"));
    }
    let in_bounds = |e: u32| {
        let (from, to) = (u64::from(e) * SECTOR, (u64::from(e) + span) * SECTOR);
        let apart = |a: u64, b: u64| to <= a || from >= b;
        from < len && apart(0, SECTOR) && apart(footer.header_offset(), header_end) && apart(start, table_end)
    };
    if !used.iter().all(|e| in_bounds(*e)) {
        return Err(Error::corrupt(name, "a block is out of bounds"));
    }
    let blocks_end = used.last().map_or(0, |e| (u64::from(*e) + span) * SECTOR);
    let end = blocks_end.max(header_end).max(start + table_bytes).max(parent::end(header, name)?);
    meta.end = end.next_multiple_of(SECTOR);
    meta.stale_end = len;
    Ok(())
}
