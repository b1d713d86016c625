//! The 8254 interval timer and the speaker port 0x61.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use softcpu::Clock;

use super::timer::TimerThread;
use crate::accel::{PitCounterState, PitState};
use crate::interrupt::IrqLine;

/// Frequency of the timer's input in Hz.
const HZ: u128 = 1_193_182;
/// The shortest period that interrupts are made at, in nanoseconds.
const MIN_PERIOD_NS: u64 = 100_000;

/// Port 0x61: gate of counter 2.
const GATE2: u8 = 1;
/// Port 0x61: data of the speaker.
const SPEAKER: u8 = 2;
/// Port 0x61: refresh toggle and output of counter 2.
const REFRESH: u8 = 1 << 4;
const OUT2: u8 = 1 << 5;

fn ticks_to_ns(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000_000 / HZ) as u64
}

fn ns_to_ticks(ns: u64) -> u64 {
    (u128::from(ns) * HZ / 1_000_000_000) as u64
}

#[derive(Clone, Copy, Default)]
struct Counter {
    /// The reload value; 0 counts as 65536.
    reload: u16,
    mode: u8,
    /// Access mode: 1 low byte, 2 high byte, 3 both.
    access: u8,
    /// The next access of a two-byte value is to the high byte.
    high_next: bool,
    write_low: u8,
    latched: Option<u16>,
    status: Option<u8>,
    /// When counting began, in nanoseconds of the clock.
    started: Option<u64>,
    gate: bool,
}

impl Counter {
    fn count(&self) -> u64 {
        if self.reload == 0 { 0x1_0000 } else { u64::from(self.reload) }
    }

    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn elapsed(&self, now: u64) -> u64 {
        self.started.map_or(0, |started| ns_to_ticks(now.saturating_sub(started)))
    }

    fn value(&self, now: u64) -> u16 {
        let (elapsed, count) = (self.elapsed(now), self.count());
        match self.mode {
            2 => (count - elapsed % count) as u16,
            3 => (count - elapsed * 2 % count) as u16,
            _ => count.wrapping_sub(elapsed) as u16,
        }
    }

    fn output(&self, now: u64) -> bool {
        let (elapsed, count) = (self.elapsed(now), self.count());
        match (self.started, self.mode) {
            (None, 0) => false,
            (None, _) => true,
            (_, 0 | 1) => elapsed >= count,
            (_, 2) => elapsed % count != count - 1,
            (_, 3) => elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// Sets the mode from a control word.
    fn control(&mut self, value: u8) {
        self.mode = match value >> 1 & 7 {
            6 => 2,
            7 => 3,
            mode => mode,
        };
        self.access = value >> 4 & 3;
        self.high_next = false;
        self.latched = None;
        self.started = None;
    }

    /// Takes a byte of the reload value; true when it is complete.
    fn write(&mut self, value: u8, now: u64) -> bool {
        match (self.access, self.high_next) {
            (1, _) => self.reload = value.into(),
            (2, _) => self.reload = u16::from(value) << 8,
            (_, false) => {
                self.write_low = value;
                self.high_next = true;
                return false;
            }
            (_, true) => {
                self.reload = u16::from(value) << 8 | u16::from(self.write_low);
                self.high_next = false;
            }
        }
        if self.gate {
            self.started = Some(now);
        }
        true
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let value = self.latched.unwrap_or_else(|| self.value(now));
        let high = match self.access {
            1 => false,
            2 => true,
            _ => {
                self.high_next = !self.high_next;
                !self.high_next
            }
        };
        if self.access != 3 || high {
            self.latched = None;
        }
        if high { (value >> 8) as u8 } else { value as u8 }
    }

    fn latch(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.value(now));
        }
    }

    fn latch_status(&mut self, now: u64) {
        let no_count = u8::from(self.started.is_none()) << 6;
        self.status = Some(u8::from(self.output(now)) << 7 | no_count | self.access << 4 | self.mode << 1);
    }
}

// Codes of a step in `PitCounterState`: the low or high byte of a value of two.
const LOW_OF_TWO: u8 = 3;
const HIGH_OF_TWO: u8 = 4;

impl Counter {
    fn save(&self, now: u64) -> PitCounterState {
        let step = match (self.access, self.high_next) {
            (3, false) => LOW_OF_TWO,
            (3, true) => HIGH_OF_TWO,
            (access, _) => access,
        };
        PitCounterState {
            count: self.count() as u32,
            latched_count: self.latched,
            latch_step: if self.latched.is_some() { step } else { 0 },
            latched_status: self.status,
            read_step: step,
            write_step: step,
            write_low: self.write_low,
            access: self.access,
            mode: if self.started.is_some() { self.mode } else { PitCounterState::IDLE },
            bcd: false,
            gate: self.gate,
            age: self.started.map_or(0, |started| now.saturating_sub(started)),
        }
    }

    fn load(state: &PitCounterState, now: u64) -> Self {
        let idle = state.mode > 5;
        let step = if state.latched_count.is_some() { state.latch_step } else { state.write_step };
        Self {
            // 65536 is written as 0.
            reload: state.count as u16,
            mode: if idle { 0 } else { state.mode },
            access: state.access & 3,
            high_next: step == HIGH_OF_TWO || state.write_step == HIGH_OF_TWO,
            write_low: state.write_low,
            latched: state.latched_count,
            status: state.latched_status,
            started: (!idle).then(|| now.saturating_sub(state.age)),
            gate: state.gate,
        }
    }
}

struct State {
    counters: [Counter; 3],
    port61: u8,
}

/// The timer. Counter 0 raises a line from the machine's timer thread; counter 2 is only read.
pub(super) struct Pit {
    state: Mutex<State>,
    clock: Arc<Clock>,
    timer: TimerThread,
}

impl Pit {
    /// A timer whose counter 0 raises `line`.
    pub(super) fn new(clock: Arc<Clock>, line: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| {
            let this = this.clone();
            let expire = move || {
                let pit = this.upgrade()?;
                line.pulse();
                pit.next_edge()
            };
            Self {
                state: Mutex::new(Self::power_on()),
                timer: TimerThread::new(clock.clone(), expire),
                clock,
            }
        })
    }

    fn power_on() -> State {
        let on = Counter { gate: true, access: 3, ..Counter::default() };
        State { counters: [on, on, Counter { gate: false, ..on }], port61: 0 }
    }

    /// When counter 0's output rises next, in nanoseconds of the clock.
    fn next_edge(&self) -> Option<u64> {
        let counter = self.state.lock().counters[0];
        let (started, now) = (counter.started?, self.clock.now_ns());
        let period = ticks_to_ns(counter.count()).max(MIN_PERIOD_NS);
        if counter.periodic() {
            Some(started + (now.saturating_sub(started) / period + 1) * period)
        } else {
            // One shot: when that has passed there is nothing more.
            Some(started + period).filter(|&at| at > now)
        }
    }

    /// The state; counting goes on from there when it is loaded.
    pub(super) fn save(&self) -> PitState {
        let now = self.clock.now_ns();
        let s = self.state.lock();
        PitState { counters: s.counters.map(|c| c.save(now)), speaker: s.port61 & SPEAKER != 0 }
    }

    /// Loads what [`Self::save`] returned.
    pub(super) fn load(&self, state: &PitState) {
        let now = self.clock.now_ns();
        {
            let mut s = self.state.lock();
            s.counters = state.counters.map(|c| Counter::load(&c, now));
            let gate = if s.counters[2].gate { GATE2 } else { 0 };
            s.port61 = gate | if state.speaker { SPEAKER } else { 0 };
        }
        self.timer.set(self.next_edge());
    }

    pub(super) fn read(&self, port: u16) -> u8 {
        let now = self.clock.now_ns();
        let mut s = self.state.lock();
        match port {
            0x40..=0x42 => s.counters[usize::from(port - 0x40)].read(now),
            0x61 => {
                let out = if s.counters[2].output(now) { OUT2 } else { 0 };
                // The refresh request toggles about every 15 us.
                let refresh = if (now / 15_085) & 1 != 0 { REFRESH } else { 0 };
                s.port61 | out | refresh
            }
            _ => 0,
        }
    }

    pub(super) fn write(&self, port: u16, value: u8) {
        let now = self.clock.now_ns();
        let mut s = self.state.lock();
        let changed = match port {
            0x40..=0x42 => s.counters[usize::from(port - 0x40)].write(value, now) && port == 0x40,
            0x43 if value >> 6 == 3 => {
                for (index, counter) in s.counters.iter_mut().enumerate() {
                    if value & 2 << index != 0 {
                        if value & 0x20 == 0 {
                            counter.latch(now);
                        }
                        if value & 0x10 == 0 {
                            counter.latch_status(now);
                        }
                    }
                }
                false
            }
            0x43 => {
                let counter = &mut s.counters[usize::from(value >> 6)];
                if value & 0x30 == 0 {
                    counter.latch(now);
                    false
                } else {
                    counter.control(value);
                    value >> 6 == 0
                }
            }
            0x61 => {
                s.port61 = value & (GATE2 | SPEAKER);
                let counter = &mut s.counters[2];
                let gate = value & GATE2 != 0;
                if gate && !counter.gate {
                    counter.started = Some(now);
                }
                counter.gate = gate;
                false
            }
            _ => false,
        };
        drop(s);
        if changed {
            self.timer.set(self.next_edge());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::{Duration, Instant};

    use super::*;

    #[derive(Default)]
    struct Line(AtomicU32);

    impl IrqLine for Line {
        fn set_level(&self, asserted: bool) {
            self.0.fetch_add(asserted.into(), Ordering::SeqCst);
        }
    }

    #[test]
    fn counter_0_interrupts_once_or_again_and_again() {
        let line = Arc::new(Line::default());
        let pit = Pit::new(Arc::new(Clock::host(1_000_000)), line.clone());
        let program = |mode: u8, count: u16| {
            pit.write(0x43, 0x30 | mode << 1);
            pit.write(0x40, count as u8);
            pit.write(0x40, (count >> 8) as u8);
        };
        let wait = |n: u32| {
            let limit = Instant::now() + Duration::from_secs(20);
            while line.0.load(Ordering::SeqCst) < n {
                assert!(Instant::now() < limit, "no interrupt");
                std::thread::yield_now();
            }
        };
        program(2, 1193);
        wait(3);
        program(0, 1193);
        let base = line.0.load(Ordering::SeqCst);
        wait(base + 1);
        // A mode without a count stops it.
        pit.write(0x43, 0x30);
    }

    #[test]
    fn counter_2_is_gated_and_readable() {
        let pit = Pit::new(Arc::new(Clock::deterministic(1_000_000)), Arc::new(Line::default()));
        pit.write(0x61, 0);
        pit.write(0x43, 0xb0);
        pit.write(0x42, 0x34);
        pit.write(0x42, 0x12);
        assert_eq!(pit.read(0x61) & OUT2, 0, "mode 0 starts low");
        pit.write(0x61, 1);
        pit.write(0x43, 0x80);
        assert_eq!((pit.read(0x42), pit.read(0x42)), (0x34, 0x12));
        pit.write(0x43, 0xe8);
        assert_eq!(pit.read(0x42) & 0x3f, 0x30, "status: both bytes, mode 0");
    }

    #[test]
    fn values_follow_the_mode() {
        let c = Counter { reload: 1000, mode: 2, started: Some(0), ..Counter::default() };
        assert_eq!(c.value(ticks_to_ns(2500) + 1), 500);
        let c = Counter { mode: 0, ..c };
        assert!(c.output(ticks_to_ns(1000) + 1000));
        assert!(!c.output(ticks_to_ns(990)));
    }
}
