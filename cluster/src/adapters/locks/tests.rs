use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::dlm::Value;

struct Host {
    manager: LockManager,
    events: Receiver<LockEvent>,
}

/// An address of this process's own on the loopback network.
fn address(test: u16, host: u16) -> SocketAddr {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    (Ipv4Addr::new(127, high, low, host as u8), 7500 + test).into()
}

fn start(test: u16, host: u16, hosts: u16) -> Host {
    let peers = (1..=hosts).filter(|h| *h != host).map(|h| (HostId(h), address(test, h))).collect();
    let (host, listen) = (HostId(host), address(test, host));
    let config = LockManagerConfig { host, listen, key: b"secret".to_vec(), peers };
    let (manager, events) = LockManager::start(config).unwrap();
    Host { manager, events }
}

fn view(number: u64, members: &[u16]) -> View {
    View { number, members: members.iter().copied().map(HostId).collect() }
}

fn cluster(test: u16, hosts: u16) -> Vec<Host> {
    let started: Vec<Host> = (1..=hosts).map(|h| start(test, h, hosts)).collect();
    let members: Vec<u16> = (1..=hosts).collect();
    started.iter().for_each(|h| h.manager.install(view(1, &members)));
    started
}

impl Host {
    /// Waits until a lock is granted; gives its value.
    fn granted(&self, wanted: LockId) -> Value {
        loop {
            match self.events.recv().unwrap() {
                LockEvent::Granted { id, value, .. } if id == wanted => return value,
                _ => {}
            }
        }
    }

    fn acquire(&self, name: &str, mode: Mode) -> (LockId, Value) {
        let id = self.manager.lock(name, mode).unwrap();
        let value = self.granted(id);
        (id, value)
    }

    fn release(&self, id: LockId, value: Option<Vec<u8>>) {
        self.manager.release(id, value).unwrap();
        while self.events.recv().unwrap() != LockEvent::Released(id) {}
    }

    fn cut(&self) {
        for connection in self.manager.shared.lock().connections.values() {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

#[test]
fn exclusive_locks_exclude_and_values_travel_while_connections_break() {
    const ROUNDS: u64 = 15;
    let hosts = cluster(0, 3);
    // A value lives as long as there is a lock of its name.
    hosts[0].acquire("counter", Mode::Null);
    let inside = AtomicBool::new(false);
    let over = AtomicBool::new(false);
    let mut cuts = 0;
    thread::scope(|scope| {
        let mut running = Vec::new();
        let cutters: Vec<Arc<Shared>> = hosts.iter().map(|h| h.manager.shared.clone()).collect();
        for host in hosts {
            let inside = &inside;
            running.push(scope.spawn(move || {
                for _ in 0..ROUNDS {
                    let (id, value) = host.acquire("counter", Mode::Exclusive);
                    assert!(!inside.swap(true, Ordering::SeqCst), "two hosts have it");
                    let count = value.bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b));
                    assert!(value.valid);
                    inside.store(false, Ordering::SeqCst);
                    host.release(id, Some((count + 1).to_be_bytes().to_vec()));
                }
                host
            }));
        }
        let over = &over;
        let cutter = scope.spawn(move || {
            let mut cuts = 0;
            while !over.load(Ordering::SeqCst) {
                for shared in &cutters {
                    for connection in shared.lock().connections.values() {
                        cuts += usize::from(connection.shutdown(Shutdown::Both).is_ok());
                    }
                    thread::sleep(Duration::from_millis(60));
                }
            }
            cuts
        });
        let hosts: Vec<Host> = running.into_iter().map(|w| w.join().unwrap()).collect();
        over.store(true, Ordering::SeqCst);
        cuts = cutter.join().unwrap();
        let (_, value) = hosts[1].acquire("counter", Mode::ProtectedRead);
        assert_eq!(value.bytes, (ROUNDS * hosts.len() as u64).to_be_bytes());
    });
    assert!(cuts > 0);
}

#[test]
fn locks_of_a_host_that_died_are_free_in_the_next_view_and_it_comes_back() {
    let mut hosts = cluster(1, 3);
    let (_, first) = hosts[2].acquire("disk", Mode::Exclusive);
    assert!(first.valid);
    let waiting = hosts[0].manager.lock("disk", Mode::Exclusive).unwrap();
    // Host 3 masters the name: its answer shows that the request is there.
    while !matches!(hosts[2].events.recv().unwrap(), LockEvent::Blocking { .. }) {}
    drop(hosts.pop());
    hosts.iter().for_each(|h| h.manager.install(view(2, &[1, 2])));
    // Its last words are lost.
    assert!(!hosts[0].granted(waiting).valid);
    hosts[0].release(waiting, Some(b"mine".to_vec()));
    hosts.push(start(1, 3, 3));
    hosts.iter().for_each(|h| h.manager.install(view(3, &[1, 2, 3])));
    let (_, value) = hosts[2].acquire("disk", Mode::ProtectedRead);
    let (_, other) = hosts[1].acquire("disk", Mode::ProtectedRead);
    assert_eq!(value.bytes, other.bytes);
    let held: BTreeSet<_> = hosts.iter().map(|h| h.manager.locks().len()).collect();
    assert_eq!(held, [0, 1].into());
}

#[test]
fn a_host_that_left_for_a_while_gets_nothing_of_what_it_missed() {
    let hosts = cluster(2, 2);
    let (id, _) = hosts[0].acquire("a", Mode::Exclusive);
    hosts[1].cut();
    hosts.iter().for_each(|h| h.manager.install(view(2, &[1])));
    hosts[0].release(id, None);
    assert_eq!(hosts[1].manager.lock("a", Mode::Exclusive), Err(LockError::NoMember));
    hosts.iter().for_each(|h| h.manager.install(view(3, &[1, 2])));
    let (id, _) = hosts[1].acquire("a", Mode::Exclusive);
    hosts[1].release(id, None);
    hosts[0].acquire("a", Mode::Exclusive);
}

#[test]
fn strangers_are_sent_away() {
    let hosts = cluster(3, 2);
    for text in
        [&[0u8; 72][..], b"GET / HTTP/1.0\r\n\r\n plus what fills the first message up to its end and more"]
    {
        let mut stranger = TcpStream::connect(hosts[0].manager.address()).unwrap();
        stranger.write_all(text).unwrap();
        let mut answer = Vec::new();
        // It may be reset with what it has sent.
        let _ = stranger.read_to_end(&mut answer);
        assert_eq!(answer, b"");
    }
    hosts[0].acquire("a", Mode::Exclusive);
}

#[test]
fn strangers_who_say_nothing_make_way_for_others() {
    let hosts = cluster(4, 2);
    // Afterwards the hosts are no strangers to each other.
    let (id, _) = hosts[0].acquire("a", Mode::Exclusive);
    hosts[0].release(id, None);
    let address = hosts[0].manager.address();
    let mut strangers: Vec<TcpStream> =
        (0..=STRANGERS).map(|_| TcpStream::connect(address).unwrap()).collect();
    let newest = strangers.pop().unwrap();
    // The first of them is sent away when there is one too many.
    assert_eq!(strangers[0].read(&mut [0]).unwrap_or_default(), 0);
    newest.set_nonblocking(true).unwrap();
    assert_eq!(newest.peek(&mut [0]).map_err(|e| e.kind()), Err(io::ErrorKind::WouldBlock));
    hosts[0].acquire("a", Mode::Exclusive);
}

#[test]
fn who_sends_slowly_does_not_gain_time() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (stream, _) = listener.accept().unwrap();
    sender.write_all(b"ab").unwrap();
    let mut patient = Patient { stream: &stream, until: None };
    assert_eq!(patient.read(&mut [0]).unwrap(), 1);
    patient.until = Some(Instant::now());
    assert_eq!(patient.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::TimedOut);
}

#[test]
fn the_largest_part_of_a_recovery_is_no_longer_than_a_message_may_be() {
    let members = [HostId(1), HostId(2)].into_iter().collect();
    let mut dlm = Dlm::new(HostId(1));
    let mut out = Vec::new();
    let alone = [HostId(1)].into_iter().collect();
    dlm.step(DlmInput::View(View::new(1, &alone)), &mut out);
    for n in 0..1000 {
        // Of all characters those become longest in JSON.
        let name = format!("{n:03}{}", "\u{1}".repeat(crate::dlm::NAME_MAX - 3));
        let id = dlm.lock(&name, Mode::Exclusive, &mut out).unwrap();
        let value = || Some(vec![255; crate::dlm::VALUE_SIZE]);
        dlm.convert(id, Mode::ProtectedWrite, value(), &mut out).unwrap();
        dlm.convert(id, Mode::Exclusive, value(), &mut out).unwrap();
    }
    out.clear();
    dlm.step(DlmInput::View(View::new(u64::MAX, &members)), &mut out);
    let length = |output: &DlmOutput| match output {
        DlmOutput::Send(_, message) => serde_json::to_vec(message).unwrap().len(),
        DlmOutput::Event(event) => panic!("{event:?}"),
    };
    let lengths: Vec<usize> = out.iter().map(length).collect();
    assert_eq!(lengths.len(), 8, "a thousand locks and as many names");
    // A wish with a value, and larger numbers, may come to what is here.
    assert!(lengths.iter().all(|n| (300_000..wire::LONGEST * 3 / 4).contains(n)), "{lengths:?}");
}

#[test]
fn more_locks_than_a_message_holds_survive_a_change_of_members_while_connections_break() {
    const LOCKS: usize = 700;
    let hosts = cluster(5, 3);
    let name = |n: usize| format!("disk {n}");
    let asked: BTreeSet<LockId> =
        (0..LOCKS).map(|n| hosts[1].manager.lock(&name(n), Mode::Exclusive).unwrap()).collect();
    let mut missing = asked;
    while !missing.is_empty() {
        if let LockEvent::Granted { id, .. } = hosts[1].events.recv().unwrap() {
            missing.remove(&id);
        }
    }
    // Host 1 waits for one of them; then host 3 leaves.
    let waiting = hosts[0].manager.lock(&name(LOCKS - 1), Mode::Exclusive).unwrap();
    hosts[..2].iter().for_each(|h| h.manager.install(view(2, &[1, 2])));
    for _ in 0..20 {
        hosts[..2].iter().for_each(Host::cut);
        thread::sleep(Duration::from_millis(10));
    }
    while !hosts[..2].iter().all(|h| h.manager.is_settled()) {
        thread::sleep(Duration::from_millis(10));
    }
    let held =
        |host: &Host| host.manager.locks().iter().filter(|l| l.granted == Some(Mode::Exclusive)).count();
    assert_eq!((held(&hosts[0]), held(&hosts[1])), (0, LOCKS));
    let last = hosts[1].manager.locks().into_iter().find(|l| l.name == name(LOCKS - 1)).unwrap();
    hosts[1].release(last.id, None);
    hosts[0].granted(waiting);
}
