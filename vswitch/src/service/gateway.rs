//! A small DHCP server (RFC 2131) with a gateway address that answers ARP and ping, so that a closed network works
//! out of the box. It forwards nothing.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, RawFd};

use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::clock::{Clock, Nanos, SECOND};
use crate::error::{Error, Result};
use crate::packet::key::{BROADCAST_MAC, ETH_ARP, ETH_IPV4, ICMP, UDP, mac_bytes, mac_u64};
use crate::packet::{Burst, checksum};
use crate::port::{Batch, Port};
use crate::sys::EventFd;

/// Most answers that wait to be received by the switch.
const QUEUE: usize = 256;
/// How long an offered address stays reserved.
const OFFER: Nanos = 30 * SECOND;
/// How long a declined address stays unused.
const DECLINED: Nanos = 600 * SECOND;
/// Clients that the server remembers at most, whatever the size of the pool.
const CLIENTS_MAX: usize = 65_536;
const BOOTP_MIN: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];

/// Configuration of a [`GatewayPort`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GatewayConfig {
    /// Address of the server, which is also the clients' router.
    pub address: Ipv4Addr,
    /// Length of the network prefix.
    pub prefix: u8,
    /// First address given to clients.
    pub first: Ipv4Addr,
    /// Last address given to clients.
    pub last: Ipv4Addr,
    /// Name servers told to clients.
    #[serde(default)]
    pub dns: Vec<Ipv4Addr>,
    /// Whether clients are told to route through `address`.
    #[serde(default = "yes")]
    pub router: bool,
    /// Seconds that a lease lasts.
    #[serde(default = "hour")]
    pub lease_seconds: u32,
    /// MTU told to clients.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// MAC address of the server.
    #[serde(default = "default_mac")]
    pub mac: [u8; 6],
}

fn yes() -> bool {
    true
}

fn hour() -> u32 {
    3600
}

fn default_mac() -> [u8; 6] {
    [0x52, 0x54, 0x00, 0xff, 0xff, 0x01]
}

impl GatewayConfig {
    /// A network whose server has the first address; clients get the rest. `prefix` is between 8 and 30.
    pub fn network(network: Ipv4Addr, prefix: u8) -> Result<Self> {
        if !(8..=30).contains(&prefix) {
            return Err(Error::config("prefix", "use 8 to 30"));
        }
        let mask = u32::MAX << (32 - u32::from(prefix));
        let base = u32::from(network) & mask;
        let config = Self {
            address: Ipv4Addr::from(base + 1),
            prefix,
            first: Ipv4Addr::from(base + 2),
            last: Ipv4Addr::from((base | !mask) - 1),
            dns: Vec::new(),
            router: true,
            lease_seconds: hour(),
            mtu: None,
            mac: default_mac(),
        };
        config.check("")?;
        Ok(config)
    }

    fn mask(&self) -> u32 {
        u32::MAX << (32 - u32::from(self.prefix))
    }

    /// Refuses a configuration that makes no sense; `path` is put in front of the field's name.
    pub(crate) fn check(&self, path: &str) -> Result<()> {
        if !(8..=30).contains(&self.prefix) {
            return Err(Error::config(format!("{path}prefix"), "use 8 to 30"));
        }
        let inside = |a: Ipv4Addr| u32::from(a) & self.mask() == u32::from(self.address) & self.mask();
        for (name, a) in [("first", self.first), ("last", self.last)] {
            if !inside(a) {
                return Err(Error::config(format!("{path}{name}"), format!("{a} is outside of the network")));
            }
        }
        if self.first > self.last {
            return Err(Error::config(format!("{path}last"), "the pool ends before it starts"));
        }
        if self.lease_seconds < 60 {
            return Err(Error::config(format!("{path}lease_seconds"), "use 60 or more"));
        }
        if self.mac[0] & 1 != 0 {
            return Err(Error::config(format!("{path}mac"), "this is a group address"));
        }
        Ok(())
    }
}

/// An address that a client holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lease {
    /// Address.
    pub address: Ipv4Addr,
    /// The client's MAC address.
    pub mac: [u8; 6],
    /// Seconds until the lease ends.
    pub remaining: u64,
}

#[derive(Debug)]
struct Holder {
    mac: u64,
    until: Nanos,
    bound: bool,
}

#[derive(Debug, Default)]
struct State {
    holders: BTreeMap<Ipv4Addr, Holder>,
    answers: VecDeque<Vec<u8>>,
    armed: bool,
}

/// The server as a port. See the module's documentation.
#[derive(Debug)]
pub struct GatewayPort {
    config: GatewayConfig,
    clock: Clock,
    ready: EventFd,
    state: Mutex<State>,
}

/// What a client asked.
struct Request<'a> {
    bootp: &'a [u8],
    kind: u8,
    mac: u64,
    client: Ipv4Addr,
    wanted: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

const DISCOVER: u8 = 1;
const OFFERED: u8 = 2;
const REQUEST: u8 = 3;
const DECLINE: u8 = 4;
const ACK: u8 = 5;
const NAK: u8 = 6;
const RELEASE: u8 = 7;
const INFORM: u8 = 8;

impl GatewayPort {
    /// Makes the server; `clock` should be the switch's.
    pub fn new(config: GatewayConfig, clock: Clock) -> Result<Self> {
        config.check("")?;
        let ready = EventFd::new().map_err(|e| Error::io("make the gateway's event descriptor", e))?;
        Ok(Self { config, clock, ready, state: Mutex::default() })
    }

    /// The leases in force.
    pub fn leases(&self) -> Vec<Lease> {
        let now = self.clock.now();
        let state = self.state.lock();
        let bound = state.holders.iter().filter(|(_, h)| h.bound && h.until > now);
        bound
            .map(|(a, h)| Lease { address: *a, mac: mac_bytes(h.mac), remaining: (h.until - now) / SECOND })
            .collect()
    }

    fn handle(&self, state: &mut State, frame: &[u8]) -> Option<()> {
        let (src, ethertype) = (frame.get(6..12)?, u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]));
        let answer = match ethertype {
            ETH_ARP => self.arp(frame.get(14..42)?),
            ETH_IPV4 => {
                let header = usize::from(frame.get(14)? & 0xf) * 4;
                let total = usize::from(u16::from_be_bytes([*frame.get(16)?, *frame.get(17)?]));
                let ip = frame.get(14..14 + total)?;
                if header < 20 || ip[0] >> 4 != 4 || u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff != 0 {
                    return None;
                }
                let payload = ip.get(header..)?;
                match ip[9] {
                    ICMP => self.ping(src, ip, payload),
                    UDP if payload.get(2..4)? == [0, 67] => self.dhcp(state, payload.get(8..)?),
                    _ => None,
                }
            }
            _ => None,
        }?;
        if state.answers.len() < QUEUE {
            state.answers.push_back(answer);
        }
        Some(())
    }

    fn arp(&self, a: &[u8]) -> Option<Vec<u8>> {
        let request = a[0..8] == [0, 1, 8, 0, 6, 4, 0, 1];
        if !request || a[24..28] != self.config.address.octets() {
            return None;
        }
        let mut f = self.ethernet(&a[8..14], ETH_ARP);
        f.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
        f.extend_from_slice(&self.config.mac);
        f.extend_from_slice(&self.config.address.octets());
        f.extend_from_slice(&a[8..18]);
        f.resize(60, 0);
        Some(f)
    }

    fn ping(&self, to: &[u8], ip: &[u8], icmp: &[u8]) -> Option<Vec<u8>> {
        if ip[16..20] != self.config.address.octets() || icmp.get(0..2)? != [8, 0] || icmp.len() < 8 {
            return None;
        }
        let mut echo = icmp.to_vec();
        echo[0] = 0;
        echo[2..4].fill(0);
        let c = checksum::finish(checksum::sum(&echo, 0));
        echo[2..4].copy_from_slice(&c.to_be_bytes());
        Some(self.ipv4(to, ip[12..16].try_into().ok()?, ICMP, &echo))
    }

    fn ethernet(&self, to: &[u8], ethertype: u16) -> Vec<u8> {
        [to, &self.config.mac, &ethertype.to_be_bytes()].concat()
    }

    fn ipv4(&self, to: &[u8], dst: [u8; 4], proto: u8, payload: &[u8]) -> Vec<u8> {
        let mut f = self.ethernet(to, ETH_IPV4);
        let len = (20 + payload.len()) as u16;
        f.extend_from_slice(&[0x45, 0]);
        f.extend_from_slice(&len.to_be_bytes());
        f.extend_from_slice(&[0, 0, 0x40, 0, 64, proto, 0, 0]);
        f.extend_from_slice(&self.config.address.octets());
        f.extend_from_slice(&dst);
        checksum::set_ipv4(&mut f[14..34]);
        f.extend_from_slice(payload);
        f
    }

    fn dhcp(&self, state: &mut State, bootp: &[u8]) -> Option<Vec<u8>> {
        let r = parse(bootp)?;
        let now = self.clock.now();
        match r.kind {
            DISCOVER => {
                let address = self.choose(state, &r, now)?;
                let holder = Holder { mac: r.mac, until: now + OFFER, bound: false };
                // A client that asks again keeps its lease until it takes the new offer.
                state.holders.entry(address).and_modify(|h| h.mac = r.mac).or_insert(holder);
                Some(self.answer(&r, OFFERED, Some(address)))
            }
            REQUEST => {
                if r.server.is_some_and(|s| s != self.config.address) {
                    // The client took another server's offer.
                    state.holders.retain(|_, h| h.bound || h.mac != r.mac);
                    return None;
                }
                let address = r.wanted.unwrap_or(r.client);
                let free = state.holders.get(&address).is_none_or(|h| h.mac == r.mac || h.until <= now);
                if !self.in_pool(address) || !free {
                    return Some(self.answer(&r, NAK, None));
                }
                state.holders.retain(|a, h| *a == address || h.mac != r.mac);
                let until = now + u64::from(self.config.lease_seconds) * SECOND;
                state.holders.insert(address, Holder { mac: r.mac, until, bound: true });
                Some(self.answer(&r, ACK, Some(address)))
            }
            DECLINE => {
                let address = r.wanted.filter(|a| state.holders.get(a).is_some_and(|h| h.mac == r.mac))?;
                state.holders.insert(address, Holder { mac: 0, until: now + DECLINED, bound: false });
                None
            }
            RELEASE => {
                state.holders.retain(|a, h| *a != r.client || h.mac != r.mac);
                None
            }
            INFORM => Some(self.answer(&r, ACK, None)),
            _ => None,
        }
    }

    fn in_pool(&self, a: Ipv4Addr) -> bool {
        (self.config.first..=self.config.last).contains(&a) && a != self.config.address
    }

    /// The address for a client: the one it holds, the one it wants, or the first that nobody holds.
    fn choose(&self, state: &mut State, r: &Request<'_>, now: Nanos) -> Option<Ipv4Addr> {
        if let Some((a, _)) = state.holders.iter().find(|(_, h)| h.mac == r.mac) {
            return Some(*a);
        }
        state.holders.retain(|_, h| h.until > now);
        if state.holders.len() >= CLIENTS_MAX {
            return None;
        }
        if let Some(a) = r.wanted.filter(|a| self.in_pool(*a) && !state.holders.contains_key(a)) {
            return Some(a);
        }
        let (first, last) = (u32::from(self.config.first), u32::from(self.config.last));
        (first..=last).map(Ipv4Addr::from).find(|a| self.in_pool(*a) && !state.holders.contains_key(a))
    }

    fn answer(&self, r: &Request<'_>, kind: u8, address: Option<Ipv4Addr>) -> Vec<u8> {
        let c = &self.config;
        let mut b = vec![0; BOOTP_MIN];
        b[0..4].copy_from_slice(&[2, 1, 6, 0]);
        b[4..8].copy_from_slice(&r.bootp[4..8]);
        b[10..12].copy_from_slice(&r.bootp[10..12]);
        if kind != NAK {
            b[12..16].copy_from_slice(&r.bootp[12..16]);
        }
        if let Some(a) = address {
            b[16..20].copy_from_slice(&a.octets());
        }
        b[20..24].copy_from_slice(&c.address.octets());
        b[24..28].copy_from_slice(&r.bootp[24..28]);
        b[28..44].copy_from_slice(&r.bootp[28..44]);
        b[236..240].copy_from_slice(&COOKIE);
        let mut option = |code: u8, data: &[u8]| {
            b.extend_from_slice(&[code, data.len() as u8]);
            b.extend_from_slice(data);
        };
        option(53, &[kind]);
        option(54, &c.address.octets());
        if kind != NAK {
            option(1, &c.mask().to_be_bytes());
            if c.router {
                option(3, &c.address.octets());
            }
            let dns: Vec<u8> = c.dns.iter().take(16).flat_map(Ipv4Addr::octets).collect();
            if !dns.is_empty() {
                option(6, &dns);
            }
            if let Some(mtu) = c.mtu {
                option(26, &mtu.to_be_bytes());
            }
            if address.is_some() {
                option(51, &c.lease_seconds.to_be_bytes());
                option(58, &(c.lease_seconds / 2).to_be_bytes());
                option(59, &(c.lease_seconds / 8 * 7).to_be_bytes());
            }
        }
        b.push(255);
        b.resize(b.len().max(300), 0);
        // A client with an address is answered there; one without gets a broadcast if it asked for one.
        let broadcast = kind == NAK || r.bootp[10] & 0x80 != 0;
        let (mac, dst) = if r.client != Ipv4Addr::UNSPECIFIED && kind != NAK {
            (r.mac, r.client.octets())
        } else if broadcast {
            (BROADCAST_MAC, [255; 4])
        } else {
            (r.mac, address.map_or([255; 4], |a| a.octets()))
        };
        let mut udp = vec![0, 67, 0, 68, 0, 0, 0, 0];
        udp.extend_from_slice(&b);
        let len = udp.len();
        udp[4..6].copy_from_slice(&(len as u16).to_be_bytes());
        let sum = checksum::pseudo(&c.address.octets(), &dst, UDP, len);
        let sum = checksum::finish(checksum::sum(&udp, sum));
        udp[6..8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
        self.ipv4(&mac_bytes(mac), dst, UDP, &udp)
    }
}

fn parse(bootp: &[u8]) -> Option<Request<'_>> {
    if bootp.len() < BOOTP_MIN
        || bootp[0..3] != [1, 1, 6]
        || bootp[236..240] != COOKIE
        || bootp[24..28] != [0; 4]
    {
        return None;
    }
    let ip = |b: &[u8]| b.first_chunk::<4>().map(|b| Ipv4Addr::from(*b));
    let (mut kind, mut wanted, mut server) = (0, None, None);
    let mut options = &bootp[240..];
    loop {
        match options {
            [] | [255, ..] => break,
            [0, rest @ ..] => options = rest,
            [code, len, rest @ ..] => {
                let data = rest.get(..usize::from(*len))?;
                match code {
                    53 => kind = *data.first()?,
                    50 => wanted = ip(data),
                    54 => server = ip(data),
                    _ => {}
                }
                options = &rest[data.len()..];
            }
            [_] => return None,
        }
    }
    let mac = mac_u64(&bootp[28..34]);
    Some(Request { bootp, kind, mac, client: ip(&bootp[12..16])?, wanted, server })
}

impl Port for GatewayPort {
    fn kind(&self) -> &'static str {
        "gateway"
    }

    fn receive(&self, _queue: usize, burst: &mut Burst) {
        let mut state = self.state.lock();
        while burst.room() > 0
            && let Some(f) = state.answers.pop_front()
        {
            burst.push_frame(&f);
        }
    }

    fn transmit(&self, _queue: usize, batch: &Batch<'_>) -> usize {
        let mut state = self.state.lock();
        for p in batch.iter() {
            // Most flooded frames are for others; look at the address before copying.
            let dst = mac_u64(p.head());
            if dst == BROADCAST_MAC || dst == mac_u64(&self.config.mac) {
                self.handle(&mut state, &p.to_vec());
            }
        }
        if !state.answers.is_empty() && std::mem::take(&mut state.armed) {
            self.ready.signal();
        }
        batch.len()
    }

    fn ready_fd(&self, _queue: usize) -> Option<RawFd> {
        Some(self.ready.as_raw_fd())
    }

    fn arm(&self, _queue: usize, on: bool) -> bool {
        let mut state = self.state.lock();
        self.ready.clear();
        state.armed = on;
        on && !state.answers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn message(kind: u8, mac: u8, options: &[u8]) -> Vec<u8> {
        let mut b = vec![0; 240];
        b[0..3].copy_from_slice(&[1, 1, 6]);
        b[28..34].copy_from_slice(&[2, 0, 0, 0, 0, mac]);
        b[236..240].copy_from_slice(&COOKIE);
        b.extend_from_slice(&[53, 1, kind]);
        b.extend_from_slice(options);
        b.push(255);
        let mut f = Vec::new();
        etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, mac], [0xff; 6])
            .ipv4([0; 4], [255; 4], 64)
            .udp(68, 67)
            .write(&mut f, &b)
            .unwrap();
        f
    }

    fn ask(g: &GatewayPort, f: &[u8]) -> Option<Vec<u8>> {
        let p = crate::packet::Packet::from_frame(f);
        g.transmit(0, &Batch::all(std::slice::from_ref(&p)));
        let mut b = Burst::new();
        g.receive(0, &mut b);
        b.packets().first().map(|p| p.to_vec())
    }

    fn gateway(clock: &Clock) -> GatewayPort {
        GatewayPort::new(GatewayConfig::network([10, 1, 0, 0].into(), 29).unwrap(), clock.clone()).unwrap()
    }

    /// Kind of an answer and the address in it.
    fn answer(f: &[u8]) -> (u8, Ipv4Addr) {
        let p = etherparse::PacketHeaders::from_ethernet_slice(f).unwrap();
        let b = p.payload.slice();
        (b[242], Ipv4Addr::from(<[u8; 4]>::try_from(&b[16..20]).unwrap()))
    }

    #[test]
    fn a_lease_is_offered_bound_and_runs_out() {
        let clock = Clock::manual();
        let g = gateway(&clock);
        let (kind, a) = answer(&ask(&g, &message(DISCOVER, 1, &[])).unwrap());
        assert_eq!((kind, a), (OFFERED, [10, 1, 0, 2].into()));
        let request = [&[50, 4][..], &a.octets(), &[54, 4, 10, 1, 0, 1]].concat();
        assert_eq!(answer(&ask(&g, &message(REQUEST, 1, &request)).unwrap()), (ACK, a));
        assert_eq!(g.leases().len(), 1);
        // Another client cannot have it, until it runs out.
        assert_eq!(answer(&ask(&g, &message(REQUEST, 2, &request)).unwrap()).0, NAK);
        clock.advance(Duration::from_secs(3601));
        assert_eq!(answer(&ask(&g, &message(REQUEST, 2, &request)).unwrap()), (ACK, a));
        ask(&g, &message(DISCOVER, 3, &[]));
        assert_eq!(g.leases().len(), 1);
    }

    #[test]
    fn the_pool_is_finite() {
        let g = gateway(&Clock::manual());
        let offers: Vec<_> = (1..=8).filter_map(|m| ask(&g, &message(DISCOVER, m, &[]))).collect();
        assert_eq!(offers.len(), 5);
    }

    #[test]
    fn arp_and_ping_are_answered() {
        let g = gateway(&Clock::manual());
        let mut f = [[0xff; 6], [2; 6]].concat();
        f.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        f.extend_from_slice(&[2, 2, 2, 2, 2, 2, 10, 1, 0, 3, 0, 0, 0, 0, 0, 0, 10, 1, 0, 1]);
        let r = ask(&g, &f).unwrap();
        assert_eq!((&r[0..6], &r[22..32]), (&[2; 6][..], &[0x52, 0x54, 0, 0xff, 0xff, 1, 10, 1, 0, 1][..]));
        let mut f = Vec::new();
        etherparse::PacketBuilder::ethernet2([2; 6], default_mac())
            .ipv4([10, 1, 0, 3], [10, 1, 0, 1], 64)
            .icmpv4_echo_request(7, 9)
            .write(&mut f, b"hello")
            .unwrap();
        let r = ask(&g, &f).unwrap();
        let p = etherparse::SlicedPacket::from_ethernet(&r).unwrap();
        assert!(matches!(p.transport, Some(etherparse::TransportSlice::Icmpv4(i)) if i.type_u8() == 0));
    }
}
