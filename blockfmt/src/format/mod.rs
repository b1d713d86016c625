//! The formats.

mod blocks;
pub mod check;
pub mod luks;
pub mod qcow2;
pub mod raw;
pub mod vhd;
pub mod vhdx;

use crate::disk::CreateOptions;
use crate::{Error, Layer, Result, Secret, Storage};
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
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// Virtual PC's and Hyper-V's first format (QEMU calls it "vpc").
    #[serde(rename = "vpc")]
    Vhd,
    /// Hyper-V's second format.
    Vhdx,
    /// A raw image encrypted with LUKS, version 1.
    Luks,
}

impl Format {
    /// Every format.
    pub const ALL: &'static [Format] = &[Format::Raw, Format::Qcow2, Format::Vhd, Format::Vhdx, Format::Luks];

    /// The name that QEMU and this crate use.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vhd => "vpc",
            Format::Vhdx => "vhdx",
            Format::Luks => "luks",
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
    /// Takes the names of [`Format::name`] and the file name extension "vhd".
    fn from_str(name: &str) -> Result<Self> {
        let name = if name == "vhd" { Format::Vhd.name() } else { name };
        let found = Format::ALL.iter().find(|f| f.name() == name);
        found.copied().ok_or_else(|| Error::unsupported("The image", format!("format {name:?}")))
    }
}

/// How a layer is opened.
#[derive(Clone, Debug, Default)]
pub struct LayerOptions {
    /// Refuse writes and leave the image untouched.
    pub read_only: bool,
    /// Open even what is marked as corrupt or not closed properly, as it is, to repair it.
    pub repair: bool,
    /// The external data file, for images that have one.
    pub data_file: Option<Arc<dyn Storage>>,
    /// Passphrases to try on encrypted images.
    pub secrets: Vec<Secret>,
}

/// The name of the external data file that an image's header demands, if it does.
pub(crate) fn data_file_name(format: Format, storage: &Arc<dyn Storage>) -> Result<Option<String>> {
    match format {
        Format::Qcow2 => qcow2::data_file_name(storage),
        Format::Raw | Format::Vhd | Format::Vhdx | Format::Luks => Ok(None),
    }
}

/// Opens a layer of `format` on `storage`.
pub(crate) fn open_layer(
    format: Format,
    storage: Arc<dyn Storage>,
    options: &LayerOptions,
) -> Result<Arc<dyn Layer>> {
    match format {
        Format::Raw => Ok(Arc::new(raw::Raw::open(storage, options)?)),
        Format::Qcow2 => Ok(Arc::new(qcow2::Qcow2::open(storage, options)?)),
        Format::Vhd => Ok(Arc::new(vhd::Vhd::open(storage, options)?)),
        Format::Vhdx => Ok(Arc::new(vhdx::Vhdx::open(storage, options)?)),
        Format::Luks => Ok(Arc::new(luks::Luks::open(storage, options)?)),
    }
}

/// Writes an empty image onto an empty storage (and, for formats that have one, an external data file).
pub(crate) fn create_layer(
    storage: Arc<dyn Storage>,
    data_file: Option<Arc<dyn Storage>>,
    options: &CreateOptions,
) -> Result<()> {
    match options.format {
        Format::Raw => raw::create(&storage, options),
        Format::Qcow2 => qcow2::create(storage, data_file, options),
        Format::Vhd => vhd::create(&storage, options),
        Format::Vhdx => vhdx::create(&storage, options),
        Format::Luks => luks::create(&storage, options),
    }
}
