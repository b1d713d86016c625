//! `nacre-blk`: exports virtual disks over NBD and as vhost-user-blk devices.

mod api;
mod exports;
mod jobs;
mod throttle;

use anyhow::{Context, Result};
use blockfmt::disk::parse_size;
use blockfmt::nbd::{ServerLimits, TlsServer};
use clap::Parser;
use exports::{ExportSpec, Exports};
use nix::sys::signal::{SigSet, Signal};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::filter::LevelFilter;

/// Exports virtual disks over NBD and as vhost-user-blk devices; exports come and go while it runs.
#[derive(Parser)]
#[command(
    version,
    about,
    max_term_width = 100,
    after_help = "\
Examples:
  nacre-blk --export name=root,path=root.qcow2,format=qcow2 --unix /run/nbd.sock
  nacre-blk --export name=root,path=root.qcow2,format=qcow2,vhost=/run/root.sock,queues=4
  nacre-blk --export name=data,path=/dev/vg/data,format=raw,direct,vhost=/run/data.sock
  nacre-blk --export name=root,path=root.luks,format=luks,secret-file=key --unix /run/nbd.sock
  nacre-blk --export name=iso,path=cd.raw,format=raw,readonly --tcp 127.0.0.1:10809 \\
    --api /run/blk.sock
  echo '{\"command\":\"add\",\"name\":\"data\",\"path\":\"data.vhd\",\"format\":\"vhd\"}' | nc -NU /run/blk.sock
  echo '{\"command\":\"list\"}' | nc -NU /run/blk.sock
  echo '{\"command\":\"remove\",\"name\":\"data\"}' | nc -NU /run/blk.sock
  echo '{\"command\":\"snapshot\",\"disks\":[{\"name\":\"root\",\"path\":\"root-1.qcow2\"}]}' \\
    | nc -NU /run/blk.sock
  echo '{\"command\":\"migrate\",\"name\":\"root\",\"path\":\"/new/root.qcow2\",\"format\":\"qcow2\"}' \\
    | nc -NU /run/blk.sock
  echo '{\"command\":\"migrate\",\"name\":\"root\",\"path\":\"/new/root\",\"format\":\"raw\",\"mode\":\"redirect\"}' \\
    | nc -NU /run/blk.sock
  echo '{\"command\":\"roll-back\",\"name\":\"root\",\"image\":\"root.qcow2\",\"path\":\"root-2.qcow2\"}' \\
    | nc -NU /run/blk.sock
  echo '{\"command\":\"delete-snapshot\",\"name\":\"root\",\"image\":\"root.qcow2\"}' | nc -NU /run/blk.sock
  echo '{\"command\":\"throttle\",\"group\":\"gold\",\"disks\":[\"a\",\"b\"],\"limits\":{\"write-bytes\":10000000}}' \\
    | nc -NU /run/blk.sock
  echo '{\"command\":\"jobs\"}' | nc -NU /run/blk.sock
  nacre-blk --export name=root,path=root.qcow2,format=qcow2 --tcp 0.0.0.0:10809 \\
    --tls-certificates pki --tls-verify-peer
  nbdinfo 'nbd+unix:///root?socket=/run/nbd.sock'

Without --tls-certificates NBD is not encrypted: use --tcp in networks that are trusted only."
)]
struct Args {
    /// Export a disk: name=NAME,path=PATH,format=FORMAT and, after commas, any of readonly, direct (bypass the host's page
    /// cache), bitmap=NAME (a dirty bitmap that NBD clients may read), allow=PATH (a file, or a directory of files, that
    /// headers may name besides files of their own directory), secret-file=FILE and secret-fd=FD (where a passphrase of
    /// an encrypted image is, every byte of it, for this image and those below), non-persistent=DIRECTORY (what is
    /// written goes to a file there that vanishes with the export), share-bases (with other exports that say so),
    /// changed-parents (open it even if a parent changed since its child was made), vhost=SOCKET (a vhost-user-blk device
    /// for one virtual machine, besides NBD), queues=N (of this device); may be repeated.
    #[arg(long, value_name = "EXPORT")]
    export: Vec<ExportSpec>,
    /// Listen for NBD clients on this Unix socket; may be repeated.
    #[arg(long, value_name = "SOCKET")]
    unix: Vec<PathBuf>,
    /// Listen for NBD clients on this address and port; may be repeated.
    #[arg(long, value_name = "ADDRESS")]
    tcp: Vec<SocketAddr>,
    /// Serve clients that use TLS only, with server-cert.pem and server-key.pem of this directory.
    #[arg(long, value_name = "DIRECTORY")]
    tls_certificates: Option<PathBuf>,
    /// Clients have to prove who they are with a certificate signed by those in ca-cert.pem.
    #[arg(long, requires = "tls_certificates")]
    tls_verify_peer: bool,
    /// Serve at most so many NBD clients at a time; more are turned away.
    #[arg(long, value_name = "NUMBER", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    nbd_connections: u16,
    /// Hold at most so much payload of requests of all NBD clients, whose storage answers late or who take no replies
    /// (with k, M, G or T); the clients share it evenly. On top of it each may have one request of up to 32M under way.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    nbd_memory: u64,
    /// Take commands (one JSON object a line: add, remove, list, tree, stats, resize, throttle, snapshot, roll-back,
    /// delete-snapshot, mirror, migrate, backup, commit, stream, jobs, cancel) on this Unix socket.
    #[arg(long, value_name = "SOCKET")]
    api: Option<PathBuf>,
}

fn main() -> ExitCode {
    daemons::daemon("nacre-blk", LevelFilter::ERROR, |args| run(&args).map(|()| ExitCode::SUCCESS))
}

fn run(args: &Args) -> Result<()> {
    anyhow::ensure!(
        !args.unix.is_empty() || !args.tcp.is_empty() || args.export.iter().any(|e| e.vhost.is_some()),
        "Say where to listen with --unix, --tcp or an export's vhost="
    );
    // Blocked before any thread starts, so that the signals wait for `wait` below.
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().context("Cannot block signals")?;
    let exports = Exports::new(ServerLimits {
        connections: args.nbd_connections.into(),
        bytes: args.nbd_memory,
        ..ServerLimits::default()
    });
    for spec in &args.export {
        exports.add(spec)?;
        if let Some(socket) = &spec.vhost {
            daemons::outln!("listening vhost-user {}", socket.display());
        }
    }
    if let Some(directory) = &args.tls_certificates {
        exports.server().require_tls(TlsServer::from_directory(directory, args.tls_verify_peer)?);
    }
    for path in &args.unix {
        exports.server().listen_unix(path)?;
        daemons::outln!("listening unix {}", path.display());
    }
    for address in &args.tcp {
        daemons::outln!("listening tcp {}", exports.server().listen_tcp(*address)?);
    }
    let api = args.api.as_deref().map(|path| api::Api::start(path, exports.clone())).transpose()?;
    signals.wait().context("Cannot wait for signals")?;
    drop(api);
    exports.close()
}
