//! The API on a Unix socket: one JSON object a line, one answer a line.

use std::io::{self, BufRead, BufReader, Read, Write};
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
/// Clients at once; more wait.
const CLIENTS: usize = 16;
/// How long the agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The open connections, each with its number.
type Streams = Mutex<Vec<(usize, UnixStream)>>;

/// Serves the API until it is dropped.
#[derive(Debug)]
pub struct ApiServer {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    streams: Arc<Streams>,
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
        let stop = Arc::new(AtomicBool::new(false));
        let streams: Arc<Streams> = Arc::default();
        let (stopping, open) = (stop.clone(), streams.clone());
        let thread = std::thread::Builder::new().name("api".into());
        let thread = thread.spawn(move || accept(&listener, &agent, &stopping, &open))?;
        Ok(ApiServer { path: path.to_owned(), stop, streams, thread: Some(thread) })
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // A connection of our own wakes the thread.
        let woken = UnixStream::connect(&self.path).is_ok();
        for (_, stream) in self.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        let _ = std::fs::remove_file(&self.path);
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
    }
}

fn accept(listener: &UnixListener, agent: &AgentHandle, stop: &AtomicBool, streams: &Streams) {
    std::thread::scope(|scope| {
        for (id, stream) in listener.incoming().enumerate() {
            if stop.load(Ordering::Acquire) {
                return;
            }
            let Ok(stream) = stream else { continue };
            let mut open = streams.lock().unwrap_or_else(PoisonError::into_inner);
            // Checked under the lock: whoever stops the server shuts down what is in the list.
            if stop.load(Ordering::Acquire) {
                return;
            }
            if open.len() >= CLIENTS {
                let message = "Too many clients; try again".to_owned();
                let _ = answer(&stream, &ApiReply::Error { message, coordinator: None });
                continue;
            }
            let Ok(copy) = stream.try_clone() else { continue };
            open.push((id, copy));
            scope.spawn(move || {
                if let Err(error) = serve(&stream, agent) {
                    tracing::debug!(%error, "an API connection ended");
                }
                let _ = stream.shutdown(std::net::Shutdown::Both);
                streams.lock().unwrap_or_else(PoisonError::into_inner).retain(|s| s.0 != id);
            });
        }
    });
}

fn answer(mut stream: &UnixStream, reply: &ApiReply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn serve(stream: &UnixStream, agent: &AgentHandle) -> io::Result<()> {
    // A client that says nothing makes way for others.
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream);
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
        answer(stream, &reply)?;
    }
}

/// Asks the agent whose API socket is at `path`.
///
/// # Errors
/// Nobody answers there, or not in time, or what it says is not understood.
pub fn ask(path: &Path, request: &ApiRequest) -> io::Result<ApiReply> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE + Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply)?;
    Ok(serde_json::from_str(&reply)?)
}
