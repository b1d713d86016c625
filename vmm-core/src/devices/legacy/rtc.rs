//! The CMOS real-time clock (MC146818): the time of the host in UTC, and 114 bytes of memory.

use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::lifecycle::{Lifecycle, LifecycleError};

const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// Status B: values are binary, not BCD.
const BINARY: u8 = 1 << 2;
/// Status B: hours count to 24.
const HOURS_24: u8 = 1 << 1;
/// Status A: 32.768 kHz time base, 1024 Hz periodic rate.
const STATUS_A_DEFAULT: u8 = 0x26;
/// Status D: the battery is good.
const VALID: u8 = 1 << 7;

/// Ten thousand years in seconds.
const MAX_OFFSET: i64 = 10_000 * 366 * 86_400;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    index: u8,
    memory: Vec<u8>,
    offset: i64,
}

struct State {
    index: u8,
    memory: [u8; 128],
    /// What the guest set the clock ahead of the host by, in seconds.
    offset: i64,
}

/// The clock at ports 0x70 and 0x71. It raises no interrupt.
pub struct Rtc {
    state: Mutex<State>,
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

/// Seconds since 1970 as year, month, day, hour, minute, second (proleptic Gregorian calendar).
fn civil(seconds: i64) -> [i64; 6] {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Days since 1 March of year 0, in eras of 400 years.
    let z = days + 719_468;
    let (era, day_of_era) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    [year, month, day_of_year - (153 * shifted + 2) / 5 + 1, rest / 3600, rest / 60 % 60, rest % 60]
}

/// The inverse of [`civil`]; fields out of range carry over.
fn seconds_of([year, month, day, hour, minute, second]: [i64; 6]) -> i64 {
    let year = year - i64::from(month <= 2);
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    let days =
        era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468;
    days * 86_400 + hour * 3600 + minute * 60 + second
}

fn host_seconds() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}

impl State {
    fn encode(&self, value: i64) -> u8 {
        let value = value as u8;
        if self.memory[usize::from(STATUS_B)] & BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> i64 {
        let binary = self.memory[usize::from(STATUS_B)] & BINARY != 0;
        i64::from(if binary { value } else { (value >> 4) * 10 + (value & 15) })
    }

    fn hours(&self, hour: i64) -> u8 {
        if self.memory[usize::from(STATUS_B)] & HOURS_24 != 0 {
            return self.encode(hour);
        }
        let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { 0x80 } else { 0 }
    }

    fn read(&self) -> u8 {
        let now = host_seconds() + self.offset;
        let [year, month, day, hour, minute, second] = civil(now);
        match self.index {
            SECONDS => self.encode(second),
            MINUTES => self.encode(minute),
            HOURS => self.hours(hour),
            // 1 January 1970 was a Thursday; Sunday is 1.
            WEEKDAY => self.encode((now.div_euclid(86_400) + 4).rem_euclid(7) + 1),
            DAY => self.encode(day),
            MONTH => self.encode(month),
            YEAR => self.encode(year % 100),
            CENTURY => self.encode(year / 100),
            STATUS_C => 0,
            STATUS_D => VALID,
            at => self.memory[usize::from(at)],
        }
    }

    fn write(&mut self, value: u8) {
        let now = host_seconds();
        let mut fields = civil(now + self.offset);
        let number = self.decode(value);
        match self.index {
            SECONDS => fields[5] = number,
            MINUTES => fields[4] = number,
            HOURS if self.memory[usize::from(STATUS_B)] & HOURS_24 != 0 => fields[3] = number,
            HOURS => fields[3] = self.decode(value & 0x7f) % 12 + if value & 0x80 != 0 { 12 } else { 0 },
            DAY => fields[2] = number,
            MONTH => fields[1] = number.clamp(1, 12),
            YEAR => fields[0] = fields[0] / 100 * 100 + number,
            CENTURY => fields[0] = number * 100 + fields[0] % 100,
            WEEKDAY | STATUS_C | STATUS_D => return,
            // No update is ever in progress.
            STATUS_A => return self.memory[usize::from(STATUS_A)] = value & 0x7f,
            at => return self.memory[usize::from(at)] = value,
        }
        self.offset = seconds_of(fields) - now;
    }
}

impl Rtc {
    /// A clock that shows the host's time.
    pub fn new() -> Self {
        Self { state: Mutex::new(Self::power_on()) }
    }

    fn power_on() -> State {
        let mut memory = [0; 128];
        memory[usize::from(STATUS_A)] = STATUS_A_DEFAULT;
        memory[usize::from(STATUS_B)] = HOURS_24;
        State { index: 0, memory, offset: 0 }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset == 1 {
            data[0] = self.state.lock().read();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        if offset == 0 {
            // Bit 7 of the index port masks NMI, which nothing raises here.
            state.index = data[0] & 0x7f;
        }
        if let Some(&value) = data.get(1 - offset.min(1) as usize) {
            state.write(value);
        }
    }
}

impl Lifecycle for Rtc {
    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        let s = self.state.lock();
        let saved = Saved { index: s.index, memory: s.memory.to_vec(), offset: s.offset };
        serde_json::to_value(saved).map_err(|e| LifecycleError::State(e.to_string()))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
        let saved = Saved::deserialize(state).map_err(|e| LifecycleError::State(e.to_string()))?;
        let memory = saved.memory.try_into();
        let memory =
            memory.map_err(|_| LifecycleError::State("its clock's memory has another size".into()))?;
        // A guest sets its clock by years, not by ages: sums with the host's time must not overflow.
        let offset = saved.offset.clamp(-MAX_OFFSET, MAX_OFFSET);
        *self.state.lock() = State { index: saved.index & 0x7f, memory, offset };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(0, &[index]);
        let mut data = [0];
        rtc.read(1, &mut data);
        data[0]
    }

    fn set(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0, &[index, value]);
    }

    #[test]
    fn calendar_round_trips() {
        assert_eq!(civil(0), [1970, 1, 1, 0, 0, 0]);
        assert_eq!(civil(951_782_400), [2000, 2, 29, 0, 0, 0]);
        assert_eq!(civil(4_107_542_399), [2100, 2, 28, 23, 59, 59]);
        for day in (-1_000_000..4_000_000).step_by(997) {
            let t = day * 86_400 + 12_345;
            assert_eq!(seconds_of(civil(t)), t);
        }
    }

    #[test]
    fn the_guest_can_set_the_clock_in_bcd_and_read_it_in_binary() {
        let rtc = Rtc::new();
        for (index, value) in [(CENTURY, 0x20), (YEAR, 0x31), (MONTH, 0x12), (DAY, 0x05), (HOURS, 0x13)] {
            set(&rtc, index, value);
        }
        assert_eq!(get(&rtc, DAY), 0x05);
        set(&rtc, STATUS_B, HOURS_24 | BINARY);
        assert_eq!([CENTURY, YEAR, MONTH, DAY, HOURS].map(|i| get(&rtc, i)), [20, 31, 12, 5, 13]);
        set(&rtc, STATUS_B, BINARY);
        assert_eq!(get(&rtc, HOURS), 0x81);
        assert_eq!(get(&rtc, STATUS_D), VALID);
        set(&rtc, 0x40, 0x77);
        assert_eq!(get(&rtc, 0x40), 0x77);

        // Another clock goes on with the same time and memory.
        let other = Rtc::new();
        other.restore(&rtc.save().unwrap()).unwrap();
        assert_eq!(get(&other, 0x40), 0x77);
        assert_eq!([CENTURY, YEAR, MONTH, DAY].map(|i| get(&other, i)), [20, 31, 12, 5]);
        let mut cut = rtc.save().unwrap();
        cut["memory"].as_array_mut().unwrap().pop();
        assert!(other.restore(&cut).is_err());
    }
}
