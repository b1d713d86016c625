//! How other threads talk to a processor.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// `Cpu::run` shall return.
pub(crate) const KICK: u32 = 1 << 0;
/// Ask the local APIC for a pending interrupt.
pub(crate) const INTERRUPT: u32 = 1 << 1;
/// A non-maskable interrupt.
pub(crate) const NMI: u32 = 1 << 2;
/// INIT.
pub(crate) const INIT: u32 = 1 << 3;
/// Start-up IPI.
pub(crate) const SIPI: u32 = 1 << 4;

/// The side of a processor that other threads may touch: interrupts, kicks, wake-ups.
///
/// Each call takes effect at the next point at which the processor looks for events: at once when it
/// sleeps in `HLT`, otherwise within some thousand instructions.
#[derive(Debug, Default)]
pub struct CpuHandle {
    events: AtomicU32,
    sipi_vector: AtomicU8,
    /// NMIs that the processor has not taken yet.
    nmis: AtomicU32,
    unimplemented: AtomicU64,
    sleeping: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

impl CpuHandle {
    /// Makes `Cpu::run` return [`Exit::Kicked`](crate::Exit::Kicked); if it is not running, the next call
    /// returns at once.
    pub fn kick(&self) {
        self.post(KICK);
    }

    /// Tells the processor that its local APIC has a new pending interrupt.
    pub fn interrupt(&self) {
        self.post(INTERRUPT);
    }

    /// Delivers a non-maskable interrupt. Two of them that find the processor between two looks at its events are two,
    /// as they would be if it had looked; more are not.
    pub fn nmi(&self) {
        self.nmis.fetch_add(1, Ordering::Relaxed);
        self.post(NMI);
    }

    /// Delivers INIT: the processor resets and waits for a start-up IPI.
    pub fn init(&self) {
        self.post(INIT);
    }

    /// Delivers a start-up IPI: a waiting processor starts in real mode at `vector << 12`. Ignored by a
    /// processor that does not wait for one.
    pub fn sipi(&self, vector: u8) {
        self.sipi_vector.store(vector, Ordering::Relaxed);
        self.post(SIPI);
    }

    /// How often the guest tried to execute an instruction that this crate does not implement.
    pub fn unimplemented(&self) -> u64 {
        self.unimplemented.load(Ordering::Relaxed)
    }

    pub(crate) fn count_unimplemented(&self) {
        self.unimplemented.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn post(&self, event: u32) {
        // Both this pair and the one in `sleep` must be sequentially consistent: either the sleeper sees
        // the event, or we see the sleeper.
        self.events.fetch_or(event, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) {
            drop(self.guard());
            self.wake.notify_all();
        }
    }

    /// Events that are set, without taking them.
    #[inline(always)]
    pub(crate) fn peek(&self) -> u32 {
        self.events.load(Ordering::Relaxed)
    }

    /// Takes the events in `mask`.
    pub(crate) fn take(&self, mask: u32) -> u32 {
        self.events.fetch_and(!mask, Ordering::SeqCst) & mask
    }

    /// Takes the NMIs that were delivered.
    pub(crate) fn take_nmis(&self) -> u32 {
        self.nmis.swap(0, Ordering::Relaxed)
    }

    pub(crate) fn sipi_vector(&self) -> u8 {
        self.sipi_vector.load(Ordering::Relaxed)
    }

    /// Sleeps until an event is set or the timeout has passed.
    pub(crate) fn sleep(&self, timeout: Option<Duration>) {
        let mut guard = self.guard();
        self.sleeping.store(true, Ordering::SeqCst);
        if self.events.load(Ordering::SeqCst) == 0 {
            guard = match timeout {
                Some(t) => self.wake.wait_timeout(guard, t).unwrap_or_else(PoisonError::into_inner).0,
                None => self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner),
            };
        }
        self.sleeping.store(false, Ordering::SeqCst);
        drop(guard);
    }

    fn guard(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
