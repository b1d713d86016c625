//! Sizes and progress for people.

use std::io::{IsTerminal, Write, stderr};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How often a bar is drawn.
const INTERVAL: Duration = Duration::from_millis(100);
const WIDTH: u64 = 40;

/// Bytes for people: `512 B`, `1.50 MiB`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    match (bytes.max(1).ilog2() / 10) as usize {
        0 => format!("{bytes} B"),
        unit => format!("{:.2} {}", bytes as f64 / (1u64 << (10 * unit)) as f64, UNITS[unit - 1]),
    }
}

/// A progress bar on standard error, when that is a terminal.
pub struct Bar {
    started: Instant,
    state: Mutex<State>,
    terminal: bool,
}

#[derive(Default)]
struct State {
    drawn: Option<Instant>,
    /// The cursor is behind the bar.
    open: bool,
}

impl Bar {
    pub fn new() -> Self {
        Self { started: Instant::now(), state: Mutex::default(), terminal: stderr().is_terminal() }
    }

    /// Shows how far the work is.
    pub fn show(&self, done: u64, total: u64) {
        let Ok(mut state) = self.state.lock() else { return };
        let shown = match done < total {
            true => state.drawn.is_some_and(|at| at.elapsed() < INTERVAL),
            false => state.drawn.is_some() && !state.open,
        };
        if !self.terminal || shown {
            return;
        }
        *state = State { drawn: Some(Instant::now()), open: done < total };
        let end = if state.open { "" } else { "\n" };
        // A terminal that went away shows nothing.
        let _ = write!(stderr(), "\r{}\x1b[K{end}", line(done, total, self.started.elapsed()));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if self.state.get_mut().is_ok_and(|state| state.open) {
            let _ = writeln!(stderr());
        }
    }
}

fn line(done: u64, total: u64, elapsed: Duration) -> String {
    let part =
        |whole: u64| (u128::from(done.min(total)) * u128::from(whole) / u128::from(total.max(1))) as u64;
    let bar = "#".repeat(part(WIDTH) as usize);
    let rate = u128::from(done) * 1000 / elapsed.as_millis().max(1);
    let left = u128::from(total.saturating_sub(done)).checked_div(rate);
    let left = left.map_or_else(String::new, |s| format!(" {}:{:02} left", s / 60, s % 60));
    let rate = human(u64::try_from(rate).unwrap_or(u64::MAX));
    format!("[{bar:<40}] {:>3}% {rate}/s{left}", part(100))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_for_people() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (3 << 19, "1.50 MiB"),
            (8 << 30, "8.00 GiB"),
            (u64::MAX, "16.00 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn a_bar_says_how_far_and_how_fast() {
        let half = format!("[{}{}]  50% 1.00 MiB/s 0:04 left", "#".repeat(20), " ".repeat(20));
        assert_eq!(line(4 << 20, 8 << 20, Duration::from_secs(4)), half);
        assert_eq!(line(0, 8, Duration::ZERO), format!("[{}]   0% 0 B/s", " ".repeat(40)));
        assert!(line(9, 8, Duration::ZERO).starts_with(&format!("[{}] 100%", "#".repeat(40))));
        assert!(line(0, 0, Duration::ZERO).contains("  0%"));
    }
}
