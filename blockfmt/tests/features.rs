//! Shared bases, non-persistent disks, limits.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::disk::{Limits, Throttle, snapshot_tree};
use blockfmt::job::{self, JobControl};
use blockfmt::{CreateOptions, Error, Format, OpenOptions, Registry};
use common::{Rng, assert_same, exercise};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SIZE: u64 = 4 << 20;

#[test]
fn clones_share_one_open_base() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    CreateOptions::new(Format::Qcow2, SIZE).create(&at("base")).unwrap();
    let contents = Rng(1).bytes(SIZE as usize);
    OpenOptions::new(Format::Qcow2).open(at("base")).unwrap().write_at(&contents, 0).unwrap();
    let registry = Registry::new();
    let mut clones = Vec::new();
    for n in 0..5 {
        let path = at(&format!("clone{n}"));
        CreateOptions::new(Format::Qcow2, SIZE).backing("base", Format::Qcow2).create(&path).unwrap();
        clones.push(OpenOptions::new(Format::Qcow2).registry(&registry).open(&path).unwrap());
    }
    let base = clones[0].layers().remove(1);
    assert!(clones.iter().all(|clone| Arc::ptr_eq(&clone.layers()[1], &base)));
    for (n, clone) in clones.iter().enumerate() {
        let mut model = contents.clone();
        exercise(clone, &mut model, &mut Rng(n as u64 + 9), 50);
        assert_same(clone, &model);
    }
    let stats = registry.stats();
    assert_eq!((stats.bases, stats.shared, stats.opened), (1, 4, 1));
    assert!(stats.lookups > 10 * stats.misses, "{stats:?}");
    // Others depend on the base: it cannot be written.
    let result = job::commit(&clones[0], 0, &JobControl::new());
    assert!(matches!(result, Err(Error::Unsupported { .. })), "{result:?}");
    drop((clones, base));
    assert_eq!(registry.stats().bases, 0);
    OpenOptions::new(Format::Qcow2).open(at("base")).unwrap();
}

#[test]
fn a_base_that_changed_is_not_shared_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    CreateOptions::new(Format::Raw, SIZE).create(&at("base")).unwrap();
    let registry = Registry::new();
    let open = |name: &str| {
        CreateOptions::new(Format::Qcow2, SIZE).backing("base", Format::Raw).create(&at(name))?;
        OpenOptions::new(Format::Qcow2).registry(&registry).open(at(name))
    };
    let first = open("one").unwrap();
    // Someone ignores the locks.
    std::fs::write(at("base"), [1; 4096]).unwrap();
    assert!(matches!(open("two"), Err(Error::ParentChanged { .. })));
    drop(first);
    open("three").unwrap();
}

#[test]
fn what_is_written_to_a_non_persistent_disk_vanishes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    CreateOptions::new(Format::Qcow2, SIZE).create(&path).unwrap();
    let contents = Rng(1).bytes(SIZE as usize);
    OpenOptions::new(Format::Qcow2).open(&path).unwrap().write_at(&contents, 0).unwrap();
    let before = std::fs::read(&path).unwrap();
    for _ in 0..2 {
        let disk = OpenOptions::new(Format::Qcow2).non_persistent(dir.path()).open(&path).unwrap();
        let mut model = contents.clone();
        exercise(&disk, &mut model, &mut Rng(3), 100);
        assert_same(&disk, &model);
    }
    assert!(std::fs::read(&path).unwrap() == before);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn groups_are_limited_together() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { write_bytes: 10 << 20, ..Limits::default() };
    let group = Arc::new(Throttle::new(limits));
    let disks: Vec<_> = (0..2)
        .map(|n| {
            let path = dir.path().join(n.to_string());
            CreateOptions::new(Format::Raw, SIZE).create(&path).unwrap();
            let disk = OpenOptions::new(Format::Raw).open(&path).unwrap();
            disk.set_throttles(vec![group.clone()]);
            disk
        })
        .collect();
    let start = Instant::now();
    // 3 MiB at 10 MiB per second; the last one is admitted when the others are paid for.
    for disk in [&disks[0], &disks[1], &disks[0]] {
        disk.write_at(&vec![1; 1 << 20], 0).unwrap();
    }
    assert!(start.elapsed() >= Duration::from_millis(200));
    disks[0].set_throttles(Vec::new());
}

#[test]
fn snapshots_are_a_tree() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    CreateOptions::new(Format::Raw, SIZE).create(&at("base")).unwrap();
    for (name, parent, format) in [
        ("mid", "base", Format::Raw),
        ("a", "mid", Format::Qcow2),
        ("b", "mid", Format::Qcow2),
        ("c", "base", Format::Raw),
    ] {
        CreateOptions::new(Format::Qcow2, SIZE).backing(parent, format).create(&at(name)).unwrap();
    }
    let open = |name: &str| OpenOptions::new(Format::Qcow2).open(at(name)).unwrap();
    let disk = open("b");
    for name in ["one", "two"] {
        disk.layers()[0].as_qcow2().unwrap().create_snapshot(name).unwrap();
    }
    drop(disk);
    let disks = [open("a"), open("b"), open("c")];
    let node = |name: &str, format, snapshots: &[&str], children: &[serde_json::Value]| {
        json!({ "image": at(name), "format": format, "active": children.is_empty(), "snapshots": snapshots,
            "children": children })
    };
    let leaves = [node("a", "qcow2", &[], &[]), node("b", "qcow2", &["one", "two"], &[])];
    let tree = node("base", "raw", &[], &[node("mid", "qcow2", &[], &leaves), node("c", "qcow2", &[], &[])]);
    assert_eq!(serde_json::to_value(snapshot_tree(&disks).unwrap()).unwrap(), json!([tree]));
}

#[test]
fn nothing_is_based_on_a_temporary_layer() {
    let dir = tempfile::tempdir().unwrap();
    CreateOptions::new(Format::Raw, SIZE).create(&dir.path().join("disk")).unwrap();
    let disk =
        OpenOptions::new(Format::Raw).non_persistent(dir.path()).open(dir.path().join("disk")).unwrap();
    let result = disk.snapshot(&dir.path().join("child"), &CreateOptions::new(Format::Qcow2, 0));
    assert!(matches!(result, Err(Error::Unsupported { .. })), "{result:?}");
}
