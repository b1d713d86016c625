//! The watchdog of a host: a device, or a supervisor behind a pipe.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::config::WatchdogConfig;
use crate::adapters::{Watchdog, WatchdogError};

/// Why a watchdog does not work.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The device does not.
    #[error("Watchdog device does not work")]
    Device(#[source] WatchdogError),
    /// The pipe does not.
    #[error("Watchdog pipe {} does not work; start the supervisor that reads it first", .path.display())]
    Pipe {
        /// The pipe.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

#[derive(Debug)]
pub(super) enum Guard {
    None,
    Device(Watchdog),
    Pipe(File, PathBuf),
}

impl Guard {
    /// Opens, and with a device arms, the watchdog.
    pub(super) fn open(config: Option<&WatchdogConfig>, seconds: u16) -> Result<Self, GuardError> {
        match config {
            None => Ok(Guard::None),
            Some(WatchdogConfig::Device(path)) => {
                Ok(Guard::Device(Watchdog::open(path, seconds).map_err(GuardError::Device)?))
            }
            Some(WatchdogConfig::Pipe(path)) => {
                // Without a reader this fails instead of waiting for one.
                let file = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path);
                let file = file.map_err(|source| GuardError::Pipe { path: path.clone(), source })?;
                Ok(Guard::Pipe(file, path.clone()))
            }
        }
    }

    /// Starts the countdown anew.
    pub(super) fn feed(&mut self) -> Result<(), GuardError> {
        match self {
            Guard::None => Ok(()),
            Guard::Device(device) => device.feed().map_err(GuardError::Device),
            Guard::Pipe(..) => self.write(b"."),
        }
    }

    /// Ends the countdown in an orderly manner.
    pub(super) fn disarm(&mut self) -> Result<(), GuardError> {
        match self {
            Guard::None => Ok(()),
            Guard::Device(device) => device.disarm().map_err(GuardError::Device),
            Guard::Pipe(..) => self.write(b"V"),
        }
    }

    fn write(&mut self, byte: &[u8]) -> Result<(), GuardError> {
        let Guard::Pipe(file, path) = self else { return Ok(()) };
        file.write_all(byte).map_err(|source| GuardError::Pipe { path: path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn a_pipe_without_a_supervisor_is_refused_and_one_with_it_is_fed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("watchdog");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let config = WatchdogConfig::Pipe(path.clone());
        assert!(matches!(Guard::open(Some(&config), 10), Err(GuardError::Pipe { .. })));
        let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let mut guard = Guard::open(Some(&config), 10).unwrap();
        guard.feed().unwrap();
        guard.disarm().unwrap();
        drop(guard);
        let mut seen = String::new();
        reader.unwrap().read_to_string(&mut seen).unwrap();
        assert_eq!(seen, ".V");
    }
}
