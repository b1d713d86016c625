//! What the system calls cost that a case cannot do without.

use super::{Bench, Cost, ROUNDS, SIZE};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a cluster, of which each has a request.
const CLUSTER: u64 = 65536;
/// What two threads of a copy move at once.
const PIECE: u64 = 512 << 10;

/// Writes the first `size` bytes of every cluster of a new file, one call each.
pub fn writes(bench: &Bench, name: &str, size: usize) {
    let bytes = vec![65; size];
    floor(bench, name, (SIZE / CLUSTER) as f64, "op/s", |out| {
        for offset in (0..SIZE).step_by(CLUSTER as usize) {
            out.write_all_at(&bytes, offset).unwrap();
        }
    });
}

/// Reads every byte of a file and writes it to a new one, on two threads.
pub fn reads_and_writes(bench: &Bench, name: &str, source: &Path) {
    floor(bench, name, SIZE as f64 / 1e6, "MB/s", |out| {
        let (source, next) = (File::open(source).unwrap(), AtomicU64::new(0));
        let copy = || {
            let mut bytes = vec![0; PIECE as usize];
            loop {
                let offset = next.fetch_add(PIECE, Ordering::Relaxed);
                if offset >= SIZE {
                    return;
                }
                source.read_exact_at(&mut bytes, offset).unwrap();
                out.write_all_at(&bytes, offset).unwrap();
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(copy);
            copy();
        });
    });
}

/// Lets the kernel copy every byte of a file to a new one.
pub fn copies(bench: &Bench, name: &str, source: &Path) {
    floor(bench, name, SIZE as f64 / 1e6, "MB/s", |out| {
        let source = File::open(source).unwrap();
        let mut at = 0i64;
        while at < SIZE as i64 {
            let (mut from, mut to) = (at, at);
            // SAFETY: both files are open, and the offsets are writable for the duration of the call.
            let copied = unsafe {
                let (input, output) = (source.as_raw_fd(), out.as_raw_fd());
                libc::copy_file_range(input, &raw mut from, output, &raw mut to, PIECE as usize, 0)
            };
            assert!(copied > 0, "copy_file_range copied {copied} bytes");
            at += copied as i64;
        }
    });
}

/// Prints the best of what `run` reaches with a new file.
fn floor(bench: &Bench, name: &str, amount: f64, unit: &str, run: impl Fn(&File)) {
    if !bench.wanted(name) {
        return;
    }
    let path = bench.at("floor");
    let costs = [(); ROUNDS].map(|()| {
        let _ = std::fs::remove_file(&path);
        let out = File::create_new(&path).unwrap();
        Cost::own(|| run(&out))
    });
    bench.remove(&["floor"]);
    let best = |cost: &dyn Fn(&Cost) -> f64| costs.iter().map(cost).fold(f64::MAX, f64::min);
    let (seconds, cpu) = (best(&|c| c.seconds), best(&|c| c.cpu));
    let rate = |seconds: f64| amount / seconds;
    println!("  floor: {name:<50} {:>8.0} {unit}  by CPU time {:>8.0} {unit}", rate(seconds), rate(cpu));
}
