//! The host's end of a console port.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::super::iov::send;

/// A console port: what the guest writes goes to one descriptor, what it reads comes from another.
pub struct ConsolePort {
    pub(super) name: String,
    input: Option<File>,
    output: Option<File>,
    socket: bool,
}

impl ConsolePort {
    /// A port with a name that the guest sees (empty for none). Without `input` the guest never reads anything;
    /// without `output` what it writes is lost. The descriptors may be terminals, pipes, sockets or files.
    ///
    /// The flags of the descriptors do not change: other processes may share them.
    pub fn new(name: &str, input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        let (mut socket, mut target) = (false, None);
        if let Some(fd) = output {
            // Opened anew, the same file can be written without blocking, whoever shares the descriptor. A socket
            // cannot be opened; it can be written so anyway.
            let again = OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
            let file = File::from(fd);
            let regular = file.metadata().is_ok_and(|m| m.is_file());
            socket = again.is_err();
            // A regular file never blocks, and a new description would start at its beginning.
            target = Some(if regular { file } else { again.unwrap_or(file) });
        }
        Self { name: name.into(), input: input.map(File::from), output: target, socket }
    }

    pub(super) fn input(&self) -> Option<RawFd> {
        self.input.as_ref().map(AsRawFd::as_raw_fd)
    }

    pub(super) fn output(&self) -> Option<RawFd> {
        self.output.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Reads what is there; 0 at the end. Only called when the descriptor is readable.
    pub(super) fn read(&self, data: &mut [u8]) -> io::Result<usize> {
        match &self.input {
            Some(input) => (&*input).read(data),
            None => Ok(0),
        }
    }

    /// Writes what fits without blocking.
    pub(super) fn write(&self, data: &[u8]) -> io::Result<usize> {
        match &self.output {
            Some(output) if self.socket => match send(output.as_fd(), data) {
                Err(e) if e.raw_os_error() == Some(libc::ENOTSOCK) => (&*output).write(data),
                other => other,
            },
            Some(output) => (&*output).write(data),
            None => Ok(data.len()),
        }
    }
}
