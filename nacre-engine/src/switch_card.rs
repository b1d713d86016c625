//! A machine's network card on a switch in the same process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use vmm_core::devices::virtio::iov::GuestVectors;
use vmm_core::devices::virtio::net::{
    HEADER_LEN, Header, NetBackend, NetOptions, NetPort, Sent, net_features,
};
use vmm_core::devices::virtio::{Net, VirtioDevice};
use vswitch::{Endpoint, Offload, OffloadCaps, PortConfig, Switch};
use zerocopy::IntoBytes;

/// Frames that wait for a machine, and for the switch, at most.
const LINK_CAPACITY: usize = 512;

/// Why a machine cannot get a card on a switch.
#[derive(Debug, thiserror::Error)]
pub enum CardError {
    /// The host refused an event descriptor.
    #[error("Cannot get event descriptors from the host; raise its limits")]
    Host(#[from] io::Error),
    /// The switch refused the port.
    #[error(transparent)]
    Switch(#[from] vswitch::Error),
}

/// Adds a port to a switch and returns the network card at its other end, for `VmBuilder::device`. Checksums and
/// segmentation may be left to the switch. Removing the port takes the card's link down.
///
/// # Errors
/// Fails when the switch refuses the port (its name is taken, its configuration is impossible) or the host gives no
/// event descriptor; the switch is unchanged then.
pub fn switch_card(
    switch: &Switch,
    port: &str,
    config: PortConfig,
    options: &NetOptions,
) -> Result<Arc<dyn VirtioDevice>, CardError> {
    let offloads = OffloadCaps::CSUM | OffloadCaps::TSO4 | OffloadCaps::TSO6;
    let (link, endpoint) = Endpoint::pair(LINK_CAPACITY, offloads)?;
    let card = Net::new(Arc::new(SwitchBackend(Arc::new(endpoint))), options)?;
    switch.add_port(port, link, config)?;
    Ok(card)
}

/// The back-end of a network device: the embedder's end of a link to a switch. The guest may leave checksums and
/// segmentation to the switch; towards the guest the switch completes them, because it cannot know at this end what the
/// guest's driver accepts.
struct SwitchBackend(Arc<Endpoint>);

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
