//! One connection with a front-end: requests in, answers out, queues set up and torn down.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Device;
use super::memory::{DirtyLog, GuestMemory, REGIONS_MAX};
use super::message::{
    Features, HEADER, Header, ProtocolFeatures, Request, VringAddr, region_at, u32_at, u64_at,
};
use super::ring::RingFeatures;
use crate::sys::{EventFd, recv_with_fds};

/// Most regions in one memory table message.
const TABLE_MAX: usize = 8;
/// Most descriptors kept from one message.
const FDS_MAX: usize = TABLE_MAX;
/// Set in a descriptor message that carries none.
const NO_FD: u64 = 1 << 8;
/// How long a burst under way may take before a queue is stopped all the same.
const QUIET: Duration = Duration::from_secs(1);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The front-end closed the connection.
    #[error("The front-end closed the connection")]
    Closed,
    /// The socket failed.
    #[error("Cannot talk to the front-end; the connection is given up")]
    Io(#[from] io::Error),
    /// A message breaks the protocol.
    #[error("The front-end sent a malformed message; the connection is given up")]
    Protocol,
}

/// Answer to a request.
enum Answer {
    /// None is defined; one is made if the front-end asked.
    Done(bool),
    /// This payload.
    Payload(Vec<u8>),
}

impl From<Option<()>> for Answer {
    fn from(o: Option<()>) -> Self {
        Self::Done(o.is_some())
    }
}

/// See the module's documentation.
pub struct Session<'a> {
    device: &'a Device,
    stream: &'a UnixStream,
    features: Features,
    protocol: ProtocolFeatures,
    memory: Arc<GuestMemory>,
    log: Option<Arc<DirtyLog>>,
    status: u8,
}

impl<'a> Session<'a> {
    /// A session over a connected, blocking socket.
    pub fn new(device: &'a Device, stream: &'a UnixStream) -> Self {
        Self {
            device,
            stream,
            features: Features::empty(),
            protocol: ProtocolFeatures::empty(),
            memory: Arc::default(),
            log: None,
            status: 0,
        }
    }

    /// Serves requests until the connection ends; the queues are then stopped.
    pub fn run(&mut self) -> SessionError {
        let e = loop {
            if let Err(e) = self.serve_one() {
                break e;
            }
        };
        self.end();
        e
    }

    /// Stops the queues: the connection has ended.
    pub fn end(&mut self) {
        self.device.link.store(false, Ordering::Release);
        self.stop_all(true);
    }

    /// Waits for one request and serves it.
    pub fn serve_one(&mut self) -> Result<(), SessionError> {
        let mut fds = Vec::new();
        let mut raw = [0; HEADER];
        let n = recv_with_fds(self.stream.as_raw_fd(), &mut raw, &mut fds)?;
        if n == 0 {
            return Err(SessionError::Closed);
        }
        self.stream.read_exact(&mut raw[n..])?;
        let header = Header::parse(&raw).ok_or(SessionError::Protocol)?;
        let mut payload = vec![0; header.size];
        self.stream.read_exact(&mut payload)?;
        fds.truncate(FDS_MAX);
        let answer = match header.request {
            Some(r) => self.handle(r, &payload, fds),
            None => {
                tracing::debug!(code = header.code, "unknown vhost-user request");
                Answer::Done(false)
            }
        };
        let ack = self.protocol.contains(ProtocolFeatures::REPLY_ACK) && header.need_reply;
        match answer {
            Answer::Payload(p) => self.stream.write_all(&header.reply(&p))?,
            Answer::Done(ok) if ack => self.stream.write_all(&header.reply(&u64::from(!ok).to_le_bytes()))?,
            Answer::Done(true) => {}
            // Without acknowledgement the front-end cannot know; going on would be worse than parting.
            Answer::Done(false) if header.request.is_some() => return Err(SessionError::Protocol),
            Answer::Done(false) => {}
        }
        Ok(())
    }

    fn handle(&mut self, request: Request, p: &[u8], mut fds: Vec<OwnedFd>) -> Answer {
        let number = |n: u64| Answer::Payload(n.to_le_bytes().to_vec());
        match request {
            Request::GetFeatures => number(self.device.features().bits()),
            Request::SetFeatures => self.set_features(p).into(),
            Request::SetOwner => Answer::Done(true),
            Request::ResetOwner | Request::ResetDevice => {
                self.stop_all(false);
                Answer::Done(true)
            }
            Request::GetProtocolFeatures => number(self.device.protocol_features().bits()),
            Request::SetProtocolFeatures => u64_at(p, 0)
                .map(|v| {
                    self.protocol = ProtocolFeatures::from_bits_truncate(v) & self.device.protocol_features()
                })
                .into(),
            Request::GetQueueNum => number(self.device.pairs as u64),
            Request::SetMemTable => self.set_mem_table(p, &fds).into(),
            Request::GetMaxMemSlots => number(REGIONS_MAX as u64),
            Request::AddMemReg => self.add_region(p, &fds).into(),
            Request::RemMemReg => self.remove_region(p).into(),
            Request::SetLogBase => self.set_log(p, &fds),
            Request::SetLogFd | Request::SetVringErr => Answer::Done(true),
            Request::SetVringNum => self.vring(p, |v, n| v.set_size(n)).into(),
            Request::SetVringBase => self.vring(p, |v, n| v.set_base(n)).into(),
            Request::SetVringAddr => {
                VringAddr::parse(p).and_then(|(i, a)| self.device.vrings.get(i)?.lock().set_addr(a)).into()
            }
            Request::GetVringBase => match self.get_base(p) {
                Some(a) => Answer::Payload(a),
                None => Answer::Done(false),
            },
            Request::SetVringKick => self.set_kick(p, fds.pop()).into(),
            Request::SetVringCall => self.set_call(p, fds.pop()).into(),
            Request::SetVringEnable => self.set_enable(p).into(),
            Request::SendRarp => self.send_rarp(p).into(),
            Request::NetSetMtu => {
                u64_at(p, 0).map(|m| self.device.mtu.store(m.min(65_535) as u32, Ordering::Relaxed)).into()
            }
            Request::SetStatus => u64_at(p, 0)
                .map(|s| {
                    self.status = s as u8;
                    if s == 0 {
                        self.stop_all(false);
                    }
                })
                .into(),
            Request::GetStatus => number(self.status.into()),
        }
    }

    fn set_features(&mut self, p: &[u8]) -> Option<()> {
        let bits = u64_at(p, 0)?;
        let f = Features::from_bits(bits).filter(|f| self.device.features().contains(*f))?;
        self.features = f;
        let modern = f.intersects(Features::VERSION_1 | Features::MRG_RXBUF);
        let ring = RingFeatures {
            packed: f.contains(Features::RING_PACKED),
            event_idx: f.contains(Features::EVENT_IDX),
            mergeable: f.contains(Features::MRG_RXBUF),
            header: if modern { 12 } else { 10 },
            log: f.contains(Features::LOG_ALL),
        };
        for v in &self.device.vrings {
            let mut v = v.lock();
            v.set_features(ring);
            // Without protocol features a queue is on as soon as it is started.
            if !f.contains(Features::PROTOCOL_FEATURES) {
                v.set_enabled(true);
            }
        }
        self.device.acked.store(f.bits(), Ordering::Release);
        Some(())
    }

    fn set_mem_table(&mut self, p: &[u8], fds: &[OwnedFd]) -> Option<()> {
        let n = u32_at(p, 0)? as usize;
        if n > TABLE_MAX || fds.len() != n {
            return None;
        }
        let mut memory = GuestMemory::default();
        for (i, fd) in fds.iter().enumerate() {
            memory = self.mapped(memory.with_region(region_at(p, 8 + 32 * i)?, fd))?;
        }
        self.use_memory(memory)
    }

    fn add_region(&mut self, p: &[u8], fds: &[OwnedFd]) -> Option<()> {
        let memory = self.mapped(self.memory.with_region(region_at(p, 8)?, fds.first()?))?;
        self.use_memory(memory)
    }

    fn remove_region(&mut self, p: &[u8]) -> Option<()> {
        let memory = self.memory.without_region(region_at(p, 8)?)?;
        self.use_memory(memory)
    }

    fn mapped(&self, r: io::Result<GuestMemory>) -> Option<GuestMemory> {
        r.inspect_err(|e| tracing::warn!(error = %e, "cannot map guest memory")).ok()
    }

    fn use_memory(&mut self, memory: GuestMemory) -> Option<()> {
        self.memory = Arc::new(memory.with_log(self.log.clone()));
        for v in &self.device.vrings {
            // A queue whose parts are gone stops; that is the front-end's choice and no error.
            let _ = v.lock().set_memory(self.memory.clone());
        }
        self.update_link();
        Some(())
    }

    fn set_log(&mut self, p: &[u8], fds: &[OwnedFd]) -> Answer {
        let (Some(size), Some(offset), Some(fd)) = (u64_at(p, 0), u64_at(p, 8), fds.first()) else {
            return Answer::Done(false);
        };
        match DirtyLog::new(fd, size, offset) {
            Ok(log) => {
                self.log = Some(Arc::new(log));
                let memory = GuestMemory::clone(&self.memory);
                self.use_memory(memory);
                Answer::Payload(Vec::new())
            }
            Err(_) => Answer::Done(false),
        }
    }

    fn vring(&self, p: &[u8], f: impl FnOnce(&mut super::vring::Vring, u32) -> Option<()>) -> Option<()> {
        let v = self.device.vrings.get(u32_at(p, 0)? as usize)?;
        f(&mut v.lock(), u32_at(p, 4)?)
    }

    fn get_base(&mut self, p: &[u8]) -> Option<Vec<u8>> {
        let i = u32_at(p, 0)?;
        self.device.vrings.get(i as usize)?;
        let base = self.stop(i as usize, true);
        self.device.set_kick(i as usize, None);
        self.update_link();
        Some([i.to_le_bytes(), base.to_le_bytes()].concat())
    }

    /// Stops a queue between two bursts, see [`super::vring::Vring::stop`].
    fn stop(&self, i: usize, told: bool) -> u32 {
        let end = Instant::now() + QUIET;
        loop {
            let mut v = self.device.vring(i);
            if !v.is_busy() || Instant::now() > end {
                return v.stop(told);
            }
            drop(v);
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    fn stop_all(&mut self, forget: bool) {
        for i in 0..self.device.vrings.len() {
            // A front-end that resets a queue sets it up anew; one that is gone may come back to another switch.
            self.stop(i, !forget);
            self.device.set_kick(i, None);
            let mut v = self.device.vrings[i].lock();
            if forget {
                v.reset();
            } else {
                v.set_enabled(!self.features.contains(Features::PROTOCOL_FEATURES));
            }
        }
        self.update_link();
    }

    /// Queue number and descriptor of a descriptor message.
    fn queue_fd(&self, p: &[u8], fd: Option<OwnedFd>) -> Option<(usize, Option<EventFd>)> {
        let v = u64_at(p, 0)?;
        let i = (v & 0xff) as usize;
        self.device.vrings.get(i)?;
        match (v & NO_FD != 0, fd) {
            (true, _) => Some((i, None)),
            (false, Some(fd)) => Some((i, Some(EventFd::adopt(fd).ok()?))),
            (false, None) => None,
        }
    }

    fn set_kick(&mut self, p: &[u8], fd: Option<OwnedFd>) -> Option<()> {
        let (i, kick) = self.queue_fd(p, fd)?;
        self.device.set_kick(i, kick);
        let started = self.device.vrings[i].lock().start();
        if let Err(e) = &started {
            tracing::warn!(queue = i, error = %e, "cannot start a virtqueue");
        }
        self.activate(i);
        started.ok()
    }

    fn set_call(&mut self, p: &[u8], fd: Option<OwnedFd>) -> Option<()> {
        let (i, call) = self.queue_fd(p, fd)?;
        self.device.vrings[i].lock().set_call(call);
        Some(())
    }

    fn set_enable(&mut self, p: &[u8]) -> Option<()> {
        let (i, on) = (u32_at(p, 0)? as usize, u32_at(p, 4)? != 0);
        self.device.vrings.get(i)?.lock().set_enabled(on);
        self.activate(i);
        Some(())
    }

    /// Makes the worker look at a queue that may have become active.
    fn activate(&self, i: usize) {
        self.update_link();
        if self.device.vrings[i].lock().is_active() {
            self.device.nudge(i);
        }
    }

    fn update_link(&self) {
        let up = self.device.vrings.iter().any(|v| v.lock().is_active());
        self.device.link.store(up, Ordering::Release);
    }

    /// Broadcasts a RARP request for the guest, so that switches learn where it lives now.
    fn send_rarp(&mut self, p: &[u8]) -> Option<()> {
        let mac: [u8; 6] = *p.first_chunk()?;
        let mut f = vec![0xff; 6];
        f.extend_from_slice(&mac);
        f.extend_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        f.extend_from_slice(&mac);
        f.extend_from_slice(&[0; 4]);
        f.extend_from_slice(&mac);
        f.resize(60, 0);
        self.device.inject(f);
        Some(())
    }
}
