//! The other end of the serial console and of virtio console ports: standard I/O, a pseudo-terminal, a socket or a file.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config::ConsoleConfig;
use crate::devices::legacy::{Serial, SerialOutput};
use crate::devices::virtio::ConsolePort;

const STACK_SIZE: usize = 64 << 10;
/// How long output waits for a slow reader of a pseudo-terminal or socket before it is dropped, in milliseconds.
const PATIENCE_MS: i32 = 100;

/// Why a console cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// A file or socket path cannot be used.
    #[error("Cannot open the console {}; check the path and its permissions", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The path of a console socket is in use by something else.
    #[error("The console socket {} exists and is in use; remove it or use another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// No descriptor, terminal or thread.
    #[error("Cannot set up the console")]
    Host(#[from] io::Error),
}

/// Looks at input on its way to the guest, and may change it. Called on the console's thread.
pub type InputFilter = Box<dyn FnMut(&mut Vec<u8>) + Send>;

/// Where output goes now: a socket's clients come and go.
type Sink = Arc<Mutex<Option<File>>>;

struct Output {
    sink: Sink,
    /// Drop output that nobody reads, instead of making the guest wait.
    drop_when_full: bool,
}

impl SerialOutput for Output {
    fn write(&self, mut data: &[u8]) {
        let mut sink = self.sink.lock();
        let Some(file) = &mut *sink else { return };
        while !data.is_empty() {
            match file.write(data) {
                Ok(0) => return,
                Ok(n) => data = &data[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let timeout = if self.drop_when_full { PATIENCE_MS } else { -1 };
                    if !matches!(poll(&[(file.as_raw_fd(), libc::POLLOUT)], timeout), Ok([true])) {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }
}

/// Waits until a descriptor is ready or broken, and says which are.
pub(super) fn poll<const N: usize>(wanted: &[(i32, i16); N], timeout: i32) -> io::Result<[bool; N]> {
    let mut fds = wanted.map(|(fd, events)| libc::pollfd { fd, events, revents: 0 });
    // SAFETY: `fds` is an array of N valid structures.
    let n = unsafe { libc::poll(fds.as_mut_ptr(), N as libc::nfds_t, timeout) };
    if n < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
        return Ok([false; N]);
    }
    Ok(fds.map(|fd| fd.revents != 0))
}

enum Input {
    None,
    Stream(File),
    Listener(UnixListener),
}

/// An open console that is not connected to a serial port yet.
pub(super) struct Console {
    sink: Sink,
    input: Input,
    drop_when_full: bool,
    /// The guest's end of a pseudo-terminal, held open so that the other end does not hang up between users.
    pty: Option<(File, PathBuf)>,
    socket: Option<SocketPath>,
}

/// Removes the socket's file at the end.
struct SocketPath(PathBuf);

impl Drop for SocketPath {
    fn drop(&mut self) {
        // Somebody else may have removed it.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Console {
    pub(super) fn open(config: &ConsoleConfig) -> Result<Self, ConsoleError> {
        let mut console = Self {
            sink: Sink::default(),
            input: Input::None,
            drop_when_full: false,
            pty: None,
            socket: None,
        };
        match config {
            ConsoleConfig::Off => {}
            ConsoleConfig::Stdio => {
                console.input = Input::Stream(io::stdin().as_fd().try_clone_to_owned()?.into());
                *console.sink.lock() = Some(io::stdout().as_fd().try_clone_to_owned()?.into());
            }
            ConsoleConfig::File(path) => {
                let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path);
                let file = file.map_err(|source| ConsoleError::Path { path: path.clone(), source })?;
                *console.sink.lock() = Some(file);
            }
            ConsoleConfig::Socket(path) => {
                console.input = Input::Listener(listen(path)?);
                console.socket = Some(SocketPath(path.clone()));
                console.drop_when_full = true;
            }
            ConsoleConfig::Pty => {
                let (master, slave, path) = open_pty()?;
                console.input = Input::Stream(master.try_clone()?);
                *console.sink.lock() = Some(master);
                console.pty = Some((slave, path));
                console.drop_when_full = true;
            }
        }
        Ok(console)
    }

    pub(super) fn pty_path(&self) -> Option<&Path> {
        self.pty.as_ref().map(|(_, path)| path.as_path())
    }

    pub(super) fn output(&self) -> Box<dyn SerialOutput> {
        Box::new(Output { sink: self.sink.clone(), drop_when_full: self.drop_when_full })
    }

    /// Makes a port of a virtio console; what is returned with it must live as long.
    pub(super) fn into_port(self, name: &str) -> Result<(ConsolePort, RunningConsole), ConsoleError> {
        let output = self.sink.lock().take().map(OwnedFd::from);
        let port = match self.input {
            Input::None => ConsolePort::new(name, None, output),
            Input::Stream(file) => ConsolePort::new(name, Some(file.into()), output),
            Input::Listener(listener) => ConsolePort::listening(name, listener)?,
        };
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        Ok((port, RunningConsole { stop, reader: None, thread: None, _pty: self.pty, socket: self.socket }))
    }

    /// Connects the console to `serial`, which gets its input from [`RunningConsole::start`] on. A socket takes clients at
    /// once, so that they do not miss what the guest prints first.
    pub(super) fn connect(
        self,
        serial: Arc<Serial>,
        filter: Option<InputFilter>,
    ) -> Result<RunningConsole, ConsoleError> {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let mut reader: Option<Reader> = None;
        if !matches!(self.input, Input::None) {
            let room = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            let told = room.try_clone()?;
            serial.on_room(move || {
                // The counter only has to be above zero.
                let _ = told.write(1);
            });
            let mut pump = Pump {
                serial,
                filter,
                room,
                stop: stop.clone(),
                sink: self.sink.clone(),
                waiting: Vec::new(),
            };
            let input = self.input;
            reader = Some(Box::new(move || {
                if let Err(error) = pump.run(input) {
                    tracing::warn!(%error, "The console takes no input any more");
                }
            }));
        }
        let mut running = RunningConsole { stop, reader, thread: None, _pty: self.pty, socket: self.socket };
        if running.socket.is_some() {
            running.start()?;
        }
        Ok(running)
    }
}

fn listen(path: &Path) -> Result<UnixListener, ConsoleError> {
    let fail = |source| ConsoleError::Path { path: path.to_owned(), source };
    let listener = crate::socket::listen(path).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => ConsoleError::InUse { path: path.to_owned() },
        _ => fail(error),
    })?;
    listener.set_nonblocking(true).map_err(fail)?;
    Ok(listener)
}

/// A new pseudo-terminal in raw mode: both ends and the path of the second.
fn open_pty() -> io::Result<(File, File, PathBuf)> {
    let (mut master, mut slave) = (0, 0);
    let mut name = [0u8; 128];
    // SAFETY: the pointers are to live variables; glibc writes a path of at most /dev/pts/ and a number.
    let r = unsafe {
        libc::openpty(&mut master, &mut slave, name.as_mut_ptr().cast(), std::ptr::null(), std::ptr::null())
    };
    if r != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both descriptors are fresh and owned by nobody else.
    let (master, slave) = unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
    for fd in [&master, &slave] {
        // SAFETY: sets a flag of an open descriptor.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    // SAFETY: an all-zero termios is a valid value that tcgetattr overwrites.
    let mut mode: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptors are open and `mode` is a live variable.
    unsafe {
        if libc::tcgetattr(slave.as_raw_fd(), &mut mode) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::cfmakeraw(&mut mode);
        if libc::tcsetattr(slave.as_raw_fd(), libc::TCSANOW, &mode) != 0
            || libc::fcntl(master.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) != 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
    let path = PathBuf::from(String::from_utf8_lossy(&name[..end]).into_owned());
    Ok((master.into(), slave.into(), path))
}

/// Moves input to the serial port.
struct Pump {
    serial: Arc<Serial>,
    filter: Option<InputFilter>,
    room: EventFd,
    stop: Arc<EventFd>,
    sink: Sink,
    /// Input that the serial port has no room for.
    waiting: Vec<u8>,
}

/// Why a stream is read no more.
enum Ended {
    Stream,
    Console,
}

impl Pump {
    fn run(&mut self, input: Input) -> io::Result<()> {
        match input {
            Input::None => Ok(()),
            Input::Stream(mut file) => self.stream(&mut file).map(|_| ()),
            Input::Listener(listener) => loop {
                let ready =
                    poll(&[(listener.as_raw_fd(), libc::POLLIN), (self.stop.as_raw_fd(), libc::POLLIN)], -1)?;
                if ready[1] {
                    return Ok(());
                }
                let Ok((client, _)) = listener.accept() else { continue };
                client.set_nonblocking(true)?;
                let mut file = File::from(OwnedFd::from(client));
                *self.sink.lock() = Some(file.try_clone()?);
                let ended = self.stream(&mut file);
                *self.sink.lock() = None;
                if matches!(ended, Ok(Ended::Console)) {
                    return Ok(());
                }
            },
        }
    }

    fn stream(&mut self, file: &mut File) -> io::Result<Ended> {
        let mut buffer = [0; 1024];
        loop {
            let taken = self.serial.input(&self.waiting);
            self.waiting.drain(..taken);
            // While the guest takes nothing, neither do we; its side tells when there is room.
            let source = if self.waiting.is_empty() { file.as_raw_fd() } else { self.room.as_raw_fd() };
            let ready = poll(&[(source, libc::POLLIN), (self.stop.as_raw_fd(), libc::POLLIN)], -1)?;
            if ready[1] {
                return Ok(Ended::Console);
            }
            if !ready[0] {
                continue;
            }
            if !self.waiting.is_empty() {
                // Only empties the counter.
                let _ = self.room.read();
                continue;
            }
            match file.read(&mut buffer) {
                Ok(0) => return Ok(Ended::Stream),
                Ok(n) => {
                    self.waiting.extend_from_slice(&buffer[..n]);
                    if let Some(filter) = &mut self.filter {
                        filter(&mut self.waiting);
                    }
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// What the thread does that reads input.
type Reader = Box<dyn FnOnce() + Send>;

/// A console that moves bytes until it is dropped.
pub(super) struct RunningConsole {
    stop: Arc<EventFd>,
    /// Until the thread is started.
    reader: Option<Reader>,
    thread: Option<JoinHandle<()>>,
    _pty: Option<(File, PathBuf)>,
    socket: Option<SocketPath>,
}

impl RunningConsole {
    /// Starts the thread that reads input, unless it was started or there is no input.
    pub(super) fn start(&mut self) -> Result<(), ConsoleError> {
        if let Some(reader) = self.reader.take() {
            let thread = std::thread::Builder::new().name("console".into()).stack_size(STACK_SIZE);
            self.thread = Some(thread.spawn(reader)?);
        }
        Ok(())
    }
}

impl Drop for RunningConsole {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take()
            && self.stop.write(1).is_ok()
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;
    use crate::bus::BusDevice;
    use crate::interrupt::IrqLine;
    use std::os::unix::net::UnixStream;

    struct NoLine;

    impl IrqLine for NoLine {
        fn set_level(&self, _: bool) {}
    }

    fn serial_on(config: &ConsoleConfig) -> (Arc<Serial>, RunningConsole, Option<PathBuf>) {
        let console = Console::open(config).unwrap();
        let path = console.pty_path().map(Path::to_owned);
        let serial = Arc::new(Serial::new(Arc::new(NoLine), console.output()));
        let mut running = console.connect(serial.clone(), None).unwrap();
        running.start().unwrap();
        (serial, running, path)
    }

    /// Reads one byte that must arrive.
    fn receive(serial: &Serial) -> u8 {
        loop {
            let mut data = [0];
            serial.read(5, &mut data);
            if data[0] & 1 != 0 {
                serial.read(0, &mut data);
                return data[0];
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn socket_clients_come_and_go_and_the_file_disappears() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let (serial, running, _) = serial_on(&ConsoleConfig::Socket(path.clone()));
        assert!(matches!(
            Console::open(&ConsoleConfig::Socket(path.clone())),
            Err(ConsoleError::InUse { .. })
        ));
        for text in ["one\n", "two\n"] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"!").unwrap();
            // The input shows that the client is connected: the output will reach it. The first client of all was
            // the probe above.
            assert_eq!(receive(&serial), b'!');
            serial.write(0, text.as_bytes());
            for byte in &text.as_bytes()[1..] {
                serial.write(0, &[*byte]);
            }
            let mut line = String::new();
            BufReader::new(client).read_line(&mut line).unwrap();
            assert!(line.starts_with(&text[..1]));
        }
        drop(running);
        assert!(!path.exists());
    }

    #[test]
    fn pty_carries_both_directions_without_loss() {
        let (serial, running, path) = serial_on(&ConsoleConfig::Pty);
        let mut terminal = File::options().read(true).write(true).open(path.unwrap()).unwrap();
        let sent: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
        let data = sent.clone();
        let writer = std::thread::spawn(move || {
            terminal.write_all(&data).unwrap();
            terminal
        });
        let received: Vec<u8> = (0..sent.len()).map(|_| receive(&serial)).collect();
        assert!(received == sent);
        let mut terminal = writer.join().unwrap();
        serial.write(0, b"x");
        let mut one = [0];
        terminal.read_exact(&mut one).unwrap();
        assert_eq!(one, *b"x");
        drop(running);
    }

    #[test]
    fn input_waits_until_the_console_is_started() {
        let console = Console::open(&ConsoleConfig::Pty).unwrap();
        let path = console.pty_path().unwrap().to_owned();
        let serial = Arc::new(Serial::new(Arc::new(NoLine), console.output()));
        let mut running = console.connect(serial.clone(), None).unwrap();
        File::options().write(true).open(path).unwrap().write_all(b"x").unwrap();
        assert!(running.thread.is_none());
        running.start().unwrap();
        assert_eq!(receive(&serial), b'x');
        let thread = running.thread.as_ref().map(|thread| thread.thread().id());
        running.start().unwrap();
        assert_eq!(running.thread.as_ref().map(|thread| thread.thread().id()), thread, "one is enough");
    }

    #[test]
    fn files_are_overwritten_and_bad_paths_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "old").unwrap();
        let (serial, ..) = serial_on(&ConsoleConfig::File(path.clone()));
        serial.write(0, b"n");
        assert_eq!(std::fs::read(&path).unwrap(), b"n");
        let missing = dir.path().join("no/such/place");
        assert!(matches!(
            Console::open(&ConsoleConfig::File(missing.clone())),
            Err(ConsoleError::Path { .. })
        ));
        assert!(matches!(Console::open(&ConsoleConfig::Socket(missing)), Err(ConsoleError::Path { .. })));
    }
}
