//! How a differencing disk names its parent.
//!
//! The parent locator holds pairs of text: paths (`relative_path` and `absolute_win32_path`) and, as
//! `parent_linkage`, the identifier that the parent's contents had. Parents are VHDX images by the
//! specification; for any other, format and time of modification are kept in pairs of our own, which other
//! readers skip.

use super::header::Headers;
use super::metadata::Metadata;
use crate::disk::as_path;
use crate::storage::{FileOptions, FileStorage, LockMode};
use crate::{BackingRef, Error, Format, Layer, Result, Storage};
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;

const RELATIVE: &str = "relative_path";
const ABSOLUTE: &str = "absolute_win32_path";
const LINKAGES: [&str; 2] = ["parent_linkage", "parent_linkage2"];
const FORMAT: &str = "nacre_format";
const MODIFIED: &str = "nacre_modified";

/// The parent that an image names.
pub(super) fn reference(metadata: &Metadata, name: &str) -> Result<BackingRef> {
    let value = |key| metadata.locator_value(key).map(|v| v.replace('\\', "/"));
    let absolute = value(ABSOLUTE).filter(|p| p.starts_with('/') && !p.starts_with("//"));
    let path = match (value(RELATIVE), absolute) {
        (Some(path), _) if !path.is_empty() => as_path(path.strip_prefix("./").unwrap_or(&path).to_owned()),
        (_, Some(path)) => path,
        // A path of another operating system: the parent may lie beside the child.
        _ => value(ABSOLUTE).and_then(|p| p.rsplit('/').next().map(str::to_owned)).unwrap_or_default(),
    };
    if path.is_empty() || path.contains('\0') {
        return Err(Error::corrupt(name, "it does not name its parent"));
    }
    let format = metadata.locator_value(FORMAT).unwrap_or(Format::Vhdx.name());
    Ok(BackingRef { path, format: Some(format.to_owned()) })
}

/// The parent locator of an image at `child` for the parent `backing`, which must exist.
pub(super) fn locator(child: &str, backing: &BackingRef) -> Result<Vec<(String, String)>> {
    if backing.path.contains(['\\', '\0']) {
        return Err(Error::InvalidOption("A VHDX cannot name a parent with a backslash in its path".into()));
    }
    let full = Path::new(child).parent().unwrap_or(Path::new("")).join(&backing.path);
    let full = std::path::absolute(&full).unwrap_or(full);
    let format: Format = backing.format.as_deref().unwrap_or(Format::Vhdx.name()).parse()?;
    let options = FileOptions { read_only: true, lock: LockMode::None, ..FileOptions::default() };
    let parent: Arc<dyn Storage> = Arc::new(FileStorage::open(&full, options)?);
    let id = match format {
        Format::Vhdx => Headers::read(&parent, &parent.name())?.current.data_write,
        _ => Uuid::nil(),
    };
    let mut pairs = vec![(LINKAGES[0].to_owned(), linkage(id))];
    if !Path::new(&backing.path).is_absolute() {
        let path = backing.path.replace('/', "\\");
        let dots = if path.starts_with("..\\") || path.starts_with(".\\") { "" } else { ".\\" };
        pairs.push((RELATIVE.into(), format!("{dots}{path}")));
    }
    pairs.push((ABSOLUTE.into(), full.to_string_lossy().replace('/', "\\")));
    if format != Format::Vhdx {
        pairs.push((FORMAT.into(), format.name().into()));
        pairs.push((MODIFIED.into(), modified(&*parent)));
    }
    Ok(pairs)
}

fn linkage(id: Uuid) -> String {
    id.braced().to_string()
}

fn modified(storage: &dyn Storage) -> String {
    storage.modified().unwrap_or_default().to_string()
}

/// Whether `below` is not what the locator expects.
pub(super) fn changed(metadata: &Metadata, below: &dyn Layer) -> bool {
    if below.format() == Format::Vhdx {
        let id = below.identity().map(Uuid::from_bytes);
        let names = |key: &&str| metadata.locator_value(key).and_then(|v| Uuid::try_parse(v).ok());
        return !LINKAGES.iter().filter_map(names).any(|expected| expected.is_nil() || Some(expected) == id);
    }
    let expected: i128 = metadata.locator_value(MODIFIED).and_then(|v| v.parse().ok()).unwrap_or(0);
    // A copy may have an older time; a write makes it newer.
    expected != 0 && below.storage().modified().is_some_and(|m| m > expected)
}

/// The locator with the present state of `below` as the expected one, or with any as expected.
pub(super) fn noted(metadata: &Metadata, below: Option<&dyn Layer>) -> Vec<(String, String)> {
    let mut pairs: Vec<_> =
        metadata.locator.iter().filter(|(key, _)| key != LINKAGES[1] && key != MODIFIED).cloned().collect();
    let is_vhdx = |below: &&dyn Layer| below.format() == Format::Vhdx;
    let id = below.filter(is_vhdx).and_then(|below| below.identity()).unwrap_or_default();
    pairs.retain(|(key, _)| key != LINKAGES[0]);
    pairs.insert(0, (LINKAGES[0].into(), linkage(Uuid::from_bytes(id))));
    if let Some(below) = below.filter(|below| !is_vhdx(below)) {
        pairs.push((MODIFIED.into(), modified(&**below.storage())));
    }
    pairs
}
