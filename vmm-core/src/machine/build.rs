//! Building a machine from its configuration.

use std::sync::{Arc, Once, Weak, mpsc};

use parking_lot::Mutex;

use super::config::{AccelChoice, ConsoleConfig, CpuModelChoice, VmConfig};
use super::console::{Console, InputFilter};
use super::devices::{self, Attached};
use super::gdb::GdbServer;
use super::layout::{self, Places};
use super::metrics::{BusCounters, Sources};
use super::vcpu::Control;
use super::{Devices, Unit, Vm, VmError, entry, firmware};
use crate::accel::kvm::{KvmHypervisor, KvmOptions};
use crate::accel::{self, CpuModel, Hypervisor, IoAddress, IoBus, VmSpec, probe};
use crate::acpi::{self, MmioDevice, NumaNode, PciRootInfo, Platform, RSDP_LEN, SCI_GSI, SERIAL_GSI};
use crate::boot::{self, BootError, BootSource, Entry as BootEntry};
use crate::bus::{Bus, BusDevice};
use crate::devices::legacy::{
    AcpiPm, DebugConsole, DebugExit, FW_CFG, FW_CFG_SIZE, FwCfg, I8042, PM_BASE, PM_SIZE, PVPANIC_PORT,
    PowerSink, Pvpanic, Rtc, Serial, SerialOutput, TEST_FLUSH, TEST_IRQ, TEST_IRQS, TEST_MEMORY,
    TEST_MEMORY_SIZE, TEST_SCRATCH, TEST_SCRATCH_BYTES, TestFlush, TestIrqs, TestScratch,
};
use crate::devices::virtio::VirtioDevice;
use crate::memory::GuestMemory;
use crate::migration::Description;

const COM1: u64 = 0x3f8;
const CMOS: u64 = 0x70;
const I8042_COMMAND: u64 = 0x64;
const DEBUG_CONSOLE: u64 = 0xe9;
/// Where firmware prints what it does.
const FIRMWARE_CONSOLE: u64 = 0x402;
const DEBUG_EXIT: u64 = 0xf4;
/// Guests write a byte or a double-word.
const DEBUG_EXIT_SIZE: u64 = 4;

/// What a guest that comes from elsewhere knows of its machine.
pub(super) struct Known<'a> {
    pub(super) description: &'a Description,
    /// Frequency of the time-stamp counter, when it has to stay.
    pub(super) tsc_khz: Option<u32>,
}

/// Builds a [`Vm`].
pub struct VmBuilder {
    config: VmConfig,
    hypervisor: Option<Arc<dyn Hypervisor>>,
    output: Option<Box<dyn SerialOutput>>,
    filter: Option<InputFilter>,
    devices: Vec<Arc<dyn VirtioDevice>>,
}

/// The machine's buses as the accelerator sees them.
struct Buses {
    mmio: Arc<Bus>,
    ports: Arc<Bus>,
    counters: Arc<BusCounters>,
}

impl IoBus for Buses {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        BusCounters::add(&self.counters.mmio_reads);
        self.mmio.read(address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        BusCounters::add(&self.counters.mmio_writes);
        self.mmio.write(address, data);
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        BusCounters::add(&self.counters.port_reads);
        self.ports.read(port.into(), data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        BusCounters::add(&self.counters.port_writes);
        self.ports.write(port.into(), data);
    }
}

impl VmBuilder {
    pub(super) fn new(config: VmConfig) -> Self {
        Self { config, hypervisor: None, output: None, filter: None, devices: Vec::new() }
    }

    /// Uses this accelerator instead of the one that the configuration names.
    pub fn hypervisor(mut self, hypervisor: Arc<dyn Hypervisor>) -> Self {
        self.hypervisor = Some(hypervisor);
        self
    }

    /// Sends the serial port's output here instead of where the configuration says; there is no input then.
    pub fn serial_output(mut self, output: impl SerialOutput + 'static) -> Self {
        self.output = Some(Box::new(output));
        self
    }

    /// Lets `filter` see and change console input on its way to the guest.
    pub fn input_filter(mut self, filter: impl FnMut(&mut Vec<u8>) + Send + 'static) -> Self {
        self.filter = Some(Box::new(filter));
        self
    }

    /// Attaches a virtio device of the caller's own, after those of the configuration: one with another back-end than
    /// the configuration knows, or of a kind that this crate does not have.
    pub fn device(mut self, device: Arc<dyn VirtioDevice>) -> Self {
        self.devices.push(device);
        self
    }

    /// Allocates everything, loads the kernel and leaves the machine ready to start.
    ///
    /// # Errors
    /// Fails, with nothing left behind, when the configuration is impossible, a file cannot be used, or the host or the
    /// accelerator refuses.
    pub fn build(self) -> Result<Vm, VmError> {
        self.build_for(None)
    }

    /// Builds a machine for a guest that knows it as `known`, or for one that boots.
    pub(super) fn build_for(self, known: Option<Known<'_>>) -> Result<Vm, VmError> {
        let config = &self.config;
        if config.cpus == 0 || config.cpus > 255 {
            return Err(VmError::Config(format!("{} vCPUs; give the guest 1 to 255", config.cpus)));
        }
        if config.cpu_affinity.len() > config.cpus as usize {
            return Err(VmError::Config("an affinity for more vCPUs than there are; remove it".into()));
        }
        let has_firmware = has_firmware(config)?;
        let span = tracing::info_span!("vm", cpus = config.cpus, memory = config.memory.size);
        let _building = span.enter();
        let hypervisor = match self.hypervisor {
            Some(hypervisor) => hypervisor,
            None => accelerator(config.accel, config.kvm_assist)?,
        };
        let host = |what| move |source| VmError::Host { what, source };
        let control = Control::new(config.stop_on_panic, config.gdb.is_some(), span.clone())
            .map_err(host("an event descriptor"))?;
        // While this thread makes the rest, the first vCPU's makes all of them. Whatever fails here, the threads are
        // dropped after the channel that one of them waits at: they were declared before.
        let mut threads = Vec::new();
        let (vm_made, vm_wanted) = mpsc::sync_channel::<Arc<dyn accel::Vm>>(1);
        let (vcpus_made, vcpus_wanted) = mpsc::sync_channel(1);
        let (maker, cpus) = (hypervisor.clone(), config.cpus);
        let mut make = Some(move || {
            maker.prepare_vcpus();
            if let Ok(vm) = vm_wanted.recv() {
                let vcpus: Result<Vec<_>, _> = (0..cpus).map(|id| vm.create_vcpu(id)).collect();
                // Nobody wants them if something else failed meanwhile.
                let _ = vcpus_made.send(vcpus);
            }
        });
        for id in 0..config.cpus {
            threads.push(control.spawn(id, make.take()).map_err(host("a thread"))?);
        }
        for ((vcpu, thread), cpus) in (0..).zip(&threads).zip(&config.cpu_affinity) {
            thread.pin(cpus).map_err(|source| VmError::Affinity { vcpu, source })?;
        }
        let (memory, numa) = layout::allocate(&config.memory, config.cpus)?;
        let places = Places::of(&memory, has_firmware);
        let buses = Arc::new(Buses { mmio: Arc::default(), ports: Arc::default(), counters: Arc::default() });
        let counters = buses.counters.clone();
        let (mmio, ports) = (buses.mmio.clone(), buses.ports.clone());
        let model = config.cpu_model.map(|model| match model {
            CpuModelChoice::V1 => CpuModel::V1,
            CpuModelChoice::V2 => CpuModel::V2,
        });
        let spec = VmSpec {
            memory: memory.clone(),
            vcpus: config.cpus,
            model,
            tsc_khz: known.as_ref().and_then(|known| known.tsc_khz),
            bus: buses,
        };
        let accel = hypervisor.create_vm(spec)?;
        // A thread that panicked is noticed below.
        let _ = vm_made.send(accel.clone());

        // A device that stops the machine must not keep it alive.
        let weak = Arc::downgrade(&control);
        let power: PowerSink = Arc::new(move |event| {
            if let Some(control) = weak.upgrade() {
                control.power(event);
            }
        });
        let pm = Arc::new(AcpiPm::new(accel.irq_line(SCI_GSI)?, power.clone()));
        let console_config = if self.output.is_some() { &ConsoleConfig::Off } else { &config.console };
        let console = Console::open(console_config)?;
        if let Some(path) = console.pty_path() {
            control.events.push(super::VmEvent::ConsolePty(path.to_owned()));
        }
        let output = self.output.unwrap_or_else(|| console.output());
        let shared_output: Arc<dyn SerialOutput> = Arc::from(output);
        let clone_output = || {
            let output = shared_output.clone();
            Box::new(move |data: &[u8]| output.write(data)) as Box<dyn SerialOutput>
        };
        let serial = Arc::new(Serial::new(accel.irq_line(SERIAL_GSI)?, clone_output()));

        let insert = |base: u64, len: u64, device: Arc<dyn BusDevice>| ports.insert(base, len, device);
        insert(COM1, 8, serial.clone())?;
        let rtc = Arc::new(Rtc::new());
        let cmos = Cmos { rtc: rtc.clone(), vm: Arc::downgrade(&accel), told: Once::new() };
        insert(CMOS, 2, Arc::new(cmos))?;
        insert(I8042_COMMAND, 1, Arc::new(I8042::new(power.clone())))?;
        insert(PM_BASE.into(), PM_SIZE.into(), pm.clone())?;
        insert(PVPANIC_PORT.into(), 1, Arc::new(Pvpanic::new(power.clone())))?;
        if config.debug_ports {
            insert(DEBUG_CONSOLE, 1, Arc::new(DebugConsole::new(clone_output())))?;
            if has_firmware {
                insert(FIRMWARE_CONSOLE, 1, Arc::new(DebugConsole::new(clone_output())))?;
            }
        }
        if config.debug_ports || config.test_devices {
            insert(DEBUG_EXIT, DEBUG_EXIT_SIZE, Arc::new(DebugExit::new(power.clone())))?;
        }
        if config.test_devices {
            insert(TEST_SCRATCH.into(), 4, Arc::new(TestScratch::new(4)))?;
            insert(TEST_FLUSH.into(), 4, Arc::new(TestFlush::new(memory.clone())))?;
            if !config.debug_ports {
                // The debug console has one of these ports.
                insert(TEST_SCRATCH_BYTES.into(), 4, Arc::new(TestScratch::new(4)))?;
            }
            let lines: Result<Vec<_>, _> = (0..TEST_IRQS).map(|n| accel.irq_line(n.into())).collect();
            insert(TEST_IRQ.into(), TEST_IRQS.into(), Arc::new(TestIrqs::new(lines?)))?;
            mmio.insert(TEST_MEMORY, TEST_MEMORY_SIZE as u64, Arc::new(TestScratch::new(TEST_MEMORY_SIZE)))?;
        }
        let mut attached = if config.mmio {
            Attached::mmio(accel.clone(), memory.clone(), mmio.clone())
        } else {
            let window = places.pci_mmio32.clone();
            Attached::pci(accel.clone(), memory.clone(), mmio.clone(), ports.clone(), power.clone(), window)?
        };
        let description = known.as_ref().map(|known| known.description);
        let (sources, moving) = devices::attach_all(&mut attached, config, description)?;
        let (virtio_console, held) = devices::open_console(&config.console_ports, &control.events)?;
        if let Some(device) = virtio_console {
            attached.add(device)?;
        }
        for device in self.devices {
            attached.add(device)?;
        }

        let platform = platform(config, &memory, &places, numa, attached.mmio_devices.clone());
        let tables = acpi::build(&places.acpi, &platform)?;
        let mut units =
            vec![Unit::new("pm", pm.clone()), Unit::new("serial", serial.clone()), Unit::new("rtc", rtc)];
        if has_firmware || config.test_devices {
            let files = if has_firmware {
                firmware::files(&memory, &places, &tables[..RSDP_LEN], COM1 as u16)
            } else {
                Vec::new()
            };
            let fw_cfg = Arc::new(FwCfg::new(config.memory.size, config.cpus as u16, files));
            ports.insert(FW_CFG.into(), FW_CFG_SIZE, fw_cfg.clone())?;
            units.push(Unit::new("fw-cfg", fw_cfg));
        }
        let boot_entry = match known {
            // Its memory comes from where it ran.
            Some(_) => None,
            None => Some(load_guest(config, &memory, &places, &tables)?),
        };

        let mut running = console.connect(serial.clone(), self.filter)?;
        if boot_entry.is_none() {
            // A machine that comes from elsewhere may stay paused, and its user may want to end it.
            running.start()?;
        }
        let mut vm = Vm {
            control: control.clone(),
            threads: Vec::new(),
            lifecycle: Mutex::new(false),
            kind: hypervisor.kind(),
            cpus: config.cpus,
            memory,
            devices: Devices {
                mmio,
                ports,
                units: units.into_iter().chain(attached.units).collect(),
                generation_id: places.generation_id,
                disks: moving.disks,
                macs: moving.macs,
                unsaved: config.test_devices.then_some("it has test devices"),
                unobserved: attached.unobserved,
                pm,
                consoles: Mutex::new(std::iter::once(running).chain(held).collect()),
                gdb: Mutex::new(None),
            },
            sources: Sources { bus: counters, ..sources },
            accel: accel.clone(),
            moving: Mutex::default(),
        };
        let vcpus = vcpus_wanted.recv().expect("the thread sends them or an error, unless it panicked");
        let mut vcpus = vcpus?;
        if let (Some(first), Some(boot_entry)) = (vcpus.first_mut(), &boot_entry) {
            first.set_registers(&entry::state(boot_entry))?;
        }
        for (thread, vcpu) in threads.iter_mut().zip(vcpus) {
            control.hand_over(thread, vcpu);
        }
        vm.threads = threads;
        if let Some(gdb) = &config.gdb {
            let server = GdbServer::start(gdb, control, vm.memory.clone(), config.cpus)?;
            *vm.devices.gdb.lock() = Some(server);
        }
        Ok(vm)
    }
}

/// The clock's ports. Choosing a register does nothing by itself, so the accelerator may queue that: from the first time
/// on, as many guests never do it. (The PCI address port has the reset register within it: that cannot wait.)
struct Cmos {
    rtc: Arc<Rtc>,
    vm: Weak<dyn accel::Vm>,
    told: Once,
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.rtc.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.rtc.write(offset, data);
        self.told.call_once(|| {
            if let Some(vm) = self.vm.upgrade()
                && let Err(error) = vm.coalesce_writes(IoAddress::Port(CMOS as u16), 1)
            {
                tracing::debug!(%error, "Writes to the CMOS index are not queued");
            }
        });
    }
}

/// Puts the ACPI tables and the kernel or firmware into a new machine's memory.
fn load_guest(
    config: &VmConfig,
    memory: &GuestMemory,
    places: &Places,
    tables: &[u8],
) -> Result<BootEntry, VmError> {
    let rsdp = places.acpi.start;
    memory.write(rsdp, tables).map_err(BootError::from)?;
    write_generation_id(memory, places.generation_id)?;
    if let Some(firmware) = &config.boot.firmware {
        return Ok(boot::load_firmware(memory, firmware)?);
    }
    let source = BootSource {
        kernel: &config.boot.kernel,
        initrd: config.boot.initrd.as_deref(),
        command_line: &config.boot.command_line,
        rsdp,
        memory_map: &layout::memory_map(memory),
    };
    Ok(boot::load(memory, &source)?)
}

/// Whether the machine has firmware.
fn has_firmware(config: &VmConfig) -> Result<bool, VmError> {
    let boot = &config.boot;
    let wrong = |what: &str| Err(VmError::Config(what.into()));
    if boot.firmware.is_none() {
        return Ok(false);
    }
    if !boot.kernel.as_os_str().is_empty() || boot.initrd.is_some() || !boot.command_line.is_empty() {
        return wrong("firmware beside a kernel, its initial RAM disk or command line; give one of them");
    }
    if config.mmio {
        return wrong("firmware with devices over MMIO, which it does not find; use PCI");
    }
    Ok(true)
}

/// The accelerator that the configuration names; KVM with the software CPU's assistance if `assist` says so.
fn accelerator(choice: AccelChoice, assist: bool) -> Result<Arc<dyn Hypervisor>, VmError> {
    let kind = match choice {
        AccelChoice::Auto => None,
        AccelChoice::Kvm => Some(accel::AccelKind::Kvm),
        AccelChoice::Soft => Some(accel::AccelKind::Soft),
    };
    let hypervisor = probe::open(kind)?;
    if assist && hypervisor.kind() == accel::AccelKind::Kvm {
        let options = KvmOptions { assist, ..KvmOptions::default() };
        return Ok(Arc::new(KvmHypervisor::with_options(options)?));
    }
    Ok(hypervisor.into())
}

fn platform(
    config: &VmConfig,
    memory: &GuestMemory,
    places: &Places,
    numa: Vec<NumaNode>,
    mmio: Vec<MmioDevice>,
) -> Platform {
    Platform {
        cpus: config.cpus,
        pci: (!config.mmio).then(|| PciRootInfo {
            ecam: layout::PCI_ECAM,
            mmio32: places.pci_mmio32.clone(),
            mmio64: layout::pci_mmio64(memory),
            io: layout::PCI_IO,
            intx: layout::PCI_INTX,
        }),
        mmio,
        serial: true,
        generation_id: Some(places.generation_id),
        numa,
    }
}

/// Gives this run of the machine an identifier of its own.
pub(super) fn write_generation_id(memory: &GuestMemory, address: u64) -> Result<(), VmError> {
    let write = |id: [u8; 16]| memory.write(address, &id).map_err(std::io::Error::other);
    random().and_then(write).map_err(|source| VmError::Host { what: "random bytes", source })
}

/// Random bytes of the host.
pub(super) fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: `bytes` is a live buffer of the stated length.
    if unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) } != N as isize {
        return Err(std::io::Error::last_os_error());
    }
    Ok(bytes)
}
