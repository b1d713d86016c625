//! A gate that many threads pass cheaply and one thread can close.

use parking_lot::{ArcRwLockReadGuard, RawRwLock, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::ops::Deref;
use std::sync::Arc;

const SHARDS: usize = 16;

/// The copy of a value for one shard.
#[derive(Debug)]
#[repr(align(128))] // one cache line pair each, so that passers on different shards do not share one
pub(crate) struct Shard<T>(T);

impl<T> Deref for Shard<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// A value read by every request and replaced rarely.
///
/// Readers lock one of several shards, chosen by thread, so that they touch no shared cache line.
/// A writer locks all of them.
#[derive(Debug)]
pub(crate) struct Gate<T> {
    shards: Box<[Arc<RwLock<Shard<T>>>]>,
}

/// Passage through a [`Gate`]; the gate cannot be closed while it lives.
pub(crate) type Pass<'a, T> = RwLockReadGuard<'a, Shard<T>>;

/// A [`Pass`] that any thread may end.
pub(crate) type Hold<T> = ArcRwLockReadGuard<RawRwLock, Shard<T>>;

/// Exclusive possession of a [`Gate`].
pub(crate) struct Closed<'a, T>(Vec<RwLockWriteGuard<'a, Shard<T>>>);

impl<T: Clone> Gate<T> {
    pub(crate) fn new(value: T) -> Self {
        Gate { shards: (0..SHARDS).map(|_| Arc::new(RwLock::new(Shard(value.clone())))).collect() }
    }

    /// Enters; waits while the gate is closed. Must not be called by a thread that is inside already.
    pub(crate) fn enter(&self) -> Pass<'_, T> {
        self.shards[shard()].read()
    }

    /// Enters for longer than this call. `None` if someone closes the gate or is about to: whoever waited now, with
    /// other holds, would wait for himself.
    pub(crate) fn try_hold(&self) -> Option<Hold<T>> {
        self.shards[shard()].try_read_arc()
    }

    /// Waits until everyone who is inside now has left once; others may enter meanwhile.
    pub(crate) fn synchronize(&self) {
        for shard in &self.shards {
            drop(shard.write());
        }
    }

    /// Waits until everyone is out and keeps others from entering.
    pub(crate) fn close(&self) -> Closed<'_, T> {
        Closed(self.shards.iter().map(|s| s.write()).collect())
    }
}

impl<T: Clone> Closed<'_, T> {
    /// The value.
    pub(crate) fn get(&self) -> &T {
        &self.0[0]
    }

    /// Replaces the value for everyone who enters next.
    pub(crate) fn set(&mut self, value: T) {
        for guard in &mut self.0 {
            guard.0 = value.clone();
        }
    }
}

/// The shard of the calling thread: a hash of the address of a thread-local.
pub(crate) fn shard() -> usize {
    thread_local!(static KEY: u8 = const { 0 });
    let address = KEY.with(|key| std::ptr::from_ref(key) as u64);
    (address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60) as usize % SHARDS
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn close_excludes_passers() {
        let gate = Gate::new(());
        let (inside, seen) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let _pass = gate.enter();
                        inside.fetch_add(1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
            for _ in 0..200 {
                let _closed = gate.close();
                seen.fetch_add(inside.load(Ordering::SeqCst), Ordering::SeqCst);
            }
        });
        assert_eq!(seen.into_inner(), 0);
    }

    #[test]
    fn a_hold_ends_in_another_thread_and_none_begins_before_someone_who_waits() {
        let gate = Gate::new(7);
        let first = gate.try_hold().unwrap();
        let second = gate.try_hold().unwrap();
        assert_eq!((**first, **second), (7, 7));
        std::thread::scope(|scope| {
            let closer = scope.spawn(|| gate.close().set(8));
            while let Some(hold) = gate.try_hold() {
                assert_eq!(**hold, 7);
            }
            scope.spawn(move || drop((first, second)));
            closer.join().unwrap();
        });
        assert_eq!(**gate.enter(), 8);
    }
}
