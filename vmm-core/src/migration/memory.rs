//! Which pages of guest memory are sent, and sending them.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::record::{MAX_PAGES, MAX_ZEROS, Record, StreamError, StreamWriter};
use crate::accel::{AccelError, Vm};
use crate::memory::{AccessError, GuestMemory, MemoryRegion, PAGE_SIZE, WriteObserver};

const PAGE: usize = PAGE_SIZE as usize;
static ZERO_PAGE: [u8; PAGE] = [0; PAGE];

/// A set of pages: for each region of guest memory one bit a page, least significant bit first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageSet(Vec<Vec<u64>>);

impl PageSet {
    /// The pages that were ever written: all others hold zeros, and reading them would make the host give memory for them.
    pub fn written(memory: &GuestMemory) -> Self {
        Self(memory.regions().iter().map(written).collect())
    }

    /// Number of pages.
    pub fn len(&self) -> u64 {
        self.0.iter().flatten().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds the pages of `other`, a set of the same memory.
    pub fn merge(&mut self, other: &Self) {
        for (word, more) in self.0.iter_mut().flatten().zip(other.0.iter().flatten()) {
            *word |= more;
        }
    }

    /// Runs of at most [`MAX_PAGES`] pages: region, first page, number.
    fn runs(&self) -> impl Iterator<Item = (usize, u64, usize)> {
        self.0.iter().enumerate().flat_map(|(region, words)| {
            let end = words.len() as u64 * 64;
            let has = move |page: u64| words[(page / 64) as usize] >> (page % 64) & 1 != 0;
            let mut at = 0;
            std::iter::from_fn(move || {
                while at < end && !has(at) {
                    // Whole words without a page are many.
                    at = if at.is_multiple_of(64) && words[(at / 64) as usize] == 0 {
                        at + 64
                    } else {
                        at + 1
                    };
                }
                let first = at;
                while at < end && has(at) && at - first < MAX_PAGES as u64 {
                    at += 1;
                }
                (at > first).then_some((region, first, (at - first) as usize))
            })
        })
    }
}

/// The pages of a region that its file has memory for.
fn written(region: &MemoryRegion) -> Vec<u64> {
    let pages = region.size() / PAGE_SIZE;
    let mut words = vec![0u64; pages.div_ceil(64) as usize];
    let mut set = |from: u64, to: u64| {
        for page in from / PAGE_SIZE..to.div_ceil(PAGE_SIZE).min(pages) {
            words[(page / 64) as usize] |= 1 << (page % 64);
        }
    };
    let fd = region.file().as_raw_fd();
    // SAFETY: a descriptor that is open and no pointers. Nobody uses the file's position.
    let seek = |from: u64, whence| unsafe { libc::lseek(fd, from as i64, whence) };
    let mut at = 0;
    while at < region.size() {
        match u64::try_from(seek(at, libc::SEEK_DATA)) {
            Ok(data) => {
                let hole = u64::try_from(seek(data, libc::SEEK_HOLE)).unwrap_or(region.size());
                set(data, hole);
                at = hole.max(data + 1);
            }
            Err(_) if std::io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO) => break,
            // A file system that cannot tell.
            Err(_) => {
                set(at, region.size());
                break;
            }
        }
    }
    words
}

/// Sends the pages of `set`. Pages of zeros are named if `zeros`, and left out otherwise: the target has them. `pace` is
/// told after every record how many bytes were written in all; an error of it ends the transfer.
pub(crate) fn send<W: Write, E: From<StreamError>>(
    memory: &GuestMemory,
    set: &PageSet,
    zeros: bool,
    writer: &mut StreamWriter<W>,
    pace: &mut dyn FnMut(u64) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; MAX_PAGES * PAGE];
    let mut empty: Vec<(u64, u64)> = Vec::new();
    for (region, first, count) in set.runs() {
        let start = memory.regions()[region].guest_address() + first * PAGE_SIZE;
        let data = &mut buffer[..count * PAGE];
        memory.read(start, data).map_err(|e| StreamError::Malformed(e.to_string()))?;
        let mut rest = &*data;
        let mut address = start;
        while !rest.is_empty() {
            let is_zero = |page: &[u8]| page == ZERO_PAGE;
            let zero = is_zero(&rest[..PAGE]);
            let same = rest.chunks_exact(PAGE).take_while(|page| is_zero(page) == zero).count();
            let (run, after) = rest.split_at(same * PAGE);
            let len = run.len() as u64;
            if !zero {
                writer.write(&Record::Pages { address, data: run })?;
                pace(writer.written())?;
            } else if zeros {
                match empty.last_mut() {
                    Some((at, before)) if *at + *before == address => *before += len,
                    _ => empty.push((address, len)),
                }
            }
            address += len;
            rest = after;
        }
        if empty.len() >= MAX_ZEROS / 2 {
            writer.write(&Record::Zeros(std::mem::take(&mut empty)))?;
        }
    }
    if !empty.is_empty() {
        writer.write(&Record::Zeros(empty))?;
    }
    pace(writer.written())
}

/// Loads a record of memory; false when it is another record.
///
/// Zeros are written only over what is not zero: the host gives no memory for them then.
pub(crate) fn load(memory: &GuestMemory, record: &Record<'_>) -> Result<bool, StreamError> {
    let outside = |e: AccessError| StreamError::Malformed(e.to_string());
    match record {
        Record::Pages { address, data } => memory.write(*address, data).map_err(outside)?,
        Record::Zeros(ranges) => {
            let mut page = [0; PAGE];
            for (start, len) in ranges {
                if !memory.contains(*start, *len) {
                    return Err(outside(AccessError { address: *start, len: *len }));
                }
                for at in (*start..start + len).step_by(PAGE) {
                    memory.read(at, &mut page).map_err(outside)?;
                    if page != ZERO_PAGE {
                        memory.write(at, &ZERO_PAGE).map_err(outside)?;
                    }
                }
            }
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// What devices write, where the accelerator does not hear of it.
struct DeviceWrites(Vec<(u64, u64, Vec<AtomicU64>)>);

impl DeviceWrites {
    fn new(memory: &GuestMemory) -> Self {
        let words = |size: u64| (0..(size / PAGE_SIZE).div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self(memory.regions().iter().map(|r| (r.guest_address(), r.end(), words(r.size()))).collect())
    }
}

impl WriteObserver for Arc<DeviceWrites> {
    fn written(&self, address: u64, len: u64) {
        let last = address.saturating_add(len.max(1) - 1);
        for (start, end, words) in &self.0 {
            let (from, to) = (address.max(*start), last.min(end - 1));
            if from <= to {
                for page in (from - start) / PAGE_SIZE..=(to - start) / PAGE_SIZE {
                    words[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::AcqRel);
                }
            }
        }
    }
}

/// Notes the pages that are written while it exists.
pub(crate) struct Tracker<'a> {
    vm: &'a dyn Vm,
    memory: &'a GuestMemory,
    /// `None` where the accelerator sees what devices write.
    devices: Option<Arc<DeviceWrites>>,
}

impl<'a> Tracker<'a> {
    pub fn start(vm: &'a dyn Vm, memory: &'a GuestMemory) -> Result<Self, AccelError> {
        let devices = (!memory.has_write_observer()).then(|| Arc::new(DeviceWrites::new(memory)));
        if let Some(writes) = &devices {
            memory.set_write_observer(Some(Box::new(writes.clone())));
        }
        let tracker = Self { vm, memory, devices };
        vm.set_dirty_tracking(true)?;
        Ok(tracker)
    }

    /// The pages that were written since the last call.
    pub fn take(&self) -> Result<PageSet, AccelError> {
        let mut set = Vec::new();
        for index in 0..self.memory.regions().len() {
            let mut words = self.vm.take_dirty_pages(index)?;
            if let Some(writes) = &self.devices {
                for (word, more) in words.iter_mut().zip(&writes.0[index].2) {
                    *word |= more.swap(0, Ordering::AcqRel);
                }
            }
            set.push(words);
        }
        Ok(PageSet(set))
    }
}

impl Drop for Tracker<'_> {
    fn drop(&mut self) {
        if self.devices.is_some() {
            self.memory.set_write_observer(None);
        }
        if let Err(error) = self.vm.set_dirty_tracking(false) {
            tracing::warn!(%error, "Writes are still tracked; the guest is slower");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::StreamReader;
    use super::*;
    use crate::memory::RegionOptions;

    fn memory() -> GuestMemory {
        let region = |at, size| MemoryRegion::allocate(at, size, &RegionOptions::default()).unwrap();
        GuestMemory::new(vec![region(0, 0x20_0000), region(1 << 32, 0x10_0000)]).unwrap()
    }

    fn copy(from: &GuestMemory, to: &GuestMemory, set: &PageSet, zeros: bool) -> u64 {
        let mut writer = StreamWriter::new(Vec::new()).unwrap();
        send(from, set, zeros, &mut writer, &mut |_| Ok::<(), StreamError>(())).unwrap();
        writer.write(&Record::End).unwrap();
        let bytes = std::mem::take(writer.get_mut());
        let mut reader = StreamReader::new(bytes.as_slice()).unwrap();
        while load(to, &reader.read().unwrap()).unwrap() {}
        bytes.len() as u64
    }

    fn bytes(memory: &GuestMemory) -> Vec<u8> {
        let mut all = Vec::new();
        for region in memory.regions() {
            let mut part = vec![0; region.size() as usize];
            memory.read(region.guest_address(), &mut part).unwrap();
            all.extend(part);
        }
        all
    }

    #[test]
    fn only_written_pages_are_sent_and_holes_stay_holes() {
        let (a, b) = (memory(), memory());
        a.write(0x1000, &[1; 0x1800]).unwrap();
        a.write((1 << 32) + 0xf_f000, &[2; 0x1000]).unwrap();
        // Written, and zero.
        a.write(0x8000, &[0; 0x1000]).unwrap();
        let set = PageSet::written(&a);
        assert_eq!(set.len(), 4);
        let sent = copy(&a, &b, &set, false);
        assert!(sent < 4 * 4096, "three pages and their headers, not {sent} bytes");
        assert_eq!(PageSet::written(&b).len(), 3);
        assert_eq!(bytes(&a), bytes(&b));
        // A page that became zero.
        a.fill(0x2000, 0x1000, 0).unwrap();
        copy(&a, &b, &PageSet::written(&a), true);
        assert_eq!(bytes(&a), bytes(&b));
        assert_eq!(PageSet::written(&memory()).len(), 0);
    }

    #[test]
    fn pages_outside_of_ram_are_refused() {
        let b = memory();
        for record in [
            Record::Pages { address: 0x1f_f000, data: &[1; 0x2000] },
            Record::Zeros(vec![(1 << 33, 0x1000)]),
            Record::Zeros(vec![(0, 1 << 40)]),
        ] {
            assert!(load(&b, &record).is_err(), "{record:?}");
        }
        assert_eq!(PageSet::written(&b).len(), 0);
    }

    #[test]
    fn writes_of_devices_are_noted_by_region() {
        let memory = memory();
        let writes = Arc::new(DeviceWrites::new(&memory));
        memory.set_write_observer(Some(Box::new(writes.clone())));
        memory.write(0x1ff, &[1; 0x1000]).unwrap();
        memory.write((1 << 32) + 0x4_0000, &[1]).unwrap();
        let words = |n: usize| writes.0[n].2.iter().map(|w| w.load(Ordering::Relaxed)).collect::<Vec<_>>();
        assert_eq!(words(0)[0], 0b11);
        assert_eq!(words(1), [0, 1, 0, 0]);
        assert_eq!(words(0)[1..], [0; 7]);
    }
}
