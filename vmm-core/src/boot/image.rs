//! A kernel or initrd image, in a file or in memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::BootError;
use crate::memory::{AccessError, GuestMemory};

/// Bytes that are copied to the guest at a time.
const CHUNK: usize = 128 << 10;

enum Source<'a> {
    File(&'a File, u64),
    Bytes(&'a [u8]),
}

/// Random access to the bytes of an image.
pub(super) struct Image<'a>(Source<'a>);

/// Why a copy into guest memory failed.
#[derive(Debug)]
pub(super) enum CopyError {
    Io(io::Error),
    Memory(AccessError),
}

impl CopyError {
    /// What to tell the user: it was about the file `what` at `path`.
    pub(super) fn into_boot(self, what: &'static str, path: &Path) -> BootError {
        match self {
            CopyError::Io(source) => BootError::File { what, path: path.to_owned(), source },
            CopyError::Memory(error) => error.into(),
        }
    }
}

impl<'a> Image<'a> {
    pub(super) fn file(file: &'a File, len: u64) -> Self {
        Self(Source::File(file, len))
    }

    pub(super) fn bytes(bytes: &'a [u8]) -> Self {
        Self(Source::Bytes(bytes))
    }

    pub(super) fn len(&self) -> u64 {
        match self.0 {
            Source::File(_, len) => len,
            Source::Bytes(bytes) => bytes.len() as u64,
        }
    }

    /// Fills `data` from `offset`; `UnexpectedEof` past the end.
    pub(super) fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match self.0 {
            Source::File(file, _) => file.read_exact_at(data, offset),
            Source::Bytes(bytes) => {
                let from = usize::try_from(offset)
                    .ok()
                    .and_then(|at| bytes.get(at..)?.get(..data.len()))
                    .ok_or(io::ErrorKind::UnexpectedEof)?;
                data.copy_from_slice(from);
                Ok(())
            }
        }
    }

    /// Copies `len` bytes from `offset` to guest-physical `address`.
    pub(super) fn copy_to(
        &self,
        memory: &GuestMemory,
        offset: u64,
        len: u64,
        address: u64,
    ) -> Result<(), CopyError> {
        if !memory.contains(address, len) {
            return Err(CopyError::Memory(AccessError { address, len }));
        }
        let mut buffer = vec![0; CHUNK.min(len as usize)];
        let mut done = 0;
        while done < len {
            let n = buffer.len().min((len - done) as usize);
            self.read_at(offset + done, &mut buffer[..n]).map_err(CopyError::Io)?;
            memory.write(address + done, &buffer[..n]).map_err(CopyError::Memory)?;
            done += n as u64;
        }
        Ok(())
    }
}
