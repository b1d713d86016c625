//! A disk image of a machine: open while the machine may use it, and closed for whom the machine moves to.

use std::io;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use blockfmt::queue::{Queue, QueueOptions};
use blockfmt::{Disk, Format, Gather, Geometry, OpenOptions, OpenPolicy, Scatter};
use parking_lot::Mutex;

use super::VmError;
use super::config::DiskConfig;
use crate::devices::virtio::blk::BlockBackend;
use crate::migration::DiskShape;

type ResizeCallback = Arc<dyn Fn(u64) + Send + Sync>;

/// The back-end of a block device that its configuration names.
pub(super) struct MachineDisk {
    config: DiskConfig,
    format: Format,
    /// What the guest knows.
    shape: Mutex<DiskShape>,
    disk: ArcSwapOption<Disk>,
    resized: Mutex<Option<ResizeCallback>>,
}

impl MachineDisk {
    /// Opens the disk of a new machine; with the shape that a guest knows it stays closed until [`Self::open`].
    pub(super) fn new(config: &DiskConfig, known: Option<DiskShape>) -> Result<Arc<Self>, VmError> {
        let fail = |source| VmError::Disk { path: config.path.clone(), source };
        let format = config.format.parse().map_err(fail)?;
        let (shape, disk) = match known {
            Some(shape) => (shape, None),
            None => {
                let disk = open(config, format)?;
                (shape_of(&disk, config), Some(Arc::new(disk)))
            }
        };
        Ok(Arc::new(Self {
            config: config.clone(),
            format,
            shape: Mutex::new(shape),
            disk: ArcSwapOption::new(disk),
            resized: Mutex::default(),
        }))
    }

    /// What the guest knows of the disk.
    pub(super) fn shape(&self) -> DiskShape {
        DiskShape { size: BlockBackend::size(self), ..*self.shape.lock() }
    }

    /// Whether only one machine at a time can have it open: its image is locked for writing.
    pub(super) fn is_exclusive(&self) -> bool {
        !self.shape.lock().read_only
    }

    /// Opens the disk, unless it is open.
    pub(super) fn open(&self) -> Result<(), VmError> {
        if self.disk.load().is_some() {
            return Ok(());
        }
        let disk = open(&self.config, self.format)?;
        let (found, known) = (shape_of(&disk, &self.config), *self.shape.lock());
        if (found.size, found.read_only) != (known.size, known.read_only) {
            return Err(VmError::Incompatible(format!(
                "the disk {} has {} bytes here, and the guest knows {}; give it the same image",
                self.config.path.display(),
                found.size,
                known.size
            )));
        }
        if let Some(callback) = self.resized.lock().clone() {
            disk.on_resize(move |size| callback(size));
        }
        self.disk.store(Some(Arc::new(disk)));
        Ok(())
    }

    /// Writes back what caches hold.
    pub(super) fn flush_image(&self) -> Result<(), VmError> {
        let fail = |source| VmError::Disk { path: self.config.path.clone(), source };
        self.disk.load_full().map_or(Ok(()), |disk| disk.flush().map_err(fail))
    }

    /// Writes everything back and closes the disk, so that another process can open it. No request is under way.
    pub(super) fn close(&self) -> Result<(), VmError> {
        let Some(disk) = self.disk.load_full() else { return Ok(()) };
        let size = disk.size();
        let fail = |source| VmError::Disk { path: self.config.path.clone(), source };
        disk.flush().and_then(|()| disk.close()).map_err(fail)?;
        self.shape.lock().size = size;
        self.disk.store(None);
        // The last handle: the image's lock goes with it.
        drop(disk);
        Ok(())
    }

    fn get(&self) -> io::Result<Arc<Disk>> {
        self.disk.load_full().ok_or_else(|| io::Error::other("The disk is closed: the machine is elsewhere"))
    }
}

fn open(config: &DiskConfig, format: Format) -> Result<Disk, VmError> {
    OpenOptions::new(format)
        .read_only(config.readonly)
        .direct(config.direct)
        .changed_parents(config.changed_parents)
        .policy(OpenPolicy::same_directory().allow(&config.allow))
        .open(&config.path)
        .map_err(|source| VmError::Disk { path: config.path.clone(), source })
}

fn shape_of(disk: &Disk, config: &DiskConfig) -> DiskShape {
    DiskShape {
        size: disk.size(),
        read_only: config.readonly || disk.is_read_only(),
        geometry: disk.geometry(),
    }
}

impl BlockBackend for MachineDisk {
    fn size(&self) -> u64 {
        self.disk.load().as_ref().map_or_else(|| self.shape.lock().size, |disk| disk.size())
    }
    fn read_only(&self) -> bool {
        self.shape.lock().read_only
    }
    fn geometry(&self) -> Geometry {
        self.shape.lock().geometry
    }
    fn read(&self, target: Scatter<'_>, offset: u64) -> io::Result<()> {
        BlockBackend::read(&*self.get()?, target, offset)
    }
    fn write(&self, source: Gather<'_>, offset: u64) -> io::Result<()> {
        BlockBackend::write(&*self.get()?, source, offset)
    }
    fn flush(&self) -> io::Result<()> {
        BlockBackend::flush(&*self.get()?)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        BlockBackend::discard(&*self.get()?, offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        BlockBackend::write_zeroes(&*self.get()?, offset, len, unmap)
    }
    fn on_resize(&self, callback: Box<dyn Fn(u64) + Send + Sync>) {
        let callback: ResizeCallback = Arc::from(callback);
        if let Some(disk) = self.disk.load_full() {
            let callback = callback.clone();
            disk.on_resize(move |size| callback(size));
        }
        *self.resized.lock() = Some(callback);
    }
    fn queue(&self, options: QueueOptions) -> io::Result<Option<Queue>> {
        BlockBackend::queue(&*self.get()?, options)
    }
}
