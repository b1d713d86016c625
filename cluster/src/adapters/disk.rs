//! Lease volumes: files or block devices with lease areas, read and written past the page cache.
//!
//! The module's only unsafe code is the aligned buffer that O_DIRECT needs.
#![allow(unsafe_code, reason = "O_DIRECT needs buffers aligned to the sector size")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use crate::lease::DeltaRecord;
use crate::lock::{Leader, is_resource};
use crate::ondisk::{AreaKind, Geometry, HostBlock, LayoutError, LeaderRecord, Name, encode_request};
use crate::types::HostId;

/// Why a lease volume could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The operating system refused.
    #[error("Lease volume {} cannot be read or written", .path.display())]
    Io {
        /// The file or device.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// What was read is not a valid lease.
    #[error("Lease volume {} holds no valid lease at byte {offset}", .path.display())]
    Layout {
        /// The file or device.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// The cause.
        #[source]
        source: LayoutError,
    },
    /// The lease belongs to another lockspace or resource.
    #[error("Lease at byte {offset} belongs to another lockspace or resource; check the configuration")]
    Foreign {
        /// Where.
        offset: u64,
    },
    /// The host's number is larger than the volume has room for.
    #[error("{0} does not fit on the lease volume; use a larger area")]
    NoRoom(HostId),
}

/// A zeroed buffer aligned to 4096 bytes.
struct AlignedBuf {
    ptr: NonNull<u8>,
    layout: Layout,
}

impl AlignedBuf {
    fn new(len: usize) -> Self {
        // Layouts of non-zero size below isize::MAX with a power-of-two alignment are always valid.
        let layout = Layout::from_size_align(len.max(1), 4096).unwrap_or(Layout::new::<[u8; 4096]>());
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        match NonNull::new(ptr) {
            Some(ptr) => AlignedBuf { ptr, layout },
            None => handle_alloc_error(layout),
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: ptr points to layout.size() initialised bytes that this value owns alone.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: ptr was allocated with exactly this layout and is not used after this.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}

/// A file or block device that carries lease areas.
#[derive(Debug)]
pub struct LeaseDisk {
    file: File,
    path: PathBuf,
    geometry: Geometry,
}

impl LeaseDisk {
    /// Opens a volume with O_DIRECT and O_DSYNC; without O_DIRECT where the file system has none (tmpfs).
    pub fn open(path: &Path, geometry: Geometry) -> Result<Self, DiskError> {
        let open = |flags: i32| OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        let file = match open(libc::O_DIRECT | libc::O_DSYNC) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => open(libc::O_DSYNC),
            other => other,
        };
        let file = file.map_err(|source| DiskError::Io { path: path.to_owned(), source })?;
        Ok(LeaseDisk { file, path: path.to_owned(), geometry })
    }

    fn io<T>(&self, result: io::Result<T>) -> Result<T, DiskError> {
        result.map_err(|source| DiskError::Io { path: self.path.clone(), source })
    }

    fn layout<T>(&self, offset: u64, result: Result<T, LayoutError>) -> Result<T, DiskError> {
        result.map_err(|source| DiskError::Layout { path: self.path.clone(), offset, source })
    }

    fn read(&self, offset: u64, len: usize) -> Result<AlignedBuf, DiskError> {
        let mut buf = AlignedBuf::new(len);
        self.io(self.file.read_exact_at(buf.bytes(), offset))?;
        Ok(buf)
    }

    fn write(&self, offset: u64, buf: &mut AlignedBuf) -> Result<(), DiskError> {
        self.io(self.file.write_all_at(buf.bytes(), offset))
    }

    fn read_leader(&self, offset: u64) -> Result<LeaderRecord, DiskError> {
        let mut buf = self.read(offset, self.geometry.sector_size())?;
        self.layout(offset, LeaderRecord::decode(buf.bytes()))
    }

    fn write_leader(&self, offset: u64, record: &LeaderRecord) -> Result<(), DiskError> {
        let mut buf = AlignedBuf::new(self.geometry.sector_size());
        self.layout(offset, record.encode(self.geometry, buf.bytes()))?;
        self.write(offset, &mut buf)
    }
}

/// A lockspace area and the resource areas behind it on one volume.
///
/// The lockspace is at `offset`; resource `n` is the n-th area behind it.
#[derive(Debug)]
pub struct LeaseVolume {
    disk: LeaseDisk,
    space: Name,
    offset: u64,
}

impl LeaseVolume {
    /// Uses the lockspace `space` at `offset` of a volume.
    pub fn new(disk: LeaseDisk, space: Name, offset: u64) -> Self {
        LeaseVolume { disk, space, offset }
    }

    /// Formats the lockspace area: every delta lease is free. Everything in it is lost.
    pub fn format_space(&self, io_timeout: u16) -> Result<(), DiskError> {
        let g = self.disk.geometry;
        let mut area = AlignedBuf::new(g.area_size());
        let record = LeaderRecord::free_delta(self.space, io_timeout);
        for n in 1..=g.max_hosts() {
            if let Some(at) = g.delta_offset(HostId(n)) {
                let sector = &mut area.bytes()[at..at + g.sector_size()];
                self.disk.layout(self.place(at), record.encode(g, sector))?;
            }
        }
        self.disk.write(self.offset, &mut area)
    }

    /// Formats resource area `index`: the lease is free. Everything in it is lost.
    pub fn format_resource(&self, index: u32, name: Name) -> Result<(), DiskError> {
        let g = self.disk.geometry;
        let offset = self.area(index, 0);
        let mut area = AlignedBuf::new(g.area_size());
        let record = LeaderRecord::free_resource(self.space, name, g);
        self.disk.layout(offset, record.encode(g, area.bytes()))?;
        self.disk.layout(offset, encode_request(g, &mut area.bytes()[g.sector_size()..]))?;
        self.disk.write(offset, &mut area)
    }

    /// The place on the volume of a byte behind the lockspace's beginning. The host refuses one that no file has.
    fn place(&self, at: usize) -> u64 {
        self.offset.saturating_add(at as u64)
    }

    /// The place of a byte of a resource's area.
    fn area(&self, index: u32, at: usize) -> u64 {
        let area = (u64::from(index) + 1) * self.disk.geometry.area_size() as u64;
        self.offset.saturating_add(area + at as u64)
    }

    fn delta_at(&self, host: HostId) -> Result<u64, DiskError> {
        let at = self.disk.geometry.delta_offset(host).ok_or(DiskError::NoRoom(host))?;
        Ok(self.place(at))
    }

    fn own_delta(&self, offset: u64, record: &LeaderRecord) -> Result<DeltaRecord, DiskError> {
        if record.kind != AreaKind::Delta || record.space_name != self.space {
            return Err(DiskError::Foreign { offset });
        }
        Ok(DeltaRecord::from_leader(record))
    }

    /// Reads a host's delta lease.
    pub fn read_delta(&self, host: HostId) -> Result<DeltaRecord, DiskError> {
        let offset = self.delta_at(host)?;
        self.own_delta(offset, &self.disk.read_leader(offset)?)
    }

    /// Writes a host's delta lease.
    pub fn write_delta(&self, host: HostId, record: DeltaRecord) -> Result<(), DiskError> {
        self.disk.write_leader(self.delta_at(host)?, &record.to_leader(self.space))
    }

    /// Reads the delta leases of hosts 1 to `hosts` with one request.
    pub fn read_space(&self, hosts: u16) -> Result<Vec<DeltaRecord>, DiskError> {
        let g = self.disk.geometry;
        let hosts = hosts.min(g.max_hosts());
        let mut area = self.disk.read(self.offset, usize::from(hosts) * g.sector_size())?;
        let mut records = Vec::with_capacity(usize::from(hosts));
        for (n, sector) in area.bytes().chunks_exact(g.sector_size()).enumerate() {
            let offset = self.place(n * g.sector_size());
            let record = self.disk.layout(offset, LeaderRecord::decode(sector))?;
            records.push(self.own_delta(offset, &record)?);
        }
        Ok(records)
    }

    fn resource(&self, index: u32, name: Name) -> Result<LeaderRecord, DiskError> {
        let offset = self.area(index, 0);
        let record = self.disk.read_leader(offset)?;
        if !is_resource(&record, self.space, name) {
            return Err(DiskError::Foreign { offset });
        }
        Ok(record)
    }

    /// Reads the leader record of resource `index`, whose name must be `name`.
    pub fn read_leader(&self, index: u32, name: Name) -> Result<Leader, DiskError> {
        Ok(Leader::from_record(&self.resource(index, name)?))
    }

    /// Writes the leader record of resource `index`.
    pub fn write_leader(&self, index: u32, name: Name, leader: Leader) -> Result<(), DiskError> {
        let template = LeaderRecord::free_resource(self.space, name, self.disk.geometry);
        self.disk.write_leader(self.area(index, 0), &leader.to_record(&template))
    }

    /// Reads the blocks of hosts 1 to `hosts` with one request.
    pub fn read_blocks(&self, index: u32, hosts: u16) -> Result<Vec<HostBlock>, DiskError> {
        let g = self.disk.geometry;
        let offset = self.area(index, 2 * g.sector_size());
        let hosts = hosts.min(g.max_hosts());
        let mut area = self.disk.read(offset, usize::from(hosts) * g.sector_size())?;
        let blocks = area.bytes().chunks_exact(g.sector_size()).map(HostBlock::decode);
        self.disk.layout(offset, blocks.collect())
    }

    /// Writes a host's block of resource `index`.
    pub fn write_block(&self, index: u32, host: HostId, block: HostBlock) -> Result<(), DiskError> {
        let g = self.disk.geometry;
        let at = g.block_offset(host).ok_or(DiskError::NoRoom(host))?;
        let offset = self.area(index, at);
        let mut buf = AlignedBuf::new(g.sector_size());
        self.disk.layout(offset, block.encode(buf.bytes()))?;
        self.disk.write(offset, &mut buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lockspace_behind_the_end_of_all_files_is_an_error_and_overwrites_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volume");
        std::fs::write(&path, vec![7; 4 << 20]).unwrap();
        let resource = Name::new("nacre-1").unwrap();
        let area = Geometry::S512.area_size() as u64;
        for offset in [u64::MAX, u64::MAX - area, 0u64.wrapping_sub(2 * area), i64::MAX as u64 / 512 * 512] {
            let disk = LeaseDisk::open(&path, Geometry::S512).unwrap();
            let volume = LeaseVolume::new(disk, Name::default(), offset);
            assert!(volume.format_space(10).is_err() && volume.format_resource(1, resource).is_err());
            assert!(volume.read_delta(HostId(2)).is_err() && volume.read_space(2).is_err());
            assert!(volume.write_delta(HostId(2), DeltaRecord::default()).is_err());
            assert!(volume.read_blocks(1, 2).is_err() && volume.read_leader(1, resource).is_err());
            assert!(volume.write_leader(1, resource, Leader::default()).is_err());
            assert!(volume.write_block(1, HostId(2), HostBlock::default()).is_err());
        }
        assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 7));
    }
}
