//! Creation of images.

use crate::format::qcow2::Qcow2Options;
use crate::format::vhd::VhdOptions;
use crate::format::vhdx::VhdxOptions;
use crate::storage::{FileOptions, FileStorage, LockMode};
use crate::{BackingRef, Error, Format, LuksOptions, Result, Secret, Storage, format};
use std::fs::File;
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
    /// Options that only qcow2 has.
    pub qcow2: Qcow2Options,
    /// Options that only VHD has.
    pub vhd: VhdOptions,
    /// Options that only VHDX has.
    pub vhdx: VhdxOptions,
    /// Options that only LUKS has.
    pub luks: LuksOptions,
    /// The passphrase of an encrypted image.
    pub secret: Option<Secret>,
}

impl CreateOptions {
    /// An image of `size` bytes with the format's defaults.
    pub fn new(format: Format, size: u64) -> Self {
        CreateOptions {
            format,
            size,
            preallocation: Preallocation::Off,
            backing: None,
            qcow2: Qcow2Options::default(),
            vhd: VhdOptions::default(),
            vhdx: VhdxOptions::default(),
            luks: LuksOptions::default(),
            secret: None,
        }
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

    /// Sets the options that only qcow2 has.
    pub fn qcow2(mut self, qcow2: Qcow2Options) -> Self {
        self.qcow2 = qcow2;
        self
    }

    /// Sets the options that only VHD has.
    pub fn vhd(mut self, vhd: VhdOptions) -> Self {
        self.vhd = vhd;
        self
    }

    /// Sets the options that only VHDX has.
    pub fn vhdx(mut self, vhdx: VhdxOptions) -> Self {
        self.vhdx = vhdx;
        self
    }

    /// Sets the options that only LUKS has.
    pub fn luks(mut self, luks: LuksOptions) -> Self {
        self.luks = luks;
        self
    }

    /// Sets the passphrase of an encrypted image.
    pub fn secret(mut self, secret: Secret) -> Self {
        self.secret = Some(secret);
        self
    }

    /// Creates the file `path`, which must not exist, and makes it an image.
    pub fn create(&self, path: &Path) -> Result<()> {
        let options = FileOptions { create: true, lock: LockMode::Write, ..FileOptions::default() };
        let storage = Arc::new(FileStorage::open(path, options)?);
        let result = self.create_files(storage, path, options).and_then(|()| sync_directory(path));
        if result.is_err() {
            // The error is what matters; a file that cannot be removed is left as it is.
            let _ = std::fs::remove_file(path);
        }
        result
    }

    fn create_files(&self, storage: Arc<dyn Storage>, path: &Path, options: FileOptions) -> Result<()> {
        let data: Option<Arc<dyn Storage>> = match &self.qcow2.data_file {
            Some(name) if self.format == Format::Qcow2 => {
                let path = super::open::resolve(&storage.name(), name, path)?;
                Some(Arc::new(FileStorage::open(&path, options)?))
            }
            _ => None,
        };
        format::create_layer(storage, data, self)
    }

    /// Makes an empty storage an image. It cannot have an external data file.
    pub fn create_on(&self, storage: Arc<dyn Storage>) -> Result<()> {
        format::create_layer(storage, None, self)
    }
}

/// Makes the name of a new file survive a crash.
fn sync_directory(path: &Path) -> Result<()> {
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match File::open(directory).and_then(|directory| directory.sync_all()) {
        // There are file systems that write names in order and know no such request.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result.map_err(|e| Error::io("flush", directory.display().to_string(), e)),
    }
}
