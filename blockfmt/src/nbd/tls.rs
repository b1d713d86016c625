//! Certificates for encrypted connections.

use super::stream::Stream;
use crate::{Error, Result};
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, RootCertStore, ServerConfig, ServerConnection,
    SideData, StreamOwned,
};
use std::io::{self, Read, Write};
use std::ops::{Deref, DerefMut, Range};
use std::path::Path;
use std::sync::Arc;

/// How often a connection is read from for the last that a peer said: more than it can have left in the buffers.
const LAST_READS: usize = 1024;
/// Bytes read from a connection at once.
const INPUT_BYTES: usize = 64 << 10;

/// An encrypted connection. A peer that goes away may have said why, and a write notices first that it is gone: what it
/// said last is heard nevertheless. An alert takes the place of the error, and whatever else came can still be read.
#[derive(Debug)]
pub(super) struct Encrypted<C, S: Read + Write>(StreamOwned<C, S>);

impl<C, D, S> Encrypted<C, S>
where
    C: DerefMut + Deref<Target = ConnectionCommon<D>>,
    D: SideData,
    S: Read + Write,
{
    fn new(connection: C, stream: S) -> Self {
        Encrypted(StreamOwned::new(connection, stream))
    }

    /// What goes through the encryption.
    pub fn below(&self) -> &S {
        &self.0.sock
    }

    /// Whether a read needs nothing more from below.
    pub fn has_input(&self) -> bool {
        !self.0.conn.wants_read()
    }

    /// Like a read that reads from below once at most: `None` if that did not complete a record with data in it.
    pub fn receive(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let StreamOwned { conn, sock } = &mut self.0;
        let progress = if conn.wants_read() { conn.complete_io(sock).map(drop) } else { Ok(()) };
        let progress = progress.map_err(|error| self.hear_out(error));
        match (self.0.conn.reader().read(buf), progress) {
            (Ok(n @ 1..), _) => Ok(Some(n)),
            (_, Err(error)) => Err(error),
            (Err(error), _) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            (result, _) => result.map(Some),
        }
    }

    /// Parts the directions after the handshake: what comes, and what goes. `clone` makes a second handle of the stream
    /// below.
    pub fn split(
        self,
        clone: impl FnOnce(&S) -> io::Result<S>,
    ) -> io::Result<(Incoming<C, S>, Outgoing<C, S>)> {
        let (conn, below) = self.0.into_parts();
        let second = clone(&below)?;
        let conn = Arc::new(Mutex::new(conn));
        let incoming =
            Incoming { conn: conn.clone(), below: second, input: vec![0; INPUT_BYTES].into(), unread: 0..0 };
        Ok((incoming, Outgoing { conn, below, output: Vec::new() }))
    }

    /// Lets both ends prove who they are.
    fn shake_hands(&mut self) -> io::Result<()> {
        self.0.conn.complete_io(&mut self.0.sock).map(drop).map_err(|error| self.hear_out(error))
    }

    /// Takes in what a peer that is gone left. A connection that failed so has it, or never will: reads do not wait.
    fn hear_out(&mut self, error: io::Error) -> io::Error {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
        if !matches!(error.kind(), BrokenPipe | ConnectionReset | ConnectionAborted) {
            return error;
        }
        let StreamOwned { conn, sock } = &mut self.0;
        for _ in 0..LAST_READS {
            match conn.read_tls(sock) {
                Ok(1..) => {}
                // It is at its end, or more came than is kept.
                _ => break,
            }
            if let Err(alert) = conn.process_new_packets() {
                return io::Error::new(io::ErrorKind::InvalidData, alert);
            }
        }
        error
    }
}

impl<C, D, S> Read for Encrypted<C, S>
where
    C: DerefMut + Deref<Target = ConnectionCommon<D>>,
    D: SideData,
    S: Read + Write,
{
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf).or_else(|error| {
            let error = self.hear_out(error);
            match self.0.conn.reader().read(buf) {
                Ok(n @ 1..) => Ok(n),
                _ => Err(error),
            }
        })
    }
}

impl<C, D, S> Write for Encrypted<C, S>
where
    C: DerefMut + Deref<Target = ConnectionCommon<D>>,
    D: SideData,
    S: Read + Write,
{
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf).map_err(|error| self.hear_out(error))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(|error| self.hear_out(error))
    }
}

/// What comes through an encrypted connection. Who waits for it does not keep the other direction waiting.
#[derive(Debug)]
pub(super) struct Incoming<C, S> {
    conn: Arc<Mutex<C>>,
    below: S,
    input: Box<[u8]>,
    /// The part of `input` that is not decrypted.
    unread: Range<usize>,
}

/// What goes through an encrypted connection.
#[derive(Debug)]
pub(super) struct Outgoing<C, S> {
    conn: Arc<Mutex<C>>,
    below: S,
    output: Vec<u8>,
}

impl<C, S> Incoming<C, S> {
    /// What goes through the encryption.
    pub fn below(&self) -> &S {
        &self.below
    }
}

impl<C, S> Outgoing<C, S> {
    /// What goes through the encryption.
    pub fn below(&self) -> &S {
        &self.below
    }
}

impl<C, D, S> Read for Incoming<C, S>
where
    C: DerefMut + Deref<Target = ConnectionCommon<D>>,
    D: SideData,
    S: Read,
{
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            {
                let mut conn = self.conn.lock();
                match conn.reader().read(buf) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    result => return result,
                }
                if !self.unread.is_empty() {
                    self.unread.start += conn.read_tls(&mut &self.input[self.unread.clone()])?;
                    conn.process_new_packets()
                        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                    // An answer that this calls for goes with what is sent next.
                    continue;
                }
            }
            self.unread = 0..self.below.read(&mut self.input)?;
            if self.unread.is_empty() {
                // Without the end that the peer should have told of, this is an error.
                self.conn.lock().read_tls(&mut io::empty())?;
            }
        }
    }
}

impl<C, D, S> Write for Outgoing<C, S>
where
    C: DerefMut + Deref<Target = ConnectionCommon<D>>,
    D: SideData,
    S: Write,
{
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let len = {
            let mut conn = self.conn.lock();
            let len = conn.writer().write(buf)?;
            while conn.wants_write() {
                conn.write_tls(&mut self.output)?;
            }
            len
        };
        self.below.write_all(&self.output)?;
        self.output.clear();
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.below.flush()
    }
}

/// What a server needs for TLS. The files in its directory have the names that libnbd, nbdkit and QEMU use.
#[derive(Clone, Debug)]
pub struct TlsServer(Arc<ServerConfig>);

/// What a client needs for TLS.
#[derive(Clone, Debug)]
pub struct TlsClient(Arc<ClientConfig>);

fn fail(path: &Path, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::io("use", path.display().to_string(), io::Error::other(error))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let list = CertificateDer::pem_file_iter(path).map_err(|e| fail(path, e))?;
    list.collect::<std::result::Result<_, _>>().map_err(|e| fail(path, e))
}

fn authorities(path: &Path) -> Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        store.add(certificate).map_err(|e| fail(path, e))?;
    }
    Ok(store)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path).map_err(|e| fail(path, e))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

impl TlsServer {
    /// Takes `server-cert.pem` and `server-key.pem` from a directory. If clients have to prove who they are,
    /// their certificates are signed by those in `ca-cert.pem`.
    pub fn from_directory(directory: &Path, verify_clients: bool) -> Result<Self> {
        let at = |name: &str| directory.join(name);
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|e| fail(directory, e))?;
        let builder = match verify_clients {
            false => builder.with_no_client_auth(),
            true => {
                let roots = Arc::new(authorities(&at("ca-cert.pem"))?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
                builder.with_client_cert_verifier(verifier.map_err(|e| fail(directory, e))?)
            }
        };
        let config =
            builder.with_single_cert(certificates(&at("server-cert.pem"))?, key(&at("server-key.pem"))?);
        Ok(TlsServer(Arc::new(config.map_err(|e| fail(directory, e))?)))
    }

    fn connection(&self) -> io::Result<ServerConnection> {
        ServerConnection::new(self.0.clone()).map_err(io::Error::other)
    }

    pub(super) fn wrap(&self, stream: Stream) -> io::Result<Stream> {
        Ok(Stream::TlsServer(Box::new(Encrypted::new(self.connection()?, Box::new(stream)))))
    }

    /// Encrypts a connection of any protocol, as its server, once both ends have proved who they are.
    ///
    /// # Errors
    /// The peer is refused, refuses, or goes away.
    pub fn accept<S: Read + Write>(&self, stream: S) -> io::Result<impl Read + Write + use<S>> {
        let mut encrypted = Encrypted::new(self.connection()?, stream);
        encrypted.shake_hands()?;
        Ok(encrypted)
    }
}

impl TlsClient {
    /// Takes `ca-cert.pem` and, if they exist, `client-cert.pem` and `client-key.pem` from a directory.
    pub fn from_directory(directory: &Path) -> Result<Self> {
        let at = |name: &str| directory.join(name);
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|e| fail(directory, e))?
            .with_root_certificates(authorities(&at("ca-cert.pem"))?);
        let certificate = at("client-cert.pem");
        let config = match certificate.exists() {
            false => builder.with_no_client_auth(),
            true => builder
                .with_client_auth_cert(certificates(&certificate)?, key(&at("client-key.pem"))?)
                .map_err(|e| fail(directory, e))?,
        };
        Ok(TlsClient(Arc::new(config)))
    }

    fn connection(&self, host: &str) -> io::Result<ClientConnection> {
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        ClientConnection::new(self.0.clone(), name).map_err(io::Error::other)
    }

    pub(super) fn wrap(&self, stream: Stream, host: &str) -> io::Result<Stream> {
        Ok(Stream::TlsClient(Box::new(Encrypted::new(self.connection(host)?, Box::new(stream)))))
    }

    /// Encrypts a connection of any protocol to the server with this name, once it has proved that it has it. Whether
    /// the server takes this client shows when its first answer is read, or in the error of a write if it was refused.
    ///
    /// # Errors
    /// The server is refused, refuses, or goes away.
    pub fn connect<S: Read + Write>(&self, stream: S, host: &str) -> io::Result<impl Read + Write + use<S>> {
        let mut encrypted = Encrypted::new(self.connection(host)?, stream);
        encrypted.shake_hands()?;
        Ok(encrypted)
    }
}
