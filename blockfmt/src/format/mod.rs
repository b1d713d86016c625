//! The formats.

pub mod raw;

use crate::disk::CreateOptions;
use crate::{Error, Layer, Result, Storage};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A format of disk images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Format {
    /// The bytes of the disk, nothing else.
    Raw,
}

impl Format {
    /// Every format.
    pub const ALL: &'static [Format] = &[Format::Raw];

    /// The name that QEMU and this crate use.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        let found = Format::ALL.iter().find(|f| f.name() == name);
        found.copied().ok_or_else(|| Error::unsupported("The image", format!("format {name:?}")))
    }
}

/// How a layer is opened; see [`open_layer`].
#[derive(Clone, Debug, Default)]
pub struct LayerOptions {
    /// Refuse writes and leave the image untouched.
    pub read_only: bool,
}

/// Opens a layer of `format` on `storage`.
pub(crate) fn open_layer(
    format: Format,
    storage: Arc<dyn Storage>,
    options: &LayerOptions,
) -> Result<Arc<dyn Layer>> {
    match format {
        Format::Raw => Ok(Arc::new(raw::Raw::open(storage, options)?)),
    }
}

/// Writes an empty image onto an empty storage.
pub(crate) fn create_layer(storage: Arc<dyn Storage>, options: &CreateOptions) -> Result<()> {
    match options.format {
        Format::Raw => raw::create(&storage, options),
    }
}
