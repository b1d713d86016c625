//! OpenFlow on sockets: one thread serves every controller and tool of a switch.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::session::{Roles, Session};
use crate::error::{Error, Result};
use crate::event::Subscription;
use crate::port::listen_private;
use crate::switch::Switch;
use crate::sys::{self, Epoll, EventFd};

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 256;
/// Events that wait for the thread; more are lost.
const EVENTS: usize = 4096;
/// Silence after which a controller is asked for a sign of life, and after twice of which it is given up.
const PROBE: Duration = Duration::from_secs(15);
/// Pause before a controller is connected to again.
const RECONNECT: Duration = Duration::from_secs(1);
/// Output of a snooping client beyond which it misses messages.
const SNOOP_MAX: usize = 1 << 20;
const WAKE: u64 = 0;
const EVENT: u64 = 1;

/// Where OpenFlow is spoken, in the notation of Open vSwitch: `ptcp:ADDRESS:PORT` and `punix:PATH` wait for
/// connections, `tcp:ADDRESS:PORT` and `unix:PATH` connect to a controller and stay connected. With `snoop:` in front
/// of a waiting one, clients are shown what is said on all other connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenFlowTarget {
    address: Address,
    passive: bool,
    snoop: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for OpenFlowTarget {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let wrong = || {
            format!(
                "\"{s}\" is no OpenFlow target; write ptcp:ADDRESS:PORT, punix:PATH, tcp:ADDRESS:PORT or unix:PATH"
            )
        };
        let (snoop, target) = match s.strip_prefix("snoop:") {
            Some(t) => (true, t),
            None => (false, s),
        };
        let (kind, rest) = target.split_once(':').ok_or_else(wrong)?;
        let address = match kind {
            "tcp" | "ptcp" => Address::Tcp(rest.parse().map_err(|_| wrong())?),
            "unix" | "punix" if !rest.is_empty() => Address::Unix(rest.into()),
            _ => return Err(wrong()),
        };
        let passive = kind.starts_with('p');
        if snoop && !passive { Err(wrong()) } else { Ok(Self { address, passive, snoop }) }
    }
}

/// How a switch presents itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenFlowConfig {
    /// Where it is reached, and whom it connects to.
    pub targets: Vec<OpenFlowTarget>,
    /// The number by which controllers know the switch.
    pub datapath_id: u64,
}

/// The OpenFlow side of a switch. Dropping it ends all connections and its thread.
#[derive(Debug)]
pub struct OpenFlowServer {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    /// Address of each waiting TCP socket.
    addresses: Vec<SocketAddr>,
    /// Unix sockets to be removed.
    sockets: Vec<PathBuf>,
}

impl OpenFlowServer {
    /// Starts to serve. The server keeps the switch alive until it is dropped.
    pub fn start(switch: &Arc<Switch>, config: &OpenFlowConfig) -> Result<Self> {
        let fail = |e| Error::io("start the OpenFlow thread", e);
        let stop = Arc::new(EventFd::new().map_err(fail)?);
        let mut this = Self { stop: stop.clone(), thread: None, addresses: Vec::new(), sockets: Vec::new() };
        let mut loop_ = Loop {
            switch: switch.clone(),
            epoll: Epoll::new().map_err(fail)?,
            events: switch.subscribe(EVENTS)?,
            stop,
            roles: Roles::default(),
            datapath: config.datapath_id,
            listeners: Vec::new(),
            connections: BTreeMap::new(),
            active: Vec::new(),
            next: 0,
            shown: Vec::new(),
        };
        for t in &config.targets {
            if !t.passive {
                loop_.active.push(Active {
                    address: t.address.clone(),
                    connection: None,
                    next: Instant::now(),
                });
                continue;
            }
            let acceptor = match &t.address {
                Address::Tcp(a) => {
                    let l = TcpListener::bind(a).map_err(|e| Error::io(format!("listen on {a}"), e))?;
                    this.addresses.push(l.local_addr().map_err(fail)?);
                    l.set_nonblocking(true).map_err(fail)?;
                    Acceptor::Tcp(l)
                }
                Address::Unix(p) => {
                    let l = listen_private(p)?;
                    this.sockets.push(p.clone());
                    Acceptor::Unix(l)
                }
            };
            loop_.listeners.push((acceptor, t.snoop));
        }
        loop_.epoll.add(loop_.stop.as_raw_fd(), WAKE).map_err(fail)?;
        loop_.epoll.add(loop_.events.as_fd().as_raw_fd(), EVENT).map_err(fail)?;
        for (i, (l, _)) in loop_.listeners.iter().enumerate() {
            loop_.epoll.add(l.fd(), 2 + i as u64).map_err(fail)?;
        }
        loop_.next = 2 + loop_.listeners.len() as u64;
        let run = move || {
            if let Err(e) = loop_.run() {
                tracing::error!(error = %e, "OpenFlow ended");
            }
        };
        this.thread = Some(thread::Builder::new().name("nacre-openflow".into()).spawn(run).map_err(fail)?);
        Ok(this)
    }

    /// Addresses of the waiting TCP sockets, in the order of the targets: where port 0 was asked for, the port chosen.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }
}

impl Drop for OpenFlowServer {
    fn drop(&mut self) {
        self.stop.signal();
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
        for p in &self.sockets {
            let _ = std::fs::remove_file(p);
        }
    }
}

enum Acceptor {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Acceptor {
    fn fd(&self) -> RawFd {
        match self {
            Acceptor::Tcp(l) => l.as_raw_fd(),
            Acceptor::Unix(l) => l.as_raw_fd(),
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        let s = match self {
            Acceptor::Tcp(l) => Stream::Tcp(l.accept()?.0),
            Acceptor::Unix(l) => Stream::Unix(l.accept()?.0),
        };
        s.prepare()?;
        Ok(s)
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn prepare(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(s) => {
                s.set_nonblocking(true)?;
                s.set_nodelay(true)
            }
            Stream::Unix(s) => s.set_nonblocking(true),
        }
    }

    fn fd(&self) -> RawFd {
        match self {
            Stream::Tcp(s) => s.as_raw_fd(),
            Stream::Unix(s) => s.as_raw_fd(),
        }
    }

    fn read(&mut self, b: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.read(b),
            Stream::Unix(s) => s.read(b),
        }
    }

    fn write(&mut self, b: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.write(b),
            Stream::Unix(s) => s.write(b),
        }
    }
}

struct Connection {
    stream: Stream,
    session: Session,
    snoop: bool,
    heard: Instant,
    probed: bool,
    /// What epoll was last asked for: input, output.
    interest: (bool, bool),
}

/// A controller that the switch connects to.
struct Active {
    address: Address,
    connection: Option<u64>,
    next: Instant,
}

struct Loop {
    switch: Arc<Switch>,
    epoll: Epoll,
    events: Subscription,
    stop: Arc<EventFd>,
    roles: Roles,
    datapath: u64,
    listeners: Vec<(Acceptor, bool)>,
    connections: BTreeMap<u64, Connection>,
    active: Vec<Active>,
    /// Token of the next connection.
    next: u64,
    /// Messages that snooping clients are still to be shown.
    shown: Vec<u8>,
}

impl Loop {
    fn run(&mut self) -> io::Result<()> {
        let mut ready = Vec::new();
        loop {
            self.connect();
            ready.clear();
            // Without a controller of its own the thread has nothing to do by the clock.
            let timeout = if self.active.is_empty() { -1 } else { 500 };
            self.epoll.wait(timeout, |t| ready.push(t))?;
            for &t in &ready {
                match t {
                    WAKE => return Ok(()),
                    EVENT => self.dispatch_events(),
                    t if (t as usize) < 2 + self.listeners.len() => self.accept(t as usize - 2),
                    t => self.read(t),
                }
            }
            self.probe();
            self.serve();
        }
    }

    fn add(&mut self, stream: Stream, service: bool, snoop: bool) -> io::Result<u64> {
        let token = self.next;
        self.epoll.set(stream.fd(), token, true, true, true)?;
        self.next += 1;
        let session = Session::new(&mut self.roles, self.datapath, service);
        let interest = (true, true);
        let c = Connection { stream, session, snoop, heard: Instant::now(), probed: false, interest };
        self.connections.insert(token, c);
        Ok(token)
    }

    fn accept(&mut self, listener: usize) {
        let Some((l, snoop)) = self.listeners.get(listener) else { return };
        let snoop = *snoop;
        match l.accept() {
            Ok(s) if self.connections.len() < CONNECTIONS_MAX => {
                if let Err(e) = self.add(s, true, snoop) {
                    tracing::warn!(error = %e, "cannot serve an OpenFlow connection");
                }
            }
            // Dropped: it is refused by being closed.
            Ok(_) => tracing::warn!("too many OpenFlow connections"),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => tracing::debug!(error = %e, "cannot accept an OpenFlow connection"),
        }
    }

    /// Connects to controllers that are not connected.
    fn connect(&mut self) {
        let now = Instant::now();
        for i in 0..self.active.len() {
            let a = &mut self.active[i];
            if a.connection.is_some() || a.next > now {
                continue;
            }
            a.next = now + RECONNECT;
            let stream = match &a.address {
                Address::Tcp(to) => sys::connect_tcp(to).map(Stream::Tcp),
                Address::Unix(p) => UnixStream::connect(p).map(Stream::Unix),
            };
            let added = stream.and_then(|s| {
                s.prepare()?;
                self.add(s, false, false)
            });
            match added {
                Ok(token) => self.active[i].connection = Some(token),
                Err(e) => tracing::debug!(error = %e, "cannot connect to a controller"),
            }
        }
    }

    fn close(&mut self, token: u64) {
        self.connections.remove(&token);
        for a in self.active.iter_mut().filter(|a| a.connection == Some(token)) {
            a.connection = None;
            a.next = Instant::now() + RECONNECT;
        }
    }

    fn read(&mut self, token: u64) {
        let mut buffer = [0; 16384];
        let Some(c) = self.connections.get_mut(&token) else { return };
        if !c.session.wants_input() {
            return;
        }
        match c.stream.read(&mut buffer) {
            Ok(0) => self.close(token),
            Ok(n) => {
                (c.heard, c.probed) = (Instant::now(), false);
                c.session.receive(&buffer[..n]);
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => {
                tracing::debug!(error = %e, "an OpenFlow connection broke");
                self.close(token);
            }
        }
    }

    fn dispatch_events(&mut self) {
        let snooped = self.connections.values().any(|c| c.snoop);
        while let Some(e) = self.events.next_event() {
            for c in self.connections.values_mut().filter(|c| !c.snoop) {
                let before = c.session.pending().len();
                c.session.notify(&self.switch, &self.roles, &e);
                if snooped {
                    self.shown.extend_from_slice(&c.session.pending()[before..]);
                }
            }
        }
    }

    /// Asks silent controllers for a sign of life and gives up those that give none.
    fn probe(&mut self) {
        let mut dead = Vec::new();
        for t in self.active.iter().filter_map(|a| a.connection) {
            let Some(c) = self.connections.get_mut(&t) else { continue };
            let silence = c.heard.elapsed();
            if silence > 2 * PROBE {
                dead.push(t);
            } else if silence > PROBE && !c.probed && c.session.is_open() {
                c.probed = true;
                c.session.ping();
            }
        }
        dead.into_iter().for_each(|t| self.close(t));
    }

    /// Handles input and sends output, as long as there is progress.
    fn serve(&mut self) {
        let tokens: Vec<u64> = self.connections.keys().copied().collect();
        let mut shown = std::mem::take(&mut self.shown);
        let snooped = self.connections.values().any(|c| c.snoop);
        for t in tokens {
            let Some(c) = self.connections.get_mut(&t) else { continue };
            loop {
                let snoop = c.snoop;
                c.session.run(&self.switch, &mut self.roles, |m| {
                    if snooped && !snoop {
                        shown.extend_from_slice(m);
                    }
                });
                let before = c.session.pending().len();
                let broken = send(c).is_err();
                let done = c.session.pending().is_empty();
                if broken || c.session.has_failed() && done {
                    self.close(t);
                    break;
                }
                // Sent something after having held back: there may be more input to handle.
                if !done || before == 0 {
                    break;
                }
            }
        }
        if !shown.is_empty() {
            for c in self.connections.values_mut().filter(|c| c.snoop && c.session.is_open()) {
                if c.session.pending().len() < SNOOP_MAX {
                    c.session.show(&shown);
                    // What does not go out now goes with the next round.
                    let _ = send(c);
                }
            }
        }
        let mut failed = Vec::new();
        for (t, c) in &mut self.connections {
            let want = (c.session.wants_input(), !c.session.pending().is_empty());
            if want != c.interest {
                c.interest = want;
                if self.epoll.set(c.stream.fd(), *t, want.0, want.1, false).is_err() {
                    failed.push(*t);
                }
            }
        }
        failed.into_iter().for_each(|t| self.close(t));
    }
}

fn send(c: &mut Connection) -> io::Result<()> {
    let mut sent = 0;
    let result = loop {
        let rest = &c.session.pending()[sent..];
        if rest.is_empty() {
            break Ok(());
        }
        match c.stream.write(rest) {
            Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => sent += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::NotConnected) => {
                break Ok(());
            }
            Err(e) => break Err(e),
        }
    };
    c.session.sent(sent);
    result
}
