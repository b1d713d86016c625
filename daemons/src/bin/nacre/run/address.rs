//! Where a machine comes from or goes to while it runs.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use blockfmt::nbd::{TlsClient, TlsServer};
use serde::Deserialize;
use vmm_core::migration::{Channel, Layered};

/// How long a host may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// `unix:PATH` or `tcp:HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Address {
    Unix(PathBuf),
    Tcp(String),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", place)) if place.rsplit_once(':').is_some_and(|(_, p)| p.parse::<u16>().is_ok()) => {
                Ok(Self::Tcp(place.into()))
            }
            _ => Err("give unix:PATH or tcp:HOST:PORT".into()),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(place) => write!(f, "tcp:{place}"),
        }
    }
}

/// Ends a connection that another thread works with.
pub type HangUp = Box<dyn Fn() + Send>;

impl Address {
    /// The same for a process with another working directory.
    pub fn absolute(&self) -> anyhow::Result<Self> {
        Ok(match self {
            Self::Unix(path) => {
                Self::Unix(std::path::absolute(path).context("Cannot tell the working directory")?)
            }
            Self::Tcp(place) => Self::Tcp(place.clone()),
        })
    }

    /// The host of an address over which TLS makes sense.
    pub fn host(&self) -> anyhow::Result<&str> {
        match self {
            Self::Unix(_) => bail!("{self} does not leave this host; leave the certificates away"),
            Self::Tcp(place) => {
                let host = place.rsplit_once(':').map_or(place.as_str(), |(host, _)| host);
                Ok(host.trim_matches(['[', ']']))
            }
        }
    }

    /// Connects to who waits there.
    pub fn connect(&self) -> anyhow::Result<Socket> {
        let context = || format!("Nobody waits for a machine at {self}; start nacre run --incoming there");
        Ok(match self {
            Self::Unix(path) => Socket::Unix(UnixStream::connect(path).with_context(context)?),
            Self::Tcp(place) => {
                let mut places = place.to_socket_addrs().with_context(context)?;
                let place = places.next().with_context(context)?;
                Socket::Tcp(TcpStream::connect_timeout(&place, PATIENCE).with_context(context)?)
            }
        })
    }

    /// Waits there.
    pub fn listen(&self) -> anyhow::Result<Listener> {
        let context = || format!("Cannot wait for a machine at {self}; use another address");
        Ok(match self {
            Self::Unix(path) => {
                let listener = vmm_core::socket::listen(path).with_context(context)?;
                Listener::Unix(listener, path.clone())
            }
            Self::Tcp(place) => Listener::Tcp(TcpListener::bind(place.as_str()).with_context(context)?),
        })
    }
}

/// A connection as it came.
pub enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// Lets another thread end the connection.
    pub fn hang_up(&self) -> std::io::Result<HangUp> {
        // A connection that is gone already is what is wanted.
        let both = std::net::Shutdown::Both;
        Ok(match self {
            Self::Unix(stream) => {
                let other = stream.try_clone()?;
                Box::new(move || drop(other.shutdown(both)))
            }
            Self::Tcp(stream) => {
                let other = stream.try_clone()?;
                Box::new(move || drop(other.shutdown(both)))
            }
        })
    }

    /// Uses it as it is.
    pub fn plain(self) -> Box<dyn Channel> {
        match self {
            Self::Unix(stream) => Box::new(stream),
            Self::Tcp(stream) => Box::new(stream),
        }
    }

    /// Uses it as what waits for machines at an address with TLS. It may wait for the other side for ever.
    pub fn accept(self, tls: &TlsServer) -> std::io::Result<Box<dyn Channel>> {
        self.layered(|stream| tls.accept(stream))
    }

    /// Uses it as what connected to this host with TLS, with the certificates of a directory.
    pub fn secure(self, host: &str, certificates: &Path) -> anyhow::Result<Box<dyn Channel>> {
        let tls = TlsClient::from_directory(certificates)?;
        let secured = self.layered(|mut stream| {
            stream.set_timeout(PATIENCE)?;
            tls.connect(stream, host)
        });
        secured.with_context(|| {
            format!("There is no secure connection to {host}; look at the certificates on both sides")
        })
    }

    fn layered<S: Read + Write + Send + 'static>(
        self,
        open: impl FnOnce(TcpStream) -> std::io::Result<S>,
    ) -> std::io::Result<Box<dyn Channel>> {
        match self {
            // Whoever has the address asked it for its host.
            Self::Unix(_) => Err(std::io::ErrorKind::Unsupported.into()),
            Self::Tcp(stream) => {
                let below = stream.try_clone()?;
                Ok(Box::new(Layered::new(open(stream)?, below)))
            }
        }
    }
}

/// Waits for one machine; dropping it removes its socket.
pub enum Listener {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

impl Listener {
    /// Takes a connection that has been announced.
    pub fn accept(&self) -> std::io::Result<Socket> {
        Ok(match self {
            Self::Unix(listener, _) => Socket::Unix(listener.accept()?.0),
            Self::Tcp(listener) => Socket::Tcp(listener.accept()?.0),
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener, _) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Somebody may have removed it already.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed() {
        for good in ["unix:a:b", "tcp:host:1", "tcp:[::1]:65535"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for bad in ["", "unix:", "tcp:host", "tcp:host:99999", "/path", "ssh:host:1"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
