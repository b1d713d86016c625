//! From the start of a VMM's process to the first byte that its guest prints on the serial port; the VMM's memory at
//! that moment, with one disk and one network card configured; and the processor time of a port exit. `nacre run` side by side
//! with every other VMM on this host.
//!
//!     tests/bench/first-byte [--runs N] [--accel kvm|soft]
//!
//! builds `nacre` and runs this. `KVM alone` is a program of nothing but the calls that KVM needs: what it takes is the
//! host's, and only what is above it can be a VMM's. The others are QEMU's microvm (Debian package qemu-system-x86), and Firecracker and
//! Cloud Hypervisor where they are on the PATH.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[path = "floor/mod.rs"]
mod floor;
#[path = "../tests/guests/mod.rs"]
mod guests;

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Port writes of the second guest.
const EXITS: u32 = 100_000;
const PATIENCE: Duration = Duration::from_secs(20);
/// The argument that makes this program the floor.
const FLOOR: &str = "--floor";

struct Options {
    nacre: PathBuf,
    accel: String,
    runs: usize,
}

/// What one run showed.
struct Run {
    time: Duration,
    /// Processor time of all its threads.
    cpu: Duration,
    resident_kib: u64,
    private_kib: u64,
}

/// A VMM with what its runs showed.
struct Measured {
    name: &'static str,
    start: Start,
    quick: Vec<Run>,
    exits: Vec<Run>,
    failure: Option<String>,
}

/// A VMM's row of the table.
struct Row {
    first_byte_ms: f64,
    cpu_ms: f64,
    resident_mib: f64,
    private_mib: f64,
    exit_us: f64,
}

/// Files that the VMMs are given.
struct Files {
    dir: tempfile::TempDir,
    _switch: UnixListener,
}

impl Files {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::File::create(dir.path().join("disk.raw")).unwrap().set_len(64 << 20).unwrap();
        fs::write(dir.path().join("quick"), guests::first_byte(0)).unwrap();
        fs::write(dir.path().join("exits"), guests::first_byte(EXITS)).unwrap();
        // The other end of the network card: connections wait in its queue.
        let switch = UnixListener::bind(dir.path().join("net")).unwrap();
        Self { dir, _switch: switch }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }
}

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// The VMMs on this host: a name, and how to start each with a kernel.
type Start = Box<dyn Fn(&str) -> Command>;

fn vmms(options: &Options, files: &Files) -> Vec<(&'static str, Start)> {
    fn command(program: impl AsRef<OsStr>, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments);
        command
    }
    let disk = files.path("disk.raw");
    let net = files.path("net");
    let (nacre, accel) = (options.nacre.clone(), options.accel.clone());
    let mut vmms: Vec<(&str, Start)> = Vec::new();
    {
        let disk = format!("path={disk},format=raw");
        let net = format!("unix={net}");
        vmms.push((
            "nacre",
            Box::new(move |kernel| {
                let arguments = ["run", "--accel", &accel, "--memory", "128M", "--kernel", kernel];
                let mut command = command(&nacre, &arguments);
                command.args(["--disk", &disk, "--net", &net, "--console", "stdio"]);
                command
            }),
        ));
    }
    if options.accel == "kvm" {
        let me = std::env::current_exe().unwrap();
        vmms.push(("KVM alone", Box::new(move |kernel| command(&me, &[FLOOR, kernel]))));
    }
    if on_path("qemu-system-x86_64") {
        let accel = if options.accel == "soft" { "tcg" } else { "kvm" };
        let disk = format!("if=none,id=disk,format=raw,file={disk}");
        let net = format!("stream,id=net,server=off,addr.type=unix,addr.path={net}");
        vmms.push((
            "qemu microvm",
            Box::new(move |kernel| {
                let machine = ["-M", "microvm,pit=off,pic=off,rtc=off", "-accel", accel, "-m", "128"];
                let mut command = command("qemu-system-x86_64", &machine);
                command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
                command.args(["-drive", &disk, "-device", "virtio-blk-device,drive=disk"]);
                command.args(["-netdev", &net, "-device", "virtio-net-device,netdev=net", "-kernel", kernel]);
                command
            }),
        ));
    }
    if options.accel == "kvm" && on_path("cloud-hypervisor") {
        let disk = format!("path={disk},image_type=raw");
        vmms.push((
            "cloud-hypervisor",
            Box::new(move |kernel| {
                let arguments =
                    ["--cpus", "boot=1", "--memory", "size=128M", "--serial", "tty", "--console", "off"];
                let mut command = command("cloud-hypervisor", &arguments);
                command.args(["--disk", &disk, "--net", "tap=", "--kernel", kernel]);
                command
            }),
        ));
    }
    if options.accel == "kvm" && on_path("firecracker") {
        let config = files.path("firecracker.json");
        vmms.push((
            "firecracker (no card)",
            Box::new(move |kernel| {
                let json = format!(
                    r#"{{"boot-source":{{"kernel_image_path":"{kernel}"}},
                        "drives":[{{"drive_id":"disk","path_on_host":"{disk}","is_root_device":false,
                                    "is_read_only":false}}],
                        "machine-config":{{"vcpu_count":1,"mem_size_mib":128}}}}"#
                );
                fs::write(&config, json).unwrap();
                command("firecracker", &["--no-api", "--config-file", &config])
            }),
        ));
    }
    vmms
}

/// Ends the process when the measurement is over, whatever way it goes.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn measure(mut command: Command) -> Result<Run, String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = Killed(command.spawn().map_err(|e| e.to_string())?);
    let mut output = child.0.stdout.take().unwrap();
    let watchdog = Watchdog::new(child.0.id());
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let n = output.read(&mut buffer).map_err(|e| e.to_string())?;
        let time = start.elapsed();
        if n == 0 {
            let mut errors = String::new();
            child.0.stderr.take().unwrap().read_to_string(&mut errors).map_err(|e| e.to_string())?;
            return Err(format!("ended without the byte: {}", errors.trim()));
        }
        seen.extend_from_slice(&buffer[..n]);
        // Firmware may print before the guest does.
        if seen.ends_with(b"A") {
            let cpu = cpu_of(child.0.id())?;
            let (resident_kib, private_kib) = memory_of(child.0.id())?;
            drop(watchdog);
            return Ok(Run { time, cpu, resident_kib, private_kib });
        }
    }
}

/// Kills a VMM whose guest prints nothing: its output ends then.
struct Watchdog {
    cancel: Option<std::sync::mpsc::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watchdog {
    fn new(pid: u32) -> Self {
        let (cancel, cancelled) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            if cancelled.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                // SAFETY: the child is not reaped before this thread is joined.
                unsafe { libc::kill(pid as i32, libc::SIGKILL) };
            }
        });
        Self { cancel: Some(cancel), thread: Some(thread) }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.cancel = None;
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// Processor time of all threads, those that have ended as well.
fn cpu_of(pid: u32) -> Result<Duration, String> {
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: the calls write one value each.
    let failed = unsafe {
        libc::clock_getcpuclockid(pid as i32, &raw mut clock) != 0
            || libc::clock_gettime(clock, &raw mut time) != 0
    };
    if failed {
        return Err("its processor time cannot be read".into());
    }
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// Resident and private memory in KiB.
fn memory_of(pid: u32) -> Result<(u64, u64), String> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).map_err(|e| e.to_string())?;
    let sum = |prefix: &str| {
        let lines = rollup.lines().filter(|line| line.starts_with(prefix));
        lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
    };
    Ok((sum("Rss:"), sum("Private_")))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl Measured {
    /// One run with each guest.
    fn measure(&mut self, files: &Files) {
        if self.failure.is_some() {
            return;
        }
        for (guest, runs) in [("quick", &mut self.quick), ("exits", &mut self.exits)] {
            match measure((self.start)(&files.path(guest))) {
                Ok(run) => runs.push(run),
                Err(error) => self.failure = Some(error),
            }
        }
    }

    fn row(&self) -> Row {
        let ms = |runs: &[Run], what: fn(&Run) -> Duration| {
            median(runs.iter().map(|r| what(r).as_secs_f64() * 1e3).collect())
        };
        let mib = |kib: fn(&Run) -> u64| median(self.quick.iter().map(|r| kib(r) as f64 / 1024.0).collect());
        let cpu_ms = ms(&self.quick, |r| r.cpu);
        Row {
            first_byte_ms: ms(&self.quick, |r| r.time),
            cpu_ms,
            resident_mib: mib(|r| r.resident_kib),
            private_mib: mib(|r| r.private_kib),
            exit_us: (ms(&self.exits, |r| r.cpu) - cpu_ms) * 1e3 / f64::from(EXITS),
        }
    }
}

fn options() -> Result<Options, String> {
    let mut options = Options { nacre: PathBuf::from("nacre"), accel: "kvm".into(), runs: 10 };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--nacre" => options.nacre = value()?.into(),
            "--accel" => options.accel = value()?,
            "--runs" => {
                options.runs =
                    value()?.parse().ok().filter(|&n| n > 0).ok_or("--runs needs a number above 0")?;
            }
            // Cargo says this to every benchmark.
            "--bench" => {}
            other => return Err(format!("unknown argument {other}")),
        }
    }
    if options.nacre.components().count() > 1 && !Path::new(&options.nacre).is_file() {
        let nacre = options.nacre.display();
        return Err(format!("{nacre} is missing; build it with: cargo build --release -p daemons"));
    }
    Ok(options)
}

fn main() -> Result<(), String> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == FLOOR) {
        floor::run(Path::new(&arguments.next().unwrap()));
    }
    let options = options()?;
    let files = Files::new();
    let mut all: Vec<Measured> = vmms(&options, &files)
        .into_iter()
        .map(|(name, start)| Measured { name, start, quick: Vec::new(), exits: Vec::new(), failure: None })
        .collect();
    // In turns: what else the host does meanwhile is the same for all.
    for _ in 0..options.runs {
        all.iter_mut().for_each(|vmm| vmm.measure(&files));
    }
    println!(
        "{:<22} {:>13} {:>8} {:>13} {:>12} {:>12}   ours/theirs: byte, cpu, rss, private, exit",
        "vmm", "first byte ms", "cpu ms", "resident MiB", "private MiB", "exit cpu us"
    );
    let mut ours: Option<Row> = None;
    for vmm in &all {
        let name = vmm.name;
        if let Some(error) = &vmm.failure {
            println!("{name:<22} failed: {error}");
            if name == "nacre" {
                return Err("nacre failed".into());
            }
            continue;
        }
        let row = vmm.row();
        let Row { first_byte_ms: byte, cpu_ms: cpu, resident_mib: rss, private_mib: private, exit_us: exit } =
            row;
        print!("{name:<22} {byte:>13.2} {cpu:>8.2} {rss:>13.2} {private:>12.2} {exit:>12.2}");
        match &ours {
            Some(o) => println!(
                "   {:.2} {:.2} {:.2} {:.2} {:.2}",
                o.first_byte_ms / byte,
                o.cpu_ms / cpu,
                o.resident_mib / rss,
                o.private_mib / private,
                o.exit_us / exit
            ),
            None => println!(),
        }
        ours = ours.or(Some(row));
    }
    Ok(())
}
