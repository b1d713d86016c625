//! Slows vCPUs down, for a guest that writes memory faster than it can be sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::super::vcpu::Control;

/// vCPUs run in every period for a part of it.
const PERIOD: Duration = Duration::from_millis(50);
const STACK_SIZE: usize = 64 << 10;
/// The value that ends the thread.
const STOP: u32 = u32::MAX;
const FIRST: u32 = 20;
const STEP: u32 = 10;
const MOST: u32 = 99;

/// Holds the vCPUs back for a part of the time; dropping it lets them run.
pub(super) struct Throttle {
    control: Arc<Control>,
    percent: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    pub(super) fn new(control: &Arc<Control>) -> Self {
        Self { control: control.clone(), percent: Arc::default(), thread: None }
    }

    /// Holds them back more; returns how much of the time now, in per cent.
    pub(super) fn increase(&mut self) -> std::io::Result<u32> {
        let percent = match self.percent.load(Ordering::Relaxed) {
            0 => FIRST,
            more => (more + STEP).min(MOST),
        };
        self.percent.store(percent, Ordering::Relaxed);
        if self.thread.is_none() {
            let (control, percent) = (self.control.clone(), self.percent.clone());
            let thread = std::thread::Builder::new().name("throttle".into()).stack_size(STACK_SIZE);
            self.thread = Some(thread.spawn(move || run(&control, &percent))?);
        }
        Ok(percent)
    }
}

fn run(control: &Control, percent: &AtomicU32) {
    loop {
        let now = percent.load(Ordering::Relaxed);
        if now == STOP {
            return;
        }
        let held = PERIOD * now / 100;
        control.hold(true);
        std::thread::sleep(held);
        control.hold(false);
        std::thread::sleep(PERIOD - held);
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.percent.store(STOP, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It does nothing that panics.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_more_and_more_and_lets_go_in_the_end() {
        let control = Control::new(false, false, tracing::Span::none()).unwrap();
        let mut throttle = Throttle::new(&control);
        let steps: Vec<_> = (0..10).map(|_| throttle.increase().unwrap()).collect();
        assert_eq!(steps, [20, 30, 40, 50, 60, 70, 80, 90, 99, 99]);
        for wanted in [true, false, true] {
            while control.is_held() != wanted {
                std::thread::yield_now();
            }
        }
        drop(throttle);
        assert!(!control.is_held());
    }
}
