//! Jobs on exported disks, each on a thread of its own.

use anyhow::{Context, Result};
use blockfmt::job::JobControl;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

/// Jobs that ended and are still listed.
const KEEP: usize = 64;

/// What became of a job.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum State {
    Running,
    Done,
    Cancelled,
    Failed { error: String },
}

/// A job as the API tells about it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub job: u64,
    /// The command that started it.
    pub kind: &'static str,
    /// The export that it works on.
    pub name: String,
    #[serde(flatten)]
    pub state: State,
    /// Bytes dealt with.
    pub done: u64,
    /// Bytes to deal with, as far as is known.
    pub total: u64,
}

struct Job {
    kind: &'static str,
    name: String,
    control: Arc<JobControl>,
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

/// The jobs. Dropping this cancels them and waits for their end.
#[derive(Default)]
pub struct Jobs(Mutex<BTreeMap<u64, Job>>);

/// Locks a mutex whose data is sound at every instant, also after a panic.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells whoever waits for a job to begin, however it ends.
struct Ended(mpsc::SyncSender<()>);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.try_send(());
    }
}

impl Jobs {
    /// Starts a job and returns its number, as soon as the job has begun to count what it has to do, or has ended: what
    /// the disk holds at one instant, for example, is known by then. A disk has one job at a time.
    pub fn start(
        &self,
        kind: &'static str,
        name: &str,
        rate: u64,
        run: impl FnOnce(&JobControl) -> Result<()> + Send + 'static,
    ) -> Result<u64> {
        let mut jobs = lock(&self.0);
        let busy = jobs.values().any(|j| j.name == name && matches!(*lock(&j.state), State::Running));
        anyhow::ensure!(!busy, "A job works on export {name:?} already");
        while jobs.len() >= KEEP {
            let ended =
                jobs.iter().find(|(_, j)| !matches!(*lock(&j.state), State::Running)).map(|(n, _)| *n);
            let oldest = ended.context("Too many jobs are running")?;
            jobs.remove(&oldest);
        }
        let number = jobs.last_key_value().map_or(1, |(n, _)| n + 1);
        let (begun, begins) = mpsc::sync_channel(1);
        let ended = Ended(begun.clone());
        let begin = move |_| {
            let _ = begun.try_send(());
        };
        let control = Arc::new(JobControl::new().on_progress(begin));
        control.set_rate(rate);
        let state = Arc::new(Mutex::new(State::Running));
        let (ours, result) = (control.clone(), state.clone());
        let thread = std::thread::Builder::new().name(format!("job {number}")).spawn(move || {
            let end = match run(&ours) {
                Ok(()) => State::Done,
                Err(error) => match error.downcast_ref() {
                    Some(blockfmt::Error::Cancelled) => State::Cancelled,
                    _ => State::Failed { error: daemons::describe(&error) },
                },
            };
            *lock(&result) = end;
            drop(ended);
        })?;
        jobs.insert(number, Job { kind, name: name.into(), control, state, thread: Some(thread) });
        drop(jobs);
        begins.recv().context("The job ended early")?;
        Ok(number)
    }

    pub fn list(&self) -> Vec<Report> {
        let report = |(number, job): (&u64, &Job)| {
            let (state, progress) = (lock(&job.state).clone(), job.control.progress());
            Report {
                job: *number,
                kind: job.kind,
                name: job.name.clone(),
                state,
                done: progress.done,
                total: progress.total,
            }
        };
        lock(&self.0).iter().map(report).collect()
    }

    /// Makes a job end soon.
    pub fn cancel(&self, number: u64) -> Result<()> {
        let jobs = lock(&self.0);
        jobs.get(&number).with_context(|| format!("There is no job {number}"))?.control.cancel();
        Ok(())
    }

    /// Cancels the jobs of an export and waits for their end.
    pub fn end(&self, name: &str) {
        let threads: Vec<_> = {
            let mut jobs = lock(&self.0);
            let ours = jobs.values_mut().filter(|job| job.name == name);
            ours.inspect(|job| job.control.cancel()).filter_map(|job| job.thread.take()).collect()
        };
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!(name, "A job panicked");
            }
        }
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        let names: Vec<_> = lock(&self.0).values().map(|job| job.name.clone()).collect();
        names.iter().for_each(|name| self.end(name));
    }
}
