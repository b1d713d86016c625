//! A small vhost-user front-end with a guest's memory and rings of either layout.
#![allow(dead_code, clippy::unwrap_used, reason = "each test uses some of it, and ends where a step fails")]

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

const PROTOCOL: u64 = 1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 15 | 1 << 16;
const PACKED: u64 = 1 << 34;
/// Entries of a ring.
pub const SIZE: u16 = 64;
/// Guest address of the memory; the front-end's own addresses are shifted, so that a mix-up shows.
pub const GUEST: u64 = 0x10_0000;
pub const USER: u64 = 0x7f00_0000_0000;
pub const MEMORY: u64 = 0x10_0000;
pub const BUFFERS: u64 = 0x1_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Where the parts of a ring are: descriptors (all of a packed ring), what the driver writes, what the device writes.
pub fn ring(q: u32) -> u64 {
    0x4000 * u64::from(q)
}

pub fn driver_part(q: u32) -> u64 {
    ring(q) + 0x1000
}

pub fn device_part(q: u32) -> u64 {
    ring(q) + 0x2000
}

pub fn pair(a: u32, b: u32) -> Vec<u8> {
    [a.to_le_bytes(), b.to_le_bytes()].concat()
}

/// Place and wrap counter of the `n`th descriptor of a packed ring.
fn place(n: u16) -> (u16, bool) {
    (n % SIZE, (n / SIZE).is_multiple_of(2))
}

/// A vring base of a packed ring that has got to the `n`th descriptor.
pub fn packed_base(n: u16) -> u32 {
    let (index, wrap) = place(n);
    u32::from(index | u16::from(wrap) << 15) * 0x1_0001
}

/// What a driver remembers.
#[derive(Clone)]
pub struct Driver {
    /// Chains made available, or descriptors of a packed ring.
    pub avail: [u16; 2],
    /// The same of those given back and taken notice of.
    pub used: [u16; 2],
    /// Descriptors of each chain of a packed ring, by its identifier.
    counts: [[u16; SIZE as usize]; 2],
}

/// A guest with one pair of queues; its memory is a file.
pub struct Guest {
    pub socket: UnixStream,
    pub memory: File,
    pub driver: Driver,
    pub packed: bool,
}

impl Guest {
    /// A guest that starts, or one that comes back with what it had. It remembers no vring base of a packed ring.
    pub fn connect(path: &Path, features: u64, before: Option<(File, Driver)>) -> Self {
        let (memory, driver) = before.unwrap_or_else(|| {
            let f = tempfile::tempfile().unwrap();
            f.set_len(MEMORY).unwrap();
            (f, Driver { avail: [0; 2], used: [0; 2], counts: [[1; SIZE as usize]; 2] })
        });
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut g = Self { socket, memory, driver, packed: features & PACKED != 0 };
        let offered = g.ask(1, &[]);
        assert_eq!(offered & features, features);
        // A front-end may leave it at none.
        if features != 0 {
            g.send(2, &features.to_le_bytes(), &[]);
        }
        assert_eq!(g.ask(15, &[]) & PROTOCOL, PROTOCOL);
        g.send(16, &PROTOCOL.to_le_bytes(), &[]);
        g.send(3, &[], &[]);
        let table: Vec<u8> = [1u64, GUEST, MEMORY, USER, 0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let fd = g.memory.as_raw_fd();
        assert_eq!(g.ack(5, &table, &[fd]), 0);
        for q in 0..2 {
            let base = if g.packed { packed_base(0) } else { g.used_index(q).into() };
            g.set_up(q, base);
        }
        g
    }

    /// Sets a queue up and starts it.
    pub fn set_up(&mut self, q: u32, base: u32) {
        self.send(8, &pair(q, SIZE.into()), &[]);
        self.send(10, &pair(q, base), &[]);
        self.send(9, &Self::addresses(q, GUEST + device_part(q)), &[]);
        let call = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        self.send(13, &u64::from(q).to_le_bytes(), &[call.as_raw_fd()]);
        let kick = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        self.send(12, &u64::from(q).to_le_bytes(), &[kick.as_raw_fd()]);
        assert_eq!(self.ack(18, &pair(q, 1), &[]), 0);
    }

    /// The message that tells where a queue's parts are. What the device writes is logged, once logging is on, as that
    /// at guest address `log`.
    pub fn addresses(q: u32, log: u64) -> Vec<u8> {
        let mut m = pair(q, 1);
        for part in [ring(q), device_part(q), driver_part(q)] {
            m.extend((USER + part).to_le_bytes());
        }
        m.extend(log.to_le_bytes());
        m
    }

    /// What outlives the connection.
    pub fn remains(&self) -> Option<(File, Driver)> {
        Some((self.memory.try_clone().unwrap(), self.driver.clone()))
    }

    pub fn send(&mut self, code: u32, payload: &[u8], fds: &[RawFd]) {
        self.send_flags(code, 1, payload, fds);
    }

    fn send_flags(&mut self, code: u32, flags: u32, payload: &[u8], fds: &[RawFd]) {
        let mut m: Vec<u8> =
            [code, flags, payload.len() as u32].iter().flat_map(|v| v.to_le_bytes()).collect();
        m.extend_from_slice(payload);
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights };
        sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&m)], control, MsgFlags::empty(), None)
            .unwrap();
    }

    pub fn reply(&mut self) -> Vec<u8> {
        let mut h = [0; 12];
        self.socket.read_exact(&mut h).unwrap();
        let mut p = vec![0; u32::from_le_bytes(h[8..12].try_into().unwrap()) as usize];
        self.socket.read_exact(&mut p).unwrap();
        p
    }

    pub fn ask(&mut self, code: u32, payload: &[u8]) -> u64 {
        self.send(code, payload, &[]);
        u64::from_le_bytes(self.reply()[..8].try_into().unwrap())
    }

    pub fn ack(&mut self, code: u32, payload: &[u8], fds: &[RawFd]) -> u64 {
        self.send_flags(code, 9, payload, fds);
        u64::from_le_bytes(self.reply()[..8].try_into().unwrap())
    }

    pub fn write(&self, at: u64, data: &[u8]) {
        self.memory.write_all_at(data, at).unwrap();
    }

    pub fn read(&self, at: u64, n: usize) -> Vec<u8> {
        let mut v = vec![0; n];
        self.memory.read_exact_at(&mut v, at).unwrap();
        v
    }

    fn read_u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at, 2).try_into().unwrap())
    }

    /// Writes a descriptor; the last two words are its flags and the next one's number in a split ring or table, and
    /// the buffer's identifier and the flags in a packed one.
    pub fn descriptor(&self, table: u64, i: u64, addr: u64, len: u32, last: [u16; 2]) {
        let mut d = addr.to_le_bytes().to_vec();
        d.extend(len.to_le_bytes());
        d.extend(last.map(u16::to_le_bytes).concat());
        self.write(table + 16 * i, &d);
    }

    /// Writes an entry of an indirect table; flags but that of the direction mean nothing in a packed one.
    pub fn table_entry(&self, table: u64, i: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let last = if self.packed { [next, flags] } else { [flags, next] };
        self.descriptor(table, i, addr, len, last);
    }

    /// Makes a chain of buffers (address, length, flags) available.
    pub fn offer(&mut self, q: u32, id: u16, buffers: &[(u64, u32, u16)]) {
        let n = buffers.len() as u16;
        let avail = self.driver.avail[q as usize];
        if self.packed {
            self.driver.counts[q as usize][usize::from(id)] = n;
            self.driver.avail[q as usize] = avail.wrapping_add(n);
            // The first one last.
            for i in (0..n).rev() {
                let (addr, len, flags) = buffers[usize::from(i)];
                let (at, wrap) = place(avail.wrapping_add(i));
                let flags = flags | if i + 1 < n { NEXT } else { 0 } | if wrap { AVAIL } else { USED };
                // Only the last one's identifier counts.
                let id = if i + 1 < n { !id } else { id };
                self.descriptor(ring(q), at.into(), addr, len, [id, flags]);
            }
            return;
        }
        let number = |i: u16| (id + 9 * i) % SIZE;
        for (i, (addr, len, flags)) in (0..).zip(buffers) {
            let flags = flags | if i + 1 < n { NEXT } else { 0 };
            self.descriptor(ring(q), number(i).into(), *addr, *len, [flags, number(i + 1)]);
        }
        self.offer_head(q, id);
    }

    /// Makes a chain of a split ring available whose descriptors are written already.
    pub fn offer_head(&mut self, q: u32, head: u16) {
        let at = &mut self.driver.avail[q as usize];
        let entry = driver_part(q) + 4 + 2 * u64::from(*at % SIZE);
        *at = at.wrapping_add(1);
        let index = *at;
        self.write(entry, &head.to_le_bytes());
        self.write(driver_part(q) + 2, &index.to_le_bytes());
    }

    /// Sends a frame in one buffer, with an empty packet header.
    pub fn transmit(&mut self, slot: u16, frame: &[u8]) {
        let at = BUFFERS + 0x8_0000 + 0x800 * u64::from(slot);
        self.write(at, &[&[0; 12], frame].concat());
        self.offer(1, slot, &[(GUEST + at, 12 + frame.len() as u32, 0)]);
    }

    /// Offers a receive buffer.
    pub fn receive_buffer(&mut self, slot: u16, len: u32) {
        self.offer(0, slot, &[(GUEST + BUFFERS + 0x800 * u64::from(slot), len, WRITE)]);
    }

    /// The buffer given back `n`th: its identifier, the bytes written, and where the next one is.
    fn given_back(&self, q: u32, n: u16) -> Option<(u16, usize, u16)> {
        if self.packed {
            let (at, wrap) = place(n);
            let d = self.read(ring(q) + 16 * u64::from(at) + 8, 8);
            let word = |i: usize| u16::from_le_bytes([d[i], d[i + 1]]);
            let len = u32::from_le_bytes(d[..4].try_into().unwrap()) as usize;
            let wanted = if wrap { AVAIL | USED } else { 0 };
            let count = || self.driver.counts[q as usize][usize::from(word(4))];
            (word(6) & (AVAIL | USED) == wanted).then(|| (word(4), len, n.wrapping_add(count())))
        } else {
            let e = self.read(device_part(q) + 4 + 8 * u64::from(n % SIZE), 8);
            let word = |i: usize| u32::from_le_bytes(e[i..i + 4].try_into().unwrap());
            let new = self.read_u16(device_part(q) + 2) != n;
            new.then(|| (word(0) as u16, word(4) as usize, n.wrapping_add(1)))
        }
    }

    /// How far the device has got with giving buffers back, in the terms of [`Driver::avail`].
    pub fn used_index(&self, q: u32) -> u16 {
        let mut n = self.driver.used[q as usize];
        while let Some((_, _, next)) = self.given_back(q, n) {
            n = next;
        }
        n
    }

    /// The buffers that the device has used on the receive queue since the last call.
    pub fn received(&mut self) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        while let Some((id, len, next)) = self.given_back(0, self.driver.used[0]) {
            out.push(self.read(BUFFERS + 0x800 * u64::from(id), len));
            self.driver.used[0] = next;
        }
        out
    }

    /// Takes notice of everything that was sent.
    pub fn reclaim(&mut self) {
        self.driver.used[1] = self.used_index(1);
    }
}
