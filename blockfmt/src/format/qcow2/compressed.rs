//! Compressed clusters.

use super::map::COMPRESSED;
use super::{Compression, Qcow2};
use crate::{Error, Result, Scatter};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Decompressed clusters kept in memory.
const KEEP: usize = 8;
const SECTOR: u64 = 512;

/// State of compressed reads and writes.
#[derive(Debug, Default)]
pub(super) struct Compressed {
    /// Recently used clusters, by L2 entry.
    recent: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
    /// Where the next compressed bytes go; the rest of this cluster is free.
    pub(super) next: Mutex<u64>,
}

impl Compressed {
    /// Forgets what was decompressed; host clusters are about to get other contents.
    pub fn forget(&self) {
        self.recent.lock().clear();
    }
}

impl Qcow2 {
    /// First and end byte of the sectors that a compressed entry occupies.
    pub(super) fn compressed_range(&self, entry: u64) -> (u64, u64) {
        let shift = 62 - (self.p.cluster_bits - 8);
        let start = entry & ((1 << shift) - 1);
        let more = (entry & !(3 << 62)) >> shift;
        (start, start / SECTOR * SECTOR + (more + 1) * SECTOR)
    }

    pub(super) fn read_compressed(&self, mut dst: Scatter<'_>, guest: u64, entry: u64) -> Result<()> {
        let within = (guest & (self.p.cluster - 1)) as usize;
        let cached = self.compressed.recent.lock().iter().find(|(e, _)| *e == entry).map(|(_, c)| c.clone());
        let cluster = match cached {
            Some(cluster) => cluster,
            None => {
                let cluster: Arc<[u8]> = self.decompress(entry)?.into();
                let mut recent = self.compressed.recent.lock();
                recent.truncate(KEEP - 1);
                recent.push_front((entry, cluster.clone()));
                cluster
            }
        };
        let len = dst.len();
        dst.copy_from(&cluster[within..within + len]);
        Ok(())
    }

    fn decompress(&self, entry: u64) -> Result<Vec<u8>> {
        let (start, end) = self.compressed_range(entry);
        let mut input = vec![0; (end - start) as usize];
        self.storage.read_at(&mut input, start)?;
        let compression = self.header.lock().compression;
        let cluster = self.p.cluster as usize;
        decompress(compression, &input, cluster)
            .ok_or_else(|| self.corrupt("a compressed cluster is damaged"))
    }

    /// What compresses clusters for this image; each thread that does so needs its own.
    pub fn compressor(&self) -> Result<Compressor> {
        let cluster = self.p.cluster as usize;
        let fail = |e| self.io("compress for", e);
        let engine = match self.header.lock().compression {
            Compression::Zlib => Engine::Zlib(new_deflate()),
            Compression::Zstd => Engine::Zstd(zstd::bulk::Compressor::new(0).map_err(fail)?),
        };
        Ok(Compressor { engine, out: vec![0; cluster] })
    }

    /// Stores the compressed form of a guest cluster that is not allocated yet.
    pub fn write_compressed(&self, guest: u64, bytes: &[u8]) -> Result<()> {
        if self.data.is_some() {
            return Err(Error::unsupported(&self.name, "compression with an external data file"));
        }
        if self.plain.is_some() {
            return Err(Error::unsupported(&self.name, "compression of encrypted images"));
        }
        let cluster = guest >> self.p.cluster_bits;
        let _pass = self.enter_to_change()?;
        let _range = self.ranges.lock(cluster..cluster + 1);
        self.ensure_table(cluster)?;
        let (slice, index) = self.slice_of(cluster);
        let old = self.entries(slice, index, 1)?[0].0;
        let start = self.allocate_bytes(bytes.len() as u64)?;
        let shift = 62 - (self.p.cluster_bits - 8);
        let more = (start + bytes.len() as u64 - 1) / SECTOR - start / SECTOR;
        let entry = COMPRESSED | more << shift | start;
        if let Err(error) = self.storage.write_at(bytes, start) {
            self.unlink_entry(entry);
            return Err(error);
        }
        self.barrier.store(true, Ordering::Release);
        self.with_slice(slice, |s| s.set(index, entry, 0))?;
        self.unlink_entry(old);
        self.record(guest, self.p.cluster);
        Ok(())
    }

    /// Finds room for compressed bytes and counts the references of their clusters.
    fn allocate_bytes(&self, len: u64) -> Result<u64> {
        let cluster = self.p.cluster;
        let mut next = self.compressed.next.lock();
        let mut refcounts = self.refcounts.lock();
        let used = *next % cluster;
        let shared = *next >> self.p.cluster_bits;
        let can_share = used != 0 && {
            let count = refcounts.get(shared)?;
            count > 0 && count < refcounts.max()
        };
        if can_share && used + len <= cluster {
            refcounts.add(shared, 1)?;
            let start = *next;
            *next = start + len;
            return Ok(start);
        }
        let run = refcounts.allocate(1, true)?;
        let straddle = can_share && run.start == shared + 1;
        let start = if straddle {
            refcounts.add(shared, 1)?;
            *next
        } else {
            run.start << self.p.cluster_bits
        };
        *next = start + len;
        Ok(start)
    }
}

fn decompress(compression: Compression, input: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; len];
    match compression {
        Compression::Zlib => {
            let mut inflate = flate2::Decompress::new(false);
            let status = inflate.decompress(input, &mut out, flate2::FlushDecompress::Finish);
            // Trailing bytes belong to someone else, so only the output decides.
            (status.is_ok() && inflate.total_out() == len as u64).then_some(out)
        }
        Compression::Zstd => {
            use std::io::Read;
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input).ok()?.single_frame();
            decoder.read_exact(&mut out).ok()?;
            Some(out)
        }
    }
}

fn new_deflate() -> flate2::Compress {
    // Smaller windows than usual are part of the format: readers rely on 4 KiB.
    flate2::Compress::new_with_window_bits(flate2::Compression::default(), false, 12)
}

enum Engine {
    Zlib(flate2::Compress),
    Zstd(zstd::bulk::Compressor<'static>),
}

/// Compresses whole clusters; keeps its tables and buffers from one to the next.
pub struct Compressor {
    engine: Engine,
    out: Vec<u8>,
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor").field("cluster", &self.out.len()).finish_non_exhaustive()
    }
}

impl Compressor {
    /// The compressed form of a cluster; `None` if that is not smaller.
    pub fn compress(&mut self, cluster: &[u8]) -> Option<&[u8]> {
        let len = match &mut self.engine {
            Engine::Zlib(deflate) => {
                match deflate.compress(cluster, &mut self.out, flate2::FlushCompress::Finish) {
                    Ok(flate2::Status::StreamEnd) => {
                        let len = deflate.total_out() as usize;
                        deflate.reset();
                        len
                    }
                    // A reset does not get rid of all that a stream without an end left in the engine's buffer.
                    _ => {
                        *deflate = new_deflate();
                        return None;
                    }
                }
            }
            // Fails if the output does not fit.
            Engine::Zstd(zstd) => zstd.compress_to_buffer(cluster, &mut self.out[..]).ok()?,
        };
        (len < cluster.len()).then_some(&self.out[..len])
    }
}
