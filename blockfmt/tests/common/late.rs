//! Storage that answers late, when a test says so.
#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

use blockfmt::storage::MemoryStorage;
use blockfmt::{Gather, Scatter, Storage};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Longest wait for what must happen.
pub const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Zero,
    Discard,
    Flush,
}

/// A call: what it does, and where.
pub type Call = (Kind, u64);

#[derive(Debug, Default)]
struct State {
    /// Whether calls wait to be let go; otherwise they sleep a little.
    closed: bool,
    waiting: Vec<Call>,
    /// Most calls that waited at a time.
    most: usize,
    /// Calls that may go, with the number of an error if they shall fail.
    let_go: Vec<(Call, Option<i32>)>,
    running: usize,
}

/// A storage in memory whose calls sleep.
#[derive(Debug)]
pub struct LateStorage {
    inner: MemoryStorage,
    state: Mutex<State>,
    changed: Condvar,
}

impl LateStorage {
    pub fn new(len: u64) -> Arc<Self> {
        let storage =
            LateStorage { inner: MemoryStorage::new(), state: Mutex::default(), changed: Condvar::new() };
        storage.inner.set_len(len).unwrap();
        Arc::new(storage)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Makes calls wait from now on, until the result is dropped.
    #[must_use]
    pub fn close(self: &Arc<Self>) -> Closed {
        self.state().closed = true;
        Closed(self.clone())
    }

    /// Lets one call go that waits, or one that comes.
    pub fn let_go(&self, call: Call, error: Option<i32>) {
        let mut state = self.state();
        state.waiting.iter().position(|c| *c == call).map(|at| state.waiting.swap_remove(at));
        state.let_go.push((call, error));
        self.changed.notify_all();
    }

    /// Waits until so many calls wait, and returns them.
    pub fn wait_for(&self, calls: usize) -> Vec<Call> {
        let wait = self.changed.wait_timeout_while(self.state(), PATIENCE, |s| s.waiting.len() < calls);
        let (state, _) = wait.unwrap();
        assert!(state.waiting.len() >= calls, "{} calls wait, not {calls}", state.waiting.len());
        state.waiting.clone()
    }

    /// Most calls that waited at a time.
    pub fn most(&self) -> usize {
        self.state().most
    }

    /// Calls under way.
    pub fn running(&self) -> usize {
        self.state().running
    }

    fn call(&self, kind: Kind, offset: u64, run: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let call = (kind, offset);
        let mut state = self.state();
        state.running += 1;
        let mut error = None;
        if state.closed {
            state.waiting.push(call);
            state.most = state.most.max(state.waiting.len());
            self.changed.notify_all();
            while state.closed {
                if let Some(at) = state.let_go.iter().position(|(c, _)| *c == call) {
                    error = state.let_go.swap_remove(at).1;
                    break;
                }
                state = self.changed.wait(state).unwrap();
            }
            state.waiting.iter().position(|c| *c == call).map(|at| state.waiting.swap_remove(at));
            drop(state);
        } else {
            drop(state);
            std::thread::sleep(Duration::from_micros(200)); // this is what makes it late
        }
        let result = error.map_or_else(run, |error| Err(io::Error::from_raw_os_error(error)));
        self.state().running -= 1;
        result
    }
}

/// As long as this lives, calls of the storage wait.
pub struct Closed(Arc<LateStorage>);

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.state().closed = false;
        self.0.changed.notify_all();
    }
}

impl Storage for LateStorage {
    fn name(&self) -> String {
        "late".into()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn readv(&self, dst: Scatter<'_>, offset: u64) -> io::Result<()> {
        self.call(Kind::Read, offset, || self.inner.readv(dst, offset))
    }

    fn writev(&self, src: Gather<'_>, offset: u64) -> io::Result<()> {
        self.call(Kind::Write, offset, || self.inner.writev(src, offset))
    }

    fn flush(&self) -> io::Result<()> {
        self.call(Kind::Flush, 0, || self.inner.flush())
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.call(Kind::Zero, offset, || self.inner.write_zeroes(offset, len, unmap))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call(Kind::Discard, offset, || self.inner.discard(offset, len))
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.allocate(offset, len)
    }
}
