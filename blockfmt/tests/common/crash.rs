//! What a crash may leave behind, and what must be there nevertheless.
#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

use super::{Rng, qemu, text};
use blockfmt::format::LayerOptions;
use blockfmt::format::qcow2::{Qcow2, Repair};
use blockfmt::storage::{Event, MemoryStorage, RecordingStorage};
use blockfmt::{Disk, Storage};
use std::path::Path;
use std::sync::Arc;

pub const SECTOR: usize = 512;
pub const SIZE: u64 = 2 << 20;

/// The contents of a sector that was written with a tag; tag 0 stands for zeros.
pub fn sector(tag: u64) -> [u8; SECTOR] {
    let mut out = [0; SECTOR];
    if tag != 0 {
        for (i, word) in out.chunks_mut(8).enumerate() {
            word.copy_from_slice(&(tag.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i as u64).to_le_bytes());
        }
    }
    out
}

/// Everything a sector may hold, by crash position: tag, and the number of the mark that precedes it.
pub struct History {
    /// Per sector, the values in order of time with the mark before each.
    sectors: Vec<Vec<(u64, u64)>>,
    pub marks: u64,
    tag: u64,
}

impl History {
    /// A disk whose first `base` sectors hold their number plus one.
    pub fn new(base: u64) -> Self {
        let sectors = (0..SIZE / SECTOR as u64).map(|s| vec![(if s < base { s + 1 } else { 0 }, 0)]);
        History { sectors: sectors.collect(), marks: 0, tag: 1 << 32 }
    }

    /// Random requests; every flush that returns is a mark in the record.
    pub fn run(&mut self, disk: &Disk, record: Option<&RecordingStorage>, rng: &mut Rng, requests: usize) {
        for _ in 0..requests {
            let limit = [4, 40, 400][rng.below(3) as usize];
            let count = 1 + rng.below(limit) as usize;
            let first = rng.below((self.sectors.len() - count) as u64) as usize;
            let (offset, len) = ((first * SECTOR) as u64, (count * SECTOR) as u64);
            match rng.below(9) {
                0..=4 => {
                    let mut data = Vec::new();
                    for s in first..first + count {
                        self.tag += 1;
                        self.sectors[s].push((self.tag, self.marks));
                        data.extend_from_slice(&sector(self.tag));
                    }
                    disk.write_at(&data, offset).unwrap();
                }
                5 => {
                    let unmap = rng.below(2) == 0;
                    disk.write_zeroes(offset, len, unmap).unwrap();
                    self.sectors[first..first + count].iter_mut().for_each(|s| s.push((0, self.marks)));
                }
                6 => {
                    disk.discard(offset, len).unwrap();
                    // The record says what is there now: zero or the old value.
                    let mut seen = vec![0; len as usize];
                    disk.read_at(&mut seen, offset).unwrap();
                    for (i, s) in self.sectors[first..first + count].iter_mut().enumerate() {
                        if seen[i * SECTOR..(i + 1) * SECTOR].iter().all(|b| *b == 0) {
                            s.push((0, self.marks));
                        }
                    }
                }
                _ => {
                    disk.flush().unwrap();
                    self.marks += 1;
                    if let Some(record) = record {
                        record.mark(self.marks);
                    }
                }
            }
        }
    }

    /// Forgets all but the present contents, which are durable now.
    pub fn settle(&mut self) {
        for values in &mut self.sectors {
            *values = vec![(values[values.len() - 1].0, 0)];
        }
        self.marks = 0;
    }

    /// The present contents.
    pub fn contents(&self) -> Vec<u8> {
        self.sectors.iter().flat_map(|values| sector(values[values.len() - 1].0)).collect()
    }

    /// Makes `contents`, known from [`contents`](Self::contents) of another one, the next state of all.
    pub fn becomes(&mut self, other: &History) {
        for (mine, theirs) in self.sectors.iter_mut().zip(&other.sectors) {
            mine.push((theirs[theirs.len() - 1].0, self.marks));
        }
    }

    /// A copy of the present state.
    pub fn present(&self) -> History {
        let sectors = self.sectors.iter().map(|values| vec![values[values.len() - 1]]).collect();
        History { sectors, marks: self.marks, tag: self.tag }
    }

    /// Panics unless the disk holds an allowed state for a crash after mark `mark`.
    pub fn check(&self, disk: &Disk, mark: u64, what: &str) {
        let mut bytes = vec![0; SIZE as usize];
        disk.read_at(&mut bytes, 0).expect(what);
        for (s, values) in self.sectors.iter().enumerate() {
            let seen = &bytes[s * SECTOR..(s + 1) * SECTOR];
            // The last value from before the mark, and everything after it.
            let keep = values.iter().rposition(|(_, m)| *m < mark).unwrap_or(0);
            let allowed = values[keep..].iter().any(|(tag, _)| seen == sector(*tag));
            assert!(allowed, "{what}: sector {s} lost its data (byte 0 is {:#x})", seen[0]);
        }
    }
}

/// The images after a crash at event `at` of their common record: everything up to the last flush of each,
/// a random part of the rest.
pub fn crash(
    start: &[MemoryStorage],
    events: &[(usize, Event)],
    at: usize,
    rng: &mut Rng,
) -> Vec<MemoryStorage> {
    let flushed = |n| events[..at].iter().rposition(|e| *e == (n, Event::Flush)).map_or(0, |i| i + 1);
    let durable: Vec<usize> = (0..start.len()).map(flushed).collect();
    let images = start.to_vec();
    let keep = [0, 20, 50, 80, 100][rng.below(5) as usize];
    for (i, (n, event)) in events[..at].iter().enumerate() {
        let storage: &dyn Storage = &images[*n];
        let survives = i < durable[*n] || rng.below(100) < keep;
        match event {
            Event::Write { offset, data } if survives => {
                let unit = if rng.below(2) == 0 { 512 } else { 4096 };
                if i < durable[*n] || rng.below(3) > 0 {
                    apply(&images[*n], event);
                } else {
                    // Torn: some units reach the disk.
                    for (n, piece) in data.chunks(unit).enumerate() {
                        if rng.below(2) == 0 {
                            storage.write_at(piece, offset + (n * unit) as u64).unwrap();
                        }
                    }
                }
            }
            _ if survives => apply(&images[*n], event),
            _ => {}
        }
    }
    images
}

fn apply(storage: &MemoryStorage, event: &Event) {
    let storage: &dyn Storage = storage;
    match event {
        Event::Write { offset, data } => storage.write_at(data, *offset).unwrap(),
        Event::Zero { offset, len } => storage.zero(*offset, *len, true).unwrap(),
        Event::SetLen(len) => storage.truncate(*len).unwrap(),
        Event::Flush | Event::Mark(_) => {}
    }
}

/// Calls `f` for every write of the record of one storage with the image after a crash at the latest event at which
/// this write may be missing: right before the next flush. Nothing else is missing. `f` also gets the two events.
pub fn each_loss(
    start: &MemoryStorage,
    events: &[(usize, Event)],
    mut f: impl FnMut(MemoryStorage, usize, usize),
) {
    let durable = start.clone();
    let mut from = 0;
    while from < events.len() {
        let flush = events[from..].iter().position(|e| e.1 == Event::Flush);
        let at = flush.map_or(events.len(), |n| from + n);
        for lost in (from..at).filter(|i| matches!(events[*i].1, Event::Write { .. })) {
            let image = durable.clone();
            (from..at).filter(|i| *i != lost).for_each(|i| apply(&image, &events[i].1));
            f(image, lost, at);
        }
        (from..at).for_each(|i| apply(&durable, &events[i].1));
        from = at + 1;
    }
}

/// The marks of the test among events, in order.
pub fn marks(events: &[(usize, Event)]) -> impl DoubleEndedIterator<Item = u64> {
    events.iter().filter_map(|(_, event)| if let Event::Mark(mark) = event { Some(*mark) } else { None })
}

/// The last mark of the test before event `at`, 0 if there is none.
pub fn last_mark(events: &[(usize, Event)], at: usize) -> u64 {
    marks(&events[..at]).next_back().unwrap_or(0)
}

/// What our own check finds beyond leaks in a qcow2 image, without changing it.
pub fn own_corruptions(image: &MemoryStorage) -> Vec<String> {
    let options = LayerOptions { read_only: true, ..LayerOptions::default() };
    let image = Qcow2::open(Arc::new(image.clone()), &options).unwrap();
    let report = image.check(Repair::Nothing).unwrap();
    if report.corruptions > 0 { report.findings } else { Vec::new() }
}

/// What `qemu-img check` finds beyond leaks in a qcow2 image.
pub fn corruptions(image: &MemoryStorage, dir: &Path) -> Option<String> {
    let path = dir.join("crashed.qcow2");
    std::fs::write(&path, image.to_vec()).unwrap();
    let output = qemu("qemu-img", &["check", "-f", "qcow2", "-U", text(&path)]);
    // 0: clean, 3: leaks only.
    let ok = matches!(output.status.code(), Some(0 | 3));
    (!ok).then(|| {
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    })
}

/// How many crashes a test tries: `short`, or many more in a long run.
pub fn rounds(short: usize) -> usize {
    if std::env::var_os("NACRE_LONG").is_some() { short * 16 } else { short }
}
