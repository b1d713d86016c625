//! Changing the chain of a disk in use: migration, deletion of snapshots, rolling back.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::disk::as_path;
use blockfmt::format::qcow2::Qcow2Options;
use blockfmt::job::{self, JobControl, Migration, Mirror, MirrorMode};
use blockfmt::storage::{FileOptions, FileStorage};
use blockfmt::{Below, CreateOptions, Disk, Error, Format, OpenOptions, Registry, Scatter};
use common::chain::{Chain, SIZE, cancelling};
use common::{assert_same, qemu_ok};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// What layer number `index` and those below it show.
fn view(disk: &Disk, index: usize) -> Vec<u8> {
    let mut bytes = vec![0xa5; SIZE as usize];
    Below::new(&disk.layers()[index..]).read(Scatter::new(&mut bytes), 0).unwrap();
    bytes
}

fn qcow2() -> CreateOptions {
    CreateOptions::new(Format::Qcow2, 0)
}

#[test]
fn a_migration_redirects_first_and_goes_on_after_a_cancellation() {
    for base in [None, Some(2)] {
        let mut chain = Chain::new(60, 3);
        // An image in another directory cannot go on to name one here: the open policy would refuse it.
        let path = match base {
            None => chain.dir.path().join("elsewhere.d").join("moved"),
            Some(_) => chain.at(9),
        };
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let target = chain.disk.create_child(&path, &qcow2()).unwrap();
        let migration = Migration::start(&chain.disk, target, base).unwrap();
        let files = |chain: &Chain| (0..4).map(|n| std::fs::read(chain.at(n)).unwrap()).collect::<Vec<_>>();
        let before = files(&chain);
        assert!(matches!(migration.run(&cancelling(SIZE / 3)), Err(Error::Cancelled)));
        assert_eq!(chain.disk.layers().len(), 5);
        chain.exercise(20);
        assert_same(&chain.disk, &chain.model);
        drop(migration);
        let migration = Migration::resume(&chain.disk, base.map(|n| n + 1)).unwrap();
        chain
            .busy(|disk| {
                migration.run(&JobControl::new()).unwrap();
                assert_eq!(disk.find_layer(&path).unwrap(), 0);
                migration.run(&JobControl::new()) // has nothing to do
            })
            .unwrap();
        chain.exercise(20);
        assert!(files(&chain) == before, "an old image changed");
        drop(migration);
        chain.verify(&path, base.map_or(1, |_| 3));
    }
}

#[test]
fn a_migration_is_undone() {
    let mut chain = Chain::new(61, 2);
    let target = chain.disk.create_child(&chain.at(9), &qcow2()).unwrap();
    let migration = Migration::start(&chain.disk, target, None).unwrap();
    assert!(migration.run(&cancelling(SIZE / 3)).is_err());
    chain.exercise(20);
    chain.busy(|_| migration.undo(&JobControl::new())).unwrap();
    let top = chain.at(2);
    chain.verify(&top, 3);
}

#[test]
fn a_migration_changes_the_format() {
    for format in [Format::Vhd, Format::Vhdx] {
        let mut chain = Chain::new(62, 2);
        let path = chain.dir.path().join("moved.d");
        let target = chain.disk.create_child(&path, &CreateOptions::new(format, 0)).unwrap();
        let migration = Migration::start(&chain.disk, target, None).unwrap();
        chain.exercise(20);
        chain.busy(|_| migration.run(&JobControl::new())).unwrap();
        assert_same(&chain.disk, &chain.model);
        drop((migration, chain.disk));
        let disk = OpenOptions::new(format).open(&path).unwrap();
        assert_eq!(disk.layers().len(), 1);
        assert_same(&disk, &chain.model);
    }
}

#[test]
fn snapshots_are_deleted_anywhere() {
    for index in 1..=4 {
        let mut chain = Chain::new(70 + index as u64, 4);
        let mut views: Vec<_> = (1..=4).map(|n| view(&chain.disk, n)).collect();
        let unused = chain.busy(|disk| job::remove(disk, index, &JobControl::new())).unwrap();
        views.remove(index - 1);
        for (n, before) in views.iter().enumerate() {
            assert!(view(&chain.disk, n + 1) == *before, "snapshot {} of {index}", n + 1);
        }
        assert!(chain.disk.layers().iter().all(|layer| layer.storage().name() != unused));
        chain.exercise(20);
        let top = PathBuf::from(chain.disk.layers()[0].storage().name());
        chain.verify(&top, 4);
    }
    let chain = Chain::new(75, 1);
    for index in [0, 2] {
        assert!(matches!(job::remove(&chain.disk, index, &JobControl::new()), Err(Error::InvalidOption(_))));
    }
}

/// A disk over "base", "lower" with `lower` bytes, "upper" with `upper` bytes, and "top".
fn sized(dir: &Path, lower: usize, upper: usize, options: OpenOptions) -> Disk {
    let create = |name: &str, parent: &str| {
        let path = dir.join(name);
        CreateOptions::new(Format::Qcow2, SIZE).backing(parent, Format::Qcow2).create(&path).unwrap();
        path
    };
    CreateOptions::new(Format::Qcow2, SIZE).create(&dir.join("base")).unwrap();
    let mut parent = "base";
    for (name, len) in [("lower", lower), ("upper", upper), ("top", 0)] {
        let disk = OpenOptions::new(Format::Qcow2).open(create(name, parent)).unwrap();
        disk.write_at(&vec![len as u8 | 1; len], 0).unwrap();
        parent = name;
    }
    options.open(dir.join("top")).unwrap()
}

#[test]
fn a_deletion_moves_as_little_as_it_can() {
    let (large, small) = (1 << 20, 64 << 10);
    for (lower, upper, unused) in [(large, small, "upper"), (small, large, "lower")] {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let disk = sized(dir.path(), lower, upper, OpenOptions::new(Format::Qcow2));
        let before = view(&disk, 0);
        assert!(job::remove(&disk, 2, &JobControl::new()).unwrap().ends_with(unused), "{lower}, {upper}");
        assert!(view(&disk, 0) == before);
    }
    // Others may depend on shared bases: nothing is merged into them, only pulled into the active image.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let disk = sized(dir.path(), large, small, OpenOptions::new(Format::Qcow2).registry(&Registry::new()));
    let before = view(&disk, 0);
    let result = job::remove(&disk, 2, &JobControl::new());
    assert!(matches!(result, Err(Error::Unsupported { .. })), "{result:?}");
    assert!(job::remove(&disk, 1, &JobControl::new()).unwrap().ends_with("upper"));
    assert!(view(&disk, 0) == before);
}

#[test]
fn a_disk_rolls_back() {
    let mut chain = Chain::new(80, 3);
    let (state, file) = (view(&chain.disk, 2), std::fs::read(chain.at(2)).unwrap());
    let roll_back = |chain: &Chain, index| chain.disk.roll_back(index, &chain.at(9), &qcow2());
    assert!(matches!(roll_back(&chain, 0), Err(Error::InvalidOption(_))));
    assert!(matches!(roll_back(&chain, 4), Err(Error::NotFound { .. })));
    // A mirror could not follow.
    let copy = chain.dir.path().join("copy.raw");
    CreateOptions::new(Format::Raw, SIZE).create(&copy).unwrap();
    let copy = OpenOptions::new(Format::Raw).open(&copy).unwrap();
    let mirror = Mirror::start(&chain.disk, &copy, MirrorMode::Background, None).unwrap();
    assert!(matches!(roll_back(&chain, 2), Err(Error::Busy(_))));
    assert!(!chain.at(9).exists());
    drop(mirror);
    roll_back(&chain, 2).unwrap();
    assert_same(&chain.disk, &state);
    chain.model = state;
    chain.exercise(30);
    assert!(std::fs::read(chain.at(2)).unwrap() == file, "the snapshot changed");
    let top = chain.at(9);
    chain.verify(&top, 3);
}

#[test]
fn one_at_a_time_changes_a_chain() {
    let mut chain = Chain::new(81, 3);
    let control = JobControl::new();
    control.set_rate(1);
    std::thread::scope(|scope| {
        let (disk, control) = (chain.disk.clone(), &control);
        let slow = scope.spawn(move || job::stream(&disk, 0, Some(2), control));
        while control.progress().done == 0 {
            std::thread::yield_now();
        }
        let disk = &chain.disk;
        let busy =
            |result: blockfmt::Result<()>| assert!(matches!(result, Err(Error::Busy(_))), "{result:?}");
        busy(disk.snapshot(&chain.at(9), &qcow2()));
        assert!(!chain.at(9).exists());
        busy(job::commit(disk, 1, &JobControl::new()));
        busy(job::remove(disk, 1, &JobControl::new()).map(drop));
        busy(disk.roll_back(1, &chain.at(9), &qcow2()));
        busy(disk.resize(2 * SIZE));
        busy(Mirror::start(disk, disk, MirrorMode::Background, None).map(drop));
        control.cancel();
        assert!(matches!(slow.join().unwrap(), Err(Error::Cancelled)));
    });
    chain.disk.snapshot(&chain.at(9), &qcow2()).unwrap();
    chain.exercise(20);
    let top = chain.at(9);
    chain.verify(&top, 5);
}

#[test]
fn rolling_back_tells_of_another_size() {
    let chain = Chain::new(68, 2);
    let sizes = Arc::new(Mutex::new(Vec::new()));
    let told = sizes.clone();
    chain.disk.on_resize(move |size| told.lock().unwrap().push(size));
    chain.disk.resize(SIZE + (1 << 20)).unwrap();
    for file in [8, 9] {
        chain.disk.roll_back(1, &chain.at(file), &qcow2()).unwrap();
        assert_eq!(chain.disk.size(), SIZE);
    }
    // The second time it was the same.
    assert_eq!(*sizes.lock().unwrap(), [SIZE + (1 << 20), SIZE]);
}

#[test]
fn a_child_is_merged_into_a_parent_with_an_external_data_file() {
    let dir = tempfile::tempdir().unwrap();
    let (base, child) = (dir.path().join("base"), dir.path().join("child"));
    let external = Qcow2Options { data_file: Some("data".into()), ..Qcow2Options::default() };
    CreateOptions::new(Format::Qcow2, 1 << 20).qcow2(external).create(&base).unwrap();
    CreateOptions::new(Format::Qcow2, 1 << 20).backing("base", Format::Qcow2).create(&child).unwrap();
    let disk = OpenOptions::new(Format::Qcow2).open(&child).unwrap();
    let mut model = vec![0; 1 << 20];
    model[70_000..90_000].fill(7);
    disk.write_at(&model[70_000..90_000], 70_000).unwrap();
    let data = || FileStorage::open(&dir.path().join("data"), FileOptions::default());
    assert!(matches!(data(), Err(Error::Locked { .. })));
    job::commit(&disk, 0, &JobControl::new()).unwrap();
    assert_same(&disk, &model);
    assert!(matches!(data(), Err(Error::Locked { .. })));
    drop(disk);
    data().unwrap();
    assert_same(&OpenOptions::new(Format::Qcow2).open(&base).unwrap(), &model);
}

#[test]
fn names_that_look_like_protocols_are_names() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for format in [Format::Qcow2, Format::Vhd, Format::Vhdx] {
        let name = |n: u32| format!("file:{format}:{n}");
        CreateOptions::new(format, 1 << 20).create(&at(&name(0))).unwrap();
        CreateOptions::new(format, 1 << 20).backing(as_path(name(0)), format).create(&at(&name(1))).unwrap();
        let disk = OpenOptions::new(format).open(at(&name(1))).unwrap();
        disk.write_at(&[1; 512], 0).unwrap();
        for n in 2..4 {
            disk.snapshot(&at(&name(n)), &CreateOptions::new(format, 0)).unwrap();
            disk.write_at(&[n as u8; 512], u64::from(n) * 4096).unwrap();
        }
        job::remove(&disk, 1, &JobControl::new()).unwrap();
        let top = disk.layers()[0].storage().name();
        drop(disk);
        let disk = OpenOptions::new(format).open(&top).unwrap();
        assert_eq!(disk.layers().len(), 3);
        for (offset, byte) in [(0, 1), (2 * 4096, 2), (3 * 4096, 3)] {
            let mut seen = [0; 512];
            disk.read_at(&mut seen, offset).unwrap();
            assert_eq!(seen, [byte; 512]);
        }
        drop(disk);
        if format == Format::Qcow2 {
            let name = format!(
                "json:{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"file\",\"filename\":{top:?}}}}}"
            );
            qemu_ok("qemu-img", &["map", &name]);
        }
    }
}
