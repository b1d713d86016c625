//! Spreading the pieces of a job over threads.

use super::DirtyMap;
use crate::Result;
use std::num::NonZero;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Most threads that a job takes on its own.
const MAX_THREADS: usize = 16;

/// Runs `work` on every item that `claim` hands out until it has no more, on several threads (0: one for
/// each processor, but at most `items`), each with a state of its own. The first error ends all of them.
fn run<T, S>(
    threads: usize,
    items: u64,
    claim: impl Fn() -> Option<T> + Sync,
    state: impl Fn() -> Result<S> + Sync,
    work: impl Fn(T, &mut S) -> Result<()> + Sync,
) -> Result<()> {
    let threads = match threads {
        0 => std::thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS),
        n => n,
    };
    let stop = AtomicBool::new(false);
    let work_all = || {
        let mut state = state()?;
        while !stop.load(Ordering::Relaxed)
            && let Some(item) = claim()
        {
            work(item, &mut state)?;
        }
        Ok(())
    };
    let run = || work_all().inspect_err(|_| stop.store(true, Ordering::Relaxed));
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..(threads as u64).min(items)).map(|_| scope.spawn(run)).collect();
        let mine = run();
        helpers.into_iter().fold(mine, |result, helper| match helper.join() {
            Ok(other) => result.and(other),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

/// Runs `work` on every piece, given as offset and length, of a disk of `size` bytes.
pub(super) fn each_piece<S>(
    size: u64,
    piece: u64,
    threads: usize,
    state: impl Fn() -> Result<S> + Sync,
    work: impl Fn(u64, u64, &mut S) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicU64::new(0);
    let claim = || Some(next.fetch_add(piece, Ordering::Relaxed)).filter(|offset| *offset < size);
    run(threads, size.div_ceil(piece), claim, state, |offset, state| {
        work(offset, piece.min(size - offset), state)
    })
}

/// Runs `work` once on every granule that is marked, in order and in runs of at most `longest` neighbours;
/// `work` takes the marks.
pub(super) fn each_dirty<S>(
    map: &DirtyMap,
    longest: u64,
    state: impl Fn() -> Result<S> + Sync,
    work: impl Fn(Range<u64>, &mut S) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicU64::new(0);
    let claim = || loop {
        let from = next.load(Ordering::Relaxed);
        let first = map.next(from)?;
        let end = (first + 1..first + longest).find(|g| *g >= map.granules() || !map.get(*g));
        let end = end.unwrap_or(first + longest);
        if next.compare_exchange(from, end, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return Some(first..end);
        }
    };
    run(0, map.count().div_ceil(longest), claim, state, work)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn pieces_cover_a_disk_once() {
        let seen = DirtyMap::new(1000 * 512 + 7, 512).unwrap();
        let work = |offset, len, _: &mut ()| {
            assert_eq!(len, 512.min(1000 * 512 + 7 - offset));
            assert!(!seen.get(offset / 512));
            seen.mark(offset, len);
            Ok(())
        };
        each_piece(1000 * 512 + 7, 512, 3, || Ok(()), work).unwrap();
        assert_eq!(seen.count(), 1001);
        let taken = AtomicU64::new(0);
        seen.take(500);
        let take = |run: Range<u64>, _: &mut ()| {
            assert!(run.end - run.start <= 3 && !run.contains(&500));
            taken.fetch_add(run.filter(|g| seen.take(*g)).count() as u64, Ordering::Relaxed);
            Ok(())
        };
        each_dirty(&seen, 3, || Ok(()), take).unwrap();
        assert_eq!((taken.into_inner(), seen.count()), (1000, 0));
    }

    #[test]
    fn an_error_ends_all_threads() {
        let calls = AtomicU64::new(0);
        let result = each_piece(
            1 << 40,
            1,
            4,
            || Ok(()),
            |offset, _, ()| {
                calls.fetch_add(1, Ordering::Relaxed);
                if offset == 100 { Err(Error::Cancelled) } else { Ok(()) }
            },
        );
        assert!(matches!(result, Err(Error::Cancelled)));
        assert!(calls.into_inner() < 1 << 30);
    }
}
