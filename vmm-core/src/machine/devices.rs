//! The machine's virtio devices and the bus that they are on.

use std::sync::Arc;

use blockfmt::{Format, OpenOptions, OpenPolicy};

use super::config::{DiskConfig, VmConfig};
use super::{VmError, layout};
use crate::accel;
use crate::acpi::MmioDevice;
use crate::bus::Bus;
use crate::devices::legacy::{PowerEvent, PowerSink};
use crate::devices::virtio::blk::BlkOptions;
use crate::devices::virtio::mmio::MMIO_SIZE;
use crate::devices::virtio::{Blk, VirtioDevice, VirtioMmio, VirtioPci};
use crate::lifecycle::Lifecycle;
use crate::memory::GuestMemory;
use crate::pci::{HostBridge, Identity, PciRoot, PciWindows};

const PCI_CONFIG: u64 = 0xcf8;

/// The generic PCI Express host bridge that QEMU's vendor ID has; guests need no driver for it.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    interrupt_pin: 0,
};

/// What is attached so far.
pub(super) struct Attached {
    accel: Arc<dyn accel::Vm>,
    memory: GuestMemory,
    mmio: Arc<Bus>,
    pci: Option<Arc<PciRoot>>,
    /// What ACPI tells of devices over MMIO.
    pub(super) mmio_devices: Vec<MmioDevice>,
    pub(super) units: Vec<Arc<dyn Lifecycle>>,
}

impl Attached {
    /// Devices go to a PCI bus.
    pub(super) fn pci(
        accel: Arc<dyn accel::Vm>,
        memory: GuestMemory,
        mmio: Arc<Bus>,
        ports: Arc<Bus>,
        power: PowerSink,
    ) -> Result<Self, VmError> {
        let windows = PciWindows {
            mmio32: layout::PCI_MMIO32,
            mmio64: layout::pci_mmio64(&memory),
            io: layout::PCI_IO,
        };
        let root = PciRoot::new(mmio.clone(), ports.clone(), windows);
        let [a, b, c, d] = layout::PCI_INTX;
        let line = |gsi: u32| Ok::<_, VmError>((gsi as u8, accel.irq_line(gsi)?));
        root.route_intx([line(a)?, line(b)?, line(c)?, line(d)?]);
        root.on_reset(move || power(PowerEvent::Reset));
        root.add(Arc::new(HostBridge::new(HOST_BRIDGE)), 0)?;
        let ecam = layout::PCI_ECAM;
        mmio.insert(ecam.start, ecam.end - ecam.start, root.ecam())?;
        ports.insert(PCI_CONFIG, 8, root.config_ports())?;
        let units = vec![root.clone() as Arc<dyn Lifecycle>];
        Ok(Self { accel, memory, mmio, pci: Some(root), mmio_devices: Vec::new(), units })
    }

    /// Each device has a register page and an interrupt of its own.
    pub(super) fn mmio(accel: Arc<dyn accel::Vm>, memory: GuestMemory, mmio: Arc<Bus>) -> Self {
        Self { accel, memory, mmio, pci: None, mmio_devices: Vec::new(), units: Vec::new() }
    }

    /// Attaches one device at the next free place.
    pub(super) fn add(&mut self, device: Arc<dyn VirtioDevice>) -> Result<(), VmError> {
        if let Some(pci) = &self.pci {
            let function = VirtioPci::new(&self.accel, self.memory.clone(), device)?;
            pci.add(function, pci.free_slot()?)?;
            return Ok(());
        }
        let index = self.mmio_devices.len();
        let Some(&gsi) = layout::VIRTIO_MMIO_GSIS.get(index) else {
            let most = layout::VIRTIO_MMIO_GSIS.len();
            return Err(VmError::Config(format!("more than {most} devices over MMIO; use PCI")));
        };
        let base = layout::VIRTIO_MMIO + index as u64 * MMIO_SIZE;
        let line = self.accel.irq_line(gsi)?;
        let device = VirtioMmio::new(&self.accel, self.memory.clone(), device, line, base)
            .map_err(|source| VmError::Host { what: "event descriptors", source })?;
        self.mmio.insert(base, MMIO_SIZE, device.clone())?;
        self.mmio_devices.push(MmioDevice { address: base as u32, gsi });
        self.units.push(device);
        Ok(())
    }
}

/// Attaches all devices of the configuration.
pub(super) fn attach_all(attached: &mut Attached, config: &VmConfig) -> Result<(), VmError> {
    for disk in &config.disks {
        attached.add(open_disk(disk)?)?;
    }
    Ok(())
}

fn open_disk(config: &DiskConfig) -> Result<Arc<Blk>, VmError> {
    let fail = |source| VmError::Disk { path: config.path.clone(), source };
    let format: Format = config.format.parse().map_err(fail)?;
    let disk = OpenOptions::new(format)
        .read_only(config.readonly)
        .direct(config.direct)
        .policy(OpenPolicy::same_directory().allow(&config.allow))
        .open(&config.path)
        .map_err(fail)?;
    let options = BlkOptions {
        serial: config.id.clone(),
        queues: config.queues,
        read_only: config.readonly,
        limits: config.limits.limits(),
        ..BlkOptions::default()
    };
    Ok(Blk::new(Arc::new(disk), &options))
}
