//! The leader record: a delta lease, or the head of a resource lease.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Geometry, LayoutError, checksum, get_rising, get_u32, get_u64, put_u32, put_u64};

const DELTA_MAGIC: u32 = 0x1221_2010;
const DELTA_VERSION: u32 = 0x0003_0004;
const PAXOS_MAGIC: u32 = 0x0615_2010;
const PAXOS_VERSION: u32 = 0x0006_0004;
const MAJOR: u32 = 0xffff_0000;
/// Magic number of the request record in sector 1 of a resource area.
pub const REQUEST_MAGIC: u32 = 0x0829_2011;
const REQUEST_VERSION: u32 = 0x0001_0001;
const CHECKSUM_AT: usize = 168;

/// A name field: up to 48 bytes, padded with zeros.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Name([u8; 48]);

impl Default for Name {
    fn default() -> Self {
        Name([0; 48])
    }
}

impl Name {
    /// Makes a name of at most 48 bytes without a zero byte.
    pub fn new(name: &str) -> Result<Self, LayoutError> {
        let mut out = [0; 48];
        let bytes = name.as_bytes();
        if bytes.contains(&0) {
            return Err(LayoutError::NameTooLong);
        }
        out.get_mut(..bytes.len()).ok_or(LayoutError::NameTooLong)?.copy_from_slice(bytes);
        Ok(Name(out))
    }

    fn from_field(b: &[u8], at: usize) -> Self {
        let mut out = [0; 48];
        out.copy_from_slice(&b[at..at + 48]);
        Name(out)
    }

    /// The bytes before the padding.
    pub fn as_bytes(&self) -> &[u8] {
        let end = self.0.iter().position(|b| *b == 0).unwrap_or(48);
        &self.0[..end]
    }
}

impl core::fmt::Debug for Name {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(self.as_bytes()))
    }
}

impl core::fmt::Display for Name {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(&String::from_utf8_lossy(self.as_bytes()))
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Name::new(&String::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

/// Which kind of area a leader record heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AreaKind {
    /// A delta lease: one host's heartbeat in a lockspace.
    #[default]
    Delta,
    /// A resource lease, agreed on by Disk Paxos.
    Resource,
}

/// A leader record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaderRecord {
    /// Delta lease or resource lease.
    pub kind: AreaKind,
    /// Set while the lease is held only for a moment, to take a shared lease.
    pub short_hold: bool,
    /// How many host blocks a resource area has in use; zero for a delta lease.
    pub num_hosts: u64,
    /// How many host blocks a resource area has room for; one for a delta lease.
    pub max_hosts: u64,
    /// The owner's host number; it stays after the lease is released.
    pub owner_id: u64,
    /// The owner's generation.
    pub owner_generation: u64,
    /// The lease version: it rises with each owner.
    pub lver: u64,
    /// The lockspace's name.
    pub space_name: Name,
    /// The resource's name; for a delta lease, the owner's host name.
    pub resource_name: Name,
    /// The owner's monotonic clock in seconds when it wrote this; zero when free.
    pub timestamp: u64,
    /// The owner's I/O timeout in seconds (delta leases); 10 when stored as zero.
    pub io_timeout: u16,
    /// Which host wrote the record (it may have finished another host's ballot).
    pub write_id: u64,
    /// The writer's generation.
    pub write_generation: u64,
    /// The writer's clock in seconds.
    pub write_timestamp: u64,
}

const SHORT_HOLD: u32 = 1;

impl LeaderRecord {
    /// A free delta lease, as a fresh lockspace has it in every sector.
    pub fn free_delta(space_name: Name, io_timeout: u16) -> Self {
        LeaderRecord { space_name, io_timeout, max_hosts: 1, ..Default::default() }
    }

    /// A free resource lease.
    pub fn free_resource(space_name: Name, resource_name: Name, geometry: Geometry) -> Self {
        let max_hosts = u64::from(geometry.max_hosts());
        LeaderRecord {
            kind: AreaKind::Resource,
            space_name,
            resource_name,
            num_hosts: max_hosts,
            max_hosts,
            ..Default::default()
        }
    }

    /// Writes the record into the start of `sector`, zeroing the rest.
    pub fn encode(&self, geometry: Geometry, sector: &mut [u8]) -> Result<(), LayoutError> {
        let b = sector.get_mut(..geometry.sector_size()).ok_or(LayoutError::Truncated)?;
        b.fill(0);
        let (magic, version) = match self.kind {
            AreaKind::Delta => (DELTA_MAGIC, DELTA_VERSION),
            AreaKind::Resource => (PAXOS_MAGIC, PAXOS_VERSION),
        };
        put_u32(b, 0, magic);
        put_u32(b, 4, version);
        put_u32(b, 8, geometry.align_flag() | if self.short_hold { SHORT_HOLD } else { 0 });
        put_u32(b, 12, geometry.sector_size() as u32);
        put_u64(b, 16, self.num_hosts);
        put_u64(b, 24, self.max_hosts);
        put_u64(b, 32, self.owner_id);
        put_u64(b, 40, self.owner_generation);
        put_u64(b, 48, self.lver);
        b[56..104].copy_from_slice(&self.space_name.0);
        b[104..152].copy_from_slice(&self.resource_name.0);
        put_u64(b, 152, self.timestamp);
        let sum = checksum(&b[..CHECKSUM_AT]);
        put_u32(b, CHECKSUM_AT, sum);
        b[174..176].copy_from_slice(&self.io_timeout.to_le_bytes());
        put_u64(b, 176, self.write_id);
        put_u64(b, 184, self.write_generation);
        put_u64(b, 192, self.write_timestamp);
        Ok(())
    }

    /// Reads a record, checking magic, version, checksum, and that its generation and version can rise.
    pub fn decode(b: &[u8]) -> Result<Self, LayoutError> {
        if b.len() < 512 {
            return Err(LayoutError::Truncated);
        }
        let (kind, version) = match get_u32(b, 0) {
            DELTA_MAGIC => (AreaKind::Delta, DELTA_VERSION),
            PAXOS_MAGIC => (AreaKind::Resource, PAXOS_VERSION),
            other => return Err(LayoutError::Magic(other)),
        };
        if get_u32(b, 4) & MAJOR != version & MAJOR {
            return Err(LayoutError::Version(get_u32(b, 4)));
        }
        let (found, expected) = (get_u32(b, CHECKSUM_AT), checksum(&b[..CHECKSUM_AT]));
        if found != expected {
            return Err(LayoutError::Checksum { found, expected });
        }
        Ok(LeaderRecord {
            kind,
            short_hold: get_u32(b, 8) & SHORT_HOLD != 0,
            num_hosts: get_u64(b, 16),
            max_hosts: get_u64(b, 24),
            owner_id: get_u64(b, 32),
            owner_generation: get_rising(b, 40)?,
            lver: get_rising(b, 48)?,
            space_name: Name::from_field(b, 56),
            resource_name: Name::from_field(b, 104),
            timestamp: get_u64(b, 152),
            io_timeout: u16::from_le_bytes([b[174], b[175]]),
            write_id: get_u64(b, 176),
            write_generation: get_u64(b, 184),
            write_timestamp: get_u64(b, 192),
        })
    }
}

/// Writes an empty request record into the start of `sector`, zeroing the rest.
pub fn encode_request(geometry: Geometry, sector: &mut [u8]) -> Result<(), LayoutError> {
    let b = sector.get_mut(..geometry.sector_size()).ok_or(LayoutError::Truncated)?;
    b.fill(0);
    put_u32(b, 0, REQUEST_MAGIC);
    put_u32(b, 4, REQUEST_VERSION);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::HIGHEST;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_record_survives_the_disk(owner in any::<u64>(), gen_ in 0..=HIGHEST, lver in 0..=HIGHEST,
                                      ts in any::<u64>(), io in any::<u16>(), name in "[a-z0-9_-]{0,48}", short in any::<bool>()) {
            let name = Name::new(&name).unwrap();
            for geometry in [Geometry::S512, Geometry::new(4096, 2 << 20).unwrap()] {
                let mut r = LeaderRecord::free_resource(name, name, geometry);
                (r.owner_id, r.owner_generation, r.lver, r.timestamp, r.io_timeout, r.short_hold) = (owner, gen_, lver, ts, io, short);
                let mut buf = vec![0xff; geometry.sector_size()];
                r.encode(geometry, &mut buf).unwrap();
                prop_assert_eq!(LeaderRecord::decode(&buf).unwrap(), r);
            }
        }

        #[test]
        fn any_bytes_are_answered(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), magic in any::<bool>()) {
            if magic && bytes.len() >= 4 { bytes[..4].copy_from_slice(&PAXOS_MAGIC.to_le_bytes()); }
            prop_assert!(LeaderRecord::decode(&bytes).is_err());
        }
    }

    #[test]
    fn a_number_that_cannot_rise_is_refused() {
        let record = LeaderRecord::free_delta(Name::default(), 10);
        let read = |record: LeaderRecord| {
            let mut buf = [0; 512];
            record.encode(Geometry::S512, &mut buf).unwrap();
            LeaderRecord::decode(&buf).map(drop)
        };
        for number in [HIGHEST + 1, u64::MAX] {
            assert_eq!(read(LeaderRecord { lver: number, ..record }), Err(LayoutError::Number(number)));
            let generation = LeaderRecord { owner_generation: number, ..record };
            assert_eq!(read(generation), Err(LayoutError::Number(number)));
        }
        assert_eq!(read(LeaderRecord { lver: HIGHEST, owner_generation: HIGHEST, ..record }), Ok(()));
    }

    #[test]
    fn a_flipped_bit_is_seen() {
        let mut buf = vec![0; 512];
        LeaderRecord::free_delta(Name::new("LS").unwrap(), 10).encode(Geometry::S512, &mut buf).unwrap();
        for at in [8, 40, 100, 160] {
            buf[at] ^= 1;
            assert!(matches!(LeaderRecord::decode(&buf), Err(LayoutError::Checksum { .. })), "byte {at}");
            buf[at] ^= 1;
        }
        assert!(Name::new(&"x".repeat(49)).is_err() && Name::new("a\0b").is_err());
    }
}
