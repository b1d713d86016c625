//! Virtual disks.

use std::ffi::{c_char, c_void};
use std::path::Path;
use std::sync::Arc;

use blockfmt::{CreateOptions, Disk, Format, OpenOptions, OpenPolicy};

use crate::border::{Failure, guard, put};
use crate::error::nacre_error;
use crate::handle::Table;
use crate::options::{self, Options};
use crate::status::nacre_status::{self, *};
use crate::text;

/// An open disk: a chain of images. Free it with `nacre_disk_free`.
pub enum nacre_disk {}

static DISKS: Table<Disk> = Table::new(2, "disk");

/// How a disk is opened. Set `struct_size` and zero the rest for defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nacre_disk_options {
    /// `sizeof(struct nacre_disk_options)`.
    pub struct_size: usize,
    /// The image file. Required.
    pub path: *const c_char,
    /// The format: "raw", "qcow2", ... Required: formats are never guessed, since a guest can rewrite a header.
    pub format: *const c_char,
    /// Refuse writes.
    pub read_only: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// Open whatever files the image's headers name. By default only those in the image's own directory.
    pub trust_headers: bool,
    /// Must be zero.
    pub reserved: [u8; 5],
    /// The serial number that a guest sees, at most 20 bytes; null for none.
    pub id: *const c_char,
    /// Open the disk even if a parent changed since its child was made, which may have made the child useless.
    pub changed_parents: bool,
    /// Must be zero.
    pub reserved2: [u8; 7],
}

// SAFETY: repr(C), starts with a usize; pointers may have any bits, the flags are checked as bytes before use.
unsafe impl Options for nacre_disk_options {
    const FIRST_SIZE: usize = 40;
    const NAME: &'static str = "nacre_disk_options";
    const FLAGS: &'static [usize] = &[24, 25, 26, 40];
}

/// How an image is created. Set `struct_size` and zero the rest for defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nacre_disk_create_options {
    /// `sizeof(struct nacre_disk_create_options)`.
    pub struct_size: usize,
    /// The image file to create. Required.
    pub path: *const c_char,
    /// The format. Required.
    pub format: *const c_char,
    /// Size of the disk in bytes. 0 with a backing file: that of the backing file.
    pub size: u64,
    /// The parent of a differencing image, or null.
    pub backing_path: *const c_char,
    /// The parent's format. Required with a parent.
    pub backing_format: *const c_char,
    /// Options of the format with the names and values of qemu-img, separated by commas, as
    /// "cluster_size=128k,extended_l2=on"; null for none.
    pub options: *const c_char,
}

// SAFETY: repr(C), starts with a usize, pointers and integers only.
unsafe impl Options for nacre_disk_create_options {
    const FIRST_SIZE: usize = 48;
    const NAME: &'static str = "nacre_disk_create_options";
}

/// The failure that a disk error becomes.
pub(crate) fn failure(error: blockfmt::Error) -> Failure {
    use blockfmt::Error as E;
    let status = match &error {
        E::OutOfRange { .. } | E::InvalidOption(_) => NACRE_INVALID_ARGUMENT,
        E::ReadOnly | E::NotAllowed { .. } | E::WrongSecret(_) | E::SecretNeeded(_) => NACRE_PERMISSION,
        E::Unsupported { .. } => NACRE_UNSUPPORTED,
        E::Corrupt { .. } | E::WrongFormat { .. } | E::ParentChanged { .. } => NACRE_CORRUPT,
        E::Locked { .. } | E::NoLease { .. } | E::Busy(_) => NACRE_BUSY,
        E::Exists { .. } => NACRE_EXISTS,
        E::NotFound { .. } => NACRE_NOT_FOUND,
        E::Cancelled => NACRE_CANCELLED,
        _ => NACRE_IO,
    };
    Failure::from_error(status, &error)
}

/// The disk behind a handle.
pub(crate) fn get(disk: *const nacre_disk) -> Result<Arc<Disk>, Failure> {
    DISKS.get(disk)
}

/// Parses a required format name.
///
/// # Safety
/// `name` is null or a terminated string.
unsafe fn format(name: *const c_char, argument: &str) -> Result<Format, Failure> {
    // SAFETY: promised by the caller.
    unsafe { text::required(name, argument) }?.parse().map_err(failure)
}

/// The image that options describe.
///
/// # Safety
/// The strings of `o` are null or terminated.
unsafe fn create_options(o: &nacre_disk_create_options, size: u64) -> Result<CreateOptions, Failure> {
    // SAFETY: promised by the caller.
    let mut create = CreateOptions::new(unsafe { format(o.format, "format") }?, size);
    // SAFETY: as above.
    if let Some(list) = unsafe { text::optional(o.options, "options") }? {
        create.apply(&list).map_err(failure)?;
        create.size = size;
    }
    Ok(create)
}

/// Creates an image file.
///
/// # Safety
/// `options` is null or points to a structure with `struct_size` set; its strings are null or terminated. `error` is
/// null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_create(
    options: *const nacre_disk_create_options,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        // SAFETY: promised by the caller, here and below.
        let o = unsafe { options::read(options) }?;
        // SAFETY: as above.
        let path = unsafe { text::required(o.path, "path") }?;
        // SAFETY: as above.
        let backing = unsafe { text::optional(o.backing_path, "backing_path") }?;
        // SAFETY: as above.
        let mut create = unsafe { create_options(&o, o.size) }?;
        if let Some(backing) = backing {
            // SAFETY: as above.
            let backing_format = unsafe { format(o.backing_format, "backing_format") }?;
            if o.size == 0 {
                let parent = Path::new(&path).parent().unwrap_or(Path::new("")).join(&backing);
                let parent =
                    OpenOptions::new(backing_format).read_only(true).open(parent).map_err(failure)?;
                create.size = parent.size();
            }
            create = create.backing(backing, backing_format);
        }
        create.create(path.as_ref()).map_err(failure)
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Opens a disk and its parents.
///
/// # Safety
/// `options` is null or points to a structure with `struct_size` set; its strings are null or terminated. `disk` and
/// `error` are null or point to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_open(
    options: *const nacre_disk_options,
    disk: *mut *mut nacre_disk,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        // SAFETY: promised by the caller, here and below.
        unsafe { put(disk, "disk", std::ptr::null_mut()) }?;
        // SAFETY: as above.
        let o = unsafe { options::read(options) }?;
        // SAFETY: as above.
        let path = unsafe { text::required(o.path, "path") }?;
        // SAFETY: as above.
        let mut open = OpenOptions::new(unsafe { format(o.format, "format") }?);
        open = open.read_only(o.read_only).direct(o.direct).changed_parents(o.changed_parents);
        if o.trust_headers {
            open = open.policy(OpenPolicy::trust_headers());
        }
        let handle = DISKS.insert(Arc::new(open.open(path).map_err(failure)?))?;
        // SAFETY: as above.
        unsafe { put(disk, "disk", handle) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// The disk's size in bytes.
///
/// # Safety
/// `size` is null or points to room for a `uint64_t`; `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_size(
    disk: *const nacre_disk,
    size: *mut u64,
    error: *mut *mut nacre_error,
) -> nacre_status {
    // SAFETY: promised by the caller.
    unsafe { guard(error, || put(size, "size", DISKS.get(disk)?.size())) }
}

/// Checks a caller's buffer.
fn buffer(buffer: *const c_void, len: usize) -> Result<(), Failure> {
    if buffer.is_null() && len > 0 {
        return Err(Failure::invalid("Argument 'buffer' is null"));
    }
    if len > isize::MAX as usize {
        return Err(Failure::invalid("Argument 'len' is larger than any buffer"));
    }
    Ok(())
}

/// Reads `len` bytes at `offset`.
///
/// # Safety
/// `buffer` has room for `len` bytes; `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_read(
    disk: *const nacre_disk,
    buffer: *mut c_void,
    len: usize,
    offset: u64,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        self::buffer(buffer, len)?;
        let disk = DISKS.get(disk)?;
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the caller promised room for `len` bytes; zeroed first so that it is initialised for Rust.
        let slice = unsafe {
            std::ptr::write_bytes(buffer.cast::<u8>(), 0, len);
            std::slice::from_raw_parts_mut(buffer.cast::<u8>(), len)
        };
        disk.read_at(slice, offset).map_err(failure)
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Writes `len` bytes at `offset`. They are on stable storage after the next successful `nacre_disk_flush`.
///
/// # Safety
/// `buffer` holds `len` readable bytes; `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_write(
    disk: *const nacre_disk,
    buffer: *const c_void,
    len: usize,
    offset: u64,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        self::buffer(buffer, len)?;
        let disk = DISKS.get(disk)?;
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the caller promised `len` readable bytes.
        let slice = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), len) };
        disk.write_at(slice, offset).map_err(failure)
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// The number of images in the disk's chain; layer 0 is the active one, the last has no parent.
///
/// # Safety
/// `layers` is null or points to room for a `size_t`; `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_layers(
    disk: *const nacre_disk,
    layers: *mut usize,
    error: *mut *mut nacre_error,
) -> nacre_status {
    // SAFETY: promised by the caller.
    unsafe { guard(error, || put(layers, "layers", DISKS.get(disk)?.layers().len())) }
}

/// Takes an external snapshot of a disk in use: creates the image `options->path` on top of the present one and
/// continues in it. Of the other options only the format and its options count. A qcow2 image has subclusters, so that small
/// writes copy nothing from the image below; QEMU before 5.2 reads it with the option "extended_l2=off" only.
///
/// # Safety
/// `options` is null or points to a structure with `struct_size` set; its strings are null or terminated. `error` is
/// null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_snapshot(
    disk: *const nacre_disk,
    options: *const nacre_disk_create_options,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let disk = DISKS.get(disk)?;
        // SAFETY: promised by the caller, here and below.
        let o = unsafe { options::read(options) }?;
        // SAFETY: as above.
        let path = unsafe { text::required(o.path, "path") }?;
        // SAFETY: as above.
        let create = unsafe { create_options(&o, disk.size()) }?;
        disk.snapshot(path.as_ref(), &create).map_err(failure)
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Makes everything written so far durable.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_flush(
    disk: *const nacre_disk,
    error: *mut *mut nacre_error,
) -> nacre_status {
    // SAFETY: promised by the caller.
    unsafe { guard(error, || DISKS.get(disk)?.flush().map_err(failure)) }
}

/// Makes a range read as zeros; with `unmap` its space is given back where the format can.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_write_zeroes(
    disk: *const nacre_disk,
    offset: u64,
    len: u64,
    unmap: bool,
    error: *mut *mut nacre_error,
) -> nacre_status {
    // SAFETY: promised by the caller.
    unsafe { guard(error, || DISKS.get(disk)?.write_zeroes(offset, len, unmap).map_err(failure)) }
}

/// Tells the disk that a range's contents are no longer needed.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_discard(
    disk: *const nacre_disk,
    offset: u64,
    len: u64,
    error: *mut *mut nacre_error,
) -> nacre_status {
    // SAFETY: promised by the caller.
    unsafe { guard(error, || DISKS.get(disk)?.discard(offset, len).map_err(failure)) }
}

/// Changes the disk's size while it is open.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_resize(
    disk: *const nacre_disk,
    size: u64,
    error: *mut *mut nacre_error,
) -> nacre_status {
    // SAFETY: promised by the caller.
    unsafe { guard(error, || DISKS.get(disk)?.resize(size).map_err(failure)) }
}

/// Flushes, closes and frees a disk. The handle is stale afterwards, whatever the result says. A call that another
/// thread has under way completes first in the background; the files close after it.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_free(
    disk: *mut nacre_disk,
    error: *mut *mut nacre_error,
) -> nacre_status {
    // SAFETY: promised by the caller.
    unsafe { guard(error, || DISKS.remove(disk)?.close().map_err(failure)) }
}
