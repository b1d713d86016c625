//! What a thread has used of its processor.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How often the calling thread has slept since it began.
pub(crate) fn sleeps() -> i64 {
    // SAFETY: all zeros is a valid value of this plain structure, and the call fills it or fails.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage);
        usage
    };
    usage.ru_nvcsw
}

/// Tells for how long a thread slept. Time in which it could have run, but others did, is no sleep.
pub(crate) struct SleepClock(File);

/// A moment of a [`SleepClock`].
#[derive(Clone, Copy)]
pub(crate) struct Moment {
    at: Instant,
    /// Time in which the thread ran or could have run.
    awake: Duration,
}

impl SleepClock {
    /// The clock of the calling thread.
    pub fn of_this_thread() -> io::Result<Self> {
        File::open("/proc/thread-self/schedstat").map(SleepClock)
    }

    pub fn now(&self) -> io::Result<Moment> {
        let (mut text, at) = ([0; 64], Instant::now());
        let len = self.0.read_at(&mut text, 0)?;
        // Nanoseconds that it ran, as of the last tick, nanoseconds that it waited for a processor, and how often.
        let waited = std::str::from_utf8(&text[..len]).ok();
        let waited = waited.and_then(|text| text.split_ascii_whitespace().nth(1)?.parse().ok());
        let waited = waited.map(Duration::from_nanos).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Moment { at, awake: processor_time() + waited })
    }
}

/// Processor time of the calling thread.
fn processor_time() -> Duration {
    // SAFETY: all zeros is a valid value of this plain structure, and the call fills it or fails.
    let time = unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time);
        time
    };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

impl Moment {
    /// The time since `earlier`, and how much of it the thread slept.
    pub fn since(&self, earlier: &Moment) -> (Duration, Duration) {
        let all = self.at - earlier.at;
        (all, all.saturating_sub(self.awake.saturating_sub(earlier.awake)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeping_and_working_are_told_apart() {
        let clock = SleepClock::of_this_thread().unwrap();
        let (start, count) = (clock.now().unwrap(), sleeps());
        std::thread::sleep(Duration::from_millis(20));
        assert!(sleeps() > count);
        let woken = clock.now().unwrap();
        let (all, slept) = woken.since(&start);
        assert!(slept > all / 2 && slept >= Duration::from_millis(10), "{slept:?} of {all:?}");
        while woken.at.elapsed() < Duration::from_millis(20) {}
        let (all, slept) = clock.now().unwrap().since(&woken);
        assert!(slept < all / 2, "{slept:?} of {all:?}");
    }
}
