//! What a cluster says about who may use an image.

use super::LockMode;
use crate::{Error, Result};
use parking_lot::Mutex;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a lease is not granted.
pub type LeaseError = Box<dyn std::error::Error + Send + Sync>;

/// Asked before an image is used and told when it no longer is, so that hosts which share storage agree on who
/// uses what. The locks of [`LockMode`] do the same among the processes of one host.
///
/// Every file of a disk is asked for: the active image for writing, those below it for reading, each again with
/// another mode when a job begins or ceases to write to it. Every call of [`acquire`](Leases::acquire) that
/// succeeds is followed by one of [`release`](Leases::release) with the same arguments. One image may be open
/// several times. Images that are opened with [`LockMode::None`] are not asked for.
///
/// A lease that is lost while its image is open cannot be taken back here: the program must end, or be ended by
/// its watchdog, before another host is granted the lease.
pub trait Leases: Send + Sync + Debug {
    /// Asked before anything of `image`, an absolute path without symbolic links, is read, looked at or locked.
    /// `mode` says what it will be used for. May block until the cluster has decided.
    fn acquire(&self, image: &Path, mode: LockMode) -> std::result::Result<(), LeaseError>;

    /// Told after the image was closed, or before it is asked for with another mode.
    fn release(&self, image: &Path, mode: LockMode);
}

/// The lease of one open file; dropping it gives it back.
#[derive(Debug)]
pub(super) struct Lease {
    leases: Arc<dyn Leases>,
    image: PathBuf,
    held: Mutex<LockMode>,
}

impl Lease {
    /// Asks for the lease of an image.
    pub fn acquire(leases: &Arc<dyn Leases>, image: PathBuf, mode: LockMode) -> Result<Self> {
        let lease = Lease { leases: leases.clone(), image, held: Mutex::new(LockMode::None) };
        lease.change(mode)?;
        Ok(lease)
    }

    /// Gives the lease back and asks for one of another mode. If that fails, none is held.
    pub fn change(&self, mode: LockMode) -> Result<()> {
        let mut held = self.held.lock();
        if *held == mode {
            return Ok(());
        }
        match std::mem::replace(&mut *held, LockMode::None) {
            LockMode::None => {}
            old => self.leases.release(&self.image, old),
        }
        if mode != LockMode::None {
            let refused = |source| Error::NoLease { image: self.image.clone(), source };
            self.leases.acquire(&self.image, mode).map_err(refused)?;
        }
        *held = mode;
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        match *self.held.get_mut() {
            LockMode::None => {}
            mode => self.leases.release(&self.image, mode),
        }
    }
}
