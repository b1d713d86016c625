//! The contract of `nacre disk`: what it makes and changes is what QEMU makes of it, and exit codes and JSON are what
//! a program can rely on.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod disk_bench;

use disk_bench::{Bench, MIB};
use serde_json::Value;
use std::process::Command;

#[test]
fn create_info_resize_and_measure() {
    let b = Bench::new();
    b.ok("create -f qcow2 -o cluster_size=128k,extended_l2=on a.qcow2 1G");
    let theirs: Value =
        serde_json::from_str(&b.qemu("qemu-img", "info --output=json -f qcow2 a.qcow2")).unwrap();
    let ours = b.json("info -f qcow2 --json a.qcow2");
    for key in ["virtual-size", "cluster-size", "format"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    assert_eq!(ours["format-specific"]["data"]["extended-l2"], true);
    assert!(b.ok("info -f qcow2 a.qcow2").contains("virtual size: 1.00 GiB"));
    b.fails("create -f qcow2 a.qcow2 1G", 1, "Cannot");
    b.fails("create -f qcow2 -o cluster_size=3 b.qcow2 1G", 1, "");
    b.fails("info -f raw missing", 1, "missing");
    b.fails("info a.qcow2", 2, "--format"); // the format is never guessed
    b.ok("resize -f qcow2 a.qcow2 +1G");
    assert_eq!(b.json("info -f qcow2 --json a.qcow2")["virtual-size"], 2u64 << 30);
    b.fails("resize -f qcow2 a.qcow2 512M", 1, "--shrink");
    b.ok("resize -f qcow2 --shrink a.qcow2 512M");
    b.qemu("qemu-img", "check -f qcow2 a.qcow2");
    b.data();
    let ours = b.json("measure -f raw -O qcow2 --json data.raw");
    let theirs: Value =
        serde_json::from_str(&b.qemu("qemu-img", "measure --output=json -f raw -O qcow2 data.raw")).unwrap();
    assert_eq!(ours["fully-allocated"], theirs["fully-allocated"]);
}

#[test]
fn convert_compare_and_map() {
    let b = Bench::new();
    b.data();
    for (options, image, format) in [
        ("-O qcow2", "a.qcow2", "qcow2"),
        ("-c -O qcow2 -o compression_type=zstd", "z.qcow2", "qcow2"),
        ("-O vpc", "a.vhd", "vpc"),
        ("-O raw", "a.raw", "raw"),
    ] {
        let report = b.json(&format!("convert --json -f raw {options} data.raw {image}"));
        assert_eq!(report["done"], report["total"], "{report}");
        if format != "vpc" {
            b.same_as_data(image, format); // QEMU rounds the size of a VHD to its geometry
        }
        assert_eq!(b.json(&format!("compare --json -f raw -F {format} data.raw {image}"))["identical"], true);
    }
    b.fails("convert -f raw -O qcow2 data.raw a.qcow2", 1, "Cannot create");
    b.fails("convert -f qcow2 -O raw data.raw new.raw", 1, "Cannot open");
    assert!(!b.path().join("new.raw").exists());
    let map = b.json("map -f qcow2 --json a.qcow2");
    let theirs: Value =
        serde_json::from_str(&b.qemu("qemu-img", "map --output=json -f qcow2 a.qcow2")).unwrap();
    let runs = |v: &Value| -> Vec<_> {
        let list = v.as_array().unwrap().iter();
        list.map(|r| (r["start"].as_u64(), r["length"].as_u64(), r["data"].as_bool())).collect()
    };
    assert_eq!(runs(&map), runs(&theirs));
    b.ok("convert -f raw -O raw data.raw b.raw");
    let mut bytes = std::fs::read(b.path().join("b.raw")).unwrap();
    bytes[5 * MIB + 7] ^= 1;
    std::fs::write(b.path().join("b.raw"), bytes).unwrap();
    b.fails("compare -f raw -F raw data.raw b.raw", 1, &format!("offset {}", 5 * MIB + 7));
    b.fails("compare -f raw -F qcow2 data.raw b.raw", 2, "Cannot open");
}

/// Readers that count in sectors see the last bytes, too.
#[test]
fn images_end_with_a_whole_sector() {
    let b = Bench::new();
    std::fs::write(b.path().join("odd.raw"), [7; 1000]).unwrap();
    b.ok("convert -f raw -O qcow2 odd.raw copy.qcow2");
    b.ok("clone -f raw odd.raw clone.qcow2");
    for image in ["copy.qcow2", "clone.qcow2"] {
        b.qemu("qemu-img", &format!("convert -f qcow2 -O raw {image} back.raw"));
        assert_eq!(std::fs::read(b.path().join("back.raw")).unwrap()[..1000], [7; 1000], "{image}");
    }
    b.ok("resize -f qcow2 copy.qcow2 +100");
    assert_eq!(b.json("info -f qcow2 --json copy.qcow2")["virtual-size"], 1536);
    b.ok("convert -f raw -O raw odd.raw odd2.raw");
    assert_eq!(std::fs::metadata(b.path().join("odd2.raw")).unwrap().len(), 1000);
}

#[test]
fn chains_are_merged_and_moved() {
    let b = Bench::new();
    b.data();
    b.ok("convert -f raw -O qcow2 data.raw base.qcow2");
    b.ok("convert -f raw -O qcow2 data.raw other.qcow2");
    for child in ["c1", "c2", "c3", "c4"] {
        b.ok(&format!("create -f qcow2 -b base.qcow2 -F qcow2 {child}"));
    }
    b.ok("clone -f qcow2 base.qcow2 linked.qcow2");
    b.same_as_data("linked.qcow2", "qcow2");
    b.ok("clone -f qcow2 -o extended_l2=off base.qcow2 plain.qcow2");
    for (clone, cluster, subclusters) in
        [("linked", 131_072, true), ("plain", 65536, false), ("c1", 65536, false)]
    {
        let path = if clone == "c1" { clone.to_owned() } else { format!("{clone}.qcow2") };
        let info = b.json(&format!("info -f qcow2 --json {path}"));
        assert_eq!(info["cluster-size"], cluster, "{clone}");
        assert_eq!(info["format-specific"]["data"]["extended-l2"], subclusters, "{clone}");
    }
    b.json("stream --json -f qcow2 c1");
    assert!(b.json("info -f qcow2 --json c1").get("backing").is_none());
    b.same_as_data("c1", "qcow2");
    b.ok("rebase -f qcow2 -b other.qcow2 -F qcow2 c2");
    assert_eq!(b.json("info -f qcow2 --json c2")["backing"]["path"], "other.qcow2");
    b.same_as_data("c2", "qcow2");
    b.ok("rebase -u -f qcow2 -b other.qcow2 -F qcow2 c3");
    b.same_as_data("c3", "qcow2");
    let chain = b.json("info -f qcow2 --backing-chain --json c2");
    assert_eq!(chain.as_array().unwrap().len(), 2);
    // What QEMU writes to a child arrives in the parent.
    let write = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 7 1M 64k", "c4"])
        .current_dir(b.path())
        .output();
    assert!(write.unwrap().status.success());
    b.ok("commit -f qcow2 c4");
    let data = b.path().join("data.raw");
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[MIB..MIB + 65536].fill(7);
    std::fs::write(&data, bytes).unwrap();
    b.same_as_data("base.qcow2", "qcow2");
    // Through an image between, too.
    b.ok("create -f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 c5");
    b.ok("clone -f qcow2 c5 c6");
    b.ok("clone -f qcow2 c6 c7");
    let write = |image: &str, command: &str| {
        let mut io = Command::new("qemu-io");
        assert!(
            io.args(["-f", "qcow2", "-c", command, image]).current_dir(b.path()).status().unwrap().success()
        );
    };
    write("c7", "write -P 8 3M 4k");
    b.fails("commit -f qcow2 -b c7 c7", 1, "itself");
    b.ok("commit -f qcow2 -b base.qcow2 c7");
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[3 * MIB..3 * MIB + 4096].fill(8);
    std::fs::write(&data, bytes).unwrap();
    b.same_as_data("base.qcow2", "qcow2");
    // Another child of that parent is told, whatever the resolution of the file system's times.
    let base = std::fs::File::options().write(true).open(b.path().join("base.qcow2")).unwrap();
    base.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(60)).unwrap();
    b.fails("map -f qcow2 linked.qcow2", 1, "rebase -u");
    b.ok("map -f qcow2 --changed-parents linked.qcow2");
    b.ok("rebase -u -f qcow2 -b base.qcow2 -F qcow2 linked.qcow2");
    b.ok("map -f qcow2 linked.qcow2");
    b.fails("commit -f qcow2 base.qcow2", 1, "no parent");
    b.fails("stream -f qcow2 --base c1 c2", 1, "image of the chain");
}

#[test]
fn clones_of_an_encrypted_base() {
    let b = Bench::new();
    b.data();
    std::fs::write(b.path().join("key"), "open sesame").unwrap();
    b.ok("convert -f raw -O luks -o iter-time=1 --secret-file key data.raw base.luks");
    b.fails("clone -f luks base.luks none.qcow2", 1, "Cannot open");
    let options = "-f luks -o encrypt.format=luks,encrypt.iter-time=1 --secret-file key";
    b.ok(&format!("clone {options} base.luks one.qcow2 two.qcow2"));
    for clone in ["one.qcow2", "two.qcow2"] {
        b.ok(&format!("convert -f qcow2 -O raw --secret-file key {clone} seen.raw"));
        b.same_as_data("seen.raw", "raw");
        std::fs::remove_file(b.path().join("seen.raw")).unwrap();
        let info = b.json(&format!("info -f qcow2 --json --secret-file key {clone}"));
        assert_eq!(info["format-specific"]["data"]["encrypt"]["format"], "luks", "{info}");
    }
}

#[test]
fn snapshots_bitmaps_check_and_repair() {
    let b = Bench::new();
    b.data();
    b.ok("convert -f raw -O qcow2 data.raw a.qcow2");
    b.ok("snapshot -f qcow2 -c first a.qcow2");
    let write = |value: u8| {
        let command = format!("write -P {value} 1M 1M");
        let done = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", &command, "a.qcow2"])
            .current_dir(b.path())
            .output();
        assert!(done.unwrap().status.success());
    };
    write(9);
    assert_eq!(b.json("snapshot -f qcow2 --list --json a.qcow2")[0]["name"], "first");
    assert!(b.qemu("qemu-img", "snapshot -l a.qcow2").contains("first"));
    b.ok("snapshot -f qcow2 -a first a.qcow2");
    b.same_as_data("a.qcow2", "qcow2");
    b.ok("snapshot -f qcow2 -d first a.qcow2");
    b.fails("snapshot -f qcow2 -a first a.qcow2", 1, "no snapshot");
    b.ok("bitmap -f qcow2 --add a.qcow2 daily");
    b.fails("bitmap -f qcow2 --add a.qcow2 daily", 1, "exists");
    assert_eq!(b.json("bitmap -f qcow2 --list --json a.qcow2")[0]["granularity"], 65536);
    b.ok("snapshot -f qcow2 -c again a.qcow2");
    write(7);
    b.ok("bitmap -f qcow2 --add --merge daily --disable -g 1M a.qcow2 both");
    b.ok("bitmap -f qcow2 --clear a.qcow2 daily");
    let list = b.json("bitmap -f qcow2 --json a.qcow2");
    assert_eq!([&list[0]["enabled"], &list[1]["enabled"]], [true, false], "{list}");
    // What the first knew, only the second knows now.
    b.ok("create -f qcow2 b.qcow2 8M");
    b.ok("bitmap -f qcow2 --add --merge both --merge daily -b a.qcow2 -F qcow2 -g 1M b.qcow2 copy");
    let bytes = b.json("backup --json -f qcow2 --bitmap both -O raw a.qcow2 both.raw")["bytes"].as_u64();
    assert_eq!(bytes, Some(1 << 20));
    assert_eq!(b.json("backup --json -f qcow2 --bitmap daily -O raw a.qcow2 daily.raw")["bytes"], 0);
    b.fails("bitmap -f qcow2 --merge copy a.qcow2 daily", 1, "copy");
    b.fails("bitmap -f qcow2 a.qcow2 daily", 2, "add");
    b.fails("bitmap -f qcow2 --clear a.qcow2", 2, "NAME");
    b.ok("bitmap -f qcow2 --remove a.qcow2 both");
    b.ok("bitmap -f qcow2 --remove a.qcow2 daily");
    b.ok("snapshot -f qcow2 -a again a.qcow2");
    b.ok("snapshot -f qcow2 -d again a.qcow2");
    assert_eq!(b.disk("check -f qcow2 a.qcow2").0, 0);
    assert_eq!(b.disk("check -f raw data.raw").0, 63);
    // A refcount of 1 in the last cluster of the block: nobody refers to it.
    let image = b.path().join("a.qcow2");
    let mut bytes = std::fs::read(&image).unwrap();
    let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let block = be64(be64(48));
    let unused = bytes.len() / 65536 - 1;
    bytes.resize(bytes.len() + 65536, 0);
    bytes[block + (unused + 1) * 2 + 1] = 1;
    std::fs::write(&image, &bytes).unwrap();
    assert_eq!(b.disk("check -f qcow2 a.qcow2").0, 3);
    let report: Value = serde_json::from_str(&b.disk("check -f qcow2 --json a.qcow2").1).unwrap();
    assert_eq!(report["leaks"], 1, "{report}");
    b.ok("check -f qcow2 -r leaks a.qcow2");
    b.ok("repair -f qcow2 a.qcow2");
    b.same_as_data("a.qcow2", "qcow2");
}

#[test]
fn backups_are_full_and_incremental() {
    let b = Bench::new();
    b.data();
    b.ok("convert -f raw -O qcow2 data.raw a.qcow2");
    b.ok("bitmap -f qcow2 --add a.qcow2 daily");
    assert!(b.json("backup --json -f qcow2 -O qcow2 a.qcow2 full.qcow2")["bytes"].as_u64() >= Some(8 << 20));
    b.same_as_data("full.qcow2", "qcow2");
    for (day, previous) in [("monday", "full"), ("tuesday", "monday")] {
        let value = day.len();
        let command = format!("write -P {value} {value}00k 100k");
        let done = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", &command, "a.qcow2"])
            .current_dir(b.path())
            .output();
        assert!(done.unwrap().status.success());
        let from = format!("-b {previous}.qcow2 -F qcow2 -O qcow2 a.qcow2 {day}.qcow2");
        let report = b.json(&format!("backup --json -f qcow2 --bitmap daily {from}"));
        assert!(report["bytes"].as_u64() <= Some(256 << 10), "{report}");
        b.qemu("qemu-img", &format!("compare -f qcow2 -F qcow2 a.qcow2 {day}.qcow2"));
    }
    b.fails("backup -f qcow2 --bitmap nightly -O qcow2 a.qcow2 x.qcow2", 1, "nightly");
    b.fails("backup -f qcow2 -b full.qcow2 -F qcow2 -O qcow2 a.qcow2 x.qcow2", 1, "--bitmap");
}

#[test]
fn a_mirror_that_was_cancelled_goes_on() {
    let b = Bench::new();
    b.data();
    b.interrupt("mirror -f raw -O qcow2 --rate-limit 1M data.raw copy.qcow2", "copy.qcow2");
    b.fails("mirror -f raw -O qcow2 data.raw copy.qcow2", 1, "Cannot create");
    b.ok("mirror -f raw -O qcow2 --resume data.raw copy.qcow2");
    b.same_as_data("copy.qcow2", "qcow2");
}

#[test]
fn snapshots_are_listed_and_deleted_and_disks_move() {
    let b = Bench::new();
    b.data();
    b.ok("convert -f raw -O qcow2 data.raw base.qcow2");
    b.ok("create -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2");
    b.ok("clone -f qcow2 mid.qcow2 top.qcow2 other.qcow2");
    b.ok("snapshot -f qcow2 -c inside other.qcow2");
    let tree = b.ok("tree -f qcow2 top.qcow2 other.qcow2");
    assert_eq!(tree, "base.qcow2\n└─ mid.qcow2\n   ├─ top.qcow2 *\n   └─ other.qcow2 * [inside]\n");
    assert_eq!(b.json("tree --json -f qcow2 top.qcow2")[0]["children"][0]["image"], "mid.qcow2");
    std::fs::remove_file(b.path().join("other.qcow2")).unwrap();
    let report = b.json("snapshot --json -f qcow2 --delete-image mid.qcow2 top.qcow2");
    assert_eq!((&report["unused"], &report["active"]), (&"mid.qcow2".into(), &"top.qcow2".into()));
    assert_eq!(b.json("info -f qcow2 --json top.qcow2")["backing"]["path"], "base.qcow2");
    b.same_as_data("top.qcow2", "qcow2");
    b.fails("snapshot -f qcow2 --delete-image mid.qcow2 top.qcow2", 1, "image of the chain");
    b.fails("snapshot -f qcow2 --delete-image top.qcow2 top.qcow2", 1, "below the active");

    std::fs::create_dir(b.path().join("new")).unwrap();
    b.interrupt("migrate -f qcow2 -O qcow2 --rate-limit 1M top.qcow2 new/disk.qcow2", "new/disk.qcow2");
    b.same_as_data("new/disk.qcow2", "qcow2");
    b.fails("migrate -f qcow2 -O qcow2 top.qcow2 new/disk.qcow2", 1, "Cannot create");
    let report = b.json("migrate --json --resume -f qcow2 -O qcow2 top.qcow2 new/disk.qcow2");
    assert!(report["bytes"].as_u64() > Some(0), "{report}");
    assert!(b.json("info -f qcow2 --json new/disk.qcow2").get("backing").is_none());
    b.same_as_data("new/disk.qcow2", "qcow2");
    b.ok("migrate -f qcow2 -O qcow2 --base base.qcow2 top.qcow2 moved.qcow2");
    assert_eq!(b.json("info -f qcow2 --json moved.qcow2")["backing"]["path"], "base.qcow2");
    b.same_as_data("moved.qcow2", "qcow2");
    b.fails("migrate -f qcow2 -O qcow2 top.qcow2 nbd://localhost/x", 1, "mirror");
}
