//! Creation of images.

use crate::storage::{FileOptions, FileStorage, LockMode};
use crate::{BackingRef, Format, Result, Storage, format};
use std::path::Path;
use std::sync::Arc;

/// What of a new image is allocated in advance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing (thin).
    #[default]
    Off,
    /// The metadata; data is a hole.
    Metadata,
    /// All space, reserved but not written (thick, zeroed lazily).
    Falloc,
    /// All space, written with zeros (thick, zeroed eagerly).
    Full,
}

/// How an image is created.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The format.
    pub format: Format,
    /// Size of the disk in bytes.
    pub size: u64,
    /// What is allocated in advance.
    pub preallocation: Preallocation,
    /// The parent that the image names. Its existence is not checked.
    pub backing: Option<BackingRef>,
}

impl CreateOptions {
    /// An image of `size` bytes with the format's defaults.
    pub fn new(format: Format, size: u64) -> Self {
        CreateOptions { format, size, preallocation: Preallocation::Off, backing: None }
    }

    /// Sets what is allocated in advance.
    pub fn preallocation(mut self, preallocation: Preallocation) -> Self {
        self.preallocation = preallocation;
        self
    }

    /// Names a parent; a relative path is relative to the new image.
    pub fn backing(mut self, path: impl Into<String>, format: Format) -> Self {
        self.backing = Some(BackingRef { path: path.into(), format: Some(format.name().into()) });
        self
    }

    /// Creates the file `path`, which must not exist, and makes it an image.
    pub fn create(&self, path: &Path) -> Result<()> {
        let options = FileOptions { create: true, lock: LockMode::Write, ..FileOptions::default() };
        let storage = Arc::new(FileStorage::open(path, options)?);
        let result = self.create_on(storage);
        if result.is_err() {
            // The error is what matters; a file that cannot be removed is left as it is.
            let _ = std::fs::remove_file(path);
        }
        result
    }

    /// Makes an empty storage an image.
    pub fn create_on(&self, storage: Arc<dyn Storage>) -> Result<()> {
        format::create_layer(storage, self)
    }
}
