//! Many threads on one disk, with and without failing storage.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::qcow2::Qcow2Options;
use blockfmt::storage::{Fault, FaultStorage, FileOptions, FileStorage, Operation};
use blockfmt::{CreateOptions, Disk, Format, OpenOptions, Storage};
use common::{Rng, qemu, text};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const THREADS: u64 = 4;
const SECTOR: u64 = 512;
const SIZE: u64 = 8 << 20;
const OPERATIONS: usize = 1500;

/// A thread's view of one sector: the values it may hold.
type Allowed = Vec<u64>;

fn sector(tag: u64) -> Vec<u8> {
    match tag {
        0 => vec![0; SECTOR as usize],
        _ => tag.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes().repeat(SECTOR as usize / 8),
    }
}

/// One thread: random requests on the sectors that it owns, in the first half of the disk single sectors in
/// clusters shared with other threads, in the second half whole areas.
fn worker(disk: &Disk, me: u64, cluster: u64) -> Vec<(u64, Allowed)> {
    let mut rng = Rng(me * 77 + 5);
    let mut tag = me << 40;
    let half = SIZE / 2 / SECTOR;
    let area = (cluster * 4).max(65536) / SECTOR;
    let mut known = std::collections::BTreeMap::<u64, Allowed>::new();
    for _ in 0..OPERATIONS {
        let (first, count) = if rng.below(2) == 0 {
            (rng.below(half / THREADS) * THREADS + me, 1)
        } else {
            let areas = half / area;
            let mine = rng.below(areas / THREADS) * THREADS + me;
            let skip = rng.below(area / 2);
            (half + mine * area + skip, 1 + rng.below(area - skip))
        };
        let (offset, len) = (first * SECTOR, count * SECTOR);
        let note = |known: &mut std::collections::BTreeMap<u64, Allowed>, s, value, ok| {
            let allowed = known.entry(s).or_insert_with(|| vec![0]);
            if ok {
                allowed.clear();
            }
            allowed.push(value);
        };
        match rng.below(6) {
            0..=2 => {
                tag += 1;
                let data: Vec<u8> = (0..count).flat_map(|_| sector(tag)).collect();
                let ok = disk.write_at(&data, offset).is_ok();
                (first..first + count).for_each(|s| note(&mut known, s, tag, ok));
            }
            3 => {
                let ok = disk.write_zeroes(offset, len, rng.below(2) == 0).is_ok();
                (first..first + count).for_each(|s| note(&mut known, s, 0, ok));
            }
            4 => {
                // Whether it succeeds or not: old value or zero.
                let _ = disk.discard(offset, len);
                (first..first + count).for_each(|s| note(&mut known, s, 0, false));
            }
            _ => {
                let mut seen = vec![0; len as usize];
                if disk.read_at(&mut seen, offset).is_ok() {
                    for s in first..first + count {
                        let at = ((s - first) * SECTOR) as usize;
                        let zero = vec![0];
                        let allowed = known.get(&s).unwrap_or(&zero);
                        let seen = &seen[at..at + SECTOR as usize];
                        assert!(
                            allowed.iter().any(|t| seen == sector(*t)),
                            "thread {me}, sector {s}: {allowed:x?}"
                        );
                    }
                }
            }
        }
    }
    known.into_iter().collect()
}

fn torture(disk: &Disk, cluster: u64, calm: impl FnOnce()) -> Vec<(u64, Allowed)> {
    let done = AtomicBool::new(false);
    let known: Vec<_> = std::thread::scope(|scope| {
        let flusher = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                let _ = disk.flush(); // a failure is repaired by a later flush
                std::thread::yield_now();
            }
        });
        let workers: Vec<_> = (0..THREADS).map(|me| scope.spawn(move || worker(disk, me, cluster))).collect();
        let known = workers.into_iter().flat_map(|w| w.join().unwrap()).collect();
        done.store(true, Ordering::Release);
        flusher.join().unwrap();
        known
    });
    calm();
    known
}

fn verify(disk: &Disk, known: &[(u64, Allowed)]) {
    let mut seen = vec![0; SECTOR as usize];
    for (s, allowed) in known {
        disk.read_at(&mut seen, s * SECTOR).unwrap();
        assert!(allowed.iter().any(|t| seen == sector(*t)), "sector {s} at the end: {allowed:x?}");
    }
}

fn check(path: &Path) {
    let output = qemu("qemu-img", &["check", "-f", "qcow2", text(path)]);
    assert!(matches!(output.status.code(), Some(0 | 3)), "{output:?}");
}

fn variants() -> Vec<(u64, bool)> {
    vec![(65536, false), (4096, false), (512, false), (65536, true)]
}

#[test]
fn threads_do_not_disturb_each_other() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (cluster_size, extended_l2) in variants() {
        let path = dir.path().join(format!("{cluster_size}-{extended_l2}.qcow2"));
        let qcow2 = Qcow2Options { cluster_size, extended_l2, ..Qcow2Options::default() };
        CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).create(&path).unwrap();
        let disk = OpenOptions::new(Format::Qcow2).open(&path).unwrap();
        let known = torture(&disk, cluster_size, || ());
        verify(&disk, &known);
        drop(disk);
        verify(&OpenOptions::new(Format::Qcow2).open(&path).unwrap(), &known);
        let output = qemu("qemu-img", &["check", "-f", "qcow2", text(&path)]);
        assert!(output.status.success(), "{output:?}");
    }
}

#[test]
fn failing_storage_loses_nothing_that_was_acknowledged() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (cluster_size, extended_l2) in variants() {
        let path = dir.path().join(format!("f{cluster_size}-{extended_l2}.qcow2"));
        let qcow2 = Qcow2Options { cluster_size, extended_l2, ..Qcow2Options::default() };
        CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).create(&path).unwrap();
        let failing = Arc::new(AtomicBool::new(false));
        let on = failing.clone();
        let plan = move |operation, n: u64| {
            if !on.load(Ordering::Acquire) {
                return Fault::Pass;
            }
            match (operation, n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57) {
                (Operation::Read, 0) => Fault::Fail(libc::EIO),
                (Operation::Write, 0) => Fault::Fail(libc::ENOSPC),
                (Operation::Write, 1) => Fault::Half(libc::EIO),
                (Operation::Flush, 0..=8) => Fault::Fail(libc::EIO),
                (_, 9) => Fault::Stall(50),
                _ => Fault::Pass,
            }
        };
        let file: Arc<dyn Storage> = Arc::new(FileStorage::open(&path, FileOptions::default()).unwrap());
        // The disk below stays sound: what failed is reported once and works when it is tried again.
        let storage = Arc::new(FaultStorage::new(file, plan));
        let disk = OpenOptions::new(Format::Qcow2).open_storage(storage, &path).unwrap();
        failing.store(true, Ordering::Release);
        let known = torture(&disk, cluster_size, || failing.store(false, Ordering::Release));
        verify(&disk, &known);
        disk.close().unwrap();
        drop(disk);
        check(&path);
        verify(&OpenOptions::new(Format::Qcow2).open(&path).unwrap(), &known);
    }
}
