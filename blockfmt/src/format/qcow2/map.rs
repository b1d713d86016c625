//! From guest to host addresses.

use super::Qcow2;
use super::tables::{COPIED, OFFSET_MASK};
use crate::{Below, Extent, Result, Scatter, Source};
use std::sync::atomic::{AtomicU64, Ordering};

pub(super) const COMPRESSED: u64 = 1 << 62;
pub(super) const ZERO: u64 = 1;

/// What an L2 entry says about a unit (a cluster, or a subcluster in images with extended entries).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Not in this image.
    Below,
    /// Zeros; `allocated` if the entry owns a host cluster nevertheless.
    Zero { allocated: bool },
    /// At this host offset; `copied` if no one else refers to the cluster.
    Data { host: u64, copied: bool },
    /// Compressed, as the entry says.
    Compressed { entry: u64 },
    /// Against the specification.
    Invalid,
}

/// How many subclusters from number `unit` on have the same bits in the bitmap of their cluster.
fn units_alike(bitmap: u64, unit: u64) -> u64 {
    let (data, zero) = (bitmap as u32, (bitmap >> 32) as u32);
    let like = |bits: u32| if bits >> unit & 1 != 0 { bits } else { !bits };
    u64::from(((like(data) & like(zero)) >> unit).trailing_ones())
}

impl Qcow2 {
    /// Decodes an entry for unit number `unit` of its cluster.
    pub(super) fn decode(&self, entry: u64, bitmap: u64, unit: u64) -> Kind {
        if entry & COMPRESSED != 0 {
            return match self.data.is_some() {
                true => Kind::Invalid,
                false => Kind::Compressed { entry },
            };
        }
        let offset = entry & OFFSET_MASK;
        if offset & (self.p.cluster - 1) != 0 {
            return Kind::Invalid;
        }
        // In an external data file, offset 0 is a place like any other.
        let owned = offset != 0 || (self.data.is_some() && entry & COPIED != 0);
        let data = Kind::Data { host: offset + (unit << self.p.unit_bits), copied: entry & COPIED != 0 };
        if self.p.extended {
            let (alloc, zero) = (bitmap >> unit & 1 != 0, bitmap >> (32 + unit) & 1 != 0);
            return match (alloc, zero) {
                (true, true) => Kind::Invalid,
                (true, false) if !owned => Kind::Invalid,
                (true, false) => data,
                (false, true) => Kind::Zero { allocated: owned },
                (false, false) => Kind::Below,
            };
        }
        match entry & ZERO != 0 {
            true if self.p.version < 3 => Kind::Invalid,
            true => Kind::Zero { allocated: owned },
            false if owned => data,
            false => Kind::Below,
        }
    }

    pub(super) fn entry(&self, words: &[AtomicU64], index: usize) -> (u64, u64) {
        match self.p.extended {
            true => (words[2 * index].load(Ordering::Acquire), words[2 * index + 1].load(Ordering::Acquire)),
            false => (words[index].load(Ordering::Acquire), 0),
        }
    }

    /// The kind of the unit at `offset` and for how many bytes (at most `len`) it continues within its
    /// slice, counting contiguous data as one.
    pub(super) fn lookup(&self, offset: u64, len: u64) -> Result<(Kind, u64)> {
        let p = &self.p;
        let cluster = offset >> p.cluster_bits;
        if self.l1.get(self.l1_index(cluster)) == 0 {
            let end = (self.l1_index(cluster) as u64 + 1) << (p.l2_bits + p.cluster_bits);
            return Ok((Kind::Below, len.min(end - offset)));
        }
        let (slice, first) = self.slice_of(cluster);
        let unit_size = 1u64 << p.unit_bits;
        let units = 1u64 << (p.cluster_bits - p.unit_bits);
        let within = offset & (unit_size - 1);
        let (kind, run) = self.read_slice(slice, |words| {
            let (entry, mut bitmap) = self.entry(words, first);
            let mut unit = (offset >> p.unit_bits) & (units - 1);
            let kind = self.decode(entry, bitmap, unit);
            if let Kind::Compressed { .. } = kind {
                return (kind, p.cluster - (offset & (p.cluster - 1)));
            }
            // Counted from the start of the first unit.
            let (mut index, mut bytes) = (first, 0);
            loop {
                let alike = if p.extended { units_alike(bitmap, unit) } else { 1 };
                bytes += alike << p.unit_bits;
                index += 1;
                if unit + alike < units || bytes >= within + len || index as u64 == p.slice_entries {
                    return (kind, bytes - within);
                }
                let entry;
                (entry, bitmap) = self.entry(words, index);
                unit = 0;
                let next = match kind {
                    Kind::Data { host, copied } => Kind::Data { host: host + bytes, copied },
                    kind => kind,
                };
                if self.decode(entry, bitmap, unit) != next {
                    return (kind, bytes - within);
                }
            }
        })?;
        match kind {
            Kind::Invalid => Err(self.corrupt("an L2 entry is invalid")),
            Kind::Data { host, copied } => Ok((Kind::Data { host: host + within, copied }, run.min(len))),
            kind => Ok((kind, run.min(len))),
        }
    }

    pub(super) fn resolve(&self, offset: u64, len: u64) -> Result<Extent> {
        let (kind, len) = self.lookup(offset, len)?;
        let source = match kind {
            Kind::Below | Kind::Invalid => Source::Below,
            Kind::Zero { allocated } => Source::Zero { allocated },
            Kind::Data { host, .. } => Source::Data { file: 0, offset: host },
            Kind::Compressed { .. } => Source::Opaque { compressed: true },
        };
        Ok(Extent { len, source })
    }

    /// Reads guest bytes as the chain shows them. The caller is inside the gate.
    pub(super) fn read_guest(&self, mut dst: Scatter<'_>, offset: u64, below: Below<'_>) -> Result<()> {
        let mut done = 0;
        while done < dst.len() {
            let at = offset + done as u64;
            let (kind, len) = self.lookup(at, (dst.len() - done) as u64)?;
            let mut part = dst.slice(done, len as usize);
            match kind {
                Kind::Data { host, .. } => {
                    self.payload().readv(part, host).map_err(|e| self.io("read", e))?;
                }
                Kind::Compressed { entry } => self.read_compressed(part, at, entry)?,
                Kind::Zero { .. } | Kind::Invalid => part.zero(),
                Kind::Below => below.read(part, at)?,
            }
            done += len as usize;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::units_alike;

    #[test]
    fn runs_of_subclusters_end_where_either_bit_changes() {
        assert_eq!(units_alike(0, 0), 32);
        assert_eq!(units_alike(u64::MAX, 31), 1);
        assert_eq!(units_alike(0xffff_ffff, 5), 27);
        // Two data, one that is nowhere, the rest zero.
        let bitmap = 0b11 | (0xffff_fff8 << 32);
        assert_eq!([0, 1, 2, 3, 31].map(|unit| units_alike(bitmap, unit)), [2, 1, 1, 29, 1]);
    }
}
