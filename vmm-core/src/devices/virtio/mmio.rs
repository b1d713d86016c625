//! The memory-mapped transport (virtio 1.2, section 4.2).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;

use super::device::{Interrupt, VirtioDevice};
use super::doorbells::Doorbells;
use super::state::{QueueArea, Register, Virtio};
use crate::accel::{IoAddress, Vm};
use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::lifecycle::{Lifecycle, LifecycleError};
use crate::memory::GuestMemory;

/// Size of the register window in bytes.
pub const MMIO_SIZE: u64 = 0x1000;
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"NCRE");
const NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const CONFIG: u64 = 0x100;
const USED: u32 = 1;
const CONFIG_CHANGED: u32 = 2;

struct MmioInterrupt {
    line: Arc<dyn IrqLine>,
    status: Mutex<u32>,
}

impl MmioInterrupt {
    fn raise(&self, bit: u32) {
        let mut status = self.status.lock();
        if *status != 0 {
            // A new edge for an edge-triggered input; a level-triggered one does not notice.
            self.line.set_level(false);
        }
        *status |= bit;
        self.line.set_level(true);
    }

    fn acknowledge(&self, bits: u32) {
        let mut status = self.status.lock();
        *status &= !bits;
        if *status == 0 {
            self.line.set_level(false);
        }
    }
}

impl Interrupt for MmioInterrupt {
    fn queue(&self, _index: usize) {
        self.raise(USED);
    }

    fn config(&self) {
        self.raise(CONFIG_CHANGED);
    }

    fn queue_event(&self, _index: usize) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }
}

/// A virtio device behind a window of [`MMIO_SIZE`] bytes and one wired interrupt.
pub struct VirtioMmio {
    virtio: Virtio,
    interrupt: Arc<MmioInterrupt>,
    base: u64,
    doorbells: Doorbells,
}

impl VirtioMmio {
    /// A device whose window the caller registers at `base` of the MMIO bus.
    ///
    /// # Errors
    /// Fails when the host gives no event descriptors.
    pub fn new(
        vm: &Arc<dyn Vm>,
        memory: GuestMemory,
        device: Arc<dyn VirtioDevice>,
        line: Arc<dyn IrqLine>,
        base: u64,
    ) -> io::Result<Arc<Self>> {
        let interrupt = Arc::new(MmioInterrupt { line, status: Mutex::new(0) });
        let virtio = Virtio::new(device, memory, Arc::clone(&interrupt) as Arc<dyn Interrupt>)?;
        Ok(Arc::new(Self { virtio, interrupt, base, doorbells: Doorbells::new(vm) }))
    }

    /// Lets the accelerator signal notifications once the driver is ready.
    fn add_doorbells(&self) {
        let address = IoAddress::Mmio(self.base + NOTIFY);
        self.doorbells.add(&self.virtio, |index| (address, 4, Some(index as u64)));
    }

    /// The device and its negotiation state.
    pub fn virtio(&self) -> &Virtio {
        &self.virtio
    }

    fn read32(&self, offset: u64) -> u32 {
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.virtio.device().device_type(),
            0x00c => VENDOR,
            INTERRUPT_STATUS => *self.interrupt.status.lock(),
            // No shared memory region: its length and address read as all ones.
            0x0b0..=0x0bc => u32::MAX,
            _ => register(offset).map_or(0, |r| self.virtio.read(r)),
        }
    }
}

fn register(offset: u64) -> Option<Register> {
    Some(match offset {
        0x010 => Register::DeviceFeature,
        0x014 => Register::DeviceFeatureSelect,
        0x020 => Register::DriverFeature,
        0x024 => Register::DriverFeatureSelect,
        0x030 => Register::QueueSelect,
        0x034 => Register::QueueMax,
        0x038 => Register::QueueSize,
        0x044 => Register::QueueEnable,
        0x070 => Register::Status,
        0x080 => Register::QueueAddress(QueueArea::Descriptors, false),
        0x084 => Register::QueueAddress(QueueArea::Descriptors, true),
        0x090 => Register::QueueAddress(QueueArea::Driver, false),
        0x094 => Register::QueueAddress(QueueArea::Driver, true),
        0x0a0 => Register::QueueAddress(QueueArea::Device, false),
        0x0a4 => Register::QueueAddress(QueueArea::Device, true),
        0x0c0 => Register::QueueReset,
        0x0fc => Register::Generation,
        _ => return None,
    })
}

impl BusDevice for VirtioMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            self.virtio.device().read_config(offset - CONFIG, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read32(offset).to_le_bytes());
        } else {
            data.fill(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            return self.virtio.device().write_config(offset - CONFIG, data);
        }
        let &[a, b, c, d] = data else { return };
        let value = u32::from_le_bytes([a, b, c, d]);
        match offset {
            NOTIFY => self.virtio.notify(u64::from(value)),
            INTERRUPT_ACK => self.interrupt.acknowledge(value),
            _ => {
                if let Some(register) = register(offset) {
                    self.virtio.write(register, value);
                    if register == Register::Status {
                        match value {
                            0 => self.interrupt.acknowledge(u32::MAX),
                            _ => self.add_doorbells(),
                        }
                    }
                }
            }
        }
    }
}

impl Lifecycle for VirtioMmio {
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
        self.interrupt.acknowledge(u32::MAX);
    }

    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        let interrupt = *self.interrupt.status.lock();
        Ok(serde_json::json!({ "virtio": self.virtio.save()?, "interrupt": interrupt }))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
        let interrupt = state["interrupt"].as_u64().and_then(|i| u32::try_from(i).ok());
        let interrupt =
            interrupt.ok_or_else(|| LifecycleError::State("its interrupt is malformed".into()))?;
        self.virtio.restore(&state["virtio"])?;
        *self.interrupt.status.lock() = interrupt;
        self.interrupt.line.set_level(interrupt != 0);
        Ok(())
    }
}

impl Drop for VirtioMmio {
    fn drop(&mut self) {
        self.doorbells.remove(&self.virtio);
    }
}
