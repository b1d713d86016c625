//! A machine's network card on a switch in the same process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use vmm_core::devices::virtio::iov::GuestVectors;
use vmm_core::devices::virtio::net::{HEADER_LEN, Header, NetBackend, NetPort, Sent, net_features};
use vswitch::{Endpoint, Offload};
use zerocopy::IntoBytes;

/// The back-end of a network device: the embedder's end of a link to a switch. The guest may leave checksums and
/// segmentation to the switch; towards the guest the switch completes them, because it cannot know at this end what the
/// guest's driver accepts.
pub(super) struct SwitchBackend(Arc<Endpoint>);

impl SwitchBackend {
    pub(super) fn new(endpoint: Endpoint) -> Self {
        Self(Arc::new(endpoint))
    }
}

impl NetBackend for SwitchBackend {
    fn offloads(&self) -> u64 {
        net_features::CSUM | net_features::HOST_TSO4 | net_features::HOST_TSO6
    }

    fn open(&self, _index: u16) -> io::Result<Box<dyn NetPort>> {
        Ok(Box::new(SwitchNetPort { endpoint: self.0.clone(), buffer: Vec::new() }))
    }
}

struct SwitchNetPort {
    endpoint: Arc<Endpoint>,
    buffer: Vec<u8>,
}

impl NetPort for SwitchNetPort {
    fn descriptor(&self) -> Option<RawFd> {
        Some(self.endpoint.as_fd().as_raw_fd())
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            if let Some((bytes, offload)) = self.endpoint.recv_burst(1).pop() {
                let len = HEADER_LEN + bytes.len();
                let Some(room) = frame.get_mut(..len) else { continue };
                room[..HEADER_LEN].copy_from_slice(&offload.encode());
                room[HEADER_LEN..].copy_from_slice(&bytes);
                return Ok(Some(len));
            }
            if !self.endpoint.arm() {
                return Ok(None);
            }
        }
    }

    fn send(&mut self, header: &Header, frame: &mut GuestVectors<'_>) -> io::Result<Sent> {
        self.buffer.clear();
        self.buffer.extend(frame.gather().to_vec());
        let bytes = header.as_bytes();
        let Some(head) = bytes.first_chunk() else { return Ok(Sent::Dropped) };
        let sent = self.endpoint.send_burst([(self.buffer.as_slice(), Offload::parse(head))]);
        // A full link drops, as a cable with a busy receiver does; a guest must not stall on its peers.
        Ok(if sent == 1 { Sent::Yes } else { Sent::Dropped })
    }

    fn reconnect(&mut self) -> io::Result<()> {
        Ok(())
    }
}
