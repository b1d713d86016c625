//! Writes, zeroing and flush.

use super::Vhd;
use super::footer::SECTOR;
use super::meta::{Bits, UNUSED};
use crate::format::zero_sectors;
use crate::{Below, Error, Extent, Gather, Result, Scatter, Source};
use std::collections::BTreeSet;

/// Unit in which parents are copied, in bytes.
const COPY_CHUNK: u64 = 1 << 20;

impl Vhd {
    /// Where bytes are, for at most the rest of their block.
    pub(super) fn lookup(&self, offset: u64, len: u64) -> Result<Extent> {
        let (block, within) = ((offset / self.p.block) as u32, offset % self.p.block);
        let len = len.min(self.p.block - within);
        let below = self.differencing();
        let absent = |allocated| if below { Source::Below } else { Source::Zero { allocated } };
        self.with_block(block, |_, found| {
            let Some((payload, bits)) = found else { return Extent { len, source: absent(false) } };
            let (first, last) = (within / SECTOR, (within + len - 1) / SECTOR);
            let (set, sectors) = bits.run(first, last - first + 1);
            let len = len.min((first + sectors) * SECTOR - within);
            let data = Source::Data { file: 0, offset: payload + within };
            Extent { len, source: if set { data } else { absent(true) } }
        })
    }

    /// Splits a range at the borders of blocks.
    fn for_blocks(&self, offset: u64, len: u64, mut f: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        let mut at = offset;
        while at < offset + len {
            let n = (self.p.block - at % self.p.block).min(offset + len - at);
            f(at, n)?;
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
        })?;
        self.flush_if_crowded()
    }

    /// Writes into sectors that the image does not hold. The caller has locked the block.
    fn write_absent(&self, src: Gather<'_>, offset: u64, below: Below<'_>) -> Result<()> {
        let end = offset + src.len() as u64;
        let (from, to) = (offset / SECTOR * SECTOR, end.next_multiple_of(SECTOR));
        // Sectors are complete in this file or not at all: the edges come from the parent.
        let mut head = vec![0; (offset - from) as usize];
        let mut tail = vec![0; (to - end) as usize];
        if self.differencing() {
            below.read(Scatter::new(&mut head), from)?;
            below.read(Scatter::new(&mut tail), end)?;
        }
        self.fill(from, to - from, |host| {
            src.with_edges(&head, &tail, |whole| {
                self.storage.writev(whole, host).map_err(|e| self.io("write", e))
            })
        })
    }

    /// Fills absent sectors of one block with `write`, which is told where they are in the file, and
    /// marks them as present. The caller has locked the block.
    fn fill(&self, from: u64, len: u64, write: impl FnOnce(u64) -> Result<()>) -> Result<()> {
        let (block, within) = ((from / self.p.block) as u32, from % self.p.block);
        let entry = self.meta.read().bat[block as usize];
        let sectors = (within / SECTOR, len / SECTOR);
        if let Some(payload) = self.payload_of(entry) {
            write(payload + within)?;
            let mut meta = self.meta.write();
            let meta = &mut *meta;
            // The bitmap is cached since `lookup`, unless it was evicted: then it is on disk.
            if let Some(bits) = meta.bits.get_mut(&block) {
                if bits.set(sectors.0, sectors.1) {
                    meta.dirty.insert(block);
                }
                return Ok(());
            }
            let mut bytes = vec![0; (self.p.block / SECTOR / 8) as usize];
            self.storage.read_at(&mut bytes, payload - self.p.bitmap)?;
            let mut bits = Bits::from_bytes(bytes);
            bits.set(sectors.0, sectors.1);
            meta.dirty.insert(block);
            meta.cache(block, bits, self.p.bitmap as usize);
            return Ok(());
        }
        let (start, stale) = self.reserve()?;
        let result = (|| {
            if stale > start {
                self.storage.zero(start, stale - start, true)?;
            }
            write(start + self.p.bitmap + within)
        })();
        let mut meta = self.meta.write();
        if let Err(error) = result {
            if meta.end == start + self.p.bitmap + self.p.block {
                // The last reservation goes back; what is there is stale now.
                meta.stale_end = meta.stale_end.max(meta.end);
                meta.end = start;
            }
            return Err(error);
        }
        let mut bits = Bits::Full;
        if self.differencing() {
            bits = Bits::Some(vec![0; (self.p.block / SECTOR / 8) as usize].into());
            bits.set(sectors.0, sectors.1);
        }
        meta.bat[block as usize] = (start / SECTOR) as u32;
        meta.pending.insert(block);
        meta.dirty.insert(block);
        meta.cache(block, bits, self.p.bitmap as usize);
        Ok(())
    }

    /// Reserves space for a block at the end of the file; returns its start and the end of stale bytes in it.
    fn reserve(&self) -> Result<(u64, u64)> {
        let span = self.p.bitmap + self.p.block;
        let mut meta = self.meta.write();
        let start = meta.end;
        if start / SECTOR >= u64::from(UNUSED) {
            return Err(Error::unsupported(&self.name, "a file of 2 TiB"));
        }
        let written = self.storage.length()?;
        let everything = !self.storage.zero_beyond_end();
        let stale = if everything { start + span } else { meta.stale_end.max(written).min(start + span) };
        meta.end = start + span;
        meta.footer_dirty = true;
        Ok((start, stale))
    }

    /// Copies what the image does not hold from `below`.
    pub(super) fn populate_guest(&self, offset: u64, len: u64, below: Below<'_>) -> Result<()> {
        let end = (offset + len).next_multiple_of(SECTOR).min(self.virtual_size());
        let start = offset / SECTOR * SECTOR;
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
        })?;
        self.flush_if_crowded()
    }

    /// Makes guest bytes zero. In a differencing disk zeros hide every ancestor, so they are allocated
    /// unless everything below reads as zeros.
    pub(super) fn zero_guest(&self, offset: u64, len: u64, unmap: bool, below: Below<'_>) -> Result<()> {
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
        })?;
        self.flush_if_crowded()
    }

    /// Zeros in sectors that the image does not hold. The caller has locked the block.
    fn zero_absent(&self, offset: u64, len: u64, unmap: bool, below: Below<'_>) -> Result<()> {
        let zero = |at, len| self.fill(at, len, |host| self.storage.zero(host, len, unmap));
        zero_sectors(SECTOR, offset, len, zero, |zeros, at| self.write_absent(zeros, at, below))
    }

    /// Gives the space of what the image holds back to the host.
    pub(super) fn discard_guest(&self, offset: u64, len: u64) -> Result<()> {
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

    fn flush_if_crowded(&self) -> Result<()> {
        let crowded = self.meta.read().crowded(self.p.bitmap as usize);
        if crowded { self.flush_all() } else { Ok(()) }
    }

    /// Brings everything to disk in the order that a crash cannot hurt.
    pub(super) fn flush_all(&self) -> Result<()> {
        let _flushing = self.flushing.lock();
        let bitmap_bytes = (self.p.block / SECTOR / 8) as usize;
        // What is published by now was written by now.
        let (fresh, changed, footer) = {
            let mut meta = self.meta.write();
            let dirty = std::mem::take(&mut meta.dirty);
            let (mut fresh, mut changed) = (Vec::new(), Vec::new());
            for block in dirty {
                let bits = meta.bits.get(&block).map(|b| b.to_bytes(bitmap_bytes));
                let Some(bits) = bits else { continue };
                let at = u64::from(meta.bat[block as usize]) * SECTOR;
                let list = if meta.pending.contains(&block) { &mut fresh } else { &mut changed };
                list.push((block, at, bits));
            }
            (fresh, changed, std::mem::take(&mut meta.footer_dirty))
        };
        let result = self.write_back(&fresh, &changed, footer);
        if result.is_err() {
            let mut meta = self.meta.write();
            let blocks = fresh.iter().chain(&changed).map(|(block, ..)| *block);
            meta.dirty.extend(blocks);
            meta.pending.extend(fresh.iter().map(|(block, ..)| *block));
            meta.footer_dirty |= footer;
        }
        result
    }

    fn write_back(
        &self,
        fresh: &[(u32, u64, Vec<u8>)],
        changed: &[(u32, u64, Vec<u8>)],
        footer: bool,
    ) -> Result<()> {
        // Nothing refers to new blocks yet, so their bitmaps need not wait for their payload.
        for (_, at, bits) in fresh {
            self.storage.write_at(bits, *at)?;
        }
        self.storage.sync()?;
        if fresh.is_empty() && changed.is_empty() && !footer {
            return Ok(());
        }
        for (_, at, bits) in changed {
            self.storage.write_at(bits, *at)?;
        }
        let table = self.headers.lock().header.as_ref().map_or(0, |h| h.table_offset());
        let sectors: BTreeSet<u32> = fresh.iter().map(|(b, ..)| b / 128 * 128).collect();
        {
            let mut meta = self.meta.write();
            for (block, ..) in fresh {
                meta.pending.remove(block);
            }
        }
        for block in sectors {
            let (at, bytes) = self.meta.read().table_sector(block);
            self.storage.write_at(&bytes, table + at)?;
        }
        if footer {
            let end = self.meta.read().end;
            let bytes = *self.headers.lock().footer.bytes();
            self.storage.write_at(&bytes, end)?;
        }
        self.storage.sync()
    }
}
