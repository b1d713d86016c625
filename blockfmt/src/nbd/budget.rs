//! What all connections of a server may hold together.

use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;

/// Most payload of one connection in bytes, unless it is that of one request.
const CONNECTION_BYTES: u64 = 64 << 20;
/// Most threads of one connection.
const CONNECTION_THREADS: usize = 32;

/// What the clients of a [`Server`](super::Server) may make it hold.
///
/// A connection always gets to have one request under way, and one thread for requests to storage that answers late, so
/// that each makes progress whatever the others do. These are on top of `bytes` and `threads`: a request has up to
/// 32 MiB of payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// Connections that are served at a time; more are turned away.
    pub connections: usize,
    /// Bytes of payload of requests that are under way or whose replies the client has not taken, of all connections.
    /// Those that have some share them evenly; one has 64 MiB at most.
    pub bytes: u64,
    /// Threads for requests to storage that answers late, of all connections; one has 32 at most.
    pub threads: usize,
    /// Time that a client has until it has chosen an export.
    pub handshake: Duration,
}

impl Default for ServerLimits {
    /// 256 connections, 512 MiB, 512 threads and 30 seconds.
    fn default() -> Self {
        ServerLimits { connections: 256, bytes: 512 << 20, threads: 512, handshake: Duration::from_secs(30) }
    }
}

#[derive(Debug, Default)]
struct Used {
    bytes: u64,
    threads: usize,
    connections: usize,
    /// Connections that have bytes.
    holders: u64,
}

/// What the connections of a server use.
#[derive(Debug, Default)]
pub(super) struct Budget {
    pub limits: ServerLimits,
    used: Mutex<Used>,
}

impl Budget {
    pub fn new(limits: ServerLimits) -> Self {
        Budget { limits, used: Mutex::default() }
    }
}

/// What one connection has of a budget. Dropping it gives that back.
#[derive(Debug)]
pub(super) struct Share {
    budget: Arc<Budget>,
    bytes: u64,
    threads: usize,
}

impl Share {
    pub fn new(budget: &Arc<Budget>) -> Self {
        budget.used.lock().connections += 1;
        Share { budget: budget.clone(), bytes: 0, threads: 0 }
    }

    /// Takes bytes if they are to be had, or in any case if `must`. Who gets none tries again when it has given some
    /// back: it has some then.
    pub fn take(&mut self, bytes: u64, must: bool) -> bool {
        let mut used = self.budget.used.lock();
        let limit = self.budget.limits.bytes;
        let holders = used.holders + u64::from(self.bytes == 0);
        let ours = self.bytes.saturating_add(bytes);
        let fits = used.bytes.saturating_add(bytes) <= limit && ours <= CONNECTION_BYTES.min(limit / holders);
        if bytes > 0 && !fits && !must {
            return false;
        }
        used.holders += u64::from(self.bytes == 0 && bytes > 0);
        used.bytes += bytes;
        self.bytes += bytes;
        true
    }

    /// Gives bytes back.
    pub fn give(&mut self, bytes: u64) {
        let mut used = self.budget.used.lock();
        used.bytes -= bytes;
        self.bytes -= bytes;
        used.holders -= u64::from(self.bytes == 0 && bytes > 0);
    }

    /// Threads that this connection may have now besides those that it has: as many as each if all had the same
    /// number, as far as they are not taken; at least one.
    pub fn take_threads(&mut self) -> u16 {
        let mut used = self.budget.used.lock();
        let limit = self.budget.limits.threads;
        let threads =
            CONNECTION_THREADS.min(limit / used.connections).min(limit.saturating_sub(used.threads));
        let threads = threads.max(1);
        used.threads += threads;
        self.threads += threads;
        threads as u16
    }

    /// Gives all threads back; they have ended.
    pub fn give_threads(&mut self) {
        self.budget.used.lock().threads -= std::mem::take(&mut self.threads);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give(self.bytes);
        self.give_threads();
        self.budget.used.lock().connections -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shared_evenly_and_one_request_is_always_possible() {
        let limits = ServerLimits { bytes: 100, ..ServerLimits::default() };
        let budget = Arc::new(Budget::new(limits));
        let (mut first, mut second, mut third) =
            (Share::new(&budget), Share::new(&budget), Share::new(&budget));
        assert!(first.take(90, false) && !first.take(20, false) && first.take(10, false));
        // Nothing is left, but each may have something.
        assert!(!second.take(10, false) && second.take(10, true) && first.take(0, false));
        first.give(60);
        // Half of it is for each of two, a third for each of three.
        assert!(first.take(10, false) && !first.take(1, false) && second.take(40, false));
        assert!(third.take(70, true) && !second.take(1, false));
        drop((first, second));
        assert!(third.take(30, false) && !third.take(1, false));
        drop(third);
        let used = budget.used.lock();
        assert_eq!((used.bytes, used.threads, used.connections, used.holders), (0, 0, 0, 0));
    }

    #[test]
    fn threads_are_shared_by_the_connections_that_there_are() {
        let limits = ServerLimits { threads: 64, ..ServerLimits::default() };
        let budget = Arc::new(Budget::new(limits));
        let mut first = Share::new(&budget);
        assert_eq!(first.take_threads(), 32);
        let mut others: Vec<_> = (0..7).map(|_| Share::new(&budget)).collect();
        let taken: Vec<_> = others.iter_mut().map(Share::take_threads).collect();
        assert_eq!(taken, [8, 8, 8, 8, 1, 1, 1]);
        first.give_threads();
        assert_eq!(first.take_threads(), 8);
    }
}
