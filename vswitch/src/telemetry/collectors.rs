//! The sockets towards collectors.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use crate::error::{Error, Result};

/// Largest datagram: it fits an Ethernet frame whatever tunnels it crosses.
pub(super) const DATAGRAM_MAX: usize = 1400;

/// One connected UDP socket a collector.
#[derive(Debug)]
pub(super) struct Collectors(Vec<UdpSocket>);

impl Collectors {
    pub fn open(addresses: &[SocketAddr]) -> Result<Self> {
        let open = |to: &SocketAddr| {
            let any =
                if to.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
            let s = UdpSocket::bind((any, 0))?;
            s.connect(to)?;
            s.set_nonblocking(true)?;
            Ok(s)
        };
        let sockets =
            addresses.iter().map(|a| open(a).map_err(|e| Error::io(format!("reach the collector {a}"), e)));
        Ok(Self(sockets.collect::<Result<_>>()?))
    }

    /// The address from which the first collector is reached.
    pub fn local_address(&self) -> IpAddr {
        let local = self.0.first().and_then(|s| s.local_addr().ok());
        local.map_or(Ipv4Addr::UNSPECIFIED.into(), |a| a.ip())
    }

    /// Sends a datagram to all. One that cannot be sent is lost, as datagrams are.
    pub fn send(&self, datagram: &[u8]) {
        for s in &self.0 {
            if let Err(error) = s.send(datagram) {
                tracing::debug!(%error, "cannot reach a collector");
            }
        }
    }
}
