//! Reading data that others change, without a lock.

use crate::sync::{AtomicU64, Ordering, fence, spin_loop};

/// The number of changes of some atomic data, odd while a change goes on.
#[derive(Debug, Default)]
pub(crate) struct Sequence(AtomicU64);

impl Sequence {
    /// Runs `look` until no change overlapped with it. It may see a mixture of states; the result that is
    /// returned comes from one.
    pub(crate) fn read<R>(&self, mut look: impl FnMut() -> R) -> R {
        loop {
            let before = self.0.load(Ordering::Acquire);
            if before & 1 == 0 {
                let result = look();
                // What `look` saw of a change makes the start of this change visible below.
                fence(Ordering::Acquire);
                if self.0.load(Ordering::Relaxed) == before {
                    return result;
                }
            }
            spin_loop();
        }
    }

    /// Changes the data. The caller keeps other changes away.
    pub(crate) fn write(&self, change: impl FnOnce()) {
        let before = self.0.load(Ordering::Relaxed);
        self.0.store(before + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        change();
        self.0.store(before + 2, Ordering::Release);
    }
}
