//! The hardware watchdog, `/dev/watchdog`.
//!
//! The driver's interface is a handful of ioctls; closing the device without writing `V` leaves it armed,
//! which is what a crashed agent wants.
#![allow(unsafe_code, reason = "the watchdog is set by ioctls")]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

mod calls {
    nix::ioctl_readwrite!(set_timeout, b'W', 6, i32);
    nix::ioctl_read!(keepalive, b'W', 5, i32);
}

/// Why a watchdog cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WatchdogError {
    /// The device cannot be opened or does not answer.
    #[error("Watchdog cannot be used; load its driver (softdog at least)")]
    Device(#[source] io::Error),
    /// The driver set another timeout than the leases count on.
    #[error(
        "Watchdog fires after {got} s instead of {wanted} s; set the lease's watchdog timeout to what it can do"
    )]
    Timeout {
        /// What the leases count on.
        wanted: i32,
        /// What the driver set.
        got: i32,
    },
}

/// An armed watchdog.
#[derive(Debug)]
pub struct Watchdog {
    device: File,
}

impl Watchdog {
    /// Opens and arms the device. A driver that rounds the timeout up is refused: the host would live
    /// longer than others believe.
    pub fn open(path: &Path, seconds: u16) -> Result<Self, WatchdogError> {
        let device = OpenOptions::new().write(true).open(path).map_err(WatchdogError::Device)?;
        let mut watchdog = Watchdog { device };
        let wanted = i32::from(seconds);
        let mut got = wanted;
        // SAFETY: the descriptor is open and `got` outlives the call, which writes one int to it.
        let result = unsafe { calls::set_timeout(watchdog.device.as_raw_fd(), &mut got) };
        let set = result.map_err(|e| WatchdogError::Device(e.into()));
        if let Err(e) = set {
            watchdog.disarm()?;
            return Err(e);
        }
        if got > wanted || got <= 0 {
            watchdog.disarm()?;
            return Err(WatchdogError::Timeout { wanted, got });
        }
        Ok(watchdog)
    }

    /// Starts the countdown anew.
    pub fn feed(&mut self) -> Result<(), WatchdogError> {
        let mut unused = 0;
        // SAFETY: the descriptor is open and `unused` outlives the call.
        unsafe { calls::keepalive(self.device.as_raw_fd(), &mut unused) }
            .map(|_| ())
            .map_err(|e| WatchdogError::Device(e.into()))
    }

    /// Stops the watchdog in an orderly manner.
    pub fn disarm(&mut self) -> Result<(), WatchdogError> {
        self.device.write_all(b"V").map_err(WatchdogError::Device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_watchdog_is_refused() {
        assert!(matches!(Watchdog::open(Path::new("/nonexistent"), 60), Err(WatchdogError::Device(_))));
        assert!(matches!(Watchdog::open(Path::new("/dev/null"), 60), Err(WatchdogError::Device(_))));
    }
}
