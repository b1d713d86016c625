//! The file identifier, the two headers and the two region tables. Everything is little-endian.

use crate::{Error, Result, Storage};
use std::sync::Arc;
use uuid::{Uuid, uuid};

/// Unit of placement in the file.
pub(super) const MIB: u64 = 1 << 20;
/// Unit of metadata updates and of the log.
pub(super) const PAGE: u64 = 4096;
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
/// Where the copies of the region table are.
pub(super) const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
/// Bytes in a region table.
pub(super) const REGION_TABLE_BYTES: usize = 64 << 10;
const MAX_REGIONS: u32 = 2047;
/// Largest file that is accepted: a disk of 64 TiB with all its metadata fits easily.
pub(super) const MAX_FILE: u64 = 128 << 40;
/// Largest log that is accepted; it is read as a whole.
const MAX_LOG: u32 = 64 << 20;
/// Highest sequence number of a header that is accepted, so that no number of updates reaches the end of its range.
const MAX_SEQUENCE: u64 = u64::MAX >> 1;
pub(super) const BAT_REGION: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA_REGION: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");

pub(super) fn le16(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

pub(super) fn le32(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

pub(super) fn le64(b: &[u8], at: usize) -> u64 {
    u64::from(le32(b, at)) | u64::from(le32(b, at + 4)) << 32
}

pub(super) fn guid(b: &[u8], at: usize) -> Uuid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&b[at..at + 16]);
    Uuid::from_bytes_le(bytes)
}

pub(super) fn put(b: &mut [u8], at: usize, bytes: &[u8]) {
    b[at..at + bytes.len()].copy_from_slice(bytes);
}

/// CRC-32C of `bytes` with the four bytes at offset 4, where all structures keep it, taken as zero.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..4]), &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[8..])
}

/// Writes the checksum of a structure into it.
pub(super) fn seal(bytes: &mut [u8]) {
    let sum = checksum(bytes);
    put(bytes, 4, &sum.to_le_bytes());
}

/// A header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub sequence: u64,
    /// Changes when the file is changed for the first time after it was opened.
    pub file_write: Uuid,
    /// Changes when the disk's contents change for the first time after it was opened.
    pub data_write: Uuid,
    /// What entries of the log must carry to count; nil if the log is empty.
    pub log: Uuid,
    pub log_length: u32,
    pub log_offset: u64,
}

impl Header {
    fn parse(bytes: &[u8], name: &str) -> Result<Option<Self>> {
        if !bytes.starts_with(b"head") || le32(bytes, 4) != checksum(bytes) {
            return Ok(None);
        }
        let (log_version, version) = (le16(bytes, 64), le16(bytes, 66));
        if version != 1 {
            return Err(Error::unsupported(name, format!("VHDX version {version}")));
        }
        let log = guid(bytes, 48);
        if log_version != 0 && !log.is_nil() {
            return Err(Error::unsupported(name, format!("log version {log_version}")));
        }
        Ok(Some(Header {
            sequence: le64(bytes, 8),
            file_write: guid(bytes, 16),
            data_write: guid(bytes, 32),
            log,
            log_length: le32(bytes, 68),
            log_offset: le64(bytes, 72),
        }))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut b = vec![0; PAGE as usize];
        put(&mut b, 0, b"head");
        put(&mut b, 8, &self.sequence.to_le_bytes());
        put(&mut b, 16, &self.file_write.to_bytes_le());
        put(&mut b, 32, &self.data_write.to_bytes_le());
        put(&mut b, 48, &self.log.to_bytes_le());
        put(&mut b, 66, &1u16.to_le_bytes());
        put(&mut b, 68, &self.log_length.to_le_bytes());
        put(&mut b, 72, &self.log_offset.to_le_bytes());
        seal(&mut b);
        b
    }

    /// Writes a header to its place in a new image.
    pub fn write_new(&self, storage: &Arc<dyn Storage>) -> Result<()> {
        for (n, at) in HEADERS.into_iter().enumerate() {
            let header = Header { sequence: self.sequence + n as u64, ..self.clone() };
            storage.write_at(&header.to_bytes(), at)?;
        }
        Ok(())
    }
}

/// The headers of an open image.
#[derive(Clone, Debug)]
pub(super) struct Headers {
    pub current: Header,
    /// Which of the two places holds the current one.
    place: usize,
    /// Valid copies that were found.
    pub copies: usize,
}

impl Headers {
    /// Finds the current header.
    pub fn read(storage: &Arc<dyn Storage>, name: &str) -> Result<Self> {
        let mut signature = [0; 8];
        storage.read_at(&mut signature, 0)?;
        if signature != *b"vhdxfile" {
            return Err(Error::wrong_format(name, "VHDX"));
        }
        let mut best: Option<Headers> = None;
        let mut copies = 0;
        for (place, at) in HEADERS.into_iter().enumerate() {
            let mut bytes = [0; PAGE as usize];
            storage.read_at(&mut bytes, at)?;
            let Some(header) = Header::parse(&bytes, name)? else { continue };
            copies += 1;
            if best.as_ref().is_none_or(|b| header.sequence > b.current.sequence) {
                best = Some(Headers { current: header, place, copies });
            }
        }
        let mut headers = best.ok_or_else(|| Error::corrupt(name, "both of its headers are damaged"))?;
        headers.copies = copies;
        let h = &headers.current;
        if h.sequence > MAX_SEQUENCE {
            return Err(Error::corrupt(name, "the sequence number of its header is out of bounds"));
        }
        let aligned = u64::from(h.log_length).is_multiple_of(MIB) && h.log_offset.is_multiple_of(MIB);
        if !aligned || h.log_length == 0 || h.log_offset < MIB || h.log_offset > MAX_FILE {
            return Err(Error::corrupt(name, "its log is out of bounds"));
        }
        if h.log_length > MAX_LOG {
            return Err(Error::unsupported(name, format!("a log of {} bytes", h.log_length)));
        }
        Ok(headers)
    }

    /// Replaces both headers, one after the other, so that one is valid at any time.
    pub fn update(&mut self, storage: &Arc<dyn Storage>, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut next = self.current.clone();
        change(&mut next);
        for _ in 0..2 {
            next.sequence += 1;
            let place = 1 - self.place;
            storage.write_at(&next.to_bytes(), HEADERS[place])?;
            storage.sync()?;
            self.place = place;
            self.current = next.clone();
        }
        self.copies = 2;
        Ok(())
    }
}

/// A region of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub offset: u64,
    pub len: u64,
}

impl Region {
    pub fn end(self) -> u64 {
        self.offset + self.len
    }

    pub fn contains(self, at: u64) -> bool {
        (self.offset..self.end()).contains(&at)
    }
}

/// Where things are.
#[derive(Clone, Debug)]
pub(super) struct Regions {
    pub bat: Region,
    pub metadata: Region,
    /// All regions, known or not.
    pub all: Vec<Region>,
    /// The table as it is in the file.
    pub table: Vec<u8>,
    /// Position of the first region's entry in the table.
    bat_entry: usize,
    /// Whether both copies of the table are valid and equal.
    pub copies_agree: bool,
}

impl Regions {
    /// The table of a new image.
    pub fn table(bat: Region, metadata: Region) -> Vec<u8> {
        let mut b = vec![0; REGION_TABLE_BYTES];
        put(&mut b, 0, b"regi");
        put(&mut b, 8, &2u32.to_le_bytes());
        for (at, id, region) in [(16, BAT_REGION, bat), (48, METADATA_REGION, metadata)] {
            put(&mut b, at, &id.to_bytes_le());
            put(&mut b, at + 16, &region.offset.to_le_bytes());
            put(&mut b, at + 24, &(region.len as u32).to_le_bytes());
            put(&mut b, at + 28, &1u32.to_le_bytes());
        }
        seal(&mut b);
        b
    }

    /// Chooses a valid copy and reads it.
    pub fn parse(copies: [Vec<u8>; 2], name: &str) -> Result<Self> {
        let valid = |b: &Vec<u8>| b.starts_with(b"regi") && le32(b, 4) == checksum(b);
        let copies_agree = copies[0] == copies[1] && valid(&copies[0]);
        let table = copies.into_iter().find(valid);
        let table = table.ok_or_else(|| Error::corrupt(name, "both of its region tables are damaged"))?;
        let count = le32(&table, 8);
        if count > MAX_REGIONS {
            return Err(Error::corrupt(name, "its region table is too long"));
        }
        let (mut bat, mut metadata, mut all) = (None, None, Vec::new());
        for at in (0..count as usize).map(|n| 16 + n * 32) {
            let id = guid(&table, at);
            let region = Region { offset: le64(&table, at + 16), len: le32(&table, at + 24).into() };
            let aligned = region.offset.is_multiple_of(MIB) && region.len.is_multiple_of(MIB);
            if !aligned || region.offset < MIB || region.len == 0 || region.offset > MAX_FILE {
                return Err(Error::corrupt(name, "a region is out of bounds"));
            }
            all.push(region);
            match id {
                BAT_REGION if bat.is_none() => bat = Some((region, at)),
                METADATA_REGION if metadata.is_none() => metadata = Some(region),
                BAT_REGION | METADATA_REGION => {
                    return Err(Error::corrupt(name, "it has a region twice"));
                }
                _ if le32(&table, at + 28) & 1 != 0 => {
                    return Err(Error::unsupported(name, format!("region {id}")));
                }
                _ => {}
            }
        }
        let mut sorted = all.clone();
        sorted.sort_unstable_by_key(|r| r.offset);
        if sorted.windows(2).any(|w| w[0].end() > w[1].offset) {
            return Err(Error::corrupt(name, "two of its regions overlap"));
        }
        match (bat, metadata) {
            (Some((bat, bat_entry)), Some(metadata)) => {
                Ok(Regions { bat, metadata, all, table, bat_entry, copies_agree })
            }
            _ => Err(Error::corrupt(name, "a region that every image has is missing")),
        }
    }

    /// The same table with another place for the block allocation table.
    pub fn with_bat(&self, bat: Region) -> Self {
        let mut next = self.clone();
        put(&mut next.table, self.bat_entry + 16, &bat.offset.to_le_bytes());
        put(&mut next.table, self.bat_entry + 24, &(bat.len as u32).to_le_bytes());
        seal(&mut next.table);
        next.all.iter_mut().filter(|r| **r == self.bat).for_each(|r| *r = bat);
        next.bat = bat;
        next
    }

    /// The page of the table that [`with_bat`](Self::with_bat) changes, in both copies, besides the first.
    pub fn bat_entry_page(&self) -> usize {
        self.bat_entry / PAGE as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn a_header_at_the_end_of_its_sequence_is_refused() {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        storage.write_at(b"vhdxfile", 0).unwrap();
        let id = Uuid::from_u128(1);
        let (log_length, log_offset) = (MIB as u32, MIB);
        let new = |sequence| {
            Header { sequence, file_write: id, data_write: id, log: Uuid::nil(), log_length, log_offset }
                .write_new(&storage)
                .unwrap();
            Headers::read(&storage, "x")
        };
        new(MAX_SEQUENCE - 1).unwrap().update(&storage, |_| {}).unwrap();
        for sequence in [MAX_SEQUENCE, u64::MAX - 1] {
            assert!(matches!(new(sequence), Err(Error::Corrupt { .. })), "{sequence}");
        }
    }

    #[test]
    fn a_region_table_survives_a_round_trip_and_no_flipped_bit() {
        let bat = Region { offset: 3 << 20, len: MIB };
        let metadata = Region { offset: 2 << 20, len: MIB };
        let table = Regions::table(bat, metadata);
        let parsed = Regions::parse([table.clone(), table.clone()], "x").unwrap();
        assert_eq!((parsed.bat, parsed.metadata), (bat, metadata));
        for at in [0, 8, 20, 60, 65535] {
            let mut bad = table.clone();
            bad[at] ^= 1;
            let one = Regions::parse([bad.clone(), table.clone()], "x").unwrap();
            assert!(!one.copies_agree);
            assert!(Regions::parse([bad.clone(), bad], "x").is_err(), "byte {at}");
        }
        let moved = parsed.with_bat(Region { offset: 9 << 20, len: 2 * MIB });
        let again = Regions::parse([moved.table.clone(), moved.table], "x").unwrap();
        assert_eq!(again.bat, moved.bat);
    }
}
