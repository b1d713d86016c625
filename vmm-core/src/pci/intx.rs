//! Wired PCI interrupts: four level-triggered lines that all functions share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::interrupt::IrqLine;

/// A line that is asserted while any of its sources is.
pub(super) struct SharedLine {
    line: Arc<dyn IrqLine>,
    sources: Mutex<u32>,
}

impl SharedLine {
    pub(super) fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { line, sources: Mutex::new(0) }
    }
}

/// One function's connection to its interrupt line.
pub struct IntxPin {
    line: Arc<SharedLine>,
    asserted: AtomicBool,
}

impl IntxPin {
    pub(super) fn new(line: Arc<SharedLine>) -> Self {
        Self { line, asserted: AtomicBool::new(false) }
    }

    /// Asserts or releases the pin. The line stays asserted while another function asserts it.
    pub fn set_level(&self, asserted: bool) {
        let mut sources = self.line.sources.lock();
        if self.asserted.swap(asserted, Ordering::Relaxed) == asserted {
            return;
        }
        let before = *sources;
        *sources = if asserted { before + 1 } else { before - 1 };
        if (before == 0) != (*sources == 0) {
            self.line.line.set_level(asserted);
        }
    }
}

impl Drop for IntxPin {
    fn drop(&mut self) {
        self.set_level(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Level(AtomicBool);

    impl IrqLine for Level {
        fn set_level(&self, asserted: bool) {
            self.0.store(asserted, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_shared_line_is_the_or_of_its_pins() {
        let level = Arc::new(Level(AtomicBool::new(false)));
        let shared = Arc::new(SharedLine::new(level.clone()));
        let (a, b) = (IntxPin::new(shared.clone()), IntxPin::new(shared));
        a.set_level(true);
        b.set_level(true);
        a.set_level(false);
        a.set_level(false);
        assert!(level.0.load(Ordering::Relaxed));
        drop(b);
        assert!(!level.0.load(Ordering::Relaxed));
    }
}
