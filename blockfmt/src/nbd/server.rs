//! The server object: listeners, connections and exports.

use super::budget::{Budget, ServerLimits};
use super::stream::{Accepted, Listener, Stream};
use super::tls::TlsServer;
use super::{handshake, transmission};
use crate::job::DirtyMap;
use crate::{Disk, Error, Result};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A disk under a name.
#[derive(Clone, Debug)]
pub struct Export {
    /// What clients ask for.
    pub name: String,
    /// A text for people.
    pub description: String,
    /// The disk.
    pub disk: Disk,
    /// Whether writes are refused even if the disk takes them.
    pub read_only: bool,
}

/// What is known about an export.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ExportInfo {
    /// Its name.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Clients that use it now.
    pub connections: usize,
}

#[derive(Debug)]
struct Connection {
    stream: Stream,
    thread: JoinHandle<()>,
    /// The export in use, once the handshake is over.
    export: Arc<Mutex<Option<String>>>,
    began: Instant,
}

/// A dirty bitmap under a name.
pub(super) type Bitmap = (String, Arc<DirtyMap>);

#[derive(Debug, Default)]
pub(super) struct Shared {
    exports: Mutex<BTreeMap<String, Arc<Export>>>,
    connections: Mutex<HashMap<u64, Connection>>,
    /// Bitmaps by the export that shows them.
    bitmaps: Mutex<BTreeMap<String, Vec<Bitmap>>>,
    tls: Mutex<Option<TlsServer>>,
    stop: AtomicBool,
    budget: Arc<Budget>,
}

impl Shared {
    pub fn export(&self, name: &str) -> Option<Arc<Export>> {
        self.exports.lock().get(name).cloned()
    }

    pub fn bitmaps(&self, export: &str) -> Vec<Bitmap> {
        self.bitmaps.lock().get(export).cloned().unwrap_or_default()
    }

    pub fn tls(&self) -> Option<TlsServer> {
        self.tls.lock().clone()
    }

    pub fn exports(&self) -> Vec<Arc<Export>> {
        self.exports.lock().values().cloned().collect()
    }

    /// Serves a new connection in a thread of its own.
    fn admit(self: &Arc<Self>, id: u64, stream: Stream) -> io::Result<()> {
        let mut connections = self.connections.lock();
        connections.retain(|_, c| !c.thread.is_finished());
        if connections.len() >= self.budget.limits.connections || self.stop.load(Ordering::Acquire) {
            stream.shutdown();
            return Ok(());
        }
        let export = Arc::new(Mutex::new(None));
        let (shared, ours, current) = (self.clone(), stream.try_clone()?, export.clone());
        let thread = std::thread::Builder::new().name("nbd".into()).spawn(move || {
            if let Err(error) = shared.serve(ours, &current) {
                tracing::debug!(%error, "An NBD connection ended");
            }
            current.lock().take();
        })?;
        connections.insert(id, Connection { stream, thread, export, began: Instant::now() });
        Ok(())
    }

    /// Ends connections whose handshakes take too long, and returns the time until the next one does.
    fn end_slow_handshakes(&self) -> Option<Duration> {
        let mut next = None;
        for connection in self.connections.lock().values() {
            if connection.thread.is_finished() || connection.export.lock().is_some() {
                continue;
            }
            match self.budget.limits.handshake.checked_sub(connection.began.elapsed()) {
                None | Some(Duration::ZERO) => connection.stream.shutdown(),
                Some(left) => next = Some(next.map_or(left, |next: Duration| next.min(left))),
            }
        }
        next
    }

    fn serve(&self, mut stream: Stream, current: &Mutex<Option<String>>) -> io::Result<()> {
        let session = handshake::negotiate(&mut stream, self);
        let result = match session {
            Ok(Some(session)) => {
                *current.lock() = Some(session.export.name.clone());
                // Removed between the handshake and now: the remover did not see us.
                match self.export(&session.export.name) {
                    Some(export) if Arc::ptr_eq(&export, &session.export) => {
                        drop(export);
                        transmission::run(&mut stream, &session, &self.budget)
                    }
                    _ => Ok(()),
                }
            }
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        stream.shutdown();
        result
    }

    /// Ends the connections that `which` selects and waits for their requests.
    fn disconnect(&self, which: impl Fn(Option<&str>) -> bool) {
        let ended: Vec<Connection> = {
            let mut connections = self.connections.lock();
            let selected = |c: &Connection| which(c.export.lock().as_deref());
            let ids: Vec<u64> = connections.iter().filter(|(_, c)| selected(c)).map(|(id, _)| *id).collect();
            ids.into_iter().filter_map(|id| connections.remove(&id)).collect()
        };
        for connection in ended {
            connection.stream.shutdown();
            if connection.thread.join().is_err() {
                tracing::error!("A thread of the NBD server panicked");
            }
        }
    }
}

#[derive(Debug)]
struct Acceptor {
    /// Closing it wakes the thread.
    wake: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    socket: Option<PathBuf>,
}

/// An NBD server. It runs threads of its own; dropping it ends connections and threads.
#[derive(Debug, Default)]
pub struct Server {
    shared: Arc<Shared>,
    acceptors: Mutex<Vec<Acceptor>>,
}

impl Server {
    /// A server that neither listens nor exports yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A server whose clients make it hold no more than `limits`.
    pub fn with_limits(limits: ServerLimits) -> Self {
        let shared = Shared { budget: Arc::new(Budget::new(limits)), ..Shared::default() };
        Server { shared: Arc::new(shared), acceptors: Mutex::default() }
    }

    /// Serves clients that use TLS only, from the next connection on.
    pub fn require_tls(&self, tls: TlsServer) {
        *self.shared.tls.lock() = Some(tls);
    }

    /// Shows a bitmap to clients that ask for the metadata context `qemu:dirty-bitmap:NAME` of an export. Marked
    /// granules have the state 1.
    pub fn show_bitmap(&self, export: &str, name: &str, bitmap: Arc<DirtyMap>) -> Result<()> {
        if self.shared.export(export).is_none() {
            return Err(Error::NotFound { what: "export", name: export.into() });
        }
        let mut bitmaps = self.shared.bitmaps.lock();
        let list = bitmaps.entry(export.to_owned()).or_default();
        if list.iter().any(|(n, _)| n == name) {
            return Err(Error::Exists { what: "bitmap", name: name.into() });
        }
        list.push((name.to_owned(), bitmap));
        Ok(())
    }

    /// Adds an export while the server runs.
    pub fn add_export(&self, export: Export) -> Result<()> {
        if export.name.len() > 4096 {
            return Err(Error::InvalidOption("The name of an export has at most 4096 bytes".into()));
        }
        let mut exports = self.shared.exports.lock();
        if exports.contains_key(&export.name) {
            return Err(Error::Exists { what: "export", name: export.name });
        }
        exports.insert(export.name.clone(), Arc::new(export));
        Ok(())
    }

    /// Removes an export; its clients are disconnected, and their requests have ended when this returns.
    pub fn remove_export(&self, name: &str) -> Result<()> {
        let removed = self.shared.exports.lock().remove(name);
        self.shared.bitmaps.lock().remove(name);
        let removed = removed.ok_or_else(|| Error::NotFound { what: "export", name: name.into() })?;
        self.shared.disconnect(|export| export == Some(name));
        if removed.read_only { Ok(()) } else { removed.disk.flush() }
    }

    /// The exports, by name.
    pub fn exports(&self) -> Vec<ExportInfo> {
        let exports = self.shared.exports();
        let connections = self.shared.connections.lock();
        let users =
            |name: &str| connections.values().filter(|c| c.export.lock().as_deref() == Some(name)).count();
        let info = |e: &Arc<Export>| ExportInfo {
            name: e.name.clone(),
            size: e.disk.size(),
            read_only: e.read_only || e.disk.is_read_only(),
            connections: users(&e.name),
        };
        exports.iter().map(info).collect()
    }

    /// Listens on a Unix socket, which is removed with the server. One that nobody listens at any more, as a killed
    /// process leaves it, is replaced.
    pub fn listen_unix(&self, path: &Path) -> Result<()> {
        let fail = |e| Error::io("listen on", path.display().to_string(), e);
        if std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
            && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
        {
            std::fs::remove_file(path).map_err(fail)?;
        }
        let listener = UnixListener::bind(path).map_err(fail)?;
        self.accept(Listener::Unix(listener), Some(path.to_owned())).map_err(fail)
    }

    /// Listens on a TCP address and returns it, with the port that was chosen if it was 0.
    pub fn listen_tcp(&self, address: SocketAddr) -> Result<SocketAddr> {
        let fail = |e| Error::io("listen on", address.to_string(), e);
        let listener = TcpListener::bind(address).map_err(fail)?;
        let bound = listener.local_addr().map_err(fail)?;
        self.accept(Listener::Tcp(listener), None).map_err(fail)?;
        Ok(bound)
    }

    fn accept(&self, listener: Listener, socket: Option<PathBuf>) -> io::Result<()> {
        let (wake, woken) = UnixStream::pair()?;
        let shared = self.shared.clone();
        let mut acceptors = self.acceptors.lock();
        // Numbers of connections are unique over all listeners.
        let first = (acceptors.len() as u64) << 48;
        let thread = std::thread::Builder::new().name("nbd-accept".into()).spawn(move || {
            let mut id = first;
            loop {
                let time = shared.end_slow_handshakes();
                match listener.accept(&woken, time) {
                    Ok(Accepted::Woken) => return,
                    Ok(Accepted::Nobody) => {}
                    Ok(Accepted::Stream(stream)) => {
                        id += 1;
                        if let Err(error) = shared.admit(id, stream) {
                            tracing::warn!(%error, "Cannot serve an NBD connection");
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "Cannot accept an NBD connection");
                        // Out of descriptors, most likely: do not spin.
                        std::thread::sleep(Duration::from_millis(100));
                    }
                }
            }
        })?;
        acceptors.push(Acceptor { wake: Some(wake), thread: Some(thread), socket });
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for acceptor in self.acceptors.get_mut() {
            acceptor.wake.take();
            if let Some(thread) = acceptor.thread.take()
                && thread.join().is_err()
            {
                tracing::error!("A thread of the NBD server panicked");
            }
            if let Some(socket) = &acceptor.socket {
                // Whoever removed it before us is right, too.
                let _ = std::fs::remove_file(socket);
            }
        }
        self.shared.disconnect(|_| true);
    }
}
