//! Who connects to send a machine, and has not proved yet that it may.

use std::collections::VecDeque;
use std::io;
use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use blockfmt::nbd::TlsServer;
use vmm_core::migration::Channel;

use super::address::{HangUp, Listener};
use super::terminal::{Signals, Wake};

/// How long one may take to prove who it is.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Connections that have not proved who they are; one more takes the place of the oldest.
const STRANGERS: usize = 16;
/// How often the strangers that there are are looked at, in milliseconds.
const POLL: u8 = 20;
/// How long to wait when a connection cannot be taken, in milliseconds.
const PAUSE: u8 = 100;

struct Stranger<'scope> {
    since: Instant,
    hang_up: HangUp,
    /// It is over for this one, whatever it has proved meanwhile.
    hung_up: bool,
    handshake: ScopedJoinHandle<'scope, io::Result<Box<dyn Channel>>>,
}

impl Stranger<'_> {
    fn send_away(&mut self) {
        (self.hang_up)();
        self.hung_up = true;
    }
}

/// Waits for the first connection whose other side has proved who it is; `None` when a signal came. Those who take their
/// time do not keep others waiting.
pub fn first_proved(
    listener: &Listener,
    tls: &TlsServer,
    signals: &Signals,
) -> io::Result<Option<(Box<dyn Channel>, HangUp)>> {
    std::thread::scope(|scope| {
        let mut strangers = VecDeque::new();
        let admitted = admit(listener, tls, signals, scope, &mut strangers);
        // The scope waits for them.
        strangers.iter_mut().for_each(Stranger::send_away);
        admitted
    })
}

fn admit<'scope, 'env>(
    listener: &Listener,
    tls: &'env TlsServer,
    signals: &Signals,
    scope: &'scope Scope<'scope, 'env>,
    strangers: &mut VecDeque<Stranger<'scope>>,
) -> io::Result<Option<(Box<dyn Channel>, HangUp)>> {
    loop {
        let look = (!strangers.is_empty()).then_some(POLL);
        match signals.wait_or(listener, look)? {
            Wake::Signal => return Ok(None),
            Wake::Ready => match begin(listener, tls, scope) {
                Ok(stranger) => strangers.push_back(stranger),
                Err(error) => {
                    // Out of descriptors or threads, most likely: they come back.
                    tracing::warn!(%error, "A connection was not taken");
                    signals.received_within(PAUSE)?;
                }
            },
            Wake::Timeout => {}
        }
        while let Some(at) = strangers.iter().position(|s| s.handshake.is_finished()) {
            let Some(Stranger { handshake, hang_up, hung_up, .. }) = strangers.remove(at) else { break };
            match handshake.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)) {
                Ok(channel) if !hung_up => return Ok(Some((channel, hang_up))),
                Ok(_) => {}
                // The right one may still come.
                Err(error) => tracing::warn!(%error, "A connection was refused"),
            }
        }
        strangers.iter_mut().filter(|s| s.since.elapsed() > HANDSHAKE).for_each(Stranger::send_away);
        let surplus = strangers.len().saturating_sub(STRANGERS);
        strangers.iter_mut().take(surplus).for_each(Stranger::send_away);
    }
}

/// Takes a connection, and lets its other side prove who it is.
fn begin<'scope, 'env>(
    listener: &Listener,
    tls: &'env TlsServer,
    scope: &'scope Scope<'scope, 'env>,
) -> io::Result<Stranger<'scope>> {
    let socket = listener.accept()?;
    let hang_up = socket.hang_up()?;
    let handshake = Builder::new().name("stranger".into()).spawn_scoped(scope, move || socket.accept(tls))?;
    Ok(Stranger { since: Instant::now(), hang_up, hung_up: false, handshake })
}
