//! The front-end's half of the vhost-user protocol: messages over a Unix socket.

use std::io::Read;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::VhostUserError;
use crate::memory::GuestMemory;

/// Feature bit that says that protocol features can be negotiated.
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol features that this front-end uses.
pub(super) mod protocol {
    /// Several pairs of queues.
    pub(in super::super) const MQ: u64 = 1;
    /// Every request can be acknowledged.
    pub(in super::super) const REPLY_ACK: u64 = 1 << 3;
    /// The back-end has the configuration space.
    pub(in super::super) const CONFIG: u64 = 1 << 9;
}

/// How long the back-end may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER: usize = 12;
/// What one message can carry.
const MAX_REGIONS: usize = 8;
/// The longest payload accepted.
const MAX_PAYLOAD: usize = 512;
/// Offset, length and flags in front of configuration bytes.
const CONFIG_HEADER: usize = 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    GetConfig = 24,
    SetConfig = 25,
}

/// A connection to a back-end, after the negotiation of protocol features.
pub(super) struct Connection {
    stream: UnixStream,
    pub(super) features: u64,
    protocol: u64,
    /// Queues that the back-end has, as far as it says.
    pub(super) queues: u64,
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

impl Connection {
    /// Connects and learns what the back-end can do.
    pub(super) fn open(path: &Path, wanted: u64) -> Result<Self, VhostUserError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| VhostUserError::Connect { path: path.to_owned(), source })?;
        Self::negotiate(stream, wanted)
    }

    /// Learns what the back-end at the other end of `stream` can do.
    pub(super) fn negotiate(stream: UnixStream, wanted: u64) -> Result<Self, VhostUserError> {
        let configure = || {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))
        };
        configure().map_err(VhostUserError::Io)?;
        let mut connection = Self { stream, features: 0, protocol: 0, queues: u64::MAX };
        connection.features = connection.get_u64(Request::GetFeatures)?;
        if connection.features & F_PROTOCOL_FEATURES != 0 {
            let protocol = connection.get_u64(Request::GetProtocolFeatures)? & wanted;
            connection.send(Request::SetProtocolFeatures, &protocol.to_le_bytes(), &[])?;
            connection.protocol = protocol;
            if protocol & protocol::MQ != 0 {
                connection.queues = connection.get_u64(Request::GetQueueNum)?;
            }
        }
        connection.send(Request::SetOwner, &[], &[])?;
        Ok(connection)
    }

    pub(super) fn has(&self, protocol: u64) -> bool {
        self.protocol & protocol == protocol
    }

    /// The socket: readable when the back-end goes away (it never speaks first here).
    pub(super) fn descriptor(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// After a failure nobody knows what the next bytes mean: ends the connection, which whoever watches it notices.
    fn broken(&self, error: VhostUserError) -> VhostUserError {
        // It may have ended by itself.
        let _ = self.stream.shutdown(Shutdown::Both);
        error
    }

    fn write(
        &self,
        request: Request,
        flags: u32,
        payload: &[u8],
        fds: &[RawFd],
    ) -> Result<(), VhostUserError> {
        let mut message = words(&[request as u32, VERSION | flags, payload.len() as u32]);
        message.extend(payload);
        let sent = self.stream.send_with_fds(&[&message[..]], fds);
        match sent.map_err(|e| self.broken(VhostUserError::Io(e.into())))? {
            n if n == message.len() => Ok(()),
            _ => Err(self.broken(VhostUserError::Protocol("took only a part of a message"))),
        }
    }

    /// Reads the answer to `request`.
    fn answer(&mut self, request: Request) -> Result<Vec<u8>, VhostUserError> {
        self.read_answer(request).map_err(|error| self.broken(error))
    }

    fn read_answer(&mut self, request: Request) -> Result<Vec<u8>, VhostUserError> {
        let mut header = [0; HEADER];
        self.stream.read_exact(&mut header).map_err(VhostUserError::Io)?;
        let word = |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
        if word(0) != request as u32 || word(4) & (REPLY | 3) != REPLY | VERSION {
            return Err(VhostUserError::Protocol("answered another request"));
        }
        let size = word(8) as usize;
        if size > MAX_PAYLOAD {
            return Err(VhostUserError::Protocol("sent an answer that is too long"));
        }
        let mut payload = vec![0; size];
        self.stream.read_exact(&mut payload).map_err(VhostUserError::Io)?;
        Ok(payload)
    }

    fn answer_u64(&mut self, request: Request) -> Result<u64, VhostUserError> {
        let payload = self.answer(request)?;
        let wrong = |_| self.broken(VhostUserError::Protocol("sent an answer of another size"));
        Ok(u64::from_le_bytes(payload.try_into().map_err(wrong)?))
    }

    fn get_u64(&mut self, request: Request) -> Result<u64, VhostUserError> {
        self.write(request, 0, &[], &[])?;
        self.answer_u64(request)
    }

    /// Sends a request that has no answer of its own; waits for the acknowledgement where there are such.
    pub(super) fn send(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[RawFd],
    ) -> Result<(), VhostUserError> {
        if !self.has(protocol::REPLY_ACK) {
            return self.write(request, 0, payload, fds);
        }
        self.write(request, NEED_REPLY, payload, fds)?;
        match self.answer_u64(request)? {
            0 => Ok(()),
            _ => Err(VhostUserError::Refused(request as u32)),
        }
    }

    /// Shares guest RAM, and what else the rings are in.
    pub(super) fn set_memory(
        &mut self,
        memory: &GuestMemory,
        rings: Option<&GuestMemory>,
    ) -> Result<(), VhostUserError> {
        let rings = rings.into_iter().flat_map(GuestMemory::regions);
        let regions: Vec<_> = memory.regions().iter().chain(rings).collect();
        if regions.len() > MAX_REGIONS {
            return Err(VhostUserError::TooManyRegions(regions.len()));
        }
        let mut payload = words(&[regions.len() as u32, 0]);
        for region in &regions {
            for value in [region.guest_address(), region.size(), region.host_ptr().addr() as u64, 0] {
                payload.extend(value.to_le_bytes());
            }
        }
        let fds: Vec<_> = regions.iter().map(|r| r.file().as_raw_fd()).collect();
        self.send(Request::SetMemTable, &payload, &fds)
    }

    /// Sends a request about queue `index` with one number.
    pub(super) fn vring(&mut self, request: Request, index: usize, value: u32) -> Result<(), VhostUserError> {
        self.send(request, &words(&[index as u32, value]), &[])
    }

    /// Sends a queue's rings, given by their addresses in this process.
    pub(super) fn vring_address(
        &mut self,
        index: usize,
        [descriptors, available, used]: [u64; 3],
    ) -> Result<(), VhostUserError> {
        let mut payload = words(&[index as u32, 0]);
        for value in [descriptors, used, available, 0] {
            payload.extend(value.to_le_bytes());
        }
        self.send(Request::SetVringAddr, &payload, &[])
    }

    /// Sends a queue's kick or call descriptor.
    pub(super) fn vring_fd(
        &mut self,
        request: Request,
        index: usize,
        fd: RawFd,
    ) -> Result<(), VhostUserError> {
        self.send(request, &(index as u64).to_le_bytes(), &[fd])
    }

    /// Stops a queue; returns the next index in its available ring.
    pub(super) fn vring_base(&mut self, index: usize) -> Result<u16, VhostUserError> {
        self.write(Request::GetVringBase, 0, &words(&[index as u32, 0]), &[])?;
        // Index and base, 32 bits each.
        Ok((self.answer_u64(Request::GetVringBase)? >> 32) as u16)
    }

    /// Reads `len` bytes from the start of the configuration space.
    pub(super) fn config(&mut self, len: usize) -> Result<Vec<u8>, VhostUserError> {
        let mut payload = words(&[0, len as u32, 0]);
        payload.resize(CONFIG_HEADER + len, 0);
        self.write(Request::GetConfig, 0, &payload, &[])?;
        let mut answer = self.answer(Request::GetConfig)?;
        if answer.len() != CONFIG_HEADER + len {
            return Err(VhostUserError::Protocol("sent a configuration of another size"));
        }
        Ok(answer.split_off(CONFIG_HEADER))
    }

    /// Writes a part of the configuration space.
    pub(super) fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<(), VhostUserError> {
        let mut payload = words(&[offset, data.len() as u32, 0]);
        payload.extend(data);
        self.send(Request::SetConfig, &payload, &[])
    }
}
