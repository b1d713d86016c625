//! Jobs of a `nacre-blk` process, through its API.

use anyhow::{Context, Result, bail};
use blockfmt::job::JobControl;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Time between two looks at a job.
const PERIOD: Duration = Duration::from_millis(100);

/// A `nacre-blk` process, by its API socket.
pub struct Remote(PathBuf);

impl Remote {
    pub fn new(socket: &Path) -> Self {
        Remote(socket.to_owned())
    }

    /// Runs one command and returns its reply.
    fn call(&self, command: &Value) -> Result<Value> {
        let context = || format!("Cannot talk to nacre-blk at {}", self.0.display());
        // One connection for each: others may talk to it between two looks.
        let mut stream = UnixStream::connect(&self.0).with_context(context)?;
        stream.write_all(format!("{command}\n").as_bytes()).with_context(context)?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).with_context(context)?;
        let reply: Value = serde_json::from_str(&line).with_context(context)?;
        match reply["error"].as_str() {
            Some(error) => bail!("{error}"),
            None => Ok(reply),
        }
    }

    /// Starts a job and waits for its end; returns its number and the bytes it dealt with. Cancelling `control`
    /// cancels the job.
    pub fn run(&self, command: &Value, control: &JobControl) -> Result<(u64, u64)> {
        let number = self.call(command)?["job"].as_u64().context("The command started no job")?;
        let mut cancelled = false;
        loop {
            let jobs = self.call(&json!({ "command": "jobs" }))?;
            let job = jobs["jobs"].as_array().and_then(|jobs| jobs.iter().find(|job| job["job"] == number));
            let job = job.with_context(|| format!("Job {number} is gone"))?;
            let count = |key: &str| job[key].as_u64().unwrap_or(0);
            control.report_remote(count("done"), count("total"));
            match job["state"].as_str() {
                Some("running") => {}
                Some("done") => return Ok((number, count("done"))),
                Some("cancelled") => return Err(blockfmt::Error::Cancelled.into()),
                _ => bail!("{}", job["error"].as_str().unwrap_or("The job failed")),
            }
            if control.is_cancelled() && !cancelled {
                cancelled = true;
                self.call(&json!({ "command": "cancel", "job": number }))?;
            }
            std::thread::sleep(PERIOD);
        }
    }
}
