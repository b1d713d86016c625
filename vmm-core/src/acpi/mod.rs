//! ACPI tables: what the guest learns of its processors, interrupts, PCI bus and chipset (ACPI 6.5).

mod dsdt;
mod tables;

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

const OEM_ID: [u8; 6] = *b"NACRE ";
const OEM_TABLE: [u8; 8] = *b"NACREVM ";
const OEM_REVISION: u32 = 1;

/// The processors and RAM of one NUMA node.
#[derive(Clone, Debug, Default)]
pub struct NumaNode {
    /// APIC IDs.
    pub cpus: Vec<u32>,
    /// Guest-physical ranges of RAM.
    pub memory: Vec<Range<u64>>,
    /// Relative distance to each node (10 is local).
    pub distances: Vec<u8>,
}

/// A virtio device at a fixed MMIO address.
#[derive(Clone, Copy, Debug)]
pub struct MmioDevice {
    /// First address of its 4 KiB register page.
    pub address: u32,
    /// Its wired interrupt.
    pub gsi: u32,
}

/// The PCI root complex.
#[derive(Clone, Debug)]
pub struct PciRootInfo {
    /// ECAM window of bus 0.
    pub ecam: Range<u64>,
    /// Memory window below 4 GiB.
    pub mmio32: Range<u64>,
    /// Memory window above 4 GiB.
    pub mmio64: Range<u64>,
    /// I/O port window.
    pub io: Range<u64>,
    /// GSIs of the four interrupt lines: pin `p` of slot `s` uses line `(s + p) % 4`.
    pub intx: [u32; 4],
}

/// What the tables describe.
#[derive(Clone, Debug, Default)]
pub struct Platform {
    /// Number of vCPUs, with APIC IDs from 0.
    pub cpus: u32,
    /// The PCI root, unless the machine has none.
    pub pci: Option<PciRootInfo>,
    /// virtio devices over MMIO.
    pub mmio: Vec<MmioDevice>,
    /// Whether there is a serial port at COM1.
    pub serial: bool,
    /// Guest-physical address of the VM generation ID, if there is one.
    pub generation_id: Option<u64>,
    /// NUMA nodes; empty for none.
    pub numa: Vec<NumaNode>,
}

/// Interrupt of the power button and of general-purpose events.
pub const SCI_GSI: u32 = 9;
/// Interrupt of COM1.
pub const SERIAL_GSI: u32 = 4;
/// General-purpose event that says that the VM generation ID changed.
pub const GENERATION_ID_GPE: u8 = 0;
/// Address of the IO-APIC's registers.
pub const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
/// Address of the local APICs' registers.
pub const LAPIC_ADDRESS: u32 = 0xfee0_0000;

/// Why tables cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They are longer than the area for them.
    #[error("ACPI tables of {need} bytes do not fit into {room}; use fewer vCPUs or devices")]
    TooLong {
        /// Length of all tables.
        need: u64,
        /// Length of the area.
        room: u64,
    },
}

/// Tables that are laid out one after another.
struct Layout {
    base: u64,
    bytes: Vec<u8>,
}

impl Layout {
    /// Appends a table at a 64-byte boundary and returns its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let at = self.base + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        at
    }
}

/// Length of the RSDP.
pub const RSDP_LEN: usize = 36;

/// Makes all tables for `area`, the RSDP first.
///
/// # Errors
/// Fails when the area is too small.
pub fn build(area: &Range<u64>, platform: &Platform) -> Result<Vec<u8>, AcpiError> {
    let mut layout = Layout { base: area.start, bytes: vec![0; RSDP_LEN] };
    let facs = layout.add(&acpi_tables::facs::FACS::new());
    let dsdt = layout.add(&dsdt::build(platform));
    let mut entries = vec![layout.add(&tables::fadt(facs, dsdt)), layout.add(&tables::madt(platform.cpus))];
    if let Some(pci) = &platform.pci {
        let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE, OEM_REVISION);
        mcfg.add_ecam(pci.ecam.start, 0, 0, last_bus(&pci.ecam));
        entries.push(layout.add(&mcfg));
    }
    if !platform.numa.is_empty() {
        entries.push(layout.add(&tables::srat(&platform.numa)));
        entries.push(layout.add(&tables::slit(&platform.numa)));
    }
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let xsdt = layout.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    layout.bytes[..rsdp.len()].copy_from_slice(&rsdp);

    let (need, room) = (layout.bytes.len() as u64, area.end - area.start);
    if need > room {
        return Err(AcpiError::TooLong { need, room });
    }
    Ok(layout.bytes)
}

/// Number of the last bus in an ECAM window (1 MiB a bus).
fn last_bus(ecam: &Range<u64>) -> u8 {
    (((ecam.end - ecam.start) >> 20).saturating_sub(1)).min(255) as u8
}

#[cfg(test)]
mod tests;
