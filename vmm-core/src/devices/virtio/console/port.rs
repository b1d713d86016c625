//! The host's end of a console port.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use parking_lot::Mutex;

use super::super::iov::send;

/// A console port: what the guest writes goes to one descriptor, what it reads comes from another.
pub struct ConsolePort {
    pub(super) name: String,
    ends: Mutex<Ends>,
    listener: Option<UnixListener>,
}

#[derive(Default)]
struct Ends {
    input: Option<Arc<File>>,
    output: Option<Arc<File>>,
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
            // A regular file never blocks, and a new description would start at its beginning. The multiplexer of
            // pseudo-terminals makes a new one each time that it is opened.
            let ptmx = libc::makedev(5, 2);
            let keep = file.metadata().is_ok_and(|m| m.is_file() || m.rdev() == ptmx);
            socket = again.is_err();
            target = Some(if keep { file } else { again.unwrap_or(file) });
        }
        let ends = Ends { input: input.map(|fd| Arc::new(fd.into())), output: target.map(Arc::new), socket };
        Self { name: name.into(), ends: Mutex::new(ends), listener: None }
    }

    /// A port that one client of a Unix socket at a time uses. What the guest writes while there is none is lost.
    ///
    /// # Errors
    /// Fails when the socket cannot be made non-blocking.
    pub fn listening(name: &str, listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { name: name.into(), ends: Mutex::default(), listener: Some(listener) })
    }

    pub(super) fn input(&self) -> Option<RawFd> {
        self.ends.lock().input.as_ref().map(AsRawFd::as_raw_fd)
    }

    pub(super) fn output(&self) -> Option<RawFd> {
        self.ends.lock().output.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// The descriptor that clients connect to.
    pub(super) fn listener(&self) -> Option<RawFd> {
        self.listener.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Whether somebody is there; a port that does not listen always has its descriptors.
    pub(super) fn is_connected(&self) -> bool {
        self.listener.is_none() || self.ends.lock().output.is_some()
    }

    /// Takes the next client; false when there is none.
    pub(super) fn accept(&self) -> bool {
        let accept = || -> Option<Ends> {
            let (stream, _) = self.listener.as_ref()?.accept().ok()?;
            let output = OwnedFd::from(stream.try_clone().ok()?);
            let input = Some(Arc::new(File::from(OwnedFd::from(stream))));
            Some(Ends { input, output: Some(Arc::new(output.into())), socket: true })
        };
        let Some(ends) = accept() else { return false };
        *self.ends.lock() = ends;
        true
    }

    /// Lets the client go.
    pub(super) fn hang_up(&self) {
        *self.ends.lock() = Ends::default();
    }

    /// Reads what is there; 0 at the end. Only called when the descriptor is readable.
    pub(super) fn read(&self, data: &mut [u8]) -> io::Result<usize> {
        let input = self.ends.lock().input.clone();
        match input {
            Some(input) => (&*input).read(data),
            None => Ok(0),
        }
    }

    /// Writes what fits without blocking.
    pub(super) fn write(&self, data: &[u8]) -> io::Result<usize> {
        let (output, socket) = {
            let ends = self.ends.lock();
            (ends.output.clone(), ends.socket)
        };
        match output {
            Some(output) if socket => match send(output.as_fd(), data) {
                Err(e) if e.raw_os_error() == Some(libc::ENOTSOCK) => (&*output).write(data),
                other => other,
            },
            Some(output) => (&*output).write(data),
            None => Ok(data.len()),
        }
    }
}
