//! What the system calls cost that a case cannot do without.

use super::{ALIGN, Bench, Cost, Load, ROUNDS, SIZE, full};
use blockfmt::Format;
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

/// Makes the calls of a load on a plain file, one after the other.
pub fn calls(bench: &Bench, name: &str, load: Load) {
    let mut bytes = vec![65; load.size as usize];
    let prepare = |path: &Path| full(Format::Raw)(path);
    floor_of(bench, name, load.count as f64, "op/s", prepare, |file| {
        for i in 0..load.count {
            match load.write {
                true => file.write_all_at(&bytes, load.offset(i)).unwrap(),
                false => file.read_exact_at(&mut bytes, load.offset(i)).unwrap(),
            }
        }
    });
}

/// Writes the first page of every cluster of a new file, and lets the kernel copy the rest of the cluster from the same
/// place of another.
pub fn completed_writes(bench: &Bench, name: &str, base: &Path) {
    let page = vec![65; ALIGN];
    floor(bench, name, (SIZE / CLUSTER) as f64, "op/s", |out| {
        let base = File::open(base).unwrap();
        for offset in (0..SIZE).step_by(CLUSTER as usize) {
            out.write_all_at(&page, offset).unwrap();
            copy(&base, out, offset + ALIGN as u64, CLUSTER as usize - ALIGN);
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
        for offset in (0..SIZE).step_by(PIECE as usize) {
            copy(&source, out, offset, PIECE as usize);
        }
    });
}

/// Lets the kernel copy a range to the same place of another file.
fn copy(source: &File, out: &File, offset: u64, len: usize) {
    let (mut from, mut to) = (offset as i64, offset as i64);
    let end = from + len as i64;
    while from < end {
        // SAFETY: both files are open, and the offsets are writable for the duration of the call.
        let copied = unsafe {
            let (input, output) = (source.as_raw_fd(), out.as_raw_fd());
            libc::copy_file_range(input, &raw mut from, output, &raw mut to, (end - from) as usize, 0)
        };
        assert!(copied > 0, "copy_file_range copied {copied} bytes");
    }
}

/// Prints the best of what `run` reaches with a new file.
fn floor(bench: &Bench, name: &str, amount: f64, unit: &str, run: impl FnMut(&File)) {
    let prepare = |path: &Path| {
        let _ = std::fs::remove_file(path);
        File::create_new(path).unwrap();
    };
    floor_of(bench, name, amount, unit, prepare, run);
}

/// [`floor`] with a file that `prepare` makes each time.
fn floor_of(
    bench: &Bench,
    name: &str,
    amount: f64,
    unit: &str,
    prepare: impl Fn(&Path),
    mut run: impl FnMut(&File),
) {
    if !bench.wanted(name) {
        return;
    }
    let path = bench.at("floor");
    let costs = [(); ROUNDS].map(|()| {
        prepare(&path);
        let out = File::options().read(true).write(true).open(&path).unwrap();
        Cost::own(|| run(&out))
    });
    bench.remove(&["floor"]);
    let best = |cost: &dyn Fn(&Cost) -> f64| costs.iter().map(cost).fold(f64::MAX, f64::min);
    let (seconds, cpu) = (best(&|c| c.seconds), best(&|c| c.cpu));
    let rate = |seconds: f64| amount / seconds;
    println!("  floor: {name:<50} {:>8.0} {unit}  by CPU time {:>8.0} {unit}", rate(seconds), rate(cpu));
}
