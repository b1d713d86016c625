//! The API on a Unix socket, and over TCP for those who bring the encryption.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{AgentHandle, ApiReply, ApiRequest};

/// The longest request, in bytes; a VM's definition is in it.
const LONGEST: u64 = 1 << 20;
/// The longest answer that a client reads, in bytes.
const LONGEST_REPLY: u64 = 64 << 20;
/// Clients at once on one server. One more takes the place of the oldest that has not proved who it is, or is refused.
const CLIENTS: usize = 16;
/// How long the agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// A client that says nothing for this long makes way for others.
const IDLE: Duration = Duration::from_secs(60);
/// How long a client waits for an answer.
const REPLY_PATIENCE: Duration = Duration::from_secs(15);

/// A connection that bytes go through in both directions.
pub trait Connection: Read + Write {}

impl<T: Read + Write> Connection for T {}

/// Makes a TCP connection one that may be trusted: proves who is at each end, and encrypts. The connection has
/// timeouts, so a peer that says nothing is an error.
pub type Secure = dyn Fn(TcpStream) -> io::Result<Box<dyn Connection>> + Send + Sync;

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener, Box<Secure>),
}

/// Makes the connection that was accepted ready; for a thread of its own, since the peer takes part in it.
type Opening<'a> = Box<dyn FnOnce() -> io::Result<Box<dyn Connection>> + Send + 'a>;

impl Listener {
    fn accept(&self) -> io::Result<(Socket, Opening<'_>)> {
        match self {
            Listener::Unix(listener) => {
                let stream = listener.accept()?.0;
                let socket = Socket::Unix(stream.try_clone()?);
                Ok((socket, Box::new(move || Ok(Box::new(stream)))))
            }
            Listener::Tcp(listener, secure) => {
                let stream = listener.accept()?.0;
                stream.set_nodelay(true)?;
                let socket = Socket::Tcp(stream.try_clone()?);
                Ok((socket, Box::new(move || secure(stream))))
            }
        }
    }
}

/// What is kept of an open connection, to end it.
#[derive(Debug)]
enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn set_timeouts(&self, read: Duration, write: Duration) -> io::Result<()> {
        match self {
            Socket::Unix(s) => s.set_read_timeout(Some(read)).and(s.set_write_timeout(Some(write))),
            Socket::Tcp(s) => s.set_read_timeout(Some(read)).and(s.set_write_timeout(Some(write))),
        }
    }

    fn shutdown(&self) {
        // It may have ended already.
        let _ = match self {
            Socket::Unix(s) => s.shutdown(Shutdown::Both),
            Socket::Tcp(s) => s.shutdown(Shutdown::Both),
        };
    }
}

/// Where a server listens.
#[derive(Debug)]
enum Place {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// An open connection.
#[derive(Debug)]
struct Client {
    id: usize,
    socket: Socket,
    /// It has not proved who it is.
    stranger: bool,
}

/// The open connections, the oldest first.
type Clients = Mutex<Vec<Client>>;

/// Serves the API until it is dropped.
#[derive(Debug)]
pub struct ApiServer {
    place: Place,
    stop: Arc<AtomicBool>,
    clients: Arc<Clients>,
    thread: Option<JoinHandle<()>>,
}

impl ApiServer {
    /// Listens at `path`, for the owner of the process only. A socket that a former life left is replaced.
    ///
    /// # Errors
    /// The path cannot be used, or an agent answers there already.
    pub fn start(path: &Path, agent: AgentHandle) -> io::Result<Self> {
        if std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
            && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
        {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        // Whoever may write to the socket may start VMs.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        ApiServer::run(Place::Unix(path.to_owned()), Listener::Unix(listener), agent)
    }

    /// Listens at a TCP address. Nobody is served whom `secure` refuses: whoever gets through may start VMs.
    ///
    /// # Errors
    /// The address cannot be used.
    pub fn start_tcp(address: SocketAddr, secure: Box<Secure>, agent: AgentHandle) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let place = Place::Tcp(listener.local_addr()?);
        ApiServer::run(place, Listener::Tcp(listener, secure), agent)
    }

    fn run(place: Place, listener: Listener, agent: AgentHandle) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let clients: Arc<Clients> = Arc::default();
        let (stopping, open) = (stop.clone(), clients.clone());
        let thread = std::thread::Builder::new().name("api".into());
        let thread = thread.spawn(move || accept(&listener, &agent, &stopping, &open))?;
        Ok(ApiServer { place, stop, clients, thread: Some(thread) })
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // A connection of our own wakes the thread.
        let woken = match &self.place {
            Place::Unix(path) => UnixStream::connect(path).is_ok(),
            Place::Tcp(address) => TcpStream::connect_timeout(address, PATIENCE).is_ok(),
        };
        for client in self.clients.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            client.socket.shutdown();
        }
        if let Place::Unix(path) = &self.place {
            let _ = std::fs::remove_file(path);
        }
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
    }
}

fn accept(listener: &Listener, agent: &AgentHandle, stop: &AtomicBool, clients: &Clients) {
    std::thread::scope(|scope| {
        for id in 0.. {
            let accepted = listener.accept();
            let mut open = clients.lock().unwrap_or_else(PoisonError::into_inner);
            // Checked under the lock: whoever stops the server shuts down what is in the list.
            if stop.load(Ordering::Acquire) {
                return;
            }
            let Ok((socket, opening)) = accepted else {
                drop(open);
                // Out of descriptors, most likely: they come back.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            if open.len() >= CLIENTS
                && let Some(oldest) = open.iter().position(|client| client.stranger)
            {
                open.remove(oldest).socket.shutdown();
            }
            if open.len() >= CLIENTS || socket.set_timeouts(PATIENCE, PATIENCE).is_err() {
                // The client sees the end of the connection, and tries again.
                socket.shutdown();
                continue;
            }
            open.push(Client { id, socket, stranger: true });
            scope.spawn(move || {
                let served = opening().and_then(|connection| {
                    let mut open = clients.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(client) = open.iter_mut().find(|client| client.id == id) {
                        client.socket.set_timeouts(IDLE, PATIENCE)?;
                        client.stranger = false;
                    }
                    drop(open);
                    serve(connection, agent)
                });
                if let Err(error) = served {
                    tracing::debug!(%error, "an API connection ended");
                }
                let mut open = clients.lock().unwrap_or_else(PoisonError::into_inner);
                open.extract_if(.., |client| client.id == id).for_each(|client| client.socket.shutdown());
            });
        }
    });
}

/// Writes one line.
fn say(to: &mut dyn Connection, value: &impl serde::Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}

fn serve(connection: Box<dyn Connection>, agent: &AgentHandle) -> io::Result<()> {
    let mut reader = BufReader::new(connection);
    loop {
        let mut line = String::new();
        if reader.by_ref().take(LONGEST).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let reply = match serde_json::from_str::<ApiRequest>(&line) {
            Ok(request) => agent.call(request, PATIENCE),
            Err(error) => {
                ApiReply::Error { message: format!("Request is not understood: {error}"), coordinator: None }
            }
        };
        say(reader.get_mut(), &reply)?;
    }
}

/// Asks the agent whose API socket is at `path`.
///
/// # Errors
/// Nobody answers there, or not in time, or what it says is not understood.
pub fn ask(path: &Path, request: &ApiRequest) -> io::Result<ApiReply> {
    let socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(REPLY_PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    ask_through(socket, request)
}

/// Asks the agent at a TCP address.
///
/// # Errors
/// As for [`ask`], and whatever `secure` says against the agent.
pub fn ask_tcp(address: SocketAddr, secure: &Secure, request: &ApiRequest) -> io::Result<ApiReply> {
    let socket = TcpStream::connect_timeout(&address, PATIENCE)?;
    socket.set_read_timeout(Some(REPLY_PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    ask_through(secure(socket)?, request)
}

fn ask_through(mut connection: impl Connection, request: &ApiRequest) -> io::Result<ApiReply> {
    say(&mut connection, request)?;
    let mut reply = String::new();
    BufReader::new(connection.take(LONGEST_REPLY)).read_line(&mut reply)?;
    Ok(serde_json::from_str(&reply)?)
}
