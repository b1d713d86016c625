//! The header and its extensions.

use crate::crypt::HEADER_BYTES;
use crate::{BackingRef, Error, Result, Storage};
use std::sync::Arc;

pub(super) const MAGIC: u32 = 0x5146_49fb;
/// Largest L1 table in bytes; QEMU's limit.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes; QEMU's limit.
pub(super) const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Largest backing file name in bytes.
const MAX_BACKING_NAME: u32 = 1023;
/// The least that disks write as a whole.
const SECTOR: usize = 512;
const V3_LENGTH: u32 = 112;
/// Encryption method: LUKS.
const LUKS: u32 = 2;
/// Largest LUKS header with its key material.
const MAX_LUKS_BYTES: u64 = 16 << 20;

/// Incompatible features: who does not know one must not open the image.
pub(super) mod incompatible {
    pub const DIRTY: u64 = 1;
    pub const CORRUPT: u64 = 1 << 1;
    pub const DATA_FILE: u64 = 1 << 2;
    pub const COMPRESSION: u64 = 1 << 3;
    pub const EXTENDED_L2: u64 = 1 << 4;
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Compatible features: they may be ignored.
pub(super) mod compatible {
    pub const LAZY_REFCOUNTS: u64 = 1;
}

/// Autoclear features: who does not know one clears it before writing.
pub(super) mod autoclear {
    pub const BITMAPS: u64 = 1;
    pub const RAW_DATA: u64 = 1 << 1;
    pub const KNOWN: u64 = BITMAPS | RAW_DATA;
}

/// Types of header extensions.
pub(super) mod extension {
    pub const END: u32 = 0;
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub const BITMAPS: u32 = 0x2385_2875;
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    pub const DATA_FILE: u32 = 0x4441_5441;
    pub const ENCRYPTION: u32 = 0x0537_be77;
    /// Our own, "NACP"; see [`parent`](super::super::parent).
    pub const PARENT: u32 = 0x4e41_4350;
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Raw deflate.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

/// The header, decoded.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    pub size: u64,
    pub crypt_method: u32,
    pub l1_size: u32,
    pub l1_offset: u64,
    pub reftable_offset: u64,
    pub reftable_clusters: u32,
    pub snapshot_count: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub compatible: u64,
    pub autoclear: u64,
    pub refcount_order: u32,
    pub compression: Compression,
    pub backing: Option<String>,
    /// All extensions, in order, known and unknown.
    pub extensions: Vec<(u32, Vec<u8>)>,
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

impl Header {
    /// Reads and checks the header.
    pub fn read(storage: &Arc<dyn Storage>) -> Result<Self> {
        let name = storage.name();
        let mut fixed = [0; 112];
        storage.read_at(&mut fixed, 0)?;
        if be32(&fixed, 0) != MAGIC {
            return Err(Error::wrong_format(name, "qcow2"));
        }
        let version = be32(&fixed, 4);
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(name, format!("qcow2 version {version}")));
        }
        let cluster_bits = be32(&fixed, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Error::unsupported(name, format!("clusters of 2^{cluster_bits} bytes")));
        }
        let v3 = version == 3;
        let length = if v3 { be32(&fixed, 100) } else { 72 };
        if v3 && (length < 104 || length % 8 != 0 || u64::from(length) > 1 << cluster_bits) {
            return Err(Error::corrupt(name, format!("its header claims a length of {length} bytes")));
        }
        let mut bytes = vec![0; 1 << cluster_bits];
        storage.read_at(&mut bytes, 0)?;

        let mut header = Header {
            version,
            cluster_bits,
            size: be64(&bytes, 24),
            crypt_method: be32(&bytes, 32),
            l1_size: be32(&bytes, 36),
            l1_offset: be64(&bytes, 40),
            reftable_offset: be64(&bytes, 48),
            reftable_clusters: be32(&bytes, 56),
            snapshot_count: be32(&bytes, 60),
            snapshots_offset: be64(&bytes, 64),
            incompatible: if v3 { be64(&bytes, 72) } else { 0 },
            compatible: if v3 { be64(&bytes, 80) } else { 0 },
            autoclear: if v3 { be64(&bytes, 88) } else { 0 },
            refcount_order: if v3 { be32(&bytes, 96) } else { 4 },
            compression: Compression::Zlib,
            backing: None,
            extensions: Vec::new(),
        };
        header.read_extensions(&name, &bytes, length as usize)?;
        header.check_features(&name)?;
        if header.incompatible & incompatible::COMPRESSION != 0 {
            header.compression = match bytes[104] {
                _ if length < 105 => return Err(Error::corrupt(name, "its header has no compression type")),
                0 => Compression::Zlib,
                1 => Compression::Zstd,
                other => return Err(Error::unsupported(name, format!("compression type {other}"))),
            };
        }
        let (backing_offset, backing_len) = (be64(&bytes, 8), be32(&bytes, 16));
        if backing_offset != 0 && backing_len != 0 {
            let end = backing_offset.saturating_add(backing_len.into());
            if backing_len > MAX_BACKING_NAME || end > bytes.len() as u64 {
                return Err(Error::corrupt(name, "its backing file name is out of bounds"));
            }
            let raw = &bytes[backing_offset as usize..end as usize];
            let text = std::str::from_utf8(raw).ok().filter(|s| !s.contains('\0'));
            let text =
                text.ok_or_else(|| Error::unsupported(&name, "a backing file name that is not UTF-8"))?;
            header.backing = Some(text.to_owned());
        }
        header.check_tables(&name)?;
        Ok(header)
    }

    fn read_extensions(&mut self, name: &str, bytes: &[u8], mut at: usize) -> Result<()> {
        while at + 8 <= bytes.len() {
            let (kind, len) = (be32(bytes, at), be32(bytes, at + 4) as usize);
            if kind == extension::END {
                return Ok(());
            }
            if len > bytes.len() - at - 8 {
                return Err(Error::corrupt(name, "a header extension is out of bounds"));
            }
            self.extensions.push((kind, bytes[at + 8..at + 8 + len].to_vec()));
            at += 8 + len.next_multiple_of(8);
        }
        Ok(())
    }

    fn check_features(&self, name: &str) -> Result<()> {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            let bit = unknown.trailing_zeros();
            let table = self.extension(extension::FEATURE_NAMES).unwrap_or_default();
            let entry = table.chunks_exact(48).find(|e| e[0] == 0 && u32::from(e[1]) == bit);
            let feature = match entry {
                Some(e) => {
                    String::from_utf8_lossy(e[2..].split(|b| *b == 0).next().unwrap_or(&[])).into_owned()
                }
                None => format!("incompatible feature bit {bit}"),
            };
            return Err(Error::unsupported(name, feature));
        }
        match (self.crypt_method, self.luks_place().is_some()) {
            (0, _) | (LUKS, true) => Ok(()),
            (LUKS, false) => Err(Error::corrupt(name, "its encryption header is missing or out of bounds")),
            (1, _) => Err(Error::unsupported(name, "AES encryption (legacy)")),
            (other, _) => Err(Error::unsupported(name, format!("encryption method {other}"))),
        }
    }

    fn check_tables(&self, name: &str) -> Result<()> {
        let bad = |what: &str| Err(Error::corrupt(name, what));
        let cluster = 1u64 << self.cluster_bits;
        if self.extended_l2() && self.cluster_bits < 14 {
            return bad("its clusters are too small for extended L2 entries");
        }
        if self.refcount_order > 6 {
            return bad("its refcounts are wider than 64 bits");
        }
        if self.size > i64::MAX as u64 {
            return bad("its size is negative");
        }
        if u64::from(self.l1_size) * 8 > MAX_L1_BYTES {
            return bad("its L1 table is too large");
        }
        if u64::from(self.reftable_clusters) << self.cluster_bits > MAX_REFTABLE_BYTES {
            return bad("its refcount table is too large");
        }
        for offset in [self.l1_offset, self.reftable_offset, self.snapshots_offset] {
            if !offset.is_multiple_of(cluster) || offset > 1 << 56 {
                return bad("a table is not aligned to clusters");
            }
        }
        if self.size.div_ceil(1 << self.l1_shift()) > u64::from(self.l1_size) {
            return bad("its L1 table is too small");
        }
        if self.snapshot_count > 65536 {
            return bad("it has too many snapshots");
        }
        Ok(())
    }

    pub fn extended_l2(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    /// Log2 of the number of entries in an L2 table.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2() { 4 } else { 3 }
    }

    /// Log2 of the number of guest bytes under one L1 entry.
    pub fn l1_shift(&self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    pub fn extension(&self, kind: u32) -> Option<&[u8]> {
        self.extensions.iter().find(|(k, _)| *k == kind).map(|(_, data)| data.as_slice())
    }

    /// Offset and length of the LUKS header, if the image is encrypted.
    pub fn luks_place(&self) -> Option<(u64, u64)> {
        let data =
            self.extension(extension::ENCRYPTION).filter(|d| self.crypt_method == LUKS && d.len() >= 16)?;
        let (offset, len) = (be64(data, 0), be64(data, 8));
        let aligned = offset != 0 && offset.is_multiple_of(1 << self.cluster_bits) && offset < 1 << 56;
        (aligned && (HEADER_BYTES as u64..=MAX_LUKS_BYTES).contains(&len)).then_some((offset, len))
    }

    /// Says that payload is encrypted and where the LUKS header is.
    pub fn set_luks(&mut self, offset: u64, len: u64) {
        self.crypt_method = LUKS;
        let data = [offset.to_be_bytes(), len.to_be_bytes()].concat();
        self.set_extension(extension::ENCRYPTION, Some(data));
    }

    /// Sets, replaces or (with `None`) removes an extension.
    pub fn set_extension(&mut self, kind: u32, data: Option<Vec<u8>>) {
        let at = self.extensions.iter().position(|(k, _)| *k == kind);
        match (at, data) {
            (Some(at), Some(data)) => self.extensions[at].1 = data,
            (Some(at), None) => drop(self.extensions.remove(at)),
            (None, Some(data)) => self.extensions.push((kind, data)),
            (None, None) => {}
        }
    }

    pub fn backing_ref(&self) -> Option<BackingRef> {
        let format = self.extension(extension::BACKING_FORMAT);
        let format = format.map(|f| String::from_utf8_lossy(f).into_owned());
        self.backing.clone().map(|path| BackingRef { path, format })
    }

    pub fn set_backing(&mut self, backing: Option<&BackingRef>) -> Result<()> {
        if let Some(b) = backing
            && (b.path.is_empty() || b.path.len() > MAX_BACKING_NAME as usize)
        {
            return Err(Error::InvalidOption("A backing file name has 1 to 1023 bytes".into()));
        }
        self.backing = backing.map(|b| b.path.clone());
        let format = backing.and_then(|b| b.format.clone());
        self.set_extension(extension::BACKING_FORMAT, format.map(String::into_bytes));
        self.set_extension(extension::PARENT, None);
        Ok(())
    }

    /// Names of the features, for those who do not know them.
    fn feature_names() -> Vec<u8> {
        let names: [(u8, u8, &str); 8] = [
            (0, 0, "dirty bit"),
            (0, 1, "corrupt bit"),
            (0, 2, "external data file"),
            (0, 3, "compression type"),
            (0, 4, "extended L2 entries"),
            (1, 0, "lazy refcounts"),
            (2, 0, "bitmaps"),
            (2, 1, "raw external data"),
        ];
        let mut out = Vec::with_capacity(names.len() * 48);
        for (kind, bit, name) in names {
            let mut entry = [0; 48];
            entry[0] = kind;
            entry[1] = bit;
            entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
            out.extend_from_slice(&entry);
        }
        out
    }

    /// Warns if what is known of the parent has no room in the header, so that changes of it will not be noticed.
    pub fn warn_if_unguarded(&self, image: &str) {
        if self.extension(extension::PARENT).is_some() && self.layout().is_ok_and(|(_, guarded)| !guarded) {
            tracing::warn!(
                image,
                "The header has no room for the state of the parent, whose changes will not be noticed; a shorter \
                 name of the parent makes room"
            );
        }
    }

    /// The header cluster: header, extensions, backing file name.
    pub fn encode(&self) -> Result<Vec<u8>> {
        self.layout().map(|(bytes, _)| bytes)
    }

    /// The header cluster, and whether it says what is known of the parent.
    fn layout(&self) -> Result<(Vec<u8>, bool)> {
        let mut out = vec![0; 72];
        out[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        out[4..8].copy_from_slice(&self.version.to_be_bytes());
        out[20..24].copy_from_slice(&self.cluster_bits.to_be_bytes());
        out[24..32].copy_from_slice(&self.size.to_be_bytes());
        out[32..36].copy_from_slice(&self.crypt_method.to_be_bytes());
        out[36..40].copy_from_slice(&self.l1_size.to_be_bytes());
        out[40..48].copy_from_slice(&self.l1_offset.to_be_bytes());
        out[48..56].copy_from_slice(&self.reftable_offset.to_be_bytes());
        out[56..60].copy_from_slice(&self.reftable_clusters.to_be_bytes());
        out[60..64].copy_from_slice(&self.snapshot_count.to_be_bytes());
        out[64..72].copy_from_slice(&self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            out.extend_from_slice(&self.incompatible.to_be_bytes());
            out.extend_from_slice(&self.compatible.to_be_bytes());
            out.extend_from_slice(&self.autoclear.to_be_bytes());
            out.extend_from_slice(&self.refcount_order.to_be_bytes());
            out.extend_from_slice(&V3_LENGTH.to_be_bytes());
            out.extend_from_slice(&[self.compression as u8, 0, 0, 0, 0, 0, 0, 0]);
        }
        let add = |out: &mut Vec<u8>, kind: u32, data: &[u8]| {
            out.extend_from_slice(&kind.to_be_bytes());
            out.extend_from_slice(&(data.len() as u32).to_be_bytes());
            out.extend_from_slice(data);
            out.resize(out.len().next_multiple_of(8), 0);
        };
        let optional = [extension::PARENT, extension::FEATURE_NAMES];
        for (kind, data) in self.extensions.iter().filter(|(kind, _)| !optional.contains(kind)) {
            add(&mut out, *kind, data);
        }
        // A header of one sector changes as a whole or, after a crash, not at all. What one can do without goes in only
        // if it stays like that.
        let end = 8 + self.backing.as_ref().map_or(0, String::len);
        let mut add_optional = |kind, data: &[u8]| {
            let fits = out.len() + 8 + data.len().next_multiple_of(8) + end <= SECTOR;
            if fits {
                add(&mut out, kind, data);
            }
            fits
        };
        let parent = self.extension(extension::PARENT);
        let guarded = parent.is_some_and(|parent| add_optional(extension::PARENT, parent));
        if self.version >= 3 {
            add_optional(extension::FEATURE_NAMES, &Self::feature_names());
        }
        add(&mut out, extension::END, &[]);
        if let Some(backing) = &self.backing {
            let at = out.len() as u64;
            out[8..16].copy_from_slice(&at.to_be_bytes());
            out[16..20].copy_from_slice(&(backing.len() as u32).to_be_bytes());
            out.extend_from_slice(backing.as_bytes());
        }
        if out.len() > 1 << self.cluster_bits {
            return Err(Error::InvalidOption("The header does not fit into a cluster".into()));
        }
        Ok((out, guarded))
    }

    /// Writes the header cluster. The caller flushes.
    pub fn write(&self, storage: &Arc<dyn Storage>) -> Result<()> {
        let mut bytes = self.encode()?;
        // What follows is left: a longer header that was there before needs it until the sector is written.
        bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
        storage.write_at(&bytes, 0)
    }
}
