//! The vCPU's own half of its local APIC.

mod save;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use softcpu::{Clock, Local, MsrFault};

use super::{
    Apics, BASE_BSP, BASE_ENABLE, BASE_PAGE, BASE_X2APIC, Delivery, Destination, Lapic, Message, Vectors,
};

// Registers, by their number in x2APIC mode (the offset in the xAPIC page divided by 16).
const ID: u32 = 0x02;
const VERSION: u32 = 0x03;
const TPR: u32 = 0x08;
const APR: u32 = 0x09;
const PPR: u32 = 0x0a;
const EOI: u32 = 0x0b;
const LDR: u32 = 0x0d;
const DFR: u32 = 0x0e;
const SVR: u32 = 0x0f;
const ISR: u32 = 0x10;
const TMR: u32 = 0x18;
const IRR: u32 = 0x20;
const ESR: u32 = 0x28;
const LVT_CMCI: u32 = 0x2f;
const ICR_LOW: u32 = 0x30;
const ICR_HIGH: u32 = 0x31;
const LVT_TIMER: u32 = 0x32;
const LVT_LAST: u32 = 0x37;
const TIMER_INITIAL: u32 = 0x38;
const TIMER_CURRENT: u32 = 0x39;
const TIMER_DIVIDE: u32 = 0x3e;
const SELF_IPI: u32 = 0x3f;

const MSR_APIC_BASE: u32 = 0x1b;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_X2APIC: u32 = 0x800;

/// Version 0x14 with 6 LVT entries.
const VERSION_VALUE: u32 = 5 << 16 | 0x14;
const LVT_MASKED: u32 = 1 << 16;
/// LVT entries in register order: timer, thermal, performance, LINT0, LINT1, error.
const TIMER: usize = 0;
const LINT0: usize = 3;
const LINT1: usize = 4;
const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
/// Frequency that the timer counts at before the divider: 1 GHz.
const TIMER_NS: u64 = 1;
/// The shortest period of a periodic timer in nanoseconds: a guest cannot ask for more interrupts than can be served.
const MIN_PERIOD_NS: u64 = 20_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

/// The registers that only the vCPU's thread touches.
pub(in crate::accel::soft) struct LocalApic {
    shared: Arc<Lapic>,
    apics: Arc<Apics>,
    clock: Arc<Clock>,
    isr: Vectors,
    tpr: u8,
    esr: u32,
    icr: u64,
    lvt: [u32; 6],
    divide: u32,
    initial: u32,
    /// When the count started, in time-stamp counter ticks.
    started: u64,
    /// When the timer expires next.
    deadline: Option<u64>,
}

impl LocalApic {
    pub(in crate::accel::soft) fn new(apics: Arc<Apics>, shared: Arc<Lapic>, clock: Arc<Clock>) -> Self {
        let mut apic = Self {
            shared,
            apics,
            clock,
            isr: Vectors::default(),
            tpr: 0,
            esr: 0,
            icr: 0,
            lvt: [LVT_MASKED; 6],
            divide: 0,
            initial: 0,
            started: 0,
            deadline: None,
        };
        apic.wire_lint();
        apic
    }

    /// What firmware would have set up: the PIC reaches the bootstrap processor, LINT1 is NMI.
    fn wire_lint(&mut self) {
        self.lvt[LINT0] = if self.shared.id == 0 { 0x700 } else { LVT_MASKED };
        self.lvt[LINT1] = 0x400;
    }

    /// Power-on values, except for the identity and the base address.
    fn reset(&mut self) {
        self.shared.irr.reset();
        self.shared.tmr.reset();
        self.shared.svr.store(0xff, Ordering::SeqCst);
        self.shared.ldr.store(0, Ordering::SeqCst);
        self.shared.dfr.store(u32::MAX, Ordering::SeqCst);
        self.shared.extint.store(false, Ordering::SeqCst);
        self.isr.reset();
        self.tpr = 0;
        self.esr = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; 6];
        self.wire_lint();
        self.divide = 0;
        self.initial = 0;
        self.deadline = None;
    }

    fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0);
        if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service & 0xf0 }
    }

    fn deliverable(&self) -> Option<u8> {
        self.shared.irr.highest().filter(|vector| vector >> 4 > self.ppr() >> 4)
    }

    /// Whether the PIC's output reaches this processor.
    fn pic_wired(&self) -> bool {
        if !self.shared.enabled() {
            // A disabled APIC passes INTR through.
            return self.shared.id == 0;
        }
        let lint0 = self.lvt[LINT0];
        lint0 & LVT_MASKED == 0 && Delivery::from_bits(lint0 >> 8) == Delivery::ExtInt
    }

    fn external(&self) -> bool {
        self.shared.extint.load(Ordering::SeqCst) || self.pic_wired() && self.apics.pic.output()
    }

    fn timer_mode(&self) -> TimerMode {
        match self.lvt[TIMER] >> 17 & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            2 => TimerMode::TscDeadline,
            _ => TimerMode::Reserved,
        }
    }

    /// Nanoseconds that one count of the timer takes.
    fn count_ns(&self) -> u64 {
        let shift = self.divide & 3 | self.divide >> 1 & 4;
        TIMER_NS << ((shift + 1) & 7)
    }

    /// The whole count in time-stamp counter ticks.
    fn period(&self) -> u64 {
        let mut ns = u64::from(self.initial) * self.count_ns();
        if self.timer_mode() == TimerMode::Periodic {
            ns = ns.max(MIN_PERIOD_NS);
        }
        self.clock.ns_to_tsc(ns)
    }

    fn start_timer(&mut self, tsc: u64) {
        self.started = tsc;
        let counts = matches!(self.timer_mode(), TimerMode::OneShot | TimerMode::Periodic);
        self.deadline = (counts && self.initial != 0).then(|| tsc.saturating_add(self.period()));
    }

    fn current_count(&self, tsc: u64) -> u32 {
        match self.deadline {
            Some(deadline) if self.timer_mode() != TimerMode::TscDeadline => {
                let left = self.clock.tsc_to_ns(deadline.saturating_sub(tsc)) / self.count_ns();
                left.min(u64::from(self.initial)) as u32
            }
            _ => 0,
        }
    }

    fn read(&self, register: u32, tsc: u64) -> u32 {
        match register {
            ID if self.shared.x2apic() => self.shared.id,
            ID => self.shared.id << 24,
            VERSION => VERSION_VALUE,
            TPR => self.tpr.into(),
            APR => 0,
            PPR => self.ppr().into(),
            LDR if self.shared.x2apic() => self.shared.x2apic_ldr(),
            LDR => self.shared.ldr.load(Ordering::Relaxed),
            DFR => self.shared.dfr.load(Ordering::Relaxed),
            SVR => self.shared.svr.load(Ordering::Relaxed),
            ISR..TMR => self.isr.word((register - ISR) as usize),
            TMR..IRR => self.shared.tmr.word((register - TMR) as usize),
            IRR..ESR => self.shared.irr.word((register - IRR) as usize),
            ESR => self.esr,
            LVT_CMCI => LVT_MASKED,
            ICR_LOW => self.icr as u32,
            ICR_HIGH => (self.icr >> 32) as u32,
            LVT_TIMER..=LVT_LAST => self.lvt[(register - LVT_TIMER) as usize],
            TIMER_INITIAL => self.initial,
            TIMER_CURRENT => self.current_count(tsc),
            TIMER_DIVIDE => self.divide,
            _ => 0,
        }
    }

    fn write(&mut self, register: u32, value: u32, tsc: u64) {
        match register {
            TPR => self.tpr = value as u8,
            EOI => self.end_of_interrupt(),
            LDR => self.shared.ldr.store(value & 0xff00_0000, Ordering::SeqCst),
            DFR => self.shared.dfr.store(value | 0x0fff_ffff, Ordering::SeqCst),
            SVR => {
                self.shared.svr.store(value & 0x1ff, Ordering::SeqCst);
                if !self.shared.software_enabled() {
                    self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
                }
            }
            ESR => self.esr = 0,
            ICR_LOW => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value & 0xc_cfff);
                self.send_ipi();
            }
            ICR_HIGH => self.icr = self.icr & 0xffff_ffff | u64::from(value) << 32,
            LVT_TIMER..=LVT_LAST => self.write_lvt((register - LVT_TIMER) as usize, value),
            TIMER_INITIAL if self.timer_mode() != TimerMode::TscDeadline => {
                self.initial = value;
                self.start_timer(tsc);
            }
            TIMER_DIVIDE => {
                let left = self.current_count(tsc);
                self.divide = value & 0xb;
                if self.deadline.is_some() && self.timer_mode() != TimerMode::TscDeadline {
                    let ns = u64::from(left) * self.count_ns();
                    self.deadline = Some(tsc.saturating_add(self.clock.ns_to_tsc(ns)));
                }
            }
            _ => {}
        }
    }

    fn write_lvt(&mut self, index: usize, value: u32) {
        let old_mode = self.timer_mode();
        self.lvt[index] = value & LVT_WRITABLE[index];
        if !self.shared.software_enabled() {
            self.lvt[index] |= LVT_MASKED;
        }
        // A switch to or from TSC-deadline mode disarms the timer.
        if index == TIMER
            && self.timer_mode() != old_mode
            && (self.timer_mode() == TimerMode::TscDeadline || old_mode == TimerMode::TscDeadline)
        {
            self.deadline = None;
            self.initial = 0;
        }
    }

    fn end_of_interrupt(&mut self) {
        let Some(vector) = self.isr.highest() else { return };
        self.isr.clear(vector);
        if self.shared.tmr.get(vector) {
            self.apics.ioapic.end_of_interrupt(vector);
        }
    }

    fn send_ipi(&self) {
        let low = self.icr as u32;
        let wide = self.shared.x2apic();
        let high = (self.icr >> 32) as u32;
        let destination =
            Destination { id: if wide { high } else { high >> 24 }, logical: low & 1 << 11 != 0, wide };
        let level = low & 1 << 15 != 0;
        let delivery = Delivery::from_bits(low >> 8);
        if delivery == Delivery::Init && level && low & 1 << 14 == 0 {
            // INIT level de-assert only synchronises arbitration identifiers.
            return;
        }
        // IPIs are edges, whatever the trigger mode says.
        let mut message = Message { destination, delivery, vector: low as u8, level: false };
        let me = self.shared.id;
        match low >> 18 & 3 {
            0 => {
                self.apics.deliver(&message);
            }
            1 => self.shared.accept(&message),
            shorthand => {
                // All, or all but this one. Each is addressed by itself, so that lowest priority does not pick one.
                message.delivery =
                    if delivery == Delivery::LowestPriority { Delivery::Fixed } else { delivery };
                for lapic in &self.apics.lapics {
                    if lapic.enabled() && (shorthand == 2 || lapic.id != me) {
                        lapic.accept(&message);
                    }
                }
            }
        }
    }

    fn set_base(&mut self, value: u64) -> Result<(), MsrFault> {
        let old = self.shared.base.load(Ordering::Relaxed);
        let mode = value & (BASE_ENABLE | BASE_X2APIC);
        let illegal = mode == BASE_X2APIC
            || mode == BASE_ENABLE && old & BASE_X2APIC != 0
            || mode == BASE_ENABLE | BASE_X2APIC && old & BASE_ENABLE == 0
            || value & !(mode | BASE_BSP | BASE_PAGE) != 0;
        if illegal {
            return Err(MsrFault);
        }
        if mode == 0 && old & BASE_ENABLE != 0 {
            self.reset();
        }
        self.shared.base.store(value & BASE_PAGE | mode | old & BASE_BSP, Ordering::SeqCst);
        Ok(())
    }

    /// Whether the register exists in x2APIC mode, for reading or writing.
    fn x2apic_register(register: u32, write: bool) -> bool {
        match register {
            TPR | SVR | ESR | LVT_TIMER..=LVT_LAST | TIMER_INITIAL | TIMER_DIVIDE | ICR_LOW => true,
            EOI | SELF_IPI => write,
            ID | VERSION | PPR | LDR | ISR..ESR | TIMER_CURRENT => !write,
            _ => false,
        }
    }
}

impl Local for LocalApic {
    fn pending(&mut self) -> bool {
        self.deliverable().is_some() || self.external()
    }

    fn acknowledge(&mut self) -> Option<u8> {
        if let Some(vector) = self.deliverable() {
            self.shared.irr.clear(vector);
            self.isr.set(vector);
            return Some(vector);
        }
        if self.external() {
            self.shared.extint.store(false, Ordering::SeqCst);
            return self.apics.pic.acknowledge();
        }
        None
    }

    fn read_msr(&mut self, msr: u32, tsc: u64) -> Result<u64, MsrFault> {
        match msr {
            MSR_APIC_BASE => Ok(self.shared.base.load(Ordering::Relaxed)),
            MSR_TSC_DEADLINE => Ok(match self.timer_mode() {
                TimerMode::TscDeadline => self.deadline.unwrap_or(0),
                _ => 0,
            }),
            _ => {
                let register = msr.wrapping_sub(MSR_X2APIC);
                if !self.shared.x2apic() || !Self::x2apic_register(register, false) {
                    return Err(MsrFault);
                }
                Ok(if register == ICR_LOW { self.icr } else { self.read(register, tsc).into() })
            }
        }
    }

    fn write_msr(&mut self, msr: u32, value: u64, tsc: u64) -> Result<(), MsrFault> {
        match msr {
            MSR_APIC_BASE => self.set_base(value),
            MSR_TSC_DEADLINE => {
                if self.timer_mode() == TimerMode::TscDeadline {
                    self.deadline = (value != 0).then_some(value);
                }
                Ok(())
            }
            _ => {
                let register = msr.wrapping_sub(MSR_X2APIC);
                if !self.shared.x2apic() || !Self::x2apic_register(register, true) {
                    return Err(MsrFault);
                }
                match register {
                    ICR_LOW => {
                        self.icr = value & 0xffff_ffff_000c_cfff;
                        self.send_ipi();
                    }
                    SELF_IPI if value >> 8 != 0 => return Err(MsrFault),
                    SELF_IPI => self.shared.accept(&Message {
                        destination: Destination { id: 0, logical: false, wide: true },
                        delivery: Delivery::Fixed,
                        vector: value as u8,
                        level: false,
                    }),
                    // These must be written with zero.
                    EOI | ESR if value != 0 => return Err(MsrFault),
                    _ => self.write(register, u32::try_from(value).map_err(|_| MsrFault)?, tsc),
                }
                Ok(())
            }
        }
    }

    fn cr8(&mut self) -> u8 {
        self.tpr >> 4
    }

    fn set_cr8(&mut self, priority: u8) {
        self.tpr = priority << 4;
    }

    fn mmio_page(&self) -> Option<u64> {
        let base = self.shared.base.load(Ordering::Relaxed);
        (base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE).then_some(base & BASE_PAGE)
    }

    fn mmio_read(&mut self, offset: u32, data: &mut [u8], tsc: u64) {
        let value = self.read(offset >> 4, tsc).to_le_bytes();
        // Only the first four bytes of each 16 are defined.
        for (at, byte) in (offset as usize & 15..).zip(data) {
            *byte = value.get(at).copied().unwrap_or(0);
        }
    }

    fn mmio_write(&mut self, offset: u32, data: &[u8], tsc: u64) {
        if let (0, Some(value)) = (offset & 15, data.first_chunk::<4>()) {
            self.write(offset >> 4, u32::from_le_bytes(*value), tsc);
        }
    }

    fn deadline(&mut self) -> Option<u64> {
        self.deadline
    }

    fn timer(&mut self, tsc: u64) {
        let Some(deadline) = self.deadline.filter(|&deadline| deadline <= tsc) else { return };
        self.deadline = match self.timer_mode() {
            TimerMode::Periodic if self.initial != 0 => {
                // Expirations that were missed are one interrupt.
                let period = self.period().max(1);
                Some(deadline + ((tsc - deadline) / period + 1) * period)
            }
            _ => None,
        };
        let entry = self.lvt[TIMER];
        if entry & LVT_MASKED == 0 {
            self.shared.accept(&Message {
                destination: Destination { id: self.shared.id, logical: false, wide: true },
                delivery: Delivery::Fixed,
                vector: entry as u8,
                level: false,
            });
        }
    }

    fn init(&mut self) {
        self.reset();
    }
}
