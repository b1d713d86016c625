#![expect(clippy::single_range_in_vec_init, reason = "lists of address ranges")]

use super::*;
use crate::memory::GuestMemory;

const AREA: Range<u64> = 0xe_0000..0x10_0000;

fn platform(cpus: u32) -> Platform {
    Platform {
        cpus,
        pci: Some(PciRootInfo {
            ecam: 0xe000_0000..0xe010_0000,
            mmio32: 0xc000_0000..0xe000_0000,
            mmio64: 0x4_0000_0000..0x8_0000_0000,
            io: 0x1000..0x1_0000,
            intx: [16, 17, 18, 19],
        }),
        mmio: vec![MmioDevice { address: 0xd000_0000, gsi: 20 }],
        serial: true,
        generation_id: Some(0xe_f000),
        numa: vec![
            NumaNode { cpus: vec![0], memory: vec![0..0x10_0000], distances: vec![] },
            NumaNode { cpus: vec![1], memory: vec![0x10_0000..0x20_0000], distances: vec![30, 10] },
        ],
    }
}

/// Puts all tables where they belong; returns the address of the RSDP.
fn write(memory: &GuestMemory, platform: &Platform) -> u64 {
    memory.write(AREA.start, &build(&AREA, platform).unwrap()).unwrap();
    AREA.start
}

/// All tables by signature, with every checksum verified on the way from the RSDP.
fn read_tables(memory: &GuestMemory, rsdp: u64) -> Vec<(String, Vec<u8>)> {
    let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |a, b| a.wrapping_add(*b));
    let mut head = [0; 36];
    memory.read(rsdp, &mut head).unwrap();
    assert_eq!(&head[..8], b"RSD PTR ");
    assert_eq!((sum(&head[..20]), sum(&head)), (0, 0));
    let read = |address: u64| {
        let len: u32 = memory.read_obj(address + 4).unwrap();
        let mut bytes = vec![0; len as usize];
        memory.read(address, &mut bytes).unwrap();
        let signature = String::from_utf8(bytes[..4].to_vec()).unwrap();
        assert!(signature == "FACS" || sum(&bytes) == 0, "checksum of {signature}");
        (signature, bytes)
    };
    let xsdt = read(u64::from_le_bytes(head[24..32].try_into().unwrap()));
    assert_eq!(xsdt.0, "XSDT");
    let mut tables: Vec<_> =
        xsdt.1[36..].chunks(8).map(|a| read(u64::from_le_bytes(a.try_into().unwrap()))).collect();
    let fadt = tables.iter().find(|t| t.0 == "FACP").unwrap().1.clone();
    tables.push(read(u64::from(u32::from_le_bytes(fadt[36..40].try_into().unwrap()))));
    tables.push(read(u64::from_le_bytes(fadt[140..148].try_into().unwrap())));
    tables
}

#[test]
fn all_tables_are_reachable_and_checksummed() {
    let memory = GuestMemory::flat(1 << 20).unwrap();
    let rsdp = write(&memory, &platform(2));
    let tables = read_tables(&memory, rsdp);
    let names: Vec<_> = tables.iter().map(|t| t.0.as_str()).collect();
    assert_eq!(names, ["FACP", "APIC", "MCFG", "SRAT", "SLIT", "FACS", "DSDT"]);
}

#[test]
fn the_largest_machine_fits_and_a_small_area_is_an_error() {
    build(&AREA, &platform(255)).unwrap();
    let small = 0xe_0000..0xe_0800;
    assert!(matches!(build(&small, &platform(2)), Err(AcpiError::TooLong { .. })));
}

/// The reference compiler must disassemble the DSDT without complaint.
#[test]
fn iasl_accepts_the_dsdt() {
    let memory = GuestMemory::flat(1 << 20).unwrap();
    let rsdp = write(&memory, &platform(3));
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in read_tables(&memory, rsdp) {
        let path = dir.path().join(format!("{name}.aml"));
        std::fs::write(&path, bytes).unwrap();
        let output = std::process::Command::new("iasl")
            .args(["-d", path.to_str().unwrap()])
            .output()
            .expect("iasl is missing: install the Debian package acpica-tools");
        let text =
            String::from_utf8_lossy(&output.stdout).to_string() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {text}");
        for word in ["Error", "Invalid", "unresolved"] {
            assert!(!text.contains(word), "{name}: {text}");
        }
    }
    let source = std::fs::read_to_string(dir.path().join("DSDT.dsl")).unwrap();
    for part in ["PNP0A08", "PNP0501", "QEMU0001", "LNRO0005", "VM_Gen_Counter", "_S5", "_E00", "C002"] {
        assert!(source.contains(part), "{part} in {source}");
    }
}
