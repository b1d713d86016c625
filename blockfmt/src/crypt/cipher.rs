//! Encryption of sectors with AES.

use super::SECTOR;
use aes::cipher::generic_array::GenericArray;
use aes::cipher::{
    BlockCipher, BlockDecrypt, BlockDecryptMut, BlockEncrypt, BlockEncryptMut, InnerIvInit, KeyInit,
};
use aes::{Aes128, Aes256};
use sha2::Digest;
use std::fmt;
use xts_mode::Xts128;
use zeroize::Zeroizing;

/// How sectors are chained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CipherMode {
    /// XTS, the mode that was made for disks.
    #[default]
    Xts,
    /// CBC within a sector, for old readers.
    Cbc,
}

/// How the initialisation vector follows from a sector's number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IvGenerator {
    /// The lower 32 bits of the number. Vectors repeat after 2 TiB.
    Plain,
    /// The number.
    #[default]
    Plain64,
    /// The number, encrypted with the SHA-256 of the key.
    Essiv,
}

/// A hash function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1, for old images.
    Sha1,
    /// SHA-256.
    #[default]
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Hash {
    pub(super) fn name(self) -> &'static str {
        match self {
            Hash::Sha1 => "sha1",
            Hash::Sha256 => "sha256",
            Hash::Sha512 => "sha512",
        }
    }

    pub(super) fn digest(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        fn run<D: Digest>(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
            let mut digest = D::new();
            parts.iter().for_each(|part| digest.update(part));
            Zeroizing::new(digest.finalize().to_vec())
        }
        match self {
            Hash::Sha1 => run::<sha1::Sha1>(parts),
            Hash::Sha256 => run::<sha2::Sha256>(parts),
            Hash::Sha512 => run::<sha2::Sha512>(parts),
        }
    }

    pub(super) fn pbkdf2(self, secret: &[u8], salt: &[u8], rounds: u32, out: &mut [u8]) {
        match self {
            Hash::Sha1 => pbkdf2::pbkdf2_hmac::<sha1::Sha1>(secret, salt, rounds, out),
            Hash::Sha256 => pbkdf2::pbkdf2_hmac::<sha2::Sha256>(secret, salt, rounds, out),
            Hash::Sha512 => pbkdf2::pbkdf2_hmac::<sha2::Sha512>(secret, salt, rounds, out),
        }
    }
}

/// How a new image is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksOptions {
    /// Bits of the AES key: 128 or 256.
    pub key_bits: u32,
    /// How sectors are chained.
    pub mode: CipherMode,
    /// How initialisation vectors are made.
    pub iv: IvGenerator,
    /// The hash function of key derivation.
    pub hash: Hash,
    /// Time that trying a passphrase takes on this machine, in milliseconds; 1 to 60000.
    pub iter_time_ms: u32,
}

impl Default for LuksOptions {
    fn default() -> Self {
        LuksOptions {
            key_bits: 256,
            mode: CipherMode::Xts,
            iv: IvGenerator::Plain64,
            hash: Hash::Sha256,
            iter_time_ms: 2000,
        }
    }
}

impl LuksOptions {
    /// Bytes of the master key; XTS takes two keys of the cipher.
    pub(super) fn key_bytes(&self) -> usize {
        self.key_bits as usize / 8 * if self.mode == CipherMode::Xts { 2 } else { 1 }
    }

    pub(super) fn mode_name(&self) -> String {
        let mode = if self.mode == CipherMode::Xts { "xts" } else { "cbc" };
        let iv = match self.iv {
            IvGenerator::Plain => "plain",
            IvGenerator::Plain64 => "plain64",
            IvGenerator::Essiv => "essiv:sha256",
        };
        format!("{mode}-{iv}")
    }
}

enum Keys {
    Xts128(Box<Xts128<Aes128>>),
    Xts256(Box<Xts128<Aes256>>),
    Cbc128(Box<Aes128>),
    Cbc256(Box<Aes256>),
}

/// A cipher with its key.
pub(crate) struct SectorCipher {
    keys: Keys,
    iv: IvGenerator,
    essiv: Option<Box<Aes256>>,
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SectorCipher(..)")
    }
}

impl SectorCipher {
    /// `None` if the key does not have the length that the mode needs.
    pub fn new(mode: CipherMode, iv: IvGenerator, key: &[u8]) -> Option<Self> {
        let (first, second) = key.split_at(key.len() / 2);
        let keys = match (mode, key.len()) {
            (CipherMode::Xts, 32) => Keys::Xts128(Box::new(Xts128::new(
                Aes128::new_from_slice(first).ok()?,
                Aes128::new_from_slice(second).ok()?,
            ))),
            (CipherMode::Xts, 64) => Keys::Xts256(Box::new(Xts128::new(
                Aes256::new_from_slice(first).ok()?,
                Aes256::new_from_slice(second).ok()?,
            ))),
            (CipherMode::Cbc, 16) => Keys::Cbc128(Box::new(Aes128::new_from_slice(key).ok()?)),
            (CipherMode::Cbc, 32) => Keys::Cbc256(Box::new(Aes256::new_from_slice(key).ok()?)),
            _ => return None,
        };
        let essiv = match iv {
            IvGenerator::Essiv => Some(Box::new(Aes256::new_from_slice(&Hash::Sha256.digest(&[key])).ok()?)),
            _ => None,
        };
        Some(SectorCipher { keys, iv, essiv })
    }

    fn iv(&self, sector: u64) -> [u8; 16] {
        let mut iv = [0; 16];
        match self.iv {
            IvGenerator::Plain => iv[..4].copy_from_slice(&(sector as u32).to_le_bytes()),
            IvGenerator::Plain64 | IvGenerator::Essiv => iv[..8].copy_from_slice(&sector.to_le_bytes()),
        }
        if let Some(essiv) = &self.essiv {
            essiv.encrypt_block(GenericArray::from_mut_slice(&mut iv));
        }
        iv
    }

    /// Encrypts whole sectors, the first of which has the number `sector`.
    pub fn encrypt(&self, data: &mut [u8], sector: u64) {
        for (part, sector) in data.chunks_exact_mut(SECTOR as usize).zip(sector..) {
            let iv = self.iv(sector);
            match &self.keys {
                Keys::Xts128(xts) => xts.encrypt_sector(part, iv),
                Keys::Xts256(xts) => xts.encrypt_sector(part, iv),
                Keys::Cbc128(aes) => cbc_encrypt(&**aes, part, &iv),
                Keys::Cbc256(aes) => cbc_encrypt(&**aes, part, &iv),
            }
        }
    }

    /// Decrypts whole sectors, the first of which has the number `sector`.
    pub fn decrypt(&self, data: &mut [u8], sector: u64) {
        for (part, sector) in data.chunks_exact_mut(SECTOR as usize).zip(sector..) {
            let iv = self.iv(sector);
            match &self.keys {
                Keys::Xts128(xts) => xts.decrypt_sector(part, iv),
                Keys::Xts256(xts) => xts.decrypt_sector(part, iv),
                Keys::Cbc128(aes) => cbc_decrypt(&**aes, part, &iv),
                Keys::Cbc256(aes) => cbc_decrypt(&**aes, part, &iv),
            }
        }
    }
}

fn cbc_encrypt<C: BlockCipher + BlockEncrypt + Clone>(cipher: &C, sector: &mut [u8], iv: &[u8; 16]) {
    if let Ok(mut cbc) = cbc::Encryptor::inner_iv_slice_init(cipher.clone(), iv) {
        let size = C::block_size();
        sector.chunks_exact_mut(size).for_each(|b| cbc.encrypt_block_mut(GenericArray::from_mut_slice(b)));
    }
}

fn cbc_decrypt<C: BlockCipher + BlockDecrypt + Clone>(cipher: &C, sector: &mut [u8], iv: &[u8; 16]) {
    if let Ok(mut cbc) = cbc::Decryptor::inner_iv_slice_init(cipher.clone(), iv) {
        let size = C::block_size();
        sector.chunks_exact_mut(size).for_each(|b| cbc.decrypt_block_mut(GenericArray::from_mut_slice(b)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_is_its_own_inverse_and_depends_on_the_sector() {
        let key: Vec<u8> = (0..64).collect();
        for (mode, len) in
            [(CipherMode::Xts, 64), (CipherMode::Xts, 32), (CipherMode::Cbc, 32), (CipherMode::Cbc, 16)]
        {
            for iv in [IvGenerator::Plain, IvGenerator::Plain64, IvGenerator::Essiv] {
                let cipher = SectorCipher::new(mode, iv, &key[..len]).unwrap();
                let mut data = vec![7; 1024];
                cipher.encrypt(&mut data, 5);
                assert!(data[..512] != data[512..], "{mode:?} {iv:?}");
                cipher.decrypt(&mut data[512..], 6);
                cipher.decrypt(&mut data[..512], 5);
                assert!(data.iter().all(|b| *b == 7));
            }
            assert!(SectorCipher::new(mode, IvGenerator::Plain, &key[..24]).is_none());
        }
    }
}
