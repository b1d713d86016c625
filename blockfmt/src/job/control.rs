//! Cancelling, limiting and watching a job.

use crate::{Error, Result};
use parking_lot::{Condvar, Mutex};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How far a job is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Progress {
    /// Bytes dealt with.
    pub done: u64,
    /// Bytes to deal with in total, as far as is known. A busy guest makes it grow.
    pub total: u64,
}

type Callback = Box<dyn Fn(Progress) + Send + Sync>;

/// The other end of a running job. Share it by reference or in an `Arc`.
#[derive(Default)]
pub struct JobControl {
    cancelled: AtomicBool,
    done: AtomicU64,
    total: AtomicU64,
    /// Bytes per second; 0 for no limit.
    rate: AtomicU64,
    /// When the bytes that were admitted so far are paid for.
    paid: Mutex<Option<Instant>>,
    wake: Condvar,
    callback: Option<Callback>,
}

impl fmt::Debug for JobControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cancelled = self.cancelled.load(Ordering::Relaxed);
        f.debug_struct("JobControl")
            .field("progress", &self.progress())
            .field("cancelled", &cancelled)
            .finish()
    }
}

impl JobControl {
    /// No limit, nobody watching.
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls `callback`, on the job's threads, whenever the progress changes.
    pub fn on_progress(mut self, callback: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.callback = Some(Box::new(callback));
        self
    }

    /// Makes the job end soon with [`Error::Cancelled`].
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        let _paid = self.paid.lock(); // a job that is about to wait has seen the flag or is waiting now
        self.wake.notify_all();
    }

    /// Limits the job to this many bytes per second; 0 lifts the limit.
    pub fn set_rate(&self, bytes_per_second: u64) {
        self.rate.store(bytes_per_second, Ordering::Release);
        *self.paid.lock() = None;
        self.wake.notify_all();
    }

    /// How far the job is.
    pub fn progress(&self) -> Progress {
        Progress { done: self.done.load(Ordering::Relaxed), total: self.total.load(Ordering::Relaxed) }
    }

    /// Whether the job was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Shows how far a job of another process is, to whoever watches this control.
    pub fn report_remote(&self, done: u64, total: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.done.store(done, Ordering::Relaxed);
        self.report();
    }

    /// Fails if the job was cancelled.
    pub(crate) fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Starts to count.
    pub(crate) fn begin(&self, total: u64) {
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        self.report();
    }

    /// Raises the total.
    pub(crate) fn add_total(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that cost nothing (holes).
    pub(crate) fn skip(&self, bytes: u64) -> Result<()> {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.report();
        self.check()
    }

    /// Counts bytes that are about to be moved, waiting as long as the rate demands.
    pub(crate) fn step(&self, bytes: u64) -> Result<()> {
        let mut paid = self.paid.lock();
        loop {
            self.check()?;
            let rate = self.rate.load(Ordering::Acquire);
            if rate == 0 {
                break;
            }
            let now = Instant::now();
            let due = paid.unwrap_or(now);
            if due <= now {
                let seconds = bytes as f64 / rate as f64;
                *paid = Some(due.max(now) + Duration::from_secs_f64(seconds.min(3600.0)));
                break;
            }
            self.wake.wait_until(&mut paid, due);
        }
        drop(paid);
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.report();
        Ok(())
    }

    fn report(&self) {
        if let Some(callback) = &self.callback {
            callback(self.progress());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_job_is_cancelled() {
        let control = JobControl::new();
        control.set_rate(1);
        std::thread::scope(|scope| {
            let job = scope.spawn(|| {
                control.step(1 << 20)?;
                control.step(1)
            });
            control.cancel();
            assert!(matches!(job.join().unwrap(), Err(Error::Cancelled)));
        });
    }
}
