//! Encryption at rest: LUKS version 1, as a format of its own and inside of qcow2.
//!
//! [`luks`] reads and writes the header, [`cipher`] encrypts sectors, and [`EncryptedStorage`] puts both under
//! a format: who reads or writes payload through it sees plain text.

mod cipher;
mod luks;
mod storage;

pub use cipher::{CipherMode, Hash, IvGenerator, LuksOptions};
pub(crate) use luks::{HEADER_BYTES, LuksHeader, format, unlock};
pub(crate) use storage::EncryptedStorage;

use crate::{Error, Result};
use std::fmt;
use std::io::Read;
use std::path::Path;
use zeroize::Zeroizing;

/// Sectors are encrypted one by one, in units of this many bytes.
pub(crate) const SECTOR: u64 = 512;
/// Longest secret.
const MAX_SECRET: u64 = 1 << 20;

/// A passphrase. Its memory is overwritten when it is dropped, and it is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// The secret consists of these bytes, all of them.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Secret(Zeroizing::new(bytes.into()))
    }

    /// A secret that nobody knows.
    pub(crate) fn random() -> Result<Self> {
        let mut bytes = Zeroizing::new(vec![0; 32]);
        random(&mut bytes)?;
        Ok(Secret(bytes))
    }

    /// Reads a secret of at most 1 MiB: every byte counts, also a newline at the end (as for QEMU's secrets).
    pub fn read(mut source: impl Read, name: &str) -> Result<Self> {
        // No reallocation, which would leave copies behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(64 << 10));
        let mut piece = Zeroizing::new([0; 4096]);
        loop {
            let n = source.read(&mut piece[..]).map_err(|e| Error::io("read the secret in", name, e))?;
            if n == 0 {
                return Ok(Secret(bytes));
            }
            if bytes.len() as u64 + n as u64 > MAX_SECRET {
                return Err(Error::InvalidOption("A secret has at most 1 MiB".into()));
            }
            if bytes.len() + n > bytes.capacity() {
                let mut larger = Zeroizing::new(Vec::with_capacity(bytes.capacity() * 2));
                larger.extend_from_slice(&bytes);
                bytes = larger;
            }
            bytes.extend_from_slice(&piece[..n]);
        }
    }

    /// Reads a secret from a file, or from an open descriptor by its name `/dev/fd/N`.
    pub fn from_file(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let file =
            std::fs::File::open(path).map_err(|e| Error::io("open the secret in", name.as_str(), e))?;
        Secret::read(file, &name)
    }

    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Bytes of the kernel's random generator.
fn random(out: &mut [u8]) -> Result<()> {
    let source = "/dev/urandom";
    std::fs::File::open(source).and_then(|mut f| f.read_exact(out)).map_err(|e| Error::io("read", source, e))
}
