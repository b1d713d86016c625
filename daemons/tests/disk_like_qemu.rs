//! `nacre disk` does what those who know qemu-img expect: the same command is given to both, or QEMU looks at what came
//! out.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod disk_bench;

use disk_bench::{Bench, MIB};
use serde_json::Value;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};

impl Bench {
    /// Lets QEMU change an image.
    fn io(&self, image: &str, format: &str, commands: &[&str]) {
        let mut io = Command::new("qemu-io");
        io.args(["-f", format]).args(commands.iter().flat_map(|command| ["-c", *command])).arg(image);
        let output = io.current_dir(self.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path().join(name), bytes).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path().join(name)).unwrap()
    }

    /// Bytes that a file takes.
    fn allocated(&self, name: &str) -> u64 {
        std::fs::metadata(self.path().join(name)).unwrap().blocks() * 512
    }

    /// The contents of a disk, as QEMU sees them.
    fn contents(&self, image: &str, format: &str) -> Vec<u8> {
        self.qemu("qemu-img", &format!("convert -f {format} -O raw {image} contents.raw"));
        self.read("contents.raw")
    }

    fn assert_same(&self, image: &str, format: &str, expected: &[u8]) {
        if format == "qcow2" {
            self.qemu("qemu-img", &format!("check -f qcow2 {image}"));
        }
        let seen = self.contents(image, format);
        let different = seen.iter().zip(expected).position(|(a, b)| a != b);
        assert_eq!((seen.len(), different), (expected.len(), None), "{image}");
    }

    /// The list of `map`, by QEMU and by us.
    fn maps(&self, image: &str, arguments: &str) -> [Vec<Value>; 2] {
        let theirs = self.qemu("qemu-img", &format!("map --output=json {arguments} {image}"));
        let theirs: Value = serde_json::from_str(&theirs).unwrap();
        let ours = self.json(&format!("map --output=json {arguments} {image}"));
        let [theirs, mut ours] = [theirs, ours].map(|list| list.as_array().unwrap().clone());
        // QEMU says this since version 8.2.
        if !theirs.iter().any(|run| run.get("compressed").is_some()) {
            ours.iter_mut().for_each(|run| drop(run.as_object_mut().unwrap().remove("compressed")));
        }
        [theirs, ours]
    }
}

/// A server of QEMU's, which ends with the test.
struct Server(Child);

impl Server {
    fn start(bench: &Bench, image: &str, format: &str) -> Self {
        let socket = bench.path().join("nbd");
        let mut server = Command::new("qemu-nbd");
        server.args(["--persistent", "-f", format, "-k", socket.to_str().unwrap(), image]);
        let server = Server(server.current_dir(bench.path()).spawn().unwrap());
        let start = std::time::Instant::now();
        let mut client = loop {
            match UnixStream::connect(&socket) {
                Ok(client) => break client,
                Err(_) => assert!(start.elapsed().as_secs() < 60, "qemu-nbd does not listen"),
            }
            std::thread::yield_now();
        };
        // It listens before it opens the image, and greets afterwards.
        client.read_exact(&mut [0; 8]).unwrap();
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn convert_writes_into_targets_that_exist() {
    let b = Bench::new();
    let data = b.data();
    let old = vec![0xee; 9 * MIB];
    let expected = [&data[..], &old[8 * MIB..]].concat();
    b.write("old.raw", &old);
    b.fails("convert -f raw -O raw data.raw old.raw", 1, "write into it with -n");
    assert!(b.read("old.raw") == old);
    // The format and its options stay what they are, and what is behind the copy, too.
    b.ok("convert -f raw -O qcow2 -o cluster_size=128k,extended_l2=on old.raw old.qcow2");
    b.ok("convert -n -f raw -O qcow2 data.raw old.qcow2");
    b.assert_same("old.qcow2", "qcow2", &expected);
    assert_eq!(b.json("info -f qcow2 --output=json old.qcow2")["cluster-size"], 128 << 10);
    b.ok("convert -n -f raw -O raw data.raw old.raw");
    assert!(b.read("old.raw") == expected);
    b.write("old.raw", &old);
    b.ok("convert -n -c -f raw -O qcow2 old.raw old.qcow2");
    b.ok("convert -n -c -f raw -O qcow2 data.raw old.qcow2");
    b.assert_same("old.qcow2", "qcow2", &expected);

    // Zeros are left out where the target is said to be zero, be it true or not.
    b.ok("convert -n --target-is-zero -f raw -O raw data.raw old.raw");
    let mut lie = expected.clone();
    lie[2 * MIB..4 * MIB].fill(0xee);
    assert!(b.read("old.raw") == lie);

    // Both programs refuse, alike.
    b.write("small.raw", &vec![0xee; 7 * MIB]);
    for (arguments, message) in [
        ("convert -n -f raw -O raw data.raw small.raw", "enlarge"),
        ("convert -n -f raw -O raw data.raw missing.raw", "missing.raw"),
        ("convert -n -f raw -O qcow2 data.raw small.raw", "no qcow2 image"),
        ("convert -n -f raw -O raw data.raw data.raw", "in use"),
    ] {
        let theirs = b.run("qemu-img", arguments).status.code();
        b.fails(arguments, theirs.unwrap(), message);
    }
    assert!(b.read("small.raw") == vec![0xee; 7 * MIB] && b.read("data.raw") == data);
    b.fails("convert --target-is-zero -f raw -O raw data.raw new.raw", 2, "-n");
    b.fails("convert -n -o cluster_size=64k -f raw -O qcow2 data.raw old.qcow2", 2, "-n");
}

#[test]
fn convert_writes_into_exports() {
    let b = Bench::new();
    let data = b.data();
    let old = vec![0xee; 9 * MIB];
    let expected = [&data[..], &old[8 * MIB..]].concat();
    for how in ["", "-n", "-n -t none -T none -W -m 2"] {
        b.write("old.raw", &old);
        let _server = Server::start(&b, "old.raw", "raw");
        b.ok(&format!("convert {how} -f raw -O raw data.raw nbd+unix:///?socket=nbd"));
        drop(_server);
        assert!(b.read("old.raw") == expected, "{how:?}");
    }
    b.write("small.raw", &[0xee; MIB]);
    let _server = Server::start(&b, "small.raw", "raw");
    b.fails("convert -n -f raw -O raw data.raw nbd+unix:///?socket=nbd", 1, "enlarge");
}

#[test]
fn convert_leaves_out_runs_of_zeros_of_a_size() {
    let b = Bench::new();
    let mut data = vec![1; 8 * MIB];
    for (at, len) in [(MIB, 4096), (2 * MIB + 8192, 65536), (4 * MIB, MIB), (7 * MIB, 512)] {
        data[at..at + len].fill(0);
    }
    b.write("data.raw", &data);
    for (size, holes) in [
        ("4k", &[(MIB, 4096), (2 * MIB + 8192, 65536), (4 * MIB, MIB)][..]),
        ("64k", &[(2 * MIB + 8192, 65536), (4 * MIB, MIB)]),
        ("256k", &[(4 * MIB, MIB)]),
        ("0", &[]),
    ] {
        for program in ["nacre", "qemu"] {
            let arguments = format!("convert -S {size} -f raw -O raw data.raw {program}.raw");
            match program {
                "nacre" => b.ok(&arguments),
                _ => b.qemu("qemu-img", &arguments),
            };
            assert!(b.read(&format!("{program}.raw")) == data);
        }
        let holes = holes.iter().map(|(_, len)| *len).sum::<usize>();
        assert_eq!(b.allocated("nacre.raw"), (8 * MIB - holes) as u64, "-S {size}");
        // It looks for them at aligned places only.
        assert!(b.allocated("qemu.raw") >= b.allocated("nacre.raw"), "-S {size}");
        std::fs::remove_file(b.path().join("nacre.raw")).unwrap();
    }
    // Holes are written, too, in whatever format.
    b.ok("create -f raw hole.raw 2M");
    b.ok("convert -S 0 -f raw -O qcow2 hole.raw full.qcow2");
    assert!(b.maps("full.qcow2", "-f qcow2")[0].iter().all(|run| run["data"] == true));
    b.assert_same("full.qcow2", "qcow2", &vec![0; 2 * MIB]);
    for wrong in ["3", "100", "1G"] {
        let arguments = format!("convert -S {wrong} -f raw -O raw data.raw new.raw");
        let theirs = b.run("qemu-img", &arguments).status.code();
        b.fails(&arguments, theirs.unwrap(), "multiple of 512");
        assert!(!b.path().join("new.raw").exists());
    }
}

#[test]
fn convert_takes_several_sources() {
    let b = Bench::new();
    let data = b.data();
    b.write("odd.raw", &[7; 1000]); // QEMU fills the sector with zeros
    let expected = [&[7; 1000][..], &[0; 24], &data, &[7; 1000]].concat();
    b.ok("convert -f raw -O raw odd.raw data.raw odd.raw whole.raw");
    assert!(b.read("whole.raw") == expected);
    b.qemu("qemu-img", "convert -f raw -O raw odd.raw data.raw odd.raw theirs.raw");
    assert!(b.read("theirs.raw")[..expected.len()] == expected);
    for compress in ["", "-c"] {
        b.ok(&format!("convert {compress} -f raw -O qcow2 data.raw odd.raw data.raw whole.qcow2"));
        let expected = [&data[..], &[7; 1000], &[0; 24], &data].concat();
        b.assert_same("whole.qcow2", "qcow2", &expected);
        std::fs::remove_file(b.path().join("whole.qcow2")).unwrap();
    }
    b.fails("convert -f raw -O raw data.raw missing.raw whole2.raw", 1, "missing.raw");
    b.fails("convert -f raw -O raw data.raw", 2, "TARGET");
}

#[test]
fn convert_makes_children() {
    let b = Bench::new();
    let mut data = b.data();
    b.ok("convert -f raw -O qcow2 data.raw base.qcow2");
    data[5 * MIB..5 * MIB + 4096].fill(9);
    data[0..65536].fill(0);
    b.write("data.raw", &data);
    std::fs::create_dir(b.path().join("far")).unwrap();
    std::fs::copy(b.path().join("base.qcow2"), b.path().join("far/base.qcow2")).unwrap();
    for (how, child, backing) in [
        ("-B base.qcow2 -F qcow2", "one.qcow2", "base.qcow2"),
        ("-o backing_file=base.qcow2,backing_fmt=qcow2", "two.qcow2", "base.qcow2"),
        ("-B far/base.qcow2 -F qcow2", "three.qcow2", "far/base.qcow2"),
    ] {
        b.ok(&format!("convert {how} -f raw -O qcow2 data.raw {child}"));
        b.assert_same(child, "qcow2", &data);
        let info = b.json(&format!("info -f qcow2 --output=json {child}"));
        assert_eq!(
            (&info["backing-filename"], &info["backing-filename-format"]),
            (&backing.into(), &"qcow2".into())
        );
        assert!(b.allocated(child) < MIB as u64, "only what differs is written");
    }
    b.ok("convert -c -B base.qcow2 -F qcow2 -f raw -O qcow2 data.raw small.qcow2");
    b.assert_same("small.qcow2", "qcow2", &data);
    b.fails("convert -B base.qcow2 -f raw -O qcow2 data.raw x.qcow2", 2, "--backing-format");
}

#[test]
fn maps_are_those_of_qemu() {
    let b = Bench::new();
    b.data();
    b.ok("create -f qcow2 base.qcow2 9M");
    b.io(
        "base.qcow2",
        "qcow2",
        &[
            "write -P 1 0 1M",
            "write -P 2 1536k 64k",
            "write -z -u 2M 1M",
            "write -c -P 3 4M 256k",
            "write -z -u 4160k 64k",
            "write -P 4 8M 1M",
        ],
    );
    b.ok("create -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2 10M");
    b.io("mid.qcow2", "qcow2", &["write -P 5 512k 256k", "discard 6M 1M", "write -P 5 9M 64k"]);
    b.ok("clone -f qcow2 -o extended_l2=off mid.qcow2 same.qcow2");
    b.ok("create -f qcow2 -o extended_l2=on,cluster_size=128k -b mid.qcow2 -F qcow2 top.qcow2 12M");
    b.io("top.qcow2", "qcow2", &["write -P 6 576k 4k", "write -z -u 256k 8k", "write -P 6 10M 128k"]);
    b.ok("create -f qcow2 -b data.raw -F raw over.qcow2");
    b.io("over.qcow2", "qcow2", &["write -P 6 3M 64k"]);
    for image in ["base.qcow2", "mid.qcow2", "same.qcow2", "top.qcow2", "over.qcow2", "data.raw"] {
        let format = image.rsplit('.').next().unwrap();
        for range in
            ["", "-s 600k -l 2M", "--start-offset=1M --max-length=512", "-s 513 -l 1000", "-s 7M -l 1G"]
        {
            let [theirs, ours] = b.maps(image, &format!("-f {format} {range}"));
            assert!(theirs == ours, "{image} {range}: QEMU has {theirs:#?}, we {ours:#?}");
        }
        let lines = b.ok(&format!("map -f {format} -s 512k -l 64k {image}")).lines().count();
        assert!(lines >= 2, "{image}");
    }
    assert_eq!(b.json("map -f qcow2 --json -s 1G base.qcow2"), Value::Array(Vec::new()));
    b.fails("map -f qcow2 -s nowhere base.qcow2", 2, "suffix");
}

#[test]
fn disks_that_grow_are_preallocated() {
    let b = Bench::new();
    let mib = MIB as u64;
    for (mode, allocated) in [("off", 0), ("falloc", 3 * mib), ("full", 3 * mib)] {
        for program in ["nacre", "qemu"] {
            let image = format!("{program}-{mode}.raw");
            b.ok(&format!("create -f raw {image} 1M"));
            let arguments = format!("resize --preallocation={mode} -f raw {image} +3M");
            match program {
                "nacre" => b.ok(&arguments),
                _ => b.qemu("qemu-img", &arguments),
            };
            assert_eq!((b.allocated(&image), b.read(&image)), (allocated, vec![0; 4 * MIB]), "{image}");
        }
    }
    b.fails("resize --preallocation=metadata -f raw nacre-off.raw 5M", 1, "no metadata");
    assert_eq!(b.read("nacre-off.raw").len(), 4 * MIB, "what failed changes no size");

    let data = b.data();
    b.ok("convert -f raw -O qcow2 data.raw base.qcow2");
    for (mode, options) in [
        ("metadata", ""),
        ("falloc", ""),
        ("full", ""),
        ("metadata", "extended_l2=on"),
        ("falloc", "compat=0.10"),
    ] {
        // Clusters that were used before are free, and come first.
        b.ok(&format!("create -f qcow2 -o size=3M,{options} a.qcow2"));
        b.io("a.qcow2", "qcow2", &["write -P 0xee 0 3M", "discard 64k 1M"]);
        b.ok(&format!("resize -f qcow2 --preallocation={mode} a.qcow2 +5M"));
        let expected =
            [&vec![0xee; 65536][..], &vec![0; MIB], &vec![0xee; 2 * MIB - 65536], &vec![0; 5 * MIB]].concat();
        b.assert_same("a.qcow2", "qcow2", &expected);
        let [theirs, _] = b.maps("a.qcow2", "-f qcow2 -s 3M");
        assert!(theirs.iter().all(|run| run["data"] == true), "{mode} {options}: {theirs:?}");
        if mode != "metadata" {
            assert!(b.allocated("a.qcow2") >= 7 * mib, "{mode} {options}");
        }
        // A child shows its parent up to where it ended, and zeros behind that.
        b.ok("create -f qcow2 -b base.qcow2 -F qcow2 child.qcow2 5000k");
        b.ok(&format!("resize -f qcow2 --preallocation={mode} child.qcow2 10M"));
        let expected = [&data[..5000 << 10], &vec![0; (10 << 20) - (5000 << 10)]].concat();
        b.assert_same("child.qcow2", "qcow2", &expected);
        let [theirs, _] = b.maps("child.qcow2", "-f qcow2 -s 5M");
        assert!(theirs.iter().all(|run| run["depth"] == 0 && run["present"] == true), "{theirs:?}");
        for image in ["a.qcow2", "child.qcow2"] {
            std::fs::remove_file(b.path().join(image)).unwrap();
        }
    }
    b.ok("create -f vhdx a.vhdx 4M");
    b.fails("resize -f vhdx --preallocation=falloc a.vhdx 8M", 1, "preallocation");
    assert_eq!(b.json("info -f vhdx --json a.vhdx")["virtual-size"], 4 * mib);
    for (arguments, message) in [
        ("resize --preallocation=full --shrink -f qcow2 base.qcow2 4M", "grows"),
        ("resize -f qcow2 base.qcow2 -1M", "--shrink"),
        ("resize -f qcow2 --shrink base.qcow2 -1G", "out of range"),
    ] {
        let theirs = b.run("qemu-img", arguments).status.code();
        b.fails(arguments, theirs.unwrap(), message);
    }
    b.assert_same("base.qcow2", "qcow2", &data);
    b.fails("resize --preallocation=some -f qcow2 base.qcow2 +1M", 2, "falloc");
}

#[test]
fn external_snapshots_of_disks_that_nobody_uses() {
    let b = Bench::new();
    let data = b.data();
    let report = b.json("snapshot --json -f raw --external one.qcow2 data.raw");
    assert_eq!((&report["snapshot"], &report["active"]), (&"data.raw".into(), &"one.qcow2".into()));
    b.io("one.qcow2", "qcow2", &["write -P 9 1M 64k"]);
    std::fs::create_dir(b.path().join("far")).unwrap();
    b.ok("snapshot -f qcow2 -o extended_l2=off --external far/two.qcow2 one.qcow2");
    b.io("far/two.qcow2", "qcow2", &["write -P 8 5M 64k"]);
    let chain = b.json("info -f qcow2 --trust-headers --backing-chain --json far/two.qcow2");
    let facts = |n: usize| (&chain[n]["cluster-size"], &chain[n]["format"]);
    assert_eq!(facts(0), (&(64 << 10).into(), &"qcow2".into()));
    assert_eq!(facts(1), (&(128 << 10).into(), &"qcow2".into()));
    assert_eq!(facts(2).1, "raw");
    let mut expected = data.clone();
    expected[MIB..MIB + 65536].fill(9);
    b.assert_same("one.qcow2", "qcow2", &expected);
    expected[5 * MIB..5 * MIB + 65536].fill(8);
    b.assert_same("far/two.qcow2", "qcow2", &expected);
    assert!(b.read("data.raw") == data);

    b.fails("snapshot -f raw --external one.qcow2 data.raw", 1, "one.qcow2");
    b.fails("snapshot -f raw -o extended_l2=off data.raw", 2, "--external");
    let _server = Server::start(&b, "data.raw", "raw");
    b.fails("snapshot -f raw --external three.qcow2 data.raw", 1, "in use");
    assert!(!b.path().join("three.qcow2").exists());
}

#[test]
fn mistakes_end_as_with_qemu() {
    let b = Bench::new();
    b.data();
    b.ok("convert -f raw -O qcow2 data.raw a.qcow2");
    b.ok("create -f qcow2 -b a.qcow2 -F qcow2 child.qcow2");
    b.ok("create -f qcow2 -b child.qcow2 -F qcow2 orphan.qcow2");
    std::fs::rename(b.path().join("child.qcow2"), b.path().join("gone.qcow2")).unwrap();
    b.ok("convert -f raw -O qcow2 data.raw used.qcow2");
    let _server = Server::start(&b, "used.qcow2", "qcow2");
    for (arguments, message) in [
        ("info -f qcow2 missing.qcow2", "missing.qcow2"),
        ("check -f qcow2 missing.qcow2", "missing.qcow2"),
        ("map -f qcow2 missing.qcow2", "missing.qcow2"),
        ("resize -f qcow2 missing.qcow2 1G", "missing.qcow2"),
        ("compare -f qcow2 -F raw missing.qcow2 data.raw", "missing.qcow2"),
        ("convert -f qcow2 -O raw missing.qcow2 new.raw", "missing.qcow2"),
        ("info -f qcow2 data.raw", "no qcow2 image"),
        ("check -f qcow2 data.raw", "no qcow2 image"),
        ("check -f raw data.raw", "nothing to check"),
        ("map -f qcow2 data.raw", "no qcow2 image"),
        ("commit -f qcow2 a.qcow2", "no parent"),
        ("resize -f qcow2 used.qcow2 1G", "in use"),
        ("commit -f qcow2 used.qcow2", "in use"),
        ("snapshot -c s used.qcow2 -f qcow2", "in use"),
        ("check -f qcow2 used.qcow2", "in use"),
        ("map -f qcow2 orphan.qcow2", "child.qcow2"),
        ("convert -f qcow2 -O raw orphan.qcow2 new.raw", "child.qcow2"),
        ("create -f qcow2 -b missing.qcow2 -F qcow2 new.qcow2", "missing.qcow2"),
        ("snapshot -f qcow2 -a nothing a.qcow2", "nothing"),
        ("resize -f qcow2 a.qcow2 1M", "--shrink"),
    ] {
        // This command of QEMU's looks for the format itself.
        let theirs = match arguments.starts_with("snapshot") {
            true => arguments.replace("-f qcow2 ", "").replace(" -f qcow2", ""),
            false => arguments.to_owned(),
        };
        let theirs = b.run("qemu-img", &theirs).status.code();
        b.fails(arguments, theirs.unwrap(), message);
        for new in ["new.raw", "new.qcow2"] {
            assert!(!b.path().join(new).exists(), "{arguments}");
        }
    }
    b.ok("info -U -f qcow2 used.qcow2");
}

#[test]
fn a_parent_that_was_touched_is_accepted_by_the_command_that_the_error_names() {
    let b = Bench::new();
    b.data();
    std::fs::create_dir(b.path().join("it's here")).unwrap();
    for (base, child) in [("data.raw", "child.qcow2"), ("it's here/data.raw", "it's here/child.qcow2")] {
        if base != "data.raw" {
            std::fs::copy(b.path().join("data.raw"), b.path().join(base)).unwrap();
        }
        let disk = |arguments: &[&str]| {
            let mut nacre = Command::new(env!("CARGO_BIN_EXE_nacre"));
            let output = nacre.arg("disk").args(arguments).current_dir(b.path()).output().unwrap();
            (output.status.code(), String::from_utf8(output.stderr).unwrap())
        };
        assert_eq!(disk(&["create", "-f", "qcow2", "-b", "data.raw", "-F", "raw", child]).0, Some(0));
        let file = std::fs::File::options().write(true).open(b.path().join(base)).unwrap();
        file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(60)).unwrap();
        let (status, text) = disk(&["map", "-f", "qcow2", child]);
        assert_eq!(status, Some(1), "{text}");
        assert!(text.contains("only touched"), "{text}");
        let command = text.trim_end().rsplit_once("accept it: nacre").unwrap().1;
        let command = format!("{}{command}", env!("CARGO_BIN_EXE_nacre"));
        let shell = Command::new("sh").args(["-c", &command]).current_dir(b.path()).status().unwrap();
        assert!(shell.success(), "{command}");
        assert_eq!(disk(&["map", "-f", "qcow2", child]).0, Some(0));
    }
}

#[test]
fn a_parent_whose_state_has_no_room_is_said() {
    let b = Bench::new();
    b.data();
    for (directory, said) in [("short".to_owned(), false), ("d".repeat(200) + "/" + &"d".repeat(200), true)] {
        let path = b.path().join(&directory);
        std::fs::create_dir_all(&path).unwrap();
        std::fs::copy(b.path().join("data.raw"), path.join("data.raw")).unwrap();
        let name = path.join("data.raw");
        b.ok("create -f qcow2 orphan.qcow2 8M");
        for command in [
            format!("create -f qcow2 -b {} -F raw child.qcow2", name.display()),
            format!("rebase -u -f qcow2 -b {} -F raw orphan.qcow2", name.display()),
        ] {
            let text = b.ok(&command);
            assert_eq!(text.contains("changes will not be noticed"), said, "{command}: {text}");
        }
        for image in ["child.qcow2", "orphan.qcow2"] {
            std::fs::remove_file(b.path().join(image)).unwrap();
        }
    }
}
