//! Runs `nacre-blk` and `qemu-storage-daemon` as vhost-user-blk back-ends of the same image, with the same driver, and
//! prints both rates, their ratio and the ratio of the processor times that the back-ends took.
//!
//! `cargo bench -p daemons --bench vhost_blk [-- NAME...]` runs the cases whose names contain a NAME. The image lives in
//! `/dev/shm` (1 GiB); both sides take turns, and the best of three rounds counts.
//!
//! `NACRE_BENCH_DIRECT=PATH` adds cases without the page cache, on the first GiB of a raw image on a disk, which has to
//! be written and is overwritten. Few requests each: disks may be limited after a burst.

#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

#[path = "../tests/vhost_driver/mod.rs"]
mod vhost_driver;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blockfmt::{CreateOptions, Format, OpenOptions};
use vhost_driver::{DATA, Driver, Guest, PAGE, SLOTS, WRITE};

const SIZE: u64 = 1 << 30;
const REQUESTS: u64 = 200_000;
/// Requests of a case that waits for each.
const SINGLE_REQUESTS: u64 = 20_000;
/// Requests of a case without the page cache.
const DIRECT_REQUESTS: u64 = 20_000;
const ROUNDS: usize = 3;

/// A back-end, ended with this.
struct Backend(Child);

impl Backend {
    fn start(command: &mut Command, socket: &Path) -> Self {
        let _ = std::fs::remove_file(socket);
        let program = command.get_program().to_owned();
        let child = command.stdout(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|e| panic!("cannot run {program:?} ({e}); install qemu-utils"));
        let mut backend = Backend(child);
        while !socket.exists() {
            assert!(backend.0.try_wait().unwrap().is_none(), "{program:?} ended");
            std::thread::sleep(Duration::from_millis(2));
        }
        backend
    }

    /// Processor time so far, in seconds.
    fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks = |n: usize| fields[n].parse::<f64>().unwrap();
        (ticks(11) + ticks(12)) / 100.0
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a driver does: `requests` of pages in a scattered order, `depth` at a time.
#[derive(Clone, Copy)]
struct Load {
    write: bool,
    depth: u16,
    requests: u64,
}

/// Returns the seconds that a load took.
fn load(driver: &Driver, guest: &mut Guest, Load { write, depth, requests }: Load) -> f64 {
    let start = Instant::now();
    let mut free: Vec<u16> = (0..depth).collect();
    let (mut begun, mut seen) = (0, guest.used(0));
    while begun < requests || free.len() < usize::from(depth) {
        let before = begun;
        while begun < requests
            && let Some(slot) = free.pop()
        {
            let page = begun.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            let sector = page % (SIZE / PAGE) * (PAGE / 512);
            let data = (DATA + u64::from(slot) * PAGE, PAGE as u32);
            guest.submit_in(0, slot, (u32::from(write), sector), data, if write { 0 } else { WRITE });
            begun += 1;
        }
        if begun > before && guest.wants_kick(0) {
            driver.kicks[0].write(1).unwrap();
        }
        while seen == guest.used(0) {
            driver.wait(0);
        }
        while seen != guest.used(0) {
            let slot = guest.done(0, seen);
            assert_eq!(guest.status(0, slot), 0, "a request failed");
            free.push(slot);
            seen = seen.wrapping_add(1);
        }
    }
    start.elapsed().as_secs_f64()
}

/// Seconds, and seconds of processors, of a load on a back-end. With a record of requests in flight they end in any
/// order, as QEMU's always do.
fn cost(command: &mut Command, socket: &Path, recorded: bool, what: Load) -> (f64, f64) {
    let backend = Backend::start(command, socket);
    let mut guest = Guest::new();
    let driver = match recorded {
        true => Driver::connect_with_record(socket, &mut guest),
        false => Driver::connect(socket, &guest, false),
    };
    let before = backend.cpu();
    let seconds = load(&driver, &mut guest, what);
    (seconds, backend.cpu() - before)
}

/// An image, and the socket on which it is exported.
struct Bench<'a> {
    filters: Vec<String>,
    image: &'a Path,
    format: &'a str,
    socket: &'a Path,
}

impl Bench<'_> {
    fn ours(&self, options: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nacre-blk"));
        let (image, socket) = (self.image.display(), self.socket.display());
        let export =
            format!("name=disk,path={image},format={},vhost={socket},queues=2{options}", self.format);
        command.args(["--export", &export]);
        command
    }

    fn theirs(&self, options: &str) -> Command {
        let mut command = Command::new("qemu-storage-daemon");
        let (image, socket) = (self.image.display(), self.socket.display());
        let disk = format!("{},node-name=disk,file.driver=file,file.filename={image}{options}", self.format);
        let export = "vhost-user-blk,id=e,node-name=disk,writable=on,num-queues=2,addr.type=unix";
        command.args(["--blockdev", &disk, "--export", &format!("{export},addr.path={socket}")]);
        command
    }

    /// Compares both with a load.
    fn compare(&self, name: &str, ours: &str, theirs: &str, recorded: bool, what: Load) {
        if !self.filters.is_empty() && !self.filters.iter().any(|filter| name.contains(filter.as_str())) {
            return;
        }
        let mut best = [(f64::MAX, f64::MAX); 2];
        for _ in 0..ROUNDS {
            let costs = [
                cost(&mut self.theirs(theirs), self.socket, false, what),
                cost(&mut self.ours(ours), self.socket, recorded, what),
            ];
            for (best, cost) in best.iter_mut().zip(costs) {
                *best = (best.0.min(cost.0), best.1.min(cost.1));
            }
        }
        let [theirs, ours] = best;
        let rate = |seconds: f64| what.requests as f64 / seconds;
        println!(
            "{name:<56} QEMU {:>8.0} op/s  here {:>8.0} op/s  ratio {:>5.2}  by CPU time {:>5.2}",
            rate(theirs.0),
            rate(ours.0),
            theirs.0 / ours.0,
            theirs.1 / ours.1
        );
    }
}

/// Whether the storage daemon was built with an engine.
fn has_engine(image: &Path, engine: &str) -> bool {
    let disk =
        format!("file,node-name=disk,read-only=on,aio={engine},cache.direct=on,filename={}", image.display());
    // It would run until it is told to end: a second node of the same name ends it after the first one was opened.
    let arguments = ["--blockdev", &disk, "--blockdev", "null-co,node-name=disk"];
    let run = Command::new("qemu-storage-daemon").args(arguments).output().unwrap();
    !String::from_utf8_lossy(&run.stderr).contains(engine)
}

fn main() {
    let filters: Vec<_> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (image, socket) = (dir.path().join("disk.qcow2"), dir.path().join("vhost"));
    CreateOptions::new(Format::Qcow2, SIZE).create(&image).unwrap();
    let disk = OpenOptions::new(Format::Qcow2).open(&image).unwrap();
    for offset in (0..SIZE).step_by(1 << 20) {
        disk.write_at(&[(offset >> 20) as u8 | 1; 1 << 20], offset).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    let bench = Bench { filters: filters.clone(), image: &image, format: "qcow2", socket: &socket };
    let native = ",cache.direct=on,file.cache.direct=on,file.aio=native";
    for (write, kind) in [(false, "read"), (true, "overwrite")] {
        for depth in [1, SLOTS] {
            for (options, mode) in [("", "threads"), (native, "native")] {
                let name = format!("random {kind} 4k qd{depth}, QEMU with aio={mode}");
                let requests = if depth == 1 { SINGLE_REQUESTS } else { REQUESTS };
                bench.compare(&name, "", options, false, Load { write, depth, requests });
            }
        }
    }
    let Some(image) = std::env::var_os("NACRE_BENCH_DIRECT").map(PathBuf::from) else {
        println!(
            "Cases without the page cache are left out: set NACRE_BENCH_DIRECT to a raw image on a disk"
        );
        return;
    };
    let bench = Bench { filters, image: &image, format: "raw", socket: &socket };
    let engines = ["threads", "native", "io_uring"].into_iter().filter(|engine| has_engine(&image, engine));
    let engines: Vec<_> = engines.collect();
    for (write, kind) in [(false, "read"), (true, "overwrite")] {
        for depth in [1, 4, SLOTS] {
            for engine in &engines {
                let options = format!(",cache.direct=on,file.cache.direct=on,file.aio={engine}");
                let name = format!("direct random {kind} 4k qd{depth}, QEMU with aio={engine}");
                let what = Load { write, depth, requests: DIRECT_REQUESTS };
                bench.compare(&name, ",direct", &options, true, what);
            }
        }
    }
}
