//! Threads that do requests with the methods of the disk.

use super::event::Event;
use super::{Completion, Job, Request};
use crate::{Disk, Error, Result};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

/// What the owner of a queue, its threads and its ring share.
pub(super) struct Board {
    pub disk: Disk,
    pub event: Event,
    lists: Mutex<Lists>,
    /// There is work, or no more will come.
    work: Condvar,
    threads: Mutex<Vec<JoinHandle<()>>>,
    most_threads: usize,
}

#[derive(Default)]
struct Lists {
    waiting: VecDeque<Job>,
    done: Vec<Completion>,
    /// Whether the event tells of what is done.
    signalled: bool,
    /// Threads without work.
    idle: usize,
    ended: bool,
}

/// Owns the threads.
pub(super) struct Workers(Arc<Board>);

impl Workers {
    pub fn new(disk: &Disk, most_threads: usize) -> io::Result<Self> {
        let workers = Workers(Arc::new(Board {
            disk: disk.clone(),
            event: Event::new()?,
            lists: Mutex::default(),
            work: Condvar::new(),
            threads: Mutex::default(),
            most_threads,
        }));
        workers.0.add_thread()?;
        Ok(workers)
    }

    pub fn board(&self) -> &Arc<Board> {
        &self.0
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let given_up = {
            let mut lists = self.0.lists.lock();
            lists.ended = true;
            std::mem::take(&mut lists.waiting)
        };
        drop(given_up);
        self.0.work.notify_all();
        for thread in std::mem::take(&mut *self.0.threads.lock()) {
            // A panic was reported by its thread; here nothing depends on it any more.
            let _ = thread.join();
        }
    }
}

impl Board {
    fn add_thread(self: &Arc<Self>) -> io::Result<()> {
        let mut threads = self.threads.lock();
        if threads.len() < self.most_threads {
            let board = self.clone();
            let run = move || board.run();
            threads.push(std::thread::Builder::new().name("disk-queue".into()).spawn(run)?);
        }
        Ok(())
    }

    /// Lets a thread do a request.
    pub fn give(self: &Arc<Self>, job: Job) {
        let more = {
            let mut lists = self.lists.lock();
            lists.waiting.push_back(job);
            lists.waiting.len() > lists.idle
        };
        self.work.notify_one();
        if more && let Err(error) = self.add_thread() {
            tracing::debug!(%error, "A queue has to do with fewer threads");
        }
    }

    /// Gives up requests with this tag that no thread has begun.
    pub fn cancel(&self, tag: u64) {
        let mut gone = Vec::new();
        self.lists.lock().waiting.retain_mut(|job| {
            let matches = job.tag == tag;
            if matches {
                gone.push(Job { tag, request: std::mem::replace(&mut job.request, Request::Flush) });
            }
            !matches
        });
        gone.into_iter().for_each(|job| self.complete(job.end(Err(Error::Cancelled)), true));
    }

    /// Adds a completion. It is `noticed` if the owner of the queue is told by the call that it makes.
    pub fn complete(&self, completion: Completion, noticed: bool) {
        let mut lists = self.lists.lock();
        lists.done.push(completion);
        if !noticed && !lists.signalled {
            lists.signalled = true;
            self.event.signal();
        }
    }

    /// Moves the completions to `out`.
    pub fn take(&self, out: &mut Vec<Completion>) -> usize {
        let mut lists = self.lists.lock();
        if std::mem::take(&mut lists.signalled) {
            self.event.clear();
        }
        let count = lists.done.len();
        out.append(&mut lists.done);
        count
    }

    fn run(&self) {
        let mut lists = self.lists.lock();
        loop {
            if let Some(mut job) = lists.waiting.pop_front() {
                drop(lists);
                let result = self.execute(&mut job.request);
                self.complete(job.end(result), false);
                lists = self.lists.lock();
            } else if lists.ended {
                return;
            } else {
                lists.idle += 1;
                self.work.wait(&mut lists);
                lists.idle -= 1;
            }
        }
    }

    fn execute(&self, request: &mut Request) -> Result<()> {
        match request {
            Request::Read { offset, into } => self.disk.read(into.scatter(), *offset),
            Request::Write { offset, from } => self.disk.write(from.gather(), *offset),
            Request::WriteZeroes { offset, len, unmap } => self.disk.write_zeroes(*offset, *len, *unmap),
            Request::Discard { offset, len } => self.disk.discard(*offset, *len),
            Request::Flush => self.disk.flush(),
        }
    }
}
