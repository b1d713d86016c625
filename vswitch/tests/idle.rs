//! A switch at rest. Alone in its process, whose threads it looks at.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

mod common;
#[path = "common/worker_time.rs"]
mod worker_time;

use std::time::Duration;

use common::port;
use vswitch::{PortConfig, Switch};
use worker_time::worker_time;

/// With many ports, of the kind that is polled longest.
#[test]
fn an_idle_switch_uses_less_than_a_hundredth_of_a_core() {
    let s = Switch::builder().workers(2).build().unwrap();
    let _ends: Vec<_> = (0..64).map(|n| port(&s, &n.to_string(), PortConfig::default()).1).collect();
    // Until its queues are asleep.
    std::thread::sleep(Duration::from_secs(1));
    let before = worker_time();
    const TIME: Duration = Duration::from_secs(3);
    std::thread::sleep(TIME);
    let used = worker_time() - before;
    assert!(used < TIME / 100, "{used:?} in {TIME:?}");
}
