//! One instance of a format.

use crate::disk::Preallocation;
use crate::format::check::{CheckReport, Repair};
use crate::gate::{Hold, Pass};
use crate::storage::Storage;
use crate::{Format, Gather, Result, Scatter};
use std::fmt::Debug;
use std::sync::Arc;

/// Where the bytes of an [`Extent`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the layer's data file number `file` at `offset`, as they are.
    Data {
        /// The file, for [`Layer::data_file`].
        file: u32,
        /// First byte in the file.
        offset: u64,
    },
    /// Nowhere: they are zero.
    Zero {
        /// Whether the format has space allocated for them nevertheless.
        allocated: bool,
    },
    /// In the layer below; zero if there is none.
    Below,
    /// In this layer, compressed or encrypted: only [`Layer::read_opaque`] can read them.
    Opaque {
        /// Whether they are compressed (else encrypted).
        compressed: bool,
    },
}

/// Bytes of a storage, to be written elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Stored<'a> {
    /// Where they are.
    pub storage: &'a Arc<dyn Storage>,
    /// The first of them.
    pub offset: u64,
    /// Their number.
    pub len: u64,
}

impl Stored<'_> {
    /// The sub-range of `len` bytes at `offset`, which the caller keeps in range.
    pub(crate) fn slice(self, offset: u64, len: u64) -> Self {
        debug_assert!(offset <= self.len && len <= self.len - offset);
        Stored { offset: self.offset + offset, len, ..self }
    }
}

/// A run of guest bytes with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never zero and never more than was asked for.
    pub len: u64,
    /// Where the bytes are.
    pub source: Source,
}

/// The file that a layer names as its parent.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct BackingRef {
    /// The name as the image stores it; relative names are relative to the child.
    pub path: String,
    /// The parent's format, if the image names one.
    pub format: Option<String>,
}

/// Facts about a layer for people and management software.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LayerInfo {
    /// Name of the storage, usually a path.
    pub filename: String,
    /// The format.
    pub format: Format,
    /// Size of the disk that the layer describes, in bytes.
    pub virtual_size: u64,
    /// Bytes that the storage takes on its host.
    pub actual_size: u64,
    /// Unit of allocation in bytes, if the format has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// The parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<BackingRef>,
    /// Whether the image was not closed properly.
    pub dirty_flag: bool,
    /// Facts that only this format has.
    #[serde(skip_serializing_if = "serde_json::Value::is_null")]
    pub format_specific: serde_json::Value,
}

/// The layers below another one, read as one disk.
#[derive(Clone, Copy, Debug)]
pub struct Below<'a>(&'a [Arc<dyn Layer>]);

impl<'a> Below<'a> {
    /// The given layers, the uppermost first.
    pub fn new(layers: &'a [Arc<dyn Layer>]) -> Self {
        Below(layers)
    }

    /// Size of the uppermost layer in bytes; 0 if there is none.
    pub fn size(&self) -> u64 {
        self.0.first().map_or(0, |layer| layer.size())
    }

    /// Whether there is no layer.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Reads; bytes that no layer holds are zero.
    pub fn read(&self, mut dst: Scatter<'_>, offset: u64) -> Result<()> {
        let mut done = 0;
        while done < dst.len() {
            let left = dst.len() - done;
            done += self.read_some(dst.slice(done, left), offset + done as u64)?;
        }
        Ok(())
    }

    fn read_some(&self, mut dst: Scatter<'_>, offset: u64) -> Result<usize> {
        self.with_extent(offset, dst.len() as u64, |layer, extent| {
            let want = extent.len as usize;
            match (extent.source, layer) {
                (Source::Data { file, offset: host }, Some(layer)) => {
                    let storage = layer.data_file(file);
                    storage
                        .readv(dst.slice(0, want), host)
                        .map_err(|e| crate::Error::io("read", storage.name(), e))?;
                }
                (Source::Opaque { .. }, Some(layer)) => layer.read_opaque(dst.slice(0, want), offset)?,
                _ => dst.slice(0, want).zero(),
            }
            Ok(want)
        })
    }

    /// Calls `f` with the extent at `offset`, of at most `len` bytes, and the layer that holds it, if one does. What the
    /// extent says is true until `f` returns.
    fn with_extent<R>(
        &self,
        offset: u64,
        len: u64,
        f: impl FnOnce(Option<&dyn Layer>, Extent) -> Result<R>,
    ) -> Result<R> {
        let mut want = len;
        for layer in self.0 {
            let size = layer.size();
            if offset >= size {
                break; // a shorter backing file reads as zeros beyond its end
            }
            let _pass = layer.enter();
            let extent = layer.resolve_read(offset, want.min(size - offset))?;
            if extent.source != Source::Below {
                return f(Some(&**layer), extent);
            }
            want = extent.len;
        }
        f(None, Extent { len: want, source: Source::Zero { allocated: false } })
    }

    /// Copies what the layers hold at `offset` to byte `at` of `target` without moving it through the memory of this
    /// process. Where that is not possible for all of it, `false` is returned, and the caller reads and writes it.
    pub(crate) fn copy_to(&self, offset: u64, len: u64, target: &dyn Storage, at: u64) -> Result<bool> {
        let mut done = 0;
        while done < len {
            let copied = self.with_extent(offset + done, len - done, |layer, extent| {
                let copied = match (extent.source, layer) {
                    (Source::Data { file, offset: host }, Some(layer)) => {
                        target.copy_from(&**layer.data_file(file), host, at + done, extent.len)
                    }
                    _ => 0,
                };
                Ok(if copied == extent.len { copied } else { 0 })
            })?;
            if copied == 0 {
                return Ok(false);
            }
            done += copied;
        }
        Ok(true)
    }

    /// The extent at `offset`, mapped through all layers, and the index of the layer that decided.
    /// The index is `None` for bytes that no layer holds.
    pub fn map(&self, offset: u64, len: u64) -> Result<(Extent, Option<usize>)> {
        let mut want = len;
        for (index, layer) in self.0.iter().enumerate() {
            let size = layer.size();
            if offset >= size {
                return Ok((Extent { len: want, source: Source::Zero { allocated: false } }, Some(index)));
            }
            want = want.min(size - offset);
            let _pass = layer.enter();
            let extent = layer.map(offset, want)?;
            want = extent.len;
            if !matches!(extent.source, Source::Below) {
                return Ok((extent, Some(index)));
            }
        }
        Ok((Extent { len: want, source: Source::Zero { allocated: false } }, None))
    }

    /// Calls `f` with the place of the bytes at `offset`, at most `len`, if layer number `index` holds them in a
    /// file as they are. The place belongs to them until `f` returns.
    pub(crate) fn with_stored<R>(
        &self,
        index: usize,
        offset: u64,
        len: u64,
        f: impl FnOnce(Stored<'_>) -> Result<R>,
    ) -> Result<Option<R>> {
        let Some(layer) = self.0.get(index) else { return Ok(None) };
        let _pass = layer.enter();
        let extent = layer.resolve_read(offset, len)?;
        let Source::Data { file, offset } = extent.source else { return Ok(None) };
        let storage = layer.data_file(file);
        match storage.fd() {
            Some(_) => f(Stored { storage, offset, len: extent.len }).map(Some),
            None => Ok(None),
        }
    }

    /// Whether layer number `index` is among `others`.
    pub(crate) fn shares_layer(&self, index: usize, others: &[Arc<dyn Layer>]) -> bool {
        self.0.get(index).is_some_and(|layer| others.iter().any(|other| Arc::ptr_eq(layer, other)))
    }

    /// Whether the whole range reads as zeros for reasons of metadata alone.
    pub fn is_zero(&self, offset: u64, len: u64) -> Result<bool> {
        let mut done = 0;
        while done < len {
            let (extent, _) = self.map(offset + done, len - done)?;
            if !matches!(extent.source, Source::Zero { .. } | Source::Below) {
                return Ok(false);
            }
            done += extent.len;
        }
        Ok(true)
    }
}

/// Permission to be inside of a layer while it moves payload; see [`Layer::enter`].
#[derive(Debug)]
pub struct LayerPass<'a>(#[expect(dead_code, reason = "held for its drop")] pub(crate) Option<Pass<'a, ()>>);

/// A [`LayerPass`] for a request that outlives the call that made it; see [`Layer::try_hold`].
#[derive(Debug)]
pub struct LayerHold(#[expect(dead_code, reason = "held for its drop")] pub(crate) Option<Hold<()>>);

/// One instance of a format over a storage.
///
/// All methods may be called concurrently. Ranges are within [`size`](Layer::size); the [`Disk`](crate::Disk)
/// checks that. Methods that read or write payload enter the layer themselves, except for
/// [`resolve_read`](Layer::resolve_read) and [`read_opaque`](Layer::read_opaque), which the caller
/// brackets with [`enter`](Layer::enter).
pub trait Layer: Send + Sync + Debug {
    /// The format.
    fn format(&self) -> Format;

    /// Size in bytes of the disk that this layer describes.
    fn size(&self) -> u64;

    /// The storage that holds the layer's metadata.
    fn storage(&self) -> &Arc<dyn Storage>;

    /// The storage of payload that [`Source::Data`] points into.
    fn data_file(&self, file: u32) -> &Arc<dyn Storage> {
        let _ = file;
        self.storage()
    }

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Whether a new image reads as zeros.
    fn starts_as_zero(&self) -> bool {
        true
    }

    /// Facts for people and management software.
    fn info(&self) -> Result<LayerInfo>;

    /// The parent that the image names.
    fn backing(&self) -> Option<BackingRef> {
        None
    }

    /// The unique identifier that the image carries, if its format has one.
    fn identity(&self) -> Option<[u8; 16]> {
        None
    }

    /// Fails with [`Error::ParentChanged`](crate::Error::ParentChanged) if `below`, which was opened as the
    /// parent, is not what the image expects. Formats without such a guard accept anything.
    fn check_parent(&self, below: &dyn Layer) -> Result<()> {
        let _ = below;
        Ok(())
    }

    /// Remembers the present state of the parent as the one that [`check_parent`](Layer::check_parent)
    /// expects, after this process wrote to the parent. With `None`, before it does that, any state is expected from now
    /// on: a crash on the way must not make the child useless.
    fn note_parent(&self, below: Option<&dyn Layer>) -> Result<()> {
        let _ = below;
        Ok(())
    }

    /// Unit of allocation in bytes; 0 if the format has none.
    fn cluster_size(&self) -> u64 {
        0
    }

    /// Keeps what [`resolve_read`](Layer::resolve_read) returns valid while the guard lives: space is not
    /// given to other guest ranges meanwhile. A thread enters a layer once at a time.
    fn enter(&self) -> LayerPass<'_> {
        LayerPass(None)
    }

    /// [`enter`](Layer::enter) for longer than this call; `None` if that had to wait.
    fn try_hold(&self) -> Option<LayerHold> {
        Some(LayerHold(None))
    }

    /// Where the bytes at `offset` are, for at most `len` bytes.
    fn resolve_read(&self, offset: u64, len: u64) -> Result<Extent>;

    /// Like [`resolve_read`](Layer::resolve_read), but may spend time to find holes. For jobs and listings.
    fn map(&self, offset: u64, len: u64) -> Result<Extent> {
        self.resolve_read(offset, len)
    }

    /// Reads bytes of an extent whose source is [`Source::Opaque`].
    fn read_opaque(&self, dst: Scatter<'_>, offset: u64) -> Result<()>;

    /// Writes. `below` supplies bytes of clusters that the write covers in part.
    fn write(&self, src: Gather<'_>, offset: u64, below: Below<'_>) -> Result<()>;

    /// The place in [`data_file`](Layer::data_file) where the whole range may be written by the caller, if nothing else
    /// has to change for that. The caller holds the layer, and calls [`written`](Layer::written) at the end.
    fn resolve_write(&self, offset: u64, len: u64) -> Result<Option<u64>> {
        let _ = (offset, len);
        Ok(None)
    }

    /// Tells that bytes were written, or may have been, where [`resolve_write`](Layer::resolve_write) said.
    fn written(&self, offset: u64, len: u64) {
        let _ = (offset, len);
    }

    /// Writes bytes that another storage holds, without moving them through the memory of this process where
    /// that is possible. Returns whether that was done; otherwise some bytes may be written, and the caller
    /// writes all of them.
    fn write_stored(&self, src: Stored<'_>, offset: u64, below: Below<'_>) -> Result<bool> {
        let _ = (src, offset, below);
        Ok(false)
    }

    /// Makes a range read as zeros. With `unmap`, space may be released.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, below: Below<'_>) -> Result<()>;

    /// Tells that the contents of a range do not matter any more. Afterwards it reads as zeros or as
    /// before, never as anything else.
    fn discard(&self, offset: u64, len: u64, below: Below<'_>) -> Result<()>;

    /// Makes everything written so far survive a crash of the host.
    fn flush(&self) -> Result<()>;

    /// Writes metadata back and marks the image as clean. Called when the layer is closed; also brings
    /// the image into a state in which another process may open it.
    fn close(&self) -> Result<()> {
        self.flush()
    }

    /// Changes the size. New space reads as zeros.
    fn resize(&self, size: u64, below: Below<'_>) -> Result<()>;

    /// Fails if [`preallocate`](Layer::preallocate) cannot do this for images of this kind.
    fn check_preallocation(&self, how: Preallocation) -> Result<()> {
        match how {
            Preallocation::Off => Ok(()),
            _ => {
                Err(crate::Error::unsupported(self.storage().name(), "preallocation of an image that grows"))
            }
        }
    }

    /// Allocates the space from `from` on, which a [`resize`](Layer::resize) just made. Nobody else uses the layer
    /// meanwhile.
    fn preallocate(&self, from: u64, how: Preallocation) -> Result<()> {
        let _ = from;
        self.check_preallocation(how)
    }

    /// Copies those bytes of a range that this layer does not hold from `below` into it. Concurrent writes
    /// are not overwritten.
    fn populate(&self, offset: u64, len: u64, below: Below<'_>) -> Result<()> {
        let _ = (offset, len, below);
        Err(crate::Error::unsupported(self.storage().name(), "parents"))
    }

    /// Changes the parent that the image names. Contents are not touched.
    fn set_backing(&self, backing: Option<&BackingRef>) -> Result<()> {
        let _ = backing;
        Err(crate::Error::unsupported(self.storage().name(), "backing files"))
    }

    /// Checks the image and repairs what `repair` allows. Nobody else may use the image meanwhile.
    fn check(&self, repair: Repair) -> Result<CheckReport> {
        let _ = repair;
        Err(crate::Error::unsupported(self.storage().name(), "checks"))
    }

    /// The layer as a qcow2 image, for operations that only qcow2 has.
    fn as_qcow2(&self) -> Option<&crate::format::qcow2::Qcow2> {
        None
    }
}
