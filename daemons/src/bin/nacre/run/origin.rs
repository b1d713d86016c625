//! How a machine begins: it boots, goes on from a file, or comes from another process.

use std::path::PathBuf;

use vmm_core::machine::{RestoreOptions, Vm, VmBuilder};

use super::address::Address;
use super::terminal::Signals;

pub enum Origin {
    Boot,
    File(PathBuf, RestoreOptions),
    Connection(Address, RestoreOptions),
}

impl Origin {
    /// Makes the machine, and says whether it is to be started; `None` when a signal ended the wait for it.
    pub fn build(&self, builder: VmBuilder, signals: &Signals) -> anyhow::Result<Option<(Vm, bool)>> {
        match self {
            Self::Boot => Ok(Some((builder.build()?, true))),
            Self::File(path, options) => Ok(Some((builder.restore(path, options)?, true))),
            Self::Connection(address, options) => {
                let listener = address.listen()?;
                if !signals.wait_or(&listener)? {
                    return Ok(None);
                }
                let (channel, hang_up) = listener.accept()?;
                drop(listener);
                std::thread::scope(|scope| {
                    let receiver = scope.spawn(|| builder.receive(channel, options));
                    while !receiver.is_finished() {
                        if signals.received_within(POLL)? {
                            hang_up();
                            break;
                        }
                    }
                    let vm = receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                    match (vm, signals.received()) {
                        (Ok(vm), _) => Ok(Some((vm, false))),
                        (Err(_), true) => Ok(None),
                        (Err(error), false) => Err(error.into()),
                    }
                })
            }
        }
    }
}

/// How often the end of a transfer is looked for, in milliseconds: part of what the guest is not seen to run.
const POLL: u8 = 20;
