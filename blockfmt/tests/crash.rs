//! What a crash may leave behind, replayed from a record of every write and flush.
//!
//! After each crash every sector must hold what was last flushed or something that was written to it since,
//! and `qemu-img check` may find leaks but no corruption.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::qcow2::Qcow2Options;
use blockfmt::format::vhd::{VhdKind, VhdOptions};
use blockfmt::storage::{Event, MemoryStorage, RecordingStorage};
use blockfmt::{CreateOptions, Disk, Format, OpenOptions, Storage};
use common::{Rng, qemu, text};
use std::sync::Arc;

const SECTOR: usize = 512;
const SIZE: u64 = 2 << 20;

/// Everything a sector may hold, by crash position: tag, and the number of the mark that precedes it.
struct History {
    /// Per sector, the values in order of time with the mark before each.
    sectors: Vec<Vec<(u64, u64)>>,
    marks: u64,
    tag: u64,
}

fn sector(tag: u64) -> [u8; SECTOR] {
    let mut out = [0; SECTOR];
    if tag != 0 {
        for (i, word) in out.chunks_mut(8).enumerate() {
            word.copy_from_slice(&(tag.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i as u64).to_le_bytes());
        }
    }
    out
}

impl History {
    fn new(base: u64) -> Self {
        let sectors = (0..SIZE / SECTOR as u64).map(|s| vec![(if s < base { s + 1 } else { 0 }, 0)]);
        History { sectors: sectors.collect(), marks: 0, tag: 1 << 32 }
    }

    /// Random requests; every flush that returns is a mark in the record.
    fn run(&mut self, disk: &Disk, record: &RecordingStorage, rng: &mut Rng, requests: usize) {
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
                    record.mark(self.marks);
                }
            }
        }
    }

    /// Panics unless the disk holds an allowed state for a crash after mark `mark`.
    fn check(&self, disk: &Disk, mark: u64, what: &str) {
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

/// The image after a crash at event `at`: everything up to the last flush, a random part of the rest.
fn crash(start: &MemoryStorage, events: &[Event], at: usize, rng: &mut Rng) -> MemoryStorage {
    let durable = events[..at].iter().rposition(|e| *e == Event::Flush).map_or(0, |i| i + 1);
    let image = start.clone();
    let storage: &dyn Storage = &image;
    let keep = [0, 20, 50, 80, 100][rng.below(5) as usize];
    for (i, event) in events[..at].iter().enumerate() {
        let survives = i < durable || rng.below(100) < keep;
        match event {
            Event::Write { offset, data } if survives => {
                let unit = if rng.below(2) == 0 { 512 } else { 4096 };
                if i < durable || rng.below(3) > 0 {
                    storage.write_at(data, *offset).unwrap();
                } else {
                    // Torn: some units reach the disk.
                    for (n, piece) in data.chunks(unit).enumerate() {
                        if rng.below(2) == 0 {
                            storage.write_at(piece, offset + (n * unit) as u64).unwrap();
                        }
                    }
                }
            }
            Event::Zero { offset, len } if survives => storage.zero(*offset, *len, true).unwrap(),
            Event::SetLen(len) if survives => storage.truncate(*len).unwrap(),
            _ => {}
        }
    }
    image
}

fn corruptions(image: &MemoryStorage, dir: &std::path::Path) -> Option<String> {
    let path = dir.join("crashed.qcow2");
    std::fs::write(&path, image.to_vec()).unwrap();
    let output = qemu("qemu-img", &["check", "-f", "qcow2", "-U", text(&path)]);
    // 0: clean, 3: leaks only.
    let ok = matches!(output.status.code(), Some(0 | 3));
    (!ok).then(|| {
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    })
}

fn run(name: &str, qcow2: Qcow2Options, with_base: bool, seed: u64) {
    run_on(name, CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2), with_base, seed);
}

fn run_on(name: &str, mut create: CreateOptions, with_base: bool, seed: u64) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut rng = Rng(seed);
    let base_sectors = if with_base { SIZE / SECTOR as u64 * 3 / 4 } else { 0 };
    let base: Vec<u8> = (1..=base_sectors).flat_map(sector).collect();
    std::fs::write(dir.path().join("base.raw"), &base).unwrap();
    let start = MemoryStorage::new();
    let inner = Arc::new(start);
    let format = create.format;
    if with_base {
        create = create.backing(text(&dir.path().join("base.raw")), Format::Raw);
    }
    create.create_on(inner.clone()).unwrap();
    let start = MemoryStorage::clone(&inner);

    let record = Arc::new(RecordingStorage::new(inner));
    let open = |storage: Arc<dyn Storage>| {
        OpenOptions::new(format).open_storage(storage, dir.path().join("top")).unwrap()
    };
    let disk = open(record.clone());
    let mut history = History::new(base_sectors);
    history.run(&disk, &record, &mut rng, 120);
    drop(disk);
    let events = record.events();
    let rounds = if std::env::var_os("NACRE_LONG").is_some() { 4000 } else { 250 };
    for round in 0..rounds {
        let at = rng.below(events.len() as u64 + 1) as usize;
        let mark =
            events[..at].iter().rev().find_map(|e| if let Event::Mark(m) = e { Some(*m) } else { None });
        let image = crash(&start, &events, at, &mut rng);
        let what = format!("{name}, crash {round} at event {at} of {}", events.len());
        if format == Format::Qcow2
            && round % 10 == 0
            && let Some(report) = corruptions(&image, dir.path())
        {
            panic!("{what}: {report}");
        }
        let disk = open(Arc::new(image));
        history.check(&disk, mark.unwrap_or(0), &what);
        // The survivor must be usable: what is written now must not damage anything else.
        let mut fresh = vec![0; SIZE as usize];
        disk.read_at(&mut fresh, 0).unwrap();
        let at = rng.below(SIZE - 100_000);
        disk.write_at(&[0xee; 100_000], at).unwrap();
        fresh[at as usize..at as usize + 100_000].fill(0xee);
        let mut seen = vec![0; SIZE as usize];
        disk.read_at(&mut seen, 0).unwrap();
        assert!(seen == fresh, "{what}: writing after the crash damaged other data");
    }
}

#[test]
fn plain_images() {
    run("64k clusters", Qcow2Options::default(), false, 11);
    run("4k clusters", Qcow2Options { cluster_size: 4096, ..Qcow2Options::default() }, false, 12);
    run("512 byte clusters", Qcow2Options { cluster_size: 512, ..Qcow2Options::default() }, false, 13);
}

#[test]
fn children() {
    run("child", Qcow2Options { cluster_size: 16384, ..Qcow2Options::default() }, true, 21);
    let subclusters = Qcow2Options { extended_l2: true, ..Qcow2Options::default() };
    run("child with subclusters", subclusters, true, 22);
    run("child of version 2", Qcow2Options { version: 2, ..Qcow2Options::default() }, true, 23);
}

#[test]
fn vhd_images() {
    for (n, kind) in [VhdKind::Fixed, VhdKind::Dynamic].into_iter().enumerate() {
        let vhd = VhdOptions { kind, block_size: 512 << 10 };
        run_on("VHD", CreateOptions::new(Format::Vhd, SIZE).vhd(vhd), false, 31 + n as u64);
    }
    let vhd = VhdOptions { block_size: 512 << 10, ..VhdOptions::default() };
    run_on("differencing VHD", CreateOptions::new(Format::Vhd, SIZE).vhd(vhd), true, 33);
}

#[test]
fn an_allocating_write_and_flush_costs_no_more_than_in_qemu() {
    let record = Arc::new(RecordingStorage::new(Arc::new(MemoryStorage::new())));
    CreateOptions::new(Format::Qcow2, 1 << 30).create_on(record.clone()).unwrap();
    let before = record.events().len();
    let disk = OpenOptions::new(Format::Qcow2).open_storage(record.clone(), "top.qcow2").unwrap();
    for i in 0..1000 {
        disk.write_at(&[1; 4096], i * 65536).unwrap();
        disk.flush().unwrap();
    }
    let submissions = record.events().len() - before;
    assert!(submissions <= 3300, "{submissions} submissions for 1000 writes; QEMU needs 5007");
    assert!(disk.layers()[0].size() == 1 << 30);
}
