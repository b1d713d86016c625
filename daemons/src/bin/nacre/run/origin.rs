//! How a machine begins: it boots, goes on from a file, or comes from another process.

use std::io;
use std::path::PathBuf;

use blockfmt::nbd::TlsServer;
use vmm_core::machine::{RestoreOptions, Vm, VmBuilder};
use vmm_core::migration::Channel;

use super::address::{Address, HangUp};
use super::strangers;
use super::terminal::{Signals, Wake};

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
                let vm = attend(signals, &hang_up, || builder.receive(channel, options))?;
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
        let Some(directory) = &self.certificates else {
            let listener = self.address.listen()?;
            if signals.wait_or(&listener, None)? == Wake::Signal {
                return Ok(None);
            }
            let socket = listener.accept()?;
            let hang_up = socket.hang_up()?;
            return Ok(Some((socket.plain(), hang_up)));
        };
        self.address.host()?;
        let tls = TlsServer::from_directory(directory, true)?;
        Ok(strangers::first_proved(&self.address.listen()?, &tls, signals)?)
    }
}

/// Does the work of a connection, and hangs up when a signal comes.
fn attend<T: Send>(signals: &Signals, hang_up: &HangUp, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(work);
        while !worker.is_finished() {
            if signals.received_within(POLL)? {
                hang_up();
                break;
            }
        }
        Ok(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// How often the end of a transfer is looked for, in milliseconds: part of what the guest is not seen to run.
const POLL: u8 = 20;
