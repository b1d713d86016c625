//! The host agent: one [`Node`](crate::node::Node) with the real world around it.
//!
//! [`Agent::start`] wires the state machines to lease volumes, network links, the store, fence agents, a
//! watchdog and the journal, and hands VMs to a [`VmRunner`]. The daemon `nacre-node` adds a configuration
//! file and a runner; another program may bring its own. [`ApiServer`] offers the agent's API on a Unix
//! socket.

mod api;
mod balance;
mod config;
mod drive;
mod guard;
mod runner;
mod server;
mod workers;

pub use api::{ApiReply, ApiRequest, HostEntry, LeaseEntry, LocalEntry, LockEntry, Status, VmEntry};
pub use config::{
    AgentConfig, BalanceConfig, BalanceMode, ConfigError, FenceTimers, HaSection, HeartbeatConfig,
    HostConfig, LinkConfig, MigrationConfig, RemoteConfig, StoreConfig, VolumeConfig, WatchdogConfig,
    resource_name,
};
pub use runner::{VmEvents, VmRunner};
pub use server::{ApiServer, Connection, Secure, ask, ask_tcp};

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::adapters::{DiskError, Event, Journal, JournalError, NetError, Severity};
use drive::{Driver, Input};

/// The last event of an agent's life.
const LAST: &str = "agent.ended";

/// Why an agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration is wrong.
    #[error("Agent cannot use its configuration")]
    Config(#[from] ConfigError),
    /// A file or directory cannot be used.
    #[error("Agent cannot use {}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The key is too short.
    #[error("Key {} has less than 16 bytes; make one with: head -c 32 /dev/urandom | base64", .0.display())]
    ShortKey(PathBuf),
    /// A lease volume cannot be used.
    #[error("Lease volume cannot be used; check its path and format it with `nacre cluster format`")]
    Volume(#[source] DiskError),
    /// A link cannot be used.
    #[error("Link cannot be used")]
    Link(#[source] NetError),
    /// The watchdog cannot be used.
    #[error("Watchdog cannot be used")]
    Watchdog(#[source] guard::GuardError),
    /// The journal cannot be used.
    #[error("Journal cannot be used")]
    Journal(#[source] JournalError),
    /// A thread cannot be started.
    #[error("Agent cannot start a thread")]
    Thread(#[source] io::Error),
    /// The VM runner cannot be used.
    #[error("VMs cannot be run here")]
    Runner(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// How an agent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentEnd {
    /// It left the cluster and gave everything back.
    Left,
    /// It had to reset the host, and the runner did.
    Reset,
    /// It was dropped.
    Dropped,
}

/// A running agent. Dropping it drops the runner, which kills its VMs, and leaves the leases to run out; see
/// [`Agent::leave`] for an orderly end.
#[derive(Debug)]
pub struct Agent {
    inputs: Sender<Input>,
    thread: Option<JoinHandle<AgentEnd>>,
}

/// Asks the agent; clones may be handed to threads.
#[derive(Clone, Debug)]
pub struct AgentHandle {
    inputs: Sender<Input>,
}

impl Agent {
    /// Starts an agent. `runner` is made first: when it returns, nothing of a former life may still write.
    ///
    /// # Errors
    /// Whatever the agent needs is missing or wrong: see [`AgentError`].
    pub fn start<R: VmRunner + 'static>(
        config: AgentConfig,
        runner: impl FnOnce(VmEvents) -> Result<R, Box<dyn std::error::Error + Send + Sync>>,
    ) -> Result<Self, AgentError> {
        config.check()?;
        let file = |path: &Path, source| AgentError::File { path: path.to_owned(), source };
        fs::create_dir_all(&config.state).map_err(|e| file(&config.state, e))?;
        let key = fs::read(&config.key).map_err(|e| file(&config.key, e))?;
        if key.len() < 16 {
            return Err(AgentError::ShortKey(config.key));
        }
        let journal = Journal::open(&config.state.join("events")).map_err(AgentError::Journal)?;
        let (inputs, queue) = channel();
        let runner = runner(VmEvents { inputs: inputs.clone() }).map_err(AgentError::Runner)?;
        let boot = next_boot(&config.state.join("boot"))?;
        let driver = Driver::new(config, boot, &key, journal, Box::new(runner), inputs.clone())?;
        let thread = std::thread::Builder::new().name("agent".into());
        let thread = thread.spawn(move || driver.run(&queue)).map_err(AgentError::Thread)?;
        Ok(Agent { inputs, thread: Some(thread) })
    }

    /// A handle for the API.
    pub fn handle(&self) -> AgentHandle {
        AgentHandle { inputs: self.inputs.clone() }
    }

    /// Asks the agent to stop its VMs, give everything back and end; see [`Agent::wait`].
    pub fn leave(&self) {
        // An agent that has ended has left.
        let _ = self.inputs.send(Input::Leave);
    }

    /// Whether the agent has ended.
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until the agent ends.
    pub fn wait(mut self) -> AgentEnd {
        // A panic of the agent's thread is the end of its VMs too: their runner was dropped with it.
        self.thread.take().and_then(|t| t.join().ok()).unwrap_or(AgentEnd::Dropped)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.inputs.send(Input::Shutdown);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl AgentHandle {
    /// Asks the agent and waits for its answer, up to `patience`.
    pub fn call(&self, request: ApiRequest, patience: Duration) -> ApiReply {
        let (reply, answer) = channel();
        let sent = self.inputs.send(Input::Call(request, reply));
        let answer = sent.ok().and_then(|()| answer.recv_timeout(patience).ok());
        answer.unwrap_or_else(|| ApiReply::Error {
            message: "The agent did not answer; look at its log".into(),
            coordinator: None,
        })
    }
}

fn event(severity: Severity, kind: &str, subject: String, message: String) -> Event {
    Event { id: 0, time: 0, severity, kind: kind.into(), subject, message }
}

/// The number of this life: higher than the last one, and than the clock's seconds in case the file is lost.
fn next_boot(path: &Path) -> Result<u64, AgentError> {
    let file = |source| AgentError::File { path: path.to_owned(), source };
    let last: u64 = match fs::read_to_string(path) {
        Ok(text) => text.trim().parse().unwrap_or(0),
        Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
        Err(e) => return Err(file(e)),
    };
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    // A number without a successor is rubbish, too.
    let boot = seconds.max(last.checked_add(1).unwrap_or(0));
    let new = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut out = File::create(&new)?;
        writeln!(out, "{boot}")?;
        out.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(file)?;
    Ok(boot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_numbers_rise_even_when_the_clock_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("boot");
        let first = next_boot(&path).unwrap();
        let second = next_boot(&path).unwrap();
        assert!(second > first);
        fs::write(&path, format!("{}", u64::MAX / 2)).unwrap();
        assert_eq!(next_boot(&path).unwrap(), u64::MAX / 2 + 1);
        for rubbish in ["rubbish".to_owned(), u64::MAX.to_string()] {
            fs::write(&path, rubbish).unwrap();
            let boot = next_boot(&path).unwrap();
            assert!((first..u64::MAX / 2).contains(&boot), "{boot}");
        }
    }
}
