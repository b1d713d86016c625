//! Lookups, writes and zeroing.

use super::bat::{BITMAP_BLOCK, Entry, state};
use super::header::{MIB, PAGE};
use super::{Meta, Vhdx, pages};
use crate::format::zero_sectors;
use crate::{Below, Extent, Gather, Result, Scatter, Source};

/// Unit in which parents are copied, in bytes.
const COPY_CHUNK: u64 = 1 << 20;

impl Vhdx {
    /// Where bytes are, for at most the rest of their block.
    pub(super) fn lookup(&self, offset: u64, len: u64) -> Result<Extent> {
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

    /// Splits a range at the borders of blocks.
    fn for_blocks(&self, offset: u64, len: u64, mut f: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        let mut at = offset;
        while at < offset + len {
            let n = (self.p.block - at % self.p.block).min(offset + len - at);
            f(at, n)?;
            if self.meta.read().pages.crowded() {
                self.flush_all()?;
            }
            at += n;
        }
        Ok(())
    }

    fn lock_block(&self, offset: u64) -> crate::ranges::RangeGuard<'_> {
        let block = offset / self.p.block;
        self.ranges.lock(block..block + 1)
    }

    /// Writes guest bytes.
    pub(super) fn write_guest(&self, src: Gather<'_>, offset: u64, below: Below<'_>) -> Result<()> {
        self.begin(true)?;
        self.for_blocks(offset, src.len() as u64, |at, len| {
            let part = src.slice((at - offset) as usize, len as usize);
            let mut done = 0;
            let mut guard = None;
            while done < len {
                let extent = self.lookup(at + done, len - done)?;
                let piece = part.slice(done as usize, extent.len as usize);
                match extent.source {
                    Source::Data { offset: host, .. } => {
                        self.storage.writev(piece, host).map_err(|e| self.io("write", e))?;
                    }
                    // Look again under the lock before the block changes.
                    _ if guard.is_none() => {
                        guard = Some(self.lock_block(at));
                        continue;
                    }
                    _ => self.write_absent(piece, at + done, below)?,
                }
                done += extent.len;
            }
            Ok(())
        })
    }

    /// Writes into sectors that the image does not hold. The caller has locked the block.
    fn write_absent(&self, src: Gather<'_>, offset: u64, below: Below<'_>) -> Result<()> {
        let end = offset + src.len() as u64;
        let (from, to) = (offset / self.p.sector * self.p.sector, end.next_multiple_of(self.p.sector));
        // Sectors are complete in this file or not at all: the edges come from the parent.
        let mut head = vec![0; (offset - from) as usize];
        let mut tail = vec![0; (to - end) as usize];
        if self.reads_below(offset)? {
            below.read(Scatter::new(&mut head), from)?;
            below.read(Scatter::new(&mut tail), end)?;
        }
        self.fill(from, to - from, |host| {
            src.with_edges(&head, &tail, |whole| {
                self.storage.writev(whole, host).map_err(|e| self.io("write", e))
            })
        })
    }

    /// Whether sectors of this block that are absent show the parent's.
    fn reads_below(&self, offset: u64) -> Result<bool> {
        let entry = self.with_pages(|meta| meta.payload(&self.p, offset / self.p.block))?;
        let open = matches!(entry.state(), state::NOT_PRESENT | state::PARTIAL);
        Ok(open && self.is_differencing())
    }

    /// Fills absent sectors of one block with `write`, which is told where they are in the file, and
    /// marks them as present. The caller has locked the block.
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

    /// Copies what the image does not hold from `below`.
    pub(super) fn populate_guest(&self, offset: u64, len: u64, below: Below<'_>) -> Result<()> {
        self.begin(false)?;
        let end = (offset + len).next_multiple_of(self.p.sector).min(self.virtual_size());
        let start = offset / self.p.sector * self.p.sector;
        let mut buf = Vec::new();
        self.for_blocks(start, end - start, |at, len| {
            let _guard = self.lock_block(at);
            let mut done = 0;
            while done < len {
                let extent = self.lookup(at + done, (len - done).min(COPY_CHUNK))?;
                if matches!(extent.source, Source::Below) {
                    buf.resize(extent.len as usize, 0);
                    below.read(Scatter::new(&mut buf), at + done)?;
                    self.write_absent(Gather::new(&buf), at + done, Below::new(&[]))?;
                }
                done += extent.len;
            }
            Ok(())
        })
    }

    /// Makes guest bytes zero. In a differencing disk zeros hide every ancestor: whole blocks take no space
    /// for that, parts of blocks do, unless everything below reads as zeros.
    pub(super) fn zero_guest(&self, offset: u64, len: u64, unmap: bool, below: Below<'_>) -> Result<()> {
        self.begin(true)?;
        self.for_blocks(offset, len, |at, len| {
            let mut guard = None;
            let mut done = 0;
            while done < len {
                let (from, extent) = (at + done, self.lookup(at + done, len - done)?);
                match extent.source {
                    Source::Data { offset: host, .. } => self.storage.zero(host, extent.len, unmap)?,
                    Source::Below => {
                        if guard.is_none() {
                            guard = Some(self.lock_block(at));
                            continue;
                        }
                        if below.is_empty() || !below.is_zero(from, extent.len)? {
                            self.zero_absent(from, extent.len, unmap, below)?;
                        }
                    }
                    _ => {}
                }
                done += extent.len;
            }
            Ok(())
        })
    }

    /// Zeros in sectors that the image does not hold. The caller has locked the block.
    fn zero_absent(&self, offset: u64, len: u64, unmap: bool, below: Below<'_>) -> Result<()> {
        let end = offset + len;
        let block = offset / self.p.block;
        let covers =
            offset.is_multiple_of(self.p.block) && (len == self.p.block || end == self.virtual_size());
        let entry = self.with_pages(|meta| meta.payload(&self.p, block))?;
        if covers && entry.state() == state::NOT_PRESENT {
            let mut meta = self.meta.write();
            let at = meta.payload_at(&self.p, block);
            return meta.pages.change(&self.storage, at, &Entry::new(state::ZERO, 0).0.to_le_bytes());
        }
        let zero = |at, len| self.fill(at, len, |host| self.storage.zero(host, len, unmap));
        zero_sectors(self.p.sector, offset, len, zero, |zeros, at| self.write_absent(zeros, at, below))
    }

    /// Gives the space of what the image holds back to the host, unless it is a fixed disk's.
    pub(super) fn discard_guest(&self, offset: u64, len: u64) -> Result<()> {
        if self.p.fixed {
            return Ok(());
        }
        self.begin(true)?;
        let mut done = 0;
        while done < len {
            let extent = self.lookup(offset + done, len - done)?;
            if let Source::Data { offset: host, .. } = extent.source {
                self.storage.discard(host, extent.len).map_err(|e| self.io("discard", e))?;
            }
            done += extent.len;
        }
        Ok(())
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
