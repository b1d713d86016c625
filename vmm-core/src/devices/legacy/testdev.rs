//! The ports that guest programs of kvm-unit-tests use (its `lib/x86`), where QEMU has `pc-testdev`.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::memory::GuestMemory;

/// First port of the scratch register that is accessed in any size.
pub const TEST_SCRATCH: u16 = 0xe0;
/// Port that makes the host map a page anew.
pub const TEST_FLUSH: u16 = 0xe4;
/// First port of the scratch register of four separate bytes.
pub const TEST_SCRATCH_BYTES: u16 = 0xe8;
/// Port of the first interrupt line.
pub const TEST_IRQ: u16 = 0x2000;
/// Number of interrupt lines.
pub const TEST_IRQS: u16 = 24;
/// Address of the scratch memory.
pub const TEST_MEMORY: u64 = 0xff00_0000;
/// Bytes of scratch memory.
pub const TEST_MEMORY_SIZE: usize = 0x1_0000;

/// Registers that keep what was written to them.
pub struct TestScratch {
    bytes: Mutex<Vec<u8>>,
}

impl TestScratch {
    /// `len` bytes, zero at first.
    pub fn new(len: usize) -> Self {
        Self { bytes: Mutex::new(vec![0; len]) }
    }
}

impl BusDevice for TestScratch {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes.lock();
        match bytes.get(offset as usize..).and_then(|rest| rest.get(..data.len())) {
            Some(found) => data.copy_from_slice(found),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = self.bytes.lock();
        if let Some(found) = bytes.get_mut(offset as usize..).and_then(|rest| rest.get_mut(..data.len())) {
            found.copy_from_slice(data);
        }
    }
}

/// Takes the guest-physical address of a page that the host shall map anew: an accelerator that copies the host's page
/// tables must then handle accesses of its own (to descriptor tables, stacks) to a page that it does not know.
pub struct TestFlush {
    memory: GuestMemory,
}

impl TestFlush {
    /// A port for this RAM.
    pub fn new(memory: GuestMemory) -> Self {
        Self { memory }
    }
}

impl BusDevice for TestFlush {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, &[a, b, c, d]) = (offset, data) {
            self.memory.unmap_page(u32::from_le_bytes([a, b, c, d]).into());
        }
    }
}

/// Interrupt lines: a byte written to the port of a line raises it, or lowers it if the byte is 0.
pub struct TestIrqs {
    lines: Vec<Arc<dyn IrqLine>>,
}

impl TestIrqs {
    /// Port n drives line n.
    pub fn new(lines: Vec<Arc<dyn IrqLine>>) -> Self {
        Self { lines }
    }
}

impl BusDevice for TestIrqs {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(line) = self.lines.get(offset as usize) {
            line.set_level(data[0] != 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn read(device: &dyn BusDevice, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        device.read(offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    #[test]
    fn scratch_registers_keep_what_was_written() {
        let scratch = TestScratch::new(4);
        scratch.write(0, &0x1234_5678u32.to_le_bytes());
        scratch.write(1, &[0xab]);
        assert_eq!(read(&scratch, 0, 4), 0x1234_ab78);
        assert_eq!(read(&scratch, 2, 2), 0x1234);
        scratch.write(3, &[1, 2]);
        assert_eq!(read(&scratch, 3, 2), 0xffff, "beyond the end is nothing");
        assert_eq!(read(&scratch, 3, 1), 0x12);
    }

    #[test]
    fn a_flushed_page_keeps_its_content() {
        let memory = GuestMemory::flat(0x4000).unwrap();
        for page in 0..4u64 {
            memory.write_obj(page * 0x1000, &(page + 1)).unwrap();
        }
        let flush = TestFlush::new(memory.clone());
        // The second page, one beyond the end, and a word that is no address.
        flush.write(0, &0x1234u32.to_le_bytes());
        flush.write(0, &0xffff_f000u32.to_le_bytes());
        flush.write(0, &[1, 2]);
        for page in 0..4u64 {
            assert_eq!(memory.read_obj::<u64>(page * 0x1000).unwrap(), page + 1);
        }
    }

    struct Line(Arc<AtomicU32>, u32);

    impl IrqLine for Line {
        fn set_level(&self, asserted: bool) {
            match asserted {
                true => self.0.fetch_or(1 << self.1, Ordering::Relaxed),
                false => self.0.fetch_and(!(1 << self.1), Ordering::Relaxed),
            };
        }
    }

    #[test]
    fn a_port_drives_its_interrupt_line() {
        let levels = Arc::new(AtomicU32::new(0));
        let lines = (0..3).map(|n| Arc::new(Line(levels.clone(), n)) as Arc<dyn IrqLine>).collect();
        let irqs = TestIrqs::new(lines);
        irqs.write(1, &[1]);
        irqs.write(2, &[0x80]);
        irqs.write(3, &[1]);
        assert_eq!(levels.load(Ordering::Relaxed), 0b110);
        irqs.write(1, &[0]);
        assert_eq!(levels.load(Ordering::Relaxed), 0b100);
    }
}
