//! The software accelerator: `softcpu` processors with interrupt controllers and timers in software.
//!
//! ```text
//!  devices ─ IrqLine ─► IO-APIC, PIC ─┐
//!  devices ─ MsiVector ───────────────┼─► local APIC ─► vCPU (softcpu, one host thread each)
//!  other vCPUs ─ IPI ─────────────────┘
//! ```
//! Threads beside those of the vCPUs: the interval timer's (while a guest uses it) and one that waits for interrupt
//! event descriptors (while a back-end in another process has one). All end with the VM.

mod bus;
mod ioapic;
mod irqfd;
mod lapic;
mod pic;
mod pit;
mod timer;
mod vcpu;
mod walk;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use softcpu::{Clock, CpuConfig, CpuModel};

use self::bus::SoftBus;
use self::irqfd::IrqFds;
use self::lapic::{Apics, Message};
use self::pit::Pit;
use self::vcpu::SoftVcpu;
use super::{AccelError, AccelKind, ChipsetState, Hypervisor, IOAPIC_PINS, IoAddress, Vcpu, Vm, VmSpec};
use crate::interrupt::{IrqLine, Msi, MsiVector};
use crate::memory::{GuestMemory, WriteObserver};

/// Frequency of the time-stamp counter, unless the guest knows another: 1 GHz, so that a tick is a nanosecond.
const TSC_KHZ: u32 = 1_000_000;
/// APIC IDs above are broadcast addresses.
const MAX_VCPUS: u32 = 255;

/// The software accelerator. It works on every host.
#[derive(Clone, Debug, Default)]
pub struct SoftHypervisor {
    _private: (),
}

impl SoftHypervisor {
    /// The accelerator.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Hypervisor for SoftHypervisor {
    fn kind(&self) -> AccelKind {
        AccelKind::Soft
    }

    fn create_vm(&self, spec: VmSpec) -> Result<Arc<dyn Vm>, AccelError> {
        if spec.vcpus == 0 || spec.vcpus > MAX_VCPUS {
            return Err(AccelError::Unsupported(format!(
                "{} vCPUs; give the guest 1 to {MAX_VCPUS}",
                spec.vcpus
            )));
        }
        let ram = ram(&spec.memory)?;
        spec.memory.set_write_observer(Some(Box::new(Observer(Arc::downgrade(&ram)))));
        let clock = Arc::new(Clock::host(spec.tsc_khz.unwrap_or(TSC_KHZ)));
        let apics = Apics::new(spec.vcpus);
        let pit = Pit::new(clock.clone(), Arc::new(Line::new(apics.clone(), 0)));
        let bus = Arc::new(SoftBus::new(spec.bus, apics.clone(), pit.clone()));
        Ok(Arc::new(SoftVm {
            memory: spec.memory,
            ram,
            clock,
            apics,
            pit,
            bus,
            tracking: AtomicBool::new(false),
            vcpus: spec.vcpus,
            model: spec.model.unwrap_or_default(),
            created: Mutex::new(vec![false; spec.vcpus as usize]),
            irqfds: Arc::default(),
        }))
    }
}

/// RAM as software processors see it. They must hold on to `memory` beside it.
pub(super) fn ram(memory: &GuestMemory) -> Result<Arc<softcpu::GuestMemory>, AccelError> {
    let ram = Arc::new(softcpu::GuestMemory::new());
    for region in memory.regions() {
        // SAFETY: the region's mapping lives as long as `memory`, which VMs and vCPUs hold on to; nobody holds Rust
        // references to guest RAM.
        unsafe { ram.add_region(region.guest_address(), region.size(), region.host_ptr(), false) }
            .map_err(|e| AccelError::Unsupported(e.to_string()))?;
    }
    Ok(ram)
}

/// Tells the processors of what devices write to RAM.
struct Observer(Weak<softcpu::GuestMemory>);

impl WriteObserver for Observer {
    fn written(&self, address: u64, len: u64) {
        if let Some(ram) = self.0.upgrade() {
            ram.notify_written(address, len);
        }
    }
}

/// A machine of the software accelerator.
struct SoftVm {
    memory: GuestMemory,
    ram: Arc<softcpu::GuestMemory>,
    clock: Arc<Clock>,
    apics: Arc<Apics>,
    pit: Arc<Pit>,
    bus: Arc<SoftBus>,
    /// Dirty pages are recorded.
    tracking: AtomicBool,
    vcpus: u32,
    model: CpuModel,
    created: Mutex<Vec<bool>>,
    irqfds: Arc<IrqFds>,
}

impl Drop for SoftVm {
    fn drop(&mut self) {
        // Guest RAM may outlive the VM; nobody has to hear of its changes any more.
        self.memory.set_write_observer(None);
    }
}

impl Vm for SoftVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, AccelError> {
        match self.created.lock().get_mut(id as usize) {
            Some(created) if !*created => *created = true,
            _ => return Err(AccelError::Unsupported(format!("vCPU {id}: it exists or is one too many"))),
        }
        let Some(lapic) = self.apics.lapic(id) else {
            return Err(AccelError::Unsupported(format!("vCPU {id}: no such local APIC")));
        };
        let config = CpuConfig {
            index: id,
            apic_id: id,
            processors: self.vcpus,
            bootstrap: id == 0,
            model: self.model,
            ..CpuConfig::new(self.clock.clone())
        };
        Ok(Box::new(SoftVcpu::new(
            config,
            self.memory.clone(),
            self.ram.clone(),
            &self.bus,
            &self.apics,
            lapic,
        )))
    }

    fn irq_line(&self, gsi: u32) -> Result<Arc<dyn IrqLine>, AccelError> {
        if gsi >= IOAPIC_PINS {
            return Err(AccelError::Unsupported(format!("interrupt input {gsi} of {IOAPIC_PINS}")));
        }
        Ok(Arc::new(Line::new(self.apics.clone(), gsi)))
    }

    fn msi_vector(&self) -> Result<Arc<dyn MsiVector>, AccelError> {
        Ok(Arc::new_cyclic(|this| SoftMsi {
            apics: self.apics.clone(),
            irqfds: self.irqfds.clone(),
            message: Mutex::new(None),
            this: this.clone(),
        }))
    }

    fn send_msi(&self, message: Msi) -> Result<(), AccelError> {
        let decoded = Message::from_msi(message);
        match decoded {
            Some(m) if self.apics.deliver(&m) => Ok(()),
            _ => Err(AccelError::Unsupported(format!(
                "a message to {:#x}: no local APIC there",
                message.address
            ))),
        }
    }

    fn add_doorbell(
        &self,
        _address: IoAddress,
        _len: u32,
        _value: Option<u64>,
        _event: BorrowedFd<'_>,
    ) -> Result<bool, AccelError> {
        // The bus is called on the vCPU's thread without any switch of context: a descriptor would only be slower.
        Ok(false)
    }

    fn remove_doorbell(
        &self,
        _address: IoAddress,
        _len: u32,
        _value: Option<u64>,
        _event: BorrowedFd<'_>,
    ) -> Result<(), AccelError> {
        Ok(())
    }

    fn set_dirty_tracking(&self, on: bool) -> Result<(), AccelError> {
        self.ram.set_dirty_tracking(on);
        self.tracking.store(on, Ordering::SeqCst);
        Ok(())
    }

    fn take_dirty_pages(&self, index: usize) -> Result<Vec<u64>, AccelError> {
        if !self.tracking.load(Ordering::SeqCst) {
            return Err(AccelError::Unsupported("dirty pages: tracking is off".into()));
        }
        let Some(region) = self.memory.regions().get(index) else {
            return Err(AccelError::Unsupported(format!("dirty pages of region {index}: there is none")));
        };
        self.ram
            .take_dirty(region.guest_address(), region.size())
            .map_err(|e| AccelError::Unsupported(e.to_string()))
    }

    fn chipset_state(&self) -> Result<ChipsetState, AccelError> {
        Ok(ChipsetState {
            pics: self.apics.pic.save(),
            ioapic: self.apics.ioapic.save(),
            pit: Some(self.pit.save()),
            clock: self.clock.system_time(),
        })
    }

    fn set_chipset_state(&self, state: &ChipsetState) -> Result<(), AccelError> {
        self.apics.ioapic.load(&state.ioapic)?;
        self.clock.set_system_time(state.clock);
        self.apics.pic.load(&state.pics);
        if let Some(pit) = &state.pit {
            self.pit.load(pit);
        }
        Ok(())
    }
}

/// A source of a wired interrupt: it reaches the IO-APIC pin and, below 16, the PIC input of the same number.
struct Line {
    apics: Arc<Apics>,
    gsi: u32,
    asserted: AtomicBool,
}

impl Line {
    fn new(apics: Arc<Apics>, gsi: u32) -> Self {
        Self { apics, gsi, asserted: AtomicBool::new(false) }
    }
}

impl IrqLine for Line {
    fn set_level(&self, asserted: bool) {
        if self.asserted.swap(asserted, Ordering::SeqCst) == asserted {
            return;
        }
        if self.gsi < 16 {
            self.apics.pic.set(self.gsi, asserted);
        }
        self.apics.ioapic.set_source(self.gsi, asserted);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.set_level(false);
    }
}

/// A message-signalled interrupt vector.
struct SoftMsi {
    apics: Arc<Apics>,
    irqfds: Arc<IrqFds>,
    message: Mutex<Option<Msi>>,
    this: Weak<SoftMsi>,
}

impl MsiVector for SoftMsi {
    fn set_message(&self, message: Option<Msi>) {
        *self.message.lock() = message;
    }

    fn trigger(&self) {
        let message = *self.message.lock();
        if let Some(message) = message.and_then(Message::from_msi) {
            self.apics.deliver(&message);
        }
    }

    fn event_fd(&self) -> std::io::Result<OwnedFd> {
        let this = self.this.upgrade().ok_or(std::io::ErrorKind::NotConnected)?;
        self.irqfds.add(&this)
    }
}
