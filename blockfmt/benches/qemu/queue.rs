//! Requests of one thread through a queue, beside calls of one thread, or of one for each of two processors where the
//! queue may hold many. Set `NACRE_BENCH_DIR` to a directory that is not in memory to see what waiting costs.

use super::{ALIGN, Bench, Cost, Load, SCATTER, full, our_bench};
use blockfmt::queue::{Queue, QueueOptions, Request};
use blockfmt::{Disk, Format, Memory, OpenOptions};

pub fn cases(bench: &Bench) {
    let path = bench.at("queue.qcow2");
    for direct in [false, true] {
        for write in [false, true] {
            for depth in [1, 32] {
                let kind = if write { "overwrite" } else { "random read" };
                let cache = if direct { "direct" } else { "cached" };
                let count = if direct { 20_000 } else { 100_000 };
                let load =
                    Load { write, count, size: 4096, step: SCATTER, depth, threads: u64::from(depth).min(2) };
                let name = format!("queue: {cache} {kind} qd{depth}");
                bench.compared(["calls", "queue"], &name, load.count as f64, "op/s", |_| {
                    if !path.exists() {
                        full(Format::Qcow2)(&path);
                    }
                    let disk = OpenOptions::new(Format::Qcow2).direct(direct).open(&path).unwrap();
                    (Cost::own(|| our_bench(&disk, load)), Cost::own(|| queued(&disk, load)))
                });
            }
        }
    }
    bench.remove(&["queue.qcow2"]);
}

fn queued(disk: &Disk, load: Load) {
    let options = QueueOptions { depth: load.depth as u16, ..QueueOptions::default() };
    let mut memory = vec![65u8; load.depth as usize * load.size as usize + ALIGN];
    let start = memory.as_ptr().align_offset(ALIGN);
    let pages = memory[start..].chunks_exact_mut(load.size as usize).take(load.depth as usize);
    let segment = |page: &mut [u8]| libc::iovec { iov_base: page.as_mut_ptr().cast(), iov_len: page.len() };
    // SAFETY: the pages outlive the queue, which is dropped before them, and nobody else uses them meanwhile.
    let mut free: Vec<_> = pages.map(|page| unsafe { Memory::from_iovecs(vec![segment(page)]) }).collect();
    let mut queue = Queue::new(disk, options).unwrap();
    let (mut begun, mut done) = (0, Vec::new());
    while begun < load.count || !queue.is_empty() {
        while begun < load.count
            && let Some(memory) = free.pop()
        {
            let offset = load.offset(begun);
            let request = match load.write {
                true => Request::Write { offset, from: memory },
                false => Request::Read { offset, into: memory },
            };
            queue.push(begun, request).unwrap();
            begun += 1;
        }
        queue.wait(&mut done);
        for completion in done.drain(..) {
            completion.result.unwrap();
            free.extend(completion.memory);
        }
    }
}
