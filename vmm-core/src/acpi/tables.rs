//! The static tables.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;
use acpi_tables::slit::SLIT;

use super::{IOAPIC_ADDRESS, LAPIC_ADDRESS, NumaNode, OEM_ID, OEM_REVISION, OEM_TABLE, SCI_GSI};
use crate::devices::legacy::{PM_BASE, RESET_PORT, RESET_VALUE};

fn io_register(port: u16, bits: u8) -> GAS {
    let size = if bits == 8 { AccessSize::ByteAccess } else { AccessSize::Undefined };
    GAS::new(AddressSpace::SystemIo, bits, 0, size, u64::from(port))
}

/// Fixed hardware: the registers of [`crate::devices::legacy::AcpiPm`], always in ACPI mode.
pub(super) fn fadt(facs: u64, dsdt: u64) -> FADT {
    const PM1_EVENT_LEN: u8 = 4;
    const PM1_CONTROL_LEN: u8 = 2;
    const PM_TIMER_LEN: u8 = 4;
    const GPE0_LEN: u8 = 2;
    /// Index of the century in CMOS memory.
    const CENTURY: u8 = 0x32;
    /// Boot architecture flags: legacy devices are there; no VGA.
    const BOOT_ARCH: u16 = 1 | 1 << 2;

    let mut t = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs as u32)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    // The 32-bit pointer too: old guests read only that.
    t.dsdt = (dsdt as u32).into();
    t.sci_int = (SCI_GSI as u16).into();
    t.pm1a_evt_blk = u32::from(PM_BASE).into();
    t.pm1a_cnt_blk = u32::from(PM_BASE + 4).into();
    t.pm_tmr_blk = u32::from(PM_BASE + 8).into();
    t.gpe0_blk = u32::from(PM_BASE + 0x10).into();
    t.pm1_evt_len = PM1_EVENT_LEN;
    t.pm1_cnt_len = PM1_CONTROL_LEN;
    t.pm_tmr_len = PM_TIMER_LEN;
    t.gpe0_blk_len = GPE0_LEN;
    // Latencies above these limits say that C2 and C3 do not exist.
    t.p_lvl2_lat = 101.into();
    t.p_lvl3_lat = 1001.into();
    t.century = CENTURY;
    t.iapc_boot_arch = BOOT_ARCH.into();
    t.reset_reg = io_register(RESET_PORT, 8);
    t.reset_value = RESET_VALUE;
    t.x_pm1a_evt_blk = io_register(PM_BASE, 32);
    t.x_pm1a_cnt_blk = io_register(PM_BASE + 4, 16);
    t.x_pm_tmr_blk = io_register(PM_BASE + 8, 32);
    t.x_gpe0_blk = io_register(PM_BASE + 0x10, 16);
    t.finalize()
}

/// Local APICs, one IO-APIC, the level-triggered SCI, and LINT1 as NMI.
pub(super) fn madt(cpus: u32) -> Sdt {
    const PCAT_COMPAT: u32 = 1;
    const LOCAL_APIC: u8 = 0;
    const IO_APIC: u8 = 1;
    const SOURCE_OVERRIDE: u8 = 2;
    const LOCAL_NMI: u8 = 4;
    /// Active high, level-triggered.
    const LEVEL_HIGH: u16 = 0x000d;

    let mut body = Vec::new();
    body.extend(LAPIC_ADDRESS.to_le_bytes());
    body.extend(PCAT_COMPAT.to_le_bytes());
    for id in 0..cpus as u8 {
        body.extend([LOCAL_APIC, 8, id, id, 1, 0, 0, 0]);
    }
    // ID, reserved, address, first GSI.
    body.extend([IO_APIC, 12, 0, 0]);
    body.extend(IOAPIC_ADDRESS.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    // Bus ISA, source, GSI, flags.
    body.extend([SOURCE_OVERRIDE, 10, 0, SCI_GSI as u8]);
    body.extend(SCI_GSI.to_le_bytes());
    body.extend(LEVEL_HIGH.to_le_bytes());
    // All processors, default polarity and trigger, LINT1.
    body.extend([LOCAL_NMI, 6, 0xff, 0, 0, 1]);
    table(*b"APIC", 5, &body)
}

fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut sdt = Sdt::new(signature, 36, revision, OEM_ID, OEM_TABLE, OEM_REVISION);
    sdt.append_slice(body);
    sdt
}

/// Which node each processor and each range of RAM belongs to.
pub(super) fn srat(nodes: &[NumaNode]) -> Sdt {
    const PROCESSOR: u8 = 0;
    const MEMORY: u8 = 1;
    const ENABLED: u32 = 1;

    let mut body = vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for (node, n) in (0u32..).zip(nodes) {
        for &cpu in &n.cpus {
            // Domain bits 7:0, APIC ID, flags, SAPIC EID, domain bits 31:8, clock domain.
            body.extend([PROCESSOR, 16, node as u8, cpu as u8]);
            body.extend(ENABLED.to_le_bytes());
            body.extend([0; 8]);
        }
        for range in &n.memory {
            body.extend([MEMORY, 40]);
            body.extend(node.to_le_bytes());
            body.extend([0; 2]);
            body.extend(range.start.to_le_bytes());
            body.extend((range.end - range.start).to_le_bytes());
            body.extend([0; 4]);
            body.extend(ENABLED.to_le_bytes());
            body.extend([0; 8]);
        }
    }
    table(*b"SRAT", 3, &body)
}

/// Distances between nodes.
pub(super) fn slit(nodes: &[NumaNode]) -> SLIT {
    const LOCAL: u8 = 10;
    const REMOTE: u8 = 20;
    let mut slit = SLIT::new(OEM_ID, OEM_TABLE, OEM_REVISION, nodes.len() as u32);
    for (a, node) in nodes.iter().enumerate() {
        for b in 0..nodes.len() {
            let default = if a == b { LOCAL } else { REMOTE };
            slit.set_distance(a, b, node.distances.get(b).copied().unwrap_or(default));
        }
    }
    slit
}
