//! A connection or a listener, over a Unix or a TCP socket.

use super::tls::{Encrypted, Incoming, Outgoing, TlsServer};
use rustls::{ClientConnection, ServerConnection};
use std::io::{self, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

/// A connection.
#[derive(Debug)]
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
    TlsServer(Box<Encrypted<ServerConnection, Box<Stream>>>),
    TlsClient(Box<Encrypted<ClientConnection, Box<Stream>>>),
    /// One direction of such a connection each.
    TlsIncoming(Box<Incoming<ClientConnection, Box<Stream>>>),
    TlsOutgoing(Box<Outgoing<ClientConnection, Box<Stream>>>),
}

impl Stream {
    /// A second handle of a connection without TLS.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Stream::Unix(s) => Stream::Unix(s.try_clone()?),
            Stream::Tcp(s) => Stream::Tcp(s.try_clone()?),
            _ => return Err(io::ErrorKind::Unsupported.into()),
        })
    }

    /// Parts a client's connection in what comes and what goes, for two threads.
    pub fn split(self) -> io::Result<(Self, Self)> {
        Ok(match self {
            Stream::TlsClient(s) => {
                let (incoming, outgoing) = s.split(|below| below.try_clone().map(Box::new))?;
                (Stream::TlsIncoming(Box::new(incoming)), Stream::TlsOutgoing(Box::new(outgoing)))
            }
            plain => (plain.try_clone()?, plain),
        })
    }

    /// Goes on with TLS, as a server.
    pub fn encrypt(&mut self, tls: &TlsServer) -> io::Result<()> {
        *self = tls.wrap(self.try_clone()?)?;
        Ok(())
    }

    /// What the encryption goes through, or the connection itself.
    fn below(&self) -> &Stream {
        match self {
            Stream::Unix(_) | Stream::Tcp(_) => self,
            Stream::TlsServer(s) => s.below(),
            Stream::TlsClient(s) => s.below(),
            Stream::TlsIncoming(s) => s.below(),
            Stream::TlsOutgoing(s) => s.below(),
        }
    }

    /// Ends the connection for everyone who uses it.
    pub fn shutdown(&self) {
        // It may have ended already.
        let _ = match self {
            Stream::Unix(s) => s.shutdown(Shutdown::Both),
            Stream::Tcp(s) => s.shutdown(Shutdown::Both),
            _ => return self.below().shutdown(),
        };
    }

    /// Bounds how long a read or a write waits for the peer.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Stream::Unix(s) => s.set_read_timeout(timeout).and_then(|()| s.set_write_timeout(timeout)),
            Stream::Tcp(s) => s.set_read_timeout(timeout).and_then(|()| s.set_write_timeout(timeout)),
            _ => self.below().set_timeout(timeout),
        }
    }

    fn socket(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Unix(s) => s.as_fd(),
            Stream::Tcp(s) => s.as_fd(),
            _ => self.below().socket(),
        }
    }

    /// Whether [`receive`](Self::receive) of a server has something that came earlier, which the socket does not show.
    pub fn has_input(&self) -> bool {
        matches!(self, Stream::TlsServer(s) if s.has_input())
    }

    /// Waits until the socket is readable or `event` is, and returns whether the socket is.
    pub fn wait_for_input_or(&self, event: BorrowedFd<'_>) -> io::Result<bool> {
        Ok(wait_readable([self.socket(), event], None)?[0])
    }

    /// For a server: fills `first` and then `second` with what there is, after reading from the socket once at most.
    /// Waits if that is needed and nothing came; `None` if only a part of an encrypted record came.
    pub fn receive(&mut self, first: &mut [u8], second: &mut [u8]) -> io::Result<Option<usize>> {
        let mut list = [IoSliceMut::new(first), IoSliceMut::new(second)];
        let plain = match self {
            Stream::Unix(s) => s.read_vectored(&mut list),
            Stream::Tcp(s) => s.read_vectored(&mut list),
            Stream::TlsServer(s) => return s.receive(if first.is_empty() { second } else { first }),
            client => client.read(if first.is_empty() { second } else { first }),
        };
        match plain {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            result => result.map(Some),
        }
    }
}

/// Waits until one of two descriptors is readable or at its end, or for a time, and returns which are.
fn wait_readable(fds: [BorrowedFd<'_>; 2], time: Option<Duration>) -> io::Result<[bool; 2]> {
    // A little longer rather than a little shorter.
    let time = time.map_or(-1, |time| i32::try_from(time.as_millis() + 1).unwrap_or(i32::MAX));
    let mut fds = fds.map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    // SAFETY: `fds` is a valid, writable array of two entries for the duration of the call.
    while unsafe { libc::poll(fds.as_mut_ptr(), 2, time) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(fds.map(|fd| fd.revents != 0))
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(s) => s.read(buf),
            Stream::Tcp(s) => s.read(buf),
            Stream::TlsServer(s) => s.read(buf),
            Stream::TlsClient(s) => s.read(buf),
            Stream::TlsIncoming(s) => s.read(buf),
            Stream::TlsOutgoing(_) => Err(io::ErrorKind::Unsupported.into()),
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
            Stream::TlsOutgoing(s) => s.write(buf),
            Stream::TlsIncoming(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Unix(_) | Stream::Tcp(_) | Stream::TlsIncoming(_) => Ok(()),
            Stream::TlsServer(s) => s.flush(),
            Stream::TlsClient(s) => s.flush(),
            Stream::TlsOutgoing(s) => s.flush(),
        }
    }
}

/// A listener that can be woken up.
#[derive(Debug)]
pub(super) enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// What a listener waited for.
pub(super) enum Accepted {
    Stream(Stream),
    /// The time is over.
    Nobody,
    /// The descriptor that wakes it is readable or closed.
    Woken,
}

impl Listener {
    /// Waits for a connection.
    pub fn accept(&self, wake: &UnixStream, time: Option<Duration>) -> io::Result<Accepted> {
        let socket = match self {
            Listener::Unix(l) => l.as_fd(),
            Listener::Tcp(l) => l.as_fd(),
        };
        match wait_readable([socket, wake.as_fd()], time)? {
            [_, true] => return Ok(Accepted::Woken),
            [false, false] => return Ok(Accepted::Nobody),
            [true, false] => {}
        }
        match self {
            Listener::Unix(l) => Ok(Accepted::Stream(Stream::Unix(l.accept()?.0))),
            Listener::Tcp(l) => {
                let stream = l.accept()?.0;
                stream.set_nodelay(true)?;
                Ok(Accepted::Stream(Stream::Tcp(stream)))
            }
        }
    }
}
