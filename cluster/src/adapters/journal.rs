//! The event journal, and the rules that answer events with actions.
//!
//! The journal is a file of JSON lines that is only appended to. A last line that was cut short by a crash
//! is dropped when the journal is opened.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fence_agent;

/// How bad an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Business as usual.
    Info,
    /// Somebody should look.
    Warning,
    /// Something failed.
    Error,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number in this journal, from 1.
    #[serde(default)]
    pub id: u64,
    /// When it was noted, in milliseconds since 1970.
    #[serde(default)]
    pub time: u64,
    /// How bad it is.
    pub severity: Severity,
    /// What kind it is, for example `host.fenced`.
    pub kind: String,
    /// What it is about, for example `host 3`.
    pub subject: String,
    /// What happened, in a sentence.
    pub message: String,
}

/// Why the journal or an action failed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file cannot be used.
    #[error("Event journal {} cannot be used", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A script could not be run, failed, or took too long.
    #[error("Action script failed; run it by hand to see why")]
    Script(#[source] fence_agent::AgentError),
    /// A console could not be written.
    #[error("Console {} cannot be written", .path.display())]
    Console {
        /// The console.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A webhook was not accepted.
    #[error("Webhook was not accepted: {0}")]
    Webhook(String),
}

/// The highest number of an event that is believed; no journal has counted so far.
const HIGHEST: u64 = u64::MAX / 2;

/// An append-only journal of events.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    next: u64,
}

impl Journal {
    /// Opens or creates a journal. What comes after a line that is no event, or a torn one, is cut off.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let failed = |source| JournalError::File { path: path.to_owned(), source };
        let open = || OpenOptions::new().read(true).append(true).create(true).open(path);
        let file = open().map_err(failed)?;
        let (mut next, mut good) = (1, 0);
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let n = reader.read_until(b'\n', &mut line).map_err(failed)?;
            let Ok(event) = serde_json::from_slice::<Event>(&line) else { break };
            if n == 0 || line.last() != Some(&b'\n') {
                break;
            }
            if event.id > HIGHEST {
                break;
            }
            good += n as u64;
            next = event.id + 1;
        }
        file.set_len(good).map_err(failed)?;
        Ok(Journal { file, path: path.to_owned(), next })
    }

    /// Appends an event and gives it its number and time.
    pub fn append(&mut self, mut event: Event) -> Result<Event, JournalError> {
        event.id = self.next;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        event.time = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let failed = |source| JournalError::File { path: self.path.clone(), source };
        let mut line = serde_json::to_vec(&event).map_err(|e| failed(e.into()))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(failed)?;
        self.next += 1;
        Ok(event)
    }

    /// The events of a journal after number `after`, at most `limit`.
    pub fn read(path: &Path, after: u64, limit: usize) -> Result<Vec<Event>, JournalError> {
        let failed = |source| JournalError::File { path: path.to_owned(), source };
        let mut events = Vec::new();
        for line in BufReader::new(File::open(path).map_err(failed)?).lines() {
            let Ok(event) = serde_json::from_str::<Event>(&line.map_err(failed)?) else { continue };
            if event.id > after && events.len() < limit {
                events.push(event);
            }
        }
        Ok(events)
    }
}

/// What to do when an event matches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Run a program with the event as JSON on its standard input; it is killed after `seconds`.
    Script {
        /// The program.
        program: PathBuf,
        /// Its time limit.
        seconds: u64,
    },
    /// Post the event as an Alertmanager alert to `http://host:port/path`.
    Webhook {
        /// Host and port.
        address: String,
        /// The path, for example `/api/v2/alerts`.
        path: String,
    },
    /// Print the event in one line on a terminal or pipe, for example `/dev/console`.
    Console(PathBuf),
}

/// Answers events with actions. If an action fails, the next one is tried: they escalate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Rule {
    /// The beginning of the kinds that match; empty matches all.
    pub kind: String,
    /// The least severity that matches.
    pub severity: Severity,
    /// What to do, in order, until one works.
    pub actions: Vec<Action>,
}

/// Runs the actions of rules.
#[derive(Clone, Debug, Default)]
pub struct ActionRunner {
    rules: Vec<Rule>,
}

impl ActionRunner {
    /// A runner for these rules.
    pub fn new(rules: Vec<Rule>) -> Self {
        ActionRunner { rules }
    }

    /// Answers an event; gives what failed, with the rule's place.
    pub fn answer(&self, event: &Event) -> Vec<(usize, JournalError)> {
        let mut failures = Vec::new();
        for (i, rule) in self.rules.iter().enumerate() {
            if event.severity < rule.severity || !event.kind.starts_with(&rule.kind) {
                continue;
            }
            for action in &rule.actions {
                match run(action, event) {
                    Ok(()) => break,
                    Err(e) => failures.push((i, e)),
                }
            }
        }
        failures
    }
}

fn run(action: &Action, event: &Event) -> Result<(), JournalError> {
    match action {
        Action::Script { program, seconds } => script(program, *seconds, event),
        Action::Webhook { address, path } => webhook(address, path, event),
        Action::Console(path) => {
            console(path, event).map_err(|source| JournalError::Console { path: path.clone(), source })
        }
    }
}

fn script(program: &Path, seconds: u64, event: &Event) -> Result<(), JournalError> {
    use fence_agent::AgentError;
    let mut child = Command::new(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|e| JournalError::Script(AgentError::Start(e)))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A script that does not read its input is fine.
        let _ = stdin.write_all(&serde_json::to_vec(event).unwrap_or_default());
    }
    let status = fence_agent::wait(&mut child, Duration::from_secs(seconds)).map_err(JournalError::Script)?;
    if status.success() { Ok(()) } else { Err(JournalError::Script(AgentError::Failed(status))) }
}

/// Writes without waiting: a console that nobody reads is a failure.
fn console(path: &Path, event: &Event) -> io::Result<()> {
    let mut out =
        OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let Event { severity, kind, subject, message, .. } = event;
    out.write_all(format!("nacre: {severity:?}: {kind}: {subject}: {message}\r\n").as_bytes())
}

fn webhook(address: &str, path: &str, event: &Event) -> Result<(), JournalError> {
    let failed = |e: io::Error| JournalError::Webhook(e.to_string());
    let alert = serde_json::json!([{
        "labels": { "alertname": event.kind, "severity": event.severity, "subject": event.subject },
        "annotations": { "summary": event.message },
    }]);
    let body = alert.to_string();
    let limit = Duration::from_secs(5);
    let mut addresses = address.to_socket_addrs().map_err(failed)?;
    let first = addresses.next().ok_or_else(|| JournalError::Webhook("no such host".into()))?;
    let mut stream = TcpStream::connect_timeout(&first, limit).map_err(failed)?;
    stream.set_read_timeout(Some(limit)).map_err(failed)?;
    stream.set_write_timeout(Some(limit)).map_err(failed)?;
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).map_err(failed)?;
    let mut status = String::new();
    BufReader::new(io::Read::take(stream, 4096)).read_line(&mut status).map_err(failed)?;
    if status.split(' ').nth(1).is_some_and(|code| code.starts_with('2')) {
        Ok(())
    } else {
        Err(JournalError::Webhook(status.trim().to_owned()))
    }
}
