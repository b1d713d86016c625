//! Parents that change under their children.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::LayerOptions;
use blockfmt::format::qcow2::Qcow2Options;
use blockfmt::format::raw::Raw;
use blockfmt::job::{self, JobControl};
use blockfmt::storage::MemoryStorage;
use blockfmt::{BackingRef, CreateOptions, Disk, Error, Format, OpenOptions, Result, Storage};
use common::chain::{SIZE, cancelling};
use common::{Rng, assert_same, exercise, qemu_ok, text};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

fn open(format: Format, path: &Path) -> Result<Disk> {
    OpenOptions::new(format).open(path)
}

/// Makes a file look as if someone had written to it after everything that was known of it.
fn touch(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(3600)).unwrap();
}

#[track_caller]
fn assert_refused(format: Format, path: &Path) {
    let error = open(format, path).unwrap_err();
    assert!(matches!(error, Error::ParentChanged { .. }), "{error}");
}

fn base_and_child(dir: &Path, format: Format) -> (std::path::PathBuf, std::path::PathBuf) {
    let (base, child) = (dir.join("base"), dir.join("child"));
    CreateOptions::new(format, SIZE).create(&base).unwrap();
    CreateOptions::new(Format::Qcow2, SIZE).backing("base", format).create(&child).unwrap();
    (base, child)
}

#[test]
fn a_parent_that_changed_is_refused_until_it_is_accepted() {
    for format in [Format::Raw, Format::Qcow2] {
        let dir = tempfile::tempdir().unwrap();
        let (base, child) = base_and_child(dir.path(), format);
        open(Format::Qcow2, &child).unwrap();
        // To open it for writing is no change.
        open(format, &base).unwrap().close().unwrap();
        open(Format::Qcow2, &child).unwrap().write_at(&[1; 4096], 0).unwrap();

        open(format, &base).unwrap().write_at(&[2; 4096], 1 << 20).unwrap();
        touch(&base);
        assert_refused(Format::Qcow2, &child);
        OpenOptions::new(Format::Qcow2).changed_parents(true).open(&child).unwrap();
        assert_refused(Format::Qcow2, &child);
        let layer = OpenOptions::new(Format::Qcow2).open_layer_alone(&child).unwrap();
        let same = BackingRef { path: "base".into(), format: Some(format.name().into()) };
        layer.set_backing(Some(&same)).unwrap();
        layer.close().unwrap();
        drop(layer);
        open(Format::Qcow2, &child).unwrap();

        // Another file of the same age.
        let file = File::options().write(true).open(&base).unwrap();
        let meta = file.metadata().unwrap();
        file.set_len(meta.len() + 65536).unwrap();
        file.set_modified(meta.modified().unwrap()).unwrap();
        assert_refused(Format::Qcow2, &child);
    }
}

#[test]
fn copies_of_parent_and_child_go_by_the_length() {
    let dir = tempfile::tempdir().unwrap();
    let (base, child) = base_and_child(dir.path(), Format::Raw);
    let copy = tempfile::tempdir().unwrap();
    for path in [&base, &child] {
        std::fs::copy(path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    let (base_copy, child_copy) = (copy.path().join("base"), copy.path().join("child"));
    touch(&base_copy);
    open(Format::Qcow2, &child_copy).unwrap();
    touch(&base);
    assert_refused(Format::Qcow2, &child);
    File::options().write(true).open(&base_copy).unwrap().set_len(SIZE + 65536).unwrap();
    assert_refused(Format::Qcow2, &child_copy);
}

#[test]
fn images_go_through_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let (base, child) = base_and_child(dir.path(), Format::Raw);
    let bare = dir.path().join("bare");
    qemu_ok("qemu-img", &["create", "-f", "qcow2", "-b", "base", "-F", "raw", text(&bare)]);
    // These write the header again.
    qemu_ok("qemu-img", &["amend", "-f", "qcow2", "-o", "lazy_refcounts=on", text(&child)]);
    qemu_ok("qemu-img", &["check", "-f", "qcow2", text(&child)]);
    qemu_ok("qemu-img", &["rebase", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&child)]);
    qemu_ok("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", "base", "-F", "raw", text(&child)]);
    let info = qemu_ok("qemu-img", &["info", "-f", "qcow2", text(&child)]);
    assert!(info.contains("lazy refcounts: true") && info.contains("backing file: base"), "{info}");
    open(Format::Qcow2, &child).unwrap();
    touch(&base);
    assert_refused(Format::Qcow2, &child);
    // Nothing is known of the parents of images that we did not make.
    open(Format::Qcow2, &bare).unwrap();
    // Another parent, which QEMU gives it without a word about its state.
    std::fs::copy(&base, dir.path().join("other")).unwrap();
    touch(&dir.path().join("other"));
    qemu_ok("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", "other", "-F", "raw", text(&child)]);
    open(Format::Qcow2, &child).unwrap();
}

#[test]
fn a_parent_that_does_not_exist_yet_is_not_guarded() {
    let dir = tempfile::tempdir().unwrap();
    let (base, child) = (dir.path().join("base"), dir.path().join("child"));
    CreateOptions::new(Format::Qcow2, SIZE).backing("base", Format::Raw).create(&child).unwrap();
    CreateOptions::new(Format::Raw, SIZE).create(&base).unwrap();
    touch(&base);
    open(Format::Qcow2, &child).unwrap();
}

/// Nor is one with a name that leaves no space in the header's sector.
#[test]
fn a_header_does_not_outgrow_its_sector_for_the_guard() {
    let dir = tempfile::tempdir().unwrap();
    let guarded = |name: &str| {
        CreateOptions::new(Format::Raw, SIZE).create(&dir.path().join(name)).unwrap();
        let child = dir.path().join(format!("child{}", name.len()));
        CreateOptions::new(Format::Qcow2, SIZE).backing(name, Format::Raw).create(&child).unwrap();
        qemu_ok("qemu-img", &["check", "-f", "qcow2", text(&child)]);
        touch(&dir.path().join(name));
        open(Format::Qcow2, &child).is_err()
    };
    let directory = "d".repeat(200);
    std::fs::create_dir(dir.path().join(&directory)).unwrap();
    // 112 bytes of header, 16 of the format, 40 of the guard, 8 of the end.
    let longest = 512 - 112 - 16 - 40 - 8;
    for (len, expected) in [(longest, true), (longest + 1, false)] {
        let name = format!("{directory}/{}", "n".repeat(len - directory.len() - 1));
        assert_eq!(guarded(&name), expected, "{len} bytes");
    }
}

#[test]
fn a_merge_that_ends_early_leaves_a_chain_that_opens() {
    for format in [Format::Qcow2, Format::Vhd, Format::Vhdx] {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let at = |n: usize| dir.path().join(n.to_string());
        CreateOptions::new(format, SIZE).create(&at(0)).unwrap();
        let disk = open(format, &at(0)).unwrap();
        let (mut model, mut rng) = (vec![0; SIZE as usize], Rng(5));
        for n in 1..4 {
            exercise(&disk, &mut model, &mut rng, 30);
            disk.snapshot(&at(n), &CreateOptions::new(format, 0)).unwrap();
        }
        exercise(&disk, &mut model, &mut rng, 30);
        // The third image into the second one, while the fourth is in use.
        let result = job::commit(&disk, 1, &cancelling(SIZE / 3));
        assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
        drop(disk);
        touch(&at(1));
        touch(&at(2));
        let disk = open(format, &at(3)).unwrap();
        assert_same(&disk, &model);
        job::commit(&disk, 1, &JobControl::new()).unwrap();
        assert_same(&disk, &model);
        drop(disk);
        let disk = open(format, &at(3)).unwrap();
        assert_eq!(disk.layers().len(), 3);
        assert_same(&disk, &model);
        drop(disk);
        if format == Format::Vhdx {
            // It has a guard of its own, which tells contents from times.
            open(format, &at(1)).unwrap().write_at(&[1], 0).unwrap();
        } else {
            touch(&at(1));
            // The time that was noted lies in the future, too.
            let file = File::options().write(true).open(at(1)).unwrap();
            file.set_modified(SystemTime::now() + Duration::from_secs(7200)).unwrap();
        }
        assert_refused(format, &at(3));
    }
}

#[test]
fn external_data_files_of_parents_are_guarded() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let qcow2 = Qcow2Options { data_file: Some("data".into()), ..Qcow2Options::default() };
    CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).create(&at("base")).unwrap();
    let create = CreateOptions::new(Format::Qcow2, SIZE).backing("base", Format::Qcow2);
    create.create(&at("child")).unwrap();
    let disk = open(Format::Qcow2, &at("child")).unwrap();
    disk.snapshot(&at("top"), &CreateOptions::new(Format::Qcow2, 0)).unwrap();
    disk.roll_back(2, &at("other"), &CreateOptions::new(Format::Qcow2, 0)).unwrap();
    disk.write_at(&[1; 4096], 0).unwrap();
    drop(disk);
    for name in ["child", "top", "other"] {
        open(Format::Qcow2, &at(name)).unwrap();
    }
    touch(&at("data"));
    for name in ["child", "top", "other"] {
        assert_refused(Format::Qcow2, &at(name));
    }
    OpenOptions::new(Format::Qcow2).changed_parents(true).open(at("top")).unwrap();
    // Accepted as it is.
    let layer = OpenOptions::new(Format::Qcow2).open_layer_alone(&at("child")).unwrap();
    layer.set_backing(Some(&BackingRef { path: "base".into(), format: Some("qcow2".into()) })).unwrap();
    layer.close().unwrap();
    drop(layer);
    open(Format::Qcow2, &at("child")).unwrap();
    File::options().write(true).open(at("data")).unwrap().set_len(SIZE * 2).unwrap();
    assert_refused(Format::Qcow2, &at("child"));
}

/// A storage that is no regular file: it has a length, and no time that would tell anything.
#[test]
fn parents_that_are_no_regular_files_are_guarded_by_their_length() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("child");
    let parent = |size| -> Arc<dyn Storage> { Arc::new(MemoryStorage::from_bytes(&vec![0; size])) };
    let create = CreateOptions::new(Format::Qcow2, SIZE).backing("/dev/somewhere", Format::Raw);
    create.create(&path).unwrap();
    let child = OpenOptions::new(Format::Qcow2).open_layer_alone(&path).unwrap();
    let raw = |size| Raw::open(parent(size), &LayerOptions::default()).unwrap();
    child.check_parent(&raw(1 << 20)).unwrap();
    child.note_parent(Some(&raw(1 << 20))).unwrap();
    child.check_parent(&raw(1 << 20)).unwrap();
    let refused = child.check_parent(&raw(2 << 20));
    assert!(matches!(refused, Err(Error::ParentChanged { .. })), "{refused:?}");
    child.note_parent(None).unwrap();
    child.check_parent(&raw(2 << 20)).unwrap();
}
