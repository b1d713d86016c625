//! What firmware is told of its machine: files of fw_cfg, by the names that SeaBIOS knows (its `docs/Runtime_config.md`).

use super::layout::{self, Places};
use crate::devices::legacy::{FwCfgFile, file_name};
use crate::memory::GuestMemory;

const RSDP: &str = "etc/acpi/rsdp";
/// A command of the table loader, and the zone of the first MiB where guests look for the RSDP.
const ALLOCATE: u32 = 1;
const ZONE_FSEG: u8 = 2;
/// Bytes of a command.
const COMMAND_LEN: usize = 128;
/// Milliseconds after which firmware that found nothing to boot resets the machine.
const BOOT_FAIL_WAIT: u32 = 1000;

/// The files for a machine whose ACPI tables begin with `rsdp`. `console` is the port of the serial console.
pub(super) fn files(memory: &GuestMemory, places: &Places, rsdp: &[u8], console: u16) -> Vec<FwCfgFile> {
    let mut map = Vec::new();
    for entry in layout::firmware_memory_map(memory, places) {
        map.extend(entry.address.to_le_bytes());
        map.extend(entry.size.to_le_bytes());
        map.extend((entry.kind as u32).to_le_bytes());
    }
    let file = |name, content| FwCfgFile { name, content };
    vec![
        file("etc/e820", map),
        file(RSDP, rsdp.to_vec()),
        file("etc/table-loader", load_rsdp()),
        file("etc/sercon-port", console.to_le_bytes().to_vec()),
        file("etc/boot-fail-wait", BOOT_FAIL_WAIT.to_le_bytes().to_vec()),
    ]
}

/// The table loader's script: the tables are in place, so only the RSDP is put where guests look for it.
fn load_rsdp() -> Vec<u8> {
    let mut command = ALLOCATE.to_le_bytes().to_vec();
    command.extend(file_name(RSDP));
    command.extend(16u32.to_le_bytes());
    command.push(ZONE_FSEG);
    command.resize(COMMAND_LEN, 0);
    command
}
