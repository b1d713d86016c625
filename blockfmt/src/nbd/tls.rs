//! Certificates for encrypted connections.

use super::stream::Stream;
use crate::{Error, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use std::io;
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

    pub(super) fn wrap(&self, stream: Stream) -> io::Result<Stream> {
        let connection = ServerConnection::new(self.0.clone()).map_err(io::Error::other)?;
        Ok(Stream::TlsServer(Box::new(StreamOwned::new(connection, Box::new(stream)))))
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

    pub(super) fn wrap(&self, stream: Stream, host: &str) -> io::Result<Stream> {
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let connection = ClientConnection::new(self.0.clone(), name).map_err(io::Error::other)?;
        Ok(Stream::TlsClient(Box::new(StreamOwned::new(connection, Box::new(stream)))))
    }
}
