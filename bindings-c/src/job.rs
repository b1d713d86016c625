//! Long-running work on disks: commit, stream, convert, backup, mirror, compare.

use std::ffi::c_int;
use std::io::{PipeReader, PipeWriter, Write, pipe};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blockfmt::Disk;
use blockfmt::job::{self, Comparison, ConvertOptions, JobControl, Mirror, MirrorMode};
use parking_lot::{Condvar, Mutex};

use crate::border::{Failure, guard, put};
use crate::disk::{self, nacre_disk};
use crate::error::nacre_error;
use crate::handle::Table;
use crate::status::nacre_status::{self, *};

/// Work on disks that runs in a thread of its own. Free it with `nacre_job_free`, which cancels it if need be.
pub enum nacre_job {}

static JOBS: Table<Job> = Table::new(5, "job");

/// Names no layer; in the header as a macro.
/// cbindgen:ignore
pub const NACRE_NO_LAYER: usize = usize::MAX;

/// How a mirror follows its source.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nacre_mirror_mode {
    /// Changes are copied some time after they happened.
    NACRE_MIRROR_BACKGROUND = 1,
    /// A write of the source is complete when the target has it too.
    NACRE_MIRROR_WRITE_BLOCKING = 2,
}

/// How a mirror ends.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nacre_mirror_end {
    /// The source stays in use; the target is a copy of this moment.
    NACRE_MIRROR_FINISH = 1,
    /// The source's handle, and every machine that uses it, goes on with the target.
    NACRE_MIRROR_PIVOT = 2,
}

/// Where a job is.
#[derive(Default)]
struct State {
    /// The mirror follows its source and can be completed.
    ready: bool,
    complete: Option<nacre_mirror_end>,
    cancelled: bool,
    outcome: Option<Result<u64, Failure>>,
}

#[derive(Default)]
struct Shared {
    control: JobControl,
    state: Mutex<State>,
    changed: Condvar,
}

struct Job {
    shared: Arc<Shared>,
    /// Readable from the moment when the job ends.
    ended: PipeReader,
    thread: Option<JoinHandle<()>>,
}

impl Job {
    fn cancel(&self) {
        self.shared.control.cancel();
        self.shared.state.lock().cancelled = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.cancel();
        if let Some(thread) = self.thread.take() {
            // Its panic was turned into the job's outcome.
            let _ = thread.join();
        }
    }
}

/// Ends a job however its thread ends.
struct Ending {
    shared: Arc<Shared>,
    outcome: Result<u64, Failure>,
    writer: PipeWriter,
}

impl Ending {
    fn set(&mut self, outcome: Result<u64, Failure>) {
        self.outcome = outcome;
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.shared.state.lock().outcome = Some(std::mem::replace(&mut self.outcome, Ok(0)));
        self.shared.changed.notify_all();
        // Nobody polls when the reader is gone.
        let _ = self.writer.write_all(&[1]);
    }
}

/// Starts a job and writes its handle.
///
/// # Safety
/// As [`put`] for `job`.
unsafe fn start(
    job: *mut *mut nacre_job,
    work: impl FnOnce(&Shared) -> blockfmt::Result<u64> + Send + 'static,
) -> Result<(), Failure> {
    // SAFETY: promised by the caller, here and below. Looked at first, so that no job starts without a handle.
    unsafe { put(job, "job", std::ptr::null_mut()) }?;
    let io = |e: std::io::Error| Failure::from_error(NACRE_NO_RESOURCES, &e);
    let (ended, writer) = pipe().map_err(io)?;
    let shared = Arc::new(Shared::default());
    let internal = Err(Failure::new(NACRE_INTERNAL, "Internal error: the job panicked"));
    let mut ending = Ending { shared: shared.clone(), outcome: internal, writer };
    let run = move || {
        let outcome = work(&ending.shared).map_err(disk::failure);
        ending.set(outcome);
    };
    let thread = std::thread::Builder::new().name("nacre-job".into()).spawn(run).map_err(io)?;
    let handle = JOBS.insert(Arc::new(Job { shared, ended, thread: Some(thread) }))?;
    // SAFETY: as above.
    unsafe { put(job, "job", handle) }
}

/// Merges a layer of a disk into its parent and removes it from the chain. Layer 0 is the active one; the disk stays in
/// use meanwhile.
///
/// # Safety
/// `job` and `error` are null or point to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_commit(
    disk: *const nacre_disk,
    layer: usize,
    job: *mut *mut nacre_job,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let disk = disk::get(disk)?;
        // SAFETY: promised by the caller.
        unsafe { start(job, move |s| job::commit(&disk, layer, &s.control).map(|()| 0)) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Pulls what the layers between `layer` and `base` hold up into `layer` and removes them from the chain. With
/// `NACRE_NO_LAYER` as `base`, `layer` depends on nothing afterwards. The disk stays in use meanwhile.
///
/// # Safety
/// `job` and `error` are null or point to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_stream(
    disk: *const nacre_disk,
    layer: usize,
    base: usize,
    job: *mut *mut nacre_job,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let disk = disk::get(disk)?;
        let base = (base != NACRE_NO_LAYER).then_some(base);
        // SAFETY: promised by the caller.
        unsafe { start(job, move |s| job::stream(&disk, layer, base, &s.control).map(|()| 0)) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Two disks of a job.
fn two(source: *const nacre_disk, target: *const nacre_disk) -> Result<(Arc<Disk>, Arc<Disk>), Failure> {
    let (source, target) = (disk::get(source)?, disk::get(target)?);
    if Arc::ptr_eq(&source, &target) {
        return Err(Failure::invalid("Source and target are the same disk"));
    }
    Ok((source, target))
}

/// Copies all of a disk that nobody writes to a new and empty one of at least its size. `compress` stores compressed
/// clusters, which only qcow2 has.
///
/// # Safety
/// `job` and `error` are null or point to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_convert(
    source: *const nacre_disk,
    target: *const nacre_disk,
    compress: bool,
    job: *mut *mut nacre_job,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let (source, target) = two(source, target)?;
        let options = ConvertOptions { compress, ..ConvertOptions::default() };
        // SAFETY: promised by the caller.
        unsafe { start(job, move |s| job::convert(&source, &target, options, &s.control).map(|()| 0)) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Copies a disk as it is at this moment, while it stays in use, to one of at least its size.
///
/// # Safety
/// `job` and `error` are null or point to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_backup(
    source: *const nacre_disk,
    target: *const nacre_disk,
    job: *mut *mut nacre_job,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let (source, target) = two(source, target)?;
        // SAFETY: promised by the caller.
        unsafe { start(job, move |s| job::backup(&source, &target, None, &s.control).map(|()| 0)) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Compares two disks; the job's result is 0 when they read the same (the longer one may end with zeros), otherwise 1
/// plus the offset of the first difference.
///
/// # Safety
/// `job` and `error` are null or point to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_compare(
    a: *const nacre_disk,
    b: *const nacre_disk,
    job: *mut *mut nacre_job,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let (a, b) = two(a, b)?;
        let compare = move |s: &Shared| {
            Ok(match job::compare(&a, &b, &s.control)? {
                Comparison::Identical => 0,
                Comparison::Differs(offset) => offset + 1,
            })
        };
        // SAFETY: promised by the caller.
        unsafe { start(job, compare) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Copies a disk to another one of at least its size and follows its changes until `nacre_job_complete`. `mode` is one
/// of `enum nacre_mirror_mode`.
///
/// # Safety
/// `job` and `error` are null or point to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_disk_mirror(
    source: *const nacre_disk,
    target: *const nacre_disk,
    mode: u32,
    job: *mut *mut nacre_job,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let (source, target) = two(source, target)?;
        let mode = match mode {
            m if m == nacre_mirror_mode::NACRE_MIRROR_BACKGROUND as u32 => MirrorMode::Background,
            m if m == nacre_mirror_mode::NACRE_MIRROR_WRITE_BLOCKING as u32 => MirrorMode::WriteBlocking,
            other => return Err(Failure::invalid(format!("There is no mode {other} of a mirror"))),
        };
        // SAFETY: promised by the caller.
        unsafe { start(job, move |s| mirror(s, &source, &target, mode)) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

fn mirror(shared: &Shared, source: &Disk, target: &Disk, mode: MirrorMode) -> blockfmt::Result<u64> {
    let mirror = Mirror::start(source, target, mode, None)?.run(&shared.control)?;
    let end = {
        let mut state = shared.state.lock();
        state.ready = true;
        shared.changed.notify_all();
        loop {
            if state.cancelled {
                return Err(blockfmt::Error::Cancelled);
            }
            match state.complete {
                Some(end) => break end,
                None => shared.changed.wait(&mut state),
            }
        }
    };
    match end {
        nacre_mirror_end::NACRE_MIRROR_FINISH => mirror.finish(&shared.control)?,
        nacre_mirror_end::NACRE_MIRROR_PIVOT => mirror.pivot(&shared.control)?,
    }
    Ok(0)
}

/// Waits for `condition`, at most until `timeout_ms` are over (for ever when negative). Returns whether it came true.
fn wait_for(shared: &Shared, timeout_ms: i64, condition: impl Fn(&State) -> bool) -> bool {
    let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
    let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
    let mut state = shared.state.lock();
    while !condition(&state) {
        match deadline {
            None => shared.changed.wait(&mut state),
            Some(deadline) if shared.changed.wait_until(&mut state, deadline).timed_out() => {
                return condition(&state);
            }
            Some(_) => {}
        }
    }
    true
}

/// Waits until a mirror follows its source, at most `timeout_ms` milliseconds (for ever when negative), and completes
/// it: `end` is one of `enum nacre_mirror_end`. Returns `NACRE_TIMEOUT` when it is not ready then; `NACRE_WRONG_STATE`
/// when the job has ended or its completion was asked for already. Any other kind of job completes by itself.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_job_complete(
    job: *const nacre_job,
    end: u32,
    timeout_ms: i64,
    error: *mut *mut nacre_error,
) -> nacre_status {
    use nacre_mirror_end::*;
    let body = || {
        let job = JOBS.get(job)?;
        let end = match end {
            e if e == NACRE_MIRROR_FINISH as u32 => NACRE_MIRROR_FINISH,
            e if e == NACRE_MIRROR_PIVOT as u32 => NACRE_MIRROR_PIVOT,
            other => return Err(Failure::invalid(format!("There is no end {other} of a mirror"))),
        };
        if !wait_for(&job.shared, timeout_ms, |s| s.ready || s.outcome.is_some()) {
            return Err(Failure::new(NACRE_TIMEOUT, "The mirror is not ready yet"));
        }
        let mut state = job.shared.state.lock();
        if state.outcome.is_some() || state.complete.is_some() {
            return Err(Failure::new(NACRE_WRONG_STATE, "The job has ended, or is being completed"));
        }
        state.complete = Some(end);
        job.shared.changed.notify_all();
        Ok(())
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Waits until a job has ended, at most `timeout_ms` milliseconds (for ever when negative). Returns the job's own
/// status, or `NACRE_TIMEOUT` while it runs. `result` (may be null) receives what the job found out, 0 for most.
///
/// # Safety
/// `result` and `error` are null or point to room for their values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_job_wait(
    job: *const nacre_job,
    timeout_ms: i64,
    result: *mut u64,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let job = JOBS.get(job)?;
        if !wait_for(&job.shared, timeout_ms, |s| s.outcome.is_some()) {
            return Err(Failure::new(NACRE_TIMEOUT, "The job still runs"));
        }
        let value = match &job.shared.state.lock().outcome {
            Some(Ok(value)) => *value,
            Some(Err(f)) => return Err(Failure { status: f.status, messages: f.messages.clone() }),
            None => return Err(Failure::new(NACRE_TIMEOUT, "The job still runs")),
        };
        if !result.is_null() {
            // SAFETY: promised by the caller.
            unsafe { result.write_unaligned(value) };
        }
        Ok(())
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// How far a job is, in bytes: those dealt with and those to deal with in total, as far as is known. The total of a
/// mirror grows with its source's changes.
///
/// # Safety
/// `done`, `total` and `error` are null or point to room for their values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_job_progress(
    job: *const nacre_job,
    done: *mut u64,
    total: *mut u64,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let progress = JOBS.get(job)?.shared.control.progress();
        // SAFETY: promised by the caller.
        unsafe {
            put(done, "done", progress.done)?;
            put(total, "total", progress.total)
        }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Limits a job to this many bytes a second; 0 lifts the limit.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_job_set_rate(
    job: *const nacre_job,
    bytes_per_second: u64,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        JOBS.get(job)?.shared.control.set_rate(bytes_per_second);
        Ok(())
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Asks a job to end soon; it ends with `NACRE_CANCELLED` unless it was over already. The disks stay usable; commit,
/// stream and a new convert may be started again.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_job_cancel(
    job: *const nacre_job,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        JOBS.get(job)?.cancel();
        Ok(())
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// A descriptor that polls as readable when the job has ended. It belongs to the job: poll it, do not read or close
/// it. -1 when the handle is bad.
#[unsafe(no_mangle)]
pub extern "C" fn nacre_job_event_fd(job: *const nacre_job) -> c_int {
    JOBS.get(job).map_or(-1, |job| job.ended.as_raw_fd())
}

/// Cancels a job if it runs, waits for its end, and frees it.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_job_free(job: *mut nacre_job, error: *mut *mut nacre_error) -> nacre_status {
    let body = || {
        let job = JOBS.remove(job)?;
        // Calls that wait for it in other threads return, too.
        job.cancel();
        Ok(())
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_a_job_is_its_outcome() {
        let mut job = std::ptr::null_mut();
        // SAFETY: `job` has room for a pointer; so below.
        unsafe { start(&mut job, |_| panic!("injected")) }.unwrap();
        let mut result = 7;
        // SAFETY: the pointers are valid or null.
        let status = unsafe { nacre_job_wait(job, -1, &mut result, std::ptr::null_mut()) };
        assert_eq!((status, result), (NACRE_INTERNAL, 7));
        // SAFETY: null is allowed.
        assert_eq!(unsafe { nacre_job_free(job, std::ptr::null_mut()) }, NACRE_OK);
        // SAFETY: null is allowed.
        assert_eq!(unsafe { nacre_job_free(job, std::ptr::null_mut()) }, NACRE_BAD_HANDLE);
    }
}
