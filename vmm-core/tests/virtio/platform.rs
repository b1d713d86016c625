//! A virtual machine without CPUs: interrupts and doorbells end in event descriptors that tests watch.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use vmm_core::accel::{AccelError, IoAddress, Vcpu, Vm};
use vmm_core::interrupt::{IrqLine, Msi, MsiVector};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Waits until `event` is signalled. The limit only turns a hang into a failure.
pub fn wait(event: &EventFd) {
    wait_fd(event.as_raw_fd());
    let _ = event.read();
}

pub fn wait_fd(fd: i32) {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    let n = unsafe { libc::poll(&mut poll, 1, 30_000) };
    assert_eq!(n, 1, "nothing happened for 30 seconds");
}

pub struct Vector {
    pub message: Mutex<Option<Msi>>,
    pub event: EventFd,
    pub sent: AtomicUsize,
}

impl MsiVector for Vector {
    fn set_message(&self, message: Option<Msi>) {
        *self.message.lock() = message;
    }
    fn trigger(&self) {
        if self.message.lock().is_some() {
            self.sent.fetch_add(1, Ordering::SeqCst);
            self.event.write(1).unwrap();
        }
    }
    fn event_fd(&self) -> io::Result<OwnedFd> {
        // SAFETY: the descriptor is open while `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }.try_clone_to_owned()
    }
}

pub struct Line {
    pub level: AtomicBool,
    pub event: EventFd,
}

impl Line {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { level: AtomicBool::new(false), event: EventFd::new(EFD_NONBLOCK).unwrap() })
    }
}

impl IrqLine for Line {
    fn set_level(&self, asserted: bool) {
        if !self.level.swap(asserted, Ordering::SeqCst) && asserted {
            self.event.write(1).unwrap();
        }
    }
}

struct Doorbell {
    address: IoAddress,
    len: u32,
    value: Option<u64>,
    event: EventFd,
}

/// The VM that devices see.
#[derive(Default)]
pub struct TestVm {
    pub vectors: Mutex<Vec<Arc<Vector>>>,
    /// Whether doorbells are accepted.
    pub accelerated: bool,
    doorbells: Mutex<Vec<Doorbell>>,
}

impl TestVm {
    pub fn new(accelerated: bool) -> Arc<Self> {
        Arc::new(Self { accelerated, ..Default::default() })
    }

    /// Does what KVM does with a write: true when a doorbell took it.
    pub fn ring(&self, address: u64, data: &[u8]) -> bool {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let doorbells = self.doorbells.lock();
        let hit = doorbells.iter().find(|d| {
            d.address == IoAddress::Mmio(address)
                && d.len as usize == data.len()
                && d.value.is_none_or(|v| v == value)
        });
        hit.inspect(|d| d.event.write(1).unwrap()).is_some()
    }

    pub fn doorbells(&self) -> usize {
        self.doorbells.lock().len()
    }
}

impl Vm for TestVm {
    fn create_vcpu(&self, _id: u32) -> Result<Box<dyn Vcpu>, AccelError> {
        Err(AccelError::Unsupported("no CPUs here".into()))
    }
    fn irq_line(&self, _gsi: u32) -> Result<Arc<dyn IrqLine>, AccelError> {
        Ok(Line::new())
    }
    fn msi_vector(&self) -> Result<Arc<dyn MsiVector>, AccelError> {
        let vector = Arc::new(Vector {
            message: Mutex::new(None),
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
            sent: AtomicUsize::new(0),
        });
        self.vectors.lock().push(vector.clone());
        Ok(vector)
    }
    fn send_msi(&self, _message: Msi) -> Result<(), AccelError> {
        Ok(())
    }
    fn add_doorbell(
        &self,
        address: IoAddress,
        len: u32,
        value: Option<u64>,
        event: BorrowedFd<'_>,
    ) -> Result<bool, AccelError> {
        if self.accelerated {
            let fd = event.try_clone_to_owned().unwrap();
            let event = {
                use std::os::fd::{FromRawFd, IntoRawFd};
                // SAFETY: the fresh duplicate is owned by nobody else.
                unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
            };
            self.doorbells.lock().push(Doorbell { address, len, value, event });
        }
        Ok(self.accelerated)
    }
    fn remove_doorbell(
        &self,
        address: IoAddress,
        len: u32,
        value: Option<u64>,
        _event: BorrowedFd<'_>,
    ) -> Result<(), AccelError> {
        let mut doorbells = self.doorbells.lock();
        let at = doorbells.iter().position(|d| (d.address, d.len, d.value) == (address, len, value));
        doorbells.remove(at.expect("no such doorbell"));
        Ok(())
    }
    fn set_dirty_tracking(&self, _on: bool) -> Result<(), AccelError> {
        Ok(())
    }
    fn take_dirty_pages(&self, _index: usize) -> Result<Vec<u64>, AccelError> {
        Ok(Vec::new())
    }
}
