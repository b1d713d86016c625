//! Locks against other processes, compatible with QEMU's.
//!
//! QEMU describes who may do what with an image by shared open-file-description locks on single bytes:
//! byte `100 + p` says "I use permission p", byte `200 + p` says "I do not let others use permission p".
//! Whoever takes a permission first announces it, then looks whether another description holds the
//! opposite byte.

use crate::{Error, Result};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

/// How an image is shared with other processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockMode {
    /// No locks are taken and none are looked at.
    None,
    /// For reading: others may read too, nobody may write.
    Read,
    /// For writing: nobody else may write or read consistently.
    #[default]
    Write,
    /// For writing, tolerating other writers (shared disks of a cluster).
    SharedWrite,
}

const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];
const CONSISTENT_READ: u32 = 1;
const WRITE: u32 = 1 << 1;
const RESIZE: u32 = 1 << 3;
const USED: i64 = 100;
const UNSHARED: i64 = 200;

impl LockMode {
    /// Permissions used and permissions denied to others.
    fn permissions(self) -> (u32, u32) {
        match self {
            LockMode::None => (0, 0),
            LockMode::Read => (CONSISTENT_READ, WRITE | RESIZE),
            LockMode::Write => (CONSISTENT_READ | WRITE | RESIZE, WRITE | RESIZE),
            LockMode::SharedWrite => (CONSISTENT_READ | WRITE, RESIZE),
        }
    }
}

/// Takes the locks of `mode` on an open file, releasing those of another mode that it held before.
pub(super) fn apply(file: BorrowedFd<'_>, path: &Path, mode: LockMode) -> Result<()> {
    let (used, denied) = mode.permissions();
    let fail = |e| Error::io("lock", path.display().to_string(), e);
    for p in 0..NAMES.len() as u32 {
        set(file, USED + i64::from(p), used & (1 << p) != 0).map_err(fail)?;
        set(file, UNSHARED + i64::from(p), denied & (1 << p) != 0).map_err(fail)?;
    }
    for p in 0..NAMES.len() as u32 {
        let conflict = (used & (1 << p) != 0 && held(file, UNSHARED + i64::from(p)).map_err(fail)?)
            || (denied & (1 << p) != 0 && held(file, USED + i64::from(p)).map_err(fail)?);
        if conflict {
            for q in 0..NAMES.len() as i64 {
                set(file, USED + q, false).map_err(fail)?;
                set(file, UNSHARED + q, false).map_err(fail)?;
            }
            return Err(Error::Locked { path: path.to_owned(), permission: NAMES[p as usize] });
        }
    }
    Ok(())
}

/// Gives up all locks. Closing the file is not enough: a child that another thread is forking right now
/// shares the description, and its locks, until it executes its program.
pub(super) fn release(file: BorrowedFd<'_>) {
    for p in 0..NAMES.len() as i64 {
        // Failure leaves the locks to the kernel, which drops them with the description.
        let _ = set(file, USED + p, false);
        let _ = set(file, UNSHARED + p, false);
    }
}

fn request(kind: i32, byte: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

fn set(file: BorrowedFd<'_>, byte: i64, take: bool) -> io::Result<()> {
    let lock = request(if take { libc::F_RDLCK } else { libc::F_UNLCK }, byte);
    // SAFETY: the descriptor is open and `lock` is a valid `flock` for the duration of the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn held(file: BorrowedFd<'_>, byte: i64) -> io::Result<bool> {
    let mut lock = request(libc::F_WRLCK, byte);
    // SAFETY: the descriptor is open and `lock` is a valid, writable `flock` for the duration of the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
    }
}
