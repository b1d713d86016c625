//! How a machine begins: it boots, goes on from a file, or comes from another process.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use blockfmt::nbd::TlsServer;
use vmm_core::machine::{RestoreOptions, Vm, VmBuilder};
use vmm_core::migration::Channel;

use super::address::{Address, HangUp, Listener};
use super::terminal::Signals;

pub enum Origin {
    Boot,
    File(PathBuf, RestoreOptions),
    Connection(Incoming, RestoreOptions),
}

/// Where a machine comes in, and who may send it.
pub struct Incoming {
    pub address: Address,
    /// The directory of what TLS needs, if the sender has to have a certificate.
    pub certificates: Option<PathBuf>,
}

impl Origin {
    /// Makes the machine, and says whether it is to be started; `None` when a signal ended the wait for it.
    pub fn build(&self, builder: VmBuilder, signals: &Signals) -> anyhow::Result<Option<(Vm, bool)>> {
        match self {
            Self::Boot => Ok(Some((builder.build()?, true))),
            Self::File(path, options) => Ok(Some((builder.restore(path, options)?, true))),
            Self::Connection(incoming, options) => {
                let Some((channel, hang_up)) = incoming.wait(signals)? else { return Ok(None) };
                let vm = attend(signals, None, &hang_up, || builder.receive(channel, options))?;
                match (vm, signals.received()) {
                    (Ok(vm), _) => Ok(Some((vm, false))),
                    (Err(_), true) => Ok(None),
                    (Err(error), false) => Err(error.into()),
                }
            }
        }
    }
}

impl Incoming {
    /// Waits for a connection of who may send a machine; `None` when a signal came.
    fn wait(&self, signals: &Signals) -> anyhow::Result<Option<(Box<dyn Channel>, HangUp)>> {
        let tls = match &self.certificates {
            None => None,
            Some(directory) => {
                self.address.host()?;
                Some(TlsServer::from_directory(directory, true)?)
            }
        };
        let listener = self.address.listen()?;
        while signals.wait_or(&listener)? {
            match admit(&listener, tls.as_ref(), signals) {
                Ok(admitted) => return Ok(Some(admitted)),
                Err(error) if tls.is_none() => return Err(error.into()),
                // The right one may still come.
                Err(error) => tracing::warn!(%error, "A connection was refused"),
            }
        }
        Ok(None)
    }
}

/// Takes a connection, whose other side proves who it is.
fn admit(
    listener: &Listener,
    tls: Option<&TlsServer>,
    signals: &Signals,
) -> io::Result<(Box<dyn Channel>, HangUp)> {
    let socket = listener.accept()?;
    let hang_up = socket.hang_up()?;
    let channel = match tls {
        None => socket.plain(),
        Some(tls) => attend(signals, Some(HANDSHAKE), &hang_up, || socket.accept(tls))??,
    };
    Ok((channel, hang_up))
}

/// Does the work of a connection, and hangs up when a signal comes or the time is over.
fn attend<T: Send>(
    signals: &Signals,
    limit: Option<Duration>,
    hang_up: &HangUp,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let worker = scope.spawn(work);
        while !worker.is_finished() {
            if signals.received_within(POLL)? || limit.is_some_and(|limit| begun.elapsed() > limit) {
                hang_up();
                break;
            }
        }
        Ok(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// How often the end of a transfer is looked for, in milliseconds: part of what the guest is not seen to run.
const POLL: u8 = 20;
/// How long who connects may take to prove who it is; others wait meanwhile.
const HANDSHAKE: Duration = Duration::from_secs(5);
