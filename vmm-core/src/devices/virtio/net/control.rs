//! The commands of the control queue (virtio 1.2, section 5.1.6.5).

use std::io;
use std::sync::atomic::Ordering;

use super::super::chain::{Chain, Reader};
use super::super::device::DeviceError;
use super::{ANNOUNCE, Core, net_features as f};
use crate::memory::{AccessError, GuestMemory};

const RX: u8 = 0;
const MAC: u8 = 1;
const ANNOUNCEMENT: u8 = 3;
const MQ: u8 = 4;
const GUEST_OFFLOADS: u8 = 5;
/// Addresses of one table that are read at most; the filter lets everything pass when a table is this long.
const MAX_TABLE: u32 = 256;

/// Executes one command; returns the used length.
pub(super) fn execute(core: &Core, chain: &Chain, memory: &GuestMemory) -> Result<u32, DeviceError> {
    let mut reader = chain.reader(memory);
    let [class, command] =
        reader.read_obj::<[u8; 2]>()?.ok_or(DeviceError::Request("a network command has no header"))?;
    let done = match (class, command) {
        (RX, 0..=5) => mode(core, command, &mut reader)?,
        (MAC, 0) => tables(core, &mut reader)?,
        (MAC, 1) => address(core, &mut reader)?,
        (ANNOUNCEMENT, 0) => {
            core.config.lock().status &= !ANNOUNCE;
            true
        }
        (MQ, 0) => succeeded(pairs(core, &mut reader)?),
        (GUEST_OFFLOADS, 0) => succeeded(offloads(core, &mut reader)?),
        _ => false,
    };
    let mut writer = chain.writer(memory);
    if writer.write(&[u8::from(!done)])? == 0 {
        return Err(DeviceError::Request("a network command has no room for its status"));
    }
    Ok(1)
}

fn succeeded(result: io::Result<bool>) -> bool {
    result.unwrap_or_else(|error| {
        tracing::warn!(%error, "Network command failed");
        false
    })
}

fn mode(core: &Core, command: u8, reader: &mut Reader<'_>) -> Result<bool, AccessError> {
    let Some(value) = reader.read_obj::<u8>()? else { return Ok(false) };
    let mut filter = core.filter.lock();
    let flag = match command {
        0 => &mut filter.promiscuous,
        1 => &mut filter.all_multicast,
        2 => &mut filter.all_unicast,
        3 => &mut filter.no_multicast,
        4 => &mut filter.no_unicast,
        _ => &mut filter.no_broadcast,
    };
    *flag = value != 0;
    Ok(true)
}

fn table(reader: &mut Reader<'_>) -> Result<Option<Vec<[u8; 6]>>, AccessError> {
    let Some(count) = reader.read_obj::<u32>()? else { return Ok(None) };
    let count = u32::from_le(count);
    if u64::from(count) * 6 > u64::from(reader.remaining()) {
        return Ok(None);
    }
    let mut addresses = Vec::new();
    for index in 0..count {
        if let Some(address) = reader.read_obj::<[u8; 6]>()?
            && index < MAX_TABLE
        {
            addresses.push(address);
        }
    }
    Ok(Some(addresses))
}

fn tables(core: &Core, reader: &mut Reader<'_>) -> Result<bool, AccessError> {
    let (Some(unicast), Some(multicast)) = (table(reader)?, table(reader)?) else { return Ok(false) };
    core.filter.lock().set_tables(unicast, multicast);
    Ok(true)
}

fn address(core: &Core, reader: &mut Reader<'_>) -> Result<bool, AccessError> {
    let Some(mac) = reader.read_obj::<[u8; 6]>()? else { return Ok(false) };
    core.filter.lock().mac = mac;
    core.config.lock().mac = mac;
    Ok(true)
}

fn pairs(core: &Core, reader: &mut Reader<'_>) -> Result<io::Result<bool>, AccessError> {
    let Some(pairs) = reader.read_obj::<u16>()?.map(u16::from_le) else { return Ok(Ok(false)) };
    if core.offloads.load(Ordering::Acquire) & f::MQ == 0
        || pairs == 0
        || pairs > core.config.lock().max_pairs
    {
        return Ok(Ok(false));
    }
    Ok(core.backend.set_active_pairs(pairs).map(|()| {
        core.set_active(pairs);
        true
    }))
}

fn offloads(core: &Core, reader: &mut Reader<'_>) -> Result<io::Result<bool>, AccessError> {
    const CHANGEABLE: u64 = f::GUEST_CSUM | f::GUEST_TSO4 | f::GUEST_TSO6 | f::GUEST_ECN;
    let Some(wanted) = reader.read_obj::<u64>()?.map(u64::from_le) else { return Ok(Ok(false)) };
    let offered = core.backend.offloads() & CHANGEABLE;
    if wanted & !offered != 0 {
        return Ok(Ok(false));
    }
    let features = core.offloads.load(Ordering::Acquire) & !CHANGEABLE | wanted;
    Ok(core.backend.set_offloads(features).map(|()| {
        core.offloads.store(features, Ordering::Release);
        true
    }))
}
