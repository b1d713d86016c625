//! The PCI transport, modern interface (virtio 1.2, section 4.1).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::device::{Interrupt, VirtioDevice};
use super::doorbells::Doorbells;
use super::state::{QueueArea, Register, Virtio};
use crate::accel::{AccelError, IoAddress, Vm};
use crate::lifecycle::{Lifecycle, LifecycleError};
use crate::memory::GuestMemory;
use crate::pci::{BarKind, Command, ConfigSpace, Identity, IntxPin, Msix, PciAddress, PciError, PciFunction};

/// The one BAR: registers, notifications and MSI-X.
const BAR: usize = 0;
const BAR_SIZE: u64 = 0x1_0000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const PENDING: u64 = 0x7000;
const TABLE: u64 = 0x8000;
const PAGE: u64 = 0x1000;
/// Distance of two queues' notification addresses.
const NOTIFY_STRIDE: u64 = 4;
/// What keeps the notification addresses on their page.
const MAX_QUEUES: usize = (PAGE / NOTIFY_STRIDE) as usize;
const VENDOR_CAPABILITY: u8 = 9;
const CAPABILITY_COMMON: u8 = 1;
const CAPABILITY_NOTIFY: u8 = 2;
const CAPABILITY_ISR: u8 = 3;
const CAPABILITY_DEVICE: u8 = 4;
const CAPABILITY_PCI: u8 = 5;
const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Why a PCI virtio device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// The host gives no event descriptors.
    #[error("Cannot get event descriptors; raise the limit on open files")]
    Events(#[source] io::Error),
    /// The accelerator gives no interrupt vectors.
    #[error("Cannot get interrupt vectors")]
    Vectors(#[source] AccelError),
    /// The configuration space overflows.
    #[error("Cannot describe the device in PCI configuration space")]
    Pci(#[from] PciError),
    /// More queues than notification addresses.
    #[error("{0} queues are more than the transport has room for")]
    TooManyQueues(usize),
}

struct PciInterrupt {
    msix: Arc<Msix>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: Mutex<u8>,
    pin: OnceLock<IntxPin>,
    pin_disabled: AtomicBool,
}

impl PciInterrupt {
    fn raise(&self, vector: &AtomicU16, isr: u8) {
        if self.msix.enabled() {
            self.msix.trigger(usize::from(vector.load(Ordering::Acquire)));
        } else {
            let mut bits = self.isr.lock();
            *bits |= isr;
            self.drive_pin(*bits);
        }
    }

    fn drive_pin(&self, isr: u8) {
        if let Some(pin) = self.pin.get() {
            let wired = !self.msix.enabled() && !self.pin_disabled.load(Ordering::Acquire);
            pin.set_level(isr != 0 && wired);
        }
    }

    /// The guest reads the ISR: that clears it.
    fn take_isr(&self) -> u8 {
        let mut bits = self.isr.lock();
        self.drive_pin(0);
        std::mem::take(&mut *bits)
    }

    fn vector(&self, queue: Option<usize>) -> Option<&AtomicU16> {
        match queue {
            None => Some(&self.config_vector),
            Some(index) => self.queue_vectors.get(index),
        }
    }

    fn set_vector(&self, queue: Option<usize>, value: u16) {
        if let Some(vector) = self.vector(queue) {
            let exists = usize::from(value) < self.msix.vectors();
            vector.store(if exists { value } else { NO_VECTOR }, Ordering::Release);
        }
    }

    fn reset(&self) {
        self.set_vector(None, NO_VECTOR);
        for index in 0..self.queue_vectors.len() {
            self.set_vector(Some(index), NO_VECTOR);
        }
        self.take_isr();
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, index: usize) {
        if let Some(vector) = self.queue_vectors.get(index) {
            self.raise(vector, ISR_QUEUE);
        }
    }

    fn config(&self) {
        self.raise(&self.config_vector, ISR_CONFIG);
    }

    fn queue_event(&self, index: usize) -> io::Result<Option<OwnedFd>> {
        if !self.msix.enabled() {
            return Ok(None);
        }
        match self.queue_vectors.get(index) {
            Some(vector) => self.msix.event_fd(usize::from(vector.load(Ordering::Acquire))),
            None => Ok(None),
        }
    }
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    virtio: Virtio,
    interrupt: Arc<PciInterrupt>,
    config: Mutex<ConfigSpace>,
    /// Offset of the capability through which BARs are reached from configuration space.
    window: usize,
    doorbells: Doorbells,
    /// Where the BAR is.
    base: Mutex<Option<u64>>,
}

/// Base class, subclass and interface by device ID.
fn class(device_type: u32) -> u32 {
    match device_type {
        1 | 19 => 0x02_0000,
        2 => 0x01_8000,
        3 => 0x07_8000,
        _ => 0xff_0000,
    }
}

fn capability(kind: u8, offset: u64, len: u64) -> Vec<u8> {
    // The length byte counts the ID and link bytes that precede the body.
    let mut body = vec![16, kind, BAR as u8, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    body
}

impl VirtioPci {
    /// A PCI function for `device`, with one MSI-X vector a queue and one for configuration changes.
    ///
    /// # Errors
    /// Fails when the host or the accelerator is out of descriptors or vectors, or the device has too many queues.
    pub fn new(
        vm: &Arc<dyn Vm>,
        memory: GuestMemory,
        device: Arc<dyn VirtioDevice>,
    ) -> Result<Arc<Self>, VirtioPciError> {
        let queues = device.queue_sizes().len();
        if queues > MAX_QUEUES {
            return Err(VirtioPciError::TooManyQueues(queues));
        }
        let device_type = device.device_type();
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1040 + device_type as u16,
            revision: 1,
            class: class(device_type),
            subsystem_vendor: 0x1af4,
            subsystem: 0x0040,
            interrupt_pin: 1,
        });
        config.add_bar(BAR, BarKind::Memory64 { prefetchable: false }, BAR_SIZE)?;
        let msix = Arc::new(Msix::new(&**vm, queues + 1).map_err(VirtioPciError::Vectors)?);
        config.add_msix(Arc::clone(&msix), BAR as u8, TABLE as u32, PENDING as u32)?;
        for (kind, offset) in
            [(CAPABILITY_COMMON, COMMON), (CAPABILITY_ISR, ISR), (CAPABILITY_DEVICE, DEVICE)]
        {
            config.add_capability(VENDOR_CAPABILITY, &capability(kind, offset, PAGE), &[])?;
        }
        let mut notify = capability(CAPABILITY_NOTIFY, NOTIFY, PAGE);
        notify[0] += 4;
        notify.extend((NOTIFY_STRIDE as u32).to_le_bytes());
        config.add_capability(VENDOR_CAPABILITY, &notify, &[])?;
        let mut window = capability(CAPABILITY_PCI, 0, 0);
        window[0] += 4;
        window.extend([0; 4]);
        // The guest writes the BAR number, offset, length and data.
        let mut writable = [0xff; 18];
        writable[..2].fill(0);
        writable[3..6].fill(0);
        let window = config.add_capability(VENDOR_CAPABILITY, &window, &writable)?;
        let interrupt = Arc::new(PciInterrupt {
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: Mutex::new(0),
            pin: OnceLock::new(),
            pin_disabled: AtomicBool::new(false),
        });
        let virtio = Virtio::new(device, memory, Arc::clone(&interrupt) as Arc<dyn Interrupt>)
            .map_err(VirtioPciError::Events)?;
        Ok(Arc::new(Self {
            virtio,
            interrupt,
            config: Mutex::new(config),
            window,
            doorbells: Doorbells::new(vm),
            base: Mutex::new(None),
        }))
    }

    /// The device and its negotiation state.
    pub fn virtio(&self) -> &Virtio {
        &self.virtio
    }

    fn common(&self, offset: u64) -> Option<Register> {
        Some(match offset {
            0x00 => Register::DeviceFeatureSelect,
            0x04 => Register::DeviceFeature,
            0x08 => Register::DriverFeatureSelect,
            0x0c => Register::DriverFeature,
            0x12 => Register::Queues,
            0x14 => Register::Status,
            0x15 => Register::Generation,
            0x16 => Register::QueueSelect,
            0x18 => Register::QueueSize,
            0x1c => Register::QueueEnable,
            0x20 => Register::QueueAddress(QueueArea::Descriptors, false),
            0x24 => Register::QueueAddress(QueueArea::Descriptors, true),
            0x28 => Register::QueueAddress(QueueArea::Driver, false),
            0x2c => Register::QueueAddress(QueueArea::Driver, true),
            0x30 => Register::QueueAddress(QueueArea::Device, false),
            0x34 => Register::QueueAddress(QueueArea::Device, true),
            0x3a => Register::QueueReset,
            _ => return None,
        })
    }

    fn selected_vector(&self, offset: u64) -> Option<usize> {
        (offset == 0x1a).then(|| usize::from(self.virtio.queue_select()))
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        if data.len() == 8 {
            let (low, high) = data.split_at_mut(4);
            self.read_common(offset, low);
            return self.read_common(offset + 4, high);
        }
        let value = match offset {
            0x10 | 0x1a => {
                let vector = self.interrupt.vector(self.selected_vector(offset));
                u32::from(vector.map_or(NO_VECTOR, |v| v.load(Ordering::Acquire)))
            }
            // Each queue's notification address has its index.
            0x1e => u32::from(self.virtio.queue_select()),
            _ => self.common(offset).map_or(0, |r| self.virtio.read(r)),
        };
        let n = data.len().min(4);
        data[..n].copy_from_slice(&value.to_le_bytes()[..n]);
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        if data.len() == 8 {
            self.write_common(offset, &data[..4]);
            return self.write_common(offset + 4, &data[4..]);
        }
        let mut bytes = [0; 4];
        let n = data.len().min(4);
        bytes[..n].copy_from_slice(&data[..n]);
        let value = u32::from_le_bytes(bytes);
        match offset {
            0x10 | 0x1a => {
                let queue = self.selected_vector(offset);
                self.interrupt.set_vector(queue, value as u16);
                if queue.is_some() {
                    self.virtio.refresh();
                }
            }
            _ => {
                if let Some(register) = self.common(offset) {
                    self.virtio.write(register, value);
                    if register == Register::Status {
                        match value {
                            0 => self.interrupt.reset(),
                            _ => self.add_doorbells(),
                        }
                    }
                }
            }
        }
    }

    /// The BAR range that the configuration window shows now, when it is a legal access.
    fn window_target(&self) -> Option<(u64, usize)> {
        let mut registers = [0; 16];
        self.config.lock().read(self.window, &mut registers);
        let word = |at: usize| {
            u32::from_le_bytes([registers[at], registers[at + 1], registers[at + 2], registers[at + 3]])
        };
        let (offset, len) = (u64::from(word(8)), word(12) as usize);
        let legal = usize::from(registers[4]) == BAR && matches!(len, 1 | 2 | 4);
        (legal && offset.is_multiple_of(len as u64) && offset + len as u64 <= BAR_SIZE)
            .then_some((offset, len))
    }

    /// Lets the accelerator signal notifications once the driver is ready.
    fn add_doorbells(&self) {
        if let Some(base) = *self.base.lock() {
            let address = |index| IoAddress::Mmio(base + NOTIFY + index as u64 * NOTIFY_STRIDE);
            self.doorbells.add(&self.virtio, |index| (address(index), 2, None));
        }
    }
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }

    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        match offset & !(PAGE - 1) {
            COMMON => self.read_common(offset, data),
            ISR => {
                data.fill(0);
                if offset == ISR {
                    data[0] = self.interrupt.take_isr();
                }
            }
            DEVICE => self.virtio.device().read_config(offset - DEVICE, data),
            PENDING => self.interrupt.msix.read_pending(offset - PENDING, data),
            TABLE.. => self.interrupt.msix.read_table(offset - TABLE, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
        match offset & !(PAGE - 1) {
            COMMON => self.write_common(offset, data),
            DEVICE => self.virtio.device().write_config(offset - DEVICE, data),
            NOTIFY => self.virtio.notify((offset - NOTIFY) / NOTIFY_STRIDE),
            TABLE.. => self.interrupt.msix.write_table(offset - TABLE, data),
            _ => {}
        }
    }

    fn bar_mapped(&self, _bar: usize, base: Option<u64>) {
        {
            let mut current = self.base.lock();
            self.doorbells.remove(&self.virtio);
            *current = base;
        }
        self.add_doorbells();
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) -> bool {
        if offset != self.window + 16 {
            return false;
        }
        match self.window_target() {
            Some((target, len)) if len <= data.len() => {
                data.fill(0);
                self.bar_read(BAR, target, &mut data[..len]);
                true
            }
            _ => false,
        }
    }

    fn config_written(&self, offset: usize, _len: usize) {
        let disabled = self.config.lock().command().has(Command::INTX_DISABLE);
        self.interrupt.pin_disabled.store(disabled, Ordering::Release);
        self.interrupt.drive_pin(*self.interrupt.isr.lock());
        if offset == self.window + 16
            && let Some((target, len)) = self.window_target()
        {
            let mut data = [0; 4];
            self.config.lock().read(self.window + 16, &mut data);
            self.bar_write(BAR, target, &data[..len]);
        }
    }

    fn placed(&self, address: PciAddress) {
        self.interrupt.msix.set_requester(u16::from(address.devfn()));
    }

    fn connect_intx(&self, pin: IntxPin) {
        // Called once, by the root that the function was added to.
        let _ = self.interrupt.pin.set(pin);
    }
}

impl Lifecycle for VirtioPci {
    fn start(&self) -> Result<(), LifecycleError> {
        self.virtio.start();
        // A driver whose state was loaded is ready already.
        self.add_doorbells();
        Ok(())
    }

    fn pause(&self) -> Result<(), LifecycleError> {
        self.virtio.pause();
        Ok(())
    }

    fn reset(&self) {
        self.virtio.reset();
        self.interrupt.reset();
        self.interrupt.msix.reset();
        self.config.lock().reset();
    }

    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        let load = |v: &AtomicU16| v.load(Ordering::Acquire);
        Ok(serde_json::json!({
            "virtio": self.virtio.save()?,
            "config": self.config.lock().save(),
            "msix": self.interrupt.msix.save(),
            "config_vector": load(&self.interrupt.config_vector),
            "queue_vectors": self.interrupt.queue_vectors.iter().map(load).collect::<Vec<_>>(),
            "isr": *self.interrupt.isr.lock(),
        }))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
        let saved: Saved = serde::Deserialize::deserialize(state)
            .map_err(|e: serde_json::Error| LifecycleError::State(e.to_string()))?;
        if saved.queue_vectors.len() != self.interrupt.queue_vectors.len() {
            return Err(LifecycleError::State("its queues are others".into()));
        }
        self.virtio.restore(&saved.virtio)?;
        self.interrupt.msix.restore(&saved.msix)?;
        self.config.lock().restore(&saved.config)?;
        self.interrupt.set_vector(None, saved.config_vector);
        for (index, vector) in saved.queue_vectors.iter().enumerate() {
            self.interrupt.set_vector(Some(index), *vector);
        }
        *self.interrupt.isr.lock() = saved.isr;
        self.config_written(0, 0);
        Ok(())
    }
}

#[derive(serde::Deserialize)]
struct Saved {
    virtio: serde_json::Value,
    config: Vec<u8>,
    msix: serde_json::Value,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.doorbells.remove(&self.virtio);
    }
}
