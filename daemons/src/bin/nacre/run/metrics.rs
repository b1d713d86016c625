//! Counters of the running machine on a Unix socket, over HTTP, for Prometheus and people with curl.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use vmm_core::machine::Vm;

/// How long a client may take to ask and to listen.
const PATIENCE: Duration = Duration::from_secs(2);
/// Lines of a request's header that are read.
const MAX_LINES: usize = 64;

/// The server; dropping it ends its thread and removes the socket.
pub struct Server {
    path: PathBuf,
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(path: &Path, vm: Weak<Vm>) -> anyhow::Result<Self> {
        let listener = vmm_core::socket::listen(path)
            .with_context(|| format!("Cannot offer metrics at {}; use another path", path.display()))?;
        let done = Arc::new(AtomicBool::new(false));
        let ended = done.clone();
        let run = move || {
            for client in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                if let (Ok(client), Some(vm)) = (client, vm.upgrade())
                    && let Err(error) = serve(client, &vm.metrics().prometheus("nacre"))
                {
                    tracing::debug!(%error, "A reader of metrics went away");
                }
            }
        };
        let thread = std::thread::Builder::new().name("metrics".into()).stack_size(128 << 10).spawn(run)?;
        Ok(Self { path: path.to_owned(), done, thread: Some(thread) })
    }
}

fn serve(client: UnixStream, text: &str) -> io::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    for line in BufReader::new(&client).lines().take(MAX_LINES) {
        if line?.is_empty() {
            break;
        }
    }
    let len = text.len();
    write!(
        &client,
        "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len}\r\n\r\n{text}"
    )
}

impl Drop for Server {
    fn drop(&mut self) {
        self.done.store(true, Ordering::SeqCst);
        // A connection of our own wakes the thread.
        let woken = UnixStream::connect(&self.path).is_ok();
        if let Some(thread) = self.thread.take()
            && woken
        {
            // It does nothing that panics.
            let _ = thread.join();
        }
        // Somebody else may have removed it.
        let _ = std::fs::remove_file(&self.path);
    }
}
