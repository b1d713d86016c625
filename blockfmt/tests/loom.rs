//! The lock protocols under every interleaving and every order of memory that the language allows, as far as loom
//! explores them.

#![allow(dead_code, reason = "not every part of a protocol is in a model")]

#[path = "../src/ranges.rs"]
mod ranges;
#[path = "../src/sequence.rs"]
mod sequence;
#[path = "../src/turns.rs"]
mod turns;

/// Loom's types with the interface of those that the library uses.
mod sync {
    pub(crate) use loom::hint::spin_loop;
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
    use loom::sync::{self, LockResult};
    use std::ops::{Deref, DerefMut};

    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(sync::Mutex<T>);

    pub(crate) struct Guard<'a, T>(Option<sync::MutexGuard<'a, T>>);

    fn sound<T>(result: LockResult<T>) -> T {
        result.expect("a thread panicked with a lock")
    }

    impl<T> Mutex<T> {
        pub(crate) fn lock(&self) -> Guard<'_, T> {
            Guard(Some(sound(self.0.lock())))
        }
    }

    impl<T> Deref for Guard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            self.0.as_ref().expect("it is taken only during a wait")
        }
    }

    impl<T> DerefMut for Guard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().expect("it is taken only during a wait")
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct Condvar(sync::Condvar);

    impl Condvar {
        pub(crate) fn wait<T>(&self, guard: &mut Guard<'_, T>) {
            guard.0 = guard.0.take().map(|inner| sound(self.0.wait(inner)));
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

#[test]
fn ranges_that_overlap_exclude_each_other() {
    loom::model(|| {
        let shared = Arc::new((ranges::RangeLocks::default(), UnsafeCell::new(0)));
        let threads: Vec<_> = [0..3u64, 2..5]
            .into_iter()
            .map(|range| {
                let shared = shared.clone();
                thread::spawn(move || {
                    let _range = shared.0.lock(range);
                    // SAFETY: nobody else holds cluster 2; loom panics if that is not so.
                    shared.1.with_mut(|count| unsafe { *count += 1 });
                })
            })
            .collect();
        // Not disturbed, and not disturbing.
        drop(shared.0.lock(7..8));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let _range = shared.0.lock(2..3);
        // SAFETY: as above.
        assert_eq!(shared.1.with(|count| unsafe { *count }), 2);
    });
}

#[test]
fn readers_see_one_state() {
    loom::model(|| {
        let shared = Arc::new((sequence::Sequence::default(), AtomicU64::new(0), AtomicU64::new(0)));
        let writer = {
            let shared = shared.clone();
            thread::spawn(move || {
                for value in 1..=2 {
                    shared.0.write(|| {
                        shared.1.store(value, Ordering::Relaxed);
                        shared.2.store(value, Ordering::Relaxed);
                    });
                }
            })
        };
        let (a, b) = shared.0.read(|| (shared.1.load(Ordering::Relaxed), shared.2.load(Ordering::Relaxed)));
        assert_eq!(a, b, "a mixture of two states");
        writer.join().unwrap();
        assert_eq!(shared.0.read(|| shared.2.load(Ordering::Relaxed)), 2);
    });
}

/// Every caller's change is on the disk when its flush returns, whoever did the work, and one that fails is not
/// taken for one that did not.
#[test]
fn shared_flushes_cover_what_came_before_them() {
    #[derive(Default)]
    struct Disk {
        turns: turns::Turns,
        written: [AtomicU64; 2],
        durable: [AtomicU64; 2],
        runs: AtomicU64,
    }
    for fails in [u64::MAX, 0, 1] {
        loom::model(move || {
            let disk = Arc::new(Disk::default());
            let write_and_flush = move |disk: &Disk, me: usize| {
                disk.written[me].store(1, Ordering::Release);
                let result = disk.turns.share(|| {
                    if disk.runs.fetch_add(1, Ordering::AcqRel) == fails {
                        return Err(());
                    }
                    for (durable, written) in disk.durable.iter().zip(&disk.written) {
                        durable.fetch_max(written.load(Ordering::Acquire), Ordering::AcqRel);
                    }
                    Ok(())
                });
                assert!(result.is_err() || disk.durable[me].load(Ordering::Acquire) == 1, "a write is lost");
                result.is_ok()
            };
            let other = disk.clone();
            let thread = thread::spawn(move || write_and_flush(&other, 1));
            let mine = write_and_flush(&disk, 0);
            let theirs = thread.join().unwrap();
            let failed = u64::from(!mine) + u64::from(!theirs);
            let expected = u64::from(disk.runs.load(Ordering::Acquire) > fails);
            assert_eq!(failed, expected, "a failure is reported once, to whom it happened");
        });
    }
}
