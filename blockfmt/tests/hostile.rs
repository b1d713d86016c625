//! Images made to do harm are refused, or read harmlessly: quickly and in bounded memory.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::qcow2::{Qcow2Options, Repair};
use blockfmt::storage::MemoryStorage;
use blockfmt::{CreateOptions, Disk, Error, Format, OpenOptions, OpenPolicy, Result};
use common::Rng;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

const SIZE: u64 = 1 << 20;

fn child_of(path: &Path, backing: &str, format: Format) {
    let options = CreateOptions::new(Format::Qcow2, SIZE).backing(backing, format);
    options.create(path).unwrap();
}

fn open(path: &Path) -> Result<Disk> {
    OpenOptions::new(Format::Qcow2).open(path)
}

#[test]
fn headers_cannot_reach_files_of_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("images");
    std::fs::create_dir(&inner).unwrap();
    std::fs::write(dir.path().join("secret"), [7; 4096]).unwrap();
    symlink(dir.path().join("secret"), inner.join("link")).unwrap();
    symlink("/dev/zero", inner.join("device")).unwrap();
    for (n, name) in ["/etc/shadow", "../secret", "link", "device", "/dev/zero", "/proc/self/mem", "/dev/shm"]
        .iter()
        .enumerate()
    {
        let path = inner.join(format!("{n}.qcow2"));
        child_of(&path, name, Format::Raw);
        let result = open(&path);
        assert!(matches!(result, Err(Error::NotAllowed { .. })), "{name}: {result:?}");
    }
    for name in ["nbd://host/export", "json:{\"driver\":\"file\"}", "fat:rw:/etc", "ssh://host/file"] {
        let path = inner.join("protocol.qcow2");
        child_of(&path, name, Format::Raw);
        let result = open(&path);
        assert!(matches!(result, Err(Error::Unsupported { .. })), "{name}: {result:?}");
        std::fs::remove_file(&path).unwrap();
    }
    // What the policy names is open to the image.
    let path = inner.join("1.qcow2");
    let allow = OpenPolicy::same_directory().allow([dir.path().join("secret")]);
    let disk = OpenOptions::new(Format::Qcow2).policy(allow).open(&path).unwrap();
    let mut byte = [0];
    disk.read_at(&mut byte, 100).unwrap();
    assert_eq!(byte, [7]);
    drop(disk);
    assert!(OpenOptions::new(Format::Qcow2).policy(OpenPolicy::deny()).open(&path).is_err());
    let asked = OpenPolicy::deny().or_else(|request| request.path.ends_with("secret"));
    OpenOptions::new(Format::Qcow2).policy(asked).open(&path).unwrap();
    // Data files obey the same policy.
    let qcow2 = Qcow2Options { data_file: Some("data".into()), ..Qcow2Options::default() };
    CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).create(&inner.join("d.qcow2")).unwrap();
    std::fs::remove_file(inner.join("data")).unwrap();
    symlink(dir.path().join("secret"), inner.join("data")).unwrap();
    assert!(matches!(open(&inner.join("d.qcow2")), Err(Error::NotAllowed { .. })));
}

#[test]
fn loops_end() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    child_of(&at("self"), "self", Format::Qcow2);
    assert!(open(&at("self")).is_err());
    child_of(&at("a"), "b", Format::Qcow2);
    child_of(&at("b"), "a", Format::Qcow2);
    let read_only = OpenOptions::new(Format::Qcow2).read_only(true).open(at("a"));
    assert!(matches!(read_only, Err(Error::Corrupt { .. })), "{read_only:?}");
    for n in 0..600 {
        child_of(&at(&format!("c{n}")), &format!("c{}", n + 1), Format::Qcow2);
    }
    let long = open(&at("c0"));
    assert!(matches!(long, Err(Error::Unsupported { .. })), "{long:?}");
    // A guest's header in a raw disk stays data.
    std::fs::copy(at("self"), at("raw")).unwrap();
    let disk = OpenOptions::new(Format::Raw).open(at("raw")).unwrap();
    assert_eq!((disk.layers().len(), disk.layers()[0].format()), (1, Format::Raw));
}

/// A small image with data.
fn sample() -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::new());
    let qcow2 = Qcow2Options { cluster_size: Some(4096), ..Qcow2Options::default() };
    CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).create_on(storage.clone()).unwrap();
    let disk = OpenOptions::new(Format::Qcow2).open_storage(storage.clone(), "sample").unwrap();
    disk.write_at(&[1; 100_000], 5000).unwrap();
    disk.layers()[0].as_qcow2().unwrap().create_snapshot("s").unwrap();
    disk.write_at(&[2; 50_000], 20_000).unwrap();
    drop(disk);
    storage.to_vec()
}

fn open_bytes(bytes: &[u8]) -> Result<Disk> {
    OpenOptions::new(Format::Qcow2).open_storage(Arc::new(MemoryStorage::from_bytes(bytes)), "hostile")
}

#[test]
fn absurd_headers_are_refused() {
    let sample = sample();
    let with = |at: usize, bytes: &[u8]| {
        let mut image = sample.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        open_bytes(&image)
    };
    let big = u64::MAX.to_be_bytes();
    for (what, result) in [
        ("version", with(4, &9u32.to_be_bytes())),
        ("cluster bits", with(20, &30u32.to_be_bytes())),
        ("small cluster bits", with(20, &1u32.to_be_bytes())),
        ("size", with(24, &big)),
        ("size without a table", with(24, &(1u64 << 50).to_be_bytes())),
        ("encryption", with(32, &1u32.to_be_bytes())),
        ("L1 size", with(36, &u32::MAX.to_be_bytes())),
        ("L1 offset", with(40, &big)),
        ("refcount table offset", with(48, &big)),
        ("refcount table size", with(56, &u32::MAX.to_be_bytes())),
        ("snapshots", with(60, &u32::MAX.to_be_bytes())),
        ("unknown feature", with(72, &(1u64 << 40).to_be_bytes())),
        ("refcount order", with(96, &7u32.to_be_bytes())),
        ("header length", with(100, &u32::MAX.to_be_bytes())),
        ("backing name", with(8, &[big.as_slice(), &[0, 0, 0, 9]].concat())),
        ("long backing name", with(8, &[&112u64.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat())),
        ("extension length", with(116, &u32::MAX.to_be_bytes())),
    ] {
        assert!(
            matches!(result, Err(Error::Corrupt { .. } | Error::Unsupported { .. })),
            "{what}: {result:?}"
        );
    }
    let unknown = with(72, &(1u64 << 40).to_be_bytes()).unwrap_err().to_string();
    assert!(unknown.contains("bit 40"), "{unknown}");
}

#[test]
fn entries_that_overlap_metadata_do_not_destroy_it() {
    let sample = sample();
    let word = |at: u64| u64::from_be_bytes(sample[at as usize..at as usize + 8].try_into().unwrap());
    let l1 = word(40);
    let l2 = word(l1 as usize as u64) & 0x00ff_ffff_ffff_fe00;
    let reftable = word(48);
    for target in [0, l1, l2, reftable, word(reftable)] {
        let mut image = sample.clone();
        let at = l2 as usize + 8 * 2;
        image[at..at + 8].copy_from_slice(&(target | 1 << 63).to_be_bytes());
        let Ok(disk) = open_bytes(&image) else { continue };
        if target == 0 {
            continue; // offset 0 means "unallocated"
        }
        let result = disk.write_at(&[0xff; 4096], 8192);
        assert!(matches!(result, Err(Error::Corrupt { .. })), "entry to {target:#x}: {result:?}");
    }
}

#[test]
fn random_damage_never_panics() {
    let sample = sample();
    let mut rng = Rng(2);
    let rounds = if std::env::var_os("NACRE_LONG").is_some() { 20_000 } else { 120 };
    for _ in 0..rounds {
        let mut image = sample.clone();
        for _ in 0..1 + rng.below(6) {
            // Most of the damage goes to the header and the tables at the start.
            let end = [112, 4096, 40_000, image.len() as u64][rng.below(4) as usize];
            let at = rng.below(end.min(image.len() as u64)) as usize;
            image[at] = [0, 0xff, rng.next() as u8, image[at] ^ 1][rng.below(4) as usize];
        }
        let storage = Arc::new(MemoryStorage::from_bytes(&image));
        let options =
            OpenOptions::new(Format::Qcow2).backing(false).read_only(rng.below(2) == 0).repair(true);
        let Ok(disk) = options.open_storage(storage, "damaged") else { continue };
        let mut buffer = vec![0; 70_000];
        for _ in 0..4 {
            let len = 1 + rng.below(buffer.len() as u64) as usize;
            let offset = rng.below(SIZE);
            // Errors are fine.
            let _ = disk.read_at(&mut buffer[..len], offset);
            let _ = disk.write_at(&buffer[..len], offset);
            let _ = disk.discard(offset, len as u64);
        }
        let layer = disk.layers().remove(0);
        if let Some(image) = layer.as_qcow2() {
            let _ = image.snapshots();
            let _ = image.check([Repair::Nothing, Repair::All][rng.below(2) as usize]);
        }
        let _ = disk.close();
    }
}
