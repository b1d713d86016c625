//! Runs `qemu-img bench` and this crate on equal images and prints both rates and their ratio.
//!
//! `cargo bench -p blockfmt --bench qemu [-- NAME...]` runs the cases whose names contain a NAME. Images
//! live in `/dev/shm` (1 GiB each); set `NACRE_BENCH_DIR` to measure another file system. Both sides take
//! turns; the best of three rounds counts, and the ratio of processor times tells on a busy machine.
//!
//! Rows that begin with `floor` are what the bare system calls reach that the row above them cannot do without: no
//! program that fills the same pages in the same number of files is faster.

#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

mod floor;
mod jobs;
mod queue;

use blockfmt::format::qcow2::Qcow2Options;
use blockfmt::{CreateOptions, Disk, Format, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const SIZE: u64 = 1 << 30;
/// A step that visits the disk in a scattered order.
const SCATTER: u64 = 410_136_576;
const ROUNDS: usize = 3;
/// Alignment of memory for direct I/O.
const ALIGN: usize = 4096;

struct Bench {
    dir: PathBuf,
    filters: Vec<String>,
}

#[derive(Clone, Copy)]
struct Load {
    write: bool,
    count: u64,
    size: u64,
    step: u64,
    depth: u32,
    threads: u64,
}

impl Load {
    /// Where request `i` begins.
    fn offset(&self, i: u64) -> u64 {
        i * self.step % (SIZE - self.size + 1) / self.size * self.size
    }
}

impl Bench {
    fn at(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Removes images that are not needed any more: they may lie in memory.
    fn remove(&self, names: &[&str]) {
        for name in names {
            let _ = std::fs::remove_file(self.at(name)); // its case may have been left out
        }
    }

    fn wanted(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|f| name.contains(f.as_str()))
    }

    /// Measures one load on images that `prepare` makes, QEMU first.
    fn case(&self, name: &str, load: Load, format: Format, prepare: impl Fn(&Path)) {
        self.case_of(name, load, format, &prepare, &prepare);
    }

    /// [`case`](Self::case) on images that are made differently for both sides, if the load writes.
    fn case_of(
        &self,
        name: &str,
        load: Load,
        format: Format,
        prepare_theirs: impl Fn(&Path),
        prepare_ours: impl Fn(&Path),
    ) {
        let path = self.at("bench.img");
        self.measured(name, load.count as f64, "op/s", |round| {
            if round == 0 || load.write {
                prepare_theirs(&path);
            }
            // The time without start and end, as the program says.
            let mut seconds = 0.0;
            let cost = Cost::children(|| seconds = qemu_bench(&path, load, format));
            let theirs = Cost { seconds, ..cost };
            if load.write {
                prepare_ours(&path);
            }
            let disk = OpenOptions::new(format).open(&path).unwrap();
            (theirs, Cost::own(|| our_bench(&disk, load)))
        });
        let _ = std::fs::remove_file(&path);
    }

    /// Compares what `run`, which is told the number of the round, costs QEMU and us. The shortest times
    /// and the least processor times of all rounds count.
    fn measured(&self, name: &str, amount: f64, unit: &str, run: impl Fn(usize) -> (Cost, Cost)) {
        self.compared(["QEMU", "here"], name, amount, unit, run);
    }

    /// [`measured`](Self::measured) for two `sides` with these names.
    fn compared(
        &self,
        sides: [&str; 2],
        name: &str,
        amount: f64,
        unit: &str,
        run: impl Fn(usize) -> (Cost, Cost),
    ) {
        if !self.wanted(name) {
            return;
        }
        let costs: Vec<_> = (0..ROUNDS).map(run).collect();
        let best = |cost: &dyn Fn(&(Cost, Cost)) -> f64| costs.iter().map(cost).fold(f64::MAX, f64::min);
        let (first, second) = (best(&|c| c.0.seconds), best(&|c| c.1.seconds));
        let cpu = best(&|c| c.0.cpu) / best(&|c| c.1.cpu);
        println!(
            "{name:<40} {} {:>8.0} {unit}  {} {:>8.0} {unit}  ratio {:>5.2}  by CPU time {cpu:>5.2}",
            sides[0],
            amount / first,
            sides[1],
            amount / second,
            first / second
        );
    }

    /// Compares a command of QEMU's with `ours` on a whole disk. `prepare` is called once, `clear` before each side.
    fn timed(&self, name: &str, prepare: impl Fn(), clear: impl Fn(), theirs: impl Fn(), ours: impl Fn()) {
        self.measured(name, SIZE as f64 / 1e6, "MB/s", |round| {
            if round == 0 {
                prepare();
            }
            clear();
            let theirs = Cost::children(&theirs);
            clear();
            (theirs, Cost::own(&ours))
        });
    }
}

/// What something took.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Seconds on the clock.
    seconds: f64,
    /// Seconds of processors.
    cpu: f64,
}

impl Cost {
    fn of(cpu: impl Fn() -> f64, f: impl FnOnce()) -> Self {
        let (start, before) = (Instant::now(), cpu());
        f();
        Cost { seconds: start.elapsed().as_secs_f64(), cpu: cpu() - before }
    }

    /// The cost of work in this process.
    fn own(f: impl FnOnce()) -> Self {
        Cost::of(|| cpu_time(libc::RUSAGE_SELF), f)
    }

    /// The cost of processes that `f` starts and waits for.
    fn children(f: impl FnOnce()) -> Self {
        Cost::of(|| cpu_time(libc::RUSAGE_CHILDREN), f)
    }
}

fn cpu_time(who: i32) -> f64 {
    // SAFETY: all zeros is a valid value of this plain structure, and the call fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(who, &raw mut usage), 0);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn qemu(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let output = output
        .unwrap_or_else(|e| panic!("cannot run {program} ({e}); install the packages qemu-utils and fio"));
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a load and returns its seconds.
fn qemu_bench(path: &Path, load: Load, format: Format) -> f64 {
    let text = |n: u64| n.to_string();
    let (count, depth, size, step) =
        (text(load.count), text(load.depth.into()), text(load.size), text(load.step));
    let mut args = vec!["bench", "-f", format.name(), "-t", "none", "-i", "native"];
    args.extend(["-c", &count, "-d", &depth, "-s", &size, "-S", &step]);
    if load.write {
        args.extend(["-w", "--pattern=65"]);
    }
    args.push(path.to_str().unwrap());
    let out = qemu("qemu-img", &args);
    let line = out.lines().find(|l| l.starts_with("Run completed")).unwrap();
    let seconds: f64 = line.split_whitespace().nth(3).unwrap().parse().unwrap();
    seconds
}

fn our_bench(disk: &Disk, load: Load) {
    std::thread::scope(|scope| {
        for thread in 0..load.threads {
            scope.spawn(move || {
                let mut memory = vec![65; load.size as usize + ALIGN];
                let start = memory.as_ptr().align_offset(ALIGN);
                let buffer = &mut memory[start..start + load.size as usize];
                let mut i = thread;
                while i < load.count {
                    match load.write {
                        true => disk.write_at(buffer, load.offset(i)).unwrap(),
                        false => disk.read_at(buffer, load.offset(i)).unwrap(),
                    }
                    i += load.threads;
                }
            });
        }
    });
}

fn create(path: &Path, options: CreateOptions) {
    let _ = std::fs::remove_file(path);
    options.create(path).unwrap();
}

/// Writes every byte of a disk.
fn fill(path: &Path, format: Format) {
    let disk = OpenOptions::new(format).open(path).unwrap();
    let mut data = vec![0u8; 1 << 20];
    for (i, word) in data.chunks_mut(8).enumerate() {
        word.copy_from_slice(&(i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    for offset in (0..SIZE).step_by(data.len()) {
        disk.write_at(&data, offset).unwrap();
    }
    disk.close().unwrap();
}

fn full(format: Format) -> impl Fn(&Path) {
    move |path| {
        create(path, CreateOptions::new(format, SIZE));
        fill(path, format);
    }
}

fn main() {
    let filters = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let root = std::env::var_os("NACRE_BENCH_DIR").map_or("/dev/shm".into(), PathBuf::from);
    let dir = root.join(format!("nacre-bench-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let bench = Bench { dir: dir.clone(), filters };
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&bench)));
    std::fs::remove_dir_all(dir).unwrap();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

fn run(bench: &Bench) {
    let read = Load { write: false, count: 300_000, size: 4096, step: SCATTER, depth: 64, threads: 1 };
    let write = Load { write: true, count: 200_000, ..read };
    for format in [Format::Raw, Format::Qcow2] {
        bench.case(&format!("{format} random read qd1"), Load { depth: 1, ..read }, format, full(format));
        bench.case(&format!("{format} random read qd64, 1 thread"), read, format, full(format));
    }
    let two = Load { threads: 2, ..read };
    bench.case("qcow2 random read qd64, 2 threads", two, Format::Qcow2, full(Format::Qcow2));
    floor::calls(bench, "qcow2 random read qd64, 1 thread", read);
    bench.case("qcow2 overwrite qd64, 1 thread", write, Format::Qcow2, full(Format::Qcow2));
    let two = Load { threads: 2, ..write };
    bench.case("qcow2 overwrite qd64, 2 threads", two, Format::Qcow2, full(Format::Qcow2));
    floor::calls(bench, "qcow2 overwrite qd64, 1 thread", write);

    queue::cases(bench);

    let empty = |path: &Path| create(path, CreateOptions::new(Format::Qcow2, SIZE));
    let allocate = Load { write: true, count: SIZE / 65536, size: 4096, step: 65536, ..read };
    bench.case("qcow2 allocate 4k per cluster, 1 thread", allocate, Format::Qcow2, empty);
    bench.case("qcow2 allocate 4k, 2 threads", Load { threads: 2, ..allocate }, Format::Qcow2, empty);
    let sequential = Load { size: 65536, ..allocate };
    bench.case("qcow2 allocate whole clusters", sequential, Format::Qcow2, empty);
    let two = Load { threads: 2, ..sequential };
    bench.case("qcow2 allocate whole clusters, 2 threads", two, Format::Qcow2, empty);

    let base = bench.at("base.qcow2");
    let make_base = || {
        if !base.exists() {
            full(Format::Qcow2)(&base);
        }
    };
    for extended_l2 in [false, true] {
        let child = |path: &Path| {
            make_base();
            let qcow2 = Qcow2Options { extended_l2: Some(extended_l2), ..Qcow2Options::default() };
            let options = CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2);
            create(path, options.backing("base.qcow2", Format::Qcow2));
        };
        let name = if extended_l2 { "copy-on-write child, extended L2" } else { "copy-on-write child" };
        bench.case(name, allocate, Format::Qcow2, child);
        let two = Load { threads: 2, ..allocate };
        bench.case(&format!("{name}, 2 threads"), two, Format::Qcow2, child);
        // A cluster is completed from the base for every request, or a page written if there are subclusters.
        match extended_l2 {
            true => floor::writes(bench, name, 4096),
            false if bench.wanted(name) => floor::completed_writes(bench, name, &base),
            false => {}
        }
    }
    // Not the same image: each side's clone is what its own command makes when no option is given.
    let clone = |path: &Path, qcow2: Qcow2Options| {
        make_base();
        create(
            path,
            CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).backing("base.qcow2", Format::Qcow2),
        );
    };
    for (threads, name) in
        [(1, "UNLIKE images: default clones"), (2, "UNLIKE images: default clones, 2 threads")]
    {
        let load = Load { threads, ..allocate };
        bench.case_of(
            name,
            load,
            Format::Qcow2,
            |path| clone(path, Qcow2Options::default()),
            |path| clone(path, Qcow2Options::default().overlay()),
        );
    }
    for (depth, overlays) in [(8, false), (32, false), (32, true)] {
        let qcow2 = match overlays {
            true => Qcow2Options::default().overlay(),
            false => Qcow2Options::default(),
        };
        let link = |parent: &str| {
            let options = CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2.clone());
            options.backing(parent, Format::Qcow2)
        };
        let chain = |path: &Path| {
            make_base();
            let mut parent = "base.qcow2".to_owned();
            for n in 1..depth {
                let name = format!("link{n}.qcow2");
                create(&bench.at(&name), link(&parent));
                parent = name;
            }
            create(path, link(&parent));
        };
        let name = format!("chain of {depth}{}", if overlays { " with extended L2" } else { "" });
        let reads = Load { count: 100_000, ..read };
        bench.case(&format!("{name}, read qd64"), reads, Format::Qcow2, chain);
        let one = Load { count: 50_000, depth: 1, ..read };
        bench.case(&format!("{name}, read qd1"), one, Format::Qcow2, chain);
    }
    for n in 1..32 {
        bench.remove(&[&format!("link{n}.qcow2")]);
    }
    jobs::conversions(bench);
    bench.remove(&["base.raw", "out"]);
    jobs::chains(bench);
    bench.remove(&["base.qcow2", "top.qcow2", "copy.qcow2"]);
    jobs::exports(bench);
}
