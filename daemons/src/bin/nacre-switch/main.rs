//! `nacre-switch`: a virtual switch as a process of its own.

use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use nix::sys::signal::{SigSet, Signal};
use tracing_subscriber::filter::LevelFilter;
use vswitch::control::{self, ControlServer, Request, View};
use vswitch::openflow::{OpenFlowConfig, OpenFlowServer, OpenFlowTarget};
use vswitch::{
    GatewayConfig, GatewayPort, NetdevPort, PatchPanel, PortConfig, StreamMode, StreamPort, Switch,
    SwitchConfig, VhostUserOptions, VhostUserPort,
};

const HELP: &str = "\
Exit status: 0 after SIGINT, SIGTERM or an answer; 1 after an error, explained in one line; 2 for a
wrong command line.

Examples:
  nacre-switch --unix vm1.sock --unix vm2.sock --dhcp 10.0.0.0/24
  nacre-switch --vhost-user vm1.sock --vhost-user vm2.sock --uplink eth1 --cores 1
  nacre-switch --unix vm1.sock --tap tap0 --openflow punix:/run/br.mgmt
  nacre-switch --config net.json --host h1 --control ctl
  nacre-switch show top --every 2 --control ctl";

/// A virtual switch: connects VMs to each other and to the host's networks.
#[derive(Parser)]
#[command(version, about, args_conflicts_with_subcommands = true, after_help = HELP, max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    question: Option<Question>,
    /// Take ports and policies from a JSON file; SIGHUP applies it anew. Repeated: several switches, which patch ports
    /// may join.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["unix", "connect", "vhost_user", "vhost_user_client", "tap", "uplink", "dhcp"])]
    config: Vec<PathBuf>,
    /// Print the JSON schema of the configuration and end.
    #[arg(long)]
    schema: bool,
    /// Listen on a Unix stream socket for a VM (QEMU and passt framing); may be repeated.
    #[arg(long, value_name = "SOCKET")]
    unix: Vec<PathBuf>,
    /// Connect to a Unix stream socket, for example of passt; may be repeated.
    #[arg(long, value_name = "SOCKET")]
    connect: Vec<PathBuf>,
    /// Listen on a vhost-user socket for a VM; may be repeated.
    #[arg(long, value_name = "SOCKET")]
    vhost_user: Vec<PathBuf>,
    /// Connect to a front-end that listens on a vhost-user socket; may be repeated.
    #[arg(long, value_name = "SOCKET")]
    vhost_user_client: Vec<PathBuf>,
    /// Pairs of queues of vhost-user ports and taps.
    #[arg(long, default_value_t = 1)]
    queues: usize,
    /// Open (or make) a tap interface; may be repeated.
    #[arg(long, value_name = "NAME")]
    tap: Vec<String>,
    /// Attach to an existing interface; may be repeated.
    #[arg(long, value_name = "NAME")]
    uplink: Vec<String>,
    /// Run a DHCP server for this network (a.b.c.d/prefix) at its first address.
    #[arg(long, value_name = "NETWORK")]
    dhcp: Option<String>,
    /// Speak OpenFlow 1.0 and 1.3: ptcp:ADDRESS:PORT and punix:PATH wait for tools and controllers, tcp:ADDRESS:PORT
    /// and unix:PATH connect to a controller; snoop:punix:PATH shows what is said. May be repeated.
    #[arg(long, value_name = "TARGET")]
    openflow: Vec<OpenFlowTarget>,
    /// Number by which OpenFlow controllers know the switch, in hexadecimal; a random one unless given.
    #[arg(long, value_name = "HEX", value_parser = hexadecimal)]
    datapath_id: Option<u64>,
    /// Answer questions (`show`, `trace`) on this Unix socket; with several switches, one socket each.
    #[arg(long, value_name = "SOCKET")]
    control: Vec<PathBuf>,
    /// This host's name in a configuration that describes the switches of several.
    #[arg(long, value_name = "NAME", requires = "config")]
    host: Option<String>,
    /// Worker threads of each switch.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Cores for the workers, in order.
    #[arg(long, value_name = "CORE", value_delimiter = ',')]
    cores: Vec<usize>,
}

/// Questions to a switch that runs with --control.
#[derive(Subcommand)]
enum Question {
    /// Show ports, MAC addresses, flow rules, or the flows that move most bytes.
    #[command(
        after_help = "Examples:\n  nacre-switch show ports --control ctl\n  nacre-switch show top --every 2 --control ctl"
    )]
    Show {
        what: Shown,
        /// Socket of the running switch.
        #[arg(long, value_name = "SOCKET")]
        control: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Most rows.
        #[arg(long, default_value_t = 50)]
        limit: usize,
        /// Show it anew every so many seconds, until interrupted.
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
        every: Option<u64>,
    },
    /// Print all counters as a page in Prometheus' text format.
    #[command(after_help = "Example:\n  nacre-switch metrics --control ctl")]
    Metrics {
        /// Socket of the running switch.
        #[arg(long, value_name = "SOCKET")]
        control: PathBuf,
    },
    /// Explain what would happen to a frame, without sending it.
    #[command(
        after_help = "Example (an ARP request):\n  nacre-switch trace --control ctl --port vm1.sock \\\n    ffffffffffff52540000000108060001080006040001525400000001c0a80001000000000000c0a80002"
    )]
    Trace {
        /// The frame in hexadecimal, from the destination address on.
        frame: String,
        /// Name of the port that it comes in by.
        #[arg(long)]
        port: String,
        /// Socket of the running switch.
        #[arg(long, value_name = "SOCKET")]
        control: PathBuf,
    },
    /// Print the whole state of a port as JSON: properties, learned addresses, connections, counters.
    #[command(after_help = "Example:\n  nacre-switch export-port vm1 --control ctl >vm1.json")]
    ExportPort {
        /// Name of the port.
        port: String,
        /// Socket of the running switch.
        #[arg(long, value_name = "SOCKET")]
        control: PathBuf,
    },
    /// Give a port the addresses, connections and counters that it had at another switch, as on standard input.
    #[command(after_help = "Example:\n  nacre-switch import-port --control ctl <vm1.json")]
    ImportPort {
        /// Socket of the running switch.
        #[arg(long, value_name = "SOCKET")]
        control: PathBuf,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Shown {
    Ports,
    Macs,
    Flows,
    Top,
}

impl From<Shown> for View {
    fn from(s: Shown) -> Self {
        match s {
            Shown::Ports => View::Ports,
            Shown::Macs => View::Macs,
            Shown::Flows => View::Flows,
            Shown::Top => View::Top,
        }
    }
}

fn ask(question: Question) -> Result<()> {
    match question {
        Question::Show { what, control, json, limit, every } => loop {
            let answer = control::ask(&control, &Request::Show { what: what.into(), limit })?;
            if every.is_some() && !json {
                // Clears the terminal.
                daemons::out!("\x1b[H\x1b[2J");
            }
            if json {
                daemons::outln!("{answer:#}");
            } else {
                daemons::out!("{}", control::table(what.into(), &answer));
            }
            match every {
                Some(seconds) => std::thread::sleep(Duration::from_secs(seconds)),
                None => break,
            }
        },
        Question::Metrics { control } => {
            daemons::out!("{}", control::ask(&control, &Request::Metrics)?.as_str().unwrap_or_default());
        }
        Question::Trace { frame, port, control } => {
            let answer = control::ask(&control, &Request::Trace { port, frame })?;
            for line in answer.as_array().into_iter().flatten() {
                daemons::outln!("{}", line.as_str().unwrap_or_default());
            }
        }
        Question::ExportPort { port, control } => {
            daemons::outln!("{:#}", control::ask(&control, &Request::ExportPort { port })?);
        }
        Question::ImportPort { control } => {
            let state = serde_json::from_reader(std::io::stdin().lock())
                .context("The state of a port on standard input cannot be read")?;
            control::ask(&control, &Request::ImportPort { state })?;
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    daemons::daemon("nacre-switch", LevelFilter::ERROR, |args| run(args).map(|()| ExitCode::SUCCESS))
}

fn run(args: Args) -> Result<()> {
    if let Some(question) = args.question {
        return ask(question);
    }
    if args.schema {
        daemons::outln!("{:#}", SwitchConfig::schema());
        return Ok(());
    }
    // Blocked before any thread starts, so that the signals wait for `wait` below.
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("Cannot block signals")?;
    if args.config.len() > 1 && !args.openflow.is_empty() {
        bail!("OpenFlow needs a process for each switch; give one --config only");
    }
    if args.control.len() > args.config.len().max(1) {
        bail!("There are more control sockets than switches; give one --control for each --config");
    }
    let panel = PatchPanel::default();
    let mut cores = args.cores.iter().copied();
    let mut switches = Vec::new();
    for _ in 0..args.config.len().max(1) {
        let workers = args.workers.max(1);
        let cores = cores.by_ref().take(workers).collect();
        let mut builder = Switch::builder().workers(workers).cores(cores).patch_panel(panel.clone());
        if let Some(host) = &args.host {
            builder = builder.host(host);
        }
        switches.push(Arc::new(builder.build()?));
    }
    for (switch, path) in switches.iter().zip(&args.config) {
        apply(switch, path)?;
    }
    let switch = &switches[0];
    if args.config.is_empty() {
        add_ports(switch, &args)?;
    }
    let openflow = OpenFlowConfig {
        targets: args.openflow.clone(),
        // 48 bits, as most tools expect.
        datapath_id: args.datapath_id.unwrap_or_else(|| RandomState::new().hash_one(0) >> 16),
    };
    let _openflow =
        (!openflow.targets.is_empty()).then(|| OpenFlowServer::start(switch, &openflow)).transpose()?;
    let control = switches.iter().zip(&args.control).map(|(s, path)| ControlServer::start(s, path));
    let _control = control.collect::<vswitch::Result<Vec<_>>>()?;
    for p in switches.iter().flat_map(|s| s.ports()) {
        daemons::outln!("port {} {} {}", p.id, p.kind, p.name);
    }
    while signals.wait().context("Cannot wait for signals")? == Signal::SIGHUP {
        for (switch, path) in switches.iter().zip(&args.config) {
            match apply(switch, path) {
                Ok(()) => tracing::info!("configuration applied"),
                // A wrong file changes nothing; the switch goes on as it is.
                Err(e) => tracing::error!("configuration refused: {}", daemons::describe(&e)),
            }
        }
    }
    Ok(())
}

fn hexadecimal(s: &str) -> Result<u64, String> {
    u64::from_str_radix(s.trim_start_matches("0x"), 16)
        .map_err(|_| format!("\"{s}\" is not a hexadecimal number"))
}

fn apply(switch: &Switch, path: &Path) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| format!("Cannot read {}", path.display()))?;
    switch.apply(&SwitchConfig::parse(&text)?)?;
    Ok(())
}

fn add_ports(switch: &Switch, args: &Args) -> Result<()> {
    let streams = args.unix.iter().map(|p| (p, StreamMode::Listen));
    let streams = streams.chain(args.connect.iter().map(|p| (p, StreamMode::Connect)));
    for (path, mode) in streams {
        let port = StreamPort::new(path, mode)?;
        switch.add_port(&path.to_string_lossy(), port, PortConfig::default())?;
    }
    let vhost = args.vhost_user.iter().map(|p| (p, StreamMode::Listen));
    let vhost = vhost.chain(args.vhost_user_client.iter().map(|p| (p, StreamMode::Connect)));
    for (path, mode) in vhost {
        let options = VhostUserOptions { queue_pairs: args.queues, ..VhostUserOptions::new(path, mode) };
        switch.add_port(&path.to_string_lossy(), VhostUserPort::new(&options)?, PortConfig::default())?;
    }
    for name in &args.tap {
        switch.add_port(name, NetdevPort::tap(name, args.queues)?, PortConfig::default())?;
    }
    for name in &args.uplink {
        switch.add_port(name, NetdevPort::uplink(name)?, PortConfig::default())?;
    }
    if let Some(network) = &args.dhcp {
        let (address, prefix) = network.split_once('/').context("Write --dhcp as a.b.c.d/prefix")?;
        let config = GatewayConfig::network(
            address.parse().context("The address of --dhcp is wrong")?,
            prefix.parse().context("The prefix of --dhcp is wrong")?,
        )?;
        switch.add_port("dhcp", GatewayPort::new(config, switch.clock().clone())?, PortConfig::default())?;
    }
    Ok(())
}
