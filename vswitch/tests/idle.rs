//! A switch at rest. Alone in its process, whose threads it looks at.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

mod common;

use std::time::Duration;

use common::port;
use vswitch::{PortConfig, Switch};

/// Processor time that the threads of switches have used.
fn used() -> Duration {
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

/// With many ports, of the kind that is polled longest.
#[test]
fn an_idle_switch_uses_less_than_a_hundredth_of_a_core() {
    let s = Switch::builder().workers(2).build().unwrap();
    let _ends: Vec<_> = (0..64).map(|n| port(&s, &n.to_string(), PortConfig::default()).1).collect();
    // Until its queues are asleep.
    std::thread::sleep(Duration::from_secs(1));
    let before = used();
    const TIME: Duration = Duration::from_secs(3);
    std::thread::sleep(TIME);
    let used = used() - before;
    assert!(used < TIME / 100, "{used:?} in {TIME:?}");
}
