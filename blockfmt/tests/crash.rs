//! What a crash may leave behind, replayed from a record of every write and flush.
//!
//! After each crash every sector must hold what was last flushed or something that was written to it since,
//! and `qemu-img check` may find leaks but no corruption.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::qcow2::{Qcow2Options, Repair};
use blockfmt::format::vhd::{VhdKind, VhdOptions};
use blockfmt::format::vhdx::{VhdxKind, VhdxOptions};
use blockfmt::storage::{Event, MemoryStorage, RecordingStorage};
use blockfmt::{CreateOptions, Format, OpenOptions, Storage};
use common::crash::{
    History, SECTOR, SIZE, corruptions, crash, each_loss, last_mark, own_corruptions, rounds, sector,
};
use common::{Rng, qemu, text};
use std::sync::Arc;

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
    history.run(&disk, Some(&record), &mut rng, 120);
    drop(disk);
    let events = record.group_events();
    let start = [start];
    for round in 0..rounds(250) {
        let at = rng.below(events.len() as u64 + 1) as usize;
        let mark = last_mark(&events, at);
        let image = crash(&start, &events, at, &mut rng).remove(0);
        let what = format!("{name}, crash {round} at event {at} of {}", events.len());
        if format == Format::Qcow2
            && round % 10 == 0
            && let Some(report) = corruptions(&image, dir.path())
        {
            panic!("{what}: {report}");
        }
        let disk = open(Arc::new(image));
        history.check(&disk, mark, &what);
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
    each_loss(&start[0], &events, |image, lost, at| {
        let what = format!("{name}, crash at event {at} of {} without event {lost}", events.len());
        if format == Format::Qcow2 {
            let found = own_corruptions(&image);
            if !found.is_empty() {
                let report = corruptions(&image, dir.path());
                panic!("{what}: {found:?}, and qemu-img says: {report:?}");
            }
        }
        if let (Format::Vhd, Event::Write { data, .. }) = (format, &events[lost].1)
            && data.starts_with(b"conectix")
        {
            // QEMU does with the copy of the footer at the start.
            let path = dir.path().join("crashed.vhd");
            std::fs::write(&path, image.to_vec()).unwrap();
            let output = qemu("qemu-img", &["info", "-f", "vpc", text(&path)]);
            assert!(output.status.success() || with_base, "{what}: {output:?}");
        }
        let disk = open(Arc::new(image));
        history.check(&disk, last_mark(&events, at), &what);
        if format == Format::Vhdx {
            let found = disk.layers()[0].check(Repair::Nothing).expect(&what);
            assert_eq!(found.corruptions, 0, "{what}: {:?}", found.findings);
        }
    });
}

#[test]
fn plain_images() {
    run("64k clusters", Qcow2Options::default(), false, 11);
    run("4k clusters", Qcow2Options { cluster_size: Some(4096), ..Qcow2Options::default() }, false, 12);
    run("512 byte clusters", Qcow2Options { cluster_size: Some(512), ..Qcow2Options::default() }, false, 13);
}

#[test]
fn children() {
    run("child", Qcow2Options { cluster_size: Some(16384), ..Qcow2Options::default() }, true, 21);
    let subclusters = Qcow2Options { extended_l2: Some(true), ..Qcow2Options::default() };
    run("child with subclusters", subclusters, true, 22);
    run("overlay", Qcow2Options::default().overlay(), true, 24);
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
fn vhdx_images() {
    for (n, kind) in [VhdxKind::Fixed, VhdxKind::Dynamic].into_iter().enumerate() {
        let vhdx = VhdxOptions { kind, block_size: Some(1 << 20), ..VhdxOptions::default() };
        run_on("VHDX", CreateOptions::new(Format::Vhdx, SIZE).vhdx(vhdx), false, 41 + n as u64);
    }
    for logical_sector in [512, 4096] {
        let vhdx = VhdxOptions { block_size: Some(1 << 20), logical_sector, ..VhdxOptions::default() };
        let seed = 43 + u64::from(logical_sector);
        run_on("differencing VHDX", CreateOptions::new(Format::Vhdx, SIZE).vhdx(vhdx), true, seed);
    }
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
