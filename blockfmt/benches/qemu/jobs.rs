//! Jobs and NBD exports against qemu-img and qemu-storage-daemon.

use super::{Bench, Cost, SIZE, create, floor, full, qemu};
use blockfmt::format::qcow2::{Compression, Qcow2Options};
use blockfmt::job::{self, ConvertOptions, JobControl, Mirror, MirrorMode};
use blockfmt::nbd::{Export, Server};
use blockfmt::{CreateOptions, Disk, Format, OpenOptions};
use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

pub fn conversions(bench: &Bench) {
    let (raw, qcow2, out) = (bench.at("base.raw"), bench.at("base.qcow2"), bench.at("out"));
    let ours = |from: Format, source: &Path, to: Format, options: Qcow2Options, compress: bool| {
        CreateOptions::new(to, SIZE).qcow2(options).create(&out).unwrap();
        let source = OpenOptions::new(from).read_only(true).open(source).unwrap();
        let target = OpenOptions::new(to).open(&out).unwrap();
        let options = ConvertOptions { compress, ..ConvertOptions::default() };
        job::convert(&source, &target, options, &JobControl::new()).unwrap();
        target.close().unwrap();
    };
    let theirs = |from: Format, source: &Path, to: Format, more: &[&str]| {
        let (source, target) = (source.to_str().unwrap(), out.to_str().unwrap());
        let args = [&["convert", "-f", from.name(), "-O", to.name()][..], more, &[source, target]].concat();
        qemu("qemu-img", &args);
    };
    let plain = Qcow2Options::default;
    let clear = || bench.remove(&["out"]);
    for (from, source, to) in [(Format::Raw, &raw, Format::Qcow2), (Format::Qcow2, &qcow2, Format::Raw)] {
        bench.timed(
            &format!("convert {from} to {to}"),
            || full(from)(source),
            clear,
            || theirs(from, source, to, &[]),
            || ours(from, source, to, plain(), false),
        );
        floor::reads_and_writes(bench, &format!("convert {from} to {to}"), source);
    }
    for (compression, name) in [(Compression::Zlib, "zlib"), (Compression::Zstd, "zstd")] {
        bench.timed(
            &format!("convert raw to qcow2, {name}"),
            || texts(&raw),
            clear,
            || theirs(Format::Raw, &raw, Format::Qcow2, &["-c", "-o", &format!("compression_type={name}")]),
            || {
                let options = Qcow2Options { compression, ..plain() };
                ours(Format::Raw, &raw, Format::Qcow2, options, true);
            },
        );
    }
}

/// Fills an eighth of a disk with data that can be compressed to about a third.
fn texts(path: &Path) {
    create(path, CreateOptions::new(Format::Raw, SIZE));
    let disk = OpenOptions::new(Format::Raw).open(path).unwrap();
    let mut seed = 1u64;
    let mut block = vec![0; 1 << 20];
    for n in 0..SIZE / 8 / block.len() as u64 {
        for word in block.chunks_mut(8) {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(format!("{:08x}", (seed >> 33) as u32 & 0xff_ffff).as_bytes());
        }
        disk.write_at(&block, n * block.len() as u64).unwrap();
    }
}

/// A qemu-storage-daemon with a disk, ended with this.
struct Daemon {
    child: Child,
    monitor: BufReader<UnixStream>,
}

impl Daemon {
    /// `file` are more options for the file of the image.
    fn start(bench: &Bench, image: &Path, file: &str, more: &[String]) -> Self {
        let socket = bench.at("monitor");
        let _ = std::fs::remove_file(&socket);
        let child = Command::new("qemu-storage-daemon")
            .arg("--chardev")
            .arg(format!("socket,id=m,path={},server=on,wait=off", socket.display()))
            .args(["--monitor", "chardev=m", "--blockdev"])
            .arg(format!("qcow2,node-name=disk,file.driver=file,file.filename={}{file}", image.display()))
            .args(more)
            .spawn()
            .unwrap_or_else(|e| panic!("cannot run qemu-storage-daemon ({e}); install qemu-utils"));
        let mut monitor = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break BufReader::new(stream),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let mut greeting = String::new();
        monitor.read_line(&mut greeting).unwrap();
        let mut daemon = Daemon { child, monitor };
        daemon.run(r#"{"execute":"qmp_capabilities"}"#, "return");
        daemon
    }

    /// Sends a command and reads until an answer or event contains `end`.
    fn run(&mut self, command: &str, end: &str) {
        self.monitor.get_mut().write_all(command.as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            assert_ne!(self.monitor.read_line(&mut line).unwrap(), 0, "qemu-storage-daemon ended");
            assert!(!line.contains("\"error\": {"), "{command}: {line}");
            if line.contains(end) {
                return;
            }
        }
    }

    /// Processor time of the daemon so far, in seconds.
    fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks = |n: usize| fields[n].parse::<f64>().unwrap();
        (ticks(11) + ticks(12)) / 100.0
    }

    /// The cost of a command until `end`.
    fn cost(self, command: &str, end: &str) -> Cost {
        let daemon = RefCell::new(self);
        Cost::of(|| daemon.borrow().cpu(), || daemon.borrow_mut().run(command, end))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A full base and a child that holds all of it, or none.
fn chain(bench: &Bench, child_full: bool) {
    let (base, top) = (bench.at("base.qcow2"), bench.at("top.qcow2"));
    full(Format::Qcow2)(&base);
    create(&top, CreateOptions::new(Format::Qcow2, SIZE).backing("base.qcow2", Format::Qcow2));
    if child_full {
        super::fill(&top, Format::Qcow2);
    }
}

fn open(path: &Path) -> Disk {
    OpenOptions::new(Format::Qcow2).open(path).unwrap()
}

pub fn chains(bench: &Bench) {
    let (top, copy) = (bench.at("top.qcow2"), bench.at("copy.qcow2"));
    let job = |name: &str, run: &dyn Fn(usize) -> (Cost, Cost)| {
        bench.measured(name, SIZE as f64 / 1e6, "MB/s", run);
    };
    job("commit", &|_| {
        chain(bench, true);
        let theirs = Cost::children(|| {
            qemu("qemu-img", &["commit", "-d", "-f", "qcow2", top.to_str().unwrap()]);
        });
        chain(bench, true);
        let disk = open(&top);
        (theirs, Cost::own(|| job::commit(&disk, 0, &JobControl::new()).unwrap()))
    });
    job("stream", &|_| {
        chain(bench, false);
        let command = r#"{"execute":"block-stream","arguments":{"job-id":"j","device":"disk"}}"#;
        let theirs = Daemon::start(bench, &top, "", &[]).cost(command, "BLOCK_JOB_COMPLETED");
        chain(bench, false);
        let disk = open(&top);
        (theirs, Cost::own(|| job::stream(&disk, 0, None, &JobControl::new()).unwrap()))
    });
    job("mirror", &|_| {
        full(Format::Qcow2)(&top);
        create(&copy, CreateOptions::new(Format::Qcow2, SIZE));
        let target = format!("qcow2,node-name=copy,file.driver=file,file.filename={}", copy.display());
        let command = r#"{"execute":"blockdev-mirror","arguments":
            {"job-id":"j","device":"disk","target":"copy","sync":"full"}}"#;
        let daemon = Daemon::start(bench, &top, "", &["--blockdev".into(), target]);
        let theirs = daemon.cost(command, "BLOCK_JOB_READY");
        create(&copy, CreateOptions::new(Format::Qcow2, SIZE));
        let (disk, target) = (open(&top), open(&copy));
        let ours = Cost::own(|| {
            let mirror = Mirror::start(&disk, &target, MirrorMode::Background, None).unwrap();
            mirror.run(&JobControl::new()).unwrap();
        });
        (theirs, ours)
    });
    floor::copies(bench, "mirror", &top);
}

/// Makes requests of an export and returns the seconds without fio's start and end.
fn fio(uri: &str, kind: &str, depth: u32, requests: u32) -> f64 {
    let (rw, uri, depth) = (format!("--rw={kind}"), format!("--uri={uri}"), format!("--iodepth={depth}"));
    let args = ["--name=nbd", "--ioengine=nbd", &uri, &rw, "--bs=4k", &depth];
    let count = format!("--number_ios={requests}");
    let out = qemu("fio", &[&args[..], &[&count, "--randrepeat=1", "--output-format=json"]].concat());
    let report: serde_json::Value = serde_json::from_str(&out[out.find('{').unwrap()..]).unwrap();
    let side = if kind.ends_with("read") { "read" } else { "write" };
    f64::from(requests) / report["jobs"][0][side]["iops"].as_f64().unwrap()
}

pub fn exports(bench: &Bench) {
    let (image, socket) = (bench.at("export.qcow2"), bench.at("nbd"));
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let theirs = |kind: &str, depth: u32, requests: u32, file: &str| {
        let _ = std::fs::remove_file(&socket);
        let more = [
            "--nbd-server".to_owned(),
            format!("addr.type=unix,addr.path={}", socket.display()),
            "--export".to_owned(),
            "nbd,id=e,node-name=disk,name=disk,writable=on".to_owned(),
        ];
        let daemon = Daemon::start(bench, &image, file, &more);
        let mut seconds = 0.0;
        let cost = Cost::of(|| daemon.cpu(), || seconds = fio(&uri, kind, depth, requests));
        Cost { seconds, ..cost }
    };
    let ours = |kind: &str, depth: u32, requests: u32, direct: bool| {
        let _ = std::fs::remove_file(&socket);
        let server = Server::new();
        let disk = OpenOptions::new(Format::Qcow2).direct(direct).open(&image).unwrap();
        let (name, description) = ("disk".to_owned(), String::new());
        server.add_export(Export { name, description, disk, read_only: false }).unwrap();
        server.listen_unix(&socket).unwrap();
        let mut seconds = 0.0;
        let cost = Cost::own(|| seconds = fio(&uri, kind, depth, requests));
        Cost { seconds, ..cost }
    };
    for kind in ["randread", "randwrite"] {
        let requests = 100_000;
        bench.measured(&format!("NBD {kind} 4k qd32"), requests.into(), "op/s", |round| {
            if round == 0 {
                full(Format::Qcow2)(&image);
            }
            (theirs(kind, 32, requests, ""), ours(kind, 32, requests, false))
        });
    }
    // Without the page cache: storage answers late if it is no memory.
    for kind in ["randread", "randwrite"] {
        for (depth, requests) in [(1, 5000), (4, 20_000), (32, 20_000)] {
            for aio in ["native", "io_uring"] {
                let name = format!("NBD {kind} 4k qd{depth}, direct, {aio}");
                let file = format!(",cache.direct=on,file.cache.direct=on,file.aio={aio}");
                bench.measured(&name, requests.into(), "op/s", |_| {
                    if !image.exists() {
                        full(Format::Qcow2)(&image);
                    }
                    (theirs(kind, depth, requests, &file), ours(kind, depth, requests, true))
                });
            }
        }
    }
}
