//! The pair of 8259A interrupt controllers.

use std::sync::Weak;

use parking_lot::Mutex;

use super::lapic::Apics;
use crate::accel::PicState;

/// Input of the first controller that the second one is wired to.
const CASCADE: u8 = 2;
/// Vector offset of the spurious interrupt.
const SPURIOUS: u8 = 7;
/// Inputs of each controller that may be level-triggered.
const LEVEL_MASKS: [u8; 2] = [0xf8, 0xde];

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
    fn load(state: &PicState) -> Self {
        Self {
            irr: state.irr,
            isr: state.isr,
            imr: state.imr,
            lines: state.lines,
            level: state.level,
            base: state.base,
            init: match state.init_step {
                1 => Init::Word2,
                2 => Init::Word3,
                3 => Init::Word4,
                _ => Init::Done,
            },
            needs_word4: state.needs_word4,
            auto_eoi: state.auto_eoi,
            read_isr: state.read_isr,
            special_mask: state.special_mask,
            lowest: state.highest.wrapping_sub(1) & 7,
            rotate_on_auto_eoi: state.rotate_on_auto_eoi,
        }
    }

    fn save(&self) -> PicState {
        PicState {
            irr: self.irr,
            isr: self.isr,
            imr: self.imr,
            lines: self.lines,
            level: self.level,
            base: self.base,
            init_step: match self.init {
                Init::Done => 0,
                Init::Word2 => 1,
                Init::Word3 => 2,
                Init::Word4 => 3,
            },
            needs_word4: self.needs_word4,
            auto_eoi: self.auto_eoi,
            read_isr: self.read_isr,
            special_mask: self.special_mask,
            highest: self.lowest.wrapping_add(1) & 7,
            rotate_on_auto_eoi: self.rotate_on_auto_eoi,
            ..PicState::default()
        }
    }

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

    fn power_on() -> Pair {
        let [first, second] = PicState::at_power_on();
        Pair { first: Chip::load(&first), second: Chip::load(&second) }
    }

    /// The state of both controllers.
    pub(super) fn save(&self) -> [PicState; 2] {
        let pair = self.pair.lock();
        [pair.first.save(), pair.second.save()]
    }

    /// Loads what [`Self::save`] returned. The special fully nested mode and polling, which nobody uses, are left out.
    pub(super) fn load(&self, state: &[PicState; 2]) {
        let raised = {
            let mut pair = self.pair.lock();
            (pair.first, pair.second) = (Chip::load(&state[0]), Chip::load(&state[1]));
            pair.first.level &= LEVEL_MASKS[0];
            pair.second.level &= LEVEL_MASKS[1];
            pair.output()
        };
        if raised && let Some(apics) = self.apics.upgrade() {
            apics.pic_changed();
        }
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
                0x4d0 => pair.first.level = value & LEVEL_MASKS[0],
                0x4d1 => pair.second.level = value & LEVEL_MASKS[1],
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
