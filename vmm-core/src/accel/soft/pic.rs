//! The pair of 8259A interrupt controllers.

use std::sync::Weak;

use parking_lot::Mutex;

use super::lapic::Apics;

/// Input of the first controller that the second one is wired to.
const CASCADE: u8 = 2;
/// Vector offset of the spurious interrupt.
const SPURIOUS: u8 = 7;

/// What the next write to the data port is.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Init {
    #[default]
    Done,
    Word2,
    Word3,
    Word4,
}

#[derive(Clone, Copy, Default)]
struct Chip {
    irr: u8,
    isr: u8,
    imr: u8,
    /// Levels of the inputs, for edge detection.
    lines: u8,
    /// Inputs that are level-triggered (ELCR).
    level: u8,
    base: u8,
    init: Init,
    needs_word4: bool,
    auto_eoi: bool,
    read_isr: bool,
    special_mask: bool,
    /// Input with the lowest priority.
    lowest: u8,
    rotate_on_auto_eoi: bool,
}

impl Chip {
    fn set(&mut self, input: u8, asserted: bool) {
        let bit = 1 << input;
        if asserted {
            if self.level & bit != 0 || self.lines & bit == 0 {
                self.irr |= bit;
            }
            self.lines |= bit;
        } else {
            if self.level & bit != 0 {
                self.irr &= !bit;
            }
            self.lines &= !bit;
        }
    }

    /// Position of the highest-priority bit of `bits`, and its rank (0 is highest).
    fn first(&self, bits: u8) -> Option<(u8, u8)> {
        (1..=8).map(|n| (self.lowest.wrapping_add(n) & 7, n - 1)).find(|(input, _)| bits & 1 << input != 0)
    }

    /// The input that asks for service now.
    fn request(&self, cascade: bool) -> Option<u8> {
        let (input, rank) = self.first(self.irr & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        match self.first(in_service) {
            // Fully nested, except that the second controller may interrupt its own service routine.
            Some((busy, busy_rank))
                if busy_rank <= rank && !(cascade && busy == CASCADE && input == CASCADE) =>
            {
                None
            }
            _ => Some(input),
        }
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.level & bit == 0 {
            self.irr &= !bit;
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.lowest = input;
            }
        } else {
            self.isr |= bit;
        }
    }

    fn command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1
            *self = Self { level: self.level, lines: self.lines, lowest: 7, ..Self::default() };
            self.init = Init::Word2;
            self.needs_word4 = value & 1 != 0;
        } else if value & 8 != 0 {
            // OCW3
            match value & 3 {
                2 => self.read_isr = false,
                3 => self.read_isr = true,
                _ => {}
            }
            match value >> 5 & 3 {
                2 => self.special_mask = false,
                3 => self.special_mask = true,
                _ => {}
            }
        } else {
            // OCW2
            let (specific, rotate, eoi) = (value & 0x40 != 0, value & 0x80 != 0, value & 0x20 != 0);
            let target = match (eoi, specific) {
                (_, true) => Some(value & 7),
                (true, false) => self.first(self.isr).map(|(input, _)| input),
                (false, false) => {
                    self.rotate_on_auto_eoi = rotate;
                    None
                }
            };
            if let Some(input) = target {
                if eoi {
                    self.isr &= !(1 << input);
                }
                if rotate {
                    self.lowest = input;
                }
            }
        }
    }

    fn data(&mut self, value: u8) {
        match self.init {
            Init::Done => self.imr = value,
            Init::Word2 => {
                self.base = value & 0xf8;
                self.init = Init::Word3;
            }
            Init::Word3 => self.init = if self.needs_word4 { Init::Word4 } else { Init::Done },
            Init::Word4 => {
                self.auto_eoi = value & 2 != 0;
                self.init = Init::Done;
            }
        }
    }
}

#[derive(Default)]
struct Pair {
    first: Chip,
    second: Chip,
}

impl Pair {
    fn output(&mut self) -> bool {
        let cascade = self.second.request(false).is_some();
        self.first.set(CASCADE, false);
        self.first.irr &= !(1 << CASCADE);
        if cascade {
            self.first.set(CASCADE, true);
        }
        self.first.request(true).is_some()
    }
}

/// Both controllers and the edge/level registers.
pub(super) struct Pic {
    pair: Mutex<Pair>,
    apics: Weak<Apics>,
}

impl Pic {
    pub(super) fn new(apics: Weak<Apics>) -> Self {
        Self { pair: Mutex::new(Self::power_on()), apics }
    }

    /// All inputs are masked until a guest initialises the controllers: without firmware nobody else does.
    fn power_on() -> Pair {
        let chip = Chip { imr: 0xff, lowest: 7, ..Chip::default() };
        Pair { first: Chip { base: 0x08, ..chip }, second: Chip { base: 0x70, ..chip } }
    }

    /// Drives input `irq` (0 to 15).
    pub(super) fn set(&self, irq: u32, asserted: bool) {
        let raised = {
            let mut pair = self.pair.lock();
            let before = pair.output();
            let chip = if irq < 8 { &mut pair.first } else { &mut pair.second };
            chip.set((irq & 7) as u8, asserted);
            !before && pair.output()
        };
        if raised && let Some(apics) = self.apics.upgrade() {
            apics.pic_changed();
        }
    }

    /// Whether the first controller asks for an interrupt.
    pub(super) fn output(&self) -> bool {
        self.pair.lock().output()
    }

    /// The interrupt acknowledge cycle.
    pub(super) fn acknowledge(&self) -> Option<u8> {
        let mut pair = self.pair.lock();
        pair.output();
        let Some(input) = pair.first.request(true) else { return Some(pair.first.base | SPURIOUS) };
        pair.first.acknowledge(input);
        if input != CASCADE {
            return Some(pair.first.base | input);
        }
        let second = &mut pair.second;
        let Some(input) = second.request(false) else { return Some(second.base | SPURIOUS) };
        second.acknowledge(input);
        Some(second.base | input)
    }

    pub(super) fn read(&self, port: u16) -> u8 {
        let pair = self.pair.lock();
        match port {
            0x4d0 => return pair.first.level,
            0x4d1 => return pair.second.level,
            _ => {}
        }
        let chip = if port < 0xa0 { &pair.first } else { &pair.second };
        match (port & 1, chip.read_isr) {
            (1, _) => chip.imr,
            (_, true) => chip.isr,
            (_, false) => chip.irr,
        }
    }

    pub(super) fn write(&self, port: u16, value: u8) {
        let raised = {
            let mut pair = self.pair.lock();
            match port {
                // The timer, the keyboard, the cascade and the clock are edges always.
                0x4d0 => pair.first.level = value & 0xf8,
                0x4d1 => pair.second.level = value & 0xde,
                _ => {
                    let chip = if port < 0xa0 { &mut pair.first } else { &mut pair.second };
                    if port & 1 == 0 { chip.command(value) } else { chip.data(value) }
                }
            }
            pair.output()
        };
        if raised && let Some(apics) = self.apics.upgrade() {
            apics.pic_changed();
        }
    }
}
