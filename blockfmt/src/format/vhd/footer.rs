//! The footer and the header of dynamic disks.
//!
//! Everything is big-endian. The footer (512 bytes) ends every image and is mirrored at the start of images
//! that are not fixed, where a header of 1024 bytes follows.

use crate::{Error, Result};
use std::time::{SystemTime, UNIX_EPOCH};

pub(super) const SECTOR: u64 = 512;
/// Largest disk: 2040 GiB.
pub(super) const MAX_SIZE: u64 = 2040 << 30;
/// Largest size that the cylinder/head/sector geometry describes, in sectors.
const MAX_GEOMETRY: u64 = 65535 * 16 * 255;
/// Seconds from the Unix epoch to the format's, 2000-01-01.
const EPOCH: u64 = 946_684_800;
/// Creators whose images have the size that their footer says; others mean the geometry, as Virtual PC does.
const SIZE_FIELD_CREATORS: [&[u8; 4]; 5] = [b"win ", b"qem2", b"d2v ", b"tap\0", b"\0\0\0\0"];

/// The kind of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Fixed = 2,
    Dynamic = 3,
    Differencing = 4,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Fixed => "fixed",
            Kind::Dynamic => "dynamic",
            Kind::Differencing => "differencing",
        }
    }
}

pub(super) fn be16(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}

pub(super) fn be32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

pub(super) fn be64(b: &[u8], at: usize) -> u64 {
    u64::from(be32(b, at)) << 32 | u64::from(be32(b, at + 4))
}

pub(super) fn put(b: &mut [u8], at: usize, bytes: &[u8]) {
    b[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The one's complement of the sum of all bytes but the checksum at `field`.
pub(super) fn checksum(bytes: &[u8], field: usize) -> u32 {
    let sum = |part: &[u8]| part.iter().map(|b| u32::from(*b)).sum::<u32>();
    !(sum(&bytes[..field]) + sum(&bytes[field + 4..]))
}

/// Seconds since the format's epoch; 0 for times before it.
pub(super) fn timestamp(time: SystemTime) -> u32 {
    let unix = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    unix.saturating_sub(EPOCH) as u32
}

/// [`timestamp`] of a time of modification in nanoseconds since the Unix epoch.
pub(super) fn timestamp_of_nanos(nanos: i128) -> u32 {
    (nanos / 1_000_000_000 - i128::from(EPOCH)).clamp(0, i128::from(u32::MAX)) as u32
}

/// Cylinders, heads and sectors per track of a disk, by the algorithm of the specification's appendix.
pub(super) fn geometry(sectors: u64) -> (u16, u8, u8) {
    let total = sectors.min(MAX_GEOMETRY);
    let (mut heads, mut per_track) = (16, 255);
    let mut tracks = total / per_track;
    if total <= 65535 * 16 * 63 {
        per_track = 17;
        tracks = total / per_track;
        heads = tracks.div_ceil(1024).max(4);
        if tracks >= heads * 1024 || heads > 16 {
            (heads, per_track) = (16, 31);
            tracks = total / per_track;
        }
        if tracks >= heads * 1024 {
            (heads, per_track) = (16, 63);
            tracks = total / per_track;
        }
    }
    ((tracks / heads) as u16, heads as u8, per_track as u8)
}

/// The footer.
#[derive(Clone, Debug)]
pub(super) struct Footer([u8; 512]);

impl Footer {
    pub fn new(kind: Kind, size: u64) -> Self {
        let mut b = [0; 512];
        put(&mut b, 0, b"conectix");
        put(&mut b, 8, &2u32.to_be_bytes()); // a reserved feature bit that is always set
        put(&mut b, 12, &0x10000u32.to_be_bytes());
        let header = if kind == Kind::Fixed { u64::MAX } else { SECTOR };
        put(&mut b, 16, &header.to_be_bytes());
        put(&mut b, 24, &timestamp(SystemTime::now()).to_be_bytes());
        // A creator whose size field every reader honours.
        put(&mut b, 28, b"win ");
        put(&mut b, 32, &0xa0000u32.to_be_bytes());
        put(&mut b, 36, b"Wi2k");
        put(&mut b, 40, &size.to_be_bytes());
        put(&mut b, 60, &(kind as u32).to_be_bytes());
        put(&mut b, 68, uuid::Uuid::new_v4().as_bytes());
        let mut footer = Footer(b);
        footer.set_size(size);
        footer
    }

    /// The footer in these bytes, if there is one: right name and checksum.
    pub fn parse(bytes: &[u8; 512]) -> Option<Self> {
        let valid = bytes.starts_with(b"conectix") && be32(bytes, 64) == checksum(bytes, 64);
        valid.then_some(Footer(*bytes))
    }

    pub fn kind(&self, name: &str) -> Result<Kind> {
        match be32(&self.0, 60) {
            2 => Ok(Kind::Fixed),
            3 => Ok(Kind::Dynamic),
            4 => Ok(Kind::Differencing),
            other => Err(Error::unsupported(name, format!("disk type {other}"))),
        }
    }

    /// Refuses what is not understood.
    pub fn check(&self, name: &str) -> Result<()> {
        let version = be32(&self.0, 12);
        if version >> 16 != 1 {
            let text = format!("file format version {}.{}", version >> 16, version & 0xffff);
            return Err(Error::unsupported(name, text));
        }
        match self.size() {
            size if size > MAX_SIZE => Err(Error::unsupported(name, "a disk of more than 2040 GiB")),
            size if !size.is_multiple_of(SECTOR) => {
                Err(Error::corrupt(name, "its size is no multiple of 512 bytes"))
            }
            _ => Ok(()),
        }
    }

    /// Size of the disk in bytes. Virtual PC goes by the geometry, Hyper-V by the size field.
    pub fn size(&self) -> u64 {
        let current = be64(&self.0, 48);
        let sectors = u64::from(be16(&self.0, 56)) * u64::from(self.0[58]) * u64::from(self.0[59]);
        let by_field = SIZE_FIELD_CREATORS.iter().any(|c| self.0[28..32] == c[..]);
        if by_field || sectors == MAX_GEOMETRY || sectors == 0 { current } else { sectors * SECTOR }
    }

    pub fn set_size(&mut self, size: u64) {
        let (cylinders, heads, per_track) = geometry(size / SECTOR);
        if !SIZE_FIELD_CREATORS.iter().any(|c| self.0[28..32] == c[..]) {
            put(&mut self.0, 28, b"win ");
        }
        put(&mut self.0, 48, &size.to_be_bytes());
        put(&mut self.0, 56, &cylinders.to_be_bytes());
        put(&mut self.0, 58, &[heads, per_track]);
        self.seal();
    }

    pub fn set_kind(&mut self, kind: Kind) {
        put(&mut self.0, 60, &(kind as u32).to_be_bytes());
        self.seal();
    }

    /// Where the header of a dynamic disk is.
    pub fn header_offset(&self) -> u64 {
        be64(&self.0, 16)
    }

    pub fn uuid(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out.copy_from_slice(&self.0[68..84]);
        out
    }

    pub fn creator(&self) -> String {
        String::from_utf8_lossy(&self.0[28..32]).trim_end_matches(['\0', ' ']).to_owned()
    }

    pub fn bytes(&self) -> &[u8; 512] {
        &self.0
    }

    fn seal(&mut self) {
        let sum = checksum(&self.0, 64);
        put(&mut self.0, 64, &sum.to_be_bytes());
    }
}

/// The header of a dynamic or differencing disk.
#[derive(Clone, Debug)]
pub(super) struct Header(pub [u8; 1024]);

impl Header {
    pub fn new(table_offset: u64, entries: u32, block_size: u32) -> Self {
        let mut b = [0; 1024];
        put(&mut b, 0, b"cxsparse");
        put(&mut b, 8, &u64::MAX.to_be_bytes());
        put(&mut b, 16, &table_offset.to_be_bytes());
        put(&mut b, 24, &0x10000u32.to_be_bytes());
        put(&mut b, 28, &entries.to_be_bytes());
        put(&mut b, 32, &block_size.to_be_bytes());
        let mut header = Header(b);
        header.seal();
        header
    }

    pub fn parse(bytes: [u8; 1024], name: &str) -> Result<Self> {
        if !bytes.starts_with(b"cxsparse") {
            return Err(Error::corrupt(name, "it has no dynamic disk header"));
        }
        if be32(&bytes, 36) != checksum(&bytes, 36) {
            return Err(Error::corrupt(name, "the checksum of its dynamic disk header is wrong"));
        }
        let header = Header(bytes);
        if be32(&header.0, 24) >> 16 != 1 {
            return Err(Error::unsupported(name, format!("header version {:#x}", be32(&header.0, 24))));
        }
        let block = header.block_size();
        if !block.is_power_of_two() || !(512 << 10..=64 << 20).contains(&block) {
            return Err(Error::unsupported(name, format!("a block size of {block} bytes")));
        }
        Ok(header)
    }

    pub fn table_offset(&self) -> u64 {
        be64(&self.0, 16)
    }

    pub fn entries(&self) -> u32 {
        be32(&self.0, 28)
    }

    pub fn block_size(&self) -> u64 {
        be32(&self.0, 32).into()
    }

    pub fn parent_uuid(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out.copy_from_slice(&self.0[40..56]);
        out
    }

    pub fn parent_timestamp(&self) -> u32 {
        be32(&self.0, 56)
    }

    pub fn seal(&mut self) {
        let sum = checksum(&self.0, 36);
        put(&mut self.0, 36, &sum.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_follows_the_specification() {
        // Values of `qemu-img create -f vpc -o force_size=on`.
        assert_eq!(geometry(0), (0, 4, 17));
        assert_eq!(geometry((64 << 20) / 512), (963, 8, 17));
        assert_eq!(geometry(u64::MAX), (65535, 16, 255));
    }

    #[test]
    fn a_footer_survives_a_round_trip_and_no_flipped_bit() {
        let footer = Footer::new(Kind::Dynamic, 10 << 20);
        let parsed = Footer::parse(footer.bytes()).unwrap();
        assert_eq!((parsed.size(), parsed.kind("x").unwrap()), (10 << 20, Kind::Dynamic));
        for at in [0, 12, 48, 60, 64, 511] {
            let mut bytes = *footer.bytes();
            bytes[at] ^= 1;
            assert!(Footer::parse(&bytes).is_none(), "byte {at}");
        }
    }
}
