//! Zeroing and discarding.

use super::Qcow2;
use super::map::{COMPRESSED, Kind, ZERO};
use super::tables::{COPIED, OFFSET_MASK};
use super::write::Payload;
use crate::{Below, Gather, Result};

const ZERO_CHUNK: u64 = 1 << 20;
const ALL_ZERO: u64 = 0xffff_ffff << 32;
const ALL_DATA: u64 = 0xffff_ffff;

impl Qcow2 {
    /// Makes guest bytes zero. The caller is inside the gate.
    pub(super) fn zero_guest(&self, offset: u64, len: u64, unmap: bool, below: Below<'_>) -> Result<()> {
        let cluster = self.p.cluster;
        let end = offset + len;
        let start = offset.next_multiple_of(cluster);
        // The last cluster counts as whole if the disk ends in it.
        let stop =
            if end == self.virtual_size() { end.next_multiple_of(cluster) } else { end / cluster * cluster };
        let part =
            |from, to| self.zero_part(from, to, unmap, below, |at, len| self.zero_bytes(at, len, below));
        if start >= stop {
            return part(offset, end);
        }
        part(offset, start)?;
        self.zero_clusters(start / cluster, stop / cluster, unmap, below)?;
        part(stop.min(end), end)
    }

    /// Discards guest bytes. The caller is inside the gate.
    pub(super) fn discard_guest(&self, offset: u64, len: u64, below: Below<'_>) -> Result<()> {
        let cluster = self.p.cluster;
        let end = offset + len;
        let stop =
            if end == self.virtual_size() { end.next_multiple_of(cluster) } else { end / cluster * cluster };
        let (first, last) = (offset.div_ceil(cluster), stop / cluster);
        // Version 2 cannot hide what lies below.
        if self.p.version < 3 && !self.nothing_below(below) {
            return Ok(());
        }
        let part = |from, to| self.zero_part(from, to, true, below, |_, _| Ok(()));
        if first >= last {
            return part(offset, end);
        }
        part(offset, first * cluster)?;
        self.zero_clusters(first, last, true, below)?;
        part(stop.min(end), end)
    }

    /// Zeroes what covers no cluster as a whole: the subclusters in it, if there are any, and by `rest` what is left.
    fn zero_part(
        &self,
        mut at: u64,
        end: u64,
        unmap: bool,
        below: Below<'_>,
        rest: impl Fn(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let (p, unit) = (&self.p, 1 << self.p.unit_bits);
        if !p.extended || self.data.is_some() {
            return rest(at, end - at);
        }
        while at < end {
            let next = end.min((at / p.cluster + 1) * p.cluster);
            let start = at.next_multiple_of(unit);
            let stop =
                if next == self.virtual_size() { next.next_multiple_of(unit) } else { next / unit * unit };
            if start < stop && self.zero_units(start, stop, unmap, below)? {
                rest(at, start - at)?;
                rest(stop.min(next), next - stop.min(next))?;
            } else {
                rest(at, next - at)?;
            }
            at = next;
        }
        Ok(())
    }

    /// Makes subclusters of one cluster zero, unless it is compressed; tells whether that was done.
    fn zero_units(&self, start: u64, stop: u64, unmap: bool, below: Below<'_>) -> Result<bool> {
        let p = &self.p;
        let cluster = start >> p.cluster_bits;
        let base = cluster << p.cluster_bits;
        let (first, count) = ((start - base) >> p.unit_bits, (stop - start) >> p.unit_bits);
        let units = (ALL_DATA >> (32 - count)) << first;
        let (slice, index) = self.slice_of(cluster);
        let _range = self.ranges.lock(cluster..cluster + 1);
        let (entry, bitmap) = self.entry_of(slice, index)?;
        if entry & COMPRESSED != 0 {
            return Ok(false);
        }
        let zeroed = (bitmap | units << 32) & !units;
        if zeroed == bitmap || (bitmap & units == 0 && self.nothing_below(below)) {
            return Ok(true);
        }
        self.ensure_table(cluster)?;
        let release = unmap && zeroed & ALL_DATA == 0;
        self.with_slice(slice, |s| s.set(index, if release { 0 } else { entry }, zeroed))?;
        if release {
            self.unlink_entry(entry);
        } else if unmap && bitmap & units != 0 && self.reusable(entry) && self.plain.is_none() {
            // Whatever part of this survives a crash, the guest sees old bytes or zeros.
            let (offset, len) = ((entry & OFFSET_MASK) + (start - base), stop - start);
            if let Err(error) = self.storage.discard(offset, len) {
                tracing::debug!(%error, offset, len, "Cannot release the space of zeroed subclusters");
            }
        }
        Ok(true)
    }

    /// Whether unmapped guest clusters read as zeros, now and whenever the image is opened.
    fn nothing_below(&self, below: Below<'_>) -> bool {
        below.is_empty() && self.header.lock().backing.is_none()
    }

    /// Writes zeros where the guest does not see zeros yet.
    fn zero_bytes(&self, offset: u64, len: u64, below: Below<'_>) -> Result<()> {
        let mut zeros = Vec::new();
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let (kind, n) = self.lookup(at, (len - done).min(ZERO_CHUNK))?;
            let zero = match kind {
                Kind::Zero { .. } => true,
                Kind::Below => below.is_zero(at, n)?,
                _ => false,
            };
            if !zero {
                zeros.resize(zeros.len().max(n as usize), 0);
                self.write_guest(Payload::Memory(Gather::new(&zeros[..n as usize])), at, below)?;
            }
            done += n;
        }
        Ok(())
    }

    /// Makes whole clusters zero.
    fn zero_clusters(&self, mut first: u64, end: u64, unmap: bool, below: Below<'_>) -> Result<()> {
        let p = &self.p;
        let blank = self.nothing_below(below);
        if self.data.is_some() || (p.version < 3 && !(unmap && blank)) {
            let bytes = (end << p.cluster_bits).min(self.virtual_size()) - (first << p.cluster_bits);
            return match self.data.is_some() {
                true => self.zero_data_file(first, end),
                false => self.zero_bytes(first << p.cluster_bits, bytes, below),
            };
        }
        while first < end {
            if blank && self.l1.get(self.l1_index(first)) == 0 {
                first = ((self.l1_index(first) as u64 + 1) << p.l2_bits).min(end);
                continue;
            }
            let (slice, index) = self.slice_of(first);
            let count = (p.slice_entries - index as u64).min(end - first);
            let _range = self.ranges.lock(first..first + count);
            let old = self.entries(slice, index, count as usize)?;
            let new: Vec<_> = old.iter().map(|(entry, _)| self.zeroed(*entry, unmap, blank)).collect();
            if old != new {
                self.ensure_table(first)?;
                self.with_slice(slice, |s| {
                    for (i, (entry, bitmap)) in new.iter().enumerate() {
                        if old[i] != new[i] {
                            s.set(index + i, *entry, *bitmap);
                        }
                    }
                })?;
                for (old, new) in old.iter().zip(&new) {
                    if old.0 & (OFFSET_MASK | COMPRESSED) != new.0 & (OFFSET_MASK | COMPRESSED) {
                        self.unlink_entry(old.0);
                    }
                }
            }
            first += count;
        }
        Ok(())
    }

    /// What an entry becomes when its cluster is zeroed.
    fn zeroed(&self, entry: u64, unmap: bool, blank: bool) -> (u64, u64) {
        let nothing = entry & (OFFSET_MASK | COMPRESSED) == 0;
        if blank && (unmap || nothing) {
            return (0, 0);
        }
        let keep = if !unmap && self.reusable(entry) { entry & (OFFSET_MASK | COPIED) } else { 0 };
        match self.p.extended {
            true => (keep, ALL_ZERO),
            false => (keep | ZERO, 0),
        }
    }

    /// Zeros clusters of an external data file; they stay mapped, so that a raw one is complete.
    fn zero_data_file(&self, mut first: u64, end: u64) -> Result<()> {
        let p = &self.p;
        while first < end {
            let (slice, index) = self.slice_of(first);
            let count = (p.slice_entries - index as u64).min(end - first);
            let _range = self.ranges.lock(first..first + count);
            self.ensure_table(first)?;
            let offset = first << p.cluster_bits;
            let bytes =
                (count << p.cluster_bits).min(self.virtual_size().next_multiple_of(p.cluster) - offset);
            self.payload().zero(offset, bytes, true)?;
            self.barrier.store(true, std::sync::atomic::Ordering::Release);
            self.with_slice(slice, |s| {
                for i in 0..count {
                    s.set(index + i as usize, (first + i) << p.cluster_bits | COPIED, ALL_DATA);
                }
            })?;
            first += count;
        }
        Ok(())
    }
}
