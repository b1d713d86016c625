//! Copying and comparing whole disks.

use super::JobControl;
use super::parallel::each_piece;
use super::sources::Sources;
use crate::{Below, Disk, Error, Result, Scatter, Source, Stored};
use std::sync::atomic::{AtomicU64, Ordering};

/// Largest piece that is moved at once: small enough for the processor's cache, where it is written from.
const PIECE: u64 = 512 << 10;
/// Runs of zeros are looked for in blocks of this size.
const BLOCK: usize = 4096;
/// Largest [`ConvertOptions::sparse_size`].
const MAX_SPARSE: u64 = 16 << 20;

/// How [`convert`] works.
#[derive(Clone, Copy, Debug)]
pub struct ConvertOptions {
    /// Store compressed clusters (qcow2 only).
    pub compress: bool,
    /// Whether the target is new and reads as zeros everywhere.
    pub target_is_zero: bool,
    /// Runs of at least this many zeros in the data are not written: a multiple of 512 bytes up to 16 MiB. With 0,
    /// every byte is written, those of holes of the source, too, and the target is allocated in full.
    pub sparse_size: u64,
    /// Threads that work at the same time; 0 for one per processor, and more while they wait for storage.
    pub threads: usize,
    /// Write only what differs: the target may hold a part of the copy already, for example because an
    /// earlier one was cancelled. The target is read in full; compression is not possible.
    pub resume: bool,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        ConvertOptions {
            compress: false,
            target_is_zero: true,
            sparse_size: BLOCK as u64,
            threads: 0,
            resume: false,
        }
    }
}

/// Copies all of `source` to `target`, which is at least as large, and flushes it.
pub fn convert(source: &Disk, target: &Disk, options: ConvertOptions, control: &JobControl) -> Result<()> {
    concatenate(std::slice::from_ref(source), target, options, control)
}

/// Copies several disks to `target`, each behind the one before, from the next multiple of 512 bytes on, and flushes it.
/// The target has at least [`concatenated_size`](super::concatenated_size) bytes; what it has beyond is left as it is.
pub fn concatenate(
    sources: &[Disk],
    target: &Disk,
    options: ConvertOptions,
    control: &JobControl,
) -> Result<()> {
    let source = Sources::new(sources)?;
    let size = source.size();
    if target.size() < size {
        let has = target.size();
        return Err(Error::InvalidOption(format!(
            "The target has {has} bytes and the source {size}; enlarge the target"
        )));
    }
    if !options.sparse_size.is_multiple_of(512) || options.sparse_size > MAX_SPARSE {
        let what = "The size of runs of zeros is a multiple of 512 bytes up to 16 MiB";
        return Err(Error::InvalidOption(what.into()));
    }
    let target_is_zero = options.target_is_zero && target.layers()[0].starts_as_zero();
    let options = ConvertOptions { target_is_zero, ..options };
    if options.resume && options.compress {
        return Err(Error::InvalidOption("A compressed copy cannot be resumed".into()));
    }
    control.begin(size);
    match options.compress {
        true => convert_compressed(&source, target, options, control)?,
        false => {
            // Runs of zeros end with a piece.
            let piece = PIECE.max(target.layers()[0].cluster_size()).max(2 * options.sparse_size);
            each_piece(
                size,
                piece,
                options.threads,
                || Ok(Vec::new()),
                |offset, len, buffer| {
                    let mut done = 0;
                    while done < len {
                        done += convert_some(
                            &source,
                            target,
                            offset + done,
                            len - done,
                            buffer,
                            options,
                            control,
                        )?;
                    }
                    Ok(())
                },
            )?;
        }
    }
    target.flush()
}

/// Converts the start of a range and returns its length.
fn convert_some(
    source: &Sources<'_>,
    target: &Disk,
    at: u64,
    len: u64,
    buffer: &mut Vec<u8>,
    options: ConvertOptions,
    control: &JobControl,
) -> Result<u64> {
    let (extent, n) = match options.sparse_size {
        0 => (None, len),
        _ => source.map(at, len).map(|(extent, n)| (Some(extent), n))?,
    };
    match extent {
        Some(Source::Zero { .. }) if options.target_is_zero && !options.resume => control.skip(n)?,
        Some(Source::Zero { .. }) => {
            control.step(n)?;
            if !options.resume || !Below::new(&target.layers()).is_zero(at, n)? {
                target.write_zeroes(at, n, true)?;
            }
        }
        _ => {
            control.step(n)?;
            buffer.resize(buffer.len().max(2 * n as usize), 0);
            let (data, there) = buffer.split_at_mut(n as usize);
            source.read_at(data, at)?;
            if options.resume {
                let there = &mut there[..n as usize];
                target.read_at(there, at)?;
                if data == there {
                    return Ok(n);
                }
            }
            let target_is_zero = options.target_is_zero && !options.resume;
            write_sparse(target, data, at, ConvertOptions { target_is_zero, ..options })?;
        }
    }
    Ok(n)
}

/// Converts cluster by cluster, each compressed if that makes it smaller.
fn convert_compressed(
    source: &Sources<'_>,
    target: &Disk,
    options: ConvertOptions,
    control: &JobControl,
) -> Result<()> {
    let layer = target.layers().remove(0);
    let Some(qcow2) = layer.as_qcow2() else {
        return Err(Error::unsupported(layer.storage().name(), "compression"));
    };
    let size = layer.cluster_size();
    let state = || Ok((qcow2.compressor()?, vec![0; size as usize]));
    each_piece(source.size(), size, options.threads, state, |offset, len, (compressor, cluster)| {
        let skips = options.target_is_zero && options.sparse_size > 0;
        if skips
            && let (Source::Zero { .. }, n) = source.map(offset, len)?
            && n == len
        {
            return control.skip(len);
        }
        control.step(len)?;
        source.read_at(&mut cluster[..len as usize], offset)?;
        cluster[len as usize..].fill(0);
        if skips && is_zero(cluster) {
            return Ok(());
        }
        // A compressed cluster would be zero where a larger target goes on.
        let whole = len == size || offset + len == target.size();
        match compressor.compress(cluster) {
            Some(bytes) if whole => qcow2.write_compressed(offset, bytes),
            _ => target.write_at(&cluster[..len as usize], offset),
        }
    })
}

/// The source of the bytes at `offset` and how many share it.
pub(super) fn whole(disk: &Disk, offset: u64, len: u64) -> Result<(Source, u64)> {
    let (extent, _) = disk.map(offset, len)?;
    let source =
        if extent.source == Source::Below { Source::Zero { allocated: false } } else { extent.source };
    Ok((source, extent.len))
}

/// Writes data without its runs of zeros.
fn write_sparse(target: &Disk, data: &[u8], offset: u64, options: ConvertOptions) -> Result<()> {
    let least = options.sparse_size as usize;
    if least == 0 {
        return target.write_at(data, offset);
    }
    let unit = if least < BLOCK { 512 } else { BLOCK };
    let write = |from: usize, to: usize| match from < to {
        true => target.write_at(&data[from..to], offset + from as u64),
        false => Ok(()),
    };
    // Data from `start` on is not written yet.
    let (mut start, mut at) = (0, 0);
    while at < data.len() {
        // A run of blocks that are all zero or all not.
        let block = |at: usize| &data[at..data.len().min(at + unit)];
        let zero = is_zero(block(at));
        let mut end = (at + unit).min(data.len());
        while end < data.len() && is_zero(block(end)) == zero {
            end = (end + unit).min(data.len());
        }
        if zero && (end - at).next_multiple_of(unit) >= least {
            write(start, at)?;
            if !options.target_is_zero {
                target.write_zeroes(offset + at as u64, (end - at) as u64, true)?;
            }
            start = end;
        }
        at = end;
    }
    write(start, data.len())
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Whole chunks are compared as one, which the compiler turns into vector instructions.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|c| c.iter().fold(0, |acc, b| acc | b) == 0) && rest.iter().all(|b| *b == 0)
}

/// What [`compare`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Comparison {
    /// The disks are identical; a longer one has zeros at its end.
    Identical,
    /// The first difference is at this byte.
    Differs(u64),
}

/// Compares two disks. The longer one may have zeros beyond the end of the other.
pub fn compare(a: &Disk, b: &Disk, control: &JobControl) -> Result<Comparison> {
    let size = a.size().max(b.size());
    control.begin(size);
    let first = AtomicU64::new(u64::MAX);
    let layers = [a.layers(), b.layers()];
    each_piece(
        size,
        PIECE,
        0,
        || Ok(vec![0; 2 * PIECE as usize]),
        |offset, len, buffer| {
            if offset > first.load(Ordering::Relaxed) {
                return Ok(());
            }
            // Bytes beyond the end of a disk read as zeros through `Below`.
            let (a, b) = (Below::new(&layers[0]), Below::new(&layers[1]));
            if a.is_zero(offset, len)? && b.is_zero(offset, len)? {
                return control.skip(len);
            }
            control.step(len)?;
            let (left, right) = buffer.split_at_mut(PIECE as usize);
            let (left, right) = (&mut left[..len as usize], &mut right[..len as usize]);
            a.read(Scatter::new(left), offset)?;
            b.read(Scatter::new(right), offset)?;
            if left != right
                && let Some(at) = left.iter().zip(&*right).position(|(x, y)| x != y)
            {
                first.fetch_min(offset + at as u64, Ordering::Relaxed);
            }
            Ok(())
        },
    )?;
    Ok(match first.into_inner() {
        u64::MAX => Comparison::Identical,
        at => Comparison::Differs(at),
    })
}

/// Copies what the uppermost `depth` layers of `source` hold of a range to `target` (`None`: all layers).
pub(super) fn copy_range(
    source: Below<'_>,
    depth: Option<usize>,
    target: &Disk,
    offset: u64,
    len: u64,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    let mut done = 0;
    while done < len {
        let at = offset + done;
        let (extent, holder) = source.map(at, (len - done).min(PIECE))?;
        let n = extent.len;
        let held = match (depth, holder) {
            (None, _) => true,
            (Some(depth), holder) => holder.is_some_and(|h| h < depth),
        };
        match extent.source {
            _ if !held => {}
            Source::Zero { .. } | Source::Below => target.write_zeroes(at, n, true)?,
            Source::Data { .. } if copy_stored(source, holder, target, at, n)? => {}
            Source::Data { .. } | Source::Opaque { .. } => {
                buffer.resize(buffer.len().max(n as usize), 0);
                let data = &mut buffer[..n as usize];
                source.read(Scatter::new(data), at)?;
                target.write_at(data, at)?;
            }
        }
        done += n;
    }
    Ok(())
}

/// Writes what differs between `source` and `target` in a range to the target.
pub(super) fn copy_difference(
    source: Below<'_>,
    target: &Disk,
    offset: u64,
    len: u64,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    const UNIT: u64 = 64 << 10;
    buffer.resize(buffer.len().max(2 * UNIT as usize), 0);
    let (data, there) = buffer.split_at_mut(UNIT as usize);
    let mut done = 0;
    while done < len {
        let n = (len - done).min(UNIT);
        let (at, data, there) = (offset + done, &mut data[..n as usize], &mut there[..n as usize]);
        source.read(Scatter::new(data), at)?;
        target.read_at(there, at)?;
        match data == there {
            true => {}
            false if is_zero(data) => target.write_zeroes(at, n, true)?,
            false => target.write_at(data, at)?,
        }
        done += n;
    }
    Ok(())
}

/// Copies bytes that one layer holds from its file to the target's, if that is possible without moving them
/// through memory.
fn copy_stored(
    source: Below<'_>,
    holder: Option<usize>,
    target: &Disk,
    offset: u64,
    len: u64,
) -> Result<bool> {
    let Some(holder) = holder else { return Ok(false) };
    let layers = target.layers();
    // Who is inside of a layer of the source must not enter it again through the target.
    if layers[0].data_file(0).fd().is_none() || source.shares_layer(holder, &layers) {
        return Ok(false);
    }
    let mut done = 0;
    while done < len {
        let copy = |src: Stored<'_>| Ok(target.write_stored(src, offset + done)?.then_some(src.len));
        match source.with_stored(holder, offset + done, len - done, copy)?.flatten() {
            Some(n) => done += n,
            None => return Ok(false), // what is done already is written again
        }
    }
    Ok(true)
}
