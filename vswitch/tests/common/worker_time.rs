//! The processor time of a switch's threads.

use std::time::Duration;

/// Processor time that the workers of all switches in this process have used.
pub fn worker_time() -> Duration {
    let mut nanoseconds = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        if std::fs::read_to_string(path.join("comm")).unwrap().starts_with("nacre-switch-") {
            let stat = std::fs::read_to_string(path.join("schedstat")).unwrap();
            nanoseconds += stat.split(' ').next().unwrap().parse::<u64>().unwrap();
        }
    }
    Duration::from_nanos(nanoseconds)
}
