//! `nacre-switch`: a virtual switch as a process of its own.

use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use tracing_subscriber::filter::LevelFilter;
use vswitch::openflow::{OpenFlowConfig, OpenFlowServer, OpenFlowTarget};
use vswitch::{
    GatewayConfig, GatewayPort, NetdevPort, PortConfig, StreamMode, StreamPort, Switch, SwitchConfig,
    VhostUserOptions, VhostUserPort,
};

/// A virtual switch: connects VMs to each other and to the host's networks.
#[derive(Parser)]
#[command(version, about)]
struct Args {
    /// Take ports and policies from a JSON file; SIGHUP applies it anew.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["unix", "connect", "vhost_user", "vhost_user_client", "tap", "uplink", "dhcp"])]
    config: Option<PathBuf>,
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
    /// Worker threads.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Cores for the workers, in order.
    #[arg(long, value_name = "CORE", value_delimiter = ',')]
    cores: Vec<usize>,
}

fn main() -> Result<()> {
    daemons::log_to_stderr("RUST_LOG", LevelFilter::ERROR);
    let args = Args::parse();
    if args.schema {
        println!("{:#}", SwitchConfig::schema());
        return Ok(());
    }
    // Blocked before any thread starts, so that the signals wait for `wait` below.
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("Cannot block signals")?;
    let switch = Switch::builder().workers(args.workers.max(1)).cores(args.cores.clone()).build()?;
    let switch = Arc::new(switch);
    match &args.config {
        Some(path) => apply(&switch, path)?,
        None => add_ports(&switch, &args)?,
    }
    let openflow = OpenFlowConfig {
        targets: args.openflow.clone(),
        // 48 bits, as most tools expect.
        datapath_id: args.datapath_id.unwrap_or_else(|| RandomState::new().hash_one(0) >> 16),
    };
    let _openflow =
        (!openflow.targets.is_empty()).then(|| OpenFlowServer::start(&switch, &openflow)).transpose()?;
    for p in switch.ports() {
        println!("port {} {} {}", p.id, p.kind, p.name);
    }
    while signals.wait().context("Cannot wait for signals")? == Signal::SIGHUP {
        let Some(path) = &args.config else { continue };
        match apply(&switch, path) {
            Ok(()) => tracing::info!("configuration applied"),
            // A wrong file changes nothing; the switch goes on as it is.
            Err(e) => tracing::error!("configuration refused: {}", daemons::describe(&e)),
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
