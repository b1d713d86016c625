//! The configuration space of a type 0 function (PCI Local Bus 3.0, section 6).

use std::sync::Arc;

use super::{BARS, Msix, PciError};
use crate::lifecycle::LifecycleError;

const SIZE: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const HEADER_TYPE: usize = 0x0e;
const BAR0: usize = 0x10;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const MULTI_FUNCTION: u8 = 0x80;
const MSIX_CAPABILITY: u8 = 0x11;

/// Bits of the command register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command(u16);

impl Command {
    /// I/O BARs answer.
    pub const IO: u16 = 1;
    /// Memory BARs answer.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may access memory and send messages.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// The function must not assert its interrupt pin.
    pub const INTX_DISABLE: u16 = 1 << 10;

    /// Whether all bits of `mask` are set.
    pub fn has(self, mask: u16) -> bool {
        self.0 & mask == mask
    }
}

/// The read-only identification of a function.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, subclass and programming interface in the low 24 bits.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Interrupt pin: 0 for none, 1 to 4 for INTA to INTD.
    pub interrupt_pin: u8,
}

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two registers.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// I/O ports.
    Io,
}

#[derive(Clone, Copy)]
struct Bar {
    kind: BarKind,
    size: u64,
}

/// The 256 bytes of a type 0 function: which bits the guest may write, its BARs and its capabilities.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    initial: Option<Box<[u8; SIZE]>>,
    bars: [Option<Bar>; BARS],
    next_capability: usize,
    last_link: usize,
    msix: Option<(usize, Arc<Msix>)>,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    pub fn new(id: Identity) -> Self {
        let mut bytes = [0; SIZE];
        bytes[0x00..0x02].copy_from_slice(&id.vendor.to_le_bytes());
        bytes[0x02..0x04].copy_from_slice(&id.device.to_le_bytes());
        bytes[0x08] = id.revision;
        bytes[0x09..0x0c].copy_from_slice(&id.class.to_le_bytes()[..3]);
        bytes[0x2c..0x2e].copy_from_slice(&id.subsystem_vendor.to_le_bytes());
        bytes[0x2e..0x30].copy_from_slice(&id.subsystem.to_le_bytes());
        bytes[0x3d] = id.interrupt_pin;
        let mut writable = [0; SIZE];
        let command = Command::IO | Command::MEMORY | Command::BUS_MASTER | Command::INTX_DISABLE;
        writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        writable[0x0c] = 0xff; // cache line size
        writable[0x3c] = 0xff; // interrupt line
        Self {
            bytes,
            writable,
            initial: None,
            bars: [None; BARS],
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITY_POINTER,
            msix: None,
        }
    }

    /// Declares a BAR of `size` bytes (a power of two).
    ///
    /// # Errors
    /// Fails when the index, size or kind is malformed or the register is taken.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) -> Result<(), PciError> {
        let bad = PciError::BadBar { index, size };
        let wide = matches!(kind, BarKind::Memory64 { .. });
        let (min, max) = match kind {
            BarKind::Io => (4, 256),
            BarKind::Memory32 => (16, 1 << 31),
            BarKind::Memory64 { .. } => (16, 1 << 62),
        };
        let shadowed = index.checked_sub(1).and_then(|i| self.bars.get(i).copied().flatten());
        if !size.is_power_of_two()
            || !(min..=max).contains(&size)
            || index + usize::from(wide) >= BARS
            || self.bars[index].is_some()
            || (wide && self.bars[index + 1].is_some())
            || shadowed.is_some_and(|b| matches!(b.kind, BarKind::Memory64 { .. }))
        {
            return Err(bad);
        }
        let at = BAR0 + index * 4;
        let mask = !(size - 1);
        self.writable[at..at + 4].copy_from_slice(&(mask as u32).to_le_bytes());
        self.bytes[at] = match kind {
            BarKind::Io => 1,
            BarKind::Memory32 => 0,
            BarKind::Memory64 { prefetchable } => 4 | u8::from(prefetchable) << 3,
        };
        if wide {
            self.writable[at + 4..at + 8].copy_from_slice(&((mask >> 32) as u32).to_le_bytes());
        }
        self.bars[index] = Some(Bar { kind, size });
        Ok(())
    }

    /// Appends a capability: `body` follows its ID and link. `writable` says which bits of the body the guest may
    /// write (missing bytes are read-only). Returns the offset of the capability.
    ///
    /// # Errors
    /// Fails when it does not fit.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<usize, PciError> {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        if end > SIZE || writable.len() > body.len() {
            return Err(PciError::NoCapabilitySpace(2 + body.len()));
        }
        self.bytes[at] = id;
        self.bytes[at + 2..end].copy_from_slice(body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.bytes[self.last_link] = at as u8;
        self.last_link = at + 1;
        self.next_capability = end.next_multiple_of(4);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        Ok(at)
    }

    /// Adds the MSI-X capability: the table at `table` and the pending bits at `pending` within BAR `bar`.
    ///
    /// # Errors
    /// Fails when it does not fit.
    pub fn add_msix(&mut self, msix: Arc<Msix>, bar: u8, table: u32, pending: u32) -> Result<(), PciError> {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(msix.vectors() as u16 - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..10].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        let at = self.add_capability(MSIX_CAPABILITY, &body, &[0, 0xc0])?;
        self.msix = Some((at + 2, msix));
        Ok(())
    }

    /// Kind and size of BAR `index`.
    pub fn bar(&self, index: usize) -> Option<(BarKind, u64)> {
        self.bars.get(index).copied().flatten().map(|b| (b.kind, b.size))
    }

    /// The address in BAR `index`, whether or not it is decoded.
    pub fn bar_address(&self, index: usize) -> Option<u64> {
        let bar = self.bars.get(index).copied().flatten()?;
        let at = BAR0 + index * 4;
        let low = u64::from(self.word(at));
        Some(match bar.kind {
            BarKind::Io => low & !3,
            BarKind::Memory32 => low & !0xf,
            BarKind::Memory64 { .. } => u64::from(self.word(at + 4)) << 32 | low & !0xf,
        })
    }

    /// Where BAR `index` answers: its address while the command register enables its kind.
    pub fn bar_decoded(&self, index: usize) -> Option<u64> {
        let (kind, _) = self.bar(index)?;
        let enable = if kind == BarKind::Io { Command::IO } else { Command::MEMORY };
        self.bar_address(index).filter(|_| self.command().has(enable))
    }

    /// Sets the address of BAR `index`, as firmware does.
    pub fn set_bar_address(&mut self, index: usize, address: u64) {
        if let Some((kind, _)) = self.bar(index) {
            let at = BAR0 + index * 4;
            self.write_masked(at, &(address as u32).to_le_bytes());
            if matches!(kind, BarKind::Memory64 { .. }) {
                self.write_masked(at + 4, &((address >> 32) as u32).to_le_bytes());
            }
        }
    }

    /// The command register.
    pub fn command(&self) -> Command {
        Command(self.word(COMMAND) as u16)
    }

    /// Sets bits of the command register, as firmware does.
    pub fn enable(&mut self, bits: u16) {
        let value = self.command().0 | bits;
        self.write_masked(COMMAND, &value.to_le_bytes());
    }

    /// The interrupt pin: 0 for none, 1 to 4 for INTA to INTD.
    pub fn interrupt_pin(&self) -> u8 {
        self.bytes[0x3d]
    }

    /// Sets the interrupt line register, as firmware does.
    pub fn set_interrupt_line(&mut self, line: u8) {
        self.bytes[0x3c] = line;
    }

    /// Shows in the status register whether the function wants its pin asserted.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        self.bytes[STATUS] = self.bytes[STATUS] & !STATUS_INTERRUPT | (u8::from(pending) * STATUS_INTERRUPT);
    }

    /// Shows that the device has more than one function.
    pub fn set_multi_function(&mut self) {
        self.bytes[HEADER_TYPE] |= MULTI_FUNCTION;
    }

    /// Makes the present contents those of a reset. Firmware's work (BAR addresses) is included when it is done.
    pub fn seal(&mut self) {
        self.initial = Some(Box::new(self.bytes));
    }

    /// Returns to the contents at the last [`Self::seal`].
    pub fn reset(&mut self) {
        if let Some(initial) = &self.initial {
            self.bytes = **initial;
        }
        self.update_msix();
    }

    fn word(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.bytes[at..at + 4]);
        u32::from_le_bytes(bytes)
    }

    /// Reads `data.len()` bytes; zeros beyond the 256 bytes (there are no extended capabilities).
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset.saturating_add(i)).copied().unwrap_or(0);
        }
    }

    fn write_masked(&mut self, offset: usize, data: &[u8]) {
        for (i, &value) in data.iter().enumerate() {
            let at = offset.saturating_add(i);
            if at < SIZE {
                self.bytes[at] = self.bytes[at] & !self.writable[at] | value & self.writable[at];
            }
        }
    }

    /// Takes a guest write: only writable bits change.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        self.write_masked(offset, data);
        if let Some((control, _)) = &self.msix
            && offset < control + 2
            && offset.saturating_add(data.len()) > *control
        {
            self.update_msix();
        }
    }

    fn update_msix(&self) {
        if let Some((control, msix)) = &self.msix {
            msix.set_control(u16::from_le_bytes([self.bytes[*control], self.bytes[control + 1]]));
        }
    }

    /// All bytes, for a snapshot.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Loads the writable bits of a snapshot.
    ///
    /// # Errors
    /// Fails when read-only bits differ: the snapshot is of another function.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), LifecycleError> {
        let mismatch = || LifecycleError::State("its PCI function is another one".into());
        let saved: &[u8; SIZE] = saved.try_into().map_err(|_| mismatch())?;
        let volatile = |i: usize| self.writable[i] | if i == STATUS { STATUS_INTERRUPT } else { 0 };
        if (0..SIZE).any(|i| (saved[i] ^ self.bytes[i]) & !volatile(i) != 0) {
            return Err(mismatch());
        }
        self.bytes = *saved;
        self.update_msix();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(Identity { vendor: 0x1af4, device: 0x1042, class: 0x01_0000, ..Default::default() })
    }

    #[test]
    fn bars_are_sized_and_moved() {
        let mut c = space();
        c.add_bar(0, BarKind::Memory64 { prefetchable: false }, 0x1_0000).unwrap();
        c.add_bar(2, BarKind::Memory32, 0x1000).unwrap();
        c.add_bar(3, BarKind::Io, 0x20).unwrap();
        let size = |c: &mut ConfigSpace, at: usize| {
            c.write(at, &[0xff; 4]);
            c.word(at)
        };
        assert_eq!(size(&mut c, 0x10), 0xffff_0004);
        assert_eq!(size(&mut c, 0x14), 0xffff_ffff);
        assert_eq!(size(&mut c, 0x18), 0xffff_f000);
        assert_eq!(size(&mut c, 0x1c), 0xffff_ffe1);
        c.set_bar_address(0, 0x12_3456_0000);
        assert_eq!(c.bar_address(0), Some(0x12_3456_0000));
        assert_eq!(c.bar_decoded(0), None);
        c.write(COMMAND, &[Command::MEMORY as u8, 0]);
        assert_eq!(c.bar_decoded(0), Some(0x12_3456_0000));
        assert_eq!(c.bar_decoded(3), None);
    }

    #[test]
    fn malformed_bars_are_refused() {
        let mut c = space();
        let wide = BarKind::Memory64 { prefetchable: true };
        c.add_bar(1, wide, 0x1000).unwrap();
        for (i, kind, size) in [
            (0, wide, 0x1000),
            (1, BarKind::Io, 4),
            (2, BarKind::Memory32, 0x1000),
            (5, wide, 0x1000),
            (3, BarKind::Memory32, 0x1800),
            (3, BarKind::Io, 512),
            (6, BarKind::Io, 4),
        ] {
            assert_eq!(c.add_bar(i, kind, size), Err(PciError::BadBar { index: i, size }));
        }
    }

    #[test]
    fn capabilities_form_a_list_and_run_out() {
        let mut c = space();
        let a = c.add_capability(9, &[1, 2, 3], &[0, 0xf0]).unwrap();
        let b = c.add_capability(9, &[4], &[]).unwrap();
        let mut data = [0; 1];
        c.read(CAPABILITY_POINTER, &mut data);
        assert_eq!(usize::from(data[0]), a);
        c.read(a + 1, &mut data);
        assert_eq!(usize::from(data[0]), b);
        assert_eq!(b % 4, 0);
        c.write(a + 2, &[0xff, 0xff, 0xff]);
        let mut body = [0; 3];
        c.read(a + 2, &mut body);
        assert_eq!(body, [1, 0xf2, 3]);
        assert_eq!(c.add_capability(9, &[0; 200], &[]), Err(PciError::NoCapabilitySpace(202)));
    }

    #[test]
    fn snapshots_of_another_function_are_refused() {
        let mut c = space();
        c.write(COMMAND, &[7, 0]);
        let saved = c.save();
        let mut same = space();
        same.restore(&saved).unwrap();
        assert!(same.command().has(Command::BUS_MASTER));
        let mut other = ConfigSpace::new(Identity { vendor: 1, ..Default::default() });
        assert!(other.restore(&saved).is_err());
        assert!(same.restore(&saved[1..]).is_err());
    }
}
