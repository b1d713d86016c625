//! The distributed lock manager between real hosts: [`Dlm`] over TCP.
//!
//! Messages between two hosts arrive in order and once, also when connections break: they are numbered, and kept
//! until the receiver has them. A host that was left out of a view gets nothing of what was meant for it before.
//!
//! Who is a member is the embedder's to say, by [`LockManager::install`]: views are numbered by one coordinator, every
//! member gets all of them in order, a host is left out only once it was fenced (or has ended by itself), and one that
//! was started anew comes back in a view of its own.

mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use wire::{Hello, Receiving, Sending};

use crate::dlm::{Dlm, DlmInput, DlmOutput, LockError, LockEvent, LockId, Message, Mode, View};
use crate::types::HostId;

/// How long a peer may take to answer before the connection is opened anew.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait before the next attempt to connect.
const PAUSE: Duration = Duration::from_millis(100);
/// Messages that go out together, and wait for one answer; fewer if they are long.
const BATCH: usize = 256;
/// Connections that have not proved who they are; one more takes the place of the oldest.
const STRANGERS: usize = 32;

/// Where the lock managers are.
#[derive(Clone, Debug)]
pub struct LockManagerConfig {
    /// This host.
    pub host: HostId,
    /// Where it listens.
    pub listen: SocketAddr,
    /// What all hosts, and nobody else, know.
    pub key: Vec<u8>,
    /// Where the other hosts listen.
    pub peers: BTreeMap<HostId, SocketAddr>,
}

/// A lock of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockStatus {
    /// The lock.
    pub id: LockId,
    /// Its name.
    pub name: String,
    /// The mode that it has.
    pub granted: Option<Mode>,
    /// A change is under way.
    pub changing: bool,
}

/// What one peer has still to get.
struct Outbox {
    /// Names the numbering; a new one starts over.
    stream: u64,
    /// The number of the first message in the queue.
    first: u64,
    queue: VecDeque<Vec<u8>>,
}

struct State {
    dlm: Dlm,
    outboxes: BTreeMap<HostId, Outbox>,
    /// Of each peer its stream and the last number that arrived.
    arrived: BTreeMap<HostId, (u64, u64)>,
    /// Open connections by number, to end them.
    connections: BTreeMap<u64, TcpStream>,
    last_connection: u64,
    /// Those that have not proved who they are, the oldest first.
    strangers: VecDeque<u64>,
    ended: bool,
}

struct Shared {
    config: LockManagerConfig,
    state: Mutex<State>,
    /// Something was put into an outbox, or the end has come.
    news: Condvar,
    events: Sender<LockEvent>,
}

/// A connection that is read from until a certain time, however slowly the other end sends.
struct Patient<'a> {
    stream: &'a TcpStream,
    until: Option<Instant>,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(until) = self.until {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        self.stream.read(buffer)
    }
}

impl Write for Patient<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// The lock manager of one host. Dropping it leaves all locks to the next view.
pub struct LockManager {
    shared: Arc<Shared>,
    address: SocketAddr,
    threads: Vec<JoinHandle<()>>,
}

impl LockManager {
    /// Starts a lock manager that is in no view yet. What becomes of its locks comes through the receiver; the grant
    /// of a lock may come before [`LockManager::lock`] returns.
    ///
    /// # Errors
    /// The address cannot be used.
    pub fn start(config: LockManagerConfig) -> io::Result<(Self, Receiver<LockEvent>)> {
        let listener = TcpListener::bind(config.listen)?;
        let address = listener.local_addr()?;
        let peers: Vec<HostId> = config.peers.keys().copied().collect();
        let mut outboxes = BTreeMap::new();
        for peer in &peers {
            let stream = u64::from_be_bytes(wire::random()?);
            outboxes.insert(*peer, Outbox { stream, first: 1, queue: VecDeque::new() });
        }
        let state = State {
            dlm: Dlm::new(config.host),
            outboxes,
            arrived: BTreeMap::new(),
            connections: BTreeMap::new(),
            last_connection: 0,
            strangers: VecDeque::new(),
            ended: false,
        };
        let (events, receiver) = channel();
        let shared = Arc::new(Shared { config, state: Mutex::new(state), news: Condvar::new(), events });
        let mut manager = LockManager { shared: shared.clone(), address, threads: Vec::new() };
        let listening = shared.clone();
        let listen = move || listening.listen(&listener);
        manager.threads.push(thread::Builder::new().name("locks".into()).spawn(listen)?);
        for peer in peers {
            let sending = shared.clone();
            let name = format!("locks-{}", peer.0);
            manager.threads.push(thread::Builder::new().name(name).spawn(move || sending.send_to(peer))?);
        }
        Ok((manager, receiver))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Installs the next view. One that is not newer than the present one changes nothing.
    pub fn install(&self, view: View) {
        let mut state = self.shared.lock();
        for (peer, outbox) in &mut state.outboxes {
            if !view.members.contains(peer) && !outbox.queue.is_empty() {
                // Whatever it gets next is not the continuation of this.
                *outbox = Outbox { stream: outbox.stream.wrapping_add(1), first: 1, queue: VecDeque::new() };
            }
        }
        let mut out = Vec::new();
        state.dlm.step(DlmInput::View(view), &mut out);
        self.shared.carry_out(&mut state, out);
    }

    /// Asks for a new lock; [`LockEvent::Granted`] tells when it is there.
    ///
    /// # Errors
    /// The name is empty or too long, or the host is not a member.
    pub fn lock(&self, name: &str, mode: Mode) -> Result<LockId, LockError> {
        self.ask(|dlm, out| dlm.lock(name, mode, out))
    }

    /// Asks for another mode; a value is written if the present mode may write. Until the answer only what
    /// both modes allow ([`Mode::meet`]) may be relied on: stop using the rest of the present mode first.
    ///
    /// # Errors
    /// There is no such lock, it is being changed, or the value is too long.
    pub fn convert(&self, id: LockId, mode: Mode, value: Option<Vec<u8>>) -> Result<(), LockError> {
        self.ask(|dlm, out| dlm.convert(id, mode, value, out))
    }

    /// Gives a lock back; stop using it first. [`LockEvent::Released`] tells when it is gone.
    ///
    /// # Errors
    /// There is no such lock, it is being changed, or the value is too long.
    pub fn release(&self, id: LockId, value: Option<Vec<u8>>) -> Result<(), LockError> {
        self.ask(|dlm, out| dlm.release(id, value, out))
    }

    /// This host's locks.
    pub fn locks(&self) -> Vec<LockStatus> {
        let state = self.shared.lock();
        let status = |(id, name, granted, changing): (LockId, &str, Option<Mode>, bool)| LockStatus {
            id,
            name: name.to_owned(),
            granted,
            changing,
        };
        state.dlm.locks().map(status).collect()
    }

    /// Whether the members of the present view have told each other their locks; until then nothing is granted.
    pub fn is_settled(&self) -> bool {
        self.shared.lock().dlm.is_settled()
    }

    fn ask<T>(&self, f: impl FnOnce(&mut Dlm, &mut Vec<DlmOutput>) -> T) -> T {
        let mut state = self.shared.lock();
        let mut out = Vec::new();
        let result = f(&mut state.dlm, &mut out);
        self.shared.carry_out(&mut state, out);
        result
    }
}

impl Drop for LockManager {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ended = true;
        for connection in state.connections.values() {
            // It may have ended already.
            let _ = connection.shutdown(Shutdown::Both);
        }
        drop(state);
        self.shared.news.notify_all();
        // A connection of our own wakes the listener.
        let woken = TcpStream::connect_timeout(&self.address, PATIENCE).is_ok();
        let listener = self.threads.drain(..1);
        for thread in listener.filter(|_| woken).collect::<Vec<_>>().into_iter().chain(self.threads.drain(..))
        {
            // They do nothing that panics.
            let _ = thread.join();
        }
    }
}

/// The first message of a queue, and those after it that are no longer in all than one may be.
fn batch(queue: &VecDeque<Vec<u8>>) -> Vec<Vec<u8>> {
    let mut length = 0;
    let fits = |message: &&Vec<u8>| {
        let first = length == 0;
        length += message.len();
        first || length <= wire::LONGEST
    };
    queue.iter().take(BATCH).take_while(fits).cloned().collect()
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_out(&self, state: &mut State, outputs: Vec<DlmOutput>) {
        for output in outputs {
            match output {
                DlmOutput::Send(to, message) => {
                    // Numbers, strings and maps of them: this has a JSON form. A member without an address gets
                    // nothing, as if it were cut off.
                    if let (Some(outbox), Ok(bytes)) =
                        (state.outboxes.get_mut(&to), serde_json::to_vec(&message))
                    {
                        outbox.queue.push_back(bytes);
                    }
                }
                DlmOutput::Event(event) => {
                    // Whoever does not listen any more does not mind.
                    let _ = self.events.send(event);
                }
            }
        }
        self.news.notify_all();
    }

    /// Keeps a connection where the end finds it; `None` when the end has come.
    fn keep(&self, stream: &TcpStream) -> io::Result<Option<u64>> {
        let kept = stream.try_clone()?;
        let mut state = self.lock();
        if state.ended {
            return Ok(None);
        }
        state.last_connection += 1;
        let id = state.last_connection;
        state.connections.insert(id, kept);
        Ok(Some(id))
    }

    // -- sending

    /// Brings a peer its messages until the end.
    fn send_to(&self, peer: HostId) {
        while self.wait_for_messages(peer) {
            if let Err(error) = self.connection_to(peer) {
                tracing::debug!(peer = peer.0, %error, "Connection of the lock manager ended");
            }
            let state = self.lock();
            if !state.ended {
                // Whoever changes something meanwhile does not make the peer come back sooner.
                drop(state);
                thread::sleep(PAUSE);
            }
        }
    }

    /// Waits until a peer has something to get; false at the end.
    fn wait_for_messages(&self, peer: HostId) -> bool {
        let idle = |s: &mut State| !s.ended && s.outboxes.get(&peer).is_none_or(|o| o.queue.is_empty());
        let state = self.news.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        !state.ended
    }

    fn connection_to(&self, peer: HostId) -> io::Result<()> {
        let Some(address) = self.config.peers.get(&peer) else { return Ok(()) };
        let stream = TcpStream::connect_timeout(address, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let Some(id) = self.keep(&stream)? else { return Ok(()) };
        let result = self.talk(peer, stream);
        self.lock().connections.remove(&id);
        result
    }

    fn talk(&self, peer: HostId, stream: TcpStream) -> io::Result<()> {
        let hello = {
            let state = self.lock();
            let Some(outbox) = state.outboxes.get(&peer) else { return Ok(()) };
            Hello { from: self.config.host, to: peer, stream: outbox.stream, first: outbox.first }
        };
        let (mut sending, last) = Sending::open(stream, &self.config.key, &hello)?;
        self.forget(peer, hello.stream, last);
        while self.wait_for_messages(peer) {
            let (first, messages) = {
                let state = self.lock();
                let Some(outbox) = state.outboxes.get(&peer) else { return Ok(()) };
                if outbox.stream != hello.stream {
                    return Ok(());
                }
                (outbox.first, batch(&outbox.queue))
            };
            if messages.is_empty() {
                continue;
            }
            let last = sending.send(first, &messages)?;
            self.forget(peer, hello.stream, last);
        }
        Ok(())
    }

    /// Drops what the peer has.
    fn forget(&self, peer: HostId, stream: u64, last: u64) {
        let mut state = self.lock();
        if let Some(outbox) = state.outboxes.get_mut(&peer).filter(|o| o.stream == stream) {
            while outbox.first <= last && outbox.queue.pop_front().is_some() {
                outbox.first += 1;
            }
        }
    }

    // -- receiving

    fn listen(&self, listener: &TcpListener) {
        thread::scope(|scope| {
            loop {
                let accepted = listener.accept();
                if self.lock().ended {
                    return;
                }
                let Ok((stream, _)) = accepted else {
                    // Out of descriptors, most likely: they come back.
                    thread::sleep(PAUSE);
                    continue;
                };
                // Without a descriptor for it, it has to try again.
                let Ok(Some(id)) = self.keep_stranger(&stream) else { continue };
                scope.spawn(move || {
                    if let Err(error) = self.serve(id, &stream) {
                        tracing::debug!(%error, "Connection to the lock manager ended");
                    }
                });
            }
        });
    }

    /// Keeps a connection whose other end has not proved who it is.
    fn keep_stranger(&self, stream: &TcpStream) -> io::Result<Option<u64>> {
        let Some(id) = self.keep(stream)? else { return Ok(None) };
        let mut state = self.lock();
        state.strangers.push_back(id);
        if state.strangers.len() > STRANGERS
            && let Some(oldest) = state.strangers.pop_front()
            && let Some(connection) = state.connections.get(&oldest)
        {
            // It may have ended already. A peer tries again.
            let _ = connection.shutdown(Shutdown::Both);
        }
        Ok(Some(id))
    }

    fn serve(&self, id: u64, stream: &TcpStream) -> io::Result<()> {
        let admitted = self.admit(stream);
        self.lock().strangers.retain(|stranger| *stranger != id);
        let result = admitted.and_then(|admitted| match admitted {
            Some((receiving, hello)) => self.receive_from(receiving, &hello),
            None => Ok(()),
        });
        self.lock().connections.remove(&id);
        result
    }

    /// Lets in whoever knows the key and is a peer.
    fn admit<'a>(&self, stream: &'a TcpStream) -> io::Result<Option<(Receiving<Patient<'a>>, Hello)>> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let until = Some(Instant::now() + PATIENCE);
        let (mut receiving, hello) = Receiving::accept(Patient { stream, until }, &self.config.key)?;
        // It has nothing to say for as long as it likes.
        receiving.get_mut().until = None;
        stream.set_read_timeout(None)?;
        let known = hello.to == self.config.host && self.config.peers.contains_key(&hello.from);
        Ok(known.then_some((receiving, hello)))
    }

    fn receive_from(&self, mut receiving: Receiving<Patient<'_>>, hello: &Hello) -> io::Result<()> {
        let Hello { from, stream, first, .. } = *hello;
        let last = {
            let mut state = self.lock();
            let arrived = state.arrived.entry(from).or_insert((stream, first.saturating_sub(1)));
            if arrived.0 != stream {
                *arrived = (stream, first.saturating_sub(1));
            }
            arrived.1
        };
        receiving.answer(last)?;
        loop {
            let arrived = receiving.receive()?;
            let mut state = self.lock();
            let Some((_, last)) = state.arrived.get_mut(&from).filter(|a| a.0 == stream) else {
                // The peer has begun another stream.
                return Ok(());
            };
            if Some(arrived.number) == last.checked_add(1) {
                *last = arrived.number;
                let message: Message = serde_json::from_slice(&arrived.message)?;
                let mut out = Vec::new();
                state.dlm.step(DlmInput::Message(from, message), &mut out);
                self.carry_out(&mut state, out);
            } else if arrived.number > *last {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is missing"));
            }
            let last = state.arrived.get(&from).map_or(0, |a| a.1);
            drop(state);
            if arrived.answer {
                receiving.answer(last)?;
            }
        }
    }
}

#[cfg(test)]
mod tests;
