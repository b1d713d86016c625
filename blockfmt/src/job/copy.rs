//! Copying and comparing whole disks.

use super::JobControl;
use crate::{Below, Disk, Error, Layer, Result, Scatter, Source};
use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};

/// Largest piece that is moved at once.
const PIECE: u64 = 2 << 20;
/// Runs of zeros of at least this length become holes.
const HOLE: usize = 4096;

/// How [`convert`] works.
#[derive(Clone, Copy, Debug)]
pub struct ConvertOptions {
    /// Store compressed clusters (qcow2 only).
    pub compress: bool,
    /// Whether the target is new and reads as zeros everywhere.
    pub target_is_zero: bool,
    /// Look for zeros in the data and do not write them.
    pub detect_zeroes: bool,
    /// Threads that work at the same time; 0 for one per processor.
    pub threads: usize,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        ConvertOptions { compress: false, target_is_zero: true, detect_zeroes: true, threads: 0 }
    }
}

/// Runs `work` on every piece of a disk, on several threads. The first error ends all of them.
fn each_piece(
    size: u64,
    piece: u64,
    threads: usize,
    work: impl Fn(u64, u64, &mut Vec<u8>) -> Result<()> + Sync,
) -> Result<()> {
    let threads = match threads {
        0 => std::thread::available_parallelism().map_or(1, NonZero::get).min(16),
        n => n,
    };
    let next = AtomicU64::new(0);
    let run = || {
        let mut buffer = Vec::new();
        loop {
            let offset = next.fetch_add(piece, Ordering::Relaxed);
            if offset >= size {
                return Ok(());
            }
            if let Err(error) = work(offset, piece.min(size - offset), &mut buffer) {
                next.store(size, Ordering::Relaxed);
                return Err(error);
            }
        }
    };
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let mine = run();
        helpers.into_iter().fold(mine, |result, helper| match helper.join() {
            Ok(other) => result.and(other),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

/// Copies all of `source` to `target`, which is at least as large, and flushes it.
pub fn convert(source: &Disk, target: &Disk, options: ConvertOptions, control: &JobControl) -> Result<()> {
    let size = source.size();
    if target.size() < size {
        return Err(Error::InvalidOption("The target is smaller than the source".into()));
    }
    control.begin(size);
    let target_layer = target.layers().remove(0);
    let piece = match options.compress {
        true if target_layer.as_qcow2().is_none() => {
            return Err(Error::unsupported(target_layer.storage().name(), "compression"));
        }
        true => target_layer.cluster_size(),
        false => PIECE.max(target_layer.cluster_size()),
    };
    each_piece(size, piece, options.threads, |offset, len, buffer| {
        let mut done = 0;
        if options.compress {
            let cluster = buffer;
            cluster.resize(piece as usize, 0);
            if let (Source::Zero { .. }, n) = whole(source, offset, len)?
                && n == len
                && options.target_is_zero
            {
                return control.skip(len);
            }
            control.step(len)?;
            source.read(Scatter::new(&mut cluster[..len as usize]), offset)?;
            cluster[len as usize..].fill(0);
            return compress_cluster(&*target_layer, target, offset, &cluster[..], len, options);
        }
        while done < len {
            let at = offset + done;
            let (extent, n) = whole(source, at, len - done)?;
            match extent {
                Source::Zero { .. } if options.target_is_zero => control.skip(n)?,
                Source::Zero { .. } => {
                    control.step(n)?;
                    target.write_zeroes(at, n, true)?;
                }
                _ => {
                    control.step(n)?;
                    buffer.resize(buffer.len().max(n as usize), 0);
                    let data = &mut buffer[..n as usize];
                    source.read_at(data, at)?;
                    write_sparse(target, data, at, options)?;
                }
            }
            done += n;
        }
        Ok(())
    })?;
    target.flush()
}

/// The source of the bytes at `offset` and how many share it.
fn whole(disk: &Disk, offset: u64, len: u64) -> Result<(Source, u64)> {
    let (extent, _) = disk.map(offset, len)?;
    let source =
        if extent.source == Source::Below { Source::Zero { allocated: false } } else { extent.source };
    Ok((source, extent.len))
}

fn compress_cluster(
    layer: &dyn Layer,
    target: &Disk,
    offset: u64,
    cluster: &[u8],
    len: u64,
    options: ConvertOptions,
) -> Result<()> {
    if options.target_is_zero && options.detect_zeroes && is_zero(cluster) {
        return Ok(());
    }
    match layer.as_qcow2().and_then(|q| Some((q, q.compress(cluster)?))) {
        Some((qcow2, bytes)) => qcow2.write_compressed(offset, &bytes),
        None => target.write_at(&cluster[..len as usize], offset),
    }
}

/// Writes data without its runs of zeros.
fn write_sparse(target: &Disk, data: &[u8], offset: u64, options: ConvertOptions) -> Result<()> {
    if !options.detect_zeroes {
        return target.write_at(data, offset);
    }
    let mut start = 0;
    while start < data.len() {
        // A run of blocks that are all zero or all not.
        let block = |at: usize| &data[at..data.len().min(at + HOLE)];
        let zero = is_zero(block(start));
        let mut end = (start + HOLE).min(data.len());
        while end < data.len() && is_zero(block(end)) == zero {
            end = (end + HOLE).min(data.len());
        }
        match zero {
            true if options.target_is_zero => {}
            true => target.write_zeroes(offset + start as u64, (end - start) as u64, true)?,
            false => target.write_at(&data[start..end], offset + start as u64)?,
        }
        start = end;
    }
    Ok(())
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
    each_piece(size, PIECE, 0, |offset, len, buffer| {
        if offset > first.load(Ordering::Relaxed) {
            return Ok(());
        }
        control.step(len)?;
        buffer.resize(2 * PIECE as usize, 0);
        let (left, right) = buffer.split_at_mut(PIECE as usize);
        let (left, right) = (&mut left[..len as usize], &mut right[..len as usize]);
        // Bytes beyond the end of a disk read as zeros through `Below`.
        Below::new(&layers[0]).read(Scatter::new(left), offset)?;
        Below::new(&layers[1]).read(Scatter::new(right), offset)?;
        if left != right
            && let Some(at) = left.iter().zip(&*right).position(|(x, y)| x != y)
        {
            first.fetch_min(offset + at as u64, Ordering::Relaxed);
        }
        Ok(())
    })?;
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
