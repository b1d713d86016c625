//! The metadata region: a table of items, each a fact about the disk.

use super::header::{MIB, PAGE, Region, guid, le16, le32, le64, put};
use crate::{Error, Result};
use uuid::{Uuid, uuid};

/// Bytes in the table of items; items follow it.
const TABLE_BYTES: u64 = 64 << 10;
const FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const DISK_SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
const DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
const LOGICAL_SECTOR: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
const PHYSICAL_SECTOR: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
const PARENT_LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");
/// Locators that name a VHDX file.
const LOCATOR_TYPE: Uuid = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913");
/// Flags of items.
const IS_USER: u32 = 1;
const IS_VIRTUAL_DISK: u32 = 2;
const IS_REQUIRED: u32 = 4;
/// Flags of the file parameters.
const LEAVE_ALLOCATED: u32 = 1;
const HAS_PARENT: u32 = 2;
/// Largest disk: 64 TiB.
pub(super) const MAX_SIZE: u64 = 64 << 40;
/// Largest parent locator.
const MAX_LOCATOR: u32 = 64 << 10;

/// What the metadata region says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    pub block_size: u32,
    /// Whether blocks keep their space when they are discarded: a fixed disk.
    pub fixed: bool,
    pub has_parent: bool,
    pub size: u64,
    pub id: Uuid,
    pub logical_sector: u32,
    pub physical_sector: u32,
    /// Keys and values of the parent locator.
    pub locator: Vec<(String, String)>,
}

/// Where items are in the region, to change them.
#[derive(Clone, Debug, Default)]
pub(super) struct Places {
    parameters: u64,
    size: u64,
    /// Position of the locator's entry in the table, or of the first free entry.
    locator_entry: u64,
    locator_exists: bool,
    entries: u16,
    /// Where a locator may be put.
    locator_room: u64,
    table: Vec<u8>,
}

/// A change of the region: offset in it, and bytes.
pub(super) type Patch = (u64, Vec<u8>);

impl Metadata {
    /// Reads the region; `read` takes an offset in it and a length.
    pub fn parse(
        region: Region,
        name: &str,
        read: impl Fn(u64, usize) -> Result<Vec<u8>>,
    ) -> Result<(Self, Places)> {
        let corrupt = |what: &str| Error::corrupt(name, what);
        let table = read(0, TABLE_BYTES as usize)?;
        let entries = le16(&table, 10);
        if !table.starts_with(b"metadata") || entries > 2047 {
            return Err(corrupt("its metadata table is damaged"));
        }
        let mut places = Places { entries, locator_room: TABLE_BYTES, ..Places::default() };
        places.locator_entry = 32 + u64::from(entries) * 32;
        let (mut parameters, mut size, mut id, mut logical, mut physical, mut locator) =
            (None, None, Uuid::nil(), None, None, None);
        for at in (0..u64::from(entries)).map(|n| 32 + n * 32) {
            let entry = &table[at as usize..];
            let (item, offset, len, flags) =
                (guid(entry, 0), u64::from(le32(entry, 16)), le32(entry, 20), le32(entry, 24));
            let empty = offset == 0 && len == 0;
            let end = offset + u64::from(len);
            if !empty && (offset < TABLE_BYTES || end > region.len || len as u64 > MIB) {
                return Err(corrupt("a metadata item is out of bounds"));
            }
            let value = |want: u32| match len == want {
                true => read(offset, len as usize),
                false => Err(corrupt("a metadata item has the wrong length")),
            };
            let user = flags & IS_USER != 0;
            match item {
                FILE_PARAMETERS if !user => {
                    places.parameters = offset;
                    parameters = Some(value(8)?);
                }
                DISK_SIZE if !user => {
                    places.size = offset;
                    size = Some(le64(&value(8)?, 0));
                }
                DISK_ID if !user => id = guid(&value(16)?, 0),
                LOGICAL_SECTOR if !user => logical = Some(le32(&value(4)?, 0)),
                PHYSICAL_SECTOR if !user => physical = Some(le32(&value(4)?, 0)),
                PARENT_LOCATOR if !user => {
                    places.locator_entry = at;
                    places.locator_exists = true;
                    if len > MAX_LOCATOR {
                        return Err(corrupt("its parent locator is too long"));
                    }
                    locator = Some(read(offset, len as usize)?);
                    continue;
                }
                _ if flags & IS_REQUIRED != 0 => {
                    return Err(Error::unsupported(name, format!("metadata item {item}")));
                }
                _ => {}
            }
            places.locator_room = places.locator_room.max(end.next_multiple_of(PAGE));
        }
        let parameters = parameters.ok_or_else(|| corrupt("its file parameters are missing"))?;
        let flags = le32(&parameters, 4);
        places.table = table;
        let metadata = Metadata {
            block_size: le32(&parameters, 0),
            fixed: flags & LEAVE_ALLOCATED != 0,
            has_parent: flags & HAS_PARENT != 0,
            size: size.ok_or_else(|| corrupt("the size of its disk is missing"))?,
            id,
            logical_sector: logical.ok_or_else(|| corrupt("its sector size is missing"))?,
            physical_sector: physical.unwrap_or(4096),
            locator: match locator {
                Some(bytes) if flags & HAS_PARENT != 0 => parse_locator(&bytes, name)?,
                _ => Vec::new(),
            },
        };
        if flags & !(LEAVE_ALLOCATED | HAS_PARENT) != 0 {
            return Err(Error::unsupported(name, format!("file parameters {flags:#x}")));
        }
        metadata.check(name)?;
        Ok((metadata, places))
    }

    fn check(&self, name: &str) -> Result<()> {
        let block = self.block_size;
        if !block.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block) {
            return Err(Error::corrupt(name, format!("it has a block size of {block} bytes")));
        }
        for sector in [self.logical_sector, self.physical_sector] {
            if sector != 512 && sector != 4096 {
                return Err(Error::corrupt(name, format!("it has sectors of {sector} bytes")));
            }
        }
        if self.size > MAX_SIZE || !self.size.is_multiple_of(self.logical_sector.into()) {
            return Err(Error::corrupt(name, "the size of its disk is invalid"));
        }
        if self.has_parent && self.locator.is_empty() {
            return Err(Error::corrupt(name, "it does not name its parent"));
        }
        Ok(())
    }

    fn parameters(&self) -> [u8; 8] {
        let flags =
            if self.fixed { LEAVE_ALLOCATED } else { 0 } | if self.has_parent { HAS_PARENT } else { 0 };
        (u64::from(self.block_size) | u64::from(flags) << 32).to_le_bytes()
    }

    /// The contents of a new region, as far as they are not zero.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let locator = if self.has_parent { locator_bytes(&self.locator)? } else { Vec::new() };
        let items = [
            (FILE_PARAMETERS, IS_REQUIRED, self.parameters().to_vec()),
            (DISK_SIZE, IS_REQUIRED | IS_VIRTUAL_DISK, self.size.to_le_bytes().to_vec()),
            (DISK_ID, IS_REQUIRED | IS_VIRTUAL_DISK, self.id.to_bytes_le().to_vec()),
            (LOGICAL_SECTOR, IS_REQUIRED | IS_VIRTUAL_DISK, self.logical_sector.to_le_bytes().to_vec()),
            (PHYSICAL_SECTOR, IS_REQUIRED | IS_VIRTUAL_DISK, self.physical_sector.to_le_bytes().to_vec()),
            (PARENT_LOCATOR, IS_REQUIRED, locator),
        ];
        let count = items.len() - usize::from(!self.has_parent);
        let mut b = vec![0; TABLE_BYTES as usize];
        put(&mut b, 0, b"metadata");
        put(&mut b, 10, &(count as u16).to_le_bytes());
        for (n, (item, flags, value)) in items.iter().take(count).enumerate() {
            if *item == PARENT_LOCATOR {
                b.resize(b.len().next_multiple_of(PAGE as usize), 0);
            }
            let entry = entry(*item, b.len() as u64, value.len(), *flags);
            put(&mut b, 32 + n * 32, &entry);
            b.extend(value);
        }
        Ok(b)
    }

    /// What changes in the region if the disk's size becomes that of `self`.
    pub fn size_patch(&self, places: &Places) -> Patch {
        (places.size, self.size.to_le_bytes().to_vec())
    }

    /// What changes in the region if the parent becomes that of `self`.
    pub fn parent_patches(&self, places: &Places, region: Region, name: &str) -> Result<Vec<Patch>> {
        let mut patches = vec![(places.parameters, self.parameters().to_vec())];
        if self.has_parent {
            let bytes = locator_bytes(&self.locator)?;
            let end = places.locator_room + bytes.len() as u64;
            if end > region.len || places.locator_entry + 32 > TABLE_BYTES {
                return Err(Error::unsupported(name, "another parent (its metadata region is full)"));
            }
            let entry = entry(PARENT_LOCATOR, places.locator_room, bytes.len(), IS_REQUIRED);
            patches.push((places.locator_entry, entry));
            patches.push((places.locator_room, bytes));
            if !places.locator_exists {
                patches.push((10, (places.entries + 1).to_le_bytes().to_vec()));
            }
        } else if places.locator_exists {
            // The last entry takes its place.
            let last = 32 + u64::from(places.entries - 1) * 32;
            let moved = places.table[last as usize..last as usize + 32].to_vec();
            patches.push((places.locator_entry, moved));
            patches.push((last, vec![0; 32]));
            patches.push((10, (places.entries - 1).to_le_bytes().to_vec()));
        }
        Ok(patches)
    }

    /// A value of the parent locator.
    pub fn locator_value(&self, key: &str) -> Option<&str> {
        self.locator.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }
}

fn entry(item: Uuid, offset: u64, len: usize, flags: u32) -> Vec<u8> {
    let mut b = vec![0; 32];
    put(&mut b, 0, &item.to_bytes_le());
    put(&mut b, 16, &(offset as u32).to_le_bytes());
    put(&mut b, 20, &(len as u32).to_le_bytes());
    put(&mut b, 24, &flags.to_le_bytes());
    b
}

fn parse_locator(bytes: &[u8], name: &str) -> Result<Vec<(String, String)>> {
    let corrupt = || Error::corrupt(name, "its parent locator is damaged");
    if bytes.len() < 20 {
        return Err(corrupt());
    }
    let kind = guid(bytes, 0);
    if kind != LOCATOR_TYPE {
        return Err(Error::unsupported(name, format!("parent locator type {kind}")));
    }
    let count = usize::from(le16(bytes, 18));
    let text = |offset: u32, len: u16| -> Option<String> {
        let part = bytes.get(offset as usize..)?.get(..len.into())?;
        let units: Vec<u16> = part.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect();
        Some(String::from_utf16(&units).ok()?.trim_end_matches('\0').to_owned())
    };
    let mut out = Vec::new();
    for n in 0..count {
        let e = bytes.get(20 + n * 12..32 + n * 12).ok_or_else(corrupt)?;
        let key = text(le32(e, 0), le16(e, 8)).ok_or_else(corrupt)?;
        let value = text(le32(e, 4), le16(e, 10)).ok_or_else(corrupt)?;
        out.push((key, value));
    }
    Ok(out)
}

fn locator_bytes(pairs: &[(String, String)]) -> Result<Vec<u8>> {
    let mut b = vec![0; 20 + pairs.len() * 12];
    put(&mut b, 0, &LOCATOR_TYPE.to_bytes_le());
    put(&mut b, 18, &(pairs.len() as u16).to_le_bytes());
    for (n, (key, value)) in pairs.iter().enumerate() {
        for (text, offset_at, len_at) in [(key, 0, 8), (value, 4, 10)] {
            let bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let len = u16::try_from(bytes.len())
                .map_err(|_| Error::InvalidOption("The path of the parent is too long for a VHDX".into()))?;
            let at = 20 + n * 12;
            let offset = b.len() as u32;
            put(&mut b, at + offset_at, &offset.to_le_bytes());
            put(&mut b, at + len_at, &len.to_le_bytes());
            b.extend(bytes);
        }
    }
    match b.len() <= MAX_LOCATOR as usize {
        true => Ok(b),
        false => Err(Error::InvalidOption("The path of the parent is too long for a VHDX".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_survives_a_round_trip() {
        let metadata = Metadata {
            block_size: 2 << 20,
            fixed: false,
            has_parent: true,
            size: 10 << 20,
            id: Uuid::new_v4(),
            logical_sector: 512,
            physical_sector: 4096,
            locator: vec![("relative_path".into(), ".\\bäse.vhdx".into())],
        };
        let bytes = metadata.to_bytes().unwrap();
        let region = Region { offset: MIB, len: MIB };
        let read = |at: u64, len: usize| {
            let mut all = bytes.clone();
            all.resize(MIB as usize, 0);
            Ok(all[at as usize..at as usize + len].to_vec())
        };
        let (parsed, _) = Metadata::parse(region, "x", read).unwrap();
        assert_eq!(parsed, metadata);
        assert!(locator_bytes(&[("k".into(), "v".repeat(40_000))]).is_err());
    }
}
