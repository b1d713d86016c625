//! A driver of a vhost-user-blk device: a front-end and split rings in shared memory.

#![allow(dead_code, reason = "the tests and the benchmark use different parts")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{MsgFlags, recv, send};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

pub const MEMORY: usize = 1 << 20;
pub const QUEUE_SIZE: u16 = 128;
/// Requests of a queue that may be in flight, each with three descriptors and a page of data.
pub const SLOTS: u16 = 32;
/// Bytes of data of a slot.
pub const PAGE: u64 = 4096;
/// Guest memory of each queue: descriptors, rings, headers with status bytes, data.
pub const STRIDE: u64 = 0x4_0000;
pub const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const HEADER_STRIDE: u64 = 32;
const STATUS: u64 = HEADER + 16;
pub const DATA: u64 = 0x4000;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
/// The device does not want to be notified (flag of the used ring).
const NO_NOTIFY: u16 = 1;
/// Features of the device.
const FLUSH: u64 = 1 << 9;
const EVENT_IDX: u64 = 1 << 29;

/// Memory of a guest and the state of its rings, which outlive a connection.
pub struct Guest {
    pub memory: GuestMemoryMmap,
    file: File,
    /// Requests made available in each queue.
    pub available: [u16; 2],
    /// The record of requests in flight, which outlives back-ends.
    pub record: Option<(VhostUserInflight, File)>,
}

impl Guest {
    pub fn new() -> Self {
        let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(MEMORY as u64).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let memory =
            GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY, Some(offset))]).unwrap();
        Guest { memory, file, available: [0; 2], record: None }
    }

    fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: self.memory.get_host_address(GuestAddress(0)).unwrap() as u64,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    pub fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub fn used(&self, queue: usize) -> u16 {
        self.memory.read_obj(GuestAddress(queue as u64 * STRIDE + USED + 2)).unwrap()
    }

    /// The slot whose request was the `n`th to be done.
    pub fn done(&self, queue: usize, n: u16) -> u16 {
        let at = queue as u64 * STRIDE + USED + 4 + u64::from(n % QUEUE_SIZE) * 8;
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        head as u16 / 3
    }

    /// Whether the device waits for a notification.
    pub fn wants_kick(&self, queue: usize) -> bool {
        fence(Ordering::SeqCst);
        let flags: u16 = self.memory.read_obj(GuestAddress(queue as u64 * STRIDE + USED)).unwrap();
        flags & NO_NOTIFY == 0
    }

    /// Makes a request available in slot 0 without a notification. Data moves in `direction` (0: to the device).
    pub fn submit(&mut self, queue: usize, kind: u32, sector: u64, address: u64, len: u32, direction: u16) {
        self.submit_in(queue, 0, (kind, sector), (address, len), direction);
    }

    /// [`submit`](Self::submit) in a slot that is free.
    pub fn submit_in(
        &mut self,
        queue: usize,
        slot: u16,
        (kind, sector): (u32, u64),
        (address, len): (u64, u32),
        direction: u16,
    ) {
        let (base, first) = (queue as u64 * STRIDE, slot * 3);
        let header = base + HEADER + u64::from(slot) * HEADER_STRIDE;
        let status = header + STATUS - HEADER;
        self.put(header, kind);
        self.put(header + 8, sector);
        self.put(status, 0xffu8);
        let list = [(header, 16, 0), (address, len, direction), (status, 1, WRITE)];
        let count = list.iter().filter(|(_, len, _)| *len > 0).count();
        for (n, (address, len, flags)) in list.into_iter().filter(|(_, len, _)| *len > 0).enumerate() {
            let more = if n + 1 < count { NEXT } else { 0 };
            let at = base + u64::from(first + n as u16) * 16;
            self.put(at, address);
            self.put(at + 8, len);
            self.put(at + 12, flags | more);
            self.put(at + 14, first + n as u16 + 1);
        }
        self.submit_again(queue, slot);
    }

    /// Makes the request that is in a slot available once more.
    pub fn submit_again(&mut self, queue: usize, slot: u16) {
        let (base, place) = (queue as u64 * STRIDE, u64::from(self.available[queue] % QUEUE_SIZE));
        self.put(base + AVAILABLE + 4 + place * 2, slot * 3);
        self.available[queue] = self.available[queue].wrapping_add(1);
        fence(Ordering::SeqCst);
        self.put(base + AVAILABLE + 2, self.available[queue]);
    }

    /// Says that a request was done, as a back-end does.
    pub fn complete(&mut self, queue: usize, slot: u16) {
        let (base, used) = (queue as u64 * STRIDE + USED, self.used(queue));
        self.put(base + 4 + u64::from(used % QUEUE_SIZE) * 8, u32::from(slot * 3));
        self.put(base + 2, used.wrapping_add(1));
    }

    /// The part of a queue in the record of requests in flight.
    fn record_at(&self, queue: usize) -> (&File, u64) {
        let (given, file) = self.record.as_ref().unwrap();
        (file, given.mmap_size / u64::from(given.num_queues) * queue as u64)
    }

    /// Whether the record says that the request in a slot is in flight.
    pub fn in_flight(&self, queue: usize, slot: u16) -> bool {
        let (file, at) = self.record_at(queue);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at + 16 + u64::from(slot * 3) * 16).unwrap();
        byte[0] == 1
    }

    /// Records requests of slots as in flight, in their order, and the used index.
    pub fn put_in_flight(&self, queue: usize, slots: &[u16], used: u16) {
        let (file, at) = self.record_at(queue);
        for (counter, slot) in slots.iter().enumerate() {
            let entry = at + 16 + u64::from(slot * 3) * 16;
            file.write_all_at(&[1], entry).unwrap();
            file.write_all_at(&(counter as u64 + 7).to_le_bytes(), entry + 8).unwrap();
        }
        file.write_all_at(&used.to_le_bytes(), at + 14).unwrap();
    }

    pub fn status(&self, queue: usize, slot: u16) -> u8 {
        let at = queue as u64 * STRIDE + STATUS + u64::from(slot) * HEADER_STRIDE;
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }
}

/// A connected front-end.
pub struct Driver {
    front: Frontend,
    pub kicks: Vec<EventFd>,
    pub calls: Vec<EventFd>,
}

impl Driver {
    /// Connects and starts both queues where their used rings are. `slots`: memory is added as a slot.
    pub fn connect(socket: &Path, guest: &Guest, slots: bool) -> Self {
        Self::start(socket, guest, slots, Protocol::empty(), |_| {}, |queue| guest.used(queue))
    }

    /// Connects with the guest's record of requests in flight, which is made if there is none, and starts both queues as
    /// if all that was made available had been taken.
    pub fn connect_with_record(socket: &Path, guest: &mut Guest) -> Self {
        let mut record = guest.record.take();
        let prepare = |front: &mut Frontend| {
            let (given, file) = record.get_or_insert_with(|| {
                let wanted = VhostUserInflight::new(0, 0, 2, QUEUE_SIZE);
                front.get_inflight_fd(&wanted).unwrap()
            });
            front.set_inflight_fd(given, file.as_raw_fd()).unwrap();
        };
        let more = Protocol::INFLIGHT_SHMFD | Protocol::RESET_DEVICE;
        let driver = Self::start(socket, guest, false, more, prepare, |queue| guest.available[queue]);
        guest.record = record;
        driver
    }

    /// [`connect`](Self::connect) with a channel on which the back-end may send requests.
    pub fn connect_with_channel(socket: &Path, guest: &Guest, channel: &dyn AsRawFd) -> Self {
        let prepare = |front: &mut Frontend| front.set_backend_request_fd(channel).unwrap();
        Self::start(socket, guest, false, Protocol::BACKEND_REQ, prepare, |queue| guest.used(queue))
    }

    fn start(
        socket: &Path,
        guest: &Guest,
        slots: bool,
        more: Protocol,
        prepare: impl FnOnce(&mut Frontend),
        base: impl Fn(usize) -> u16,
    ) -> Self {
        let mut front = Frontend::connect(socket, 2).unwrap();
        front.set_owner().unwrap();
        let features = front.get_features().unwrap();
        assert_eq!(features & (1 << 13 | 1 << 14 | FLUSH), 1 << 13 | 1 << 14 | FLUSH);
        front.set_features(features & !EVENT_IDX).unwrap();
        let protocol = front.get_protocol_features().unwrap();
        let common = Protocol::MQ | Protocol::CONFIG | Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS;
        let wanted = common | more;
        assert!(protocol.contains(wanted));
        front.set_protocol_features(wanted).unwrap();
        assert_eq!(front.get_queue_num().unwrap(), 2);
        let region = guest.region();
        let host = region.userspace_addr;
        match slots {
            true => {
                assert!(front.get_max_mem_slots().unwrap() >= 8);
                front.add_mem_region(&region).unwrap();
            }
            false => assert!(front.set_mem_table(&[region]).unwrap().is_none()),
        }
        prepare(&mut front);
        let (mut kicks, mut calls) = (Vec::new(), Vec::new());
        for queue in 0..2 {
            let place = host + queue as u64 * STRIDE;
            front.set_vring_num(queue, QUEUE_SIZE).unwrap();
            let rings = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: place,
                used_ring_addr: place + USED,
                avail_ring_addr: place + AVAILABLE,
                log_addr: None,
            };
            front.set_vring_addr(queue, &rings).unwrap();
            front.set_vring_base(queue, base(queue)).unwrap();
            let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
            front.set_vring_call(queue, &call).unwrap();
            front.set_vring_kick(queue, &kick).unwrap();
            front.set_vring_enable(queue, true).unwrap();
            kicks.push(kick);
            calls.push(call);
        }
        Driver { front, kicks, calls }
    }

    /// Says that the driver flushes or does not, and waits until that is known.
    pub fn set_flushing(&mut self, on: bool) {
        let features = self.front.get_features().unwrap() & !EVENT_IDX;
        self.front.set_features(if on { features } else { features & !FLUSH }).unwrap();
        self.capacity();
    }

    /// Tells where the guest's memory is, once more.
    pub fn set_memory(&self, guest: &Guest) {
        self.front.set_mem_table(&[guest.region()]).unwrap();
    }

    /// Whether the device has seen what it was told of a queue.
    pub fn is_kick_taken(&self, queue: usize) -> bool {
        // SAFETY: the descriptor is open as long as `self.kicks` has it.
        let kick = unsafe { BorrowedFd::borrow_raw(self.kicks[queue].as_raw_fd()) };
        poll(&mut [PollFd::new(kick, PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 0
    }

    /// Starts a queue once more, and waits until that is done.
    pub fn start_again(&mut self, queue: usize) {
        self.front.set_vring_kick(queue, &self.kicks[queue]).unwrap();
        self.capacity();
    }

    /// Resets the device and waits until that is done.
    pub fn reset(&self) {
        let header = [34, 9, 0].map(u32::to_ne_bytes).concat(); // RESET_DEVICE, with a reply
        let socket = self.front.as_raw_fd();
        assert_eq!(send(socket, &header, MsgFlags::empty()).unwrap(), header.len());
        let mut reply = [0xff; 20];
        assert_eq!(recv(socket, &mut reply, MsgFlags::MSG_WAITALL).unwrap(), reply.len());
        assert_eq!(reply[12..], [0; 8]);
    }

    /// Stops both queues and disconnects; returns the indices of the requests that would be taken next.
    pub fn stop(self) -> [u32; 2] {
        [0, 1].map(|queue| self.front.get_vring_base(queue).unwrap())
    }

    /// Executes a request and returns its status.
    pub fn run(
        &self,
        guest: &mut Guest,
        queue: usize,
        request: (u32, u64),
        data: (u64, u32),
        direction: u16,
    ) -> u8 {
        guest.submit(queue, request.0, request.1, data.0, data.1, direction);
        self.finish(guest, queue)
    }

    /// Notifies the device and waits until everything is done.
    pub fn finish(&self, guest: &Guest, queue: usize) -> u8 {
        self.kicks[queue].write(1).unwrap();
        while guest.used(queue) != guest.available[queue] {
            self.wait(queue);
        }
        guest.status(queue, 0)
    }

    /// Waits until the device says that requests of a queue are done.
    pub fn wait(&self, queue: usize) {
        // A device may have made the descriptor one that does not wait: the flag belongs to both sides.
        // SAFETY: the descriptor is open as long as `self.calls` has it.
        let call = unsafe { BorrowedFd::borrow_raw(self.calls[queue].as_raw_fd()) };
        let mut events = [PollFd::new(call, PollFlags::POLLIN)];
        poll(&mut events, PollTimeout::NONE).unwrap();
        self.calls[queue].read().unwrap();
    }

    pub fn write(&self, guest: &mut Guest, queue: usize, sector: u64, bytes: &[u8]) -> u8 {
        let at = queue as u64 * STRIDE + DATA;
        guest.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.run(guest, queue, (1, sector), (at, bytes.len() as u32), 0)
    }

    pub fn read(&self, guest: &mut Guest, queue: usize, sector: u64, len: usize) -> Vec<u8> {
        let at = queue as u64 * STRIDE + DATA;
        assert_eq!(self.run(guest, queue, (0, sector), (at, len as u32), WRITE), 0);
        let mut bytes = vec![0; len];
        guest.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Discards (11) or zeroes (13) a range.
    pub fn erase(&self, guest: &mut Guest, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        guest.put(DATA, sector);
        guest.put(DATA + 8, sectors);
        guest.put(DATA + 12, flags);
        self.run(guest, 0, (kind, 0), (DATA, 16), 0)
    }

    /// Capacity in sectors, as the configuration space says.
    pub fn capacity(&mut self) -> u64 {
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) = self.front.get_config(0, 60, flags, &[0; 60]).unwrap();
        u64::from_le_bytes(bytes[..8].try_into().unwrap())
    }
}
