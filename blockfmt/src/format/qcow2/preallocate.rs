//! Allocation in advance.

use super::Qcow2;
use super::map::COMPRESSED;
use super::tables::{COPIED, OFFSET_MASK};
use crate::disk::Preallocation;
use crate::format::raw::write_zero_bytes;
use crate::{Error, Result};
use std::sync::atomic::Ordering;

const ALL_DATA: u64 = 0xffff_ffff;

impl Qcow2 {
    /// Maps every guest cluster from `from` on that has no place yet to a host cluster of zeros. Of a new image
    /// (`from` is 0) that has a parent, the subclusters still show that.
    pub(super) fn preallocate_from(&self, from: u64, how: Preallocation) -> Result<()> {
        if how == Preallocation::Off {
            return Ok(());
        }
        let p = &self.p;
        let child = self.header.lock().backing.is_some();
        let units = if child && from == 0 { 0 } else { ALL_DATA };
        let end = self.virtual_size().div_ceil(p.cluster);
        // The cluster in which an old disk ended may show its parent.
        let mut first = if child { from.div_ceil(p.cluster) } else { from / p.cluster };
        while first < end {
            let (slice, index) = self.slice_of(first);
            let most = (p.slice_entries - index as u64).min(end - first);
            let _range = self.ranges.lock(first..first + most);
            let placed = |(entry, _): &(u64, u64)| entry & (OFFSET_MASK | COMPRESSED | COPIED) != 0;
            let entries = self.entries(slice, index, most as usize)?;
            let want = entries.iter().position(placed).unwrap_or(entries.len()) as u64;
            if want == 0 {
                first += 1;
                continue;
            }
            self.ensure_table(first)?;
            let (start, count, fresh) = match self.data.is_some() {
                // A file that was longer before holds anything there.
                true => (first, want, from == 0),
                false => {
                    let run = self.refcounts.lock().allocate(want, false)?;
                    (run.start, run.count, run.fresh)
                }
            };
            let filled = self.fill(start << p.cluster_bits, count << p.cluster_bits, how, fresh);
            if let Err(error) = filled {
                if self.data.is_none() {
                    self.unlink(start, count);
                }
                return Err(error);
            }
            self.barrier.store(true, Ordering::Release);
            self.with_slice(slice, |s| {
                for i in 0..count {
                    s.set(index + i as usize, (start + i) << p.cluster_bits | COPIED, units);
                }
            })?;
            first += count;
        }
        Ok(())
    }

    /// Makes a range of the file zeros; `fresh` if it is that already, or will be once the file is long enough.
    fn fill(&self, offset: u64, len: u64, how: Preallocation, fresh: bool) -> Result<()> {
        let storage = self.payload();
        match how {
            Preallocation::Full => return write_zero_bytes(storage, offset, len),
            _ if !fresh => storage.zero(offset, len, how == Preallocation::Metadata)?,
            Preallocation::Falloc => {
                storage.allocate(offset, len).map_err(|e| Error::io("allocate", storage.name(), e))?;
            }
            Preallocation::Metadata | Preallocation::Off => {}
        }
        match storage.length()? < offset + len {
            true => storage.truncate(offset + len),
            false => Ok(()),
        }
    }
}
