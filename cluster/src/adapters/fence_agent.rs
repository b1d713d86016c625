//! Fence agents: the `fence_*` programs of the fence-agents project, as subprocesses.
//!
//! An agent reads `key=value` lines from its standard input. `status` exits with 0 for on and 2 for off.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fence::{AgentReply, FenceAction};

/// Why a fence agent gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It cannot be started.
    #[error("Fence agent cannot be run; install the package fence-agents")]
    Start(#[source] io::Error),
    /// It took too long and was killed.
    #[error("Fence agent took longer than {0:?} and was killed; check its device")]
    TooSlow(Duration),
    /// It failed.
    #[error("Fence agent failed with {0}; check its parameters")]
    Failed(ExitStatus),
    /// A parameter has a line break in it.
    #[error("Fence parameter {0} has a line break; remove it")]
    Parameter(String),
}

/// A fence device: an agent and its parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FenceAgent {
    /// The program, for example `/usr/sbin/fence_ipmilan`.
    pub program: PathBuf,
    /// Its parameters, as its manual names them.
    #[serde(default)]
    pub parameters: BTreeMap<String, String>,
}

impl FenceAgent {
    /// Runs an action and waits for it; the agent and its children are killed at the deadline.
    pub fn run(&self, action: FenceAction, deadline: Duration) -> Result<AgentReply, AgentError> {
        let name = match action {
            FenceAction::Status => "status",
            FenceAction::Off => "off",
            FenceAction::On => "on",
        };
        let mut input = format!("action={name}\n");
        for (key, value) in &self.parameters {
            if key.contains(['\n', '=']) || value.contains('\n') {
                return Err(AgentError::Parameter(key.clone()));
            }
            input.push_str(&format!("{key}={value}\n"));
        }
        let mut child = Command::new(&self.program)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(AgentError::Start)?;
        if let Some(mut stdin) = child.stdin.take() {
            // An agent that does not read its input still gives an exit status.
            let _ = stdin.write_all(input.as_bytes());
        }
        let status = wait(&mut child, deadline)?;
        match (action, status.code()) {
            (FenceAction::Status, Some(0)) => Ok(AgentReply::PowerOn),
            (FenceAction::Status, Some(2)) => Ok(AgentReply::PowerOff),
            (_, Some(0)) => Ok(AgentReply::Accepted),
            _ => Err(AgentError::Failed(status)),
        }
    }
}

/// Waits for a child that leads its own process group; kills the group at the deadline.
pub(super) fn wait(child: &mut Child, deadline: Duration) -> Result<ExitStatus, AgentError> {
    // One that is too far away for the clock is none.
    let end = Instant::now().checked_add(deadline);
    loop {
        if let Some(status) = child.try_wait().map_err(AgentError::Start)? {
            return Ok(status);
        }
        if end.is_some_and(|end| Instant::now() >= end) {
            if let Ok(id) = i32::try_from(child.id()) {
                let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(id), nix::sys::signal::SIGKILL);
            }
            let _ = child.wait();
            return Err(AgentError::TooSlow(deadline));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
