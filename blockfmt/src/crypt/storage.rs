//! A storage that encrypts what is written to another one.

use super::SECTOR;
use super::cipher::SectorCipher;
use crate::storage::{FileId, LockMode};
use crate::{Gather, Scatter, Storage};
use parking_lot::RwLock;
use std::io;
use std::sync::Arc;

/// Bytes that are encrypted or decrypted at a time.
const PIECE: u64 = 256 << 10;

/// Plain text over a storage of cipher text. Sector numbers count from the start of the plain text.
///
/// Ranges that were never written, or were released, read as noise: nothing here keeps a record of them.
#[derive(Debug)]
pub(crate) struct EncryptedStorage {
    inner: Arc<dyn Storage>,
    /// Where the cipher text starts.
    start: u64,
    cipher: SectorCipher,
    /// Shared by writes of whole sectors; exclusive for writes that change a part of one.
    partial: RwLock<()>,
}

impl EncryptedStorage {
    pub fn new(inner: Arc<dyn Storage>, start: u64, cipher: SectorCipher) -> Self {
        EncryptedStorage { inner, start, cipher, partial: RwLock::new(()) }
    }

    /// Reads whole sectors.
    fn read_sectors(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.readv(Scatter::new(buf), self.start + offset)?;
        self.cipher.decrypt(buf, offset / SECTOR);
        Ok(())
    }

    /// Writes whole sectors; `buf` holds cipher text afterwards.
    fn write_sectors(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.cipher.encrypt(buf, offset / SECTOR);
        self.inner.writev(Gather::new(buf), self.start + offset)
    }

    /// Calls `f` with offset and length of pieces that end at borders of sectors.
    fn pieces(offset: u64, len: u64, mut f: impl FnMut(u64, u64) -> io::Result<()>) -> io::Result<()> {
        let end = super::super::storage::checked_end(offset, len)?;
        let mut at = offset;
        while at < end {
            let n = (PIECE - at % SECTOR).min(end - at);
            f(at, n)?;
            at += n;
        }
        Ok(())
    }
}

impl Storage for EncryptedStorage {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.inner.len()?.saturating_sub(self.start) / SECTOR * SECTOR)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(self.start + len)
    }

    fn readv(&self, mut dst: Scatter<'_>, offset: u64) -> io::Result<()> {
        let mut buf = Vec::new();
        Self::pieces(offset, dst.len() as u64, |at, n| {
            let (from, to) = (at / SECTOR * SECTOR, (at + n).next_multiple_of(SECTOR));
            buf.resize((to - from) as usize, 0);
            self.read_sectors(&mut buf, from)?;
            let part = &buf[(at - from) as usize..(at - from + n) as usize];
            dst.slice((at - offset) as usize, n as usize).copy_from(part);
            Ok(())
        })
    }

    fn writev(&self, src: Gather<'_>, offset: u64) -> io::Result<()> {
        let mut buf = Vec::new();
        let len = src.len() as u64;
        let whole = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
        let _shared = whole.then(|| self.partial.read());
        let _exclusive = (!whole).then(|| self.partial.write());
        Self::pieces(offset, len, |at, n| {
            let (from, to) = (at / SECTOR * SECTOR, (at + n).next_multiple_of(SECTOR));
            buf.resize((to - from) as usize, 0);
            if from < at {
                self.read_sectors(&mut buf[..SECTOR as usize], from)?;
            }
            if at + n < to {
                let last = buf.len() - SECTOR as usize;
                self.read_sectors(&mut buf[last..], to - SECTOR)?;
            }
            let part = &mut buf[(at - from) as usize..(at - from + n) as usize];
            src.slice((at - offset) as usize, n as usize).copy_to(part);
            self.write_sectors(&mut buf, from)
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.inner.flush()
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        let zeros = vec![0; len.min(PIECE) as usize];
        Self::pieces(offset, len, |at, n| self.writev(Gather::new(&zeros[..n as usize]), at))
    }

    /// Does nothing: released space would read as noise.
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.allocate(self.start + offset, len)
    }

    fn zero_beyond_end(&self) -> bool {
        false
    }

    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn file_id(&self) -> Option<FileId> {
        self.inner.file_id()
    }

    fn modified(&self) -> Option<i128> {
        self.inner.modified()
    }

    fn set_lock(&self, mode: LockMode) -> crate::Result<()> {
        self.inner.set_lock(mode)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CipherMode, IvGenerator};
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn ranges_need_no_alignment() {
        let cipher = SectorCipher::new(CipherMode::Xts, IvGenerator::Plain64, &[3; 64]);
        let inner = Arc::new(MemoryStorage::new());
        let storage = EncryptedStorage::new(inner.clone(), 1024, cipher.expect("a key of 64 bytes"));
        let mut model = vec![0u8; 600_000];
        storage.writev(Gather::new(&model), 0).unwrap();
        for (n, (at, len)) in
            [(0, 10), (511, 2), (1000, 24), (700, 400_000), (512, 512)].into_iter().enumerate()
        {
            let data = vec![n as u8 + 1; len];
            storage.writev(Gather::new(&data), at as u64).unwrap();
            model[at..at + len].copy_from_slice(&data);
        }
        storage.write_zeroes(300, 300_000, true).unwrap();
        model[300..300_300].fill(0);
        let mut seen = vec![9; model.len() - 7];
        storage.readv(Scatter::new(&mut seen), 7).unwrap();
        assert!(seen == model[7..]);
        let raw = inner.to_vec();
        assert!(raw[1024..].chunks_exact(512).all(|s| s.iter().any(|b| *b != s[0])), "plain text is on disk");
    }
}
