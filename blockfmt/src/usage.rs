//! What a thread has used of its processor.

use std::time::Duration;

/// What the calling thread has used since it began.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// Processor time.
    pub time: Duration,
    /// How often it slept.
    pub sleeps: i64,
}

impl Usage {
    pub fn of_this_thread() -> Self {
        // SAFETY: all zeros is a valid value of this plain structure, and the call fills it or fails.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage);
            usage
        };
        let time = |t: libc::timeval| {
            Duration::from_secs(t.tv_sec.unsigned_abs()) + Duration::from_micros(t.tv_usec.unsigned_abs())
        };
        Usage { time: time(usage.ru_utime) + time(usage.ru_stime), sleeps: usage.ru_nvcsw }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn sleeping_and_working_are_told_apart() {
        let before = Usage::of_this_thread();
        std::thread::sleep(Duration::from_millis(1));
        let slept = Usage::of_this_thread();
        assert!(slept.sleeps > before.sleeps);
        let start = Instant::now();
        while Usage::of_this_thread().time < slept.time + Duration::from_millis(5) {
            assert!(start.elapsed() < Duration::from_secs(60), "the time of this thread stands still");
        }
    }
}
