//! Names of exports: `nbd://host:port/export`, `nbd+unix:///export?socket=path`, and `nbds` for TLS.

use crate::{Error, Result};
use std::path::PathBuf;

/// Port that the protocol is registered for.
const PORT: u16 = 10809;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A host name or address, and a port.
    Tcp(String, u16),
    /// A Unix socket.
    Unix(PathBuf),
}

/// An export of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// Where the server listens.
    pub address: Address,
    /// The export's name.
    pub export: String,
    /// Whether the connection is encrypted.
    pub tls: bool,
    /// Directory with the certificates, from `tls-certificates`.
    pub certificates: Option<PathBuf>,
    /// The name that the server's certificate has, from `tls-hostname`, if it is not the host.
    pub tls_hostname: Option<String>,
}

impl Uri {
    /// Whether `text` looks like the URI of an export.
    pub fn matches(text: &str) -> bool {
        ["nbd://", "nbds://", "nbd+unix://", "nbds+unix://"].iter().any(|scheme| text.starts_with(scheme))
    }

    /// Parses a URI.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |what: &str| Error::InvalidOption(format!("The NBD URI {text:?} {what}"));
        let (scheme, rest) = text.split_once("://").ok_or_else(|| bad("has no scheme"))?;
        let (tls, unix) = match scheme {
            "nbd" => (false, false),
            "nbds" => (true, false),
            "nbd+unix" => (false, true),
            "nbds+unix" => (true, true),
            _ => return Err(bad("has an unknown scheme")),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let decode = |part: &str| decode(part).ok_or_else(|| bad("is not encoded properly"));
        let (mut socket, mut certificates, mut tls_hostname) = (None, None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match key {
                "socket" if unix => socket = Some(PathBuf::from(decode(value)?)),
                "tls-certificates" if tls => certificates = Some(PathBuf::from(decode(value)?)),
                "tls-hostname" if tls => tls_hostname = Some(decode(value)?),
                _ => return Err(bad("has an unknown parameter")),
            }
        }
        let address = match (unix, socket) {
            (true, Some(socket)) if authority.is_empty() => Address::Unix(socket),
            (true, _) => return Err(bad("needs a socket and no host")),
            (false, _) => {
                // A colon within brackets belongs to an IPv6 address.
                let (host, port) = match authority.rsplit_once(':') {
                    Some((host, port)) if !port.contains(']') => {
                        (host, port.parse().map_err(|_| bad("has no valid port"))?)
                    }
                    _ => (authority, PORT),
                };
                let host = decode(host.trim_start_matches('[').trim_end_matches(']'))?;
                let host = if host.is_empty() { "localhost".to_owned() } else { host };
                Address::Tcp(host, port)
            }
        };
        Ok(Uri { address, export: decode(export)?, tls, certificates, tls_hostname })
    }
}

/// Resolves percent encoding.
fn decode(text: &str) -> Option<String> {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        out.push(match b {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            b => b,
        });
    }
    String::from_utf8(out).ok().filter(|s| !s.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris() {
        let uri = Uri::parse("nbd://example.org/a%20b").unwrap();
        assert_eq!((uri.address, uri.export.as_str()), (Address::Tcp("example.org".into(), PORT), "a b"));
        let uri = Uri::parse("nbds://[::1]:99?tls-certificates=/etc/pki").unwrap();
        assert_eq!(uri.address, Address::Tcp("::1".into(), 99));
        assert_eq!((uri.tls, uri.certificates), (true, Some("/etc/pki".into())));
        let uri = Uri::parse("nbd+unix:///disk?socket=/run/a%3Fb").unwrap();
        assert_eq!((uri.address, uri.export.as_str()), (Address::Unix("/run/a?b".into()), "disk"));
        for bad in
            ["nbd:host", "http://x/", "nbd+unix:///x", "nbd://h:x/", "nbd://h/%zz", "nbd://h/?socket=/x"]
        {
            assert!(Uri::parse(bad).is_err(), "{bad}");
        }
    }
}
