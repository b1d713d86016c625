//! What an image knows of its parent, to notice when that changes.
//!
//! The specification has nothing for this. A header extension of our own ([`extension::PARENT`]), which other programs
//! skip and keep, holds, big-endian:
//!
//! | bytes | |
//! |---|---|
//! | 0-7 | length of the parent's file |
//! | 8-15 | time of its last modification, in nanoseconds since 1970 |
//! | 16-23 | inode number of the image itself |
//! | 24-27 | CRC-32C of the parent's name |
//! | 28-31 | 0 |
//!
//! Under another name, given by a program that does not know the extension, the parent is another one, of which nothing
//! is known. In another inode the image is a copy, and so may the parent be: then its time tells nothing.

use super::header::{Header, be32, be64, extension};
use crate::disk::resolve;
use crate::storage::FileId;
use crate::{Layer, Storage};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    length: u64,
    modified: u64,
    child: u64,
    name: u32,
}

impl Record {
    /// `None` if one of the two is no regular file, whose time would tell nothing.
    fn new(
        child: &Arc<dyn Storage>,
        name: &str,
        parent: FileId,
        length: u64,
        modified: i128,
    ) -> Option<Self> {
        let regular = |id: FileId| (id.inode != 0).then_some(id.inode);
        regular(parent)?;
        Some(Record {
            length,
            modified: u64::try_from(modified).ok()?,
            child: regular(child.file_id()?)?,
            name: crc32c::crc32c(name.as_bytes()),
        })
    }

    /// What is true of an open parent now.
    fn of(child: &Arc<dyn Storage>, name: &str, parent: &Arc<dyn Storage>) -> Option<Self> {
        Self::new(child, name, parent.file_id()?, parent.len().ok()?, parent.modified()?)
    }

    fn read(header: &Header) -> Option<Self> {
        let data = header.extension(extension::PARENT).filter(|data| data.len() >= 32)?;
        Some(Record {
            length: be64(data, 0),
            modified: be64(data, 8),
            child: be64(data, 16),
            name: be32(data, 24),
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(32);
        for number in [self.length, self.modified, self.child] {
            out.extend_from_slice(&number.to_be_bytes());
        }
        out.extend_from_slice(&self.name.to_be_bytes());
        out.resize(32, 0);
        out
    }
}

/// The extension of an image for the file that it names as its parent; `None` if there is no such file yet.
pub(super) fn of_file(child: &Arc<dyn Storage>, name: &str) -> Option<Vec<u8>> {
    child.file_id()?; // names are relative to files only
    let image = child.name();
    let meta = std::fs::metadata(resolve(&image, name, Path::new(&image)).ok()?).ok()?;
    let modified = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
    Some(Record::new(child, name, FileId::of(&meta), meta.len(), modified)?.encode())
}

/// The extension of an image for its open parent.
pub(super) fn of_layer(child: &Arc<dyn Storage>, header: &Header, below: &dyn Layer) -> Option<Vec<u8>> {
    Some(Record::of(child, header.backing.as_deref()?, below.storage())?.encode())
}

/// Whether the open parent is not what the image knows of it.
pub(super) fn changed(child: &Arc<dyn Storage>, header: &Header, below: &dyn Layer) -> bool {
    let now = header.backing.as_deref().and_then(|name| Record::of(child, name, below.storage()));
    match (Record::read(header), now) {
        (Some(known), Some(now)) if known.name == now.name => {
            // A crash, or a file system with coarser times, may make it older; a write makes it newer.
            known.length != now.length || (known.child == now.child && now.modified > known.modified)
        }
        _ => false,
    }
}
