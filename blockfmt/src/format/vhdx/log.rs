//! The log: a ring of entries, each of which holds pages of metadata to be written elsewhere in the file.

use super::header::{MAX_FILE, MIB, PAGE, checksum, guid, le32, le64, put, seal};
use crate::{Error, Result, Storage};
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

/// Most pages in one entry. An entry takes less than a third of the smallest log, so that a new one never
/// overwrites the one before.
pub(super) const MAX_PAGES: usize = 84;
/// Bytes before the descriptors, and of each descriptor.
const ENTRY_HEADER: usize = 64;
const DESCRIPTOR: usize = 32;
/// Something that an entry says about the file.
#[derive(Debug)]
pub(super) enum Patch {
    Page { offset: u64, data: Box<[u8; PAGE as usize]> },
    Zero { offset: u64, len: u64 },
}

impl Patch {
    fn range(&self) -> (u64, u64) {
        match self {
            Patch::Page { offset, .. } => (*offset, PAGE),
            Patch::Zero { offset, len } => (*offset, *len),
        }
    }
}

/// What the log adds to the file.
#[derive(Debug, Default)]
pub(super) struct Replay {
    patches: Vec<Patch>,
    /// Length that the file must have at least.
    last_file_offset: u64,
    /// Length below which the file lost its end.
    flushed_file_offset: u64,
}

/// An entry that is complete.
#[derive(Debug)]
struct Entry {
    len: usize,
    tail: usize,
    sequence: u64,
}

impl Replay {
    /// Finds the entries that may not have reached their places yet.
    pub fn read(storage: &Arc<dyn Storage>, name: &str, offset: u64, len: u32, id: Uuid) -> Result<Self> {
        let file_len = storage.length()?;
        if offset + u64::from(len) > file_len {
            return Err(Error::corrupt(name, "its log is out of bounds"));
        }
        let mut log = vec![0; len as usize];
        storage.read_at(&mut log, offset)?;
        let mut entries = BTreeMap::new();
        for at in (0..log.len()).step_by(PAGE as usize) {
            if let Some(entry) = parse_entry(&log, at, id) {
                entries.insert(at, entry);
            }
        }
        let mut heads: Vec<(usize, &Entry)> = entries.iter().map(|(at, e)| (*at, e)).collect();
        heads.sort_unstable_by_key(|(_, e)| std::cmp::Reverse(e.sequence));
        // The newest entry whose predecessors, from the one that it names as the first, are all there.
        for (at, head) in heads {
            let follows = |from: usize, e: &Entry| {
                let next = (from + e.len) % log.len();
                entries
                    .get(&next)
                    .filter(|n| e.sequence.checked_add(1) == Some(n.sequence))
                    .map(|n| (next, n))
            };
            if follows(at, head).is_some() {
                continue; // not the end of its run
            }
            let mut run = Vec::new();
            let mut current = entries.get(&head.tail).map(|e| (head.tail, e));
            while let Some((from, entry)) = current {
                run.push(from);
                if from == at {
                    return Self::collect(&log, &run, name, offset, file_len);
                }
                current = follows(from, entry);
            }
        }
        tracing::warn!(image = name, "The log of the image has no complete entry and is ignored");
        Ok(Replay::default())
    }

    fn collect(log: &[u8], run: &[usize], name: &str, log_offset: u64, file_len: u64) -> Result<Self> {
        let mut out = Replay::default();
        for at in run {
            let entry = ring(log, *at, le32(log, at + 8) as usize);
            out.flushed_file_offset = le64(&entry, 48);
            out.last_file_offset = le64(&entry, 56);
            let count = le32(&entry, 24) as usize;
            let mut data = (ENTRY_HEADER + count * DESCRIPTOR).next_multiple_of(PAGE as usize);
            for d in entry[ENTRY_HEADER..].chunks_exact(DESCRIPTOR).take(count) {
                let offset = le64(d, 16);
                if d.starts_with(b"zero") {
                    out.patches.push(Patch::Zero { offset, len: le64(d, 8) });
                    continue;
                }
                let sector = &entry[data..data + PAGE as usize];
                let mut page = Box::new([0; PAGE as usize]);
                page.copy_from_slice(sector);
                page[..8].copy_from_slice(&d[8..16]);
                page[PAGE as usize - 4..].copy_from_slice(&d[4..8]);
                out.patches.push(Patch::Page { offset, data: page });
                data += PAGE as usize;
            }
        }
        if file_len < out.flushed_file_offset {
            return Err(Error::corrupt(name, "its end is missing"));
        }
        if out.last_file_offset > MAX_FILE {
            return Err(Error::corrupt(name, "its log leads to a file of absurd size"));
        }
        let limit = out.last_file_offset.max(file_len).next_multiple_of(MIB);
        let log_end = log_offset + log.len() as u64;
        for patch in &out.patches {
            let (from, len) = patch.range();
            let end = from.checked_add(len).filter(|end| *end <= limit);
            let aligned = from.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
            // Identifier, headers and the log itself are not the log's to change.
            let allowed = from >= 192 << 10 && end.is_some_and(|e| e <= log_offset || from >= log_end);
            if !aligned || !allowed {
                return Err(Error::corrupt(name, "its log writes where it may not"));
            }
        }
        Ok(out)
    }

    /// Writes what the log says to its places.
    pub fn apply(&self, storage: &Arc<dyn Storage>) -> Result<()> {
        let len = storage.length()?;
        if self.last_file_offset > len && storage.zero_beyond_end() {
            storage.truncate(self.last_file_offset.next_multiple_of(MIB))?;
        }
        for patch in &self.patches {
            match patch {
                Patch::Page { offset, data } => storage.write_at(&data[..], *offset)?,
                Patch::Zero { offset, len } => storage.zero(*offset, *len, false)?,
            }
        }
        storage.sync()
    }

    /// Reads metadata as it will be after [`apply`](Self::apply).
    pub fn read_at(&self, storage: &Arc<dyn Storage>, buf: &mut [u8], offset: u64) -> Result<()> {
        storage.read_at(buf, offset)?;
        let end = offset + buf.len() as u64;
        for patch in &self.patches {
            let (from, len) = patch.range();
            let (a, b) = (from.max(offset), (from + len).min(end));
            if a < b {
                let target = &mut buf[(a - offset) as usize..(b - offset) as usize];
                match patch {
                    Patch::Page { data, .. } => {
                        target.copy_from_slice(&data[(a - from) as usize..(b - from) as usize]);
                    }
                    Patch::Zero { .. } => target.fill(0),
                }
            }
        }
        Ok(())
    }
}

/// `len` bytes of the ring from `at` on.
fn ring(log: &[u8], at: usize, len: usize) -> Vec<u8> {
    let first = len.min(log.len() - at);
    [&log[at..at + first], &log[..len - first]].concat()
}

/// The entry at `at`, if there is a complete one.
fn parse_entry(log: &[u8], at: usize, id: Uuid) -> Option<Entry> {
    let page = PAGE as usize;
    let h = &log[at..at + page];
    if !h.starts_with(b"loge") || guid(h, 32) != id {
        return None;
    }
    let (len, tail, sequence) = (le32(h, 8) as usize, le32(h, 12) as usize, le64(h, 16));
    let count = le32(h, 24) as usize;
    let valid = len > 0 && len.is_multiple_of(page) && len <= log.len() && sequence > 0;
    if !valid || tail >= log.len() || !tail.is_multiple_of(page) || count > len / DESCRIPTOR {
        return None;
    }
    let descriptors = (ENTRY_HEADER + count * DESCRIPTOR).next_multiple_of(page);
    // No page of an entry but its first looks like the start of another: entries that overlap, which could be
    // expensive to check, are impossible.
    let starts = |n: usize, with: &[u8]| log[(at + n) % log.len()..].starts_with(with);
    let mut pages = (page..len).step_by(page);
    if !pages.all(|n| starts(n, b"data") || (n < descriptors && (starts(n, b"desc") || starts(n, b"zero")))) {
        return None;
    }
    let entry = ring(log, at, len);
    if le32(&entry, 4) != checksum(&entry) {
        return None;
    }
    let mut data = descriptors;
    for d in entry[ENTRY_HEADER..].chunks_exact(DESCRIPTOR).take(count) {
        let known = d.starts_with(b"zero") || d.starts_with(b"desc");
        if !known || le64(d, 24) != sequence {
            return None;
        }
        if d.starts_with(b"desc") {
            let sector = entry.get(data..data + page)?;
            let seen = u64::from(le32(sector, 4)) << 32 | u64::from(le32(sector, page - 4));
            if !sector.starts_with(b"data") || seen != sequence {
                return None;
            }
            data += page;
        }
    }
    (data == len).then_some(Entry { len, tail, sequence })
}

/// The writing side of the log.
#[derive(Debug)]
pub(super) struct Log {
    pub id: Uuid,
    offset: u64,
    len: u32,
    /// Where the next entry goes.
    next: u32,
    sequence: u64,
}

impl Log {
    /// A log that is not in use.
    pub fn new(offset: u64, len: u32) -> Self {
        Log { id: Uuid::nil(), offset, len, next: 0, sequence: 1 }
    }

    /// Takes the log into use. The caller then puts its identifier into the header.
    pub fn start(&mut self, storage: &Arc<dyn Storage>, file_len: u64) -> Result<()> {
        *self = Log { id: Uuid::new_v4(), ..Log::new(self.offset, self.len) };
        // A log in use has an entry at all times, if only an empty one.
        self.append(storage, &[], file_len)
    }

    /// Writes an entry. Everything that earlier entries say must be in its place and durable: the entry
    /// names itself as the first that counts.
    pub fn append(
        &mut self,
        storage: &Arc<dyn Storage>,
        pages: &[(u64, Box<[u8]>)],
        file_len: u64,
    ) -> Result<()> {
        let page = PAGE as usize;
        let descriptors = (ENTRY_HEADER + pages.len() * DESCRIPTOR).next_multiple_of(page);
        let len = descriptors + pages.len() * page;
        if self.next + len as u32 > self.len {
            self.next = 0;
        }
        let mut b = vec![0; len];
        put(&mut b, 0, b"loge");
        put(&mut b, 8, &(len as u32).to_le_bytes());
        put(&mut b, 12, &self.next.to_le_bytes());
        put(&mut b, 16, &self.sequence.to_le_bytes());
        put(&mut b, 24, &(pages.len() as u32).to_le_bytes());
        put(&mut b, 32, &self.id.to_bytes_le());
        put(&mut b, 48, &file_len.to_le_bytes());
        put(&mut b, 56, &file_len.to_le_bytes());
        for (n, (offset, bytes)) in pages.iter().enumerate() {
            let d = ENTRY_HEADER + n * DESCRIPTOR;
            put(&mut b, d, b"desc");
            put(&mut b, d + 4, &bytes[page - 4..]);
            put(&mut b, d + 8, &bytes[..8]);
            put(&mut b, d + 16, &offset.to_le_bytes());
            put(&mut b, d + 24, &self.sequence.to_le_bytes());
            let s = descriptors + n * page;
            put(&mut b, s, b"data");
            put(&mut b, s + 4, &((self.sequence >> 32) as u32).to_le_bytes());
            put(&mut b, s + 8, &bytes[8..page - 4]);
            put(&mut b, s + page - 4, &(self.sequence as u32).to_le_bytes());
        }
        seal(&mut b);
        storage.write_at(&b, self.offset + u64::from(self.next))?;
        storage.sync()?;
        self.next += len as u32;
        self.sequence += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn the_newest_complete_entry_counts() {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        storage.truncate(4 * MIB).unwrap();
        let mut log = Log::new(MIB, MIB as u32);
        log.start(&storage, 4 * MIB).unwrap();
        let read = |id| Replay::read(&storage, "x", MIB, MIB as u32, id).unwrap();
        assert!(read(log.id).patches.is_empty());
        for n in 0..40u8 {
            let pages: Vec<_> =
                (0..30).map(|p| (2 * MIB + p * PAGE, vec![n; PAGE as usize].into())).collect();
            log.append(&storage, &pages, 4 * MIB).unwrap();
            let mut buf = [0xff; 6000];
            read(log.id).read_at(&storage, &mut buf, 2 * MIB + 29 * PAGE).unwrap();
            assert!(buf[..4096].iter().all(|b| *b == n) && buf[4096..].iter().all(|b| *b == 0));
        }
        // A torn entry leaves the one before.
        let last = u64::from(log.next) - PAGE;
        storage.write_at(&[0; 512], MIB + last).unwrap();
        let mut buf = [0xff; 1];
        read(log.id).read_at(&storage, &mut buf, 2 * MIB).unwrap();
        assert_eq!(buf[0], 38);
        assert!(read(Uuid::new_v4()).patches.is_empty(), "entries of another log count");
    }

    #[test]
    fn the_last_possible_sequence_number_has_no_successor() {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        storage.truncate(4 * MIB).unwrap();
        let mut log = Log::new(MIB, MIB as u32);
        log.start(&storage, 4 * MIB).unwrap();
        log.append(&storage, &[], 4 * MIB).unwrap();
        let mut entry = [0; PAGE as usize];
        storage.read_at(&mut entry, MIB).unwrap();
        put(&mut entry, 16, &u64::MAX.to_le_bytes());
        seal(&mut entry);
        storage.write_at(&entry, MIB).unwrap();
        assert!(Replay::read(&storage, "x", MIB, MIB as u32, log.id).unwrap().patches.is_empty());
    }
}
