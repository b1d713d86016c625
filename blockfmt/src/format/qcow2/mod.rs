//! qcow2, versions 2 and 3.
//!
//! Metadata is kept apart from payload. Reads find their place without a lock (`cache`); writes into
//! clusters that the image owns alone do too. Everything else (allocation, copy-on-write, discard,
//! zeroing) holds a lock on its range of guest clusters (`ranges`), writes payload first and then
//! publishes the new mapping in memory. `flush` brings mappings to disk: refcounts before the entries
//! that rely on them, payload before the entries that point to it, and the release of clusters last.

mod bitmap;
mod cache;
mod check;
mod compressed;
mod create;
mod flush;
mod header;
mod layer;
mod map;
mod parent;
mod preallocate;
mod recording;
mod refcount;
mod resize;
mod snapshot;
mod tables;
mod walk;
mod write;
mod zero;

pub use super::check::{CheckReport, Repair};
pub use compressed::Compressor;
pub use create::Qcow2Options;
pub(crate) use create::create;
pub use header::Compression;
pub(crate) use layer::data_file_name;
pub use recording::BitmapInfo;
pub use snapshot::Snapshot;

use super::LayerOptions;
use crate::crypt::{self, EncryptedStorage, HEADER_BYTES, LuksHeader};
use crate::gate::Gate;
use crate::iobuf::BufferPool;
use crate::ranges::RangeLocks;
use crate::{Error, Result, Storage};
use cache::SliceCache;
use compressed::Compressed;
use flush::Flusher;
use header::{Header, autoclear, incompatible};
use parking_lot::Mutex;
use recording::Recording;
use refcount::Refcounts;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tables::L1;
use write::Reservation;

/// Memory for cached L2 slices.
const CACHE_BYTES: u64 = 32 << 20;
/// Largest slice of an L2 table that is cached as a unit.
const SLICE_BYTES: u64 = 4096;
/// Number of cluster reservations; threads are spread over them.
const RESERVATIONS: usize = 8;

/// Numbers that follow from the header and never change while the image is open.
#[derive(Clone, Copy, Debug)]
struct Params {
    version: u32,
    cluster_bits: u32,
    /// Bytes in a cluster.
    cluster: u64,
    /// Log2 of the entries of an L2 table.
    l2_bits: u32,
    /// Whether L2 entries have subclusters.
    extended: bool,
    /// Log2 of the bytes in the smallest mapped unit: a subcluster or a cluster.
    unit_bits: u32,
    /// Entries in a cached slice.
    slice_entries: u64,
}

impl Params {
    fn new(header: &Header) -> Self {
        let extended = header.extended_l2();
        let cluster = 1u64 << header.cluster_bits;
        let entry_bytes = if extended { 16 } else { 8 };
        Params {
            version: header.version,
            cluster_bits: header.cluster_bits,
            cluster,
            l2_bits: header.l2_bits(),
            extended,
            unit_bits: header.cluster_bits - if extended { 5 } else { 0 },
            slice_entries: SLICE_BYTES.min(cluster) / entry_bytes,
        }
    }

    fn slice_words(&self) -> usize {
        (self.slice_entries * if self.extended { 2 } else { 1 }) as usize
    }
}

/// A qcow2 image.
#[derive(Debug)]
pub struct Qcow2 {
    storage: Arc<dyn Storage>,
    /// The external data file.
    data: Option<Arc<dyn Storage>>,
    /// The plain text, if payload is encrypted, and the facts about that.
    plain: Option<(Arc<dyn Storage>, serde_json::Value)>,
    name: String,
    read_only: bool,
    p: Params,
    size: AtomicU64,
    header: Mutex<Header>,
    l1: L1,
    cache: SliceCache,
    gate: Gate<()>,
    ranges: RangeLocks,
    refcounts: Mutex<Refcounts>,
    reservations: [Mutex<Reservation>; RESERVATIONS],
    /// Clusters that became unreferenced in memory; see [`flush`].
    unlinked: Mutex<Vec<(u64, u64)>>,
    /// Whether payload must reach the disk before the entries that are published now.
    barrier: AtomicBool,
    flusher: Flusher,
    compressed: Compressed,
    recording: Recording,
    buffers: BufferPool,
}

impl Qcow2 {
    /// Opens an image.
    pub fn open(storage: Arc<dyn Storage>, options: &LayerOptions) -> Result<Self> {
        let mut header = Header::read(&storage)?;
        let name = storage.name();
        let read_only = options.read_only || storage.read_only();
        let data = match header.incompatible & incompatible::DATA_FILE != 0 {
            false => None,
            true => match options.data_file.clone() {
                Some(data) => Some(data),
                None => return Err(Error::unsupported(name, "an external data file that was not supplied")),
            },
        };
        if !read_only {
            if header.incompatible & incompatible::CORRUPT != 0 && !options.repair {
                return Err(Error::corrupt(name, "it is marked as corrupt"));
            }
            if header.autoclear & !autoclear::KNOWN != 0 {
                // Whoever writes without keeping an autoclear feature up to date has to clear its bit.
                header.autoclear &= autoclear::KNOWN;
                header.write(&storage)?;
                storage.sync()?;
            }
        }
        let p = Params::new(&header);
        let l1 = L1::read(&storage, &header)?;
        let mut refcounts = Refcounts::open(&storage, &header)?;
        let l1_start = header.l1_offset >> p.cluster_bits;
        refcounts.metadata.extend(l1_start..l1_start + (u64::from(header.l1_size) * 8).div_ceil(p.cluster));
        refcounts.metadata.extend(l1.tables().map(|(_, offset)| offset >> p.cluster_bits));
        let slices = header.size.div_ceil(p.cluster).div_ceil(p.slice_entries);
        let slots = slices.clamp(64, CACHE_BYTES / (p.slice_words() as u64 * 8));
        let stale = !read_only && header.incompatible & incompatible::DIRTY != 0 && !options.repair;
        let plain = open_plain(&storage, data.as_ref(), &header, options)?;
        if let Some((offset, len)) = header.luks_place() {
            let first = offset >> p.cluster_bits;
            refcounts.metadata.extend(first..first + len.div_ceil(p.cluster));
        }
        let image = Qcow2 {
            data,
            plain,
            name,
            read_only,
            p,
            size: AtomicU64::new(header.size),
            header: Mutex::new(header),
            l1,
            cache: SliceCache::new(slots as usize, p.slice_words(), p.extended),
            gate: Gate::new(()),
            ranges: RangeLocks::default(),
            refcounts: Mutex::new(refcounts),
            reservations: Default::default(),
            unlinked: Mutex::default(),
            barrier: AtomicBool::new(false),
            flusher: Flusher::default(),
            compressed: Compressed::default(),
            recording: Recording::default(),
            buffers: BufferPool::default(),
            storage,
        };
        if !read_only && let Err(error) = image.prepare_for_writing(stale) {
            if !options.repair {
                return Err(error);
            }
            tracing::warn!(%error, image = image.name, "Changes are not recorded in bitmaps");
        }
        Ok(image)
    }

    /// Where payload lives.
    fn payload(&self) -> &Arc<dyn Storage> {
        let cipher_text = self.data.as_ref().unwrap_or(&self.storage);
        self.plain.as_ref().map_or(cipher_text, |(plain, _)| plain)
    }

    fn corrupt(&self, what: &str) -> Error {
        Error::corrupt(&self.name, what)
    }

    fn io(&self, op: &'static str, error: std::io::Error) -> Error {
        Error::io(op, &self.name, error)
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Lookups in the cache of L2 slices so far, and how many of them had to read the disk.
    pub fn cache_stats(&self) -> (u64, u64) {
        self.cache.stats()
    }
}

/// The plain text of an encrypted image. Sectors are numbered by their place in the file that holds them.
fn open_plain(
    storage: &Arc<dyn Storage>,
    data: Option<&Arc<dyn Storage>>,
    header: &Header,
    options: &LayerOptions,
) -> Result<Option<(Arc<dyn Storage>, serde_json::Value)>> {
    let Some((offset, len)) = header.luks_place() else { return Ok(None) };
    let name = storage.name();
    let mut bytes = [0; HEADER_BYTES];
    storage.read_at(&mut bytes, offset)?;
    let luks = LuksHeader::parse(&bytes, &name)?;
    let cipher = crypt::unlock(&luks, &options.secrets, &name, |at, wanted| {
        if at + wanted as u64 > len {
            return Err(Error::corrupt(&name, "a key slot is out of bounds"));
        }
        let mut bytes = vec![0; wanted];
        storage.read_at(&mut bytes, offset + at).map(|()| bytes)
    })?;
    let plain = EncryptedStorage::new(data.unwrap_or(storage).clone(), 0, cipher);
    Ok(Some((Arc::new(plain), luks.describe())))
}
