//! Virtual switches.

use std::ffi::c_char;
use std::net::Ipv4Addr;
use std::sync::Arc;

use nacre_engine::CardError;
use vmm_core::devices::virtio::VirtioDevice;
use vmm_core::devices::virtio::net::NetOptions;
use vswitch::{
    GatewayConfig, GatewayPort, NetdevPort, Port, PortConfig, StreamMode, StreamPort, Switch, VlanMode,
};

use crate::border::{Failure, guard, put};
use crate::error::nacre_error;
use crate::handle::Table;
use crate::options::{self, Options};
use crate::status::nacre_status::{self, *};
use crate::text;

/// A virtual switch with its worker threads. Free it with `nacre_switch_free`.
pub enum nacre_switch {}

static SWITCHES: Table<Switch> = Table::new(4, "switch");

/// A switch. Set `struct_size` and zero the rest for defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nacre_switch_options {
    /// `sizeof(struct nacre_switch_options)`.
    pub struct_size: usize,
    /// Worker threads; 0 for one.
    pub workers: usize,
}

// SAFETY: repr(C), integers only, starts with a usize.
unsafe impl Options for nacre_switch_options {
    const FIRST_SIZE: usize = 16;
    const NAME: &'static str = "nacre_switch_options";
}

/// Where a port of a switch leads to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nacre_port_kind {
    /// A Unix stream socket that the switch listens on (`target`: its path); QEMU's and passt's framing.
    NACRE_PORT_UNIX = 1,
    /// A Unix stream socket that the switch connects to (`target`: its path), for example passt's.
    NACRE_PORT_UNIX_CONNECT = 2,
    /// A tap interface, made when it does not exist (`target`: its name).
    NACRE_PORT_TAP = 3,
    /// A DHCP server and gateway inside the switch (`target`: its network, such as "10.0.0.0/24").
    NACRE_PORT_DHCP = 4,
}

/// A port. Set `struct_size` and zero the rest for defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nacre_port_options {
    /// `sizeof(struct nacre_port_options)`.
    pub struct_size: usize,
    /// The port's name, unique in the switch. Required.
    pub name: *const c_char,
    /// Where it leads to. Required, except for `nacre_vm_options`, which names a port of a machine.
    pub target: *const c_char,
    /// One of `enum nacre_port_kind`.
    pub kind: u32,
    /// The VLAN that untagged frames belong to (access port), 1 to 4094; 0 for a port without VLANs.
    pub vlan: u16,
    /// Must be zero.
    pub reserved: [u8; 2],
}

// SAFETY: repr(C), pointers and integers only, starts with a usize.
unsafe impl Options for nacre_port_options {
    const FIRST_SIZE: usize = 32;
    const NAME: &'static str = "nacre_port_options";
}

/// Counters of a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct nacre_port_stats {
    /// Frames that came in.
    pub rx_packets: u64,
    /// Bytes that came in.
    pub rx_bytes: u64,
    /// Frames that went out.
    pub tx_packets: u64,
    /// Bytes that went out.
    pub tx_bytes: u64,
}

fn failure(error: vswitch::Error) -> Failure {
    Failure::from_error(NACRE_INVALID_ARGUMENT, &error)
}

fn port_config(vlan: u16) -> Result<PortConfig, Failure> {
    match vlan {
        0 => Ok(PortConfig::default()),
        1..=4094 => Ok(PortConfig { vlan: VlanMode::Access(vlan), ..PortConfig::default() }),
        _ => Err(Failure::invalid(format!("VLAN {vlan} does not exist; give 1 to 4094"))),
    }
}

/// Makes a switch without ports; its workers start at once.
///
/// # Safety
/// `options` is null (for defaults) or points to a structure with `struct_size` set. `switch_` and `error` are null or
/// point to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_switch_new(
    options: *const nacre_switch_options,
    switch_: *mut *mut nacre_switch,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        // SAFETY: promised by the caller, here and below.
        unsafe { put(switch_, "switch_", std::ptr::null_mut()) }?;
        let workers = match options.is_null() {
            true => 1,
            // SAFETY: as above.
            false => unsafe { options::read(options) }?.workers.max(1),
        };
        if workers > 64 {
            return Err(Failure::invalid(format!("{workers} workers; at most 64 are possible")));
        }
        let made = Switch::builder().workers(workers).build().map_err(failure)?;
        let handle = SWITCHES.insert(Arc::new(made))?;
        // SAFETY: as above.
        unsafe { put(switch_, "switch_", handle) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

fn network(target: &str) -> Result<GatewayConfig, Failure> {
    let parsed =
        target.split_once('/').and_then(|(a, p)| Some((a.parse::<Ipv4Addr>().ok()?, p.parse().ok()?)));
    let (address, prefix) =
        parsed.ok_or_else(|| Failure::invalid(format!("{target:?} is no network such as 10.0.0.0/24")))?;
    GatewayConfig::network(address, prefix).map_err(failure)
}

/// Adds a port. For a port of a machine, name the switch in `nacre_net_options` instead.
///
/// # Safety
/// `options` is null or points to a structure with `struct_size` set, whose strings are null or terminated. `error` is
/// null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_switch_add_port(
    switch_: *const nacre_switch,
    options: *const nacre_port_options,
    error: *mut *mut nacre_error,
) -> nacre_status {
    use nacre_port_kind::*;
    let body = || {
        let switch = SWITCHES.get(switch_)?;
        // SAFETY: promised by the caller, here and below.
        let o = unsafe { options::read(options) }?;
        // SAFETY: as above.
        let name = unsafe { text::required(o.name, "name") }?;
        // SAFETY: as above.
        let target = unsafe { text::required(o.target, "target") }?;
        let config = port_config(o.vlan)?;
        let is = |kind: nacre_port_kind| o.kind == kind as u32;
        let added = if is(NACRE_PORT_UNIX) {
            add(&switch, &name, StreamPort::new(&target, StreamMode::Listen), config)
        } else if is(NACRE_PORT_UNIX_CONNECT) {
            add(&switch, &name, StreamPort::new(&target, StreamMode::Connect), config)
        } else if is(NACRE_PORT_TAP) {
            add(&switch, &name, NetdevPort::tap(&target, 1), config)
        } else if is(NACRE_PORT_DHCP) {
            add(&switch, &name, GatewayPort::new(network(&target)?, switch.clock().clone()), config)
        } else {
            return Err(Failure::invalid(format!("There is no kind of port {}", o.kind)));
        };
        added.map_err(failure)
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

fn add<P: Port + 'static, E: Into<vswitch::Error>>(
    switch: &Switch,
    name: &str,
    port: Result<P, E>,
    config: PortConfig,
) -> vswitch::Result<()> {
    switch.add_port(name, port.map_err(Into::into)?, config).map(drop)
}

/// Removes a port. A machine that is attached to it sees its link go down.
///
/// # Safety
/// `name` is null or a terminated string; `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_switch_remove_port(
    switch_: *const nacre_switch,
    name: *const c_char,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let switch = SWITCHES.get(switch_)?;
        // SAFETY: promised by the caller.
        let name = unsafe { text::required(name, "name") }?;
        switch.remove_port(port_id(&switch, &name)?).map_err(failure)
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

fn port_id(switch: &Switch, name: &str) -> Result<vswitch::PortId, Failure> {
    switch
        .port_id(name)
        .ok_or_else(|| Failure::new(NACRE_NOT_FOUND, format!("The switch has no port {name:?}")))
}

/// Reads a port's counters.
///
/// # Safety
/// `name` is null or a terminated string; `stats` and `error` are null or point to room for their values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_switch_port_stats(
    switch_: *const nacre_switch,
    name: *const c_char,
    stats: *mut nacre_port_stats,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        let switch = SWITCHES.get(switch_)?;
        // SAFETY: promised by the caller, here and below.
        let name = unsafe { text::required(name, "name") }?;
        let s = switch.port_stats(port_id(&switch, &name)?).map_err(failure)?;
        let value = nacre_port_stats {
            rx_packets: s.rx_packets,
            rx_bytes: s.rx_bytes,
            tx_packets: s.tx_packets,
            tx_bytes: s.tx_bytes,
        };
        // SAFETY: as above.
        unsafe { put(stats, "stats", value) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// Stops and frees a switch. Machines that are attached to it see their links go down.
///
/// # Safety
/// `error` is null or points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_switch_free(
    switch_: *mut nacre_switch,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        drop(SWITCHES.remove(switch_)?);
        Ok(())
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

/// A network card whose other end is a new port of a switch in this process.
pub(crate) fn network_card(
    switch_: *const nacre_switch,
    name: &str,
    vlan: u16,
    options: &NetOptions,
) -> Result<Arc<dyn VirtioDevice>, Failure> {
    let switch = SWITCHES.get(switch_)?;
    nacre_engine::switch_card(&switch, name, port_config(vlan)?, options).map_err(|error| match error {
        CardError::Host(_) => Failure::from_error(NACRE_NO_RESOURCES, &error),
        CardError::Switch(_) => Failure::from_error(NACRE_INVALID_ARGUMENT, &error),
    })
}
