//! The differentiated system description table.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name,
    Notify, Package, PackageBuilder, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{GENERATION_ID_GPE, OEM_ID, OEM_REVISION, OEM_TABLE, PciRootInfo, Platform, SERIAL_GSI};
use crate::devices::legacy::{PVPANIC_PORT, S5_SLEEP_TYPE};

const COM1_PORT: u16 = 0x3f8;
const RTC_PORT: u16 = 0x70;

fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(path.into(), value)
}

pub(super) fn build(platform: &Platform) -> Sdt {
    let mut aml = Vec::new();
    if let Some(pci) = &platform.pci {
        pci_root(pci, &mut aml);
    }
    for id in 0..platform.cpus {
        Device::new(
            Path::new(&format!("\\_SB_.C{id:03X}")),
            vec![&name("_HID", &"ACPI0007"), &name("_UID", &id)],
        )
        .to_aml_bytes(&mut aml);
    }
    if platform.serial {
        Device::new(
            "\\_SB_.COM1".into(),
            vec![
                &name("_HID", &EISAName::new("PNP0501")),
                &name("_UID", &1u8),
                &name("_STA", &0x0fu8),
                &name(
                    "_CRS",
                    &ResourceTemplate::new(vec![
                        &Interrupt::new(true, true, false, false, SERIAL_GSI),
                        &IO::new(COM1_PORT, COM1_PORT, 0, 8),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(&mut aml);
    }
    Device::new(
        "\\_SB_.RTC0".into(),
        vec![
            &name("_HID", &EISAName::new("PNP0B00")),
            &name("_CRS", &ResourceTemplate::new(vec![&IO::new(RTC_PORT, RTC_PORT, 0, 2)])),
        ],
    )
    .to_aml_bytes(&mut aml);
    Device::new(
        "\\_SB_.PVPN".into(),
        vec![
            &name("_HID", &"QEMU0001"),
            &name("_STA", &0x0fu8),
            &name("_CRS", &ResourceTemplate::new(vec![&IO::new(PVPANIC_PORT, PVPANIC_PORT, 0, 1)])),
        ],
    )
    .to_aml_bytes(&mut aml);
    for (index, device) in platform.mmio.iter().enumerate() {
        Device::new(
            Path::new(&format!("\\_SB_.V{index:03X}")),
            vec![
                &name("_HID", &"LNRO0005"),
                &name("_UID", &(index as u32)),
                &name(
                    "_CRS",
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, device.address, 0x1000),
                        &Interrupt::new(true, false, false, false, device.gsi),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(&mut aml);
    }
    if let Some(address) = platform.generation_id {
        generation_id(address, &mut aml);
    }
    let sleep = S5_SLEEP_TYPE;
    name("\\_S5_", &Package::new(vec![&sleep, &sleep, &ZERO, &ZERO])).to_aml_bytes(&mut aml);

    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

fn pci_root(pci: &PciRootInfo, aml: &mut Vec<u8>) {
    // Bus 0 only; ports of the configuration mechanism are consumed by the bridge itself.
    let buses = AddressSpace::new_bus_number(0u16, u16::from(super::last_bus(&pci.ecam)));
    let config = IO::new(0xcf8, 0xcf8, 1, 8);
    let io = (!pci.io.is_empty())
        .then(|| AddressSpace::new_io(pci.io.start as u16, (pci.io.end - 1) as u16, None));
    let mmio32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        pci.mmio32.start as u32,
        (pci.mmio32.end - 1) as u32,
        None,
    );
    let mmio64 = (!pci.mmio64.is_empty()).then(|| {
        let (first, last) = (pci.mmio64.start, pci.mmio64.end - 1);
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None)
    });
    let mut resources: Vec<&dyn Aml> = vec![&buses, &config, &mmio32];
    if let Some(io) = &io {
        resources.push(io);
    }
    if let Some(mmio64) = &mmio64 {
        resources.push(mmio64);
    }

    // Each entry: address (slot in the upper half, all functions), pin, no link device, GSI.
    let mut routes = PackageBuilder::new();
    for slot in 0..32u32 {
        for pin in 0..4u32 {
            let gsi = pci.intx[((slot + pin) % 4) as usize];
            routes.add_element(&Package::new(vec![&(slot << 16 | 0xffff), &(pin as u8), &ZERO, &gsi]));
        }
    }
    Device::new(
        "\\_SB_.PCI0".into(),
        vec![
            &name("_HID", &EISAName::new("PNP0A08")),
            &name("_CID", &EISAName::new("PNP0A03")),
            &name("_UID", &ZERO),
            &name("_SEG", &ZERO),
            &name("_BBN", &ZERO),
            &name("_CRS", &ResourceTemplate::new(resources)),
            &name("_PRT", &routes),
        ],
    )
    .to_aml_bytes(aml);
    // Guests use ECAM only when a motherboard resource reserves it.
    Device::new(
        "\\_SB_.ECAM".into(),
        vec![
            &name("_HID", &EISAName::new("PNP0C02")),
            &name("_UID", &ZERO),
            &name(
                "_CRS",
                &ResourceTemplate::new(vec![&Memory32Fixed::new(
                    true,
                    pci.ecam.start as u32,
                    (pci.ecam.end - pci.ecam.start) as u32,
                )]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The VM generation ID device, and the event that notifies it.
fn generation_id(address: u64, aml: &mut Vec<u8>) {
    let (low, high) = (address as u32, (address >> 32) as u32);
    Device::new(
        "\\_SB_.VGEN".into(),
        vec![
            &name("_HID", &"NACR0001"),
            &name("_CID", &"VM_Gen_Counter"),
            &name("_DDN", &"VM_Gen_Counter"),
            &name("ADDR", &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(aml);
    let device = Path::new("\\_SB_.VGEN");
    let notify = Notify::new(&device, &0x80u8);
    let handler = format!("_E{GENERATION_ID_GPE:02X}");
    Scope::new("\\_GPE".into(), vec![&Method::new(Path::new(&handler), 0, false, vec![&notify])])
        .to_aml_bytes(aml);
}
