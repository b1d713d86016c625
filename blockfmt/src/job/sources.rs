//! Several disks read as one.

use super::copy::whole;
use crate::{Disk, Error, Result, Source};

/// What the start of each disk is a multiple of: sectors are not shared.
const SECTOR: u64 = 512;

/// Disks, one behind the other. Zeros fill the last sector of each but the last.
pub(super) struct Sources<'a> {
    /// The first byte of each, and the disk.
    disks: Vec<(u64, &'a Disk)>,
    size: u64,
}

impl<'a> Sources<'a> {
    /// Fails if there is no disk, or if they are too large together.
    pub fn new(sources: &'a [Disk]) -> Result<Self> {
        if sources.is_empty() {
            return Err(Error::InvalidOption("There is nothing to copy".into()));
        }
        let mut disks = Vec::with_capacity(sources.len());
        let mut size: u64 = 0;
        for disk in sources {
            let start = size.next_multiple_of(SECTOR);
            disks.push((start, disk));
            size = start.checked_add(disk.size()).filter(|size| i64::try_from(*size).is_ok()).ok_or_else(
                || Error::InvalidOption("The sources are larger together than a disk can be".into()),
            )?;
        }
        Ok(Sources { disks, size })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The disk at `offset`, the offset in it, and how many of `len` bytes are there; no disk for the bytes between two.
    fn find(&self, offset: u64, len: u64) -> (Option<(&'a Disk, u64)>, u64) {
        let after = self.disks.partition_point(|(start, _)| *start <= offset);
        let next = self.disks.get(after).map_or(self.size, |(start, _)| *start);
        let (start, disk) = self.disks[after.saturating_sub(1)];
        match disk.size() {
            size if offset - start < size => (Some((disk, offset - start)), len.min(size - (offset - start))),
            _ => (None, len.min(next - offset)),
        }
    }

    /// The source of the bytes at `offset` and how many share it.
    pub fn map(&self, offset: u64, len: u64) -> Result<(Source, u64)> {
        match self.find(offset, len) {
            (Some((disk, at)), len) => whole(disk, at, len),
            (None, len) => Ok((Source::Zero { allocated: false }, len)),
        }
    }

    /// Reads all of `buf` from `offset`.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let (disk, len) = self.find(offset + done as u64, (buf.len() - done) as u64);
            let part = &mut buf[done..done + len as usize];
            match disk {
                Some((disk, at)) => disk.read_at(part, at)?,
                None => part.fill(0),
            }
            done += len as usize;
        }
        Ok(())
    }
}

/// The size in bytes that the target of [`concatenate`](super::concatenate) needs.
pub fn concatenated_size(sources: &[Disk]) -> Result<u64> {
    Ok(Sources::new(sources)?.size())
}
