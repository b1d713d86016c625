//! The local APICs (Intel SDM volume 3, chapter "Advanced Programmable Interrupt Controller").
//!
//! An APIC has two halves. [`Lapic`] is what other processors and devices reach: the request bits and the registers
//! that decide who a message is for. [`LocalApic`] belongs to the vCPU's thread: everything else, without a lock.

mod local;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

pub(super) use local::LocalApic;
use softcpu::CpuHandle;

use super::ioapic::IoApic;
use super::pic::Pic;
use crate::interrupt::Msi;

/// IA32_APIC_BASE: this is the bootstrap processor.
const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
const BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: enabled.
const BASE_ENABLE: u64 = 1 << 11;
/// Where messages are addressed to, and the register page lies after a reset.
const BASE_ADDRESS: u64 = 0xfee0_0000;
/// IA32_APIC_BASE: the address of the register page, as wide as guest-physical addresses of the processor.
const BASE_PAGE: u64 = 0x3fff_ffff_f000;

/// Spurious-interrupt vector register: software enable.
const SVR_ENABLE: u32 = 1 << 8;

/// 256 bits that several threads set and clear.
#[derive(Default)]
pub(super) struct Vectors([AtomicU32; 8]);

impl Vectors {
    fn set(&self, vector: u8) {
        self.0[usize::from(vector / 32)].fetch_or(1 << (vector % 32), Ordering::SeqCst);
    }

    fn clear(&self, vector: u8) {
        self.0[usize::from(vector / 32)].fetch_and(!(1 << (vector % 32)), Ordering::SeqCst);
    }

    fn get(&self, vector: u8) -> bool {
        self.0[usize::from(vector / 32)].load(Ordering::SeqCst) & 1 << (vector % 32) != 0
    }

    fn word(&self, index: usize) -> u32 {
        self.0[index & 7].load(Ordering::SeqCst)
    }

    fn load(&self, words: &[u32]) {
        self.0.iter().zip(words).for_each(|(word, value)| word.store(*value, Ordering::SeqCst));
    }

    fn highest(&self) -> Option<u8> {
        (0..8u8).rev().find_map(|i| {
            let word = self.word(i.into());
            (word != 0).then(|| i * 32 + (31 - word.leading_zeros() as u8))
        })
    }

    fn reset(&self) {
        self.0.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }
}

/// How a message is delivered (bits 10:8 of an ICR, MSI or redirection entry).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    Fixed,
    LowestPriority,
    Nmi,
    Init,
    Startup,
    ExtInt,
    /// SMI and the reserved encoding: nobody reacts.
    Other,
}

impl Delivery {
    pub(super) fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            7 => Self::ExtInt,
            _ => Self::Other,
        }
    }
}

/// Who a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Destination {
    pub id: u32,
    pub logical: bool,
    /// The sender is in x2APIC mode: the identifier has 32 bits.
    pub wide: bool,
}

/// An interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub destination: Destination,
    pub delivery: Delivery,
    pub vector: u8,
    pub level: bool,
}

impl Message {
    /// Decodes an MSI, or `None` when it does not address the local APICs.
    pub(super) fn from_msi(msi: Msi) -> Option<Self> {
        if msi.address & 0xfff0_0000 != BASE_ADDRESS || msi.address >> 32 & 0xff != 0 {
            return None;
        }
        Some(Self {
            // The upper 24 bits of a wide destination lie in the upper half of the address.
            destination: Destination {
                id: (msi.address >> 12 & 0xff) as u32 | (msi.address >> 32) as u32 & 0xffff_ff00,
                logical: msi.address & 1 << 2 != 0,
                wide: false,
            },
            delivery: Delivery::from_bits(msi.data >> 8),
            vector: msi.data as u8,
            level: msi.data & 1 << 15 != 0,
        })
    }
}

/// The half of a local APIC that every thread may touch.
pub(super) struct Lapic {
    pub(super) id: u32,
    irr: Vectors,
    /// Which requested vectors are level-triggered.
    tmr: Vectors,
    base: AtomicU64,
    svr: AtomicU32,
    /// Logical destination and destination format registers of xAPIC mode.
    ldr: AtomicU32,
    dfr: AtomicU32,
    /// An ExtINT message came through the IO-APIC.
    extint: AtomicBool,
    handle: OnceLock<Arc<CpuHandle>>,
}

impl Lapic {
    fn new(id: u32) -> Self {
        let bsp = if id == 0 { BASE_BSP } else { 0 };
        Self {
            id,
            irr: Vectors::default(),
            tmr: Vectors::default(),
            base: AtomicU64::new(BASE_ADDRESS | BASE_ENABLE | bsp),
            svr: AtomicU32::new(0xff),
            ldr: AtomicU32::new(0),
            dfr: AtomicU32::new(u32::MAX),
            extint: AtomicBool::new(false),
            handle: OnceLock::new(),
        }
    }

    /// Connects the vCPU that this APIC interrupts.
    pub(super) fn attach(&self, handle: Arc<CpuHandle>) {
        // A vCPU is created once; a second handle cannot come.
        let _ = self.handle.set(handle);
    }

    fn x2apic(&self) -> bool {
        self.base.load(Ordering::Relaxed) & BASE_X2APIC != 0
    }

    fn enabled(&self) -> bool {
        self.base.load(Ordering::Relaxed) & BASE_ENABLE != 0
    }

    fn software_enabled(&self) -> bool {
        self.svr.load(Ordering::Relaxed) & SVR_ENABLE != 0
    }

    /// The logical identifier in x2APIC mode: the cluster in the upper half, one bit in the lower.
    fn x2apic_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 15)
    }

    fn matches(&self, to: Destination) -> bool {
        if !self.enabled() {
            return false;
        }
        let broadcast = if to.wide { u32::MAX } else { 0xff };
        if to.id == broadcast {
            return true;
        }
        if !to.logical {
            return to.id == self.id;
        }
        if self.x2apic() {
            let ldr = self.x2apic_ldr();
            return if to.wide {
                to.id >> 16 == ldr >> 16 && to.id & ldr & 0xffff != 0
            } else {
                ldr >> 16 == 0 && to.id & ldr & 0xff != 0
            };
        }
        let ldr = self.ldr.load(Ordering::Relaxed) >> 24;
        if self.dfr.load(Ordering::Relaxed) >> 28 == 0xf {
            to.id & ldr != 0
        } else {
            to.id >> 4 & 15 == ldr >> 4 && to.id & ldr & 15 != 0
        }
    }

    fn accept(&self, message: &Message) {
        let Some(handle) = self.handle.get() else { return };
        match message.delivery {
            Delivery::Fixed | Delivery::LowestPriority => {
                // Vectors below 16 are illegal.
                if self.software_enabled() && message.vector >= 16 {
                    if message.level {
                        self.tmr.set(message.vector)
                    } else {
                        self.tmr.clear(message.vector)
                    }
                    self.irr.set(message.vector);
                    handle.interrupt();
                }
            }
            Delivery::Nmi => handle.nmi(),
            Delivery::Init => handle.init(),
            Delivery::Startup => handle.sipi(message.vector),
            Delivery::ExtInt => {
                self.extint.store(true, Ordering::SeqCst);
                handle.interrupt();
            }
            Delivery::Other => {}
        }
    }
}

/// All local APICs of a machine and the controllers that are wired to them.
pub(super) struct Apics {
    lapics: Vec<Arc<Lapic>>,
    pub(super) ioapic: IoApic,
    pub(super) pic: Pic,
}

impl Apics {
    pub(super) fn new(cpus: u32) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| Self {
            lapics: (0..cpus).map(|id| Arc::new(Lapic::new(id))).collect(),
            ioapic: IoApic::new(this.clone()),
            pic: Pic::new(this.clone()),
        })
    }

    pub(super) fn lapic(&self, id: u32) -> Option<&Arc<Lapic>> {
        self.lapics.get(id as usize)
    }

    /// Delivers a message; false when nobody is addressed.
    pub(super) fn deliver(&self, message: &Message) -> bool {
        let mut addressed = self.lapics.iter().filter(|l| l.matches(message.destination));
        if message.delivery == Delivery::LowestPriority {
            // All priorities are taken as equal: the first that listens gets it.
            let first = addressed.find(|l| l.software_enabled());
            first.iter().for_each(|l| l.accept(message));
            return first.is_some();
        }
        addressed.fold(false, |_, lapic| {
            lapic.accept(message);
            true
        })
    }

    /// The PIC's output may have changed: the bootstrap processor looks again.
    pub(super) fn pic_changed(&self) {
        if let Some(handle) = self.lapics.first().and_then(|l| l.handle.get()) {
            handle.interrupt();
        }
    }
}

#[cfg(test)]
mod tests;
