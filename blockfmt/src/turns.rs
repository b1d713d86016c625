//! Work that many callers share.

use crate::sync::{Condvar, Mutex};

#[derive(Debug, Default)]
struct State {
    started: u64,
    /// The last run that ended well.
    finished: u64,
    running: bool,
}

/// Lets callers that arrive while some work is under way share the next run of it.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    state: Mutex<State>,
    ended: Condvar,
}

impl Turns {
    /// Returns when `work`, this one or that of another caller, began after this call and ended well, or with
    /// the error of this one.
    pub(crate) fn share<E>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut state = self.state.lock();
        // A run that is under way may have missed what the caller did; the next one will not.
        let needed = state.started + 1;
        loop {
            if state.finished >= needed {
                return Ok(());
            }
            if !state.running {
                break;
            }
            self.ended.wait(&mut state);
        }
        state.running = true;
        state.started += 1;
        let turn = state.started;
        drop(state);
        let result = work();
        let mut state = self.state.lock();
        state.running = false;
        if result.is_ok() {
            state.finished = turn;
        }
        self.ended.notify_all();
        result
    }
}
