//! Virtual disks: formats, differencing chains, snapshots and jobs.
//!
//! The layers, from the bottom:
//!
//! * [`Storage`] is a flat array of bytes: a file, a block device, memory, or a wrapper that records
//!   or injects faults.
//! * [`Layer`] is one instance of a format (raw, qcow2, ...) on top of a storage. It answers where the
//!   bytes of a guest range are ([`Layer::resolve_read`]) and takes writes; payload moves apart from
//!   metadata.
//! * [`Disk`] is a chain of layers plus policy. It is `Send + Sync`; every method may be called from any
//!   thread, concurrently.
//!
//! Formats are named by the caller and never guessed from file contents, and every file that an image
//! header names passes an [`OpenPolicy`] before it is opened.
//!
//! ```
//! use blockfmt::{CreateOptions, Format, OpenOptions};
//! # fn main() -> Result<(), blockfmt::Error> {
//! # let dir = tempfile::tempdir().expect("temporary directory");
//! let path = dir.path().join("disk.raw");
//! CreateOptions::new(Format::Raw, 1 << 20).create(&path)?;
//! let disk = OpenOptions::new(Format::Raw).open(&path)?;
//! disk.write_at(b"hello", 4096)?;
//! disk.flush()?;
//! # Ok(()) }
//! ```
//!
//! # Specifications
//!
//! [qcow2](https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.rst), versions 2 and 3; Microsoft's
//! "Virtual Hard Disk Image Format Specification" (VHD, 2006) and
//! [MS-VHDX](https://learn.microsoft.com/openspecs/windows_protocols/ms-vhdx); the
//! [LUKS1 on-disk format](https://gitlab.com/cryptsetup/cryptsetup/-/wikis/Specification), version 1.2.3; the
//! [NBD protocol](https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md). Which bytes of a file are locked,
//! and what each means, is as in QEMU's `block/file-posix.c`.
//!
//! # Adding a format
//!
//! A format is a module under `src/format/` with a type that implements [`Layer`]. Add a variant to
//! [`Format`], an arm to `format::open_layer` and one to `format::create_layer`. A format that can have a parent
//! returns it from [`Layer::backing`]; the chain, the open policy, locks, jobs and the command line then
//! work without further changes. Add it to the suites in `tests/`: crash, interoperability and hostile images.

mod crypt;
mod error;
mod gate;
mod iobuf;
mod layer;
mod ranges;
mod sequence;
mod sync;
mod turns;
mod usage;

pub mod disk;
pub mod format;
pub mod job;
pub mod nbd;
pub mod queue;
pub mod storage;

pub use crypt::{CipherMode, Hash, IvGenerator, LuksOptions, Secret};
pub use disk::{
    CreateOptions, Disk, Geometry, OpenOptions, OpenPolicy, OpenRequest, Preallocation, Registry,
};
pub use error::{Error, Result};
pub use format::Format;
pub use iobuf::{Gather, Memory, Scatter};
pub use layer::{BackingRef, Below, Extent, Layer, LayerHold, LayerInfo, LayerPass, Source, Stored};
pub use storage::{LockMode, Storage};
