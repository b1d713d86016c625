//! LUKS, version 1: an encrypted raw image.

use super::LayerOptions;
use super::raw::{self, Raw};
use crate::crypt::{self, EncryptedStorage, HEADER_BYTES, LuksHeader};
use crate::disk::{CreateOptions, Preallocation};
use crate::{Below, Error, Extent, Format, Gather, Layer, LayerInfo, Result, Scatter, Storage};
use std::sync::Arc;

/// An encrypted raw image. Space that was never written reads as noise.
#[derive(Debug)]
pub struct Luks {
    storage: Arc<dyn Storage>,
    header: LuksHeader,
    /// The plain text.
    raw: Raw,
    plain: Arc<dyn Storage>,
}

impl Luks {
    /// Opens an image with one of the secrets in `options`.
    pub fn open(storage: Arc<dyn Storage>, options: &LayerOptions) -> Result<Self> {
        let name = storage.name();
        let mut bytes = [0; HEADER_BYTES];
        storage.read_at(&mut bytes, 0)?;
        let header = LuksHeader::parse(&bytes, &name)?;
        if header.payload > storage.length()? {
            return Err(Error::corrupt(name, "it ends before its payload"));
        }
        let cipher = crypt::unlock(&header, &options.secrets, &name, |at, len| {
            let mut bytes = vec![0; len];
            storage.read_at(&mut bytes, at).map(|()| bytes)
        })?;
        let plain: Arc<dyn Storage> =
            Arc::new(EncryptedStorage::new(storage.clone(), header.payload, cipher));
        let raw = Raw::open(plain.clone(), options)?;
        Ok(Luks { storage, header, raw, plain })
    }
}

impl Layer for Luks {
    fn format(&self) -> Format {
        Format::Luks
    }

    fn size(&self) -> u64 {
        self.raw.size()
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn data_file(&self, _file: u32) -> &Arc<dyn Storage> {
        &self.plain
    }

    fn starts_as_zero(&self) -> bool {
        false
    }

    fn read_only(&self) -> bool {
        self.raw.read_only()
    }

    fn info(&self) -> Result<LayerInfo> {
        let data = self.header.describe();
        let format_specific = serde_json::json!({ "type": "luks", "data": data });
        Ok(LayerInfo { format: Format::Luks, format_specific, ..self.raw.info()? })
    }

    fn resolve_read(&self, offset: u64, len: u64) -> Result<Extent> {
        self.raw.resolve_read(offset, len)
    }

    fn read_opaque(&self, dst: Scatter<'_>, offset: u64) -> Result<()> {
        self.raw.read_opaque(dst, offset)
    }

    fn write(&self, src: Gather<'_>, offset: u64, below: Below<'_>) -> Result<()> {
        self.raw.write(src, offset, below)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, below: Below<'_>) -> Result<()> {
        self.raw.write_zeroes(offset, len, unmap, below)
    }

    fn discard(&self, offset: u64, len: u64, below: Below<'_>) -> Result<()> {
        self.raw.discard(offset, len, below)
    }

    fn flush(&self) -> Result<()> {
        self.raw.flush()
    }

    fn resize(&self, size: u64, below: Below<'_>) -> Result<()> {
        if !size.is_multiple_of(crypt::SECTOR) {
            return Err(Error::InvalidOption("The size of a LUKS image is a multiple of 512 bytes".into()));
        }
        let old = self.size();
        if size > old {
            self.plain.zero(old, size - old, false)?;
        }
        self.raw.resize(size, below)
    }
}

/// Makes `storage` a LUKS image.
pub(crate) fn create(storage: &Arc<dyn Storage>, options: &CreateOptions) -> Result<()> {
    if options.backing.is_some() {
        return Err(Error::InvalidOption("A LUKS image cannot have a backing file".into()));
    }
    if !options.size.is_multiple_of(crypt::SECTOR) {
        return Err(Error::InvalidOption("The size of a LUKS image is a multiple of 512 bytes".into()));
    }
    let secret = options.secret.as_ref().ok_or_else(|| Error::SecretNeeded(storage.name()))?;
    let header = crypt::format(&options.luks, secret)?;
    let payload = header.len() as u64;
    storage.truncate(payload + options.size)?;
    match options.preallocation {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => storage
            .allocate(0, payload + options.size)
            .map_err(|e| Error::io("allocate", storage.name(), e))?,
        Preallocation::Full => raw::write_zero_bytes(storage, payload, options.size)?,
    }
    storage.write_at(&header, 0)?;
    storage.sync()
}
