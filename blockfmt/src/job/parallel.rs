//! Spreading the pieces of a job over threads.

use super::DirtyMap;
use crate::Result;
use crate::usage::SleepClock;
use std::num::NonZero;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::Scope;

/// Most threads that a job takes on its own.
const MAX_THREADS: usize = 16;
/// Items after which a thread looks what it spent their time on.
const LOOK_ITEMS: u32 = 8;
/// A thread that was awake for less than this part of it waited for storage.
const AWAKE_PART: u32 = 4;

/// Runs `work` on every item that `claim` hands out until it has no more, on several threads, each with a state of
/// its own. The first error ends all of them.
///
/// With 0 for `threads` there is one for each processor, but at most `items`, and more are added while they spend
/// their time waiting: storage that answers late has several items under way then.
fn run<T, S>(
    threads: usize,
    items: u64,
    claim: impl Fn() -> Option<T> + Sync,
    state: impl Fn() -> Result<S> + Sync,
    work: impl Fn(T, &mut S) -> Result<()> + Sync,
) -> Result<()> {
    let processors = || std::thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS);
    let (first, most) = if threads == 0 { (processors(), MAX_THREADS) } else { (threads, threads) };
    let limit = |threads: usize| threads.min(usize::try_from(items).unwrap_or(usize::MAX)).max(1);
    let crew = Crew {
        most: limit(most),
        count: AtomicUsize::new(limit(first)),
        stop: AtomicBool::new(false),
        claim,
        state,
        work,
    };
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..limit(first)).map(|_| scope.spawn(|| crew.serve(scope))).collect();
        helpers.into_iter().fold(crew.serve(scope), |result, helper| result.and(joined(helper)))
    })
}

fn joined(helper: std::thread::ScopedJoinHandle<'_, Result<()>>) -> Result<()> {
    helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What the threads of a job share.
struct Crew<C, S, W> {
    most: usize,
    count: AtomicUsize,
    stop: AtomicBool,
    claim: C,
    state: S,
    work: W,
}

impl<C, S, W> Crew<C, S, W> {
    fn serve<'scope, T, State>(&'scope self, scope: &'scope Scope<'scope, '_>) -> Result<()>
    where
        C: Fn() -> Option<T> + Sync,
        S: Fn() -> Result<State> + Sync,
        W: Fn(T, &mut State) -> Result<()> + Sync,
    {
        let mut helpers = Vec::new();
        let result = self.serve_with(|| {
            let more = |count: usize| (count < self.most).then_some(count + 1);
            if self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok() {
                helpers.push(scope.spawn(|| self.serve(scope)));
            }
        });
        if result.is_err() {
            self.stop.store(true, Ordering::Relaxed);
        }
        helpers.into_iter().fold(result, |result, helper| result.and(joined(helper)))
    }

    /// Does items, and calls `waited` after some for which this thread rather waited.
    fn serve_with<T, State>(&self, mut waited: impl FnMut()) -> Result<()>
    where
        C: Fn() -> Option<T>,
        S: Fn() -> Result<State>,
        W: Fn(T, &mut State) -> Result<()>,
    {
        let mut state = (self.state)()?;
        // Without it, where a host does not tell, there is a thread for each processor.
        let clock = SleepClock::of_this_thread().ok();
        let look = || clock.as_ref().and_then(|clock| clock.now().ok());
        let (mut start, mut items) = (look(), 0);
        while !self.stop.load(Ordering::Relaxed)
            && let Some(item) = (self.claim)()
        {
            (self.work)(item, &mut state)?;
            items += 1;
            if items == LOOK_ITEMS && self.count.load(Ordering::Relaxed) < self.most {
                let end = look();
                if let (Some(start), Some(end)) = (start, end) {
                    let (all, slept) = end.since(&start);
                    if (all - slept) * AWAKE_PART < all {
                        waited();
                    }
                }
                (start, items) = (end, 0);
            }
        }
        Ok(())
    }
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
    fn items_that_wait_are_under_way_together() {
        // Items wait until as many are under way as there may be threads.
        let (under_way, full) = (AtomicUsize::new(0), AtomicBool::new(false));
        let start = std::time::Instant::now();
        let work = |_, _, _: &mut ()| {
            if !full.load(Ordering::Relaxed) {
                let count = under_way.fetch_add(1, Ordering::Relaxed) + 1;
                full.fetch_or(count == MAX_THREADS, Ordering::Relaxed);
                assert!(start.elapsed().as_secs() < 60, "there are only {count} threads");
                std::thread::sleep(std::time::Duration::from_millis(5));
                under_way.fetch_sub(1, Ordering::Relaxed);
            }
            Ok(())
        };
        each_piece(1_000_000, 1, 0, || Ok(()), work).unwrap();
        assert!(full.into_inner());
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
