//! Lock acquisition, release and hand-over beside sanlock and etcd on one disk; see `--help`.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on ends")]

#[path = "../tests/etcd_server/mod.rs"]
mod etcd_server;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Parser;
use cluster::adapters::{LeaseDisk, LeaseVolume};
use cluster::keeper::{KeeperConfig, LeaseKeeper, Lock, Resource};
use cluster::lease::Timing;
use cluster::lock::LockMode;
use cluster::ondisk::{Geometry, Name};
use cluster::store::{EtcdStore, Store};
use cluster::types::{HostId, Incarnation};

/// Measure locks beside sanlock and etcd on one disk, in turns.
#[derive(Parser)]
#[command(after_help = "\
Ours: two lease keepers in this process. sanlock: `sanlock direct` on a lease of its own, whose program start
(measured in the same turn) is taken off. etcd: one member; a lease is granted and a key bound to it by a
transaction, then the lease is revoked. A hand-over makes another client the owner: ours names the new owner in one
step and then takes the lock there; the peers' is a release followed by an acquisition, sanlock's by the same host,
since `sanlock direct` cannot take what another host had.

What they wait for: ours writes through to the disk three times, one after the other, to take a lock (two phases of
Disk Paxos and the leader record) and twice to give it back; etcd appends to its log twice (lease, transaction) and once.
On a file in memory (--dir /dev/shm) only the programs are compared.

Needs the Debian packages sanlock and etcd-server.

Examples:
  cargo run --release -p cluster --features etcd --example lock_bench
  cargo run --release -p cluster --features etcd --example lock_bench -- --dir /mnt/shared --rounds 500 --hosts 16")]
struct Args {
    /// Where all three keep their files; the disk that is measured.
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
    /// How often each operation is measured.
    #[arg(long, value_name = "N", default_value_t = 100)]
    rounds: usize,
    /// How many hosts' blocks ours reads; sanlock reads those of 2000.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    hosts: u16,
}

/// The times of one side.
#[derive(Default)]
struct Times {
    acquire: Vec<f64>,
    release: Vec<f64>,
    hand_over: Vec<f64>,
}

fn timed<T>(times: &mut Vec<f64>, action: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = action();
    times.push(start.elapsed().as_secs_f64() * 1000.0);
    result
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn name(s: &str) -> Name {
    Name::new(s).unwrap()
}

const DISK: u32 = 0;
const PATIENCE: Duration = Duration::from_secs(60);

fn format(path: &Path) {
    std::fs::File::create(path).unwrap().set_len(4 << 20).unwrap();
    let volume = LeaseVolume::new(LeaseDisk::open(path, Geometry::S512).unwrap(), name("SPACE"), 0);
    volume.format_space(1).unwrap();
    volume.format_resource(DISK, name("disk")).unwrap();
}

struct Ours([LeaseKeeper; 2]);

impl Ours {
    fn start(path: &Path, hosts: u16) -> Self {
        format(path);
        let keepers = [1u16, 2].map(|host| {
            let timing = Timing { io_timeout: 1, watchdog: 10 };
            let config = KeeperConfig::new(path, name("SPACE"), HostId(host), name(&format!("host-{host}")));
            LeaseKeeper::open(KeeperConfig { timing, hosts, ..config }).unwrap()
        });
        for keeper in &keepers {
            keeper.wait_held(PATIENCE).unwrap();
        }
        Ours(keepers)
    }

    fn lock(&self, host: usize) -> Lock {
        let disk = Resource { index: DISK, name: name("disk") };
        self.0[host].lock(disk, LockMode::Exclusive, PATIENCE).unwrap()
    }

    fn turn(&self, times: &mut Times) {
        let lock = timed(&mut times.acquire, || self.lock(0));
        timed(&mut times.release, || lock.release().unwrap());
        let lock = self.lock(0);
        let moved = timed(&mut times.hand_over, || {
            lock.hand_over(HostId(2)).unwrap();
            self.lock(1)
        });
        moved.release().unwrap();
    }
}

struct Sanlock {
    resource: String,
}

impl Sanlock {
    fn start(path: &Path) -> Self {
        format(path);
        Sanlock { resource: format!("SPACE:disk:{}:{}", path.display(), 1 << 20) }
    }

    fn run(args: &[&str]) {
        let mut command = Command::new("sanlock");
        let out =
            command.args(args).output().expect("sanlock is missing: install the Debian package sanlock");
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && !text.contains("done -"), "sanlock {args:?}: {text}");
    }

    fn direct(&self, action: &str) {
        Sanlock::run(&["direct", action, "-i", "1", "-g", "1", "-r", &self.resource]);
    }

    fn turn(&self, times: &mut Times) {
        let mut starts = Vec::new();
        timed(&mut starts, || Sanlock::run(&["version"]));
        let start = starts[0];
        let measure = |list: &mut Vec<f64>, programs: f64, action: &dyn Fn()| {
            timed(list, action);
            if let Some(last) = list.last_mut() {
                *last = (*last - programs * start).max(0.0);
            }
        };
        measure(&mut times.acquire, 1.0, &|| self.direct("acquire"));
        measure(&mut times.release, 1.0, &|| self.direct("release"));
        self.direct("acquire");
        measure(&mut times.hand_over, 2.0, &|| {
            self.direct("release");
            self.direct("acquire");
        });
        self.direct("release");
    }
}

struct Etcd {
    _server: etcd_server::Server,
    stores: [EtcdStore; 2],
}

impl Etcd {
    fn start(dir: &Path) -> Self {
        let server = etcd_server::Server::start(dir);
        let stores = [(); 2].map(|()| server.connect("/bench"));
        Etcd { _server: server, stores }
    }

    fn acquire(&mut self, host: usize) -> u64 {
        let store = &mut self.stores[host];
        let me = Incarnation { host: HostId(host as u16 + 1), generation: 1 };
        let lease = store.grant(60_000).unwrap();
        let holder = store.campaign(me, lease).unwrap().unwrap();
        assert_eq!(holder.host, me);
        lease
    }

    fn turn(&mut self, times: &mut Times) {
        let lease = timed(&mut times.acquire, || self.acquire(0));
        timed(&mut times.release, || self.stores[0].resign(lease).unwrap());
        let lease = self.acquire(0);
        let lease = timed(&mut times.hand_over, || {
            self.stores[0].resign(lease).unwrap();
            self.acquire(1)
        });
        self.stores[1].resign(lease).unwrap();
    }
}

fn main() {
    let args = Args::parse();
    let dir = tempfile::tempdir_in(&args.dir).unwrap();
    let ours = Ours::start(&dir.path().join("ours"), args.hosts);
    let sanlock = Sanlock::start(&dir.path().join("sanlock"));
    let mut etcd = Etcd::start(&dir.path().join("etcd"));
    let [mut a, mut b, mut c] = [(); 3].map(|()| Times::default());
    for _ in 0..args.rounds {
        ours.turn(&mut a);
        sanlock.turn(&mut b);
        etcd.turn(&mut c);
    }
    println!(
        "median of {} in {}, ms        ours  sanlock     etcd  sanlock/ours  etcd/ours",
        args.rounds,
        args.dir.display()
    );
    for (what, times) in [
        ("acquire", [&a.acquire, &b.acquire, &c.acquire]),
        ("release", [&a.release, &b.release, &c.release]),
        ("hand over", [&a.hand_over, &b.hand_over, &c.hand_over]),
    ] {
        let [a, b, c] = times.map(|t| median(t));
        println!("{what:<28}{a:8.2} {b:8.2} {c:8.2} {:13.2} {:10.2}", b / a, c / a);
    }
}
