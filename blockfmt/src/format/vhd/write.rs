//! Writes, zeroing and flush.

use super::Vhd;
use super::footer::SECTOR;
use super::meta::{Bits, UNUSED};
use crate::format::blocks::{Blocks, Geometry};
use crate::ranges::RangeLocks;
use crate::{Error, Extent, Result, Source, Storage};
use std::collections::BTreeSet;
use std::sync::Arc;

impl Blocks for Vhd {
    fn file(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn geometry(&self) -> Geometry {
        Geometry { block: self.p.block, sector: SECTOR, size: self.virtual_size() }
    }

    fn locks(&self) -> &RangeLocks {
        &self.ranges
    }

    fn lookup(&self, offset: u64, len: u64) -> Result<Extent> {
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

    fn shows_parent(&self, _offset: u64) -> Result<bool> {
        Ok(self.differencing())
    }

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

    fn begin(&self, _contents: bool) -> Result<()> {
        Ok(())
    }

    fn relieve(&self) -> Result<()> {
        let crowded = self.meta.read().crowded(self.p.bitmap as usize);
        if crowded { self.flush_all() } else { Ok(()) }
    }

    fn zero_block(&self, _offset: u64) -> Result<bool> {
        Ok(false)
    }
}

impl Vhd {
    /// Makes the sectors that blocks of a differencing disk lack present, as zeros: readers such as QEMU do not look at
    /// the bitmaps of dynamic disks, and what a crash left in such sectors would show. The parent has zeros there.
    pub(super) fn complete_blocks(&self) -> Result<()> {
        let blocks = self.meta.read().bat.len() as u32;
        let sectors = self.p.block / SECTOR;
        for block in 0..blocks {
            let _guard = self.ranges.lock(u64::from(block)..u64::from(block) + 1);
            let absent = self.with_block(block, |_, found| {
                let (payload, bits) = found?;
                let (mut absent, mut at) = (Vec::new(), 0);
                while at < sectors {
                    let (set, count) = bits.run(at, sectors - at);
                    if !set {
                        absent.push((at, count));
                    }
                    at += count;
                }
                Some((payload, absent))
            })?;
            let Some((payload, absent)) = absent.filter(|(_, absent)| !absent.is_empty()) else { continue };
            for (first, count) in absent {
                self.storage.zero(payload + first * SECTOR, count * SECTOR, true)?;
            }
            let mut meta = self.meta.write();
            meta.dirty.insert(block);
            meta.cache(block, Bits::Full, self.p.bitmap as usize);
            drop(meta);
            self.relieve()?;
        }
        self.flush_all()
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
        // Readers such as QEMU refuse a file that ends before its last block, as it would if a crash left the footer out.
        if !everything && written < start + span + SECTOR {
            self.storage.truncate(start + span + SECTOR)?;
        }
        meta.end = start + span;
        meta.footer_dirty = true;
        Ok((start, stale))
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
