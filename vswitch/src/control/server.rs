//! The switch's side of the control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::{Value, json};

use super::{REQUEST_MAX, Request, view};
use crate::error::{Error, Result};
use crate::port::{PortId, listen_private};
use crate::switch::Switch;
use crate::sys::{EventFd, poll_readable};

/// A client that says nothing, or takes no answer, for this long makes way for the next one.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Answers questions about a switch until it is dropped. It keeps the switch alive.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Listens on a socket. One that nobody serves any more is replaced.
    pub fn start(switch: &Arc<Switch>, path: &Path) -> Result<Self> {
        let fail = |e| Error::io("start the control thread", e);
        let listener = listen_private(path)?;
        let stop = Arc::new(EventFd::new().map_err(fail)?);
        let (s, switch) = (stop.clone(), switch.clone());
        let run = move || {
            while let Ok([false, _]) = poll_readable([s.as_raw_fd(), listener.as_raw_fd()], -1) {
                if let Err(error) = accept(&listener, &switch, &s) {
                    tracing::debug!(%error, "a control connection ended");
                }
            }
        };
        let thread = thread::Builder::new().name("nacre-control".into()).spawn(run).map_err(fail)?;
        Ok(Self { path: path.into(), stop, thread: Some(thread) })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.stop.signal();
        let _ = std::fs::remove_file(&self.path);
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

/// Serves one client, line by line.
fn accept(listener: &UnixListener, switch: &Switch, stop: &EventFd) -> io::Result<()> {
    let (stream, _) = match listener.accept() {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
        r => r?,
    };
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut reader = BufReader::new(&stream);
    while !matches!(poll_readable([stop.as_raw_fd()], 0), Ok([true])) {
        let mut line = String::new();
        if reader.by_ref().take(REQUEST_MAX).read_line(&mut line)? == 0 {
            break;
        }
        reply(&stream, switch, &line)?;
    }
    Ok(())
}

fn reply(mut stream: &UnixStream, switch: &Switch, line: &str) -> io::Result<()> {
    let answer = match answer(switch, line) {
        Ok(ok) => json!({ "ok": ok }),
        Err(e) => json!({ "error": e.to_string() }),
    };
    stream.write_all(format!("{answer}\n").as_bytes())
}

fn answer(switch: &Switch, line: &str) -> Result<Value> {
    let request: Request = serde_json::from_str(line)
        .map_err(|e| Error::Invalid(format!("The request cannot be understood: {e}")))?;
    match request {
        Request::Show { what, limit } => view::rows(switch, what, limit),
        Request::Metrics => Ok(json!(switch.prometheus())),
        Request::Trace { port, frame } => {
            Ok(json!(switch.trace(named(switch, port)?, &hexadecimal(&frame)?)?))
        }
        Request::ExportPort { port } => Ok(json!(switch.export_port(named(switch, port)?)?)),
        Request::ImportPort { state } => Ok(json!(switch.restore_port(&state)?)),
    }
}

fn named(switch: &Switch, port: String) -> Result<PortId> {
    switch.port_id(&port).ok_or(Error::NoSuchPort(port))
}

/// Reads bytes in hexadecimal.
fn hexadecimal(text: &str) -> Result<Vec<u8>> {
    let wrong = || Error::Invalid("The frame is not hexadecimal; write two digits a byte".into());
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace() && *b != b':').collect();
    if !digits.len().is_multiple_of(2) || digits.is_empty() {
        return Err(wrong());
    }
    let digit = |b: u8| (b as char).to_digit(16).ok_or_else(wrong);
    digits.chunks(2).map(|d| Ok((digit(d[0])? << 4 | digit(d[1])?) as u8)).collect()
}
