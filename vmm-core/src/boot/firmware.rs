//! BIOS images: they are copied to where their last byte is the last one of the first MiB, and entered at the reset
//! vector there. (The chipset of a PC shows them at the end of the first 4 GiB, too; SeaBIOS does not need that.)

use std::path::Path;

use super::image::{CopyError, Image};
use super::{BootError, Entry, EntryMode, HIGH_RAM, open};
use crate::memory::GuestMemory;

/// The longest image: memory from 0xC0000 on is the firmware's.
pub const MAX_FIRMWARE: u64 = 256 << 10;
/// An image is a multiple of this.
const UNIT: u64 = 64 << 10;

/// Loads a BIOS image into guest RAM.
///
/// # Errors
/// Fails when the file cannot be read or is no BIOS image.
pub fn load_firmware(memory: &GuestMemory, path: &Path) -> Result<Entry, BootError> {
    let (file, len) = open("firmware", path)?;
    let malformed = BootError::Firmware { path: path.to_owned() };
    if len == 0 || len > MAX_FIRMWARE || !len.is_multiple_of(UNIT) {
        return Err(malformed);
    }
    let image = Image::file(&file, len);
    // The reset vector: a far jump, without which the first instruction would be something else's.
    let mut vector = [0; 1];
    image.read_at(len - 16, &mut vector).map_err(|e| CopyError::Io(e).into_boot("firmware", path))?;
    if vector != [0xea] {
        return Err(malformed);
    }
    image.copy_to(memory, 0, len, HIGH_RAM - len).map_err(|e| e.into_boot("firmware", path))?;
    Ok(Entry { mode: EntryMode::Real, rip: 0xfff0, ..Entry::default() })
}
