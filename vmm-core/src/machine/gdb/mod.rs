//! A server of the gdb remote protocol: a debugger sees each vCPU as a thread.
//!
//! The machine waits for the debugger before its first instruction. While the debugger is in charge the vCPU threads
//! wait and serve its requests ([`Control::with_vcpu`]).

mod target;

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use gdbstub::common::Signal;
use gdbstub::conn::{Connection, ConnectionExt};
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{GdbStub, MultiThreadStopReason};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::target::{Debuggee, Unreachable};
use super::config::GdbConfig;
use super::console::poll;
use super::vcpu::Control;

const STACK_SIZE: usize = 256 << 10;

/// Why no debugger can connect.
#[derive(Debug, thiserror::Error)]
pub enum GdbError {
    /// The address cannot be listened on.
    #[error("Cannot listen for a debugger at {address}; use another address")]
    Listen {
        /// The address.
        address: String,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    fn open(config: &GdbConfig) -> Result<Self, GdbError> {
        match config {
            GdbConfig::Tcp(address) => TcpListener::bind(address.as_str())
                .map(Self::Tcp)
                .map_err(|source| GdbError::Listen { address: address.clone(), source }),
            GdbConfig::Unix(path) => crate::socket::listen(path)
                .map(|listener| Self::Unix(listener, path.clone()))
                .map_err(|source| GdbError::Listen { address: path.display().to_string(), source }),
        }
    }

    fn fd(&self) -> RawFd {
        match self {
            Self::Tcp(listener) => listener.as_raw_fd(),
            Self::Unix(listener, _) => listener.as_raw_fd(),
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        Ok(match self {
            Self::Tcp(listener) => {
                let stream = listener.accept()?.0;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            Self::Unix(listener, _) => Stream::Unix(listener.accept()?.0),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Somebody else may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn fd(&self) -> RawFd {
        match self {
            Self::Tcp(stream) => stream.as_raw_fd(),
            Self::Unix(stream) => stream.as_raw_fd(),
        }
    }
}

/// The debugger's connection. Reading also ends when the server is to stop.
struct Link {
    stream: Stream,
    peeked: Option<u8>,
    stop: Arc<EventFd>,
}

impl Link {
    /// Waits for input or for `other`; true when there is input.
    fn wait(&self, other: RawFd) -> io::Result<bool> {
        let wanted = [self.stream.fd(), self.stop.as_raw_fd(), other].map(|fd| (fd, libc::POLLIN));
        let [input, stop, _] = poll(&wanted, -1)?;
        if stop { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(input) }
    }
}

impl Connection for Link {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.write_all(&[byte])
    }

    fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        match &mut self.stream {
            Stream::Tcp(stream) => Write::write_all(stream, data),
            Stream::Unix(stream) => Write::write_all(stream, data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ConnectionExt for Link {
    fn read(&mut self) -> io::Result<u8> {
        if let Some(byte) = self.peeked.take() {
            return Ok(byte);
        }
        while !self.wait(-1)? {}
        let mut byte = [0];
        match &mut self.stream {
            Stream::Tcp(stream) => stream.read_exact(&mut byte)?,
            Stream::Unix(stream) => stream.read_exact(&mut byte)?,
        }
        Ok(byte[0])
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        if self.peeked.is_none() && poll(&[(self.stream.fd(), libc::POLLIN)], 0)? == [true] {
            self.peeked = Some(self.read()?);
        }
        Ok(self.peeked)
    }
}

enum Loop {}

impl BlockingEventLoop for Loop {
    type Target = Debuggee;
    type Connection = Link;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        target: &mut Debuggee,
        link: &mut Link,
    ) -> Result<Event<Self::StopReason>, WaitForStopReasonError<Unreachable, io::Error>> {
        loop {
            if let Some(reason) = target.stop_reason() {
                return Ok(Event::TargetStopped(reason));
            }
            if link
                .wait(target.control().debug_event().as_raw_fd())
                .map_err(WaitForStopReasonError::Connection)?
            {
                return link.read().map(Event::IncomingData).map_err(WaitForStopReasonError::Connection);
            }
        }
    }

    fn on_interrupt(target: &mut Debuggee) -> Result<Option<Self::StopReason>, Unreachable> {
        target.control().pause();
        Ok(Some(MultiThreadStopReason::SignalWithThread { tid: target::tid(0), signal: Signal::SIGINT }))
    }
}

/// The server; dropping it ends its thread.
pub(super) struct GdbServer {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl GdbServer {
    /// Listens for debuggers of the machine that `debuggee` describes.
    pub(super) fn start(
        config: &GdbConfig,
        control: Arc<Control>,
        memory: crate::memory::GuestMemory,
        vcpus: u32,
    ) -> Result<Self, GdbError> {
        let listener = Listener::open(config)?;
        let fail = |source| GdbError::Listen { address: "this host".into(), source };
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(fail)?);
        let stopped = stop.clone();
        let run = move || {
            loop {
                let wanted = [listener.fd(), stopped.as_raw_fd()].map(|fd| (fd, libc::POLLIN));
                match poll(&wanted, -1) {
                    Ok([_, true]) | Err(_) => return,
                    Ok([false, _]) => continue,
                    Ok(_) => {}
                }
                let Ok(stream) = listener.accept() else { continue };
                let link = Link { stream, peeked: None, stop: stopped.clone() };
                control.pause();
                let mut debuggee = Debuggee::new(control.clone(), memory.clone(), vcpus);
                let ended = GdbStub::new(link).run_blocking::<Loop>(&mut debuggee);
                tracing::debug!(reason = ?ended.map_err(|e| e.to_string()), "The debugger is gone");
                debuggee.detach();
            }
        };
        let thread =
            std::thread::Builder::new().name("gdb".into()).stack_size(STACK_SIZE).spawn(run).map_err(fail)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for GdbServer {
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
