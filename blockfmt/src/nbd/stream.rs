//! A connection or a listener, over a Unix or a TCP socket.

use super::tls::{Encrypted, TlsServer};
use rustls::{ClientConnection, ServerConnection};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

/// A connection.
#[derive(Debug)]
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
    TlsServer(Box<Encrypted<ServerConnection, Box<Stream>>>),
    TlsClient(Box<Encrypted<ClientConnection, Box<Stream>>>),
}

impl Stream {
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Stream::Unix(s) => Stream::Unix(s.try_clone()?),
            Stream::Tcp(s) => Stream::Tcp(s.try_clone()?),
            Stream::TlsServer(_) | Stream::TlsClient(_) => return Err(io::ErrorKind::Unsupported.into()),
        })
    }

    /// Goes on with TLS, as a server.
    pub fn encrypt(&mut self, tls: &TlsServer) -> io::Result<()> {
        *self = tls.wrap(self.try_clone()?)?;
        Ok(())
    }

    /// Ends the connection for everyone who uses it.
    pub fn shutdown(&self) {
        // It may have ended already.
        let _ = match self {
            Stream::Unix(s) => s.shutdown(Shutdown::Both),
            Stream::Tcp(s) => s.shutdown(Shutdown::Both),
            Stream::TlsServer(s) => return s.below().shutdown(),
            Stream::TlsClient(s) => return s.below().shutdown(),
        };
    }

    /// Bounds how long a read or a write waits for the peer.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Stream::Unix(s) => s.set_read_timeout(timeout).and_then(|()| s.set_write_timeout(timeout)),
            Stream::Tcp(s) => s.set_read_timeout(timeout).and_then(|()| s.set_write_timeout(timeout)),
            Stream::TlsServer(s) => s.below().set_timeout(timeout),
            Stream::TlsClient(s) => s.below().set_timeout(timeout),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(s) => s.read(buf),
            Stream::Tcp(s) => s.read(buf),
            Stream::TlsServer(s) => s.read(buf),
            Stream::TlsClient(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(s) => s.write(buf),
            Stream::Tcp(s) => s.write(buf),
            Stream::TlsServer(s) => s.write(buf),
            Stream::TlsClient(s) => s.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Unix(_) | Stream::Tcp(_) => Ok(()),
            Stream::TlsServer(s) => s.flush(),
            Stream::TlsClient(s) => s.flush(),
        }
    }
}

/// A listener that can be woken up.
#[derive(Debug)]
pub(super) enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// Accepts a connection; `None` once `wake` is readable or closed.
    pub fn accept(&self, wake: &UnixStream) -> io::Result<Option<Stream>> {
        let wait = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let fd = match self {
            Listener::Unix(l) => l.as_raw_fd(),
            Listener::Tcp(l) => l.as_raw_fd(),
        };
        let mut fds = [wait(fd), wait(wake.as_raw_fd())];
        // SAFETY: `fds` is a valid, writable array of two entries for the duration of the call.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } < 0 {
            return Err(io::Error::last_os_error());
        }
        if fds[1].revents != 0 {
            return Ok(None);
        }
        match self {
            Listener::Unix(l) => Ok(Some(Stream::Unix(l.accept()?.0))),
            Listener::Tcp(l) => {
                let stream = l.accept()?.0;
                stream.set_nodelay(true)?;
                Ok(Some(Stream::Tcp(stream)))
            }
        }
    }
}
