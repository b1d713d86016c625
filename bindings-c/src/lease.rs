//! Leases and locks on shared storage, for hosts that share disks.

use std::ffi::{c_char, c_int};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cluster::adapters::{DiskError, LeaseDisk, LeaseVolume};
use cluster::keeper::{KeeperConfig, KeeperError, KeeperEvent, LeaseKeeper, Lock, Resource};
use cluster::lease::Timing;
use cluster::lock::{DenyReason, LockMode};
use cluster::ondisk::{Geometry, LayoutError, Name};
use cluster::types::HostId;

use crate::border::{Failure, guard, put};
use crate::error::nacre_error;
use crate::handle::Table;
use crate::options::{self, Options};
use crate::status::nacre_status::{self, *};
use crate::text;

/// Holds this host's lease on a shared volume and renews it. Free it with `nacre_keeper_free`.
pub enum nacre_keeper {}

/// A lock that this host holds. Free it with `nacre_lock_free`.
pub enum nacre_lock {}

static KEEPERS: Table<LeaseKeeper> = Table::new(6, "lease keeper");
static LOCKS: Table<Lock> = Table::new(7, "lock");

/// A lease volume and this host's place on it. Set `struct_size` and the required fields, and zero the rest.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nacre_keeper_options {
    /// `sizeof(struct nacre_keeper_options)`.
    pub struct_size: usize,
    /// The shared file or block device. Required.
    pub path: *const c_char,
    /// The lockspace's name, at most 48 bytes. Required.
    pub space: *const c_char,
    /// This host's name, at most 48 bytes. Required, except to format.
    pub name: *const c_char,
    /// Where the lockspace begins on the volume, in bytes.
    pub offset: u64,
    /// This host's number, 1 to `hosts`, which no other host may have. Required, except to format.
    pub host: u16,
    /// The highest host number in use; 0 for 64.
    pub hosts: u16,
    /// How long one lease I/O may take, in seconds; the same on every host; 0 for 10. Eight times this after the last
    /// renewal, a lease has expired.
    pub io_timeout: u16,
    /// How long after its last feeding a watchdog resets its host, in seconds; the same on every host; 0 for 60.
    pub watchdog_timeout: u16,
    /// Sector size, 512 or 4096; 0 for 512.
    pub sector_size: u32,
    /// Every host has a working watchdog, so that one that is silent for the dead-time is gone. Without this, its
    /// locks can be taken only after `nacre_keeper_declare_gone`.
    pub watchdogs: bool,
    /// Must be zero.
    pub reserved: [u8; 3],
    /// Feed this watchdog device while the lease is fresh or no lock is held; null for none.
    pub watchdog: *const c_char,
}

// SAFETY: repr(C), starts with a usize; pointers and integers may have any bits, the flag is checked as a byte.
unsafe impl Options for nacre_keeper_options {
    const FIRST_SIZE: usize = 64;
    const NAME: &'static str = "nacre_keeper_options";
    const FLAGS: &'static [usize] = &[52];
}

/// How a lock is held.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nacre_lock_mode {
    /// By this host alone.
    NACRE_LOCK_EXCLUSIVE = 1,
    /// By any number of hosts that only read.
    NACRE_LOCK_SHARED = 2,
}

/// What happened to a lease.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nacre_keeper_event {
    /// Nothing: there is no event.
    NACRE_LEASE_NONE = 0,
    /// The lease is held.
    NACRE_LEASE_ACQUIRED = 1,
    /// The lease was renewed.
    NACRE_LEASE_RENEWED = 2,
    /// No renewal succeeded for a while; it will expire if that goes on.
    NACRE_LEASE_WARNING = 3,
    /// The lease is gone, and every lock with it: stop what they protect at once, and free them.
    NACRE_LEASE_LOST = 4,
}

/// A fencing token: `version` rises with every change of a lock's owner, so storage that remembers the highest one can
/// refuse a late writer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct nacre_fencing_token {
    /// Higher than that of every earlier owner of the lock.
    pub version: u64,
    /// How many times the owner's host has taken its lease.
    pub generation: u64,
    /// The owner's host number.
    pub host: u64,
}

fn failure(error: KeeperError) -> Failure {
    let status = match &error {
        KeeperError::Disk(DiskError::Layout { .. } | DiskError::Foreign { .. }) => NACRE_CORRUPT,
        KeeperError::Disk(_) | KeeperError::Watchdog(_) => NACRE_IO,
        KeeperError::Start(_) => NACRE_NO_RESOURCES,
        KeeperError::BadHost(_) => NACRE_INVALID_ARGUMENT,
        KeeperError::TimedOut => NACRE_TIMEOUT,
        KeeperError::Denied(DenyReason::Held(_) | DenyReason::HeldShared(_) | DenyReason::Busy) => NACRE_BUSY,
        KeeperError::Denied(DenyReason::Io) => NACRE_IO,
        KeeperError::Denied(DenyReason::NoLease) => NACRE_WRONG_STATE,
        KeeperError::Lost(_) | KeeperError::HandOver | KeeperError::Ended => NACRE_WRONG_STATE,
    };
    Failure::from_error(status, &error)
}

fn layout(error: LayoutError) -> Failure {
    Failure::from_error(NACRE_INVALID_ARGUMENT, &error)
}

/// Parses a required name of the volume.
///
/// # Safety
/// `name` is null or a terminated string.
unsafe fn name(name: *const c_char, argument: &str) -> Result<Name, Failure> {
    // SAFETY: promised by the caller.
    Name::new(&unsafe { text::required(name, argument) }?).map_err(layout)
}

/// How long a caller waits.
fn patience(timeout_ms: i64) -> Duration {
    const FOR_EVER: u64 = 1 << 45; // a thousand years, without overflow when added to a clock
    Duration::from_millis(u64::try_from(timeout_ms).map_or(FOR_EVER, |ms| ms.min(FOR_EVER)))
}

fn geometry(sector_size: u32) -> Result<Geometry, Failure> {
    match sector_size {
        0 => Ok(Geometry::S512),
        size => Geometry::new(size, if size == 4096 { 8 << 20 } else { 1 << 20 }).map_err(layout),
    }
}

/// The configuration that options describe.
///
/// # Safety
/// As `nacre_keeper_open`.
unsafe fn config(options: *const nacre_keeper_options, host_name: bool) -> Result<KeeperConfig, Failure> {
    // SAFETY: promised by the caller, here and below.
    let o = unsafe { options::read(options) }?;
    // SAFETY: as above.
    let path = PathBuf::from(unsafe { text::required(o.path, "path") }?);
    // SAFETY: as above.
    let space = unsafe { name(o.space, "space") }?;
    // SAFETY: as above.
    let own = if host_name { unsafe { name(o.name, "name") }? } else { space };
    let defaults = KeeperConfig::new(&path, space, HostId(o.host), own);
    let or = |value, default| if value == 0 { default } else { value };
    Ok(KeeperConfig {
        geometry: geometry(o.sector_size)?,
        offset: o.offset,
        timing: Timing {
            io_timeout: or(o.io_timeout, defaults.timing.io_timeout),
            watchdog: or(o.watchdog_timeout, defaults.timing.watchdog),
        },
        hosts: or(o.hosts, defaults.hosts),
        watchdogs: o.watchdogs,
        // SAFETY: as above.
        watchdog: unsafe { text::optional(o.watchdog, "watchdog") }?.map(PathBuf::from),
        ..defaults
    })
}

fn volume(config: &KeeperConfig) -> Result<LeaseVolume, Failure> {
    let disk = LeaseDisk::open(&config.path, config.geometry).map_err(KeeperError::Disk).map_err(failure)?;
    Ok(LeaseVolume::new(disk, config.space, config.offset))
}

/// Formats a lockspace on an existing file or device, once, before any host uses it. It needs room for one area (1 MiB
/// with 512-byte sectors, 8 MiB with 4096-byte ones), and one more for each resource behind it.
///
/// # Safety
/// `options` is null or points to a structure with `struct_size` set; its strings are null or terminated. `error` is
/// null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_lease_format_space(
    options: *const nacre_keeper_options,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        // SAFETY: promised by the caller.
        let config = unsafe { config(options, false) }?;
        let formatted = volume(&config)?.format_space(config.timing.io_timeout);
        formatted.map_err(KeeperError::Disk).map_err(failure)
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Formats the lease area number `index` (from 0) behind a lockspace for a resource, such as a disk, of this name.
///
/// # Safety
/// As `nacre_lease_format_space`; `resource` is null or a terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_lease_format_resource(
    options: *const nacre_keeper_options,
    index: u32,
    resource: *const c_char,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        // SAFETY: promised by the caller, here and below.
        let config = unsafe { config(options, false) }?;
        // SAFETY: as above.
        let resource = unsafe { name(resource, "resource") }?;
        let formatted = volume(&config)?.format_resource(index, resource);
        formatted.map_err(KeeperError::Disk).map_err(failure)
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Opens a lease volume and begins to take this host's lease on it; see `nacre_keeper_wait_held`.
///
/// # Safety
/// `options` is null or points to a structure with `struct_size` set; its strings are null or terminated. `keeper` and
/// `error` are null or point to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_keeper_open(
    options: *const nacre_keeper_options,
    keeper: *mut *mut nacre_keeper,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        // SAFETY: promised by the caller, here and below.
        unsafe { put(keeper, "keeper", std::ptr::null_mut()) }?;
        // SAFETY: as above.
        let config = unsafe { config(options, true) }?;
        let handle = KEEPERS.insert(Arc::new(LeaseKeeper::open(config).map_err(failure)?))?;
        // SAFETY: as above.
        unsafe { put(keeper, "keeper", handle) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Waits until the lease is held, at most `timeout_ms` milliseconds (for ever when negative). It takes two to five I/O
/// timeouts, or the dead-time when another host had the number.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_keeper_wait_held(
    keeper: *const nacre_keeper,
    timeout_ms: i64,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || KEEPERS.get(keeper)?.wait_held(patience(timeout_ms)).map(drop).map_err(failure);
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// How many milliseconds locks may still be used if no renewal succeeds from now on; 0 without a lease.
///
/// # Safety
/// `milliseconds` and `error` are null or point to room for their values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_keeper_expires_in(
    keeper: *const nacre_keeper,
    milliseconds: *mut u64,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let left = KEEPERS.get(keeper)?.expires_in().as_millis();
        // SAFETY: promised by the caller.
        unsafe { put(milliseconds, "milliseconds", u64::try_from(left).unwrap_or(u64::MAX)) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// A descriptor that polls as readable while there are events. It belongs to the keeper: poll it, do not read or close
/// it. -1 when the handle is bad.
#[unsafe(no_mangle)]
pub extern "C" fn nacre_keeper_event_fd(keeper: *const nacre_keeper) -> c_int {
    KEEPERS.get(keeper).map_or(-1, |keeper| keeper.as_fd().as_raw_fd())
}

/// Takes the oldest event; `NACRE_LEASE_NONE` when there is none.
///
/// # Safety
/// `event` and `error` are null or point to room for their values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_keeper_next_event(
    keeper: *const nacre_keeper,
    event: *mut nacre_keeper_event,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let next = match KEEPERS.get(keeper)?.next_event() {
            None => nacre_keeper_event::NACRE_LEASE_NONE,
            Some(KeeperEvent::Acquired(_)) => nacre_keeper_event::NACRE_LEASE_ACQUIRED,
            Some(KeeperEvent::Renewed) => nacre_keeper_event::NACRE_LEASE_RENEWED,
            Some(KeeperEvent::Warning) => nacre_keeper_event::NACRE_LEASE_WARNING,
            Some(KeeperEvent::Lost(_)) => nacre_keeper_event::NACRE_LEASE_LOST,
        };
        // SAFETY: promised by the caller.
        unsafe { put(event, "event", next) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Says that a host's power was seen off, so that its locks can be taken. A host that is merely silent may still write:
/// call this only after fencing.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_keeper_declare_gone(
    keeper: *const nacre_keeper,
    host: u16,
    error: *mut *mut nacre_error,
) -> nacre_status {
    // SAFETY: promised by the caller.
    unsafe { guard(error, || KEEPERS.get(keeper)?.declare_gone(HostId(host)).map_err(failure)) }
}

/// Frees a keeper. Its lease is given back when its last lock has been freed, too.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_keeper_free(
    keeper: *mut nacre_keeper,
    error: *mut *mut nacre_error,
) -> nacre_status {
    // SAFETY: promised by the caller.
    unsafe { guard(error, || KEEPERS.remove(keeper).map(drop)) }
}

/// Takes the lock of a resource, trying again while another host holds it until `timeout_ms` milliseconds are over (for
/// ever when negative, once when 0). `mode` is one of `enum nacre_lock_mode`. Returns `NACRE_BUSY` when another host
/// holds it.
///
/// # Safety
/// `resource` is null or a terminated string. `lock` and `error` are null or point to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_keeper_lock(
    keeper: *const nacre_keeper,
    index: u32,
    resource: *const c_char,
    mode: u32,
    timeout_ms: i64,
    lock: *mut *mut nacre_lock,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        // SAFETY: promised by the caller, here and below.
        unsafe { put(lock, "lock", std::ptr::null_mut()) }?;
        let keeper = KEEPERS.get(keeper)?;
        let mode = match mode {
            m if m == nacre_lock_mode::NACRE_LOCK_EXCLUSIVE as u32 => LockMode::Exclusive,
            m if m == nacre_lock_mode::NACRE_LOCK_SHARED as u32 => LockMode::Shared,
            other => return Err(Failure::invalid(format!("There is no lock mode {other}"))),
        };
        // SAFETY: as above.
        let resource = Resource { index, name: unsafe { name(resource, "resource") }? };
        let taken = keeper.lock(resource, mode, patience(timeout_ms)).map_err(failure)?;
        let handle = LOCKS.insert(Arc::new(taken))?;
        // SAFETY: as above.
        unsafe { put(lock, "lock", handle) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Whether a lock may be used now: the lease that it was taken under has not expired since. Ask before every write
/// that must not happen without the lock.
///
/// # Safety
/// `held` and `error` are null or point to room for their values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_lock_is_held(
    lock: *const nacre_lock,
    held: *mut bool,
    error: *mut *mut nacre_error,
) -> nacre_status {
    // SAFETY: promised by the caller.
    unsafe { guard(error, || put(held, "held", LOCKS.get(lock)?.is_held())) }
}

/// The lock's fencing token.
///
/// # Safety
/// `token` and `error` are null or point to room for their values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_lock_token(
    lock: *const nacre_lock,
    token: *mut nacre_fencing_token,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let t = LOCKS.get(lock)?.token();
        let value = nacre_fencing_token {
            version: t.lver,
            generation: t.owner.generation,
            host: t.owner.host.0.into(),
        };
        // SAFETY: promised by the caller.
        unsafe { put(token, "token", value) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Makes another host the owner of an exclusive lock in one step, for a live migration: stop writing first. The other
/// host then calls `nacre_keeper_lock`. After `NACRE_WRONG_STATE` the lock may be the other host's; it must not be used
/// any more. After other errors `nacre_lock_is_held` tells the truth.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_lock_hand_over(
    lock: *const nacre_lock,
    host: u16,
    error: *mut *mut nacre_error,
) -> nacre_status {
    // SAFETY: promised by the caller.
    unsafe { guard(error, || LOCKS.get(lock)?.hand_over(HostId(host)).map(drop).map_err(failure)) }
}

/// Gives a lock back, waits until other hosts can take it, and frees it. Close what it protects first. On failure it is
/// freed as well, and others can take it once the lease has expired. While another thread uses the lock, it is given
/// back when that call returns.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_lock_free(
    lock: *mut nacre_lock,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || match Arc::try_unwrap(LOCKS.remove(lock)?) {
        Ok(lock) => lock.release().map_err(failure),
        Err(_used) => Ok(()),
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}
