//! Files and block devices.

use super::lease::{Lease, Leases};
use super::{FileId, LockMode, Storage, checked_end, lock};
use crate::iobuf::AlignedBuf;
use crate::{Error, Gather, Result, Scatter};
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Segments handed to one system call.
const MAX_SEGMENTS: usize = 64;
/// Largest unit of zeroing by writing.
const ZERO_CHUNK: usize = 1 << 20;

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileOptions {
    /// Open for reading only.
    pub read_only: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Locks against other processes.
    pub lock: LockMode,
    /// Create the file; it must not exist.
    pub create: bool,
}

/// A file or block device of the host.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    path: PathBuf,
    id: FileId,
    read_only: bool,
    block_device: bool,
    /// Alignment that direct I/O needs; 1 if there is none.
    align: usize,
    /// Serialises read-modify-write cycles of unaligned direct writes, what else changes parts of blocks, and what
    /// changes the length.
    bounce: Mutex<()>,
    /// The file is at least this long.
    least_length: AtomicU64,
    flush_failed: AtomicBool,
    /// A range that held data when it was last looked for; see [`FileStorage::forget_data`].
    known_data: Mutex<Range<u64>>,
    /// Given back after the file is closed: the last field is the last to be dropped.
    lease: Option<Lease>,
}

impl FileStorage {
    /// Opens a file or block device and takes its locks.
    pub fn open(path: &Path, options: FileOptions) -> Result<Self> {
        Self::open_leased(path, options, None)
    }

    /// [`open`](FileStorage::open) with a lease of the cluster, if `leases` are given.
    pub fn open_leased(path: &Path, options: FileOptions, leases: Option<&Arc<dyn Leases>>) -> Result<Self> {
        let mut flags = libc::O_CLOEXEC | libc::O_NONBLOCK; // not to hang on a FIFO
        if options.direct {
            flags |= libc::O_DIRECT;
        }
        let file = File::options()
            .read(true)
            .write(!options.read_only)
            .create_new(options.create)
            .custom_flags(flags)
            .open(path)
            .map_err(|e| Error::io("open", path.display().to_string(), e))?;
        Self::from_file(file, path, options, leases)
    }

    /// A new file in `directory` that has no name and vanishes when it is closed.
    pub fn temporary(directory: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).open(directory);
        let file = file.map_err(|e| Error::io("create a file in", directory.display().to_string(), e))?;
        let options = FileOptions { lock: LockMode::None, ..FileOptions::default() };
        Self::from_file(file, directory, options, None)
    }

    /// Wraps an open file; `path` is its name in messages. `options.create` has no meaning here.
    pub fn from_file(
        file: File,
        path: &Path,
        options: FileOptions,
        leases: Option<&Arc<dyn Leases>>,
    ) -> Result<Self> {
        let fail = |op, e| Error::io(op, path.display().to_string(), e);
        let meta = file.metadata().map_err(|e| fail("inspect", e))?;
        let block_device = meta.file_type().is_block_device();
        if !block_device && !meta.is_file() {
            return Err(Error::unsupported(path.display().to_string(), "a file that is no disk image"));
        }
        let lease = match leases.filter(|_| options.lock != LockMode::None) {
            None => None,
            Some(leases) => {
                let image = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
                Some(Lease::acquire(leases, image.map_err(|e| fail("inspect", e))?, options.lock)?)
            }
        };
        lock::apply(file.as_fd(), path, options.lock)?;
        Ok(FileStorage {
            file,
            path: path.to_owned(),
            id: FileId::of(&meta),
            read_only: options.read_only,
            block_device,
            align: if options.direct { 4096 } else { 1 },
            bounce: Mutex::new(()),
            least_length: AtomicU64::new(if block_device { u64::MAX } else { meta.len() }),
            flush_failed: AtomicBool::new(false),
            known_data: Mutex::default(),
            lease,
        })
    }

    /// The path that the file was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn raw(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Looks for holes again from now on. To take a hole for data is never wrong, only slower, so this is
    /// called where this process makes holes; holes that others make are found sooner or later.
    fn forget_data(&self) {
        *self.known_data.lock() = 0..0;
    }

    /// Reads until the end of the list or of the file; returns the number of bytes read.
    fn read_list(&self, mut dst: Scatter<'_>, offset: u64) -> io::Result<usize> {
        let mut done = 0;
        let mut iov = [EMPTY; MAX_SEGMENTS];
        while done < dst.len() {
            let left = dst.len() - done;
            let n = dst.slice(done, left).fill_iovecs(&mut iov);
            // SAFETY: the first `n` segments are writable memory by the contract of `Scatter`.
            let got = unsafe {
                match n {
                    1 => libc::pread(
                        self.raw(),
                        iov[0].iov_base,
                        iov[0].iov_len,
                        (offset + done as u64) as i64,
                    ),
                    _ => libc::preadv(self.raw(), iov.as_ptr(), n as i32, (offset + done as u64) as i64),
                }
            };
            match check(got)? {
                Some(0) => break,
                Some(got) => done += got,
                None => {}
            }
        }
        Ok(done)
    }

    fn write_list(&self, src: Gather<'_>, offset: u64) -> io::Result<()> {
        let mut done = 0;
        let mut iov = [EMPTY; MAX_SEGMENTS];
        while done < src.len() {
            let n = src.slice(done, src.len() - done).fill_iovecs(&mut iov);
            // SAFETY: the first `n` segments are readable memory by the contract of `Gather`.
            let put = unsafe {
                match n {
                    1 => libc::pwrite(
                        self.raw(),
                        iov[0].iov_base,
                        iov[0].iov_len,
                        (offset + done as u64) as i64,
                    ),
                    _ => libc::pwritev(self.raw(), iov.as_ptr(), n as i32, (offset + done as u64) as i64),
                }
            };
            match check(put)? {
                Some(0) => return Err(io::ErrorKind::WriteZero.into()),
                Some(put) => done += put,
                None => {}
            }
        }
        Ok(())
    }

    /// Copies from another file and returns the number of bytes.
    fn copy_range(&self, fd: RawFd, from: u64, offset: u64, len: u64) -> u64 {
        let mut done = 0;
        while done < len {
            let (mut read, mut write) = ((from + done) as i64, (offset + done) as i64);
            let count = usize::try_from(len - done).unwrap_or(usize::MAX);
            // SAFETY: both descriptors are open, as their storages are borrowed, and the two offsets are
            // writable for the duration of the call.
            let copied =
                unsafe { libc::copy_file_range(fd, &raw mut read, self.raw(), &raw mut write, count, 0) };
            match check(copied) {
                // The end of the source, or something that shows again when the bytes are read and written.
                Ok(Some(0)) | Err(_) => break,
                Ok(Some(copied)) => done += copied as u64,
                Ok(None) => {}
            }
        }
        done
    }

    fn is_aligned(&self, offset: u64, len: usize) -> bool {
        offset.is_multiple_of(self.align as u64) && len.is_multiple_of(self.align)
    }

    /// The aligned range around a request.
    fn widened(&self, offset: u64, len: usize) -> (u64, usize) {
        let align = self.align as u64;
        let start = offset / align * align;
        (start, ((offset + len as u64).next_multiple_of(align) - start) as usize)
    }

    /// Runs a change up to `end`: under the lock if it may make the file longer, as others read the length to set it.
    /// The change returns the end that it reached.
    fn reaching(&self, end: u64, change: impl FnOnce() -> io::Result<u64>) -> io::Result<u64> {
        if end <= self.least_length.load(Ordering::Acquire) {
            return change();
        }
        let _bounce = self.bounce.lock();
        let reached = change()?;
        self.least_length.fetch_max(reached, Ordering::Release);
        Ok(reached)
    }

    /// Writes up to `end`, which may make the file longer.
    fn write_up_to(&self, end: u64, src: Gather<'_>, offset: u64) -> io::Result<()> {
        self.reaching(end, || self.write_list(src, offset).map(|()| end)).map(|_| ())
    }

    /// Changes the length. The caller has locked `bounce`.
    fn set_len_locked(&self, len: u64) -> io::Result<()> {
        self.least_length.fetch_min(len, Ordering::AcqRel);
        self.file.set_len(len)?;
        self.least_length.store(len, Ordering::Release);
        Ok(())
    }

    /// Makes the file at least this long.
    fn lengthen(&self, end: u64) -> io::Result<()> {
        let lengthen = || if self.len()? < end { self.set_len_locked(end) } else { Ok(()) };
        self.reaching(end, || lengthen().map(|()| end)).map(|_| ())
    }

    fn fallocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<bool> {
        let align = self.align as u64;
        if !(offset.is_multiple_of(align) && len.is_multiple_of(align)) {
            // Whoever rewrites a block for the sake of a part would bring back what goes here.
            let _bounce = self.bounce.lock();
            return self.fallocate_now(mode, offset, len);
        }
        match mode & libc::FALLOC_FL_KEEP_SIZE {
            0 => {
                let change = || Ok(if self.fallocate_now(mode, offset, len)? { offset + len } else { 0 });
                Ok(self.reaching(offset + len, change)? != 0)
            }
            _ => self.fallocate_now(mode, offset, len),
        }
    }

    fn fallocate_now(&self, mode: i32, offset: u64, len: u64) -> io::Result<bool> {
        loop {
            // SAFETY: a system call on an open descriptor without pointers.
            let rc = unsafe { libc::fallocate(self.raw(), mode, offset as i64, len as i64) };
            if rc == 0 {
                return Ok(true);
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EOPNOTSUPP | libc::ENOSYS) => return Ok(false),
                Some(libc::EINVAL) if self.block_device => return Ok(false), // unaligned
                _ => return Err(error),
            }
        }
    }

    /// Writes zeros from the end of the file, or from `offset` if that is behind it, up to `end`.
    fn append_zero_bytes(&self, offset: u64, end: u64) -> io::Result<()> {
        // What others append waits for this, or is there already and stays.
        let _bounce = self.bounce.lock();
        let old = self.len()?;
        if end <= old {
            return Ok(());
        }
        let align = self.align as u64;
        let mut at = old.next_multiple_of(align).max(offset / align * align);
        let stop = end.next_multiple_of(align);
        let zeros = AlignedBuf::new(ZERO_CHUNK, self.align.max(8));
        while at < stop {
            let n = (stop - at).min(ZERO_CHUNK as u64) as usize;
            self.write_list(Gather::new(&zeros[..n]), at)?;
            at += n as u64;
        }
        self.set_len_locked(end) // whole blocks may have gone beyond
    }

    fn write_zero_bytes(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeros = AlignedBuf::new(ZERO_CHUNK.min(len as usize), self.align.max(8));
        let mut done = 0;
        while done < len {
            let n = (len - done).min(ZERO_CHUNK as u64) as usize;
            self.writev(Gather::new(&zeros[..n]), offset + done)?;
            done += n as u64;
        }
        Ok(())
    }
}

const EMPTY: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// The byte count of a transfer, or `None` if it was interrupted.
fn check(rc: isize) -> io::Result<Option<usize>> {
    if rc >= 0 {
        return Ok(Some(rc as usize));
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(None),
        _ => Err(error),
    }
}

impl Storage for FileStorage {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn len(&self) -> io::Result<u64> {
        if self.block_device {
            // SAFETY: a system call on an open descriptor without pointers.
            let end = unsafe { libc::lseek(self.raw(), 0, libc::SEEK_END) };
            return if end < 0 { Err(io::Error::last_os_error()) } else { Ok(end as u64) };
        }
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.block_device {
            return match self.len()? >= len {
                true => Ok(()),
                false => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            };
        }
        self.forget_data();
        let _bounce = self.bounce.lock();
        self.set_len_locked(len)
    }

    fn readv(&self, mut dst: Scatter<'_>, offset: u64) -> io::Result<()> {
        checked_end(offset, dst.len() as u64)?;
        let len = dst.len();
        if self.align == 1 || (self.is_aligned(offset, len) && dst.aligned(512)) {
            let got = self.read_list(dst.slice(0, len), offset)?;
            dst.slice(got, len - got).zero();
            return Ok(());
        }
        let (start, wide) = self.widened(offset, len);
        let mut buf = AlignedBuf::new(wide, self.align);
        self.read_list(Scatter::new(&mut buf), start)?; // the rest stays zero
        let skip = (offset - start) as usize;
        dst.copy_from(&buf[skip..skip + len]);
        Ok(())
    }

    fn writev(&self, src: Gather<'_>, offset: u64) -> io::Result<()> {
        let end = checked_end(offset, src.len() as u64)?;
        if self.align == 1 || (self.is_aligned(offset, src.len()) && src.aligned(512)) {
            return self.write_up_to(end, src, offset);
        }
        let (start, wide) = self.widened(offset, src.len());
        let skip = (offset - start) as usize;
        let mut buf = AlignedBuf::new(wide, self.align);
        if wide == src.len() {
            src.copy_to(&mut buf); // only the memory is unaligned
            return self.write_up_to(end, Gather::new(&buf), start);
        }
        let _bounce = self.bounce.lock();
        let old_len = self.len()?;
        self.read_list(Scatter::new(&mut buf), start)?;
        src.copy_to(&mut buf[skip..skip + src.len()]);
        self.write_list(Gather::new(&buf), start)?;
        // The widened write must not make the file longer than the caller did.
        if !self.block_device && start + wide as u64 > old_len.max(end) {
            self.set_len_locked(old_len.max(end))?;
        }
        self.least_length.fetch_max(end, Ordering::Release);
        Ok(())
    }

    fn copy_from(&self, source: &dyn Storage, from: u64, offset: u64, len: u64) -> u64 {
        let Some(fd) = source.fd().filter(|_| self.align == 1) else { return 0 };
        if checked_end(from, len).is_err() || checked_end(offset, len).is_err() {
            return 0;
        }
        let copy = || Ok(offset + self.copy_range(fd, from, offset, len));
        self.reaching(offset + len, copy).map_or(0, |end| end - offset)
    }

    fn flush(&self) -> io::Result<()> {
        if self.flush_failed.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        // After a failure the kernel may drop dirty pages and report success next time.
        self.file.sync_data().inspect_err(|_| self.flush_failed.store(true, Ordering::Release))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let end = checked_end(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.forget_data();
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        if unmap && self.fallocate(punch, offset, len)? {
            self.lengthen(end)?;
            return Ok(());
        }
        if self.fallocate(libc::FALLOC_FL_ZERO_RANGE, offset, len)? {
            return Ok(());
        }
        self.write_zero_bytes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        checked_end(offset, len)?;
        if len > 0 {
            self.forget_data();
            self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len)?;
        }
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = checked_end(offset, len)?;
        if self.block_device {
            return self.set_len(end);
        }
        if len > 0 && !self.fallocate(0, offset, len)? {
            self.append_zero_bytes(offset, end)?;
        }
        Ok(())
    }

    fn data_at(&self, offset: u64, len: u64) -> io::Result<(bool, u64)> {
        let end = checked_end(offset, len)?;
        if self.block_device {
            return Ok((true, len));
        }
        // A file system may walk the whole file to find the next hole, so what it found is kept: a disk is
        // mapped piece by piece.
        let mut known = self.known_data.lock();
        if known.contains(&offset) {
            return Ok((true, known.end.min(end) - offset));
        }
        // SAFETY: system calls on an open descriptor without pointers.
        let seek = |whence| match unsafe { libc::lseek(self.raw(), offset as i64, whence) } {
            -1 => Err(io::Error::last_os_error()),
            at => Ok(at as u64),
        };
        let data = match seek(libc::SEEK_DATA) {
            Ok(at) => at,
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok((false, len)),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Ok((true, len)),
            Err(e) => return Err(e),
        };
        if data > offset {
            return Ok((false, data.min(end) - offset));
        }
        // Another thread may have punched a hole between the two calls.
        let hole = seek(libc::SEEK_HOLE)?.max(offset + 1);
        *known = offset..hole;
        Ok((true, hole.min(end) - offset))
    }

    fn zero_beyond_end(&self) -> bool {
        !self.block_device
    }

    fn allocated(&self) -> io::Result<u64> {
        match self.block_device {
            true => self.len(),
            false => Ok(self.file.metadata()?.blocks() * 512),
        }
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn file_id(&self) -> Option<FileId> {
        Some(self.id)
    }

    fn modified(&self) -> Option<i128> {
        let meta = self.file.metadata().ok()?;
        Some(i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()))
    }

    fn fd(&self) -> Option<RawFd> {
        Some(self.raw())
    }

    fn alignment(&self) -> usize {
        self.align
    }

    fn writable_end(&self) -> u64 {
        self.least_length.load(Ordering::Acquire)
    }

    fn set_lock(&self, mode: LockMode) -> Result<()> {
        if let Some(lease) = self.lease.as_ref().filter(|_| mode != LockMode::None) {
            lease.change(mode)?;
        }
        lock::apply(self.file.as_fd(), &self.path, mode)?;
        match &self.lease {
            Some(lease) if mode == LockMode::None => lease.change(mode),
            _ => Ok(()),
        }
    }
}

impl Drop for FileStorage {
    fn drop(&mut self) {
        lock::release(self.file.as_fd());
    }
}

#[cfg(test)]
mod tests;
