//! `nacre cluster`: asks this host's agent, prepares lease volumes, and simulates.

mod format;
mod show;
mod simulate;

use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use ::cluster::agent::{ApiReply, ApiRequest, Connection, ask, ask_tcp};
use ::cluster::types::{HostId, VmId};
use anyhow::Context;
use blockfmt::nbd::TlsClient;
use clap::{Parser, Subcommand};

/// The agent refused the request.
const EXIT_REFUSED: u8 = 3;
/// `status`: the host works, but not as it should.
const EXIT_DEGRADED: u8 = 4;

const HELP: &str = "\
Requests that change something are for the coordinator; another host names it.

Exit status:
  0  done
  1  an error, for example no agent answers
  2  a wrong command line
  3  the agent refused, and says why
  4  `status` only: the host is not quorate, or lacks a lease

Examples:
  nacre cluster status
  nacre cluster start web.json
  nacre cluster maintenance 2 on
  nacre cluster vms --json
  nacre cluster status --connect node2.example:7402 --certificates /etc/nacre/pki";

/// Look after a cluster of hosts through this host's agent, `nacre-node`.
#[derive(Parser)]
#[command(after_help = HELP)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    /// The agent's socket.
    #[arg(long, global = true, value_name = "SOCKET", default_value = "/run/nacre-node/api.sock")]
    socket: PathBuf,
    /// Ask the agent at this address over TLS, instead of the one of this host.
    #[arg(long, global = true, value_name = "HOST:PORT", requires = "certificates")]
    connect: Option<String>,
    /// A directory with ca-cert.pem, client-cert.pem and client-key.pem.
    #[arg(long, global = true, value_name = "DIR", requires = "connect")]
    certificates: Option<PathBuf>,
    /// Print what the agent said, as JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// This host at a glance.
    #[command(after_help = "Example:\n  nacre cluster status --socket /run/nacre-node/api.sock")]
    Status,
    /// Every host of the cluster.
    #[command(after_help = "Example:\n  nacre cluster hosts")]
    Hosts,
    /// Every virtual machine of the cluster.
    #[command(after_help = "Example:\n  nacre cluster vms --json | jq '.vms[].record.phase'")]
    Vms,
    /// The locks that this host holds, with their fencing tokens.
    #[command(after_help = "Example:\n  nacre cluster locks")]
    Locks,
    /// This host's journal of events.
    #[command(after_help = "Example:\n  nacre cluster events --after 120 --limit 50")]
    Events {
        /// Only events with higher numbers.
        #[arg(long, default_value_t = 0)]
        after: u64,
        /// How many at most.
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
    /// What the balancer would move now.
    #[command(after_help = "Example:\n  nacre cluster plan")]
    Plan,
    /// Start a virtual machine and keep it running.
    #[command(after_help = START_HELP)]
    Start {
        /// Its description, a JSON file.
        file: PathBuf,
    },
    /// Stop a virtual machine.
    #[command(after_help = "Example:\n  nacre cluster stop 7")]
    Stop {
        /// Its number.
        vm: u32,
    },
    /// Forget a stopped virtual machine.
    #[command(after_help = "Example:\n  nacre cluster remove 7")]
    Remove {
        /// Its number.
        vm: u32,
    },
    /// Move a virtual machine while it runs.
    #[command(after_help = "Example:\n  nacre cluster move 7 2")]
    Move {
        /// Its number.
        vm: u32,
        /// The host to move it to.
        host: u16,
    },
    /// Try a virtual machine again that was given up after too many failures.
    #[command(after_help = "Example:\n  nacre cluster retry 7")]
    Retry {
        /// Its number.
        vm: u32,
    },
    /// Empty a host, or take it back into service.
    #[command(after_help = "Example:\n  nacre cluster maintenance 2 on")]
    Maintenance {
        /// The host.
        host: u16,
        /// Into maintenance, or out of it.
        state: Switch,
    },
    /// Stop every virtual machine, those that others depend on last, and start none until this is off again.
    #[command(
        after_help = "With all of them stopped, `nacre cluster leave` on each host completes an orderly shutdown.\n\nExample:\n  nacre cluster halt on"
    )]
    Halt {
        /// Stop all, or start again what ran.
        state: Switch,
    },
    /// Confirm that a host which cannot be fenced is off: its virtual machines start elsewhere.
    #[command(
        after_help = "Look at the host first: if it runs, its disks will be damaged.\n\nExample:\n  nacre cluster confirm-off 3"
    )]
    ConfirmOff {
        /// The host.
        host: u16,
    },
    /// Stop this host's virtual machines, give its leases back and end its agent.
    #[command(after_help = "Example:\n  nacre cluster leave")]
    Leave,
    Format(format::Args),
    Simulate(simulate::Args),
}

const START_HELP: &str = "\
The file holds the VM's number, what it needs (MHz and MiB), the leases of its disks (volume and
area), and in `definition`, as a string, a configuration of `nacre run` (see `nacre schema`):

  {\"id\": 7, \"demand\": {\"cpu\": 1000, \"memory\": 512},
   \"disks\": [{\"lockspace\": 0, \"index\": 1}],
   \"definition\": \"{\\\"boot\\\": {\\\"kernel\\\": \\\"/srv/vmlinuz\\\"}, ...}\"}

A guest that writes a byte every few seconds to the console port named nacre.heartbeat, if the
definition has one, is restarted when it stops doing so (see `ha.health` in the agent's
configuration).

Example:
  nacre cluster start web.json";

#[derive(Clone, Copy, clap::ValueEnum)]
enum Switch {
    On,
    Off,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let request = match args.command {
        Command::Format(args) => return format::run(&args),
        Command::Simulate(args) => return simulate::run(&args),
        Command::Status => ApiRequest::Status,
        Command::Hosts => ApiRequest::Hosts,
        Command::Vms => ApiRequest::Vms,
        Command::Locks => ApiRequest::Locks,
        Command::Events { after, limit } => ApiRequest::Events { after, limit },
        Command::Plan => ApiRequest::Plan,
        Command::Start { file } => ApiRequest::Start { spec: Arc::new(read_spec(&file)?) },
        Command::Stop { vm } => ApiRequest::Stop { vm: VmId(vm) },
        Command::Remove { vm } => ApiRequest::Remove { vm: VmId(vm) },
        Command::Move { vm, host } => ApiRequest::Move { vm: VmId(vm), host: HostId(host) },
        Command::Retry { vm } => ApiRequest::Retry { vm: VmId(vm) },
        Command::Maintenance { host, state } => {
            ApiRequest::Maintenance { host: HostId(host), on: matches!(state, Switch::On) }
        }
        Command::Halt { state } => ApiRequest::Halt { on: matches!(state, Switch::On) },
        Command::ConfirmOff { host } => ApiRequest::ConfirmOff { host: HostId(host) },
        Command::Leave => ApiRequest::Leave,
    };
    let reply = match (&args.connect, &args.certificates) {
        (Some(at), Some(certificates)) => ask_remote(at, certificates, &request)?,
        _ => ask(&args.socket, &request).with_context(|| {
            format!("No agent answers at {}; is nacre-node running?", args.socket.display())
        })?,
    };
    if args.json {
        daemons::outln!("{:#}", serde_json::to_value(&reply)?);
    } else {
        show::print(&reply);
    }
    Ok(ExitCode::from(match &reply {
        ApiReply::Error { .. } => EXIT_REFUSED,
        ApiReply::Status(s) if !s.quorate || s.leases.iter().any(|l| l.generation.is_none()) => EXIT_DEGRADED,
        _ => 0,
    }))
}

/// Asks the agent at `HOST:PORT`, who has to prove that it is that host.
fn ask_remote(at: &str, certificates: &Path, request: &ApiRequest) -> anyhow::Result<ApiReply> {
    let tls = TlsClient::from_directory(certificates)?;
    let unknown = || format!("{at} is not known; give HOST:PORT");
    let address = at.to_socket_addrs().with_context(unknown)?.next().with_context(unknown)?;
    let host = at.rsplit_once(':').map_or(at, |(host, _)| host).trim_matches(['[', ']']).to_owned();
    let secure = move |stream| Ok(Box::new(tls.connect(stream, &host)?) as Box<dyn Connection>);
    ask_tcp(address, &secure, request).with_context(|| {
        format!("No agent answers at {at}, or one of you does not trust the other; look at the certificates")
    })
}

fn read_spec(file: &Path) -> anyhow::Result<::cluster::ha::VmSpec> {
    let text = std::fs::read_to_string(file).with_context(|| format!("Cannot read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| {
        format!("{} does not describe a VM; see `nacre cluster start --help`", file.display())
    })
}
