//! What a VM's process shows of its guest: heartbeats through a console port, and the counters of its disks.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use cluster::ha::Signs;
use serde_json::{Value, json};

/// The name of the console port through which a guest sends heartbeats: each byte is one.
pub const PORT: &str = "nacre.heartbeat";
/// How often a process is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How long its counters may take.
const PATIENCE: Duration = Duration::from_millis(500);
/// More of its counters is not read.
const LONGEST: u64 = 1 << 20;

/// Directs the heartbeat port of a VM's definition to a socket; gives whether it has one.
pub fn direct_port(definition: &str, socket: &Path) -> (String, bool) {
    // What is malformed is left to `nacre run`, which says so.
    let Ok(mut config) = serde_json::from_str::<Value>(definition) else {
        return (definition.to_owned(), false);
    };
    let ports = config.get_mut("console_ports").and_then(Value::as_array_mut);
    let Some(port) = ports.into_iter().flatten().find(|p| p["name"] == PORT) else {
        return (definition.to_owned(), false);
    };
    port["to"] = json!({ "socket": socket });
    (config.to_string(), true)
}

/// Watches one process; dropping it ends its thread. Drop it after the process: a connection to one that is stopped
/// may wait for its end.
pub struct Watch {
    signs: Arc<Mutex<Signs>>,
    /// Dropped to wake the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches the process behind these sockets, which need not be there yet.
    pub fn start(heartbeats: Option<PathBuf>, metrics: PathBuf) -> io::Result<Self> {
        let signs: Arc<Mutex<Signs>> = Arc::default();
        let (stop, stopped) = channel();
        let seen = signs.clone();
        let run = move || watch(heartbeats.as_deref(), &metrics, &seen, &stopped);
        let thread = std::thread::Builder::new().name("vm-watch".into()).spawn(run)?;
        Ok(Watch { signs, stop: Some(stop), thread: Some(thread) })
    }

    /// What was seen last.
    pub fn signs(&self) -> Signs {
        *self.signs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It does nothing that panics.
            let _ = thread.join();
        }
    }
}

fn watch(heartbeats: Option<&Path>, metrics: &Path, seen: &Mutex<Signs>, stopped: &Receiver<()>) {
    let mut port = None;
    let mut signs = Signs::default();
    loop {
        if let Some(path) = heartbeats {
            signs.beats = beats(path, &mut port, signs.beats);
        }
        // A process that does not answer shows what it showed before.
        if let Ok((completed, pending)) = counters(metrics) {
            (signs.completed, signs.pending) = (completed, pending);
        }
        *seen.lock().unwrap_or_else(PoisonError::into_inner) = signs;
        if stopped.recv_timeout(LOOK) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

/// Reads what heartbeats there are; they are counted anew with each connection, since a reboot ends it.
fn beats(path: &Path, port: &mut Option<UnixStream>, before: u64) -> u64 {
    let Some(stream) = port else {
        let connect = || {
            let stream = UnixStream::connect(path)?;
            stream.set_nonblocking(true)?;
            io::Result::Ok(stream)
        };
        *port = connect().ok();
        return 0;
    };
    // A guest that sends more than this in a second waits.
    let mut buffer = [0; 4096];
    match stream.read(&mut buffer) {
        Ok(n @ 1..) => before + n as u64,
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => before,
        Ok(0) | Err(_) => {
            *port = None;
            0
        }
    }
}

/// Asks for the requests that all disks have answered, and how many are under way.
fn counters(metrics: &Path) -> io::Result<(u64, u64)> {
    let mut stream = UnixStream::connect(metrics)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.take(LONGEST).read_to_string(&mut text)?;
    Ok(count(&text))
}

/// The same of the text of the metrics.
fn count(text: &str) -> (u64, u64) {
    let sum = |name: &str| -> u64 {
        let lines = text.lines().filter(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')));
        let counts = lines.filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok());
        counts.fold(0, u64::saturating_add)
    };
    let answered = sum("nacre_disk_answered_total");
    (answered, sum("nacre_disk_requests_total").saturating_sub(answered))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_the_port_of_heartbeats_is_directed_to_the_socket() {
        let socket = Path::new("/run/x");
        let ports =
            r#"{"cpus": 2, "console_ports": [{"to": "off"}, {"to": "off", "name": "nacre.heartbeat"}]}"#;
        let (text, found) = direct_port(ports, socket);
        let config: Value = serde_json::from_str(&text).unwrap();
        assert!(found);
        assert_eq!(config["console_ports"][0]["to"], "off");
        assert_eq!(config["console_ports"][1]["to"], json!({"socket": "/run/x"}));
        assert_eq!(config["cpus"], 2);
        for other in ["{}", "not JSON", r#"{"console_ports": [{"to": "off"}]}"#, r#"{"console_ports": 7}"#] {
            assert_eq!(direct_port(other, socket), (other.to_owned(), false));
        }
    }

    #[test]
    fn counters_of_any_size_can_be_added_up() {
        let most = u64::MAX;
        let line = |kind: &str, disk: &str| format!("nacre_disk_{kind}_total{{disk=\"{disk}\"}} {most}\n");
        let all = ["a", "b"].map(|disk| line("requests", disk) + &line("answered", disk)).concat();
        assert_eq!(count(&all), (most, 0));
        assert_eq!(count(&line("requests", "a")), (0, most));
        assert_eq!(count("nacre_disk_requests_total{} -1\n\n"), (0, 0));
    }

    #[test]
    fn heartbeats_and_requests_are_counted_and_a_reboot_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (port, metrics) = (dir.path().join("port"), dir.path().join("metrics"));
        let guest = UnixListener::bind(&port).unwrap();
        let server = UnixListener::bind(&metrics).unwrap();
        let done = std::thread::spawn(move || {
            // One look is answered, the next ones are not.
            let (mut client, _) = server.accept().unwrap();
            assert!(client.read(&mut [0; 256]).unwrap() > 0);
            let text = "nacre_disk_requests_total{disk=\"a\"} 7\nnacre_disk_requests_total{disk=\"b\"} 2\n\
                        nacre_disk_answered_total{disk=\"a\"} 4\nnacre_disk_answered_total{disk=\"b\"} 2\n";
            client.write_all(format!("HTTP/1.0 200 OK\r\n\r\n{text}").as_bytes()).unwrap();
        });
        let watch = Watch::start(Some(port), metrics).unwrap();
        let until = |wanted: Signs| {
            while watch.signs() != wanted {
                std::thread::yield_now();
            }
        };
        for _boot in 0..2 {
            let (mut stream, _) = guest.accept().unwrap();
            stream.write_all(b"\n\n\n").unwrap();
            until(Signs { beats: 3, completed: 6, pending: 3 });
            drop(stream);
            until(Signs { beats: 0, completed: 6, pending: 3 });
        }
        done.join().unwrap();
    }
}
