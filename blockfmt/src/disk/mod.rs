//! A chain of layers with the policy of one disk.

mod chain;
mod create;
mod open;
mod options;
mod place;
mod policy;
mod shared;
mod throttle;
mod tree;

pub use chain::parent_name;
pub use create::{CreateOptions, Preallocation};
pub use open::{OpenOptions, as_path};
pub use options::parse_size;
pub use policy::{OpenPolicy, OpenRequest, Role};
pub use shared::{Registry, RegistryStats};
pub use throttle::{Limits, Throttle};
pub use tree::{SnapshotNode, snapshot_tree};

pub(crate) use chain::Claim;
pub(crate) use open::resolve;
pub(crate) use place::{Held, Place};

use crate::gate::Gate;
use crate::storage::FileId;
use crate::{Below, Error, Extent, Format, Gather, Layer, Result, Scatter, Stored};
use parking_lot::{Mutex, RwLock};
use std::convert::Infallible;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Addressing facts that a virtual device reports to its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Geometry {
    /// Cylinders of the traditional geometry.
    pub cylinders: u16,
    /// Heads of the traditional geometry.
    pub heads: u8,
    /// Sectors per track of the traditional geometry.
    pub sectors: u8,
    /// Smallest addressable unit in bytes.
    pub logical_block: u32,
    /// Unit in bytes below which a write costs a read first.
    pub physical_block: u32,
    /// Unit of allocation in bytes, the best alignment of large requests and discards; 0 if unknown.
    pub cluster: u32,
}

/// Sees the requests of a disk while jobs such as mirrors and backups run.
pub trait Observer: Send + Sync {
    /// Called before a range changes. An error fails the request.
    fn before_change(&self, disk: Below<'_>, offset: u64, len: u64) -> Result<()> {
        let _ = (disk, offset, len);
        Ok(())
    }

    /// Called after a range changed, or may have changed.
    fn after_change(&self, disk: Below<'_>, offset: u64, len: u64) {
        let _ = (disk, offset, len);
    }
}

/// What a request sees of a disk.
#[derive(Clone)]
pub(crate) struct State {
    /// The layers, the writable one first.
    pub(crate) layers: Vec<Arc<dyn Layer>>,
    pub(crate) observers: Vec<Arc<dyn Observer>>,
}

impl State {
    fn top(&self) -> &dyn Layer {
        &*self.layers[0]
    }

    fn below(&self) -> Below<'_> {
        Below::new(&self.layers[1..])
    }

    /// Fails if someone has to see every change: what is about to happen is none that can be shown.
    fn check_unobserved(&self) -> Result<()> {
        match self.observers.is_empty() {
            true => Ok(()),
            false => Err(Error::Busy(self.top().storage().name())),
        }
    }

    fn change<R>(&self, offset: u64, len: u64, op: impl FnOnce() -> Result<R>) -> Result<R> {
        for observer in &self.observers {
            observer.before_change(Below::new(&self.layers), offset, len)?;
        }
        let result = op();
        for observer in &self.observers {
            observer.after_change(Below::new(&self.layers), offset, len);
        }
        result
    }
}

type ResizeCallback = Box<dyn Fn(u64) + Send + Sync>;

struct Inner {
    gate: Gate<Arc<State>>,
    read_only: bool,
    /// Whether the layers belong to this disk.
    close_on_drop: AtomicBool,
    /// How the disk was opened, to open its layers again and others beside them.
    options: OpenOptions,
    /// Whether a job counts on the chain to stay as it is.
    claimed: AtomicBool,
    throttled: AtomicBool,
    throttles: RwLock<Vec<Arc<Throttle>>>,
    resize_callbacks: Mutex<Vec<ResizeCallback>>,
}

/// An open disk. Clones are handles to the same disk; the last one closes it.
///
/// Every method may be called from any thread, concurrently. Requests that overlap in time and range
/// take effect in some order, as on a physical disk.
#[derive(Clone)]
pub struct Disk(Arc<Inner>);

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.gate.enter();
        let names: Vec<_> = state.layers.iter().map(|l| l.storage().name()).collect();
        f.debug_struct("Disk").field("layers", &names).field("read_only", &self.0.read_only).finish()
    }
}

impl Disk {
    /// A disk over layers that are open already, the uppermost first.
    pub fn from_layers(layers: Vec<Arc<dyn Layer>>, read_only: bool) -> Result<Self> {
        let top = layers.first().ok_or_else(|| Error::InvalidOption("A disk needs a layer".into()))?;
        let read_only = read_only || top.read_only();
        let state = Arc::new(State { layers, observers: Vec::new() });
        Ok(Disk(Arc::new(Inner {
            gate: Gate::new(state),
            read_only,
            close_on_drop: AtomicBool::new(true),
            options: OpenOptions::new(Format::Raw),
            claimed: AtomicBool::new(false),
            throttled: AtomicBool::new(false),
            throttles: RwLock::default(),
            resize_callbacks: Mutex::default(),
        })))
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.0.gate.enter().top().size()
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.0.read_only
    }

    /// Addressing facts for a virtual device.
    pub fn geometry(&self) -> Geometry {
        let state = self.0.gate.enter();
        let total = state.top().size() / 512;
        let cylinders = (total / (16 * 63)).clamp(1, 16383) as u16;
        let cluster = u32::try_from(state.top().cluster_size()).unwrap_or(0);
        Geometry { cylinders, heads: 16, sectors: 63, logical_block: 512, physical_block: 4096, cluster }
    }

    /// The layers, the uppermost first.
    pub fn layers(&self) -> Vec<Arc<dyn Layer>> {
        self.0.gate.enter().layers.clone()
    }

    /// The number of the layer whose file `path` is.
    pub fn find_layer(&self, path: &Path) -> Result<usize> {
        let name = || path.display().to_string();
        let id = FileId::of(&path.metadata().map_err(|e| Error::io("inspect", name(), e))?);
        let found = self.layers().iter().position(|layer| layer.storage().file_id() == Some(id));
        found.ok_or_else(|| Error::NotFound { what: "image of the chain", name: name() })
    }

    /// Reads all of `buf` from `offset`.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read(Scatter::new(buf), offset)
    }

    /// Writes all of `buf` at `offset`.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write(Gather::new(buf), offset)
    }

    /// Reads into a list of buffers.
    pub fn read(&self, dst: Scatter<'_>, offset: u64) -> Result<()> {
        self.throttle(false, dst.len() as u64);
        let state = self.0.gate.enter();
        check(&state, offset, dst.len() as u64)?;
        Below::new(&state.layers).read(dst, offset)
    }

    /// Writes from a list of buffers.
    pub fn write(&self, src: Gather<'_>, offset: u64) -> Result<()> {
        self.throttle(true, src.len() as u64);
        let state = self.enter_to_change(offset, src.len() as u64)?;
        state.change(offset, src.len() as u64, || state.top().write(src, offset, state.below()))
    }

    /// [`Layer::write_stored`] to the disk.
    pub(crate) fn write_stored(&self, src: Stored<'_>, offset: u64) -> Result<bool> {
        let state = self.enter_to_change(offset, src.len)?;
        let written =
            state.change(offset, src.len, || state.top().write_stored(src, offset, state.below()))?;
        drop(state);
        if written {
            self.throttle(true, src.len); // only now it is known that nobody writes the bytes again
        }
        Ok(written)
    }

    /// Makes a range read as zeros; with `unmap`, its space may be released.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let state = self.enter_to_change(offset, len)?;
        state.change(offset, len, || state.top().write_zeroes(offset, len, unmap, state.below()))
    }

    /// Tells that the contents of a range do not matter any more. It reads as zeros or as before.
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let state = self.enter_to_change(offset, len)?;
        state.change(offset, len, || state.top().discard(offset, len, state.below()))
    }

    /// Makes everything that was acknowledged before survive a crash of the host.
    pub fn flush(&self) -> Result<()> {
        match self.0.read_only {
            true => Ok(()),
            false => self.0.gate.enter().top().flush(),
        }
    }

    /// Changes the size while the disk is in use, but not while it is copied. New space reads as zeros; shrinking
    /// loses what is cut.
    pub fn resize(&self, size: u64) -> Result<()> {
        self.resize_with(size, Preallocation::Off)
    }

    /// [`resize`](Disk::resize) that allocates the new space in advance; requests wait meanwhile. If that fails, the
    /// disk has its old size again.
    ///
    /// Fails with [`Error::Unsupported`] if the format cannot do that, and with [`Error::InvalidOption`] if the disk
    /// does not grow.
    pub fn resize_with(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        if self.0.read_only {
            return Err(Error::ReadOnly);
        }
        let _claim = self.claim()?;
        {
            let closed = self.0.gate.close();
            let state = closed.get();
            state.check_unobserved()?;
            let (top, old) = (state.top(), state.top().size());
            if preallocation != Preallocation::Off && size <= old {
                return Err(Error::InvalidOption("Only a disk that grows has space to preallocate".into()));
            }
            // Not every image that grew can shrink again.
            top.check_preallocation(preallocation)?;
            top.resize(size, state.below())?;
            if preallocation != Preallocation::Off
                && let Err(error) = top.preallocate(old, preallocation)
            {
                if let Err(error) = top.resize(old, state.below()) {
                    tracing::warn!(%error, disk = top.storage().name(), "The disk stays larger");
                }
                return Err(error);
            }
            top.flush()?;
        }
        self.report_size(size);
        Ok(())
    }

    fn report_size(&self, size: u64) {
        for callback in self.0.resize_callbacks.lock().iter() {
            callback(size);
        }
    }

    /// Calls `callback` with the new size after every resize, so that a device can tell its guest.
    pub fn on_resize(&self, callback: impl Fn(u64) + Send + Sync + 'static) {
        self.0.resize_callbacks.lock().push(Box::new(callback));
    }

    /// Where the bytes at `offset` are: the extent, and the number of the layer that holds it
    /// (`None` if no layer does).
    pub fn map(&self, offset: u64, len: u64) -> Result<(Extent, Option<usize>)> {
        let state = self.0.gate.enter();
        check(&state, offset, len)?;
        Below::new(&state.layers).map(offset, len)
    }

    /// Writes everything back, marks the images as clean, and reports errors that a drop could not.
    /// Requests through other handles remain possible and make the image dirty again.
    pub fn close(&self) -> Result<()> {
        let closed = self.0.gate.close();
        match self.0.read_only {
            true => Ok(()),
            false => closed.get().top().close(),
        }
    }

    /// Replaces the limits on reads and writes. A throttle that several disks have limits their sum.
    pub fn set_throttles(&self, throttles: Vec<Arc<Throttle>>) {
        self.0.throttled.store(!throttles.is_empty(), Ordering::Release);
        *self.0.throttles.write() = throttles;
    }

    fn throttle(&self, write: bool, bytes: u64) {
        if self.0.throttled.load(Ordering::Acquire) {
            let throttles = self.0.throttles.read().clone();
            throttles.iter().for_each(|throttle| throttle.wait(write, bytes));
        }
    }

    /// Lets `observer` see every change from now on. No request is in flight while it is added.
    pub fn add_observer(&self, observer: Arc<dyn Observer>) {
        let Ok(()) = self.add_observer_after(observer, |_| Ok::<_, Infallible>(()));
    }

    /// [`add_observer`](Disk::add_observer) if `prepare` succeeds at the instant from which changes are seen.
    pub(crate) fn add_observer_after<E>(
        &self,
        observer: Arc<dyn Observer>,
        prepare: impl FnOnce(&State) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut closed = self.0.gate.close();
        let mut state = State::clone(closed.get());
        prepare(&state)?;
        state.observers.push(observer);
        closed.set(Arc::new(state));
        Ok(())
    }

    /// Removes an observer. No request calls it any more when this returns.
    pub fn remove_observer(&self, observer: &Arc<dyn Observer>) {
        let mut closed = self.0.gate.close();
        let mut state = State::clone(closed.get());
        state.observers.retain(|o| !Arc::ptr_eq(o, observer));
        closed.set(Arc::new(state));
    }

    fn enter_to_change(&self, offset: u64, len: u64) -> Result<crate::gate::Pass<'_, Arc<State>>> {
        if self.0.read_only {
            return Err(Error::ReadOnly);
        }
        let state = self.0.gate.enter();
        check(&state, offset, len)?;
        Ok(state)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = self.gate.enter();
        if self.close_on_drop.load(Ordering::Acquire)
            && !self.read_only
            && let Err(error) = state.top().close()
        {
            tracing::error!(%error, disk = state.top().storage().name(), "Closing the disk failed");
        }
    }
}

fn check(state: &State, offset: u64, len: u64) -> Result<()> {
    let size = state.top().size();
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::OutOfRange { offset, len, size }),
    }
}
