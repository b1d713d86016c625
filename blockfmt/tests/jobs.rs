//! Jobs on disks that are in use.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::qcow2::{Compression, Qcow2Options};
use blockfmt::job::{self, Comparison, ConvertOptions, DirtyMap, JobControl, Mirror, MirrorMode};
use blockfmt::storage::{Event, MemoryStorage, RecordingStorage};
use blockfmt::{CreateOptions, Disk, Error, Format, OpenOptions};
use common::chain::{Chain, SIZE, cancelling};
use common::{Rng, assert_same, qemu_ok, text};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn commit_merges_a_layer_in_the_middle() {
    let mut chain = Chain::new(1, 4);
    chain.busy(|disk| job::commit(disk, 1, &JobControl::new())).unwrap();
    chain.exercise(30);
    let top = chain.at(4);
    chain.verify(&top, 4);
}

#[test]
fn commit_merges_the_active_layer() {
    let mut chain = Chain::new(2, 3);
    chain.busy(|disk| job::commit(disk, 0, &JobControl::new())).unwrap();
    chain.exercise(30);
    let top = chain.at(2);
    chain.verify(&top, 3);
}

#[test]
fn commit_merges_all_layers_above_a_base_at_once() {
    for (layers, base) in [(5, 3), (4, 4)] {
        let mut chain = Chain::new(6, layers);
        let between = chain.at(layers - 1);
        let before = std::fs::metadata(&between).unwrap().len();
        let cancelled = chain.busy(|disk| job::commit_into(disk, base, &cancelling(SIZE / 3)));
        assert!(matches!(cancelled, Err(Error::Cancelled)), "{cancelled:?}");
        assert_same(&chain.disk, &chain.model);
        chain.busy(|disk| job::commit_into(disk, base, &JobControl::new())).unwrap();
        assert_eq!(std::fs::metadata(&between).unwrap().len(), before, "nothing is copied on the way");
        chain.exercise(30);
        let result = job::commit_into(&chain.disk, 0, &JobControl::new());
        assert!(matches!(result, Err(Error::InvalidOption(_))), "{result:?}");
        match base == layers {
            false => {
                let top = chain.at(layers - base);
                chain.verify(&top, layers - base + 1);
            }
            true => {
                assert_same(&chain.disk, &chain.model);
                drop(chain.disk);
                assert!(std::fs::read(chain.dir.path().join("0")).unwrap() == chain.model);
            }
        }
    }
}

#[test]
fn commit_makes_a_base_larger() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut model = vec![0; 3 << 20];
    std::fs::write(at("base"), [1; 1 << 20]).unwrap();
    for (child, parent, format, size) in [("mid", "base", Format::Raw, 2), ("top", "mid", Format::Qcow2, 3)] {
        CreateOptions::new(Format::Qcow2, size << 20).backing(parent, format).create(&at(child)).unwrap();
        let disk = OpenOptions::new(Format::Qcow2).open(at(child)).unwrap();
        let last = (size << 20) - 4096;
        disk.write_at(&[size as u8; 4096], last).unwrap();
        model[last as usize..][..4096].fill(size as u8);
    }
    model[..1 << 20].fill(1);
    let disk = OpenOptions::new(Format::Qcow2).open(at("top")).unwrap();
    job::commit_into(&disk, 2, &JobControl::new()).unwrap();
    drop(disk);
    assert!(std::fs::read(at("base")).unwrap() == model);
}

#[test]
fn disks_are_concatenated() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut rng = Rng(9);
    let mut model = Vec::new();
    let mut sources = Vec::new();
    // Ends within a sector, a cluster and a piece, with holes between; and nothing at all.
    for (n, (data, hole)) in
        [(1000, 0), (0, 0), (70_000, 100_001), ((1 << 20) + 13, 3 << 20), (512, 7)].into_iter().enumerate()
    {
        let mut bytes = rng.bytes(data);
        bytes.resize(data + hole, 0);
        let path = dir.path().join(n.to_string());
        std::fs::write(&path, &bytes).unwrap();
        sources.push(OpenOptions::new(Format::Raw).read_only(true).open(path).unwrap());
        model.resize(model.len().next_multiple_of(512), 0);
        model.append(&mut bytes);
    }
    assert_eq!(job::concatenated_size(&sources).unwrap(), model.len() as u64);
    for (compress, sparse_size) in [(false, 4096), (false, 0), (false, 1 << 20), (true, 4096), (true, 0)] {
        // A target that is larger and full of something.
        let tail = 100_000;
        let path = dir.path().join("target");
        CreateOptions::new(Format::Qcow2, (model.len() + tail) as u64).create(&path).unwrap();
        let target = OpenOptions::new(Format::Qcow2).open(&path).unwrap();
        target.write_at(&vec![0xee; model.len() + tail], 0).unwrap();
        let options =
            ConvertOptions { compress, sparse_size, target_is_zero: false, ..ConvertOptions::default() };
        job::concatenate(&sources, &target, options, &JobControl::new()).unwrap();
        assert_same(&target, &[&model[..], &vec![0xee; tail]].concat());
        std::fs::remove_file(&path).unwrap();
    }
    assert!(job::concatenated_size(&[]).is_err());
}

#[test]
fn commit_reaches_a_raw_base() {
    let mut chain = Chain::new(3, 1);
    chain.busy(|disk| job::commit(disk, 0, &JobControl::new())).unwrap();
    chain.exercise(30);
    assert_same(&chain.disk, &chain.model);
    drop(chain.disk);
    assert!(std::fs::read(chain.dir.path().join("0")).unwrap() == chain.model);
}

#[test]
fn stream_flattens_all_or_a_part() {
    for base in [None, Some(3), Some(2)] {
        let mut chain = Chain::new(4, 4);
        chain.busy(|disk| job::stream(disk, 0, base, &JobControl::new())).unwrap();
        chain.exercise(30);
        let top = chain.at(4);
        chain.verify(&top, base.map_or(1, |b| 1 + 5 - b));
    }
    let mut chain = Chain::new(5, 4);
    chain.busy(|disk| job::stream(disk, 1, Some(3), &JobControl::new())).unwrap();
    let top = chain.at(4);
    chain.verify(&top, 4);
}

#[test]
fn rebase_keeps_contents() {
    let mut chain = Chain::new(6, 2);
    let other = chain.dir.path().join("other.raw");
    std::fs::write(&other, Rng(77).bytes(2 << 20)).unwrap();
    let base = OpenOptions::new(Format::Raw).read_only(true).open(&other).unwrap();
    let reference = blockfmt::BackingRef { path: "other.raw".into(), format: Some("raw".into()) };
    chain.busy(|disk| job::rebase(disk, &base.layers(), Some(&reference), &JobControl::new())).unwrap();
    drop(base);
    let top = chain.at(2);
    chain.verify(&top, 2);
}

#[test]
fn mirrors_follow_the_guest() {
    for (n, mode) in [MirrorMode::Background, MirrorMode::WriteBlocking].into_iter().enumerate() {
        for pivot in [false, true] {
            let mut chain = Chain::new(10 + n as u64, 2);
            let path = chain.dir.path().join("copy.qcow2");
            CreateOptions::new(Format::Qcow2, SIZE).create(&path).unwrap();
            let target = OpenOptions::new(Format::Qcow2).open(&path).unwrap();
            let copy = target.clone();
            let mirror = chain.busy(move |disk| {
                let control = JobControl::new();
                Mirror::start(disk, &copy, mode, None)?.run(&control)
            });
            chain.exercise(20);
            if pivot {
                mirror.unwrap().pivot(&JobControl::new()).unwrap();
                drop(target);
                chain.exercise(20);
                chain.verify(&path, 1);
            } else {
                mirror.unwrap().finish(&JobControl::new()).unwrap();
                assert_same(&target, &chain.model);
                chain.exercise(20);
                drop(target);
                let top = chain.at(2);
                chain.verify(&top, 3);
            }
        }
    }
}

#[test]
fn a_mirror_goes_on_where_an_earlier_one_ended() {
    let mut chain = Chain::new(15, 2);
    let record = Arc::new(RecordingStorage::new(Arc::new(MemoryStorage::new())));
    CreateOptions::new(Format::Qcow2, SIZE).create_on(record.clone()).unwrap();
    let open = || OpenOptions::new(Format::Qcow2).open_storage(record.clone(), "copy").unwrap();
    let mirror = Mirror::start(&chain.disk, &open(), MirrorMode::Background, None).unwrap();
    let ended = mirror.run(&cancelling(SIZE / 3));
    assert!(matches!(ended, Err(Error::Cancelled)), "{ended:?}");
    let target = open();
    target.write_at(&[7; 300_000], 1 << 20).unwrap(); // where the source has zeros, too
    let copy = target.clone();
    let resumed = chain
        .busy(move |disk| Mirror::resume(disk, &copy, MirrorMode::WriteBlocking)?.run(&JobControl::new()));
    chain.exercise(20);
    resumed.unwrap().finish(&JobControl::new()).unwrap();
    assert_same(&target, &chain.model);
    // Of a copy that is complete but for a byte, little is written.
    target.write_at(&[!chain.model[3_000_000]], 3_000_000).unwrap();
    target.flush().unwrap();
    let before = record.events().len();
    let resumed = Mirror::resume(&chain.disk, &target, MirrorMode::Background).unwrap();
    resumed.run(&JobControl::new()).unwrap().finish(&JobControl::new()).unwrap();
    assert_same(&target, &chain.model);
    let written = |event: &Event| if let Event::Write { data, .. } = event { data.len() } else { 0 };
    let written: usize = record.events()[before..].iter().map(written).sum();
    assert!((1..=100_000).contains(&written), "{written} bytes were written for one");
}

#[test]
fn backups_show_one_instant() {
    let mut chain = Chain::new(20, 2);
    let create = |name: &str| {
        let path = chain.dir.path().join(name);
        CreateOptions::new(Format::Qcow2, SIZE).create(&path).unwrap();
        OpenOptions::new(Format::Qcow2).open(&path).unwrap()
    };
    let (full, next) = (create("full.qcow2"), create("next.qcow2"));
    let before = chain.model.clone();
    let changes = Arc::new(DirtyMap::new(SIZE, 65536).unwrap());
    // No change happens between the two calls: the guest starts with the job.
    chain.disk.add_observer(changes.clone());
    let control = JobControl::new();
    control.set_rate(64 << 20);
    std::thread::scope(|scope| {
        let disk = chain.disk.clone();
        let (full, control) = (&full, &control);
        let job = scope.spawn(move || job::backup(&disk, full, None, control));
        while control.progress().total == 0 {
            std::thread::yield_now();
        }
        // The observer of the job is in place before its first progress with anything done.
        while control.progress().done == 0 {
            std::thread::yield_now();
        }
        chain.exercise(60);
        job.join().unwrap().unwrap();
    });
    assert_same(&full, &before);
    // The increment on top of the full backup is the present.
    assert!(changes.count() > 0);
    job::backup(&chain.disk, &next, Some(&changes), &JobControl::new()).unwrap();
    let mut merged = before;
    let mut granule = changes.next(0);
    while let Some(g) = granule {
        let range = (g * 65536) as usize..((g + 1) * 65536).min(SIZE) as usize;
        next.read_at(&mut merged[range.clone()], range.start as u64).unwrap();
        granule = changes.next(g + 1);
    }
    assert!(merged == chain.model);
}

#[test]
fn incremental_backups_take_the_marks_of_a_bitmap() {
    let mut chain = Chain::new(22, 1);
    let layer = chain.disk.layers().remove(0);
    let image = layer.as_qcow2().unwrap();
    image.add_bitmap("daily", 65536).unwrap();
    let changes = image.bitmap("daily").unwrap();
    let create = |chain: &Chain, name: &str| {
        let path = chain.dir.path().join(name);
        CreateOptions::new(Format::Raw, SIZE).create(&path).unwrap();
        OpenOptions::new(Format::Raw).open(&path).unwrap()
    };
    let copy = create(&chain, "copy");
    changes.mark(0, SIZE); // the first one is full
    for _ in 0..3 {
        chain.exercise(5);
        let marked: Vec<_> = changes.marked().collect();
        let cancelled = JobControl::new();
        cancelled.cancel();
        assert!(matches!(
            job::backup_changes(&chain.disk, &copy, &changes, &cancelled),
            Err(Error::Cancelled)
        ));
        assert!(changes.marked().eq(marked), "a backup that failed keeps the marks");
        job::backup_changes(&chain.disk, &copy, &changes, &JobControl::new()).unwrap();
        assert_eq!(changes.count(), 0);
        assert_same(&copy, &chain.model);
    }
    // Changes during a backup are for the next one.
    changes.mark(0, SIZE);
    chain.busy(|disk| job::backup_changes(disk, &copy, &changes, &JobControl::new())).unwrap();
    job::backup_changes(&chain.disk, &copy, &changes, &JobControl::new()).unwrap();
    assert_same(&copy, &chain.model);
}

#[test]
fn a_cancelled_copy_is_resumed() {
    let chain = Chain::new(23, 2);
    let path = chain.dir.path().join("copy");
    CreateOptions::new(Format::Qcow2, SIZE).create(&path).unwrap();
    let target = OpenOptions::new(Format::Qcow2).open(&path).unwrap();
    target.write_at(&[7; 1 << 20], 1 << 20).unwrap(); // where the source has zeros, too
    let options = ConvertOptions { resume: true, ..ConvertOptions::default() };
    for _ in 0..2 {
        job::convert(&chain.disk, &target, options, &JobControl::new()).unwrap();
        assert_same(&target, &chain.model);
    }
    let compressed = ConvertOptions { compress: true, ..options };
    assert!(job::convert(&chain.disk, &target, compressed, &JobControl::new()).is_err());
}

/// By what the images say of their holes: reading these would take minutes.
#[test]
fn large_empty_disks_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    let create = |name: &str, size| {
        let path = dir.path().join(name);
        CreateOptions::new(Format::Qcow2, size).create(&path).unwrap();
        OpenOptions::new(Format::Qcow2).open(&path).unwrap()
    };
    let (a, b) = (create("a", 2 << 40), create("b", 1 << 40));
    let compare = || job::compare(&a, &b, &JobControl::new()).unwrap();
    assert_eq!(compare(), Comparison::Identical);
    let last = (2 << 40) - 1;
    a.write_at(&[1], last).unwrap();
    assert_eq!(compare(), Comparison::Differs(last));
}

#[test]
fn convert_and_compare() {
    let chain = Chain::new(30, 2);
    for compression in [Compression::Zlib, Compression::Zstd] {
        for compress in [false, true] {
            let path = chain.dir.path().join("c.qcow2");
            let qcow2 = Qcow2Options { compression, ..Qcow2Options::default() };
            CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).create(&path).unwrap();
            let target = OpenOptions::new(Format::Qcow2).open(&path).unwrap();
            let options = ConvertOptions { compress, ..ConvertOptions::default() };
            job::convert(&chain.disk, &target, options, &JobControl::new()).unwrap();
            assert_same(&target, &chain.model);
            let result = job::compare(&chain.disk, &target, &JobControl::new()).unwrap();
            assert_eq!(result, Comparison::Identical);
            target.write_at(&[0x77; 3], 3_000_000).unwrap();
            let mut changed = chain.model.clone();
            changed[3_000_000..3_000_003].fill(0x77);
            let first = changed.iter().zip(&chain.model).position(|(a, b)| a != b).unwrap() as u64;
            let result = job::compare(&target, &chain.disk, &JobControl::new()).unwrap();
            assert_eq!(result, Comparison::Differs(first));
            target.write_at(&chain.model[3_000_000..3_000_003], 3_000_000).unwrap();
            drop(target);
            qemu_ok("qemu-img", &["check", "-f", "qcow2", text(&path)]);
            let raw = chain.dir.path().join("view");
            qemu_ok("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&path), text(&raw)]);
            assert!(std::fs::read(raw).unwrap() == chain.model);
            std::fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn what_cannot_be_compressed_is_stored_as_it_is() {
    let mut contents = Rng(31).bytes(1 << 20);
    contents.chunks_mut(4096).step_by(7).for_each(|cluster| cluster[1000..].fill(3));
    let memory = MemoryStorage::from_bytes(&contents);
    let source = OpenOptions::new(Format::Raw).open_storage(Arc::new(memory), "").unwrap();
    for compression in [Compression::Zlib, Compression::Zstd] {
        let target = Arc::new(MemoryStorage::new());
        let qcow2 = Qcow2Options { compression, cluster_size: Some(4096), ..Qcow2Options::default() };
        CreateOptions::new(Format::Qcow2, 1 << 20).qcow2(qcow2).create_on(target.clone()).unwrap();
        let target = OpenOptions::new(Format::Qcow2).open_storage(target, "").unwrap();
        let options = ConvertOptions { compress: true, ..ConvertOptions::default() };
        job::convert(&source, &target, options, &JobControl::new()).unwrap();
        assert_same(&target, &contents);
    }
}

#[test]
fn cancelled_jobs_leave_the_chain_alone_and_can_run_again() {
    let mut chain = Chain::new(40, 3);
    for _ in 0..3 {
        let control = cancelling(SIZE / 3);
        let result = job::stream(&chain.disk, 0, None, &control);
        assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
        assert_eq!(chain.disk.layers().len(), 4);
        chain.exercise(20);
        assert_same(&chain.disk, &chain.model);
    }
    job::stream(&chain.disk, 0, None, &JobControl::new()).unwrap();
    let top = chain.at(3);
    chain.verify(&top, 1);
}

#[test]
fn a_group_snapshot_has_no_request_between() {
    let (a, b) = (Chain::new(50, 1), Chain::new(51, 1));
    let stop = AtomicBool::new(false);
    a.disk.write_at(&[0; 8], 0).unwrap();
    b.disk.write_at(&[0; 8], 0).unwrap();
    std::thread::scope(|scope| {
        // The guest writes the same number first to one disk, then to the other.
        let writer = scope.spawn(|| {
            let mut n = 0u64;
            while !stop.load(Ordering::Acquire) {
                n += 1;
                a.disk.write_at(&n.to_le_bytes(), 0).unwrap();
                b.disk.write_at(&n.to_le_bytes(), 0).unwrap();
            }
        });
        let create = CreateOptions::new(Format::Qcow2, 0);
        for i in 2..12 {
            let group = [
                (a.disk.clone(), a.disk.create_child(&a.at(i), &create).unwrap()),
                (b.disk.clone(), b.disk.create_child(&b.at(i), &create).unwrap()),
            ];
            Disk::push_layers(&group).unwrap();
            let frozen = |disk: &Disk| {
                let layers = disk.layers();
                let mut word = [0; 8];
                blockfmt::Below::new(&layers[1..]).read(blockfmt::Scatter::new(&mut word), 0).unwrap();
                u64::from_le_bytes(word)
            };
            let (x, y) = (frozen(&a.disk), frozen(&b.disk));
            assert!(x == y || x == y + 1, "{x} and {y} were not frozen together");
        }
        stop.store(true, Ordering::Release);
        writer.join().unwrap();
    });
}
