//! Files: parts of blocks, ends and locks.

use super::*;
use std::sync::Barrier;

fn scratch(direct: bool) -> (tempfile::TempDir, FileStorage) {
    scratch_in(tempfile::tempdir().unwrap(), direct)
}

fn scratch_in(dir: tempfile::TempDir, direct: bool) -> (tempfile::TempDir, FileStorage) {
    let options = FileOptions { create: true, direct, ..FileOptions::default() };
    let file = FileStorage::open(&dir.path().join("f"), options).unwrap();
    (dir, file)
}

#[test]
fn unaligned_direct_io_keeps_neighbours_and_length() {
    let (_dir, file) = scratch(true);
    let file: &dyn Storage = &file;
    file.write_at(&[7; 10000], 0).unwrap();
    file.write_at(&[9; 100], 5000).unwrap();
    file.write_at(&[8; 3], 10000).unwrap();
    assert_eq!(file.len().unwrap(), 10003);
    let mut back = vec![0xff; 10010];
    file.read_at(&mut back, 0).unwrap();
    let expect: Vec<u8> = [vec![7; 5000], vec![9; 100], vec![7; 4900], vec![8; 3], vec![0; 7]].concat();
    assert!(back == expect);
}

/// Runs both at the same moment, again and again, with an empty file each time, and `check` after each time.
fn race(
    direct: bool,
    one: impl Fn(&FileStorage) + Sync,
    other: impl Fn(&FileStorage),
    check: impl Fn(&FileStorage),
) {
    // In memory, where a round takes no time.
    let (_dir, file) = scratch_in(tempfile::tempdir_in("/dev/shm").unwrap(), direct);
    let file = &file;
    let (start, end) = (Barrier::new(2), Barrier::new(2));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                start.wait();
                one(file);
                end.wait();
            }
        });
        for _ in 0..ROUNDS {
            file.set_len(0).unwrap();
            start.wait();
            other(file);
            end.wait();
            check(file);
        }
    });
}

const ROUNDS: usize = 3000;

#[test]
fn unaligned_writes_at_the_end_do_not_cut_off_what_others_append() {
    let results = Mutex::new(Vec::new());
    race(
        true,
        |file| <dyn Storage>::write_at(file, &[1; 100], 0).unwrap(),
        |file| <dyn Storage>::write_at(file, &AlignedBuf::new(8192, 4096), 4096).unwrap(),
        |file| results.lock().push(file.len().unwrap()),
    );
    assert!(results.into_inner().iter().all(|len| *len == 12288), "the file was cut");
}

#[test]
fn zeroing_at_the_end_does_not_cut_off_what_others_append() {
    let results = Mutex::new(Vec::new());
    race(
        false,
        |file| file.write_zeroes(0, 100, true).unwrap(),
        |file| <dyn Storage>::write_at(file, &[2; 5], 4096).unwrap(),
        |file| results.lock().push(file.len().unwrap()),
    );
    assert!(results.into_inner().iter().all(|len| *len == 4101), "the file was cut");
}

#[test]
fn zeros_stay_beside_unaligned_direct_writes() {
    let (_dir, file) = scratch(true);
    let file: &dyn Storage = &file;
    file.write_at(&[7; 4096], 0).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                file.write_at(&[9; 512], 512).unwrap();
            }
        });
        let lost = (0..2000).find(|round| {
            file.write_at(&[7; 512], 0).unwrap();
            match round % 3 {
                0 => file.write_zeroes(0, 512, false).unwrap(),
                1 => file.write_zeroes(0, 512, true).unwrap(),
                _ => file.discard(0, 512).unwrap(),
            }
            // Whoever has read the block before has written it by then.
            file.write_at(&[8; 512], 1024).unwrap();
            let mut back = [1; 512];
            file.read_at(&mut back, 0).unwrap();
            back != [0; 512]
        });
        over.store(true, Ordering::Relaxed);
        assert_eq!(lost, None);
    });
}

#[test]
fn zeroing_extends_and_leaves_holes() {
    let (_dir, file) = scratch(false);
    let file: &dyn Storage = &file;
    file.write_at(&[1; 65536], 0).unwrap();
    file.write_zeroes(4096, 131072, true).unwrap();
    assert_eq!(file.len().unwrap(), 135168);
    assert_eq!(file.data_at(0, 135168).unwrap(), (true, 4096));
    assert_eq!(file.data_at(4096, 131072).unwrap(), (false, 131072));
    file.write_zeroes(135168, 10, false).unwrap();
    assert_eq!(file.len().unwrap(), 135178);
}

#[test]
fn copies_between_files_end_where_the_source_does() {
    let ((_a, from), (_b, to)) = (scratch(false), scratch(false));
    let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    <dyn Storage>::write_at(&from, &bytes, 0).unwrap();
    <dyn Storage>::write_at(&to, &[9; 20], 0).unwrap();
    assert_eq!(to.copy_from(&from, 10, 5, 99_000), 99_000);
    let mut seen = vec![0; 99_010];
    <dyn Storage>::read_at(&to, &mut seen, 0).unwrap();
    assert!(seen[..5] == [9; 5] && seen[5..99_005] == bytes[10..99_010] && seen[99_005..] == [0; 5]);
    assert_eq!(to.copy_from(&from, 99_990, 0, 100), 10);
    assert_eq!(to.copy_from(&from, u64::MAX, 0, 100), 0);
    assert_eq!(to.copy_from(&crate::storage::MemoryStorage::new(), 0, 0, 100), 0);
}

#[test]
fn locks_follow_readers_and_writers() {
    let (dir, file) = scratch(false);
    let path = dir.path().join("f");
    let open =
        |lock, read_only| FileStorage::open(&path, FileOptions { lock, read_only, ..Default::default() });
    assert!(matches!(open(LockMode::Write, false), Err(Error::Locked { .. })));
    assert!(matches!(open(LockMode::Read, true), Err(Error::Locked { .. })));
    file.set_lock(LockMode::Read).unwrap();
    let reader = open(LockMode::Read, true).unwrap();
    assert!(matches!(file.set_lock(LockMode::Write), Err(Error::Locked { .. })));
    drop((reader, file));
    open(LockMode::Write, false).unwrap();
}

#[test]
fn zeros_of_an_allocation_do_not_overwrite_what_others_append() {
    for direct in [false, true] {
        let (_dir, file) = scratch(direct);
        let (begun, begins) = std::sync::mpsc::channel();
        let appending = file.bounce.lock();
        std::thread::scope(|scope| {
            let allocation = scope.spawn(|| {
                begun.send(std::fs::read_link("/proc/thread-self").unwrap()).unwrap();
                file.append_zero_bytes(100, 30_000).unwrap();
            });
            // Until it sleeps: it waits for the lock.
            let stat = Path::new("/proc").join(begins.recv().unwrap()).join("stat");
            let sleeps = || std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") S "));
            while !allocation.is_finished() && !sleeps() {
                std::thread::yield_now();
            }
            // What an append does that came first.
            let mut bytes = AlignedBuf::new(8192, 4096);
            bytes.fill(7);
            file.write_list(Gather::new(&bytes), 0).unwrap();
            drop(appending);
        });
        assert_eq!(file.len().unwrap(), 30_000);
        let mut back = vec![0; 30_000];
        <dyn Storage>::read_at(&file, &mut back, 0).unwrap();
        assert!(back[..8192].iter().all(|b| *b == 7), "what was appended is lost");
        assert!(back[8192..].iter().all(|b| *b == 0));
    }
}
