//! The options of `nacre run`, and the configuration that they make.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use vmm_core::machine::{
    AccelChoice, BootConfig, ConsoleConfig, ConsolePortConfig, CpuModelChoice, DiskConfig, GdbConfig,
    LimitConfig, NetBackendConfig, NetConfig, RestoreOptions, VmConfig, VsockConfig,
};

use super::address::Address;
use super::origin::{Incoming, Origin};
use super::pairs::Pairs;

const HELP: &str = "\
Exit status:
  0       the guest switched itself off
  1       an error, explained in one line
  2       a wrong command line
  3       the guest asked for a reset (without --restart)
  4       the guest's kernel panicked
  5       the guest caused a triple fault
  6       ended by Ctrl-A x or a signal
  7       the machine was moved: it runs in another process now
  64 + n  a test guest wrote n to the debug-exit port

Ctrl-A x ends the machine; Ctrl-A Ctrl-A sends Ctrl-A.

Examples:
  nacre run --kernel /boot/vmlinuz --initrd initrd.img --cmdline console=ttyS0
  nacre run --kernel vmlinuz --disk path=child.qcow2,format=qcow2 \\
            --cmdline 'console=ttyS0 root=/dev/vda rw'
  nacre run --kernel vmlinuz --console off --virtio-console pty \\
            --virtio-console socket=agent.sock,name=agent --cmdline console=hvc0
  nacre run --firmware /usr/share/seabios/bios-256k.bin --disk path=installed.qcow2,format=qcow2
  nacre run --config machine.json --control vm.sock      # then: nacre vm --help
  nacre run --config machine.json --restore saved
  nacre run --config machine.json --incoming unix:move.sock

A machine that is restored or comes in needs the same options as where it ran, but for the kernel.
Disks are not part of a saved machine: they must be as they were when it was saved.";

/// Boot a kernel in a virtual machine and connect its serial console to the terminal.
#[derive(Parser)]
#[command(after_help = HELP)]
pub struct Args {
    /// Start from the configuration in this JSON file (see `nacre schema`); other options override it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Linux bzImage or ELF file to boot.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["config", "firmware", "restore", "incoming"])]
    kernel: Option<PathBuf>,
    /// BIOS image that boots from a disk, instead of a kernel; such as /usr/share/seabios/bios-256k.bin (Debian package seabios).
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initrd", "cmdline"])]
    firmware: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, value_name = "STRING")]
    cmdline: Option<String>,
    /// Number of vCPUs (1 to 255) [default: 1].
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Host CPUs for vCPU threads, for example 0=2-3 (may be repeated).
    #[arg(long, value_name = "VCPU=CPUS")]
    pin: Vec<String>,
    /// RAM, with suffix K, M, G or T (MiB without) [default: 256M].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// Accelerator [default: auto].
    #[arg(long, value_enum)]
    accel: Option<Accel>,
    /// CPU features that the guest has at most [default: all that the accelerator has].
    #[arg(long, value_enum)]
    cpu_model: Option<CpuModel>,
    /// A disk: path=FILE,format=FORMAT and, after commas, any of readonly, direct, id=NAME, queues=N, allow=DIR
    /// (of parent images), changed-parents (open it even if a parent changed since its child was made), bps=N, iops=N (may be repeated).
    #[arg(long, value_name = "path=FILE,format=FORMAT,...", value_parser = parse_disk)]
    disk: Vec<DiskConfig>,
    /// A network card: tap=NAME, unix=SOCKET or vhost-user=SOCKET and, after commas, any of mac=ADDRESS, id=NAME,
    /// mtu=N, queues=N, bps=N, pps=N (may be repeated).
    #[arg(long, value_name = "tap=NAME|unix=SOCKET|vhost-user=SOCKET,...", value_parser = parse_net)]
    net: Vec<NetConfig>,
    /// A socket device: cid=N,socket=PATH. Guest connections to port P of the host go to PATH_P.
    #[arg(long, value_name = "cid=N,socket=PATH", value_parser = parse_vsock)]
    vsock: Option<VsockConfig>,
    /// Offer an entropy device.
    #[arg(long)]
    rng: bool,
    /// Offer a memory balloon.
    #[arg(long)]
    balloon: bool,
    /// Offer virtio devices over MMIO, without a PCI bus.
    #[arg(long)]
    mmio: bool,
    /// Where the serial console goes: stdio, pty, socket=PATH, file=PATH or off [default: stdio].
    #[arg(long, value_name = "WHERE", value_parser = parse_console)]
    console: Option<ConsoleConfig>,
    /// A port of a virtio console: pty, socket=PATH, file=PATH or off and, after a comma, name=NAME. The guest's hvc0
    /// is the first port; the others are in its /dev/virtio-ports by their names (may be repeated).
    #[arg(long, value_name = "WHERE[,name=NAME]", value_parser = parse_port)]
    virtio_console: Vec<ConsolePortConfig>,
    /// Offer counters in the text format of Prometheus, over HTTP on this Unix socket.
    #[arg(long, value_name = "SOCKET")]
    metrics: Option<PathBuf>,
    /// Take commands (see `nacre vm`) on this Unix socket.
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Go on with the machine that `nacre vm snapshot` saved in this file, instead of booting.
    #[arg(long, value_name = "FILE", conflicts_with = "incoming")]
    restore: Option<PathBuf>,
    /// Wait for a machine that `nacre vm migrate` sends to this address, instead of booting: unix:PATH, or
    /// tcp:HOST:PORT, without TLS on a network that only trusted programs use.
    #[arg(long, value_name = "ADDRESS")]
    incoming: Option<Address>,
    /// With --incoming: take the machine over TLS, from who has a certificate; the directory has ca-cert.pem,
    /// server-cert.pem and server-key.pem.
    #[arg(long, value_name = "DIRECTORY", requires = "incoming")]
    tls_certificates: Option<PathBuf>,
    /// With --restore and --incoming: take a guest that may know processor features which are missing here.
    #[arg(long)]
    any_processor: bool,
    /// Start the guest again when it asks for a reset.
    #[arg(long)]
    restart: bool,
    /// Wait for gdb at this TCP address (PORT or HOST:PORT) or Unix socket (a path).
    #[arg(long, value_name = "ADDRESS", value_parser = parse_gdb)]
    gdb: Option<GdbConfig>,
    /// Offer the debug console (port 0xE9) and debug-exit (port 0xF4) ports to test guests.
    #[arg(long)]
    debug_ports: bool,
    /// Offer what programs of kvm-unit-tests use: debug-exit, scratch, page-flush and interrupt ports, fw_cfg, scratch memory.
    #[arg(long)]
    test_devices: bool,
    /// With KVM: let the software CPU execute what KVM cannot emulate, on hosts whose KVM is software itself.
    #[arg(long)]
    kvm_assist: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum CpuModel {
    /// The x86-64 baseline.
    V1,
    /// x86-64-v2: adds SSSE3, SSE4.1, SSE4.2 and POPCNT.
    V2,
}

#[derive(Clone, Copy, ValueEnum)]
enum Accel {
    /// The one that a measurement says is faster here.
    Auto,
    /// KVM.
    Kvm,
    /// The CPU in software; works everywhere.
    Soft,
}

impl Args {
    pub fn restart(&self) -> bool {
        self.restart
    }

    pub fn metrics(&self) -> Option<PathBuf> {
        self.metrics.clone()
    }

    pub fn control(&self) -> Option<PathBuf> {
        self.control.clone()
    }

    /// Where the machine comes from.
    pub fn origin(&self) -> Origin {
        let options = RestoreOptions { check_processors: !self.any_processor, ..RestoreOptions::default() };
        match (&self.restore, &self.incoming) {
            (Some(file), _) => Origin::File(file.clone(), options),
            (None, Some(address)) => {
                let certificates = self.tls_certificates.clone();
                Origin::Connection(Incoming { address: address.clone(), certificates }, options)
            }
            (None, None) => Origin::Boot,
        }
    }

    /// The configuration that the file and the options describe.
    pub fn config(self) -> anyhow::Result<VmConfig> {
        let mut config = match &self.config {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("Cannot read the configuration {}", path.display()))?;
                serde_json::from_str(&text)
                    .with_context(|| format!("The configuration {} is malformed", path.display()))?
            }
            None => VmConfig { console: ConsoleConfig::Stdio, ..VmConfig::default() },
        };
        if let Some(kernel) = self.kernel {
            config.boot.kernel = kernel;
            config.boot.firmware = None;
        }
        if self.firmware.is_some() {
            config.boot = BootConfig { firmware: self.firmware, ..BootConfig::default() };
        }
        if self.initrd.is_some() {
            config.boot.initrd = self.initrd;
        }
        if let Some(line) = self.cmdline {
            config.boot.command_line = line;
        }
        if let Some(cpus) = self.cpus {
            config.cpus = cpus;
        }
        if let Some(size) = self.memory {
            config.memory.size = size;
        }
        if let Some(accel) = self.accel {
            config.accel = match accel {
                Accel::Auto => AccelChoice::Auto,
                Accel::Kvm => AccelChoice::Kvm,
                Accel::Soft => AccelChoice::Soft,
            };
        }
        if let Some(model) = self.cpu_model {
            config.cpu_model = Some(match model {
                CpuModel::V1 => CpuModelChoice::V1,
                CpuModel::V2 => CpuModelChoice::V2,
            });
        }
        if let Some(console) = self.console {
            config.console = console;
        }
        config.console_ports.extend(self.virtio_console);
        config.disks.extend(self.disk);
        config.nets.extend(self.net);
        if self.vsock.is_some() {
            config.vsock = self.vsock;
        }
        config.rng |= self.rng;
        config.balloon |= self.balloon;
        config.mmio |= self.mmio;
        if self.gdb.is_some() {
            config.gdb = self.gdb;
        }
        config.debug_ports |= self.debug_ports;
        config.test_devices |= self.test_devices;
        config.kvm_assist |= self.kvm_assist;
        for pin in &self.pin {
            let (vcpu, cpus) = parse_pin(pin)?;
            if vcpu >= config.cpus as usize {
                bail!("--pin {pin}: there is no vCPU {vcpu}; the guest has {}", config.cpus);
            }
            if config.cpu_affinity.len() <= vcpu {
                config.cpu_affinity.resize(vcpu + 1, Vec::new());
            }
            config.cpu_affinity[vcpu] = cpus;
        }
        Ok(config)
    }
}

/// A size with a binary suffix; plain numbers are MiB.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "K" => 10,
        "" | "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("give a number with K, M, G or T, for example 512M".into()),
    };
    let number: u64 = digits.parse().map_err(|_| "give a number with K, M, G or T, for example 512M")?;
    number.checked_mul(1 << shift).ok_or_else(|| "that is too much".into())
}

fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let mut pairs = Pairs::parse(text)?;
    let disk = DiskConfig {
        path: pairs.required("path")?.into(),
        format: pairs.required("format")?,
        id: pairs.take("id").unwrap_or_default(),
        readonly: pairs.flag("readonly")?,
        direct: pairs.flag("direct")?,
        queues: pairs.number("queues")?.unwrap_or(1),
        allow: pairs.take("allow").into_iter().map(PathBuf::from).collect(),
        changed_parents: pairs.flag("changed-parents")?,
        limits: parse_limits(&mut pairs)?,
    };
    pairs.finish()?;
    Ok(disk)
}

fn parse_net(text: &str) -> Result<NetConfig, String> {
    let mut pairs = Pairs::parse(text)?;
    let backend = match (pairs.take("tap"), pairs.take("unix"), pairs.take("vhost-user")) {
        (Some(name), None, None) => NetBackendConfig::Tap(name),
        (None, Some(path), None) => NetBackendConfig::Unix(path.into()),
        (None, None, Some(path)) => NetBackendConfig::VhostUser(path.into()),
        _ => return Err("give one of tap=NAME, unix=SOCKET and vhost-user=SOCKET".into()),
    };
    // One limit for each direction; packets are the operations.
    let limits = LimitConfig {
        bytes: pairs.number("bps")?.unwrap_or(0),
        operations: pairs.number("pps")?.unwrap_or(0),
        ..LimitConfig::default()
    };
    let net = NetConfig {
        backend,
        mac: pairs.take("mac"),
        mtu: pairs.number("mtu")?,
        id: pairs.take("id").unwrap_or_default(),
        queues: pairs.number("queues")?.unwrap_or(1),
        send_limits: limits,
        receive_limits: limits,
    };
    pairs.finish()?;
    Ok(net)
}

fn parse_vsock(text: &str) -> Result<VsockConfig, String> {
    let mut pairs = Pairs::parse(text)?;
    let cid = pairs.number("cid")?.ok_or("cid=... is missing")?;
    let vsock = VsockConfig { cid, socket: pairs.required("socket")?.into() };
    pairs.finish()?;
    Ok(vsock)
}

fn parse_limits(pairs: &mut Pairs) -> Result<LimitConfig, String> {
    Ok(LimitConfig {
        bytes: pairs.number("bps")?.unwrap_or(0),
        bytes_burst: pairs.number("bps-burst")?.unwrap_or(0),
        operations: pairs.number("iops")?.unwrap_or(0),
        operations_burst: pairs.number("iops-burst")?.unwrap_or(0),
    })
}

fn parse_gdb(text: &str) -> Result<GdbConfig, String> {
    if text.contains('/') {
        return Ok(GdbConfig::Unix(text.into()));
    }
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    let port: u16 = port.parse().map_err(|_| "give [HOST:]PORT or a path")?;
    let host = if host.is_empty() { "127.0.0.1" } else { host };
    Ok(GdbConfig::Tcp(format!("{host}:{port}")))
}

fn parse_console(text: &str) -> Result<ConsoleConfig, String> {
    Ok(match text.split_once('=') {
        None if text == "stdio" => ConsoleConfig::Stdio,
        None if text == "pty" => ConsoleConfig::Pty,
        None if text == "off" => ConsoleConfig::Off,
        Some(("socket", path)) if !path.is_empty() => ConsoleConfig::Socket(path.into()),
        Some(("file", path)) if !path.is_empty() => ConsoleConfig::File(path.into()),
        _ => return Err("give stdio, pty, socket=PATH, file=PATH or off".into()),
    })
}

fn parse_port(text: &str) -> Result<ConsolePortConfig, String> {
    let (place, name) = text.split_once(",name=").unwrap_or((text, ""));
    match parse_console(place) {
        Ok(to) if to != ConsoleConfig::Stdio => Ok(ConsolePortConfig { to, name: name.into() }),
        _ => Err("give pty, socket=PATH, file=PATH or off, and perhaps ,name=NAME".into()),
    }
}

/// `VCPU=CPUS`, where CPUS is a list of numbers and ranges.
fn parse_pin(text: &str) -> anyhow::Result<(usize, Vec<usize>)> {
    let parse = || {
        let (vcpu, list) = text.split_once('=')?;
        let mut cpus = Vec::new();
        for part in list.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
            if last >= 1024 {
                return None;
            }
            cpus.extend(first..=last);
        }
        Some((vcpu.parse().ok()?, cpus))
    };
    parse().with_context(|| format!("--pin {text}: give VCPU=CPUS, for example 0=2-3"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_suffixes() {
        let good =
            [("512", 512 << 20), ("512M", 512 << 20), ("1G", 1 << 30), ("2GiB", 2 << 30), ("64k", 64 << 10)];
        for (text, size) in good {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for text in ["", "G", "1X", "-1", "99999999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn options_override_the_file() {
        let dir = std::env::temp_dir().join(format!("nacre-options-{}.json", std::process::id()));
        std::fs::write(&dir, r#"{"cpus": 4, "boot": {"kernel": "a", "command_line": "x"}}"#).unwrap();
        let line =
            ["run", "--config", dir.to_str().unwrap(), "--kernel", "b", "--memory", "1G", "--pin", "3=0-1"];
        let config = Args::try_parse_from(line).unwrap().config().unwrap();
        std::fs::remove_file(&dir).unwrap();
        assert_eq!((config.cpus, config.memory.size), (4, 1 << 30));
        assert_eq!(config.boot.kernel, PathBuf::from("b"));
        assert_eq!(config.boot.command_line, "x");
        assert_eq!(config.cpu_affinity[3], [0, 1]);
    }

    #[test]
    fn a_cpu_model_can_be_chosen() {
        let config = |line: &[&str]| Args::try_parse_from(line).unwrap().config().unwrap();
        assert_eq!(config(&["run", "--kernel", "k"]).cpu_model, None);
        let chosen = config(&["run", "--kernel", "k", "--cpu-model", "v1", "--test-devices", "--kvm-assist"]);
        assert_eq!(chosen.cpu_model, Some(CpuModelChoice::V1));
        assert!(chosen.test_devices && chosen.kvm_assist);
        assert!(Args::try_parse_from(["run", "--kernel", "k", "--cpu-model", "v9"]).is_err());
    }

    #[test]
    fn console_ports_have_names() {
        let line = ["run", "--kernel", "k", "--virtio-console", "off", "--virtio-console", "file=a,name=log"];
        let config = Args::try_parse_from(line).unwrap().config().unwrap();
        let port = |to, name: &str| ConsolePortConfig { to, name: name.into() };
        let expected = [port(ConsoleConfig::Off, ""), port(ConsoleConfig::File("a".into()), "log")];
        assert_eq!(config.console_ports, expected);
    }

    #[test]
    fn wrong_options_are_refused() {
        for line in [
            vec!["run"],
            vec!["run", "--kernel", "k", "--console", "socket="],
            vec!["run", "--kernel", "k", "--virtio-console", "stdio"],
            vec!["run", "--kernel", "k", "--accel", "xen"],
            vec!["run", "--kernel", "k", "--disk", "path=d"],
            vec!["run", "--kernel", "k", "--disk", "path=d,format=raw,color=red"],
            vec!["run", "--kernel", "k", "--memory", "lots"],
        ] {
            assert!(Args::try_parse_from(&line).is_err(), "{line:?}");
        }
        let pin = Args::try_parse_from(["run", "--kernel", "k", "--pin", "1=0"]).unwrap();
        assert!(pin.config().is_err());
    }
}
