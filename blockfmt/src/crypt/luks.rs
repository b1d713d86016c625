//! The header of LUKS version 1: cipher, digest of the master key, and eight key slots. Big-endian.

use super::cipher::{CipherMode, Hash, IvGenerator, LuksOptions, SectorCipher};
use super::{SECTOR, Secret, random};
use crate::{Error, Result};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// Bytes of the header before the key material.
pub(crate) const HEADER_BYTES: usize = 592;
const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const SLOTS: usize = 8;
const SLOT_ACTIVE: u32 = 0x00ac_71f3;
const SLOT_DISABLED: u32 = 0x0000_dead;
const STRIPES: u32 = 4000;
const DIGEST: usize = 20;
const SALT: usize = 32;
/// Key material starts at multiples of this.
const SLOT_ALIGN: u64 = 4096;
/// Most rounds of key derivation that are accepted, about a minute's work.
const MAX_ROUNDS: u32 = 64 << 20;
/// Fewest rounds that are written.
const MIN_ROUNDS: u32 = 1000;

#[derive(Clone, Debug)]
struct Slot {
    rounds: u32,
    salt: [u8; SALT],
    /// Start of the key material, in sectors.
    offset: u32,
    stripes: u32,
}

/// A header, decoded.
#[derive(Clone, Debug)]
pub(crate) struct LuksHeader {
    mode: CipherMode,
    iv: IvGenerator,
    hash: Hash,
    /// Where the payload starts, in bytes from the header.
    pub payload: u64,
    key_bytes: usize,
    digest: [u8; DIGEST],
    digest_salt: [u8; SALT],
    digest_rounds: u32,
    pub uuid: String,
    /// The slots in use.
    slots: Vec<Slot>,
}

fn be32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn array<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&b[at..at + N]);
    out
}

fn text(b: &[u8], at: usize, len: usize) -> String {
    let field = b[at..at + len].split(|c| *c == 0).next().unwrap_or_default();
    String::from_utf8_lossy(field).into_owned()
}

impl LuksHeader {
    pub fn parse(b: &[u8; HEADER_BYTES], name: &str) -> Result<Self> {
        let unsupported = |what: String| Error::unsupported(name, what);
        if !b.starts_with(MAGIC) {
            return Err(Error::wrong_format(name, "LUKS"));
        }
        let version = u16::from_be_bytes([b[6], b[7]]);
        if version != 1 {
            return Err(unsupported(format!("LUKS version {version}")));
        }
        let cipher = text(b, 8, 32);
        if cipher != "aes" {
            return Err(unsupported(format!("the cipher {cipher:?}")));
        }
        let spec = text(b, 40, 32);
        let (mode, iv) = spec.split_once('-').unwrap_or((&spec, "plain"));
        let mode = match mode {
            "xts" => CipherMode::Xts,
            "cbc" => CipherMode::Cbc,
            other => return Err(unsupported(format!("the cipher mode {other:?}"))),
        };
        let iv = match iv {
            "plain" => IvGenerator::Plain,
            "plain64" => IvGenerator::Plain64,
            "essiv:sha256" => IvGenerator::Essiv,
            other => return Err(unsupported(format!("the initialisation vector {other:?}"))),
        };
        let hash = match text(b, 72, 32).as_str() {
            "sha1" => Hash::Sha1,
            "sha256" => Hash::Sha256,
            "sha512" => Hash::Sha512,
            other => return Err(unsupported(format!("the hash {other:?}"))),
        };
        let key_bytes = be32(b, 108) as usize;
        let probe = Zeroizing::new(vec![0; key_bytes.min(256)]);
        if key_bytes > 256 || SectorCipher::new(mode, iv, &probe).is_none() {
            return Err(unsupported(format!("a key of {key_bytes} bytes")));
        }
        let payload = u64::from(be32(b, 104)) * SECTOR;
        let mut slots = Vec::new();
        for at in (0..SLOTS).map(|n| 208 + n * 48) {
            match be32(b, at) {
                SLOT_DISABLED => continue,
                SLOT_ACTIVE => {}
                _ => return Err(Error::corrupt(name, "a key slot is damaged")),
            }
            let slot = Slot {
                rounds: be32(b, at + 4),
                salt: array(b, at + 8),
                offset: be32(b, at + 40),
                stripes: be32(b, at + 44),
            };
            let end = u64::from(slot.offset) * SECTOR + u64::from(slot.stripes) * key_bytes as u64;
            if slot.stripes != STRIPES || slot.offset < 2 || end > payload {
                return Err(Error::corrupt(name, "a key slot is out of bounds"));
            }
            slots.push(slot);
        }
        let header = LuksHeader {
            mode,
            iv,
            hash,
            payload,
            key_bytes,
            digest: array(b, 112),
            digest_salt: array(b, 132),
            digest_rounds: be32(b, 164),
            uuid: text(b, 168, 40),
            slots,
        };
        let mut rounds = header.slots.iter().map(|s| s.rounds).chain([header.digest_rounds]);
        if rounds.any(|r| r == 0 || r > MAX_ROUNDS) {
            return Err(unsupported("key derivation of that many rounds".into()));
        }
        Ok(header)
    }

    /// What people want to know.
    pub fn describe(&self) -> serde_json::Value {
        let bits = self.key_bytes * 8 / if self.mode == CipherMode::Xts { 2 } else { 1 };
        serde_json::json!({
            "cipher-alg": format!("aes-{bits}"),
            "cipher-mode": if self.mode == CipherMode::Xts { "xts" } else { "cbc" },
            "ivgen-alg": match self.iv {
                IvGenerator::Plain => "plain",
                IvGenerator::Plain64 => "plain64",
                IvGenerator::Essiv => "essiv",
            },
            "hash-alg": self.hash.name(),
            "uuid": self.uuid,
            "active-slots": self.slots.len(),
        })
    }

    fn is_master(&self, key: &[u8]) -> bool {
        let mut digest = [0; DIGEST];
        self.hash.pbkdf2(key, &self.digest_salt, self.digest_rounds, &mut digest);
        digest == self.digest
    }

    /// The master key that a slot holds, if `secret` opens it.
    fn open_slot(
        &self,
        slot: &Slot,
        secret: &Secret,
        mut material: Zeroizing<Vec<u8>>,
    ) -> Option<Zeroizing<Vec<u8>>> {
        let mut key = Zeroizing::new(vec![0; self.key_bytes]);
        self.hash.pbkdf2(secret.bytes(), &slot.salt, slot.rounds, &mut key);
        SectorCipher::new(self.mode, self.iv, &key)?.decrypt(&mut material, 0);
        let master = merge(&material[..self.key_bytes * STRIPES as usize], self.key_bytes, self.hash);
        self.is_master(&master).then_some(master)
    }
}

/// Opens an image with the first secret that fits a slot; `read` takes an offset from the header and a length.
pub(crate) fn unlock(
    header: &LuksHeader,
    secrets: &[Secret],
    name: &str,
    read: impl Fn(u64, usize) -> Result<Vec<u8>>,
) -> Result<SectorCipher> {
    if secrets.is_empty() {
        return Err(Error::SecretNeeded(name.into()));
    }
    for slot in &header.slots {
        let len = (header.key_bytes * STRIPES as usize).next_multiple_of(SECTOR as usize);
        let material = read(u64::from(slot.offset) * SECTOR, len)?;
        for secret in secrets {
            if let Some(master) = header.open_slot(slot, secret, Zeroizing::new(material.clone())) {
                let cipher = SectorCipher::new(header.mode, header.iv, &master);
                return cipher.ok_or_else(|| Error::corrupt(name, "its master key has the wrong length"));
            }
        }
    }
    Err(Error::WrongSecret(name.into()))
}

/// Makes a header with one key slot, which `secret` opens: everything before the payload.
pub(crate) fn format(options: &LuksOptions, secret: &Secret) -> Result<Vec<u8>> {
    if options.key_bits != 128 && options.key_bits != 256 {
        return Err(Error::InvalidOption("An AES key has 128 or 256 bits".into()));
    }
    if !(1..=60_000).contains(&options.iter_time_ms) {
        return Err(Error::InvalidOption("Key derivation takes 1 to 60000 milliseconds".into()));
    }
    let key_bytes = options.key_bytes();
    let mut master = Zeroizing::new(vec![0; key_bytes]);
    random(&mut master)?;
    let (mut salt, mut digest_salt) = ([0; SALT], [0; SALT]);
    random(&mut salt)?;
    random(&mut digest_salt)?;
    let rounds = rounds_for(options, key_bytes);
    let digest_rounds = (rounds / 8).max(MIN_ROUNDS);
    let mut digest = [0; DIGEST];
    options.hash.pbkdf2(&master, &digest_salt, digest_rounds, &mut digest);

    let material_bytes = key_bytes * STRIPES as usize;
    let span = (material_bytes as u64).next_multiple_of(SLOT_ALIGN);
    let payload = SLOT_ALIGN + span * SLOTS as u64;
    let mut b = vec![0; payload as usize];
    let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, MAGIC);
    put(6, &1u16.to_be_bytes());
    put(8, b"aes");
    put(40, options.mode_name().as_bytes());
    put(72, options.hash.name().as_bytes());
    put(104, &((payload / SECTOR) as u32).to_be_bytes());
    put(108, &(key_bytes as u32).to_be_bytes());
    put(112, &digest);
    put(132, &digest_salt);
    put(164, &digest_rounds.to_be_bytes());
    put(168, uuid::Uuid::new_v4().to_string().as_bytes());
    for n in 0..SLOTS {
        let (at, used) = (208 + n * 48, n == 0);
        put(at, &(if used { SLOT_ACTIVE } else { SLOT_DISABLED }).to_be_bytes());
        if used {
            put(at + 4, &rounds.to_be_bytes());
            put(at + 8, &salt);
        }
        put(at + 40, &(((SLOT_ALIGN + span * n as u64) / SECTOR) as u32).to_be_bytes());
        put(at + 44, &STRIPES.to_be_bytes());
    }
    let mut key = Zeroizing::new(vec![0; key_bytes]);
    options.hash.pbkdf2(secret.bytes(), &salt, rounds, &mut key);
    let mut material = split(&master, options.hash)?;
    material.resize(material_bytes.next_multiple_of(SECTOR as usize), 0);
    let cipher = SectorCipher::new(options.mode, options.iv, &key)
        .ok_or_else(|| Error::InvalidOption("The cipher does not take such a key".into()))?;
    cipher.encrypt(&mut material, 0);
    put(SLOT_ALIGN as usize, &material);
    Ok(b)
}

/// Rounds of key derivation that take the wanted time here.
fn rounds_for(options: &LuksOptions, key_bytes: usize) -> u32 {
    let mut out = Zeroizing::new(vec![0; key_bytes]);
    let mut rounds = MIN_ROUNDS;
    loop {
        let start = Instant::now();
        options.hash.pbkdf2(b"calibration", b"of the rounds", rounds, &mut out);
        let spent = start.elapsed();
        if spent >= Duration::from_millis(20) || rounds >= MAX_ROUNDS / 2 {
            let per_second = f64::from(rounds) / spent.as_secs_f64().max(1e-6);
            let wanted = per_second * f64::from(options.iter_time_ms) / 1000.0;
            return wanted.clamp(f64::from(MIN_ROUNDS), f64::from(MAX_ROUNDS)) as u32;
        }
        rounds *= 2;
    }
}

/// Spreads every bit of a block over all of it.
fn diffuse(block: &mut [u8], hash: Hash) {
    let size = hash.digest(&[]).len();
    for (n, part) in block.chunks_mut(size).enumerate() {
        let digest = hash.digest(&[&(n as u32).to_be_bytes(), part]);
        let len = part.len();
        part.copy_from_slice(&digest[..len]);
    }
}

fn xor(block: &mut [u8], other: &[u8]) {
    block.iter_mut().zip(other).for_each(|(a, b)| *a ^= b);
}

/// Spreads a key over many stripes, all of which are needed to get it back.
fn split(key: &[u8], hash: Hash) -> Result<Zeroizing<Vec<u8>>> {
    let mut out = Zeroizing::new(vec![0; key.len() * STRIPES as usize]);
    let last = key.len() * (STRIPES as usize - 1);
    random(&mut out[..last])?;
    let mut block = Zeroizing::new(vec![0; key.len()]);
    let (stripes, end) = out.split_at_mut(last);
    for stripe in stripes.chunks_exact(key.len()) {
        xor(&mut block, stripe);
        diffuse(&mut block, hash);
    }
    end.copy_from_slice(key);
    xor(end, &block);
    Ok(out)
}

/// The inverse of [`split`].
fn merge(material: &[u8], len: usize, hash: Hash) -> Zeroizing<Vec<u8>> {
    let mut block = Zeroizing::new(vec![0; len]);
    let (stripes, end) = material.split_at(material.len() - len);
    for stripe in stripes.chunks_exact(len) {
        xor(&mut block, stripe);
        diffuse(&mut block, hash);
    }
    xor(&mut block, end);
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_opens_with_its_secret_only() {
        for mode in [CipherMode::Xts, CipherMode::Cbc] {
            let options = LuksOptions { mode, iter_time_ms: 1, ..LuksOptions::default() };
            let bytes = format(&options, &Secret::new("right")).unwrap();
            let mut fixed = [0; HEADER_BYTES];
            fixed.copy_from_slice(&bytes[..HEADER_BYTES]);
            let header = LuksHeader::parse(&fixed, "x").unwrap();
            let read = |at: u64, len: usize| Ok(bytes[at as usize..at as usize + len].to_vec());
            let open = |secrets: &[Secret]| unlock(&header, secrets, "x", read);
            assert!(matches!(open(&[]), Err(Error::SecretNeeded(_))));
            assert!(matches!(open(&[Secret::new("wrong")]), Err(Error::WrongSecret(_))));
            open(&[Secret::new("wrong"), Secret::new("right")]).unwrap();
        }
        assert_eq!(format!("{:?}", Secret::new("x")), "Secret(..)");
    }

    #[test]
    fn hostile_headers_are_refused() {
        let options = LuksOptions { iter_time_ms: 1, ..LuksOptions::default() };
        let bytes = format(&options, &Secret::new("x")).unwrap();
        for (at, value) in [
            (0, &b"X"[..]),
            (7, &[2]),
            (8, b"twofish"),
            (40, b"ecb"),
            (44, b"benbi\0"),
            (72, b"md5\0"),
            (108, &[0xff; 4]),
            (164, &[0xff; 4]),
            (208, &[1; 4]),
            (212, &[0xff; 4]),
            (248, &[0xff; 4]),
            (252, &[0; 4]),
        ] {
            let mut bad = [0; HEADER_BYTES];
            bad.copy_from_slice(&bytes[..HEADER_BYTES]);
            bad[at..at + value.len()].copy_from_slice(value);
            assert!(LuksHeader::parse(&bad, "x").is_err(), "byte {at}");
        }
    }
}
