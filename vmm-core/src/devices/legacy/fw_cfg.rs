//! The interface by which firmware learns of its machine: QEMU's fw_cfg over I/O ports, without DMA (QEMU's
//! `docs/specs/fw_cfg.rst`).
//!
//! A write of 16 bits to the first port selects an item, reads of the second return its bytes, then zeros.

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::lifecycle::{Lifecycle, LifecycleError};

/// The selector port; the next port holds data.
pub const FW_CFG: u16 = 0x510;
/// Number of ports.
pub const FW_CFG_SIZE: u64 = 2;

const SIGNATURE: u16 = 0;
const ID: u16 = 1;
const RAM_SIZE: u16 = 3;
const NB_CPUS: u16 = 5;
const MAX_CPUS: u16 = 15;
const FILE_DIR: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;
/// Bytes of a file's name in the directory, the last one zero.
const NAME_LEN: usize = 56;

/// A file that firmware finds by its name.
#[derive(Clone, Debug)]
pub struct FwCfgFile {
    /// At most 55 bytes, such as `etc/e820`.
    pub name: &'static str,
    /// Its contents.
    pub content: Vec<u8>,
}

#[derive(Clone, Copy, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    item: u16,
    /// Of the item's next byte.
    offset: usize,
}

/// The device: a signature, the interface's version, the size of RAM, the number of processors, and files.
pub struct FwCfg {
    memory: u64,
    cpus: u16,
    files: Vec<FwCfgFile>,
    directory: Vec<u8>,
    state: Mutex<State>,
}

impl FwCfg {
    /// Tells of a machine with `memory` bytes of RAM and `cpus` processors.
    pub fn new(memory: u64, cpus: u16, files: Vec<FwCfgFile>) -> Self {
        let mut directory = (files.len() as u32).to_be_bytes().to_vec();
        for (select, file) in (FIRST_FILE..).zip(&files) {
            directory.extend((file.content.len() as u32).to_be_bytes());
            directory.extend(select.to_be_bytes());
            directory.extend([0; 2]);
            directory.extend(file_name(file.name));
        }
        Self { memory, cpus, files, directory, state: Mutex::default() }
    }

    fn byte(&self, State { item, offset }: State) -> u8 {
        let number = |value: u64| value.to_le_bytes().get(offset).copied();
        let byte = match item {
            SIGNATURE => number(u32::from_le_bytes(*b"QEMU").into()),
            // The traditional interface, without DMA.
            ID => number(1),
            RAM_SIZE => number(self.memory),
            NB_CPUS | MAX_CPUS => number(self.cpus.into()),
            FILE_DIR => self.directory.get(offset).copied(),
            FIRST_FILE.. => {
                let file = self.files.get(usize::from(item - FIRST_FILE));
                file.and_then(|file| file.content.get(offset).copied())
            }
            _ => None,
        };
        byte.unwrap_or(0)
    }
}

/// A file's name as the interface has it in structures.
///
/// # Panics
/// When it is too long (a caller's mistake).
pub fn file_name(name: &str) -> [u8; NAME_LEN] {
    assert!(name.len() < NAME_LEN, "a name of fw_cfg has at most 55 bytes");
    let mut bytes = [0; NAME_LEN];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == 1 {
            let mut state = self.state.lock();
            data[0] = self.byte(*state);
            state.offset = state.offset.saturating_add(1);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, &[low, high]) = (offset, data) {
            *self.state.lock() = State { item: u16::from_le_bytes([low, high]), offset: 0 };
        }
    }
}

impl Lifecycle for FwCfg {
    fn reset(&self) {
        *self.state.lock() = State::default();
    }

    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        serde_json::to_value(*self.state.lock()).map_err(|e| LifecycleError::State(e.to_string()))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
        *self.state.lock() = State::deserialize(state).map_err(|e| LifecycleError::State(e.to_string()))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte(device: &FwCfg) -> u8 {
        let mut data = [0xaa];
        device.read(1, &mut data);
        data[0]
    }

    fn bytes(device: &FwCfg, item: u16, len: usize) -> Vec<u8> {
        device.write(0, &item.to_le_bytes());
        (0..len).map(|_| byte(device)).collect()
    }

    fn device() -> FwCfg {
        let file = |name, content: &[u8]| FwCfgFile { name, content: content.to_vec() };
        FwCfg::new(0x1_2345_6000, 300, vec![file("etc/one", b"first"), file("etc/two", b"second")])
    }

    #[test]
    fn numbers_tell_memory_and_processors() {
        let device = device();
        assert_eq!(bytes(&device, SIGNATURE, 4), b"QEMU");
        assert_eq!(bytes(&device, ID, 4), [1, 0, 0, 0]);
        assert_eq!(bytes(&device, RAM_SIZE, 8), 0x1_2345_6000u64.to_le_bytes());
        assert_eq!(bytes(&device, NB_CPUS, 2), 300u16.to_le_bytes());
        assert_eq!(bytes(&device, 0x1234, 2), [0, 0]);
        assert_eq!(byte(&device), 0, "an item that has been read ends in zeros");
    }

    #[test]
    fn files_are_found_by_the_directory() {
        let device = device();
        let directory = bytes(&device, FILE_DIR, 4 + 2 * 64);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        let second = &directory[4 + 64..];
        assert_eq!(second[..4], 6u32.to_be_bytes());
        assert_eq!(&second[8..16], b"etc/two\0");
        let select = u16::from_be_bytes([second[4], second[5]]);
        assert_eq!(bytes(&device, select, 8), b"second\0\0");
        assert_eq!(bytes(&device, select + 1, 1), [0], "there is no third");
    }

    #[test]
    fn reading_goes_on_in_another_machine() {
        let (one, other) = (device(), device());
        bytes(&one, FIRST_FILE, 2);
        other.restore(&one.save().unwrap()).unwrap();
        assert_eq!(byte(&other), b'r');
        other.reset();
        assert_eq!(byte(&other), b'Q');
        assert!(other.restore(&serde_json::json!({ "item": 1 })).is_err());
    }
}
