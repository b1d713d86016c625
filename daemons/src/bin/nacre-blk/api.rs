//! The JSON API on a Unix socket: one object a line, one reply a line.

use crate::exports::{CopySpec, ExportSpec, Exports, RollBackSpec, SnapshotSpec};
use crate::throttle::GroupSpec;
use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Longest line of a command, in bytes.
const MAX_LINE: u64 = 64 << 10;
/// A client that says nothing for this long makes way for the next one.
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
enum Command {
    Add(ExportSpec),
    Remove {
        name: String,
    },
    Resize {
        name: String,
        size: u64,
    },
    Snapshot {
        disks: Vec<SnapshotSpec>,
    },
    RollBack(RollBackSpec),
    DeleteSnapshot {
        name: String,
        image: PathBuf,
        #[serde(default)]
        rate: u64,
    },
    Tree,
    Stats,
    Throttle(GroupSpec),
    Mirror(CopySpec),
    Migrate(CopySpec),
    Backup(CopySpec),
    Commit {
        name: String,
        #[serde(default)]
        rate: u64,
    },
    Stream {
        name: String,
        #[serde(default)]
        rate: u64,
    },
    List,
    Jobs,
    Cancel {
        job: u64,
    },
}

/// The socket and the thread that serves it, one client after the other.
pub struct Api {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Api {
    pub fn start(path: &Path, exports: Exports) -> Result<Self> {
        let context = || format!("Cannot listen on {}", path.display());
        let listener = vmm_core::socket::listen(path).with_context(context)?;
        // Whoever may write to the socket may open any image.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).with_context(context)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = std::thread::Builder::new().name("api".into()).spawn(move || {
            for stream in listener.incoming() {
                if stopping.load(Ordering::Acquire) {
                    return;
                }
                if let Err(error) = stream.and_then(|s| serve(&s, &exports, &stopping)) {
                    tracing::debug!(%error, "An API connection ended");
                }
            }
        })?;
        Ok(Api { path: path.to_owned(), stop, thread: Some(thread) })
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // A connection wakes the thread. If nobody can connect, nobody removed the socket but us.
        let woken = UnixStream::connect(&self.path).is_ok();
        let _ = std::fs::remove_file(&self.path);
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
    }
}

fn serve(stream: &UnixStream, exports: &Exports, stop: &AtomicBool) -> io::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut reader = BufReader::new(stream);
    while !stop.load(Ordering::Acquire) {
        let mut line = String::new();
        if reader.by_ref().take(MAX_LINE).read_line(&mut line)? == 0 {
            break;
        }
        let reply = run(&line, exports).unwrap_or_else(|error| json!({ "error": daemons::describe(&error) }));
        (&*stream).write_all(format!("{reply}\n").as_bytes())?;
    }
    Ok(())
}

fn run(line: &str, exports: &Exports) -> Result<Value> {
    let job = match serde_json::from_str(line).context("Cannot understand the command")? {
        Command::Add(spec) => return exports.add(&spec).map(done),
        Command::Remove { name } => return exports.remove(&name).map(done),
        Command::Resize { name, size } => return exports.resize(&name, size).map(done),
        Command::Snapshot { disks } => return exports.snapshot(&disks).map(done),
        Command::RollBack(spec) => return exports.roll_back(&spec).map(done),
        Command::Tree => return Ok(json!({ "images": exports.tree()? })),
        Command::Stats => return Ok(json!({ "shared-bases": exports.stats() })),
        Command::Throttle(spec) => return exports.throttle(&spec).map(done),
        Command::List => return Ok(json!({ "exports": exports.list() })),
        Command::Jobs => return Ok(json!({ "jobs": exports.jobs().list() })),
        Command::Cancel { job } => return exports.jobs().cancel(job).map(done),
        Command::Mirror(spec) => exports.mirror(&spec, false)?,
        Command::Migrate(spec) if spec.redirects() => exports.redirect(&spec)?,
        Command::Migrate(spec) => exports.mirror(&spec, true)?,
        Command::Backup(spec) => exports.backup(&spec)?,
        Command::Commit { name, rate } => exports.commit(&name, rate)?,
        Command::Stream { name, rate } => exports.stream(&name, rate)?,
        Command::DeleteSnapshot { name, image, rate } => exports.delete_snapshot(&name, &image, rate)?,
    };
    Ok(json!({ "job": job }))
}

/// The reply to a command that is done.
fn done((): ()) -> Value {
    json!({})
}
