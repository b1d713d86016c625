//! Questions to a running switch, over a Unix socket: one JSON object a line, one reply a line.
//!
//! A reply is an object with either `ok`, the answer, or `error`, what went wrong. Nobody but the owner of the process
//! may connect.

mod server;
mod view;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::server::ControlServer;
pub use self::view::table;
use crate::config::PortState;
use crate::error::{Error, Result};

/// Longest request in bytes: the state of a port with some hundred thousand connections fits.
const REQUEST_MAX: u64 = 64 << 20;
/// Longest reply that is read.
const REPLY_MAX: u64 = 256 << 20;
/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum View {
    /// Ports with their links and counters.
    Ports,
    /// The MAC address table.
    Macs,
    /// Rules of the flow pipeline with their counters.
    Flows,
    /// Flows by rate.
    Top,
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Rows of a list: the answer holds `rows` and `total`, the number of rows without limit.
    Show {
        /// Which list.
        what: View,
        /// Most rows.
        #[serde(default = "limit")]
        limit: usize,
    },
    /// All counters: the answer is a page in Prometheus' text format.
    Metrics,
    /// What would happen to a frame: the answer is a list of lines.
    Trace {
        /// Name of the port that the frame comes in by.
        port: String,
        /// The frame in hexadecimal; blanks and colons may stand between bytes.
        frame: String,
    },
    /// The whole state of a port, to move with its VM: the answer is a [`PortState`].
    ExportPort {
        /// Name of the port.
        port: String,
    },
    /// Gives the port of the same name what it learned and counted elsewhere: the answer is its number.
    ImportPort {
        /// What [`Request::ExportPort`] answered.
        state: Box<PortState>,
    },
}

fn limit() -> usize {
    1000
}

/// Puts a question to the switch behind a socket.
pub fn ask(socket: &Path, request: &Request) -> Result<Value> {
    let fail = |e| Error::io(format!("ask the switch at {}", socket.display()), e);
    let stream = UnixStream::connect(socket).map_err(fail)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(fail)?;
    let line = serde_json::to_string(request).map_err(|e| Error::Invalid(e.to_string()))?;
    (&stream).write_all(format!("{line}\n").as_bytes()).map_err(fail)?;
    let mut reply = String::new();
    BufReader::new(&stream).take(REPLY_MAX).read_line(&mut reply).map_err(fail)?;
    let mut reply: Value = serde_json::from_str(&reply).map_err(|e| {
        Error::Invalid(format!("The switch's reply cannot be read: {e}; are the versions the same?"))
    })?;
    match (reply.get_mut("ok").map(Value::take), reply.get("error").and_then(Value::as_str)) {
        (Some(ok), None) => Ok(ok),
        (_, error) => Err(Error::Invalid(error.unwrap_or("The switch's reply is empty").into())),
    }
}
