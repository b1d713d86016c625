//! How a differencing disk names its parent.
//!
//! Up to eight parent locators hold the name: `W2ru` relative to the child and `W2ku` absolute, both UTF-16
//! (little-endian). The header repeats the last part of the name in UTF-16 (big-endian). Parents are VHDs
//! by the specification; the format of any other parent is kept in a locator of our own, which other
//! readers skip.

use super::footer::{Footer, Header, SECTOR, be32, be64, put, timestamp_of_nanos};
use crate::disk::as_path;
use crate::storage::{FileOptions, FileStorage, LockMode};
use crate::{BackingRef, Error, Format, Result, Storage};
use std::path::Path;
use std::sync::Arc;

const LOCATORS: usize = 576;
const NAME: usize = 64;
const NAME_BYTES: usize = 512;
const RELATIVE: &[u8; 4] = b"W2ru";
const ABSOLUTE: &[u8; 4] = b"W2ku";
const FORMAT: &[u8; 4] = b"Nfmt";
/// Longest name that is read, in bytes.
const MAX_NAME: u32 = 8192;

fn locator(index: usize) -> usize {
    LOCATORS + index * 24
}

/// The end of the space that locators take.
pub(super) fn end(header: &Header, name: &str) -> Result<u64> {
    let mut end = 0;
    for at in (0..8).map(locator) {
        let (code, len, offset) = (&header.0[at..at + 4], be32(&header.0, at + 8), be64(&header.0, at + 16));
        if code != [0; 4] && len != 0 {
            if len > MAX_NAME || offset > i64::MAX as u64 / 2 {
                return Err(Error::corrupt(name, "a parent locator is out of bounds"));
            }
            end = end.max(offset + u64::from(len));
        }
    }
    Ok(end)
}

/// Reads the name of the parent.
pub(super) fn read(storage: &Arc<dyn Storage>, header: &Header) -> Result<BackingRef> {
    let find = |wanted: &[u8; 4]| -> Result<Option<Vec<u8>>> {
        for at in (0..8).map(locator) {
            let (len, offset) = (be32(&header.0, at + 8), be64(&header.0, at + 16));
            if header.0[at..at + 4] == wanted[..] && (1..=MAX_NAME).contains(&len) {
                let mut bytes = vec![0; len as usize];
                storage.read_at(&mut bytes, offset)?;
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    };
    let decode = |bytes: Vec<u8>| {
        let units: Vec<u16> = bytes.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect();
        String::from_utf16(&units).ok().map(|s| s.trim_end_matches('\0').replace('\\', "/"))
    };
    let relative = find(RELATIVE)?.and_then(decode);
    let absolute = find(ABSOLUTE)?.and_then(decode).filter(|p| p.starts_with('/') && !p.starts_with("//"));
    let path = match (relative, absolute) {
        (Some(path), _) if !path.is_empty() => as_path(path.strip_prefix("./").unwrap_or(&path).to_owned()),
        (_, Some(path)) => path,
        _ => short_name(header),
    };
    if path.is_empty() || path.contains('\0') {
        return Err(Error::corrupt(storage.name(), "it does not name its parent"));
    }
    let format = match find(FORMAT)? {
        Some(bytes) => String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned(),
        None => Format::Vhd.name().to_owned(),
    };
    Ok(BackingRef { path, format: Some(format) })
}

fn short_name(header: &Header) -> String {
    let name = header.0[NAME..NAME + NAME_BYTES].chunks_exact(2);
    let units: Vec<u16> = name.map(|c| u16::from_be_bytes([c[0], c[1]])).take_while(|u| *u != 0).collect();
    let name = String::from_utf16_lossy(&units).replace('\\', "/");
    name.rsplit('/').next().unwrap_or_default().to_owned()
}

/// Puts the name of a parent into the header, with the locators' data at `offset`, which is written here.
/// Returns the end of that data.
pub(super) fn write(
    storage: &Arc<dyn Storage>,
    header: &mut Header,
    backing: &BackingRef,
    offset: u64,
) -> Result<u64> {
    if backing.path.contains(['\\', '\0']) {
        return Err(Error::InvalidOption("A VHD cannot name a parent with a backslash in its path".into()));
    }
    clear(header);
    let full = Path::new(&storage.name()).parent().unwrap_or(Path::new("")).join(&backing.path);
    let full = std::path::absolute(&full).unwrap_or(full);
    let format: Format = backing.format.as_deref().unwrap_or(Format::Vhd.name()).parse()?;
    let options = FileOptions { read_only: true, lock: LockMode::None, ..FileOptions::default() };
    let parent: Arc<dyn Storage> = Arc::new(FileStorage::open(&full, options)?);
    if format == Format::Vhd {
        put(&mut header.0, 40, &uuid(&parent)?);
    }
    let modified = parent.modified().map_or(0, timestamp_of_nanos);
    put(&mut header.0, 56, &modified.to_be_bytes());
    let short = full.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let short: Vec<u8> = short.encode_utf16().flat_map(u16::to_be_bytes).take(NAME_BYTES - 2).collect();
    put(&mut header.0, NAME, &short);

    let utf16 = |s: &str| s.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let mut parts = Vec::new();
    if !Path::new(&backing.path).is_absolute() {
        let path = backing.path.replace('/', "\\");
        let dots = if path.starts_with("..\\") || path.starts_with(".\\") { "" } else { ".\\" };
        parts.push((RELATIVE, utf16(&format!("{dots}{path}"))));
    }
    parts.push((ABSOLUTE, utf16(&full.to_string_lossy())));
    if format != Format::Vhd {
        parts.push((FORMAT, format.name().as_bytes().to_vec()));
    }
    let mut next = offset;
    for (index, (code, data)) in parts.iter().enumerate() {
        if data.len() > MAX_NAME as usize {
            return Err(Error::InvalidOption("The path of the parent is too long for a VHD".into()));
        }
        let space = (data.len() as u64).next_multiple_of(SECTOR);
        let mut padded = data.clone();
        padded.resize(space as usize, 0);
        storage.write_at(&padded, next)?;
        let at = locator(index);
        put(&mut header.0, at, *code);
        // In bytes: the specification says sectors, its author's own implementation disagrees.
        put(&mut header.0, at + 4, &(space as u32).to_be_bytes());
        put(&mut header.0, at + 8, &(data.len() as u32).to_be_bytes());
        put(&mut header.0, at + 16, &next.to_be_bytes());
        next += space;
    }
    header.seal();
    Ok(next)
}

/// Removes the name of the parent.
pub(super) fn clear(header: &mut Header) {
    header.0[40..60].fill(0);
    header.0[NAME..LOCATORS + 8 * 24].fill(0);
    header.seal();
}

/// The UUID in the footer of an image.
fn uuid(storage: &Arc<dyn Storage>) -> Result<[u8; 16]> {
    let len = storage.length()?;
    let mut bytes = [0; 512];
    for offset in [len.saturating_sub(SECTOR), 0] {
        storage.read_at(&mut bytes, offset)?;
        if let Some(footer) = Footer::parse(&bytes) {
            return Ok(footer.uuid());
        }
    }
    Err(Error::corrupt(storage.name(), "it has no VHD footer"))
}
