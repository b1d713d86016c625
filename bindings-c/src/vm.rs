//! Virtual machines.

use std::ffi::{c_char, c_int};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vmm_core::devices::virtio::VirtioDevice;
use vmm_core::devices::virtio::net::NetOptions;
use vmm_core::machine::{
    AccelChoice, ConsoleConfig, DiskConfig, NetBackendConfig, NetConfig, StopReason, Vm, VmBuilder, VmConfig,
    VmError, VmEvent, mac_address,
};

use crate::accel::nacre_accel;
use crate::border::{Failure, guard, put};
use crate::disk::nacre_disk_options;
use crate::error::nacre_error;
use crate::handle::Table;
use crate::options::{self, Options};
use crate::status::nacre_status::{self, *};
use crate::switch::{self, nacre_switch};
use crate::text;

/// A virtual machine. Free it with `nacre_vm_free`, which also stops it.
pub enum nacre_vm {}

static VMS: Table<Vm> = Table::new(3, "virtual machine");

/// A list longer than this is a caller's mistake.
const MAX_DEVICES: usize = 1024;

/// A network card.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nacre_net_options {
    /// `sizeof(struct nacre_net_options)`.
    pub struct_size: usize,
    /// The Unix stream socket of a switch, passt or gvproxy. Either this, `tap` or `switch_` is required.
    pub unix_socket: *const c_char,
    /// A tap interface of the host.
    pub tap: *const c_char,
    /// MAC address, such as "52:54:00:12:34:56"; null for a random one.
    pub mac: *const c_char,
    /// A switch of this process; the machine gets a new port of it.
    pub switch_: *const nacre_switch,
    /// The name of that port; null for one made of the MAC address.
    pub port_name: *const c_char,
    /// The VLAN that the machine's frames belong to, 1 to 4094; 0 for none. Only with `switch_`.
    pub vlan: u16,
    /// Must be zero.
    pub reserved: [u8; 6],
}

// SAFETY: repr(C), starts with a usize, pointers and integers only.
unsafe impl Options for nacre_net_options {
    const FIRST_SIZE: usize = 56;
    const NAME: &'static str = "nacre_net_options";
}

/// A machine. Set `struct_size` and either `kernel` or `firmware`, and zero the rest for defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nacre_vm_options {
    /// `sizeof(struct nacre_vm_options)`.
    pub struct_size: usize,
    /// A Linux bzImage or an ELF file. Required without `firmware`.
    pub kernel: *const c_char,
    /// An initial RAM disk, or null.
    pub initrd: *const c_char,
    /// The kernel's command line, or null.
    pub command_line: *const c_char,
    /// RAM in bytes, a multiple of 4096; 0 for 256 MiB.
    pub memory: u64,
    /// vCPUs; 0 for one.
    pub cpus: u32,
    /// The accelerator, one of `enum nacre_accel`.
    pub accel: u32,
    /// Whether `console_fd` is used; otherwise the serial console is silent.
    pub console: bool,
    /// Offer an entropy device.
    pub rng: bool,
    /// Must be zero.
    pub reserved: [u8; 2],
    /// A descriptor that the serial console's output is written to. Duplicated.
    pub console_fd: c_int,
    /// Disks; all their options count. Null when `disk_count` is 0.
    pub disks: *const *const nacre_disk_options,
    /// Number of disks.
    pub disk_count: usize,
    /// Network cards. Null when `net_count` is 0.
    pub nets: *const *const nacre_net_options,
    /// Number of network cards.
    pub net_count: usize,
    /// A BIOS image, such as SeaBIOS's bios-256k.bin, which boots from a disk; instead of a kernel. Or null.
    pub firmware: *const c_char,
}

// SAFETY: repr(C), starts with a usize; pointers and integers may have any bits, the flags are checked as bytes.
unsafe impl Options for nacre_vm_options {
    const FIRST_SIZE: usize = 88;
    const NAME: &'static str = "nacre_vm_options";
    const FLAGS: &'static [usize] = &[48, 49];
}

/// Why a machine stopped.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nacre_stop_reason {
    /// The guest switched itself off.
    NACRE_STOP_POWER_OFF = 1,
    /// The guest asked for a reset: build a new machine from the same options.
    NACRE_STOP_RESET = 2,
    /// The guest's kernel panicked.
    NACRE_STOP_PANIC = 3,
    /// The guest caused a triple fault.
    NACRE_STOP_TRIPLE_FAULT = 4,
    /// A test guest ended with a code.
    NACRE_STOP_EXIT = 5,
    /// `nacre_vm_stop` or `nacre_vm_free` was called.
    NACRE_STOP_STOPPED = 6,
    /// A vCPU or device failed; `nacre_vm_wait` returned the details as an error.
    NACRE_STOP_ERROR = 7,
}

/// What happened to a machine.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nacre_vm_event {
    /// Nothing: there is no event.
    NACRE_EVENT_NONE = 0,
    /// The vCPUs began to run.
    NACRE_EVENT_STARTED = 1,
    /// The machine is paused.
    NACRE_EVENT_PAUSED = 2,
    /// The machine runs again.
    NACRE_EVENT_RESUMED = 3,
    /// The guest's kernel panicked.
    NACRE_EVENT_PANICKED = 4,
    /// The machine stopped; the last event.
    NACRE_EVENT_STOPPED = 5,
    /// Something that this version of the header has no name for.
    NACRE_EVENT_OTHER = 6,
}

fn failure(error: VmError) -> Failure {
    let status = match &error {
        VmError::Config(_) => NACRE_INVALID_ARGUMENT,
        VmError::Memory(_) | VmError::Host { .. } => NACRE_NO_RESOURCES,
        VmError::Accel(_) => NACRE_UNSUPPORTED,
        VmError::Stopped => NACRE_WRONG_STATE,
        VmError::NetSocket { .. } => NACRE_NOT_FOUND,
        _ => NACRE_IO,
    };
    Failure::from_error(status, &error)
}

/// Reads a list of option structures.
///
/// # Safety
/// `list` is null or points to `count` pointers, each as [`options::read`] asks.
unsafe fn list<T: Options>(list: *const *const T, count: usize, name: &str) -> Result<Vec<T>, Failure> {
    if count > MAX_DEVICES {
        return Err(Failure::invalid(format!(
            "{name} has {count} entries; at most {MAX_DEVICES} are possible"
        )));
    }
    if list.is_null() && count > 0 {
        return Err(Failure::invalid(format!("{name} is null though its count is {count}")));
    }
    // SAFETY: promised by the caller; the list may have any alignment.
    (0..count).map(|i| unsafe { options::read(list.add(i).read_unaligned()) }).collect()
}

/// The configuration that options describe.
///
/// # Safety
/// As `nacre_vm_build`.
unsafe fn config(o: &nacre_vm_options) -> Result<VmConfig, Failure> {
    let mut config =
        VmConfig { cpus: o.cpus.max(1), rng: o.rng, console: ConsoleConfig::Off, ..VmConfig::default() };
    // SAFETY: promised by the caller, here and below.
    config.boot.firmware = unsafe { text::optional(o.firmware, "firmware") }?.map(PathBuf::from);
    // Who gives both is told by the machine's builder.
    if config.boot.firmware.is_none() || !o.kernel.is_null() {
        // SAFETY: as above.
        config.boot.kernel = unsafe { text::required(o.kernel, "kernel") }?.into();
    }
    // SAFETY: as above.
    config.boot.initrd = unsafe { text::optional(o.initrd, "initrd") }?.map(PathBuf::from);
    // SAFETY: as above.
    config.boot.command_line = unsafe { text::optional(o.command_line, "command_line") }?.unwrap_or_default();
    if o.memory != 0 {
        config.memory.size = o.memory;
    }
    config.accel = match o.accel {
        a if a == nacre_accel::NACRE_ACCEL_AUTO as u32 => AccelChoice::Auto,
        a if a == nacre_accel::NACRE_ACCEL_KVM as u32 => AccelChoice::Kvm,
        a if a == nacre_accel::NACRE_ACCEL_SOFT as u32 => AccelChoice::Soft,
        other => return Err(Failure::invalid(format!("There is no accelerator {other}"))),
    };
    // SAFETY: as above.
    for disk in unsafe { list(o.disks, o.disk_count, "disks") }? {
        config.disks.push(DiskConfig {
            // SAFETY: as above.
            path: unsafe { text::required(disk.path, "disk path") }?.into(),
            // SAFETY: as above.
            format: unsafe { text::required(disk.format, "disk format") }?,
            // SAFETY: as above.
            id: unsafe { text::optional(disk.id, "disk id") }?.unwrap_or_default(),
            readonly: disk.read_only,
            direct: disk.direct,
            queues: 1,
            // The policy lists directories; the root contains every file.
            allow: if disk.trust_headers { vec!["/".into()] } else { Vec::new() },
            changed_parents: disk.changed_parents,
            limits: Default::default(),
        });
    }
    Ok(config)
}

/// Adds a network card.
///
/// # Safety
/// As `nacre_vm_build`.
unsafe fn add_net(
    net: &nacre_net_options,
    config: &mut VmConfig,
    devices: &mut Vec<Arc<dyn VirtioDevice>>,
) -> Result<(), Failure> {
    // SAFETY: promised by the caller, here and below.
    let unix = unsafe { text::optional(net.unix_socket, "unix_socket") }?;
    // SAFETY: as above.
    let tap = unsafe { text::optional(net.tap, "tap") }?;
    // SAFETY: as above.
    let mac = unsafe { text::optional(net.mac, "mac") }?;
    // SAFETY: as above.
    let port_name = unsafe { text::optional(net.port_name, "port_name") }?;
    let backend = match (unix, tap, net.switch_.is_null()) {
        (Some(path), None, true) => NetBackendConfig::Unix(path.into()),
        (None, Some(name), true) => NetBackendConfig::Tap(name),
        (None, None, false) => {
            let options =
                NetOptions { mac: mac_address(mac.as_deref()).map_err(failure)?, ..NetOptions::default() };
            let name = port_name.unwrap_or_else(|| options.mac.map(|b| format!("{b:02x}")).join(":"));
            devices.push(switch::network_card(net.switch_, &name, net.vlan, &options)?);
            return Ok(());
        }
        _ => return Err(Failure::invalid("A network card needs one of 'unix_socket', 'tap' and 'switch_'")),
    };
    config.nets.push(NetConfig {
        backend,
        mac,
        mtu: None,
        id: String::new(),
        queues: 1,
        send_limits: Default::default(),
        receive_limits: Default::default(),
    });
    Ok(())
}

/// Builds a machine; start it with `nacre_vm_start`.
///
/// # Safety
/// `options` is null or points to a structure with `struct_size` set, whose strings are null or terminated and whose
/// lists are as long as it says. `vm` and `error` are null or point to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_vm_build(
    options: *const nacre_vm_options,
    vm: *mut *mut nacre_vm,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        // SAFETY: promised by the caller, here and below.
        unsafe { put(vm, "vm", std::ptr::null_mut()) }?;
        // SAFETY: as above.
        let o = unsafe { options::read(options) }?;
        // SAFETY: as above.
        let mut config = unsafe { config(&o) }?;
        let mut devices = Vec::new();
        // SAFETY: as above.
        for net in unsafe { list(o.nets, o.net_count, "nets") }? {
            // SAFETY: as above.
            unsafe { add_net(&net, &mut config, &mut devices) }?;
        }
        let mut builder = devices.into_iter().fold(Vm::builder(config), VmBuilder::device);
        if o.console {
            if o.console_fd < 0 {
                return Err(Failure::invalid(format!("Descriptor {} is not open", o.console_fd)));
            }
            // SAFETY: not -1; a closed descriptor makes the duplication fail.
            let fd = unsafe { BorrowedFd::borrow_raw(o.console_fd) }.try_clone_to_owned();
            let file = File::from(fd.map_err(|e| Failure {
                status: NACRE_INVALID_ARGUMENT,
                messages: vec!["Cannot use console_fd".into(), e.to_string()],
            })?);
            // A console that nobody reads any more does not stop the guest.
            builder = builder.serial_output(move |data: &[u8]| drop((&file).write_all(data)));
        }
        let handle = VMS.insert(Arc::new(builder.build().map_err(failure)?))?;
        // SAFETY: as above.
        unsafe { put(vm, "vm", handle) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Builds a machine from a JSON configuration, as `nacre run --config` takes it and `nacre schema` describes it.
///
/// # Safety
/// `json` is null or a terminated string; `vm` and `error` are null or point to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_vm_build_json(
    json: *const c_char,
    vm: *mut *mut nacre_vm,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        // SAFETY: promised by the caller, here and below.
        unsafe { put(vm, "vm", std::ptr::null_mut()) }?;
        // SAFETY: as above.
        let json = unsafe { text::required(json, "json") }?;
        let config: VmConfig = serde_json::from_str(&json).map_err(|e| Failure {
            status: NACRE_INVALID_ARGUMENT,
            messages: vec!["The configuration cannot be used".into(), e.to_string()],
        })?;
        let handle = VMS.insert(Arc::new(Vm::builder(config).build().map_err(failure)?))?;
        // SAFETY: as above.
        unsafe { put(vm, "vm", handle) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Lets the machine run, at first or after `nacre_vm_pause`.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_vm_start(vm: *const nacre_vm, error: *mut *mut nacre_error) -> nacre_status {
    // SAFETY: promised by the caller.
    unsafe { guard(error, || VMS.get(vm)?.start().map_err(failure)) }
}

/// Stops the vCPUs, then the devices. Afterwards guest memory and disks do not change until `nacre_vm_start`.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_vm_pause(vm: *const nacre_vm, error: *mut *mut nacre_error) -> nacre_status {
    // SAFETY: promised by the caller.
    unsafe { guard(error, || VMS.get(vm)?.pause().map_err(failure)) }
}

/// Presses the power button: a guest that listens shuts down.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_vm_press_power_button(
    vm: *const nacre_vm,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        VMS.get(vm)?.press_power_button();
        Ok(())
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Stops the machine at once, as if the power failed. `nacre_vm_wait` returns afterwards.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_vm_stop(vm: *const nacre_vm, error: *mut *mut nacre_error) -> nacre_status {
    let body = || {
        VMS.get(vm)?.stop();
        Ok(())
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Waits until the machine has stopped, at most `timeout_ms` milliseconds (for ever when negative), and says why.
/// Returns `NACRE_TIMEOUT` when it still runs then. With `NACRE_STOP_ERROR` the result is `NACRE_IO` and the error
/// says what failed. `exit_code` (may be null) receives the code of `NACRE_STOP_EXIT`, otherwise 0.
///
/// # Safety
/// `reason`, `exit_code` and `error` are null or point to room for their values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_vm_wait(
    vm: *const nacre_vm,
    timeout_ms: i64,
    reason: *mut nacre_stop_reason,
    exit_code: *mut u8,
    error: *mut *mut nacre_error,
) -> nacre_status {
    use nacre_stop_reason::*;
    let body = || {
        let vm = VMS.get(vm)?;
        let stop = match u64::try_from(timeout_ms) {
            Ok(ms) => vm.wait_timeout(Duration::from_millis(ms)),
            Err(_) => Some(vm.wait()),
        };
        let Some(stop) = stop else {
            return Err(Failure::new(NACRE_TIMEOUT, "The machine still runs"));
        };
        let (kind, code, failed) = match stop {
            StopReason::PowerOff => (NACRE_STOP_POWER_OFF, 0, None),
            StopReason::Reset => (NACRE_STOP_RESET, 0, None),
            StopReason::Panic => (NACRE_STOP_PANIC, 0, None),
            StopReason::TripleFault => (NACRE_STOP_TRIPLE_FAULT, 0, None),
            StopReason::Exit(code) => (NACRE_STOP_EXIT, code, None),
            StopReason::Stopped => (NACRE_STOP_STOPPED, 0, None),
            // This library moves no machine.
            StopReason::Moved => (NACRE_STOP_STOPPED, 0, None),
            StopReason::Error(text) => (NACRE_STOP_ERROR, 0, Some(text)),
        };
        // SAFETY: promised by the caller.
        unsafe { put(reason, "reason", kind) }?;
        if !exit_code.is_null() {
            // SAFETY: promised by the caller.
            unsafe { exit_code.write(code) };
        }
        failed.map_or(Ok(()), |text| Err(Failure::new(NACRE_IO, text)))
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// A descriptor that polls as readable while there are events. It belongs to the machine: poll it, do not read or
/// close it. -1 when the handle is bad.
#[unsafe(no_mangle)]
pub extern "C" fn nacre_vm_event_fd(vm: *const nacre_vm) -> c_int {
    VMS.get(vm).map_or(-1, |vm| vm.events().as_fd().as_raw_fd())
}

/// Takes the oldest event; `NACRE_EVENT_NONE` when there is none.
///
/// # Safety
/// `event` and `error` are null or point to room for their values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_vm_next_event(
    vm: *const nacre_vm,
    event: *mut nacre_vm_event,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let next = match VMS.get(vm)?.events().take() {
            None => nacre_vm_event::NACRE_EVENT_NONE,
            Some(VmEvent::Started) => nacre_vm_event::NACRE_EVENT_STARTED,
            Some(VmEvent::Paused) => nacre_vm_event::NACRE_EVENT_PAUSED,
            Some(VmEvent::Resumed) => nacre_vm_event::NACRE_EVENT_RESUMED,
            Some(VmEvent::Panicked) => nacre_vm_event::NACRE_EVENT_PANICKED,
            Some(VmEvent::Stopped(_)) => nacre_vm_event::NACRE_EVENT_STOPPED,
            Some(_) => nacre_vm_event::NACRE_EVENT_OTHER,
        };
        // SAFETY: promised by the caller.
        unsafe { put(event, "event", next) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Stops and frees a machine. Calls that wait for it return. Threads, files and memory are released when the last
/// call that is under way in another thread has returned.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_vm_free(vm: *mut nacre_vm, error: *mut *mut nacre_error) -> nacre_status {
    let body = || {
        VMS.remove(vm)?.stop();
        Ok(())
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}
