//! A guest's driver: finds a device behind a transport, negotiates, sets up queues and exchanges buffers with it. It
//! reaches the device only through the buses and guest memory.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_core::accel::Vm;
use vmm_core::bus::Bus;
use vmm_core::devices::virtio::{Status, Virtio, VirtioDevice, VirtioMmio, VirtioPci, features, mmio};
use vmm_core::lifecycle::Lifecycle;
use vmm_core::memory::GuestMemory;
use vmm_core::pci::{ECAM_SIZE, HostBridge, PciRoot, PciWindows};

use crate::platform::{Line, TestVm, wait};

const ECAM: u64 = 0xe000_0000;
const MMIO_BASE: u64 = 0xd000_0000;
pub const MEMORY: u64 = 64 << 20;

/// How the device is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// PCI with MSI-X, doorbells in the accelerator.
    PciMsix,
    /// PCI with a wired interrupt, notifications on the bus.
    PciIntx,
    /// MMIO, doorbells in the accelerator.
    Mmio,
}

pub const TRANSPORTS: [Transport; 3] = [Transport::PciMsix, Transport::PciIntx, Transport::Mmio];

enum Machine {
    Pci {
        root: Arc<PciRoot>,
        function: Arc<VirtioPci>,
        common: u64,
        isr: u64,
        device: u64,
        notify: u64,
        stride: u64,
    },
    Mmio {
        device: Arc<VirtioMmio>,
    },
}

/// A guest with one virtio device.
pub struct Guest {
    pub memory: GuestMemory,
    pub vm: Arc<TestVm>,
    pub transport: Transport,
    pub mmio: Arc<Bus>,
    pub line: Arc<Line>,
    machine: Machine,
    next: u64,
}

impl Guest {
    pub fn new(transport: Transport, device: Arc<dyn VirtioDevice>) -> Self {
        Self::with_memory(transport, device, GuestMemory::flat(MEMORY).unwrap())
    }

    pub fn with_memory(transport: Transport, device: Arc<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        let vm = TestVm::new(transport != Transport::PciIntx);
        let dyn_vm = vm.clone() as Arc<dyn Vm>;
        let (mmio, io) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let line = Line::new();
        let machine = match transport {
            Transport::Mmio => {
                let device =
                    VirtioMmio::new(&dyn_vm, memory.clone(), device, line.clone(), MMIO_BASE).unwrap();
                mmio.insert(MMIO_BASE, mmio::MMIO_SIZE, device.clone()).unwrap();
                Machine::Mmio { device }
            }
            _ => {
                let windows = PciWindows {
                    mmio32: 0xc000_0000..0xd000_0000,
                    mmio64: 0x10_0000_0000..0x20_0000_0000,
                    io: 0xc000..0xd000,
                };
                let root = PciRoot::new(mmio.clone(), io, windows);
                mmio.insert(ECAM, ECAM_SIZE, root.ecam()).unwrap();
                root.route_intx([16, 17, 18, 19].map(|gsi| (gsi, line.clone() as _)));
                root.add(Arc::new(HostBridge::generic()), 0).unwrap();
                let function = VirtioPci::new(&dyn_vm, memory.clone(), device).unwrap();
                root.add(function.clone(), 1).unwrap();
                Machine::Pci { root, function, common: 0, isr: 0, device: 0, notify: 0, stride: 0 }
            }
        };
        let mut guest = Self { memory, vm, transport, mmio, line, machine, next: 0x10_0000 };
        guest.probe();
        guest.start();
        guest
    }

    /// Finds the registers, as a driver does.
    pub fn probe(&mut self) {
        if self.transport == Transport::Mmio {
            assert_eq!((self.read32(MMIO_BASE), self.read32(MMIO_BASE + 4)), (0x7472_6976, 2));
            return;
        }
        let config = ECAM + (1 << 15);
        assert_eq!(self.read32(config) & 0xffff, 0x1af4);
        self.write(config + 4, &6u16.to_le_bytes());
        let bar = u64::from(self.read32(config + 0x10) & !0xf) | u64::from(self.read32(config + 0x14)) << 32;
        let mut found = [0; 6];
        let mut stride_found = 0;
        let mut at = u64::from(self.read32(config + 0x34) & 0xff);
        let mut msix = None;
        while at != 0 {
            let header = self.read32(config + at);
            match header & 0xff {
                9 => {
                    let kind = (header >> 24) as usize;
                    assert_eq!(self.read32(config + at + 4) & 0xff, 0, "BAR 0");
                    found[kind] = bar + u64::from(self.read32(config + at + 8));
                    if kind == 2 {
                        stride_found = u64::from(self.read32(config + at + 16));
                    }
                }
                0x11 => msix = Some(at),
                _ => {}
            }
            at = u64::from(header >> 8 & 0xff);
        }
        if self.transport == Transport::PciMsix {
            let at = config + msix.expect("no MSI-X capability");
            let vectors = u64::from(self.read32(at) >> 16 & 0x7ff) + 1;
            let table = bar + u64::from(self.read32(at + 4) & !7);
            for v in 0..vectors {
                self.write(table + v * 16, &0xfee0_0000u32.to_le_bytes());
                self.write(table + v * 16 + 8, &(0x40 + v as u32).to_le_bytes());
                self.write(table + v * 16 + 12, &0u32.to_le_bytes());
            }
            self.write(at + 2, &0x8000u16.to_le_bytes());
        }
        let Machine::Pci { common, isr, device, notify, stride, .. } = &mut self.machine else {
            unreachable!()
        };
        (*common, *notify, *isr, *device, *stride) = (found[1], found[2], found[3], found[4], stride_found);
    }

    pub fn lifecycle(&self) -> &dyn Lifecycle {
        match &self.machine {
            Machine::Pci { root, .. } => &**root,
            Machine::Mmio { device } => &**device,
        }
    }

    /// After a restore, the registers are where the guest of `other` found them.
    pub fn adopt(&mut self, other: &Guest) {
        self.next = other.next;
        if self.transport == Transport::PciMsix {
            let table = |g: &Guest| g.vm.vectors.lock().iter().map(|v| *v.message.lock()).collect::<Vec<_>>();
            assert_eq!(table(self), table(other), "the vectors are programmed as before");
        }
    }

    /// The addresses that the device's registers take up.
    pub fn window(&self) -> std::ops::Range<u64> {
        match &self.machine {
            Machine::Pci { common, .. } => *common..*common + 0x1_0000,
            Machine::Mmio { .. } => MMIO_BASE..MMIO_BASE + 0x400,
        }
    }

    /// Moves the BAR and finds the registers again.
    pub fn move_bar(&mut self, base: u32) {
        self.write(ECAM + (1 << 15) + 0x10, &base.to_le_bytes());
        self.probe();
    }

    /// Sets the interrupts up again after wild accesses.
    pub fn repair(&mut self) {
        self.set_status(0);
        self.probe();
        let _ = self.line.event.read();
        for vector in self.vm.vectors.lock().iter() {
            let _ = vector.event.read();
        }
    }

    pub fn virtio(&self) -> &Virtio {
        match &self.machine {
            Machine::Pci { function, .. } => function.virtio(),
            Machine::Mmio { device } => device.virtio(),
        }
    }

    pub fn start(&self) {
        self.lifecycle().start().unwrap();
    }

    fn read32(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    /// A guest write: the accelerator's doorbells see it first.
    pub fn write(&self, address: u64, data: &[u8]) {
        if !self.vm.ring(address, data) {
            self.mmio.write(address, data);
        }
    }

    /// A register of the common structure (PCI offset, MMIO offset, length on PCI).
    fn register(&self, pci: u64, mmio: u64) -> u64 {
        match &self.machine {
            Machine::Pci { common, .. } => common + pci,
            Machine::Mmio { .. } => MMIO_BASE + mmio,
        }
    }

    fn write_register(&self, pci: u64, mmio: u64, len: usize, value: u32) {
        let len = if self.transport == Transport::Mmio { 4 } else { len };
        self.write(self.register(pci, mmio), &value.to_le_bytes()[..len]);
    }

    fn read_register(&self, pci: u64, mmio: u64, len: usize) -> u32 {
        let len = if self.transport == Transport::Mmio { 4 } else { len };
        let mut data = [0; 4];
        self.mmio.read(self.register(pci, mmio), &mut data[..len]);
        u32::from_le_bytes(data)
    }

    pub fn status(&self) -> u8 {
        self.read_register(0x14, 0x70, 1) as u8
    }

    pub fn set_status(&self, status: u8) {
        self.write_register(0x14, 0x70, 1, u32::from(status));
    }

    pub fn generation(&self) -> u32 {
        self.read_register(0x15, 0xfc, 1)
    }

    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.write_register(0, 0x14, 4, select);
            u64::from(self.read_register(4, 0x10, 4))
        };
        half(0) | half(1) << 32
    }

    pub fn accept(&self, features: u64) {
        for select in 0..2 {
            self.write_register(8, 0x24, 4, select);
            self.write_register(0xc, 0x20, 4, (features >> (32 * select)) as u32);
        }
    }

    pub fn config(&self, offset: u64, data: &mut [u8]) {
        self.mmio.read(self.config_address() + offset, data);
    }

    pub fn config_address(&self) -> u64 {
        match &self.machine {
            Machine::Pci { device, .. } => *device,
            Machine::Mmio { .. } => MMIO_BASE + 0x100,
        }
    }

    pub fn config_u32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.config(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn config_u64(&self, offset: u64) -> u64 {
        u64::from(self.config_u32(offset)) | u64::from(self.config_u32(offset + 4)) << 32
    }

    /// Up to FEATURES_OK, with what is offered of `wanted`. Returns the features accepted.
    pub fn negotiate(&self, wanted: u64) -> u64 {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(Status::ACKNOWLEDGE);
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        let features = self.offered() & (wanted | features::VERSION_1);
        self.accept(features);
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        assert_ne!(self.status() & Status::FEATURES_OK, 0, "features refused");
        if self.transport == Transport::PciMsix {
            self.write_register(0x10, 0, 2, 0);
        }
        features
    }

    pub fn driver_ok(&self) {
        self.set_status(self.status() | Status::DRIVER_OK);
    }

    /// Everything up to a working device with all queues of at most `size` entries.
    pub fn bring_up(&mut self, wanted: u64, size: u16) -> Vec<DriverQueue> {
        let features = self.negotiate(wanted);
        let queues = (0..self.queues()).map(|index| self.set_up_queue(index, size, features)).collect();
        self.driver_ok();
        assert_eq!(self.status() & Status::NEEDS_RESET, 0);
        queues
    }

    pub fn queues(&self) -> u16 {
        (0..1024).find(|&index| self.queue_max(index) == 0).unwrap()
    }

    pub fn queue_max(&self, index: u16) -> u16 {
        self.select(index);
        self.read_register(0x18, 0x34, 2) as u16
    }

    pub fn select(&self, index: u16) {
        self.write_register(0x16, 0x30, 2, u32::from(index));
    }

    /// Page-aligned guest memory.
    pub fn allocate(&mut self, len: u64) -> u64 {
        let at = self.next;
        self.next += len.next_multiple_of(0x1000);
        assert!(self.next <= MEMORY, "the test guest is out of memory");
        at
    }

    pub fn set_up_queue(&mut self, index: u16, size: u16, features: u64) -> DriverQueue {
        let size = size.min(self.queue_max(index));
        let queue = DriverQueue::new(self, index, size, features);
        self.enable_queue(&queue);
        queue
    }

    pub fn enable_queue(&self, queue: &DriverQueue) {
        self.select(queue.index);
        self.write_register(0x18, 0x38, 2, u32::from(queue.size));
        let address = |pci, mmio, value: u64| {
            self.write_register(pci, mmio, 4, value as u32);
            self.write_register(pci + 4, mmio + 4, 4, (value >> 32) as u32);
        };
        address(0x20, 0x80, queue.descriptors);
        address(0x28, 0x90, queue.available);
        address(0x30, 0xa0, queue.used);
        if self.transport == Transport::PciMsix {
            let vector = u32::from(queue.index) + 1;
            self.write_register(0x1a, 0, 2, vector);
            assert_eq!(self.read_register(0x1a, 0, 2), vector);
        }
        self.write_register(0x1c, 0x44, 2, 1);
    }

    pub fn reset_queue(&self, index: u16) {
        self.select(index);
        self.write_register(0x3a, 0xc0, 2, 1);
        assert_eq!(self.read_register(0x3a, 0xc0, 2), 0);
        assert_eq!(self.read_register(0x1c, 0x44, 2), 0);
    }

    pub fn notify(&self, index: u16) {
        match &self.machine {
            Machine::Pci { notify, stride, .. } => {
                self.write(notify + stride * u64::from(index), &index.to_le_bytes());
            }
            Machine::Mmio { .. } => self.write(MMIO_BASE + 0x50, &u32::from(index).to_le_bytes()),
        }
    }

    /// Sleeps until an interrupt for queue `index` (or for the configuration) and acknowledges it. On transports with
    /// one wire it may be another queue's: callers look again.
    pub fn wait_interrupt(&self, index: Option<u16>) {
        match &self.machine {
            Machine::Pci { .. } if self.transport == Transport::PciMsix => {
                let vector = self.vm.vectors.lock()[index.map_or(0, |i| usize::from(i) + 1)].clone();
                wait(&vector.event);
            }
            Machine::Pci { isr, .. } => {
                wait(&self.line.event);
                let mut bits = [0];
                self.mmio.read(*isr, &mut bits);
            }
            Machine::Mmio { .. } => {
                wait(&self.line.event);
                let bits = self.read32(MMIO_BASE + 0x60);
                self.write(MMIO_BASE + 0x64, &bits.to_le_bytes());
            }
        }
    }

    /// Interrupts sent so far for queue `index`; only with MSI-X.
    pub fn interrupts(&self, index: u16) -> usize {
        assert_eq!(self.transport, Transport::PciMsix);
        self.vm.vectors.lock()[usize::from(index) + 1].sent.load(Ordering::SeqCst)
    }

    /// Waits for the device to ask for a reset.
    pub fn wait_needs_reset(&self) {
        while self.status() & Status::NEEDS_RESET == 0 {
            self.wait_interrupt(None);
        }
    }

    /// Makes `buffers` available on `queue`, notifies, and waits for them; returns the used length.
    pub fn exchange(&self, queue: &mut DriverQueue, buffers: &[Buffer]) -> u32 {
        let head = queue.submit(buffers);
        self.notify(queue.index);
        let (used, len) = self.wait_used(queue);
        assert_eq!(used, head);
        len
    }

    pub fn wait_used(&self, queue: &mut DriverQueue) -> (u16, u32) {
        loop {
            if let Some(used) = queue.poll() {
                return used;
            }
            self.wait_interrupt(Some(queue.index));
        }
    }

    /// Copies `data` to fresh guest memory; a readable buffer.
    pub fn readable(&mut self, data: &[u8]) -> Buffer {
        let address = self.allocate(data.len() as u64);
        self.memory.write(address, data).unwrap();
        Buffer { address, len: data.len() as u32, writable: false }
    }

    /// Fresh guest memory filled with 0xee; a writable buffer.
    pub fn writable(&mut self, len: u32) -> Buffer {
        let address = self.allocate(u64::from(len));
        self.memory.fill(address, len as usize, 0xee).unwrap();
        Buffer { address, len, writable: true }
    }

    pub fn bytes(&self, buffer: Buffer) -> Vec<u8> {
        let mut data = vec![0; buffer.len as usize];
        self.memory.read(buffer.address, &mut data).unwrap();
        data
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    pub writable: bool,
}

/// The driver side of a split queue.
pub struct DriverQueue {
    pub index: u16,
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub event_idx: bool,
    memory: GuestMemory,
    free: VecDeque<u16>,
    chains: Vec<Vec<u16>>,
    next_available: u16,
    next_used: u16,
}

impl DriverQueue {
    fn new(guest: &mut Guest, index: u16, size: u16, features: u64) -> Self {
        let n = u64::from(size);
        Self {
            index,
            size,
            descriptors: guest.allocate(16 * n),
            available: guest.allocate(6 + 2 * n),
            used: guest.allocate(6 + 8 * n),
            event_idx: features & features::EVENT_IDX != 0,
            memory: guest.memory.clone(),
            free: (0..size).collect(),
            chains: vec![Vec::new(); usize::from(size)],
            next_available: 0,
            next_used: 0,
        }
    }

    /// Number of descriptors that no chain uses.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Writes one descriptor.
    pub fn describe(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = Vec::new();
        bytes.extend(address.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write(table + 16 * u64::from(index), &bytes).unwrap();
    }

    /// Makes a chain available without a notification; returns its head.
    pub fn submit(&mut self, buffers: &[Buffer]) -> u16 {
        let ids: Vec<u16> = buffers.iter().map(|_| self.free.pop_front().expect("queue full")).collect();
        for (i, buffer) in buffers.iter().enumerate() {
            let next = ids.get(i + 1).copied();
            let flags = u16::from(next.is_some()) | u16::from(buffer.writable) << 1;
            self.describe(self.descriptors, ids[i], buffer.address, buffer.len, flags, next.unwrap_or(0));
        }
        let head = ids[0];
        self.chains[usize::from(head)] = ids;
        self.publish(head);
        head
    }

    /// Makes a chain available through an indirect table at `table`.
    pub fn submit_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        for (i, buffer) in buffers.iter().enumerate() {
            let more = i + 1 < buffers.len();
            let flags = u16::from(more) | u16::from(buffer.writable) << 1;
            self.describe(table, i as u16, buffer.address, buffer.len, flags, i as u16 + 1);
        }
        let id = self.free.pop_front().expect("queue full");
        self.describe(self.descriptors, id, table, 16 * buffers.len() as u32, 4, 0);
        self.chains[usize::from(id)] = vec![id];
        self.publish(id);
        id
    }

    /// Makes whatever is at descriptor `head` available.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        self.memory.store_u16(self.available + 4 + 2 * slot, head, Ordering::Relaxed).unwrap();
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available);
    }

    pub fn set_available_index(&self, index: u16) {
        self.memory.store_u16(self.available + 2, index, Ordering::SeqCst).unwrap();
    }

    /// Says at which used index an interrupt is wanted.
    pub fn set_used_event(&self, index: u16) {
        let at = self.available + 4 + 2 * u64::from(self.size);
        self.memory.store_u16(at, index, Ordering::SeqCst).unwrap();
    }

    pub fn used_index(&self) -> u16 {
        self.memory.load_u16(self.used + 2, Ordering::SeqCst).unwrap()
    }

    /// Takes the next used buffer without asking for an interrupt.
    pub fn poll_quietly(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.next_used { None } else { self.poll() }
    }

    /// Takes the next used buffer; asks for an interrupt at the one after it.
    pub fn poll(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.next_used {
            if self.event_idx {
                self.set_used_event(self.next_used);
            }
            if self.used_index() == self.next_used {
                return None;
            }
        }
        let slot = u64::from(self.next_used % self.size);
        let id = self.memory.load_u32(self.used + 4 + 8 * slot, Ordering::Relaxed).unwrap() as u16;
        let len = self.memory.load_u32(self.used + 8 + 8 * slot, Ordering::Relaxed).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        self.free.extend(std::mem::take(&mut self.chains[usize::from(id)]));
        Some((id, len))
    }
}
