//! The compressed payload of a bzImage.

use std::fmt;
use std::io::{self, Cursor, Read, Write};

use super::BootError;

/// Compression formats of kernel payloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
    /// LZ4, legacy framing.
    Lz4,
    /// xz.
    Xz,
    /// LZMA alone.
    Lzma,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
        })
    }
}

/// Largest kernel that is decompressed on the host.
const MAX_SIZE: usize = 1 << 30;
/// Largest block of the legacy LZ4 framing.
const LZ4_BLOCK: usize = 8 << 20;

/// What the payload's first bytes say it is.
fn detect(payload: &[u8]) -> Option<Compression> {
    Some(match payload {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        [0x02, 0x21, 0x4c, 0x18, ..] => Compression::Lz4,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Compression::Xz,
        [0x5d, 0, 0, ..] => Compression::Lzma,
        _ => return None,
    })
}

/// Decompresses the payload, or returns `None` when its format is not known here and the kernel must do it.
///
/// The kernel's build appends the decompressed size (32 bits, little-endian) to the payload; gzip ends with it anyway.
pub(super) fn decompress(payload: &[u8]) -> Result<Option<Vec<u8>>, BootError> {
    let Some(format) = detect(payload) else { return Ok(None) };
    let fail = |source| BootError::Decompress { format, source };
    let Some((body, size)) = payload.split_last_chunk::<4>() else {
        return Err(fail(io::ErrorKind::UnexpectedEof.into()));
    };
    let size = u32::from_le_bytes(*size) as usize;
    if size > MAX_SIZE {
        return Err(fail(io::Error::other("the stated size is more than 1 GiB")));
    }
    let out = match format {
        Compression::Gzip => read(flate2::bufread::GzDecoder::new(payload), size),
        Compression::Zstd => zstd::stream::read::Decoder::with_buffer(body)
            .and_then(|decoder| read(decoder.single_frame(), size)),
        Compression::Lz4 => lz4_legacy(&body[4..], size),
        Compression::Xz if !xz_is_plain(body) => return Ok(None),
        Compression::Xz => {
            lzma(size, |out| lzma_rs::xz_decompress(&mut Cursor::new(body), out).map_err(io::Error::other))
        }
        Compression::Lzma => {
            let options = lzma_rs::decompress::Options { memlimit: Some(MAX_SIZE), ..Default::default() };
            lzma(size, |out| {
                lzma_rs::lzma_decompress_with_options(&mut Cursor::new(body), out, &options)
                    .map_err(io::Error::other)
            })
        }
    }
    .map_err(fail)?;
    if out.len() != size {
        return Err(fail(io::Error::other("the decompressed size is not the stated one")));
    }
    Ok(Some(out))
}

/// Reads at most one byte more than `size`.
fn read(decoder: impl Read, size: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    decoder.take(size as u64 + 1).read_to_end(&mut out)?;
    Ok(out)
}

fn lz4_legacy(mut blocks: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    while let Some((len, rest)) = blocks.split_first_chunk::<4>() {
        let len = u32::from_le_bytes(*len) as usize;
        let (block, rest) = rest.split_at_checked(len).ok_or(io::ErrorKind::UnexpectedEof)?;
        let start = out.len();
        let room = LZ4_BLOCK.min(size - start);
        out.resize(start + room, 0);
        let n = lz4_flex::block::decompress_into(block, &mut out[start..]).map_err(io::Error::other)?;
        out.truncate(start + n);
        blocks = rest;
    }
    Ok(out)
}

/// Whether the first block has LZMA2 as its only filter. Kernels built with the x86 branch filter decompress themselves.
fn xz_is_plain(stream: &[u8]) -> bool {
    // Stream header: 12 bytes. Block header: size, then flags whose two low bits count the filters less one.
    stream.get(13).is_some_and(|flags| flags & 3 == 0)
}

fn lzma(size: usize, decode: impl FnOnce(&mut Capped) -> io::Result<()>) -> io::Result<Vec<u8>> {
    let mut out = Capped { bytes: Vec::new(), max: size };
    decode(&mut out)?;
    Ok(out.bytes)
}

/// A buffer that refuses to grow beyond a limit.
struct Capped {
    bytes: Vec<u8>,
    max: usize,
}

impl Write for Capped {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.len() > self.max - self.bytes.len() {
            return Err(io::Error::other("more data than stated"));
        }
        self.bytes.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_size(mut compressed: Vec<u8>, size: usize) -> Vec<u8> {
        compressed.extend((size as u32).to_le_bytes());
        compressed
    }

    /// Every format around the same data, as a kernel's build would write it.
    fn samples(data: &[u8]) -> Vec<Vec<u8>> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(data).unwrap();
        let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
        for block in data.chunks(LZ4_BLOCK) {
            let block = lz4_flex::block::compress(block);
            lz4.extend((block.len() as u32).to_le_bytes());
            lz4.extend(block);
        }
        let (mut xz, mut lzma) = (Vec::new(), Vec::new());
        lzma_rs::xz_compress(&mut &data[..], &mut xz).unwrap();
        lzma_rs::lzma_compress(&mut &data[..], &mut lzma).unwrap();
        vec![
            gzip.finish().unwrap(),
            with_size(zstd::encode_all(data, 3).unwrap(), data.len()),
            with_size(lz4, data.len()),
            with_size(xz, data.len()),
            with_size(lzma, data.len()),
        ]
    }

    #[test]
    fn every_format_round_trips_and_damage_is_an_error() {
        let data: Vec<u8> = (0..100_000u32).flat_map(|n| n.wrapping_mul(n).to_le_bytes()).collect();
        for sample in samples(&data) {
            let format = detect(&sample).unwrap();
            assert!(decompress(&sample).unwrap().unwrap() == data, "{format}");
            let cut = &sample[..sample.len() / 2];
            assert!(decompress(cut).is_err(), "{format} cut in half");
            let mut lie = sample.clone();
            let n = lie.len();
            lie[n - 4] ^= 1;
            assert!(decompress(&lie).is_err(), "{format} with a wrong size");
        }
        assert!(decompress(b"BZh91AY&SY").unwrap().is_none());
    }
}
