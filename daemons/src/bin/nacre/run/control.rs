//! Commands for the running machine on a Unix socket: one JSON object a line, one reply a line.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::{Value, json};
use vmm_core::machine::{AfterSnapshot, Vm};
use vmm_core::migration::{MigrateOptions, Monitor};

use super::address::Address;

/// Longest line of a command, in bytes.
const MAX_LINE: u64 = 64 << 10;
/// Clients at a time; a migration keeps one busy while others ask how far it is.
const MAX_CLIENTS: usize = 8;

#[derive(Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
enum Command {
    Status,
    Pause,
    Resume,
    PowerButton,
    Stop,
    Snapshot {
        file: PathBuf,
        #[serde(default)]
        then: Then,
    },
    Migrate(Migrate),
    Cancel,
}

/// What becomes of a machine that was saved.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Then {
    #[default]
    Resume,
    Pause,
    Stop,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Migrate {
    to: Address,
    /// The directory of what TLS needs.
    tls_certificates: Option<PathBuf>,
    /// Bytes a second.
    bandwidth: Option<u64>,
    /// Milliseconds.
    downtime: Option<u64>,
    rounds: Option<u32>,
    #[serde(default)]
    no_throttle: bool,
    #[serde(default)]
    park: bool,
    #[serde(default)]
    shared_locks: bool,
}

impl Migrate {
    fn options(&self) -> MigrateOptions {
        let default = MigrateOptions::default();
        MigrateOptions {
            bandwidth: self.bandwidth,
            downtime: self.downtime.map_or(default.downtime, Duration::from_millis),
            rounds: self.rounds.unwrap_or(default.rounds),
            auto_converge: !self.no_throttle,
            park: self.park,
            shared_locks: self.shared_locks,
            ..default
        }
    }
}

/// What the server's threads share.
struct Shared {
    vm: Weak<Vm>,
    /// The migration that is under way.
    monitor: Mutex<Option<Arc<Monitor>>>,
    done: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The server; dropping it completes the commands under way and removes the socket.
pub struct Server {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(path: &Path, vm: Weak<Vm>) -> anyhow::Result<Self> {
        let context = || format!("Cannot take commands at {}; use another path", path.display());
        let listener = vmm_core::socket::listen(path).with_context(context)?;
        // Whoever may write to the socket may write files and read the guest's memory.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).with_context(context)?;
        let shared = Arc::new(Shared { vm, monitor: Mutex::default(), done: AtomicBool::new(false) });
        let serving = shared.clone();
        let thread = std::thread::Builder::new()
            .name("control".into())
            .stack_size(128 << 10)
            .spawn(move || accept(&listener, &serving))?;
        Ok(Self { path: path.to_owned(), shared, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.done.store(true, Ordering::SeqCst);
        // A connection of our own wakes the thread.
        let woken = UnixStream::connect(&self.path).is_ok();
        if let Some(thread) = self.thread.take()
            && woken
        {
            // It does nothing that panics.
            let _ = thread.join();
        }
        // Somebody else may have removed it.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    let mut clients: Vec<(UnixStream, JoinHandle<()>)> = Vec::new();
    for stream in listener.incoming() {
        if shared.done.load(Ordering::SeqCst) {
            break;
        }
        clients.retain(|(_, thread)| !thread.is_finished());
        let Ok(stream) = stream else { continue };
        // One too many sees its connection closed.
        if clients.len() < MAX_CLIENTS
            && let Ok(ours) = stream.try_clone()
        {
            let serving = shared.clone();
            let thread = std::thread::Builder::new().name("client".into()).spawn(move || {
                if let Err(error) = serve(&stream, &serving) {
                    tracing::debug!(%error, "A client of the control socket went away");
                }
            });
            clients.extend(thread.ok().map(|thread| (ours, thread)));
        }
    }
    for (stream, thread) in clients {
        // Who waits for a reply gets it; who does not is not waited for.
        let _ = stream.shutdown(Shutdown::Read);
        let _ = thread.join();
    }
}

fn serve(stream: &UnixStream, shared: &Shared) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.by_ref().take(MAX_LINE).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let reply = run(&line, shared).unwrap_or_else(|error| json!({ "error": daemons::describe(&error) }));
        (&*stream).write_all(format!("{reply}\n").as_bytes())?;
    }
}

fn run(line: &str, shared: &Shared) -> anyhow::Result<Value> {
    let command = serde_json::from_str(line).context("Cannot understand the command")?;
    let vm = shared.vm.upgrade().context("The machine has stopped")?;
    match command {
        Command::Status => return Ok(status(&vm, shared)),
        Command::Pause => vm.pause()?,
        Command::Resume => vm.start()?,
        Command::PowerButton => vm.press_power_button(),
        Command::Stop => vm.stop(),
        Command::Cancel => match &*lock(&shared.monitor) {
            Some(monitor) => monitor.cancel(),
            None => bail!("No migration is under way"),
        },
        Command::Snapshot { file, then } => {
            let report = vm.snapshot(
                &file,
                match then {
                    Then::Resume => AfterSnapshot::Resume,
                    Then::Pause => AfterSnapshot::StayPaused,
                    Then::Stop => AfterSnapshot::Stop,
                },
            )?;
            return Ok(json!({ "bytes": report.bytes, "paused_ms": millis(report.paused) }));
        }
        Command::Migrate(migrate) => {
            let socket = match migrate.to.connect() {
                Ok(socket) => socket,
                // A program may want to try again.
                Err(error) => return Ok(json!({ "error": daemons::describe(&error), "unreachable": true })),
            };
            let channel = match &migrate.tls_certificates {
                None => socket.plain(),
                Some(directory) => socket.secure(migrate.to.host()?, directory)?,
            };
            let monitor = Arc::new(Monitor::default());
            let mut current = lock(&shared.monitor);
            if current.is_some() {
                bail!("A migration is under way; wait for it, or cancel it");
            }
            *current = Some(monitor.clone());
            drop(current);
            let result = vm.migrate(channel, &migrate.options(), &monitor);
            *lock(&shared.monitor) = None;
            let report = result?;
            return Ok(json!({
                "rounds": report.rounds,
                "sent": report.sent,
                "downtime_ms": millis(report.downtime),
                "total_ms": millis(report.total),
                "confirmed": report.confirmed,
            }));
        }
    }
    Ok(json!({}))
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn status(vm: &Vm, shared: &Shared) -> Value {
    let state = match (vm.stop_reason(), vm.is_running()) {
        (Some(_), _) => "stopped",
        (None, true) => "running",
        (None, false) => "paused",
    };
    let migration = lock(&shared.monitor).as_ref().map(|monitor| {
        let progress = monitor.progress();
        json!({
            "round": progress.round,
            "sent": progress.sent,
            "left": progress.left,
            "throttle_percent": progress.throttle,
        })
    });
    json!({ "state": state, "migration": migration })
}
