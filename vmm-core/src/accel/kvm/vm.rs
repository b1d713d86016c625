//! A virtual machine.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, IoEventAddress, VmFd};
use parking_lot::Mutex;

use super::cpuid::{self, Topology};
use super::dirty_ring::DirtyRings;
use super::interrupts::{self, Line, MsiRoutes, Vector};
use super::vcpu::KvmVcpu;
use super::{Host, KvmHypervisor, chipset, failed, os, sys};
use crate::accel::{
    AccelError, ChipsetState, CpuModel, IOAPIC_PINS, IoAddress, IoBus, PicState, Vcpu, Vm, VmSpec, soft,
};
use crate::interrupt::{IrqLine, Msi, MsiVector};
use crate::memory::GuestMemory;

/// Three pages that VMX without unrestricted guests needs below 4 GiB, and the page of its identity map: below the
/// firmware and away from the interrupt controllers, where no VM has RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A virtual machine on KVM.
pub struct KvmVm {
    shared: Arc<Shared>,
    tracking: AtomicBool,
}

/// What the VM's vCPUs and interrupt sources share.
pub struct Shared {
    pub fd: VmFd,
    pub memory: GuestMemory,
    pub bus: Arc<dyn IoBus>,
    /// RAM for the software CPUs that assist the vCPUs, if they are to.
    pub assistants_ram: Option<Arc<softcpu::GuestMemory>>,
    pub routes: Mutex<MsiRoutes>,
    /// Where vCPUs report what they write; without them the kernel has a dirty log.
    pub dirty_rings: Option<DirtyRings>,
    /// Whether the kernel queues some writes, and who passes them on at the moment.
    pub coalesces: AtomicBool,
    pub coalesced_turn: Mutex<()>,
    pub(super) host: Arc<Host>,
    pub vcpus: u32,
    model: Option<CpuModel>,
    tsc_khz: Option<u32>,
}

impl Shared {
    /// Lets vCPUs go on whose dirty rings are full.
    pub fn harvest_dirty_rings(&self) -> Result<(), AccelError> {
        match &self.dirty_rings {
            Some(rings) => rings.harvest(&self.fd).map_err(os("KVM_RESET_DIRTY_RINGS")),
            None => Ok(()),
        }
    }
}

impl KvmVm {
    /// How many entries the dirty ring of each vCPU has; `None` when dirty pages come from the dirty log.
    pub fn dirty_ring_entries(&self) -> Option<u32> {
        self.shared.dirty_rings.as_ref().map(DirtyRings::entries)
    }

    pub(super) fn new(host: &Arc<Host>, spec: VmSpec) -> Result<Arc<Self>, AccelError> {
        let most = host.kvm.get_max_vcpus().min(255) as u32;
        if spec.vcpus == 0 || spec.vcpus > most {
            return Err(AccelError::Unsupported(format!("{} vCPUs; ask for 1 to {most}", spec.vcpus)));
        }
        if spec.model.is_some() && KvmHypervisor::is_software() {
            let why =
                "a CPU model: guests of the module kvm_pvm execute CPUID themselves; leave the model out";
            return Err(AccelError::Unsupported(why.into()));
        }
        if spec.memory.regions().len() > host.kvm.get_nr_memslots() {
            return Err(AccelError::Unsupported("that many memory regions".into()));
        }
        let fd = loop {
            match host.kvm.create_vm() {
                // The kernel gives up when a signal arrives meanwhile.
                Err(e) if e.errno() == libc::EINTR => {}
                other => break other.map_err(failed("KVM_CREATE_VM"))?,
            }
        };
        if host.kvm.check_extension(Cap::SetIdentityMapAddr) {
            fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        }
        fd.set_tss_address(TSS_ADDRESS).map_err(failed("KVM_SET_TSS_ADDR"))?;
        // Memory before the interrupt controllers: each new memory slot waits until nobody uses the old ones, and with
        // the controllers' registrations still queued in the kernel that wait takes milliseconds instead of 0.1.
        for (slot, region) in spec.memory.regions().iter().enumerate() {
            sys::set_memory(&fd, slot as u32, region, false).map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        fd.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        chipset::write_pics(&fd, &PicState::at_power_on())?;
        if host.options.pit {
            let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            fd.create_pit2(config).map_err(failed("KVM_CREATE_PIT2"))?;
        }
        let assist = host.options.assist;
        let assistants_ram = if assist { Some(soft::ram(&spec.memory)?) } else { None };
        let dirty_rings = DirtyRings::enable(&host.kvm, &fd, host.options.dirty_ring, &spec.memory);
        let shared = Arc::new(Shared {
            fd,
            dirty_rings,
            coalesces: AtomicBool::new(false),
            coalesced_turn: Mutex::new(()),
            assistants_ram,
            memory: spec.memory,
            bus: spec.bus,
            routes: Mutex::default(),
            host: Arc::clone(host),
            vcpus: spec.vcpus,
            model: spec.model,
            tsc_khz: spec.tsc_khz,
        });
        Ok(Arc::new(Self { shared, tracking: AtomicBool::new(false) }))
    }
}

impl Vm for KvmVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, AccelError> {
        let shared = &self.shared;
        if id >= shared.vcpus {
            return Err(AccelError::Unsupported(format!("vCPU {id} of {}", shared.vcpus)));
        }
        let topology = Topology {
            apic_id: id,
            cpus: shared.vcpus,
            tsc_deadline: shared.host.kvm.check_extension(Cap::TscDeadlineTimer),
            model: shared.model,
        };
        let cpuid = cpuid::for_vcpu(shared.host.supported_cpuid()?, topology)?;
        let vcpu = KvmVcpu::new(Arc::clone(shared), id, &cpuid)?;
        if let Some(khz) = shared.tsc_khz {
            vcpu.set_tsc_khz(khz)?;
        }
        Ok(Box::new(vcpu))
    }

    fn irq_line(&self, gsi: u32) -> Result<Arc<dyn IrqLine>, AccelError> {
        if gsi >= IOAPIC_PINS {
            return Err(AccelError::Unsupported(format!("interrupt input {gsi} of {IOAPIC_PINS}")));
        }
        Ok(Arc::new(Line::new(Arc::clone(&self.shared), gsi)))
    }

    fn msi_vector(&self) -> Result<Arc<dyn MsiVector>, AccelError> {
        Ok(Arc::new(Vector::new(Arc::clone(&self.shared))))
    }

    fn send_msi(&self, message: Msi) -> Result<(), AccelError> {
        interrupts::send(&self.shared, message)
    }

    fn add_doorbell(
        &self,
        address: IoAddress,
        len: u32,
        value: Option<u64>,
        event: BorrowedFd<'_>,
    ) -> Result<bool, AccelError> {
        sys::ioeventfd(&self.shared.fd, address, len, value, event, false)
            .map_err(os("adding of an ioeventfd"))?;
        Ok(true)
    }

    fn remove_doorbell(
        &self,
        address: IoAddress,
        len: u32,
        value: Option<u64>,
        event: BorrowedFd<'_>,
    ) -> Result<(), AccelError> {
        sys::ioeventfd(&self.shared.fd, address, len, value, event, true)
            .map_err(os("removal of an ioeventfd"))
    }

    fn coalesce_writes(&self, address: IoAddress, len: u32) -> Result<bool, AccelError> {
        let (capability, zone) = match address {
            IoAddress::Mmio(address) => (Cap::CoalescedMmio, IoEventAddress::Mmio(address)),
            IoAddress::Port(port) => (Cap::CoalescedPio, IoEventAddress::Pio(port.into())),
        };
        let shared = &self.shared;
        if !shared.host.kvm.check_extension(capability) {
            return Ok(false);
        }
        // The vCPUs look before the kernel begins.
        shared.coalesces.store(true, Ordering::Release);
        shared.fd.register_coalesced_mmio(zone, len).map_err(failed("KVM_REGISTER_COALESCED_MMIO"))?;
        Ok(true)
    }

    fn set_dirty_tracking(&self, on: bool) -> Result<(), AccelError> {
        for (slot, region) in self.shared.memory.regions().iter().enumerate() {
            sys::set_memory(&self.shared.fd, slot as u32, region, on)
                .map_err(failed("switching of dirty page tracking"))?;
        }
        if let Some(rings) = &self.shared.dirty_rings
            && !on
        {
            rings.clear(&self.shared.fd, &self.shared.memory).map_err(os("KVM_RESET_DIRTY_RINGS"))?;
        }
        if let Some(ram) = &self.shared.assistants_ram {
            ram.set_dirty_tracking(on);
        }
        self.tracking.store(on, Ordering::Release);
        Ok(())
    }

    fn take_dirty_pages(&self, index: usize) -> Result<Vec<u64>, AccelError> {
        let region = self.shared.memory.regions().get(index);
        let region = region.filter(|_| self.tracking.load(Ordering::Acquire)).ok_or_else(|| {
            AccelError::Unsupported(
                "dirty pages while tracking is off or of a region that is not there".into(),
            )
        })?;
        let fd = &self.shared.fd;
        let mut dirty = match &self.shared.dirty_rings {
            Some(rings) => rings.take(fd, index).map_err(os("KVM_RESET_DIRTY_RINGS"))?,
            None => {
                fd.get_dirty_log(index as u32, region.size() as usize).map_err(failed("KVM_GET_DIRTY_LOG"))?
            }
        };
        if let Some(ram) = &self.shared.assistants_ram {
            let assisted = ram
                .take_dirty(region.guest_address(), region.size())
                .map_err(|e| AccelError::Unsupported(e.to_string()))?;
            dirty.iter_mut().zip(assisted).for_each(|(word, more)| *word |= more);
        }
        Ok(dirty)
    }

    fn chipset_state(&self) -> Result<ChipsetState, AccelError> {
        chipset::read(&self.shared.fd, self.shared.host.options.pit)
    }

    fn set_chipset_state(&self, state: &ChipsetState) -> Result<(), AccelError> {
        chipset::write(&self.shared.fd, state, self.shared.host.options.pit)
    }
}
