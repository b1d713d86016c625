//! Ports on the host's network devices: tap (multi-queue, with offloads) and AF_PACKET (an uplink on an existing
//! interface). Both exchange packets with a virtio-net header in front.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::{Batch, Port};
use crate::error::{Error, Result};
use crate::packet::offload::{OffloadCaps, VNET_HDR_LEN};
use crate::packet::vlan::VlanOp;
use crate::packet::{Burst, FRAME_MAX, FRAME_MIN, HEAD_MAX, Offload};
use crate::sys;

/// Most queues of a tap.
const QUEUES_MAX: usize = 64;

/// A port on a network device of the host.
#[derive(Debug)]
pub struct NetdevPort {
    kind: &'static str,
    queues: Vec<OwnedFd>,
    offloads: OffloadCaps,
    packet_socket: bool,
}

impl NetdevPort {
    /// Opens the tap interface `name`, making it if it does not exist (it then goes with the port), and brings it
    /// up.
    pub fn tap(name: &str, queues: usize) -> Result<Self> {
        if !(1..=QUEUES_MAX).contains(&queues) {
            return Err(Error::Invalid(format!("Queues must be within 1 to {QUEUES_MAX}")));
        }
        let fail = |e| Error::io(format!("open the tap interface {name}"), e);
        let fds = (0..queues).map(|_| sys::open_tap(name, queues > 1)).collect::<std::io::Result<Vec<_>>>();
        let port = Self {
            kind: "tap",
            queues: fds.map_err(fail)?,
            offloads: OffloadCaps::CSUM | OffloadCaps::TSO4 | OffloadCaps::TSO6 | OffloadCaps::ECN,
            packet_socket: false,
        };
        sys::bring_up(name).map_err(fail)?;
        Ok(port)
    }

    /// Attaches to the existing interface `name` in promiscuous mode.
    pub fn uplink(name: &str) -> Result<Self> {
        let fd =
            sys::open_packet_socket(name).map_err(|e| Error::io(format!("attach to interface {name}"), e))?;
        Ok(Self {
            kind: "uplink",
            queues: vec![fd],
            offloads: OffloadCaps::CSUM | OffloadCaps::TSO4 | OffloadCaps::TSO6 | OffloadCaps::ECN,
            packet_socket: true,
        })
    }

    /// Reads one packet into the burst; `false` when there is none.
    fn receive_one(&self, fd: RawFd, burst: &mut Burst) -> bool {
        let Some(p) = burst.push() else { return false };
        let mut header = [0; VNET_HDR_LEN];
        let mut tag = None;
        let result = p.fill_with(&mut header, FRAME_MAX - HEAD_MAX, |bufs| {
            if self.packet_socket {
                sys::recv_packet(fd, bufs).map(|(n, t)| {
                    tag = t;
                    n
                })
            } else {
                sys::read_vectored(fd, bufs)
            }
        });
        let n = match result {
            Ok(n) => n,
            Err(e) => {
                burst.pop();
                return e.kind() == ErrorKind::Interrupted;
            }
        };
        let offload = Offload::parse(&header);
        let p_len = n.saturating_sub(VNET_HDR_LEN);
        if p_len < FRAME_MIN || !offload.is_valid(p.head().len()) {
            burst.pop();
            burst.errors += 1;
            return true;
        }
        p.offload = offload.sanitized();
        if let Some((tpid, tci)) = tag {
            VlanOp::Push { tpid, tci }.apply(p);
        }
        true
    }
}

impl Port for NetdevPort {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn rx_queues(&self) -> usize {
        self.queues.len()
    }

    fn tx_queues(&self) -> usize {
        self.queues.len()
    }

    fn offloads(&self) -> OffloadCaps {
        self.offloads
    }

    fn receive(&self, queue: usize, burst: &mut Burst) {
        let Some(fd) = self.queues.get(queue).map(AsRawFd::as_raw_fd) else { return };
        while burst.room() > 0 && self.receive_one(fd, burst) {}
    }

    fn transmit(&self, queue: usize, batch: &Batch<'_>) -> usize {
        let fd = self.queues[queue % self.queues.len()].as_raw_fd();
        let mut sent = 0;
        for p in batch.iter() {
            let header = p.offload.encode();
            let header = &header[..VNET_HDR_LEN];
            let r = if self.packet_socket {
                sys::send_chunks(fd, header, &p.chunks())
            } else {
                sys::write_chunks(fd, header, &p.chunks())
            };
            match r {
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                // The device refused this packet (it is down, or the packet too long); others may pass.
                Err(_) => {}
                Ok(_) => {}
            }
            sent += 1;
        }
        sent
    }

    fn ready_fd(&self, queue: usize) -> Option<RawFd> {
        self.queues.get(queue).map(AsRawFd::as_raw_fd)
    }

    fn arm(&self, _queue: usize, _on: bool) -> bool {
        // The descriptor itself says when there is something to read.
        false
    }
}
