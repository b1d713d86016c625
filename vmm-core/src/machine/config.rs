//! What a machine is made of, as it is written in a JSON file.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::devices::virtio::rate::{Limits, Rate};

/// Which accelerator runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AccelChoice {
    /// The one that a measurement says is faster here.
    #[default]
    Auto,
    /// KVM.
    Kvm,
    /// The software CPU.
    Soft,
}

/// The features that a guest's CPUs have at most, by the levels of the x86-64 psABI. Guests that shall run on either
/// accelerator, or move between hosts, need one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CpuModelChoice {
    /// The baseline, with SSE3, CMPXCHG16B and RDRAND.
    V1,
    /// Adds SSSE3, SSE4.1, SSE4.2 and POPCNT.
    V2,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct VmConfig {
    /// Number of vCPUs, 1 to 255.
    pub cpus: u32,
    /// Host CPUs that each vCPU's thread may run on, by vCPU; empty for all.
    pub cpu_affinity: Vec<Vec<usize>>,
    /// CPU features; without it all that the accelerator has (the software CPU: `v2`).
    pub cpu_model: Option<CpuModelChoice>,
    /// RAM.
    pub memory: MemoryConfig,
    /// Accelerator.
    pub accel: AccelChoice,
    /// With KVM: let the software CPU execute instructions that KVM's emulator does not know. For hosts whose KVM is
    /// software itself.
    pub kvm_assist: bool,
    /// What is booted.
    pub boot: BootConfig,
    /// The serial port COM1.
    pub console: ConsoleConfig,
    /// Ports of a virtio console; the guest's `hvc0` is the first. There is no such device without ports.
    pub console_ports: Vec<ConsolePortConfig>,
    /// virtio block devices, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// virtio network devices, in the order in which the guest finds them.
    pub nets: Vec<NetConfig>,
    /// A virtio socket device.
    pub vsock: Option<VsockConfig>,
    /// Offer an entropy device.
    pub rng: bool,
    /// Offer a memory balloon: the guest gives free pages back to the host, and more when it is asked to.
    pub balloon: bool,
    /// Offer virtio devices over MMIO instead of PCI: a smaller machine without a PCI bus.
    pub mmio: bool,
    /// Ports 0xE9 (debug console, printed on the serial console) and 0xF4 (exit with a code), for test guests.
    pub debug_ports: bool,
    /// What programs of kvm-unit-tests use: the debug-exit port, scratch ports (0xE0, 0xE8), interrupt lines (0x2000),
    /// fw_cfg (0x510) and scratch memory (0xFF000000).
    pub test_devices: bool,
    /// Listen for a debugger, and wait for it before the first instruction.
    pub gdb: Option<GdbConfig>,
    /// End the machine when the guest's kernel panics (pvpanic).
    pub stop_on_panic: bool,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            cpus: 1,
            cpu_affinity: Vec::new(),
            cpu_model: None,
            memory: MemoryConfig::default(),
            accel: AccelChoice::default(),
            kvm_assist: false,
            boot: BootConfig::default(),
            console: ConsoleConfig::default(),
            console_ports: Vec::new(),
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            rng: false,
            balloon: false,
            mmio: false,
            debug_ports: false,
            test_devices: false,
            gdb: None,
            stop_on_panic: true,
        }
    }
}

impl BootConfig {
    /// Whether there is something to boot.
    pub fn is_bootable(&self) -> bool {
        self.firmware.is_some() || !self.kernel.as_os_str().is_empty()
    }
}

impl VmConfig {
    /// The JSON schema of a configuration file.
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }
}

/// What a guest boots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BootConfig {
    /// A BIOS image, such as SeaBIOS's `bios-256k.bin`, which boots from the first disk that it can boot from; there is no
    /// kernel then.
    pub firmware: Option<PathBuf>,
    /// A Linux bzImage or an ELF file.
    pub kernel: PathBuf,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
}

/// Guest RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryConfig {
    /// Size in bytes, a multiple of 4096.
    pub size: u64,
    /// The host's pages behind it.
    pub pages: PageConfig,
    /// Touch all of it when the machine is built, so that a lack of memory shows at once.
    pub prefault: bool,
    /// Bind it to this host NUMA node.
    pub host_node: Option<u32>,
    /// NUMA nodes that the guest sees; their sizes add up to `size` and each vCPU belongs to one.
    pub numa: Vec<NumaConfig>,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 256 << 20,
            pages: PageConfig::default(),
            prefault: false,
            host_node: None,
            numa: Vec::new(),
        }
    }
}

/// The host's pages behind guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PageConfig {
    /// Normal pages.
    #[default]
    Normal,
    /// Transparent huge pages where the host has them.
    Transparent,
    /// Reserved pages of 2 MiB.
    Huge2m,
    /// Reserved pages of 1 GiB.
    Huge1g,
}

/// A NUMA node of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NumaConfig {
    /// Its vCPUs.
    pub cpus: Vec<u32>,
    /// Its RAM in bytes, a multiple of 4096.
    pub size: u64,
    /// The host node that its RAM is bound to.
    pub host_node: Option<u32>,
    /// Relative distance to each node, itself included (10 is local); empty for the defaults.
    pub distances: Vec<u8>,
}

/// A disk. Its format is always stated: a guest that writes an image's header must not choose how it is read next time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The image file or block device; with the format `vhost-user`, the socket of a vhost-user-blk back-end.
    pub path: PathBuf,
    /// The image's format: `raw`, `qcow2` and the other names that `nacre disk` knows.
    pub format: String,
    /// Serial number that the guest sees (at most 20 bytes).
    #[serde(default)]
    pub id: String,
    /// Refuse writes.
    #[serde(default)]
    pub readonly: bool,
    /// Bypass the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Number of queues.
    #[serde(default = "one")]
    pub queues: u16,
    /// Directories beside the image's own whose files its header may name as parents.
    #[serde(default)]
    pub allow: Vec<PathBuf>,
    /// Open the disk even if a parent changed since its child was made, which may have made the child useless.
    #[serde(default)]
    pub changed_parents: bool,
    /// Rate limits.
    #[serde(default)]
    pub limits: LimitConfig,
}

/// Where a debugger connects to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum GdbConfig {
    /// A TCP address, such as `127.0.0.1:1234`.
    Tcp(String),
    /// A Unix stream socket.
    Unix(PathBuf),
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// What is at the other end.
    pub backend: NetBackendConfig,
    /// MAC address, such as `52:54:00:12:34:56`; a random one when it is missing.
    #[serde(default)]
    pub mac: Option<String>,
    /// MTU that the guest is told.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// A name for messages and counters.
    #[serde(default)]
    pub id: String,
    /// Pairs of queues (tap only; a Unix stream has one).
    #[serde(default = "one")]
    pub queues: u16,
    /// Limits on what the guest sends.
    #[serde(default)]
    pub send_limits: LimitConfig,
    /// Limits on what the guest receives.
    #[serde(default)]
    pub receive_limits: LimitConfig,
}

/// The other end of a network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetBackendConfig {
    /// A tap interface of the host, made when it does not exist.
    Tap(String),
    /// A Unix stream socket with frames preceded by their length in 32 bits, as QEMU, passt and gvproxy use.
    Unix(PathBuf),
    /// A vhost-user back-end's socket, such as a port of the switch.
    VhostUser(PathBuf),
}

/// A virtio socket device, bridged to Unix sockets: the guest's connections to port N of the host go to `SOCKET_N`;
/// programs on the host connect to `SOCKET` and send `CONNECT N` and a newline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context identifier, 3 or more.
    pub cid: u64,
    /// The Unix socket.
    pub socket: PathBuf,
}

fn one() -> u16 {
    1
}

/// Rate limits of a device; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LimitConfig {
    /// Bytes a second.
    pub bytes: u64,
    /// Bytes at once after an idle time; 0 for what a second allows.
    pub bytes_burst: u64,
    /// Operations a second.
    pub operations: u64,
    /// Operations at once after an idle time; 0 for what a second allows.
    pub operations_burst: u64,
}

impl LimitConfig {
    pub(super) fn limits(&self) -> Limits {
        let rate = |per_second, burst| {
            let burst = if burst == 0 { per_second } else { burst };
            (per_second != 0).then_some(Rate { per_second, burst })
        };
        Limits {
            bytes: rate(self.bytes, self.bytes_burst),
            operations: rate(self.operations, self.operations_burst),
        }
    }
}

/// A port of the virtio console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsolePortConfig {
    /// The host's end; not `stdio`, which the serial console alone can have.
    pub to: ConsoleConfig,
    /// The guest finds the port by this name in `/dev/virtio-ports`, unless it is the console.
    #[serde(default)]
    pub name: String,
}

/// Where the serial console, or a port of the virtio console, goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleConfig {
    /// Nowhere; there is a port, and it is silent.
    #[default]
    Off,
    /// Standard output, with input from standard input.
    Stdio,
    /// A new pseudo-terminal; its path is in the event stream.
    Pty,
    /// A Unix stream socket that is listened on; one client at a time.
    Socket(PathBuf),
    /// A file, created or overwritten.
    File(PathBuf),
}
