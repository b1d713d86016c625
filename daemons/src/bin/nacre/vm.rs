//! `nacre vm`: commands for a machine that `nacre run --control SOCKET` runs.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::run::address::Address;

const HELP: &str = "\
The machine is one of `nacre run --control SOCKET`. A saved machine goes on with `nacre run
--restore FILE`, one that is migrated in a process that waits for it (`nacre run --incoming
ADDRESS`); both need the options that it was started with, but for the kernel, and the same
contents of its disks.

Examples:
  nacre vm vm.sock snapshot saved --then stop
  nacre vm vm.sock migrate unix:move.sock
  nacre vm vm.sock migrate tcp:192.0.2.7:7500 --tls-certificates pki --bandwidth 100000000
  nacre vm vm.sock status";

/// Look after a running machine: save it, move it, pause it.
#[derive(Parser)]
#[command(after_help = HELP)]
pub struct Args {
    /// The machine's control socket.
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Whether it runs, and how far a migration is, as JSON.
    #[command(after_help = "Example:\n  nacre vm vm.sock status")]
    Status,
    /// Stop the vCPUs and devices until `resume`.
    #[command(after_help = "Example:\n  nacre vm vm.sock pause")]
    Pause,
    /// Go on after `pause`.
    #[command(after_help = "Example:\n  nacre vm vm.sock resume")]
    Resume,
    /// Press the power button; a guest that listens shuts down.
    #[command(after_help = "Example:\n  nacre vm vm.sock power-button")]
    PowerButton,
    /// End the machine at once, as if the power failed.
    #[command(after_help = "Example:\n  nacre vm vm.sock stop")]
    Stop,
    /// Save memory and state (not disks) into a file.
    #[command(after_help = "Example:\n  nacre vm vm.sock snapshot saved --then stop")]
    Snapshot {
        /// The file; it can be read by its owner only.
        file: PathBuf,
        /// What the machine does afterwards.
        #[arg(long, value_enum, default_value = "resume")]
        then: Then,
    },
    /// Move the machine, while it runs, to a process that waits for it.
    #[command(after_help = "Example:\n  nacre vm vm.sock migrate unix:move.sock")]
    Migrate(Migrate),
    /// Give a migration up; the machine stays where it is.
    #[command(after_help = "Example:\n  nacre vm vm.sock cancel")]
    Cancel,
}

#[derive(clap::Args)]
struct Migrate {
    /// Where it waits: unix:PATH, or tcp:HOST:PORT, without TLS on a network that only trusted programs use.
    to: Address,
    /// Over TLS: the directory has ca-cert.pem, client-cert.pem and client-key.pem, and HOST is in the certificate of the
    /// other side.
    #[arg(long, value_name = "DIRECTORY")]
    tls_certificates: Option<PathBuf>,
    /// Bytes a second at most while the guest runs.
    #[arg(long, value_name = "BYTES")]
    bandwidth: Option<u64>,
    /// Milliseconds that the guest may be paused [default: 300].
    #[arg(long, value_name = "MS")]
    downtime: Option<u64>,
    /// How many times memory is gone through before the migration is given up [default: 30].
    #[arg(long, value_name = "N")]
    rounds: Option<u32>,
    /// Do not slow the vCPUs down when the guest writes faster than it can be sent.
    #[arg(long)]
    no_throttle: bool,
    /// Leave both sides paused in the end, with their disks closed: `resume` lets one go on, `stop` ends the other.
    #[arg(long)]
    park: bool,
    /// The target sees the same locks of the disks though it is on another host.
    #[arg(long)]
    shared_locks: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Then {
    /// It goes on.
    Resume,
    /// It stays paused, so that its disks can be copied.
    Pause,
    /// It ends.
    Stop,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let request = match args.command {
        Command::Status => json!({ "command": "status" }),
        Command::Pause => json!({ "command": "pause" }),
        Command::Resume => json!({ "command": "resume" }),
        Command::PowerButton => json!({ "command": "power-button" }),
        Command::Stop => json!({ "command": "stop" }),
        Command::Cancel => json!({ "command": "cancel" }),
        Command::Snapshot { file, then } => {
            let then = match then {
                Then::Resume => "resume",
                Then::Pause => "pause",
                Then::Stop => "stop",
            };
            let file = absolute(&file)?;
            json!({ "command": "snapshot", "file": file, "then": then })
        }
        Command::Migrate(migrate) => json!({
            "command": "migrate",
            "to": migrate.to.absolute()?.to_string(),
            "tls_certificates": migrate.tls_certificates.as_deref().map(absolute).transpose()?,
            "bandwidth": migrate.bandwidth,
            "downtime": migrate.downtime,
            "rounds": migrate.rounds,
            "no_throttle": migrate.no_throttle,
            "park": migrate.park,
            "shared_locks": migrate.shared_locks,
        }),
    };
    let reply = ask(&args.socket, &request)?;
    if let Some(error) = reply["error"].as_str() {
        bail!("{error}");
    }
    if reply.as_object().is_some_and(|reply| !reply.is_empty()) {
        daemons::outln!("{reply}");
    }
    Ok(ExitCode::SUCCESS)
}

/// The same for the machine's process, which may have another working directory.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).context("Cannot tell the working directory")
}

fn ask(socket: &Path, request: &Value) -> anyhow::Result<Value> {
    let context = || format!("Cannot reach a machine at {}; start it with --control", socket.display());
    let mut stream = UnixStream::connect(socket).with_context(context)?;
    stream.write_all(format!("{request}\n").as_bytes()).with_context(context)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).with_context(context)?;
    serde_json::from_str(&line).context("The machine ended without a reply")
}
