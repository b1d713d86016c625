//! Certificates for encrypted connections.

use super::stream::Stream;
use crate::{Error, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;

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
        Ok(Stream::TlsServer(Box::new(StreamOwned::new(self.connection()?, Box::new(stream)))))
    }

    /// Encrypts a connection of any protocol, as its server, once both ends have proved who they are.
    ///
    /// # Errors
    /// The peer is refused, refuses, or goes away.
    pub fn accept<S: Read + Write>(&self, mut stream: S) -> io::Result<impl Read + Write + use<S>> {
        let mut connection = self.connection()?;
        connection.complete_io(&mut stream)?;
        Ok(StreamOwned::new(connection, stream))
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
        Ok(Stream::TlsClient(Box::new(StreamOwned::new(self.connection(host)?, Box::new(stream)))))
    }

    /// Encrypts a connection of any protocol to the server with this name, once it has proved that it has it. Whether
    /// the server takes this client shows when its first answer is read.
    ///
    /// # Errors
    /// The server is refused, refuses, or goes away.
    pub fn connect<S: Read + Write>(
        &self,
        mut stream: S,
        host: &str,
    ) -> io::Result<impl Read + Write + use<S>> {
        let mut connection = self.connection(host)?;
        connection.complete_io(&mut stream)?;
        Ok(StreamOwned::new(connection, stream))
    }
}
