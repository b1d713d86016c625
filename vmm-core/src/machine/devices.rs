//! The machine's virtio devices and the bus that they are on.

use std::ops::Range;
use std::sync::Arc;

use super::config::{ConsoleConfig, ConsolePortConfig, DiskConfig, NetBackendConfig, NetConfig, VmConfig};
use super::console::{self, RunningConsole};
use super::disk::MachineDisk;
use super::events::{Events, VmEvent};
use super::metrics::Sources;
use super::{Unit, VmError, layout};
use crate::accel;
use crate::acpi::MmioDevice;
use crate::bus::Bus;
use crate::devices::legacy::{PowerEvent, PowerSink};
use crate::devices::virtio::balloon::{Balloon, BalloonOptions};
use crate::devices::virtio::blk::BlkOptions;
use crate::devices::virtio::mmio::MMIO_SIZE;
use crate::devices::virtio::net::{NetBackend, NetOptions, StreamBackend, TapBackend};
use crate::devices::virtio::vhost_user::VhostUserNetOptions;
use crate::devices::virtio::{Blk, Console, Net, Rng, VhostUser, VirtioDevice, VirtioMmio, VirtioPci, Vsock};
use crate::memory::GuestMemory;
use crate::migration::Description;
use crate::pci::{HostBridge, Identity, PciRoot, PciWindows};

/// The "format" of a disk that another process serves.
const VHOST_USER: &str = "vhost-user";
/// Entries of a queue that another process serves.
const QUEUE_SIZE: u16 = 256;
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
    pub(super) units: Vec<Unit>,
    /// A device whose writes to guest memory nobody here sees.
    pub(super) unobserved: Option<&'static str>,
}

/// What of the devices a machine that moves tells of or takes along.
#[derive(Default)]
pub(super) struct Moving {
    pub(super) disks: Vec<Arc<MachineDisk>>,
    pub(super) macs: Vec<[u8; 6]>,
}

impl Attached {
    /// Devices go to a PCI bus, whose memory window below 4 GiB is `mmio32`.
    pub(super) fn pci(
        accel: Arc<dyn accel::Vm>,
        memory: GuestMemory,
        mmio: Arc<Bus>,
        ports: Arc<Bus>,
        power: PowerSink,
        mmio32: Range<u64>,
    ) -> Result<Self, VmError> {
        let windows = PciWindows { mmio32, mmio64: layout::pci_mmio64(&memory), io: layout::PCI_IO };
        let root = PciRoot::new(mmio.clone(), ports.clone(), windows);
        let [a, b, c, d] = layout::PCI_INTX;
        let line = |gsi: u32| Ok::<_, VmError>((gsi as u8, accel.irq_line(gsi)?));
        root.route_intx([line(a)?, line(b)?, line(c)?, line(d)?]);
        root.on_reset(move || power(PowerEvent::Reset));
        root.add(Arc::new(HostBridge::new(HOST_BRIDGE)), 0)?;
        let ecam = layout::PCI_ECAM;
        mmio.insert(ecam.start, ecam.end - ecam.start, root.ecam())?;
        ports.insert(PCI_CONFIG, 8, root.config_ports())?;
        let units = vec![Unit::new("pci", root.clone())];
        Ok(Self { accel, memory, mmio, pci: Some(root), mmio_devices: Vec::new(), units, unobserved: None })
    }

    /// Each device has a register page and an interrupt of its own.
    pub(super) fn mmio(accel: Arc<dyn accel::Vm>, memory: GuestMemory, mmio: Arc<Bus>) -> Self {
        Self { accel, memory, mmio, pci: None, mmio_devices: Vec::new(), units: Vec::new(), unobserved: None }
    }

    /// Attaches one device at the next free place.
    pub(super) fn add(&mut self, device: Arc<dyn VirtioDevice>) -> Result<(), VmError> {
        if device.writes_unobserved() {
            self.unobserved = Some(device.name());
        }
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
        self.units.push(Unit::new(format!("mmio{index}"), device));
        Ok(())
    }
}

/// Attaches all devices of the configuration; `known` is what a guest that comes from elsewhere knows of them.
pub(super) fn attach_all(
    attached: &mut Attached,
    config: &VmConfig,
    known: Option<&Description>,
) -> Result<(Sources, Moving), VmError> {
    let (mut sources, mut moving) = (Sources::default(), Moving::default());
    for (index, disk) in config.disks.iter().enumerate() {
        let name = name(&disk.id, "disk", index);
        attached.add(open_disk(disk, name, known, &mut sources, &mut moving)?)?;
    }
    for (index, net) in config.nets.iter().enumerate() {
        let name = name(&net.id, "net", index);
        attached.add(open_net(net, name, known, &mut sources, &mut moving)?)?;
    }
    if let Some(vsock) = &config.vsock {
        let fail = |source| VmError::Vsock { path: vsock.socket.clone(), source };
        attached.add(Vsock::new(vsock.cid, &vsock.socket).map_err(fail)?)?;
    }
    if config.rng {
        attached.add(Rng::new().map_err(|source| VmError::Host { what: "random bytes", source })?)?;
    }
    if config.balloon {
        let balloon = Balloon::new(BalloonOptions::default())
            .map_err(|source| VmError::Host { what: "an event descriptor", source })?;
        attached.add(balloon.clone())?;
        sources.balloon = Some(balloon);
    }
    Ok((sources, moving))
}

/// The virtio console, unless it has no ports, and what must live as long as it.
pub(super) fn open_console(
    ports: &[ConsolePortConfig],
    events: &Events,
) -> Result<(Option<Arc<Console>>, Vec<RunningConsole>), VmError> {
    let (mut open, mut running) = (Vec::new(), Vec::new());
    for port in ports {
        if port.to == ConsoleConfig::Stdio {
            let what = "a port of the virtio console on stdio; give pty, socket, file or off";
            return Err(VmError::Config(what.into()));
        }
        let end = console::Console::open(&port.to)?;
        if let Some(path) = end.pty_path() {
            events.push(VmEvent::ConsolePty(path.to_owned()));
        }
        let (port, held) = end.into_port(&port.name)?;
        open.push(port);
        running.push(held);
    }
    if open.is_empty() {
        return Ok((None, running));
    }
    let console = Console::new(open).map_err(|source| match source.kind() {
        std::io::ErrorKind::InvalidInput => VmError::Config(source.to_string()),
        _ => VmError::Host { what: "an event descriptor", source },
    })?;
    Ok((Some(console), running))
}

/// What a device is called in counters.
fn name(id: &str, kind: &str, index: usize) -> String {
    if id.is_empty() { format!("{kind}{index}") } else { id.to_owned() }
}

fn open_disk(
    config: &DiskConfig,
    name: String,
    known: Option<&Description>,
    sources: &mut Sources,
    moving: &mut Moving,
) -> Result<Arc<dyn VirtioDevice>, VmError> {
    if config.format == VHOST_USER {
        return Ok(VhostUser::blk(&config.path, config.queues.max(1), QUEUE_SIZE)?);
    }
    let shape =
        match known {
            None => None,
            Some(known) => Some(*known.disks.get(moving.disks.len()).ok_or_else(|| {
                VmError::Incompatible(format!("it has {} disks, not more", known.disks.len()))
            })?),
        };
    let disk = MachineDisk::new(config, shape)?;
    let options = BlkOptions {
        serial: config.id.clone(),
        queues: config.queues,
        read_only: config.readonly,
        limits: config.limits.limits(),
        ..BlkOptions::default()
    };
    let blk = Blk::new(disk.clone(), &options);
    moving.disks.push(disk);
    sources.disks.push((name, blk.clone()));
    Ok(blk)
}

fn open_net(
    config: &NetConfig,
    name: String,
    known: Option<&Description>,
    sources: &mut Sources,
    moving: &mut Moving,
) -> Result<Arc<dyn VirtioDevice>, VmError> {
    // Without one in the configuration the guest keeps the one that it knows.
    let old = known.and_then(|known| known.macs.get(moving.macs.len()));
    let mac = match (&config.mac, old) {
        (None, Some(mac)) => *mac,
        (text, _) => mac_address(text.as_deref())?,
    };
    moving.macs.push(mac);
    let backend: Arc<dyn NetBackend> = match &config.backend {
        NetBackendConfig::Tap(name) => Arc::new(TapBackend::open(name, config.queues.max(1))?),
        NetBackendConfig::Unix(path) => {
            let backend = StreamBackend::new(path);
            if !backend.is_connected() {
                return Err(VmError::NetSocket { path: path.clone() });
            }
            Arc::new(backend)
        }
        NetBackendConfig::VhostUser(path) => {
            let options = VhostUserNetOptions {
                mac,
                mtu: config.mtu,
                pairs: config.queues.max(1),
                ..VhostUserNetOptions::default()
            };
            return Ok(VhostUser::net(path, &options)?);
        }
    };
    let options = NetOptions {
        mac,
        mtu: config.mtu,
        send_limits: config.send_limits.limits(),
        receive_limits: config.receive_limits.limits(),
        ..NetOptions::default()
    };
    let net =
        Net::new(backend, &options).map_err(|source| VmError::Host { what: "event descriptors", source })?;
    sources.nets.push((name, net.clone()));
    Ok(net)
}

/// The MAC address that `text` says, such as `52:54:00:12:34:56`; without one, a random address.
///
/// # Errors
/// Fails when the text is no unicast address, or the host gives no random bytes.
pub fn mac_address(text: Option<&str>) -> Result<[u8; 6], VmError> {
    text.map_or_else(random_mac, parse_mac)
}

fn parse_mac(text: &str) -> Result<[u8; 6], VmError> {
    let malformed = || VmError::Config(format!("MAC address {text:?}; give one such as 52:54:00:12:34:56"));
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let hex = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        let part = parts.next().filter(hex).ok_or_else(malformed)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| malformed())?;
    }
    // A group address cannot be a station's.
    if parts.next().is_some() || mac[0] & 1 != 0 { Err(malformed()) } else { Ok(mac) }
}

/// A random address with the prefix that virtual machines use.
fn random_mac() -> Result<[u8; 6], VmError> {
    let random: [u8; 3] =
        super::build::random().map_err(|source| VmError::Host { what: "random bytes", source })?;
    Ok([0x52, 0x54, 0x00, random[0], random[1], random[2]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_are_checked() {
        assert_eq!(parse_mac("52:54:00:12:34:aF").unwrap(), [0x52, 0x54, 0, 0x12, 0x34, 0xaf]);
        for bad in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "53:54:00:12:34:56",
            "5:54:00:12:34:56",
            "+2:54:00:12:34:56",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
        assert_ne!(random_mac().unwrap(), random_mac().unwrap());
    }
}
