//! Creation.

use super::header::{Header, autoclear, compatible, extension, incompatible};
use super::refcount::write_entry;
use super::{Compression, Qcow2, parent};
use crate::crypt::{self, LuksOptions};
use crate::disk::{CreateOptions, Preallocation};
use crate::format::LayerOptions;
use crate::{Below, Error, Layer, Result, Storage};
use std::sync::Arc;

/// Options of new qcow2 images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Options {
    /// 3 (the default), or 2 for readers from before 2012.
    pub version: u32,
    /// Cluster size in bytes, a power of two from 512 to 2 MiB; 64 KiB if nothing is said, but see
    /// [`overlay`](Self::overlay).
    pub cluster_size: Option<u64>,
    /// Width of refcounts in bits, a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// How clusters are compressed when they are.
    pub compression: Compression,
    /// Whether L2 entries describe subclusters, 32 of each cluster, which QEMU can read since version 5.2. No if nothing
    /// is said, but see [`overlay`](Self::overlay).
    pub extended_l2: Option<bool>,
    /// Whether writers may postpone refcount updates.
    pub lazy_refcounts: bool,
    /// Name of an external data file, relative to the image.
    pub data_file: Option<String>,
    /// Whether the external data file is a raw image of the disk.
    pub data_file_raw: bool,
    /// How payload is encrypted, if it is. The passphrase is that of [`CreateOptions::secret`].
    pub encryption: Option<LuksOptions>,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Qcow2Options {
            version: 3,
            cluster_size: None,
            refcount_bits: 16,
            compression: Compression::Zlib,
            extended_l2: None,
            lazy_refcounts: false,
            data_file: None,
            data_file_raw: false,
            encryption: None,
        }
    }
}

/// Cluster size of overlays in bytes: their subclusters are pages, and their L2 tables as large as those of images with
/// clusters of half the size and no subclusters.
const OVERLAY_CLUSTER: u64 = 128 << 10;

impl Qcow2Options {
    /// The same options for an image that takes the writes of a disk from now on, on top of the images that have its
    /// contents: where they say nothing of it, clusters of 128 KiB with subclusters of 4 KiB. A write to a cluster that
    /// such an image does not hold yet copies nothing from below, unless it covers a subcluster in part.
    ///
    /// Options that name a cluster size, or exclude subclusters by `extended_l2` or the version, stay as they are.
    pub fn overlay(mut self) -> Self {
        if self.version >= 3 && self.cluster_size.is_none() && self.extended_l2 != Some(false) {
            (self.cluster_size, self.extended_l2) = (Some(OVERLAY_CLUSTER), Some(true));
        }
        self
    }

    /// The cluster size in bytes.
    pub(crate) fn cluster(&self) -> u64 {
        self.cluster_size.unwrap_or(64 << 10)
    }

    /// Whether clusters have subclusters.
    pub(crate) fn subclusters(&self) -> bool {
        self.extended_l2.unwrap_or(false)
    }

    fn check(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::InvalidOption(what.into()));
        let (cluster, extended_l2) = (self.cluster(), self.subclusters());
        if !(512..=2 << 20).contains(&cluster) || !cluster.is_power_of_two() {
            return bad("The cluster size is a power of two from 512 to 2M");
        }
        if !(1..=64).contains(&self.refcount_bits) || !self.refcount_bits.is_power_of_two() {
            return bad("The refcount width is a power of two from 1 to 64");
        }
        if extended_l2 && cluster < 16384 {
            return bad("Extended L2 entries need clusters of at least 16k");
        }
        if self.data_file_raw && self.data_file.is_none() {
            return bad("A raw external data file needs an external data file");
        }
        match self.version {
            3 => Ok(()),
            2 if self.refcount_bits != 16
                || extended_l2
                || self.lazy_refcounts
                || self.compression != Compression::Zlib
                || self.data_file.is_some() =>
            {
                bad("Version 2 (compat=0.10) has none of the newer features")
            }
            2 => Ok(()),
            _ => bad("The version is 2 (compat=0.10) or 3 (compat=1.1)"),
        }
    }
}

/// Writes an empty image.
pub(crate) fn create(
    storage: Arc<dyn Storage>,
    data: Option<Arc<dyn Storage>>,
    options: &CreateOptions,
) -> Result<()> {
    let o = &options.qcow2;
    o.check()?;
    if o.data_file_raw && options.backing.is_some() {
        return Err(Error::InvalidOption("A raw external data file excludes a backing file".into()));
    }
    if options.backing.is_some() && options.preallocation != Preallocation::Off && !o.subclusters() {
        let what = "Only an image with extended_l2=on can be preallocated without hiding its backing file";
        return Err(Error::InvalidOption(what.into()));
    }
    if o.encryption.is_some() && (o.data_file_raw || options.preallocation != Preallocation::Off) {
        let what = "An encrypted image can be neither preallocated nor have a raw external data file";
        return Err(Error::InvalidOption(what.into()));
    }
    let luks = match (&o.encryption, &options.secret) {
        (Some(luks), Some(secret)) => Some(crypt::format(luks, secret)?),
        (Some(_), None) => return Err(Error::SecretNeeded(storage.name())),
        (None, _) => None,
    };
    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    let cluster = o.cluster();
    let mut header = Header {
        version: o.version,
        cluster_bits: cluster.trailing_zeros(),
        size: 0,
        crypt_method: 0,
        l1_size: 0,
        l1_offset: 0,
        reftable_offset: cluster,
        reftable_clusters: 1,
        snapshot_count: 0,
        snapshots_offset: 0,
        incompatible: flag(o.compression != Compression::Zlib, incompatible::COMPRESSION)
            | flag(o.subclusters(), incompatible::EXTENDED_L2)
            | flag(o.data_file.is_some(), incompatible::DATA_FILE),
        compatible: flag(o.lazy_refcounts, compatible::LAZY_REFCOUNTS),
        autoclear: flag(o.data_file_raw, autoclear::RAW_DATA),
        refcount_order: o.refcount_bits.trailing_zeros(),
        compression: o.compression,
        backing: None,
        extensions: Vec::new(),
    };
    header.set_backing(options.backing.as_ref())?;
    let parent = options.backing.as_ref().and_then(|backing| parent::of_file(&storage, backing));
    header.set_extension(extension::PARENT, parent);
    header.warn_if_unguarded(&storage.name());
    header.set_extension(extension::DATA_FILE, o.data_file.clone().map(String::into_bytes));
    // Header, refcount table and one refcount block make a valid image of size zero; then it grows.
    let mut block = vec![0; cluster as usize];
    for index in 0..3 {
        write_entry(&mut block, index, header.refcount_order, 1);
    }
    storage.truncate(0)?;
    // A file grows with zeros, which take no space until they are written: an empty clone is a few pages.
    let written = if storage.zero_beyond_end() { 512 } else { cluster as usize };
    storage.truncate(3 * cluster)?;
    storage.write_at(&block[..written], 2 * cluster)?;
    let mut table = vec![0; cluster as usize];
    table[..8].copy_from_slice(&(2 * cluster).to_be_bytes());
    storage.write_at(&table[..written], cluster)?;
    header.write(&storage)?;

    let layer = LayerOptions { data_file: data, ..LayerOptions::default() };
    let image = Qcow2::open(storage, &layer)?;
    if let Some(luks) = luks {
        image.install_luks(&luks)?;
    }
    image.resize_image(options.size, Below::new(&[]))?;
    image.preallocate_from(0, options.preallocation)?;
    image.close()
}

impl Qcow2 {
    /// Puts the LUKS header into an image that holds no payload yet.
    fn install_luks(&self, luks: &[u8]) -> Result<()> {
        let run = self.allocate_metadata((luks.len() as u64).div_ceil(self.p.cluster))?;
        let offset = run.start << self.p.cluster_bits;
        self.storage.write_at(luks, offset)?;
        self.write_back()?;
        let mut header = self.header.lock();
        header.set_luks(offset, luks.len() as u64);
        self.write_header(&mut header)?;
        self.storage.sync()
    }
}
