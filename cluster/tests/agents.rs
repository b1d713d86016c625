//! Fence agents, the journal and its actions, with real programs.

#![expect(clippy::unwrap_used, reason = "a failure in a test's helper fails the test")]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use cluster::adapters::{Action, ActionRunner, AgentError, Event, FenceAgent, Journal, Rule, Severity};
use cluster::fence::{AgentReply, FenceAction};

fn dummy(dir: &Path) -> FenceAgent {
    let program = PathBuf::from("/usr/sbin/fence_dummy");
    assert!(program.exists(), "fence_dummy is missing: install the Debian package fence-agents");
    let status = dir.join("status").display().to_string();
    let parameters = [("type", "file"), ("status_file", status.as_str())];
    FenceAgent { program, parameters: parameters.map(|(k, v)| (k.into(), v.into())).into() }
}

#[test]
fn fence_dummy_is_switched_off_and_on() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dummy(dir.path());
    let limit = Duration::from_secs(60);
    let run = |action| agent.run(action, limit).unwrap();
    assert_eq!(run(FenceAction::On), AgentReply::Accepted);
    assert_eq!(run(FenceAction::Status), AgentReply::PowerOn);
    assert_eq!(run(FenceAction::Off), AgentReply::Accepted);
    assert_eq!(run(FenceAction::Status), AgentReply::PowerOff);
}

fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_hanging_agent_is_killed_and_a_failing_one_is_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let agent = |p| FenceAgent { program: p, parameters: Default::default() };
    let hangs = agent(script(dir.path(), "hangs", "sleep 1000"));
    assert!(matches!(hangs.run(FenceAction::Off, Duration::from_millis(100)), Err(AgentError::TooSlow(_))));
    let fails = agent(script(dir.path(), "fails", "exit 1"));
    assert!(matches!(fails.run(FenceAction::Status, Duration::from_secs(60)), Err(AgentError::Failed(_))));
    let missing = agent(dir.path().join("missing"));
    assert!(matches!(missing.run(FenceAction::On, Duration::from_secs(60)), Err(AgentError::Start(_))));
    let mut inject = agent(PathBuf::from("/bin/true"));
    inject.parameters.insert("ip".into(), "x\naction=off".into());
    assert!(matches!(
        inject.run(FenceAction::Status, Duration::from_secs(60)),
        Err(AgentError::Parameter(_))
    ));
}

fn event(kind: &str, severity: Severity) -> Event {
    Event { id: 0, time: 0, severity, kind: kind.into(), subject: "host 3".into(), message: "Fenced".into() }
}

#[test]
fn the_journal_only_grows_and_drops_a_torn_last_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("events");
    let mut journal = Journal::open(&path).unwrap();
    for _ in 0..3 {
        journal.append(event("host.fenced", Severity::Error)).unwrap();
    }
    drop(journal);
    std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"id\":4,\"ti").unwrap();
    let mut journal = Journal::open(&path).unwrap();
    assert_eq!(journal.append(event("vm.lost", Severity::Warning)).unwrap().id, 4);
    let ids: Vec<u64> = Journal::read(&path, 2, 10).unwrap().iter().map(|e| e.id).collect();
    assert_eq!(ids, [3, 4]);
    // Nobody has counted to this number.
    let mut forged = serde_json::to_vec(&Event { id: u64::MAX, ..event("x", Severity::Info) }).unwrap();
    forged.push(b'\n');
    std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(&forged).unwrap();
    let mut journal = Journal::open(&path).unwrap();
    assert_eq!(journal.append(event("vm.lost", Severity::Warning)).unwrap().id, 5);
}

#[test]
fn an_event_is_printed_on_a_console_and_one_that_nobody_reads_escalates() {
    let dir = tempfile::tempdir().unwrap();
    let [read, unread] = ["read", "unread"].map(|name| {
        let path = dir.path().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    });
    let mut open = std::fs::OpenOptions::new();
    let mut console = open.read(true).custom_flags(libc::O_NONBLOCK).open(&read).unwrap();
    let actions = vec![Action::Console(unread), Action::Console(read)];
    let runner = ActionRunner::new(vec![Rule { kind: "vm.".into(), severity: Severity::Warning, actions }]);
    let failures = runner.answer(&event("vm.gave-up", Severity::Error));
    assert_eq!(failures.iter().map(|f| f.0).collect::<Vec<_>>(), [0]);
    let mut line = [0; 256];
    let n = console.read(&mut line).unwrap();
    assert_eq!(std::str::from_utf8(&line[..n]).unwrap(), "nacre: Error: vm.gave-up: host 3: Fenced\r\n");
}

#[test]
fn actions_escalate_from_a_failed_script_to_a_webhook() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap().to_string();
    let answer = std::thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        let mut got = Vec::new();
        let mut buf = [0; 4096];
        while !String::from_utf8_lossy(&got).contains("summary") {
            let n = stream.read(&mut buf).unwrap();
            got.extend_from_slice(&buf[..n]);
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        String::from_utf8_lossy(&got).into_owned()
    });
    let fails = script(dir.path(), "fails", "exit 3");
    let works = script(dir.path(), "works", &format!("cat > {}", out.display()));
    let runner = ActionRunner::new(vec![
        Rule {
            kind: "host.".into(),
            severity: Severity::Error,
            actions: vec![
                Action::Script { program: fails, seconds: 60 },
                Action::Webhook { address, path: "/api/v2/alerts".into() },
            ],
        },
        Rule {
            kind: String::new(),
            severity: Severity::Warning,
            // So much that no clock comes to the end.
            actions: vec![Action::Script { program: works, seconds: u64::MAX }],
        },
    ]);
    assert!(runner.answer(&event("host.fenced", Severity::Info)).is_empty());
    let failures = runner.answer(&event("host.fenced", Severity::Error));
    assert_eq!(failures.iter().map(|f| f.0).collect::<Vec<_>>(), [0]);
    let request = answer.join().unwrap();
    assert!(request.starts_with("POST /api/v2/alerts") && request.contains("host.fenced"), "{request}");
    assert!(std::fs::read_to_string(&out).unwrap().contains("host 3"));
}
