//! Messages between hosts: UDP datagrams, unicast and multicast, on any number of links, authenticated.
//!
//! A datagram is a 4-byte magic number, a 32-byte HMAC-SHA256 over the rest, the sender's number (2 bytes,
//! little-endian) and a JSON message. Replays are recognised by the sequence numbers inside heartbeats and
//! reports; commands carry the coordinator's token and the VM's epoch.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::node::Message;
use crate::types::HostId;

const MAGIC: [u8; 4] = *b"NCL1";
const HEAD: usize = 4 + 32 + 2;
/// Larger messages are refused; UDP over IPv4 carries 65,507 bytes.
const LARGEST: usize = 60_000;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The operating system refused.
    #[error("Cluster link failed; check its address")]
    Io(#[source] io::Error),
    /// The message is too large for a datagram.
    #[error("Message of {0} bytes is too large for a datagram; run fewer VMs a host")]
    TooLarge(usize),
}

/// One host's sockets, one a link.
#[derive(Debug)]
pub struct Links {
    host: HostId,
    key: Vec<u8>,
    sockets: Vec<UdpSocket>,
    /// One more socket for each multicast group, which receives what is sent to it.
    listeners: Vec<UdpSocket>,
    /// Each peer's address on each link.
    peers: BTreeMap<HostId, Vec<SocketAddr>>,
    /// The multicast group of each link, if it has one.
    groups: Vec<Option<SocketAddr>>,
}

impl Links {
    /// Opens one socket a link. `peers` gives each peer's address on each link, in the same order.
    pub fn open(
        host: HostId,
        key: &[u8],
        locals: &[SocketAddr],
        peers: BTreeMap<HostId, Vec<SocketAddr>>,
    ) -> Result<Self, NetError> {
        let mut sockets = Vec::new();
        for local in locals {
            let socket = UdpSocket::bind(local).map_err(NetError::Io)?;
            socket.set_read_timeout(Some(Duration::from_millis(200))).map_err(NetError::Io)?;
            sockets.push(socket);
        }
        let groups = vec![None; sockets.len()];
        Ok(Links { host, key: key.to_vec(), sockets, listeners: Vec::new(), peers, groups })
    }

    /// Joins a multicast group on a link: broadcasts go to the group too.
    pub fn join(&mut self, link: usize, group: SocketAddr) -> Result<(), NetError> {
        // A socket bound to a unicast address gets nothing that is sent to a group.
        let listener = group_socket(group).map_err(NetError::Io)?;
        let socket = &self.sockets[link];
        match group.ip() {
            IpAddr::V4(ip) => {
                let local = match socket.local_addr().map_err(NetError::Io)?.ip() {
                    IpAddr::V4(local) => local,
                    IpAddr::V6(_) => std::net::Ipv4Addr::UNSPECIFIED,
                };
                listener.join_multicast_v4(&ip, &local).map_err(NetError::Io)?;
            }
            IpAddr::V6(ip) => listener.join_multicast_v6(&ip, 0).map_err(NetError::Io)?,
        }
        listener.set_read_timeout(Some(Duration::from_millis(200))).map_err(NetError::Io)?;
        self.listeners.push(listener);
        self.groups[link] = Some(group);
        Ok(())
    }

    /// How many sockets there are to [`Links::receive`] from: one a link and one a group.
    pub fn count(&self) -> usize {
        self.sockets.len() + self.listeners.len()
    }

    fn mac(&self) -> Hmac<Sha256> {
        // HMAC takes keys of any length.
        <Hmac<Sha256> as Mac>::new_from_slice(&self.key).unwrap_or_else(|_| Hmac::new(&Default::default()))
    }

    fn seal(&self, message: &Message) -> Result<Vec<u8>, NetError> {
        let body = serde_json::to_vec(message).map_err(|e| NetError::Io(e.into()))?;
        if body.len() > LARGEST {
            return Err(NetError::TooLarge(body.len()));
        }
        let mut packet = Vec::with_capacity(HEAD + body.len());
        packet.extend_from_slice(&MAGIC);
        packet.extend_from_slice(&[0; 32]);
        packet.extend_from_slice(&self.host.0.to_le_bytes());
        packet.extend_from_slice(&body);
        let mut mac = self.mac();
        mac.update(&packet[36..]);
        packet[4..36].copy_from_slice(&mac.finalize().into_bytes());
        Ok(packet)
    }

    fn unseal(&self, packet: &[u8]) -> Option<(HostId, Message)> {
        if packet.len() < HEAD || packet[..4] != MAGIC {
            return None;
        }
        let mut mac = self.mac();
        mac.update(&packet[36..]);
        mac.verify_slice(&packet[4..36]).ok()?;
        let from = HostId(u16::from_le_bytes([packet[36], packet[37]]));
        let message = serde_json::from_slice(&packet[HEAD..]).ok()?;
        // A heartbeat or a report speaks for its sender only.
        let honest = match &message {
            Message::Heartbeat(b) => b.from.host == from,
            Message::Report(r) => r.from.host == from,
            _ => self.peers.contains_key(&from),
        };
        honest.then_some((from, message))
    }

    /// Sends to one host on every link; one link that works is enough.
    pub fn send(&self, to: HostId, message: &Message) -> Result<(), NetError> {
        let packet = self.seal(message)?;
        let mut last = Ok(());
        let mut sent = false;
        for (socket, address) in self.sockets.iter().zip(self.peers.get(&to).into_iter().flatten()) {
            match socket.send_to(&packet, address) {
                Ok(_) => sent = true,
                Err(e) => last = Err(NetError::Io(e)),
            }
        }
        if sent { Ok(()) } else { last }
    }

    /// Sends to every peer on every link, by unicast and to the links' groups.
    pub fn broadcast(&self, message: &Message) -> Result<(), NetError> {
        let packet = self.seal(message)?;
        for (link, socket) in self.sockets.iter().enumerate() {
            let unicast = self.peers.values().filter_map(|a| a.get(link));
            for address in unicast.chain(self.groups[link].iter()) {
                // A link that is down shows as missing heartbeats.
                let _ = socket.send_to(&packet, address);
            }
        }
        Ok(())
    }

    /// Waits up to 200 ms for a valid message on a socket; anything else is dropped, and what a group brought
    /// back of our own.
    pub fn receive(&self, socket: usize) -> Result<Option<(HostId, Message)>, NetError> {
        let Some(socket) = self.sockets.iter().chain(&self.listeners).nth(socket) else { return Ok(None) };
        let mut buf = vec![0; HEAD + LARGEST];
        match socket.recv_from(&mut buf) {
            Ok((n, _)) => Ok(self.unseal(&buf[..n]).filter(|(from, _)| *from != self.host)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(None),
            // An earlier packet was refused by its receiver's host.
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(None),
            Err(e) => Err(NetError::Io(e)),
        }
    }
}

/// A socket for a multicast group; other agents on this machine may have one too.
fn group_socket(group: SocketAddr) -> io::Result<UdpSocket> {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
    };
    use std::os::fd::AsRawFd;
    let family = if group.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(group))?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::membership::Heartbeat;
    use crate::types::{HostSet, Incarnation};

    fn free_port() -> SocketAddr {
        UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    fn beat(from: u16) -> Message {
        let from = Incarnation { host: HostId(from), generation: 1 };
        let heard = HostSet::default();
        let beat = Heartbeat { from, seq: 1, heard, witness: false, watchdog: true, leaving: false };
        Message::Heartbeat(Arc::new(beat))
    }

    #[test]
    fn messages_arrive_on_each_link_and_forged_ones_are_dropped() {
        let (a, b) = ([free_port(), free_port()], [free_port(), free_port()]);
        let open = |id, key: &[u8], own: &[SocketAddr], peer, at: &[SocketAddr]| {
            Links::open(HostId(id), key, own, [(HostId(peer), at.to_vec())].into()).unwrap()
        };
        let receiver = open(2, b"secret", &b, 1, &a);
        {
            let forger = open(1, b"guess", &a, 2, &b);
            forger.broadcast(&beat(1)).unwrap();
        }
        let sender = open(1, b"secret", &a, 2, &b);
        // Host 1 cannot speak for host 3.
        sender.broadcast(&beat(3)).unwrap();
        sender.broadcast(&beat(1)).unwrap();
        for link in 0..receiver.count() {
            let mut got = Vec::new();
            for _ in 0..3 {
                got.extend(receiver.receive(link).unwrap());
            }
            assert_eq!(got, [(HostId(1), beat(1))]);
        }
        let packet = sender.seal(&beat(1)).unwrap();
        for at in [0, 5, 36, 40, packet.len() - 1] {
            let mut bad = packet.clone();
            bad[at] ^= 1;
            assert_eq!(receiver.unseal(&bad), None, "byte {at}");
        }
        assert_eq!(receiver.unseal(&packet[..20]), None);
    }

    #[test]
    fn a_group_carries_heartbeats_to_hosts_that_are_no_known_peers() {
        let (a, b) = (free_port(), free_port());
        let group: SocketAddr = format!("239.255.77.1:{}", free_port().port()).parse().unwrap();
        let open = |id, at| {
            let mut links = Links::open(HostId(id), b"secret", &[at], BTreeMap::new()).unwrap();
            links.join(0, group).unwrap();
            links
        };
        let (sender, receiver) = (open(1, a), open(2, b));
        sender.broadcast(&beat(1)).unwrap();
        assert_eq!(receiver.count(), 2);
        assert_eq!(receiver.receive(1).unwrap(), Some((HostId(1), beat(1))));
        assert_eq!(sender.receive(1).unwrap(), None, "its own message");
    }
}
