//! A lock for the packet path: nearly always free, and held for a burst at most.
//!
//! Letting go of it is a plain store. One that can put threads to sleep needs an atomic read-modify-write there, which
//! waits until every store before it, those into a guest's cache lines included, has reached the cache.
#![expect(unsafe_code, reason = "implements the raw half of a lock")]

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::lock_api::{GuardSend, Mutex, RawMutex};

/// Attempts between two offers of the processor to other threads: the holder may have lost its own.
const SPINS: u32 = 100;

/// See the module's documentation.
pub type SpinLock<T> = Mutex<RawSpin, T>;

/// The state of a [`SpinLock`].
#[derive(Debug)]
pub struct RawSpin(AtomicBool);

// SAFETY: the flag is set by one thread at a time, from `lock` or a `try_lock` that succeeded to `unlock`, with
// acquire and release ordering.
unsafe impl RawMutex for RawSpin {
    const INIT: Self = Self(AtomicBool::new(false));
    type GuardMarker = GuardSend;

    #[inline]
    fn lock(&self) {
        let mut spins = 0;
        while !self.try_lock() {
            while self.0.load(Ordering::Relaxed) {
                spins += 1;
                if spins % SPINS == 0 {
                    std::thread::yield_now();
                } else {
                    std::hint::spin_loop();
                }
            }
        }
    }

    #[inline]
    fn try_lock(&self) -> bool {
        !self.0.swap(true, Ordering::Acquire)
    }

    #[inline]
    unsafe fn unlock(&self) {
        self.0.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time() {
        let sum = SpinLock::new(0u64);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..10_000 {
                        let mut sum = sum.lock();
                        let old = *sum;
                        std::hint::black_box(&mut sum);
                        *sum = old + 1;
                    }
                });
            }
        });
        assert_eq!(*sum.lock(), 40_000);
    }
}
