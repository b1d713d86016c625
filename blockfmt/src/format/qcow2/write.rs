//! Writes.

use super::map::{COMPRESSED, Kind, ZERO};
use super::refcount::Run;
use super::tables::{COPIED, OFFSET_MASK};
use super::{Qcow2, RESERVATIONS};
use crate::{Below, Gather, Result, Scatter, Stored};
use std::sync::atomic::Ordering;

/// Clusters reserved at a time, in bytes.
const RESERVE_BYTES: u64 = 2 << 20;
/// Most that one allocating step covers, in bytes.
const MAX_STEP_BYTES: u64 = 4 << 20;
/// Bytes of another storage that are moved through memory at a time.
const PIECE: u64 = 1 << 20;
/// From this number of bytes on, copying around a write is better left to the host's file system, unless others write new
/// clusters, too: it keeps them out of the file meanwhile.
const COPY_BYTES: u64 = 32 << 10;
const ALL_UNITS: u64 = 0xffff_ffff;

/// Clusters that are counted as used already and wait for a writer.
#[derive(Debug, Default)]
pub(super) struct Reservation {
    next: u64,
    end: u64,
    fresh: bool,
}

/// Bytes that a write puts into the image.
#[derive(Clone, Copy)]
pub(super) enum Payload<'a> {
    Memory(Gather<'a>),
    Stored(Stored<'a>),
}

impl Payload<'_> {
    fn len(&self) -> usize {
        match self {
            Payload::Memory(bytes) => bytes.len(),
            Payload::Stored(bytes) => bytes.len as usize,
        }
    }

    fn slice(&self, offset: usize, len: usize) -> Self {
        match self {
            Payload::Memory(bytes) => Payload::Memory(bytes.slice(offset, len)),
            Payload::Stored(bytes) => Payload::Stored(bytes.slice(offset as u64, len as u64)),
        }
    }
}

/// What an allocating step found at its place.
struct Step<'a> {
    slice: u64,
    index: usize,
    /// Old entries of the clusters that the step covers.
    old: &'a [(u64, u64)],
    run: Run,
    /// Whether nobody else changed mappings of the image when it began.
    alone: bool,
    /// Whether the host clusters belonged to the guest clusters already.
    reused: bool,
    /// The guest bytes that are written, with what is copied around them.
    from: u64,
    to: u64,
}

impl Qcow2 {
    /// Writes guest bytes. The caller is inside the gate.
    pub(super) fn write_guest(&self, src: Payload<'_>, offset: u64, below: Below<'_>) -> Result<()> {
        let mut done = 0;
        while done < src.len() {
            let (at, left) = (offset + done as u64, src.len() - done);
            let (kind, len) = self.lookup(at, left as u64)?;
            done += match kind {
                Kind::Data { host, copied: true } => {
                    self.put(src.slice(done, len as usize), host)?;
                    len as usize
                }
                _ => self.write_new(Some(src.slice(done, left)), at, left as u64, below)?,
            };
        }
        Ok(())
    }

    /// Copies what the image does not hold from `below`. The caller is inside the gate.
    pub(super) fn populate_guest(&self, offset: u64, len: u64, below: Below<'_>) -> Result<()> {
        let mut done = 0;
        while done < len {
            let (kind, n) = self.lookup(offset + done, (len - done).min(MAX_STEP_BYTES))?;
            done += match kind {
                Kind::Below => self.write_new(None, offset + done, n, below)? as u64,
                _ => n,
            };
        }
        Ok(())
    }

    /// Writes to the start of a range that needs its mapping changed; returns the number of bytes.
    /// Without `src`, bytes that the image does not hold come from `below`, and others stay as they are.
    fn write_new(
        &self,
        src: Option<Payload<'_>>,
        offset: u64,
        mut len: u64,
        below: Below<'_>,
    ) -> Result<usize> {
        let p = &self.p;
        let first = offset >> p.cluster_bits;
        let (slice, index) = self.slice_of(first);
        let mut last = ((offset + len - 1) >> p.cluster_bits)
            .min(first - index as u64 + p.slice_entries - 1)
            .min(first + (MAX_STEP_BYTES >> p.cluster_bits).max(1) - 1);
        let range = self.ranges.lock(first..last + 1);
        let mut copy = None;
        if src.is_none() {
            let (kind, same) = self.lookup(offset, len)?;
            if kind != Kind::Below {
                return Ok(same as usize);
            }
            len = same;
            last = last.min((offset + len - 1) >> p.cluster_bits);
            let bytes = copy.insert(self.buffers.take(len as usize));
            below.read(Scatter::new(bytes), offset)?;
        }
        self.ensure_table(first)?;
        // Most requests need no memory for this.
        let (mut one, mut several);
        let old: &mut [(u64, u64)] = match last == first {
            true => {
                one = [self.entry_of(slice, index)?];
                &mut one
            }
            false => {
                several = self.entries(slice, index, (last - first + 1) as usize)?;
                &mut several
            }
        };
        let unit = (offset & (p.cluster - 1)) >> p.unit_bits;
        match self.decode(old[0].0, old[0].1, unit) {
            Kind::Data { copied: true, .. } => return Ok(0), // allocated while we waited
            Kind::Invalid => return Err(self.corrupt("an L2 entry is invalid")),
            _ => {}
        }
        let mut end = offset + len;
        let reused = self.reusable(old[0].0);
        let run = if reused {
            // Other units of this cluster may be written in place right now: touch only those of one kind.
            end = end.min(offset + self.lookup(offset, len)?.1);
            Run { start: (old[0].0 & OFFSET_MASK) >> p.cluster_bits, count: 1, fresh: false }
        } else {
            let fits = old.iter().take_while(|(entry, _)| !self.reusable(*entry)).count() as u64;
            match self.data.is_some() {
                true => Run { start: first, count: fits, fresh: false },
                false => self.take_clusters(fits)?,
            }
        };
        let old = &old[..run.count as usize];
        end = end.min((first + run.count) << p.cluster_bits);

        // Units that are covered in part are completed from the old contents. A cluster that leaves an old
        // host cluster takes everything along.
        let unit_of = |(entry, _): &(u64, u64)| match !reused && entry & (OFFSET_MASK | COMPRESSED) != 0 {
            true => p.cluster,
            false => 1 << p.unit_bits,
        };
        let from = offset & !(unit_of(&old[0]) - 1);
        let to = end.next_multiple_of(unit_of(&old[old.len() - 1]));
        let step = Step { slice, index, old, run, alone: range.alone(), reused, from, to };
        let copy = copy.as_deref().unwrap_or_default();
        let src = src.unwrap_or(Payload::Memory(Gather::new(copy))).slice(0, (end - offset) as usize);
        match self.write_payload(&step, src, offset, below).and_then(|()| self.publish(&step, first)) {
            Ok(()) => Ok(src.len()),
            Err(error) => {
                if !reused && self.data.is_none() {
                    self.give_back(run);
                }
                Err(error)
            }
        }
    }

    fn write_payload(&self, step: &Step<'_>, src: Payload<'_>, offset: u64, below: Below<'_>) -> Result<()> {
        let p = &self.p;
        let base = (offset >> p.cluster_bits) << p.cluster_bits;
        let host = |guest: u64| (step.run.start << p.cluster_bits) + (guest - base);
        let write = |src: Payload<'_>, guest| self.put(src, host(guest));
        let zero_before = |(entry, _): &(u64, u64)| {
            entry & (OFFSET_MASK | COMPRESSED) == 0
                && (below.is_empty() || (!p.extended && entry & ZERO != 0))
        };
        if step.run.fresh && self.plain.is_none() && step.old.iter().all(zero_before) {
            // The new clusters hold zeros and the guest saw zeros: whatever part of this write survives a
            // crash, the guest sees old or new bytes. No barrier is needed.
            return write(src, offset);
        }
        let end = offset + src.len() as u64;
        let (before, after) = (offset - step.from, step.to - end);
        if before + after == 0
            || (step.alone
                && before + after >= COPY_BYTES
                && self.copy_below(step.from, before, host(step.from), below)?
                && self.copy_below(end, after, host(end), below)?)
        {
            write(src, offset)?;
        } else {
            let mut edges = self.buffers.take((before + after) as usize);
            let (head, tail) = edges.split_at_mut(before as usize);
            self.read_guest(Scatter::new(head), step.from, below)?;
            self.read_guest(Scatter::new(tail), end, below)?;
            match src {
                Payload::Memory(src) => {
                    src.with_edges(head, tail, |all| write(Payload::Memory(all), step.from))?;
                }
                Payload::Stored(_) => {
                    write(Payload::Memory(Gather::new(head)), step.from)?;
                    write(Payload::Memory(Gather::new(tail)), end)?;
                    write(src, offset)?;
                }
            }
        }
        // Not any earlier: a write-back that is under way would take the mark and miss the payload.
        self.barrier.store(true, Ordering::Release);
        Ok(())
    }

    /// Copies a range to its place in the file, if the image does not hold it and the file system can do that.
    fn copy_below(&self, guest: u64, len: u64, host: u64, below: Below<'_>) -> Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        match self.lookup(guest, len)? {
            (Kind::Below, n) if n == len => below.copy_to(guest, len, &**self.payload(), host),
            _ => Ok(false),
        }
    }

    /// Writes payload to its place in the file.
    fn put(&self, src: Payload<'_>, host: u64) -> Result<()> {
        let file = self.payload();
        let write = |bytes: Gather<'_>, host| file.writev(bytes, host).map_err(|e| self.io("write", e));
        let src = match src {
            Payload::Memory(bytes) => return write(bytes, host),
            Payload::Stored(src) => src,
        };
        let mut done = file.copy_from(&**src.storage, src.offset, host, src.len);
        while done < src.len {
            let mut piece = self.buffers.take((src.len - done).min(PIECE) as usize);
            src.storage.read_at(&mut piece, src.offset + done)?;
            write(Gather::new(&piece), host + done)?;
            done += piece.len() as u64;
        }
        Ok(())
    }

    /// Points the guest clusters of a step to their new host clusters and lets go of the old ones.
    fn publish(&self, step: &Step<'_>, first: u64) -> Result<()> {
        let p = &self.p;
        self.with_slice(step.slice, |slice| {
            for (i, (entry, bitmap)) in step.old.iter().enumerate() {
                let start = (first + i as u64) << p.cluster_bits;
                let units = |guest: u64| (guest.clamp(start, start + p.cluster) - start) >> p.unit_bits;
                let (from, to) = (units(step.from), units(step.to));
                let touched = (ALL_UNITS >> (32 - (to - from).min(32))) << from;
                let bitmap = match p.extended && entry & COMPRESSED == 0 {
                    true => (bitmap | touched) & !(touched << 32),
                    false => touched,
                };
                let host = (step.run.start + i as u64) << p.cluster_bits;
                slice.set(step.index + i, host | COPIED, bitmap);
            }
        })?;
        if !step.reused {
            step.old.iter().for_each(|(entry, _)| self.unlink_entry(*entry));
        }
        Ok(())
    }

    /// Lets go of the host clusters of an entry that is no longer in the table.
    pub(super) fn unlink_entry(&self, entry: u64) {
        if self.data.is_some() {
            return;
        }
        if entry & COMPRESSED != 0 {
            let (start, end) = self.compressed_range(entry);
            for cluster in start >> self.p.cluster_bits..=(end - 1) >> self.p.cluster_bits {
                self.unlink(cluster, 1);
            }
        } else if entry & OFFSET_MASK != 0 {
            self.unlink((entry & OFFSET_MASK) >> self.p.cluster_bits, 1);
        }
    }

    /// Whether an entry owns a host cluster that can be written.
    pub(super) fn reusable(&self, entry: u64) -> bool {
        entry & COMPRESSED == 0 && entry & COPIED != 0 && (entry & OFFSET_MASK != 0 || self.data.is_some())
    }

    /// A copy of an entry of a slice.
    pub(super) fn entry_of(&self, slice: u64, index: usize) -> Result<(u64, u64)> {
        self.read_slice(slice, |words| self.entry(words, index))
    }

    /// Copies of `count` entries of a slice.
    pub(super) fn entries(&self, slice: u64, index: usize, count: usize) -> Result<Vec<(u64, u64)>> {
        self.read_slice(slice, |words| (index..index + count).map(|i| self.entry(words, i)).collect())
    }

    /// Takes up to `want` contiguous clusters for payload.
    pub(super) fn take_clusters(&self, want: u64) -> Result<Run> {
        let mut reservation = self.reservations[crate::gate::shard() % RESERVATIONS].lock();
        if reservation.next == reservation.end {
            let amount = want.max(RESERVE_BYTES >> self.p.cluster_bits).max(1);
            let run = self.refcounts.lock().allocate(amount, false)?;
            *reservation = Reservation { next: run.start, end: run.start + run.count, fresh: run.fresh };
        }
        let count = want.min(reservation.end - reservation.next);
        let run = Run { start: reservation.next, count, fresh: reservation.fresh };
        reservation.next += count;
        Ok(run)
    }

    /// Releases clusters that were never linked.
    pub(super) fn give_back(&self, run: Run) {
        let mut refcounts = self.refcounts.lock();
        for cluster in run.start..run.start + run.count {
            if let Err(error) = refcounts.add(cluster, -1) {
                tracing::warn!(%error, cluster, "A cluster leaks");
            }
        }
    }

    /// Releases all reservations.
    pub(super) fn drop_reservations(&self) {
        for reservation in &self.reservations {
            let Reservation { next, end, fresh } = std::mem::take(&mut *reservation.lock());
            self.give_back(Run { start: next, count: end - next, fresh });
        }
    }
}
