//! What VHD and VHDX share: payload lies in blocks that never move while the image is open, and each sector of a block
//! is complete in the image or absent.

use crate::ranges::{RangeGuard, RangeLocks};
use crate::{Below, Error, Extent, Gather, Result, Scatter, Source, Storage};
use std::sync::Arc;

/// Unit in which parents are copied, in bytes.
const COPY_CHUNK: u64 = 1 << 20;

/// Largest sector, in bytes.
const MAX_SECTOR: usize = 4096;

/// The sizes of an image, in bytes.
#[derive(Clone, Copy)]
pub(super) struct Geometry {
    pub block: u64,
    pub sector: u64,
    /// What the guest sees.
    pub size: u64,
}

/// An image of such a format. Of what is written, the payload is on its way to the file when a call returns; the
/// metadata may still be in memory.
pub(super) trait Blocks {
    fn file(&self) -> &Arc<dyn Storage>;

    fn geometry(&self) -> Geometry;

    /// Held while sectors of a block become present.
    fn locks(&self) -> &RangeLocks;

    /// Where bytes are, for at most the rest of their block.
    fn lookup(&self, offset: u64, len: u64) -> Result<Extent>;

    /// Whether absent sectors of the block at `offset` show the parent's.
    fn shows_parent(&self, offset: u64) -> Result<bool>;

    /// Fills absent sectors of one block with `write`, which is told where they are in the file, and marks them as
    /// present. The caller has locked the block.
    fn fill(&self, from: u64, len: u64, write: impl FnOnce(u64) -> Result<()>) -> Result<()>;

    /// Before the first change; `contents` says whether the guest will see it.
    fn begin(&self, contents: bool) -> Result<()>;

    /// After each block: brings metadata to disk if much of it waits in memory.
    fn relieve(&self) -> Result<()>;

    /// Makes the whole block at `offset` zero without giving it space, where the format can say so.
    fn zero_block(&self, offset: u64) -> Result<bool>;

    /// Splits a range at the borders of blocks.
    fn for_blocks(&self, offset: u64, len: u64, mut f: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        let block = self.geometry().block;
        let mut at = offset;
        while at < offset + len {
            let n = (block - at % block).min(offset + len - at);
            f(at, n)?;
            self.relieve()?;
            at += n;
        }
        Ok(())
    }

    fn lock_block(&self, offset: u64) -> RangeGuard<'_> {
        let block = offset / self.geometry().block;
        self.locks().lock(block..block + 1)
    }

    fn write_at_host(&self, src: Gather<'_>, host: u64) -> Result<()> {
        self.file().writev(src, host).map_err(|e| Error::io("write", self.file().name(), e))
    }

    /// Writes guest bytes.
    fn write_guest(&self, src: Gather<'_>, offset: u64, below: Below<'_>) -> Result<()> {
        self.begin(true)?;
        self.for_blocks(offset, src.len() as u64, |at, len| {
            let part = src.slice((at - offset) as usize, len as usize);
            let mut done = 0;
            let mut guard = None;
            while done < len {
                let extent = self.lookup(at + done, len - done)?;
                let piece = part.slice(done as usize, extent.len as usize);
                match extent.source {
                    Source::Data { offset: host, .. } => self.write_at_host(piece, host)?,
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
        let sector = self.geometry().sector;
        let end = offset + src.len() as u64;
        let (from, to) = (offset / sector * sector, end.next_multiple_of(sector));
        // The edges of the sectors come from the parent.
        let mut head = vec![0; (offset - from) as usize];
        let mut tail = vec![0; (to - end) as usize];
        if self.shows_parent(offset)? {
            below.read(Scatter::new(&mut head), from)?;
            below.read(Scatter::new(&mut tail), end)?;
        }
        self.fill(from, to - from, |host| {
            src.with_edges(&head, &tail, |whole| self.write_at_host(whole, host))
        })
    }

    /// Copies what the image does not hold from `below`.
    fn populate_guest(&self, offset: u64, len: u64, below: Below<'_>) -> Result<()> {
        self.begin(false)?;
        let Geometry { sector, size, .. } = self.geometry();
        let end = (offset + len).next_multiple_of(sector).min(size);
        let start = offset / sector * sector;
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

    /// Makes guest bytes zero. In a differencing disk zeros hide every ancestor, so they are allocated unless
    /// everything below reads as zeros or the format has a mark for blocks of zeros.
    fn zero_guest(&self, offset: u64, len: u64, unmap: bool, below: Below<'_>) -> Result<()> {
        self.begin(true)?;
        self.for_blocks(offset, len, |at, len| {
            let mut guard = None;
            let mut done = 0;
            while done < len {
                let (from, extent) = (at + done, self.lookup(at + done, len - done)?);
                match extent.source {
                    Source::Data { offset: host, .. } => self.file().zero(host, extent.len, unmap)?,
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
        let Geometry { block, sector, size } = self.geometry();
        let whole = offset.is_multiple_of(block) && (len == block || offset + len == size);
        if whole && self.zero_block(offset)? {
            return Ok(());
        }
        let end = offset + len;
        let (start, stop) = (offset.next_multiple_of(sector).min(end), end / sector * sector);
        let edges = if start < stop {
            self.fill(start, stop - start, |host| self.file().zero(host, stop - start, unmap))?;
            [(offset, start), (stop, end)]
        } else {
            [(offset, start), (start, end)] // at most two sectors, both in part
        };
        for (from, to) in edges.into_iter().filter(|(from, to)| from < to) {
            self.write_absent(Gather::new(&[0; MAX_SECTOR][..(to - from) as usize]), from, below)?;
        }
        Ok(())
    }

    /// Gives the space of what the image holds back to the host.
    fn discard_guest(&self, offset: u64, len: u64) -> Result<()> {
        self.begin(true)?;
        let mut done = 0;
        while done < len {
            let extent = self.lookup(offset + done, len - done)?;
            if let Source::Data { offset: host, .. } = extent.source {
                let file = self.file();
                file.discard(host, extent.len).map_err(|e| Error::io("discard", file.name(), e))?;
            }
            done += extent.len;
        }
        Ok(())
    }
}
