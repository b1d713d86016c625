//! What an image knows of its parent, to notice when that changes.
//!
//! The specification has nothing for this. A header extension of our own ([`extension::PARENT`]), which other programs
//! skip and keep, holds, big-endian:
//!
//! | bytes | |
//! |---|---|
//! | 0-7 | length of the parent's file, or of the device |
//! | 8-15 | time of its last modification, in nanoseconds since 1970; 0 if it is no regular file, whose time tells nothing |
//! | 16-23 | inode number of the image itself; 0 if it is no regular file |
//! | 24-27 | CRC-32C of the parent's name |
//! | 28-31 | 0 |
//! | 32-47 | length and time of the parent's external data file, if it has one |
//!
//! Under another name, given by a program that does not know the extension, the parent is another one, of which nothing
//! is known. In another inode the image is a copy, and so may the parent be: then its time tells nothing.

use super::data_file_name;
use super::header::{Header, be32, be64, extension};
use crate::disk::resolve;
use crate::storage::{FileOptions, FileStorage, LockMode};
use crate::{BackingRef, Format, Layer, Storage};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

/// What is known of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Facts {
    length: u64,
    /// 0 if unknown.
    modified: u64,
}

impl Facts {
    fn of(storage: &dyn Storage) -> Option<Self> {
        let regular = storage.file_id().is_some_and(|id| id.inode != 0);
        let modified = storage.modified().filter(|_| regular).and_then(|time| u64::try_from(time).ok());
        Some(Facts { length: storage.len().ok()?, modified: modified.unwrap_or(0) })
    }

    fn read(data: &[u8], at: usize) -> Self {
        Facts { length: be64(data, at), modified: be64(data, at + 8) }
    }

    /// What tells that the file became another one, if something does. `timed` says that its time tells something.
    fn changed(self, now: Self, timed: bool) -> Option<&'static str> {
        // A crash, or a file system with coarser times, may make it older; a write makes it newer.
        let written = timed && self.modified != 0 && now.modified > self.modified;
        match self.length != now.length {
            true => Some("has another length than when its child was made"),
            false if written => {
                Some("was modified, or only touched, since its child was made (its length is the same)")
            }
            false => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    file: Facts,
    child: u64,
    name: u32,
    data: Option<Facts>,
}

impl Record {
    fn new(child: &Arc<dyn Storage>, name: &str, file: Facts, data: Option<Facts>) -> Option<Self> {
        Some(Record { file, child: child.file_id()?.inode, name: crc32c::crc32c(name.as_bytes()), data })
    }

    /// What is true of an open parent now.
    fn of(child: &Arc<dyn Storage>, name: &str, parent: &dyn Layer) -> Option<Self> {
        let (file, data) = (parent.storage(), parent.data_file(0));
        // An encrypted image has its payload in another storage, but the same file.
        let external = data.file_id().is_some() && data.file_id() != file.file_id();
        let data = if external { Some(Facts::of(&**data)?) } else { None };
        Self::new(child, name, Facts::of(&**file)?, data)
    }

    fn read(header: &Header) -> Option<Self> {
        let data = header.extension(extension::PARENT).filter(|data| data.len() >= 32)?;
        Some(Record {
            file: Facts::read(data, 0),
            child: be64(data, 16),
            name: be32(data, 24),
            data: (data.len() >= 48).then(|| Facts::read(data, 32)),
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(48);
        for number in [self.file.length, self.file.modified, self.child] {
            out.extend_from_slice(&number.to_be_bytes());
        }
        out.extend_from_slice(&self.name.to_be_bytes());
        out.resize(32, 0);
        if let Some(Facts { length, modified }) = self.data {
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(&modified.to_be_bytes());
        }
        out
    }
}

/// The extension of an image for the file that it names as its parent; `None` if there is no such file yet.
pub(super) fn of_file(child: &Arc<dyn Storage>, parent: &BackingRef) -> Option<Vec<u8>> {
    child.file_id()?; // names are relative to files only
    let image = child.name();
    let path = resolve(&image, &parent.path, Path::new(&image)).ok()?;
    let file = open(&path)?;
    let data = match &parent.format {
        Some(format) if format == Format::Qcow2.name() => data_file_name(&file).ok()?,
        _ => None,
    };
    let data = match data {
        Some(name) => Some(Facts::of(&*open(&resolve(&file.name(), &name, &path).ok()?)?)?),
        None => None,
    };
    Some(Record::new(child, &parent.path, Facts::of(&*file)?, data)?.encode())
}

/// Opens a file or a device to look at it.
fn open(path: &Path) -> Option<Arc<dyn Storage>> {
    let kind = std::fs::metadata(path).ok()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return None; // to open a pipe would wait for its other end
    }
    let options = FileOptions { read_only: true, lock: LockMode::None, ..FileOptions::default() };
    Some(Arc::new(FileStorage::open(path, options).ok()?))
}

/// The extension of an image for its open parent.
pub(super) fn of_layer(child: &Arc<dyn Storage>, header: &Header, below: &dyn Layer) -> Option<Vec<u8>> {
    Some(Record::of(child, header.backing.as_deref()?, below)?.encode())
}

/// What tells that the open parent is not what the image knows of it, if something does.
pub(super) fn changed(child: &Arc<dyn Storage>, header: &Header, below: &dyn Layer) -> Option<&'static str> {
    let now = header.backing.as_deref().and_then(|name| Record::of(child, name, below));
    match (Record::read(header), now) {
        (Some(known), Some(now)) if known.name == now.name => {
            let timed = known.child != 0 && known.child == now.child;
            let data = known.data.and_then(|data| match now.data {
                Some(now) => data.changed(now, timed).map(|_| "has an external data file that changed"),
                None => Some("has its external data file no more"),
            });
            known.file.changed(now.file, timed).or(data)
        }
        _ => None,
    }
}
