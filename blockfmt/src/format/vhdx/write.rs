//! Lookups, writes and zeroing.

use super::bat::{BITMAP_BLOCK, Entry, state};
use super::header::{MIB, PAGE};
use super::{Meta, Vhdx, pages};
use crate::format::blocks::{Blocks, Geometry};
use crate::ranges::RangeLocks;
use crate::{Extent, Result, Source, Storage};
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Blocks for Vhdx {
    fn file(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn geometry(&self) -> Geometry {
        Geometry { block: self.p.block, sector: self.p.sector, size: self.virtual_size() }
    }

    fn locks(&self) -> &RangeLocks {
        &self.ranges
    }

    fn lookup(&self, offset: u64, len: u64) -> Result<Extent> {
        let (block, within) = (offset / self.p.block, offset % self.p.block);
        let len = len.min(self.p.block - within);
        let absent = match self.is_differencing() {
            true => Source::Below,
            false => Source::Zero { allocated: false },
        };
        self.with_pages(|meta| {
            let entry = meta.payload(&self.p, block)?;
            let data = Source::Data { file: 0, offset: entry.offset() + within };
            let source = match entry.state() {
                state::PRESENT => data,
                state::NOT_PRESENT => absent,
                state::PARTIAL => {
                    let Some(bitmap) = meta.bitmap(&self.p, block)? else {
                        return Ok(Extent { len, source: absent });
                    };
                    let first = within / self.p.sector;
                    let at = bitmap + first / 8;
                    let page = meta.pages.get(at)?;
                    let bit = at % PAGE * 8 + first % 8;
                    let sectors = ((within + len - 1) / self.p.sector - first + 1).min(PAGE * 8 - bit);
                    let (set, sectors) = pages::run(page, bit, sectors);
                    let len = len.min((first + sectors) * self.p.sector - within);
                    return Ok(Extent { len, source: if set { data } else { absent } });
                }
                _ => Source::Zero { allocated: false },
            };
            Ok(Extent { len, source })
        })
    }

    fn shows_parent(&self, offset: u64) -> Result<bool> {
        let entry = self.with_pages(|meta| meta.payload(&self.p, offset / self.p.block))?;
        let open = matches!(entry.state(), state::NOT_PRESENT | state::PARTIAL);
        Ok(open && self.is_differencing())
    }

    fn fill(&self, from: u64, len: u64, write: impl FnOnce(u64) -> Result<()>) -> Result<()> {
        let (block, within) = (from / self.p.block, from % self.p.block);
        let entry = self.with_pages(|meta| meta.payload(&self.p, block))?;
        let sectors = (within / self.p.sector, len / self.p.sector);
        if entry.present() {
            write(entry.offset() + within)?;
            let mut meta = self.meta.write();
            return self.set_bits(&mut meta, block, entry, sectors);
        }
        let shows_parent = entry.state() == state::NOT_PRESENT && self.is_differencing();
        let whole = len == self.p.block;
        let start = self.with_new_space(self.p.block, |start| write(start + within))?;
        let mut meta = self.meta.write();
        let at = meta.payload_at(&self.p, block);
        if shows_parent && !whole {
            self.make_bitmap(&mut meta, block)?;
            self.set_bits(&mut meta, block, Entry::new(state::PARTIAL, start), sectors)?;
            let entry = Entry::new(state::PARTIAL, start);
            return meta.pages.change(&self.storage, at, &entry.0.to_le_bytes());
        }
        let entry = Entry::new(state::PRESENT, start);
        meta.pages.change(&self.storage, at, &entry.0.to_le_bytes())
    }

    /// Entries of the table that contradict others could lead a write anywhere, so an image that was opened to be
    /// repaired takes none before.
    fn begin(&self, contents: bool) -> Result<()> {
        if self.damaged.load(Ordering::Acquire) {
            return Err(crate::Error::corrupt(
                &self.name,
                "its block allocation table is damaged; repair it first",
            ));
        }
        self.begin_repair(contents)
    }

    fn relieve(&self) -> Result<()> {
        let crowded = self.meta.read().pages.crowded();
        if crowded { self.flush_all() } else { Ok(()) }
    }

    fn zero_block(&self, offset: u64) -> Result<bool> {
        let block = offset / self.p.block;
        let entry = self.with_pages(|meta| meta.payload(&self.p, block))?;
        if entry.state() != state::NOT_PRESENT {
            return Ok(false);
        }
        let mut meta = self.meta.write();
        let at = meta.payload_at(&self.p, block);
        meta.pages.change(&self.storage, at, &Entry::new(state::ZERO, 0).0.to_le_bytes())?;
        Ok(true)
    }
}

impl Vhdx {
    /// Reserves space at the end of the file, zeroed, lets `write` fill it, and takes it back if that fails.
    fn with_new_space(&self, span: u64, write: impl FnOnce(u64) -> Result<()>) -> Result<u64> {
        let (start, stale) = self.reserve(span)?;
        let result = (|| {
            if stale > start {
                self.storage.zero(start, stale - start, true)?;
            }
            write(start)
        })();
        if let Err(error) = result {
            let mut meta = self.meta.write();
            if meta.end == start + span {
                // The last reservation goes back; what is there is stale now.
                meta.stale_end = meta.stale_end.max(meta.end);
                meta.end = start;
            }
            return Err(error);
        }
        Ok(start)
    }

    /// Reserves space at the end of the file; returns its start and the end of stale bytes in it.
    pub(super) fn reserve(&self, span: u64) -> Result<(u64, u64)> {
        let mut meta = self.meta.write();
        self.reserve_in(&mut meta, span)
    }

    fn reserve_in(&self, meta: &mut Meta, span: u64) -> Result<(u64, u64)> {
        let start = meta.end;
        let end = start + span;
        let mut stale = end;
        if self.storage.zero_beyond_end() {
            let written = self.storage.length()?;
            stale = meta.stale_end.max(written).min(end);
            if written < end {
                // Readers expect blocks to be inside of the file.
                self.storage.truncate(end)?;
            }
        }
        meta.end = end;
        Ok((start, stale))
    }

    /// Gives a block that shows its parent a bitmap without any bit set.
    fn make_bitmap(&self, meta: &mut Meta, block: u64) -> Result<()> {
        let at = meta.bitmap_at(&self.p, block);
        meta.pages.load(&self.storage, at)?;
        if let Ok(Some(bitmap)) = meta.bitmap(&self.p, block) {
            // Bits from before the block showed its parent may be left.
            let (mut at, end) = (bitmap, bitmap + self.p.bitmap_bytes());
            while at < end {
                let n = (PAGE - at % PAGE).min(end - at);
                let page = meta.pages.load(&self.storage, at)?;
                let part = &page[(at % PAGE) as usize..(at % PAGE + n) as usize];
                if part.iter().any(|b| *b != 0) {
                    meta.pages.change(&self.storage, at, &vec![0; n as usize])?;
                }
                at += n;
            }
            return Ok(());
        }
        let (start, stale) = self.reserve_in(meta, BITMAP_BLOCK)?;
        if stale > start {
            self.storage.zero(start, stale - start, true)?;
        }
        let entry = Entry::new(state::PRESENT, start);
        meta.pages.change(&self.storage, at, &entry.0.to_le_bytes())
    }

    /// Marks sectors of a block that is there in part as present; a block that is complete now is marked so.
    fn set_bits(&self, meta: &mut Meta, block: u64, entry: Entry, sectors: (u64, u64)) -> Result<()> {
        if entry.state() != state::PARTIAL {
            return Ok(());
        }
        let at = meta.bitmap_at(&self.p, block);
        meta.pages.load(&self.storage, at)?;
        let Ok(Some(bitmap)) = meta.bitmap(&self.p, block) else {
            return Err(crate::Error::corrupt(&self.name, "a block that is there in part has no bitmap"));
        };
        let (mut first, end) = (sectors.0, sectors.0 + sectors.1);
        while first < end {
            let at = bitmap + first / 8;
            let bit = at % PAGE * 8 + first % 8;
            let n = (end - first).min(PAGE * 8 - bit);
            let mut page = meta.pages.load(&self.storage, at)?.clone();
            pages::set(&mut page, bit, n);
            meta.pages.change(&self.storage, at / PAGE * PAGE, &page)?;
            first += n;
        }
        let (mut at, end) = (bitmap, bitmap + self.p.bitmap_bytes());
        while at < end {
            let n = (PAGE - at % PAGE).min(end - at);
            let page = meta.pages.load(&self.storage, at)?;
            if page[(at % PAGE) as usize..(at % PAGE + n) as usize].iter().any(|b| *b != 0xff) {
                return Ok(());
            }
            at += n;
        }
        let at = meta.payload_at(&self.p, block);
        let entry = Entry::new(state::PRESENT, entry.offset());
        meta.pages.change(&self.storage, at, &entry.0.to_le_bytes())
    }

    /// Gives every block of a range space. For fixed disks that grow.
    pub(super) fn allocate_guest(&self, offset: u64, len: u64) -> Result<()> {
        self.for_blocks(offset, len, |at, _| {
            let _guard = self.lock_block(at);
            let block = at / self.p.block;
            let entry = self.with_pages(|meta| meta.payload(&self.p, block))?;
            if entry.present() {
                return Ok(());
            }
            self.fill(block * self.p.block, self.p.block.min(MIB), |_| Ok(()))
        })
    }
}
