//! The on-disk layout of lockspaces and resource leases: sanlock's, byte for byte.
//!
//! All integers are little-endian. A *lockspace area* holds one delta lease a sector, host N in sector
//! N-1. A *resource area* holds the leader record in sector 0, a request record in sector 1, and from
//! sector 2 on one sector a host: its Disk Paxos block, and at byte 128 its mode block.

mod block;
mod leader;

pub use block::{DBlock, HostBlock, ModeBlock};
pub use leader::{AreaKind, LeaderRecord, Name, REQUEST_MAGIC, encode_request};

use crate::types::{HostId, MAX_HOSTS};

/// Why bytes read from a lease area were refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The buffer is shorter than a sector.
    #[error("Lease sector is truncated; read whole sectors")]
    Truncated,
    /// The magic number is neither a delta lease's nor a resource lease's.
    #[error("Lease magic {0:#x} is unknown; initialise the lease area first")]
    Magic(u32),
    /// The major version is not the one this code writes.
    #[error("Lease version {0:#x} is not supported; use leases of the same major version")]
    Version(u32),
    /// The checksum does not match.
    #[error("Lease checksum is {found:#x} but should be {expected:#x}; the sector is damaged")]
    Checksum {
        /// The stored checksum.
        found: u32,
        /// The checksum of the stored bytes.
        expected: u32,
    },
    /// A number that rises with each owner has no room left to rise: no host wrote it.
    #[error("Lease holds the number {0}, which no host has counted to; initialise the lease area anew")]
    Number(u64),
    /// A name is longer than 48 bytes.
    #[error("Lease name is longer than 48 bytes; shorten it")]
    NameTooLong,
    /// The sector size and the area size do not fit together.
    #[error(
        "Lease area of {area} bytes cannot have {sector}-byte sectors; use 1 MiB, or 1 to 8 MiB with 4096-byte sectors"
    )]
    Geometry {
        /// The sector size in bytes.
        sector: u32,
        /// The area size in bytes.
        area: u32,
    },
}

/// Sector size and area size of a lease volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    sector: u32,
    area: u32,
}

impl Geometry {
    /// 512-byte sectors, 1 MiB areas, 2000 hosts.
    pub const S512: Geometry = Geometry { sector: 512, area: 1 << 20 };

    /// Checks and makes a geometry: 512-byte sectors with 1 MiB, or 4096-byte sectors with 1, 2, 4 or 8 MiB.
    pub fn new(sector: u32, area: u32) -> Result<Self, LayoutError> {
        const M: u32 = 1 << 20;
        match (sector, area) {
            (512, M) => Ok(Geometry { sector, area }),
            (4096, a) if a == M || a == 2 * M || a == 4 * M || a == 8 * M => Ok(Geometry { sector, area }),
            _ => Err(LayoutError::Geometry { sector, area }),
        }
    }

    /// Bytes in a sector.
    pub fn sector_size(self) -> usize {
        self.sector as usize
    }

    /// Bytes in a lockspace or resource area.
    pub fn area_size(self) -> usize {
        self.area as usize
    }

    /// How many hosts fit: 2000 with 512-byte sectors, 250 a MiB with 4096-byte sectors.
    pub fn max_hosts(self) -> u16 {
        if self.sector == 512 { MAX_HOSTS } else { (self.area >> 20) as u16 * 250 }
    }

    /// The area size as the leader record's flag word spells it.
    fn align_flag(self) -> u32 {
        (self.area >> 20) << 4
    }

    /// Byte offset of a host's delta lease in its lockspace area; `None` if the host does not fit.
    pub fn delta_offset(self, host: HostId) -> Option<usize> {
        (host.0 >= 1 && host.0 <= self.max_hosts()).then(|| usize::from(host.0 - 1) * self.sector_size())
    }

    /// Byte offset of a host's block in a resource area; `None` if the host does not fit.
    pub fn block_offset(self, host: HostId) -> Option<usize> {
        self.delta_offset(host).map(|o| o + 2 * self.sector_size())
    }
}

fn get_u32(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn get_u64(b: &[u8], at: usize) -> u64 {
    u64::from(get_u32(b, at)) | u64::from(get_u32(b, at + 4)) << 32
}

/// The highest generation, version or ballot that is believed: what a host writes next is above it.
const HIGHEST: u64 = u64::MAX / 2;

/// Reads a number that rises with each owner or ballot.
fn get_rising(b: &[u8], at: usize) -> Result<u64, LayoutError> {
    let number = get_u64(b, at);
    if number <= HIGHEST { Ok(number) } else { Err(LayoutError::Number(number)) }
}

fn put_u32(b: &mut [u8], at: usize, v: u32) {
    b[at..at + 4].copy_from_slice(&v.to_le_bytes());
}

fn put_u64(b: &mut [u8], at: usize, v: u64) {
    b[at..at + 8].copy_from_slice(&v.to_le_bytes());
}

/// CRC32C that starts from ~1 and is not inverted at the end, as the layout wants it.
fn checksum(bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(1, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometries() {
        assert_eq!(Geometry::S512.max_hosts(), 2000);
        assert_eq!(Geometry::new(4096, 1 << 20).unwrap().max_hosts(), 250);
        assert_eq!(Geometry::new(4096, 8 << 20).unwrap().max_hosts(), 2000);
        assert!(Geometry::new(512, 2 << 20).is_err() && Geometry::new(4096, 3 << 20).is_err());
        assert_eq!(Geometry::S512.block_offset(HostId(1)), Some(1024));
        assert_eq!(Geometry::S512.block_offset(HostId(0)), None);
        assert_eq!(Geometry::S512.delta_offset(HostId(2001)), None);
    }
}
