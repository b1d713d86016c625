//! `nacre-node`: the agent of one host of a cluster.

mod moves;
mod process;
mod signs;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use blockfmt::nbd::TlsServer;
use clap::{Parser, ValueEnum};
use cluster::agent::{Agent, AgentConfig, AgentEnd, ApiServer, Connection, Secure};
use moves::Moves;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use process::{ProcessRunner, Reset};
use std::os::fd::AsFd;
use tracing_subscriber::filter::LevelFilter;

const HELP: &str = "\
SIGTERM and SIGINT stop this host's VMs, give its leases back and end the agent; the rest of the
cluster starts the VMs elsewhere. A second signal ends it at once.

Exit status:
  0  the host has left the cluster
  1  an error, explained in one line
  2  a wrong command line
  3  the host had to reset itself

Examples:
  nacre-node --config /etc/nacre/node.json
  nacre-node --config node.json --check
  nacre-node --schema";

/// Keep the virtual machines of a cluster running: this host's agent.
#[derive(Parser)]
#[command(name = "nacre-node", version, after_help = HELP, max_term_width = 100)]
struct Args {
    /// The configuration, a JSON file (see --schema).
    #[arg(long, value_name = "FILE", required_unless_present = "schema")]
    config: Option<PathBuf>,
    /// Print the JSON schema of the configuration.
    #[arg(long)]
    schema: bool,
    /// Check the configuration and end.
    #[arg(long)]
    check: bool,
    /// The program that runs a VM [default: nacre, beside this program].
    #[arg(long, value_name = "PROGRAM")]
    nacre: Option<PathBuf>,
    /// What to do when this host must not go on: end the agent, and let the watchdog reset the host if its VMs do
    /// not die; or reset the host at once through /proc/sysrq-trigger.
    #[arg(long, value_enum, default_value = "end")]
    reset: ResetArg,
}

#[derive(Clone, Copy, ValueEnum)]
enum ResetArg {
    /// End the agent.
    End,
    /// Reset the host.
    Sysrq,
}

fn main() -> ExitCode {
    daemons::daemon("nacre-node", LevelFilter::INFO, |args| run(&args))
}

fn run(args: &Args) -> Result<ExitCode> {
    let Some(path) = args.config.as_deref().filter(|_| !args.schema) else {
        daemons::outln!("{:#}", AgentConfig::schema());
        return Ok(ExitCode::SUCCESS);
    };
    let config = AgentConfig::load(path)?;
    if args.check {
        return Ok(ExitCode::SUCCESS);
    }
    // Blocked before any thread starts, so that the signals wait to be read below.
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().context("Cannot block signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).context("Cannot wait for signals")?;
    let program = match &args.nacre {
        Some(program) => program.clone(),
        None => std::env::current_exe()
            .context("Cannot find nacre; name it with --nacre")?
            .with_file_name("nacre"),
    };
    let reset = match args.reset {
        ResetArg::End => Reset::End,
        ResetArg::Sysrq => Reset::Sysrq,
    };
    let (socket, remote) = (config.socket.clone(), config.remote.clone());
    let secure = remote.as_ref().map(|r| secure(&r.certificates)).transpose()?;
    let dir = config.state.join("vms");
    let moves = Moves::new(&config);
    let agent = Agent::start(config, |events| Ok(ProcessRunner::new(program, dir, reset, moves, events)?))?;
    let context = || format!("Cannot offer the API at {}", socket.display());
    let api = ApiServer::start(&socket, agent.handle()).with_context(context)?;
    let remote_api = match (remote, secure) {
        (Some(remote), Some(secure)) => {
            let context = || format!("Cannot offer the API at {}", remote.address);
            Some(ApiServer::start_tcp(remote.address, secure, agent.handle()).with_context(context)?)
        }
        _ => None,
    };
    let mut leaving = false;
    while !agent.is_over() {
        let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(200u8)).is_ok_and(|n| n > 0) {
            // It is readable, so this does not wait.
            let _ = signals.read_signal();
            if leaving {
                break;
            }
            leaving = true;
            agent.leave();
        }
    }
    drop((api, remote_api));
    if !agent.is_over() {
        drop(agent);
        anyhow::bail!("Ended by a second signal; the leases run out by themselves");
    }
    Ok(match agent.wait() {
        AgentEnd::Left => ExitCode::SUCCESS,
        AgentEnd::Reset => ExitCode::from(3),
        AgentEnd::Dropped => anyhow::bail!("The agent failed; look at the log"),
    })
}

/// Lets in who has a certificate that the authority in `certificates` has signed.
fn secure(certificates: &Path) -> Result<Box<Secure>> {
    let tls = TlsServer::from_directory(certificates, true).context("Cannot offer the API over TLS")?;
    Ok(Box::new(move |stream| Ok(Box::new(tls.accept(stream)?) as Box<dyn Connection>)))
}
