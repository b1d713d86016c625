//! A vhost-user back-end that hangs up in the middle of the protocol.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use vmm_core::devices::virtio::net::net_features as f;
use vmm_core::devices::virtio::vhost_user::VhostUserNetOptions;
use vmm_core::devices::virtio::{VhostUser, features};

use crate::driver::{Guest, Transport};

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_VRING_ENABLE: u32 = 18;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const REPLY_ACK: u64 = 1 << 3;
/// Queues of a network device.
const QUEUES: u64 = 2;

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// This many requests from `SET_FEATURES` on were answered, and the next one was not.
    Stopped(usize),
    /// A queue starts at this index.
    Base(u32, u32),
    /// All queues are enabled, after this many requests.
    Complete(usize),
}

/// One connection of a back-end without data path, and the thread that serves it.
struct Fake {
    seen: Receiver<Seen>,
    connected: Receiver<UnixStream>,
    thread: JoinHandle<()>,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Fake {
    /// Listens at `path`, where nothing may be left. On the connection that comes, `answers` requests from
    /// `SET_FEATURES` on are answered, and no later one; it ends at `GET_VRING_BASE`. By then nobody listens.
    fn start(path: &Path, answers: usize) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let (tell, seen) = channel();
        let (connect, connected) = channel();
        let path: PathBuf = path.to_owned();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            drop(listener);
            std::fs::remove_file(&path).unwrap();
            connect.send(stream.try_clone().unwrap()).unwrap();
            serve(&stream, answers, &tell);
            // The clone would keep it open; the front-end may have closed it.
            let _ = stream.shutdown(Shutdown::Both);
        });
        Self { seen, connected, thread }
    }

    fn hang_up(self) {
        // It may have hung up by itself.
        let _ = self.connected.recv().unwrap().shutdown(Shutdown::Both);
        self.thread.join().unwrap();
    }
}

fn serve(mut stream: &UnixStream, answers: usize, tell: &Sender<Seen>) {
    let (mut handed_over, mut answered, mut enabled) = (false, 0, 0);
    // A test that is over listens no more.
    let tell = |seen| drop(tell.send(seen));
    loop {
        let mut header = [0; 12];
        if stream.read_exact(&mut header).is_err() {
            return;
        }
        let mut payload = vec![0; word(&header, 8) as usize];
        if stream.read_exact(&mut payload).is_err() {
            return;
        }
        let (request, flags) = (word(&header, 0), word(&header, 4));
        handed_over |= request == SET_FEATURES;
        if handed_over && answered == answers {
            tell(Seen::Stopped(answered));
            continue;
        }
        let answer = match request {
            GET_FEATURES => features::VERSION_1 | PROTOCOL_FEATURES,
            GET_PROTOCOL_FEATURES => REPLY_ACK,
            GET_VRING_BASE => return,
            _ => 0,
        };
        if request == SET_VRING_BASE {
            tell(Seen::Base(word(&payload, 0), word(&payload, 4)));
        }
        if flags & NEED_REPLY != 0 || matches!(request, GET_FEATURES | GET_PROTOCOL_FEATURES) {
            let message: Vec<u8> = [request, 1 | REPLY, 8].iter().flat_map(|w| w.to_le_bytes()).collect();
            stream.write_all(&[message, answer.to_le_bytes().to_vec()].concat()).unwrap();
        }
        answered += usize::from(handed_over);
        enabled += u64::from(request == SET_VRING_ENABLE);
        if request == SET_VRING_ENABLE && enabled == QUEUES {
            tell(Seen::Complete(answered));
        }
    }
}

fn link(guest: &Guest) -> u32 {
    guest.config_u32(4) >> 16 & 1
}

fn wait_link(guest: &Guest, up: u32) {
    while link(guest) != up {
        guest.wait_interrupt(None);
    }
}

/// The bases that the queues got, when the next back-end has them all, and the number of requests until then.
fn handed_over(fake: &Fake) -> ([u32; 2], usize) {
    let mut bases = [u32::MAX; 2];
    loop {
        match fake.seen.recv().unwrap() {
            Seen::Base(queue, base) => bases[queue as usize] = base,
            Seen::Complete(requests) => return (bases, requests),
            Seen::Stopped(n) => panic!("stopped after {n} requests"),
        }
    }
}

/// At whatever step of the protocol a back-end goes, the guest sees the link go down, and up with the next back-end,
/// which starts the queues behind the buffers that were given back.
#[test]
fn a_back_end_may_hang_up_at_each_step() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vhost.sock");
    for transport in [Transport::PciMsix, Transport::Mmio] {
        let mut steps = 1;
        let mut step = 0;
        while step <= steps {
            let first = Fake::start(&socket, step);
            let device = VhostUser::net(&socket, &VhostUserNetOptions::default()).unwrap();
            let mut guest = Guest::new(transport, device);
            let queues = guest.bring_up(f::STATUS, 16);
            if step < steps {
                while first.seen.recv().unwrap() != Seen::Stopped(step) {}
            } else {
                wait_link(&guest, 1);
                handed_over(&first);
            }
            // It gave back some buffers before it went.
            guest.memory.store_u16(queues[0].used + 2, 3, std::sync::atomic::Ordering::SeqCst).unwrap();
            first.hang_up();
            wait_link(&guest, 0);
            let second = Fake::start(&socket, usize::MAX);
            wait_link(&guest, 1);
            let (bases, requests) = handed_over(&second);
            assert_eq!(bases, [3, 0], "{transport:?}, step {step}");
            // It goes while the queues are taken back for a pause.
            guest.lifecycle().pause().unwrap();
            second.hang_up();
            guest.start();
            wait_link(&guest, 0);
            (step, steps) = (step + 1, requests);
        }
        assert!(steps > 10, "{steps} steps are not the whole protocol");
    }
}
