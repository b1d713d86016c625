//! The root complex: bus 0, its configuration mechanisms, and the addresses that BARs answer at.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::{Mutex, RwLock};

use super::intx::SharedLine;
use super::{BARS, BarKind, Command, IntxPin, PciAddress, PciError, PciFunction};
use crate::bus::{Bus, BusDevice};
use crate::interrupt::IrqLine;
use crate::lifecycle::{Lifecycle, LifecycleError};

/// Size of the ECAM window of bus 0: 4 KiB for each of 256 functions.
pub const ECAM_SIZE: u64 = 1 << 20;

/// The address ranges that BARs are assigned from; the machine's ACPI tables announce them to the guest.
#[derive(Clone, Debug)]
pub struct PciWindows {
    /// Memory below 4 GiB.
    pub mmio32: Range<u64>,
    /// Memory above 4 GiB (may be empty).
    pub mmio64: Range<u64>,
    /// I/O ports.
    pub io: Range<u64>,
}

struct Slot {
    function: Arc<dyn PciFunction>,
    /// Where each BAR is registered on its bus now.
    mapped: Mutex<[Option<u64>; BARS]>,
}

struct Free {
    windows: PciWindows,
}

impl Free {
    fn take(window: &mut Range<u64>, size: u64) -> Option<u64> {
        let base = window.start.checked_next_multiple_of(size)?;
        let end = base.checked_add(size).filter(|&end| end <= window.end)?;
        window.start = end;
        Some(base)
    }

    /// Small 64-bit BARs go below 4 GiB too, where 32-bit firmware reaches them.
    fn assign(&mut self, kind: BarKind, size: u64) -> Result<u64, PciError> {
        const SMALL: u64 = 1 << 20;
        let w = &mut self.windows;
        match kind {
            BarKind::Io => Self::take(&mut w.io, size),
            BarKind::Memory32 => Self::take(&mut w.mmio32, size),
            BarKind::Memory64 { .. } if size <= SMALL => {
                Self::take(&mut w.mmio32, size).or_else(|| Self::take(&mut w.mmio64, size))
            }
            BarKind::Memory64 { .. } => {
                Self::take(&mut w.mmio64, size).or_else(|| Self::take(&mut w.mmio32, size))
            }
        }
        .ok_or(PciError::WindowFull { size })
    }
}

/// The root complex with bus 0.
pub struct PciRoot {
    mmio: Arc<Bus>,
    io: Arc<Bus>,
    free: Mutex<Free>,
    slots: RwLock<BTreeMap<PciAddress, Arc<Slot>>>,
    /// Serialises changes of decoding, so that two vCPUs cannot register one BAR twice.
    decode: Mutex<()>,
    address: Mutex<u32>,
    lines: OnceLock<[(u8, Arc<SharedLine>); 4]>,
    reset: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

struct BarWindow {
    function: Arc<dyn PciFunction>,
    bar: usize,
}

impl BusDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.bar_read(self.bar, offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(self.bar, offset, data);
    }
}

impl PciRoot {
    /// An empty bus whose BARs answer in `mmio` and `io` and are assigned from `windows`.
    pub fn new(mmio: Arc<Bus>, io: Arc<Bus>, windows: PciWindows) -> Arc<Self> {
        Arc::new(Self {
            mmio,
            io,
            free: Mutex::new(Free { windows }),
            slots: RwLock::default(),
            decode: Mutex::new(()),
            address: Mutex::new(0),
            lines: OnceLock::new(),
            reset: OnceLock::new(),
        })
    }

    /// Routes the interrupt pins to four wired inputs, given with their numbers. Pin `p` (0 for INTA) of slot `s` goes
    /// to `lines[(s + p) % 4]`; the machine's ACPI `_PRT` must say the same. Call it before functions are added.
    pub fn route_intx(&self, lines: [(u8, Arc<dyn IrqLine>); 4]) {
        let shared = lines.map(|(gsi, line)| (gsi, Arc::new(SharedLine::new(line))));
        // A second call changes nothing: functions may be connected already.
        let _ = self.lines.set(shared);
    }

    /// What the guest's reset through port 0xCF9 does.
    pub fn on_reset(&self, handler: impl Fn() + Send + Sync + 'static) {
        let _ = self.reset.set(Box::new(handler));
    }

    /// The first slot from 1 on with no function, for [`Self::add`].
    ///
    /// # Errors
    /// Fails when all slots are taken.
    pub fn free_slot(&self) -> Result<u8, PciError> {
        let slots = self.slots.read();
        (1..32)
            .find(|&slot| !slots.keys().any(|a| a.slot == slot))
            .ok_or(PciError::NoSlot(PciAddress { slot: 31, function: 0 }))
    }

    /// Adds function 0 of a device at `slot`, assigns its BARs and enables their decoding.
    ///
    /// # Errors
    /// Fails when the slot is taken or an address window is full.
    pub fn add(&self, function: Arc<dyn PciFunction>, slot: u8) -> Result<PciAddress, PciError> {
        self.add_function(function, PciAddress { slot, function: 0 })
    }

    /// Adds a function at any address of bus 0. Function 0 of a slot must be there for the guest to see the others.
    ///
    /// # Errors
    /// Fails when the place is taken or an address window is full.
    pub fn add_function(
        &self,
        function: Arc<dyn PciFunction>,
        address: PciAddress,
    ) -> Result<PciAddress, PciError> {
        let mut slots = self.slots.write();
        if address.slot >= 32 || address.function >= 8 || slots.contains_key(&address) {
            return Err(PciError::NoSlot(address));
        }
        {
            let mut config = function.config().lock();
            let mut free = self.free.lock();
            let mut decode = 0;
            for index in 0..BARS {
                if let Some((kind, size)) = config.bar(index) {
                    config.set_bar_address(index, free.assign(kind, size)?);
                    decode |= if kind == BarKind::Io { Command::IO } else { Command::MEMORY };
                }
            }
            config.enable(decode);
        }
        let slot = Arc::new(Slot { function: Arc::clone(&function), mapped: Mutex::default() });
        slots.insert(address, Arc::clone(&slot));
        let siblings =
            || slots.range(PciAddress { function: 0, ..address }..=PciAddress { function: 7, ..address });
        if siblings().count() > 1 {
            for (_, sibling) in siblings() {
                sibling.function.config().lock().set_multi_function();
                sibling.function.config().lock().seal();
            }
        }
        function.placed(address);
        let pin = function.config().lock().interrupt_pin();
        if let (Some(lines), 1..=4) = (self.lines.get(), pin) {
            let (gsi, line) = &lines[(usize::from(address.slot) + usize::from(pin) - 1) % 4];
            function.config().lock().set_interrupt_line(*gsi);
            function.connect_intx(IntxPin::new(Arc::clone(line)));
        }
        function.config().lock().seal();
        drop(slots);
        self.follow(&slot);
        Ok(address)
    }

    /// Where the functions are.
    pub fn addresses(&self) -> Vec<PciAddress> {
        self.slots.read().keys().copied().collect()
    }

    /// The memory-mapped configuration window of bus 0, [`ECAM_SIZE`] bytes. It does not keep the root alive.
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(Arc::downgrade(self)))
    }

    /// The 8 I/O ports at 0xCF8 (with the reset register at 0xCF9). They do not keep the root alive.
    pub fn config_ports(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(ConfigPorts(Arc::downgrade(self)))
    }

    fn slot(&self, devfn: u8) -> Option<Arc<Slot>> {
        let address = PciAddress { slot: devfn >> 3, function: devfn & 7 };
        self.slots.read().get(&address).cloned()
    }

    fn read_config(&self, devfn: u8, offset: usize, data: &mut [u8]) {
        match self.slot(devfn) {
            Some(slot) => {
                if !slot.function.config_read(offset, data) {
                    slot.function.config().lock().read(offset, data);
                }
            }
            None => data.fill(0xff),
        }
    }

    fn write_config(&self, devfn: u8, offset: usize, data: &[u8]) {
        if let Some(slot) = self.slot(devfn) {
            slot.function.config().lock().write(offset, data);
            self.follow(&slot);
            slot.function.config_written(offset, data.len());
        }
    }

    /// Registers the BARs where the registers now say they answer.
    fn follow(&self, slot: &Slot) {
        let _serial = self.decode.lock();
        let mut wanted = [None; BARS];
        {
            let config = slot.function.config().lock();
            for (index, wanted) in wanted.iter_mut().enumerate() {
                *wanted = config.bar_decoded(index).zip(config.bar(index));
            }
        }
        let mut mapped = slot.mapped.lock();
        for (bar, wanted) in wanted.into_iter().enumerate() {
            if mapped[bar] == wanted.map(|(base, _)| base) {
                continue;
            }
            let kind = slot.function.config().lock().bar(bar).map(|(kind, _)| kind);
            let bus = if kind == Some(BarKind::Io) { &self.io } else { &self.mmio };
            if let Some(old) = mapped[bar].take() {
                slot.function.bar_mapped(bar, None);
                bus.remove(old);
            }
            if let Some((base, (_, size))) = wanted {
                let window = Arc::new(BarWindow { function: Arc::clone(&slot.function), bar });
                // A guest that puts a BAR on top of something else does not get to see it; on hardware the result is
                // undefined. While it sizes a BAR the address is nonsense, too.
                match bus.insert(base, size, window) {
                    Ok(()) => {
                        mapped[bar] = Some(base);
                        slot.function.bar_mapped(bar, Some(base));
                    }
                    Err(error) => tracing::debug!(bar, %error, "BAR not mapped"),
                }
            }
        }
    }

    fn functions(&self) -> Vec<(PciAddress, Arc<Slot>)> {
        self.slots.read().iter().map(|(a, s)| (*a, Arc::clone(s))).collect()
    }
}

impl Drop for PciRoot {
    fn drop(&mut self) {
        // Break the cycle bus -> window -> function for buses that outlive the root.
        for (_, slot) in self.functions() {
            let mapped = std::mem::take(&mut *slot.mapped.lock());
            for (bar, base) in mapped.into_iter().enumerate() {
                if let Some(base) = base {
                    slot.function.bar_mapped(bar, None);
                    let io = slot.function.config().lock().bar(bar).is_some_and(|(k, _)| k == BarKind::Io);
                    if io { &self.io } else { &self.mmio }.remove(base);
                }
            }
        }
    }
}

impl Lifecycle for PciRoot {
    fn start(&self) -> Result<(), LifecycleError> {
        self.functions().iter().try_for_each(|(_, s)| s.function.start())
    }

    fn pause(&self) -> Result<(), LifecycleError> {
        self.functions().iter().try_for_each(|(_, s)| s.function.pause())
    }

    fn reset(&self) {
        *self.address.lock() = 0;
        for (_, slot) in self.functions() {
            slot.function.reset();
            self.follow(&slot);
        }
    }

    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        let mut functions = serde_json::Map::new();
        for (address, slot) in self.functions() {
            functions.insert(address.to_string(), slot.function.save()?);
        }
        Ok(serde_json::json!({ "address": *self.address.lock(), "functions": functions }))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
        let malformed = || LifecycleError::State("its PCI bus is malformed".into());
        let address = state["address"].as_u64().and_then(|a| u32::try_from(a).ok()).ok_or_else(malformed)?;
        let saved = state["functions"].as_object().ok_or_else(malformed)?;
        let functions = self.functions();
        if saved.len() != functions.len() {
            return Err(LifecycleError::State("its PCI functions are others".into()));
        }
        for (address, slot) in &functions {
            let state = saved
                .get(&address.to_string())
                .ok_or_else(|| LifecycleError::State(format!("it has no PCI function {address}")))?;
            slot.function.restore(state)?;
            self.follow(slot);
        }
        *self.address.lock() = address;
        Ok(())
    }
}

// The buses own these two and the root owns the buses, hence the weak references.
struct Ecam(Weak<PciRoot>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.0.upgrade() {
            Some(root) => root.read_config((offset >> 12) as u8, (offset & 0xfff) as usize, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(root) = self.0.upgrade() {
            root.write_config((offset >> 12) as u8, (offset & 0xfff) as usize, data);
        }
    }
}

struct ConfigPorts(Weak<PciRoot>);

/// Function and register that a data port access at `offset` (4 to 7) means.
fn target(address: u32, offset: u64) -> Option<(u8, usize)> {
    let enabled = address >> 31 == 1 && address >> 16 & 0xff == 0;
    enabled.then_some(((address >> 8) as u8, (address & 0xfc) as usize + (offset & 3) as usize))
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some(root) = self.0.upgrade() else { return };
        let address = *root.address.lock();
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&address.to_le_bytes()),
            (1, 1) => data.fill(0),
            (4.., _) => {
                if let Some((devfn, register)) = target(address, offset) {
                    root.read_config(devfn, register, data);
                }
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(root) = self.0.upgrade() else { return };
        match (offset, data) {
            (0, &[a, b, c, d]) => *root.address.lock() = u32::from_le_bytes([a, b, c, d]),
            (1, &[value]) if value & 4 != 0 => {
                if let Some(reset) = root.reset.get() {
                    reset();
                }
            }
            (4.., _) => {
                let address = *root.address.lock();
                if let Some((devfn, register)) = target(address, offset) {
                    root.write_config(devfn, register, data);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::pci::{ConfigSpace, HostBridge, Identity};

    struct Card {
        config: Mutex<ConfigSpace>,
        written: AtomicU64,
    }

    impl Card {
        fn new() -> Arc<Self> {
            let mut config =
                ConfigSpace::new(Identity { vendor: 0x1234, device: 0x11, ..Default::default() });
            config.add_bar(0, BarKind::Memory64 { prefetchable: false }, 0x1000).unwrap();
            config.add_bar(2, BarKind::Io, 0x20).unwrap();
            Arc::new(Self { config: Mutex::new(config), written: AtomicU64::new(0) })
        }
    }

    impl Lifecycle for Card {
        fn reset(&self) {
            self.config.lock().reset();
        }
        fn save(&self) -> Result<serde_json::Value, LifecycleError> {
            Ok(serde_json::json!(self.config.lock().save()))
        }
        fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
            let bytes: Vec<u8> = serde_json::from_value(state.clone()).unwrap();
            self.config.lock().restore(&bytes)
        }
    }

    impl PciFunction for Card {
        fn config(&self) -> &Mutex<ConfigSpace> {
            &self.config
        }
        fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
            data.fill((bar as u64 * 16 + offset) as u8);
        }
        fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
            self.written.store(offset << 8 | u64::from(data[0]), Ordering::Relaxed);
        }
    }

    fn machine() -> (Arc<PciRoot>, Arc<Bus>, Arc<Bus>) {
        let (mmio, io) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let windows = PciWindows {
            mmio32: 0xc000_0000..0xc000_4000,
            mmio64: 0x10_0000_0000..0x20_0000_0000,
            io: 0xc000..0xc100,
        };
        let root = PciRoot::new(mmio.clone(), io.clone(), windows);
        mmio.insert(0xe000_0000, ECAM_SIZE, root.ecam()).unwrap();
        io.insert(0xcf8, 8, root.config_ports()).unwrap();
        root.add(Arc::new(HostBridge::generic()), 0).unwrap();
        (root, mmio, io)
    }

    fn read32(bus: &Bus, address: u64) -> u32 {
        let mut data = [0; 4];
        bus.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn both_mechanisms_reach_the_same_registers() {
        let (root, mmio, io) = machine();
        root.add(Card::new(), 3).unwrap();
        assert_eq!(read32(&mmio, 0xe000_0000), 0x0008_1b36);
        assert_eq!(read32(&mmio, 0xe000_0000 + (3 << 15)), 0x0011_1234);
        assert_eq!(read32(&mmio, 0xe000_0000 + (4 << 15)), 0xffff_ffff);
        assert_eq!(read32(&mmio, 0xe000_0100), 0, "no extended capabilities");
        io.write(0xcf8, &(0x8000_0000u32 | 3 << 11).to_le_bytes());
        assert_eq!(read32(&io, 0xcfc), 0x0011_1234);
        let mut id = [0; 2];
        io.read(0xcfe, &mut id);
        assert_eq!(id, [0x11, 0]);
        io.write(0xcf8, &(0x8001_0000u32 | 3 << 11).to_le_bytes());
        assert_eq!(read32(&io, 0xcfc), 0xffff_ffff, "there is no bus 1");
    }

    #[test]
    fn bars_are_assigned_and_follow_the_guest() {
        let (root, mmio, io) = machine();
        let card = Card::new();
        root.add(card.clone(), 3).unwrap();
        let config = 0xe000_0000 + (3 << 15);
        assert_eq!(read32(&mmio, config + 0x10), 0xc000_0004);
        assert_eq!(read32(&mmio, 0xc000_0008), 0x0808_0808);
        assert_eq!(read32(&io, 0xc000), 0x2020_2020);
        mmio.write(config + 0x10, &0xd000_0000u32.to_le_bytes());
        assert_eq!(read32(&mmio, 0xc000_0008), 0xffff_ffff);
        mmio.write(0xd000_0004, &[9]);
        assert_eq!(card.written.load(Ordering::Relaxed), 0x409);
        // On top of the configuration window: hidden, and back when moved away.
        mmio.write(config + 0x10, &0xe000_0000u32.to_le_bytes());
        assert_eq!(read32(&mmio, 0xe000_0000), 0x0008_1b36);
        mmio.write(config + 0x10, &0xd000_0000u32.to_le_bytes());
        assert_eq!(read32(&mmio, 0xd000_0000), 0);
        mmio.write(config + 4, &[0, 0]);
        assert_eq!(read32(&mmio, 0xd000_0000), 0xffff_ffff);
        assert_eq!(read32(&io, 0xc000), 0xffff_ffff);
        let saved = root.save().unwrap();
        root.reset();
        assert_eq!(read32(&mmio, 0xc000_0008), 0x0808_0808, "a reset restores the assigned addresses");
        root.restore(&saved).unwrap();
        assert_eq!(read32(&mmio, 0xc000_0008), 0xffff_ffff);
        assert_eq!(read32(&mmio, config + 0x10), 0xd000_0004);
        drop(root);
        assert_eq!(read32(&mmio, config), 0xffff_ffff);
        assert_eq!(Arc::strong_count(&card), 1);
    }

    #[test]
    fn functions_share_a_slot_and_windows_run_out() {
        let (root, mmio, _) = machine();
        root.add(Card::new(), 5).unwrap();
        root.add_function(Card::new(), PciAddress { slot: 5, function: 1 }).unwrap();
        let mut header = [0; 1];
        mmio.read(0xe000_0000 + (5 << 15) + 0xe, &mut header);
        assert_eq!(header, [0x80]);
        assert!(matches!(root.add(Card::new(), 5), Err(PciError::NoSlot(_))));
        assert!(matches!(root.add(Card::new(), 32), Err(PciError::NoSlot(_))));
        assert_eq!(root.free_slot(), Ok(1));
        for slot in 6..8 {
            root.add(Card::new(), slot).unwrap();
        }
        root.add(Card::new(), 8).unwrap();
        assert_eq!(read32(&mmio, 0xe000_0000 + (8 << 15) + 0x14), 0x10, "then above 4 GiB");
    }

    #[test]
    fn the_reset_register_resets() {
        let (root, _, io) = machine();
        let count = Arc::new(AtomicU64::new(0));
        let seen = count.clone();
        root.on_reset(move || {
            seen.fetch_add(1, Ordering::Relaxed);
        });
        io.write(0xcf9, &[2]);
        assert_eq!(count.load(Ordering::Relaxed), 0);
        io.write(0xcf9, &[6]);
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }
}
