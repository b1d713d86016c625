//! The lease keeper on real files: exclusion, sharing, hand-over, loss, and nothing left behind.

#![expect(clippy::unwrap_used, reason = "a failure in a test's helper fails the test")]

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cluster::adapters::{LeaseDisk, LeaseVolume};
use cluster::keeper::{KeeperConfig, KeeperError, KeeperEvent, LeaseKeeper, Resource};
use cluster::lease::Timing;
use cluster::lock::{DenyReason, LockMode};
use cluster::ondisk::{Geometry, Name};
use cluster::types::HostId;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const LONG: Duration = Duration::from_secs(120);

fn name(s: &str) -> Name {
    Name::new(s).unwrap()
}

fn disk(index: u32) -> Resource {
    Resource { index, name: name(&format!("disk-{index}")) }
}

fn volume(path: &Path) -> LeaseVolume {
    LeaseVolume::new(LeaseDisk::open(path, Geometry::S512).unwrap(), name("SPACE"), 0)
}

fn formatted(dir: &Path) -> PathBuf {
    let path = dir.join("leases");
    std::fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    let v = volume(&path);
    v.format_space(1).unwrap();
    for n in 0..3 {
        v.format_resource(n, disk(n).name).unwrap();
    }
    path
}

fn config(path: &Path, host: u16) -> KeeperConfig {
    let host_name = name(&format!("host-{host}"));
    let timing = Timing { io_timeout: 1, watchdog: 10 };
    KeeperConfig { timing, ..KeeperConfig::new(path, name("SPACE"), HostId(host), host_name) }
}

fn pair(path: &Path) -> (LeaseKeeper, LeaseKeeper) {
    let keepers = [1, 2].map(|h| LeaseKeeper::open(config(path, h)).unwrap());
    for k in &keepers {
        k.wait_held(LONG).unwrap();
    }
    let [a, b] = keepers;
    (a, b)
}

fn held_by(error: KeeperError) -> HostId {
    match error {
        KeeperError::Denied(DenyReason::Held(owner) | DenyReason::HeldShared(owner)) => owner.host,
        other => panic!("{other:?}"),
    }
}

#[test]
fn locks_exclude_are_shared_and_change_hands_with_rising_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let path = formatted(dir.path());
    let (a, b) = pair(&path);

    let lock = a.lock(disk(0), LockMode::Exclusive, Duration::ZERO).unwrap();
    assert!(lock.is_held() && a.expires_in() > Duration::ZERO);
    assert_eq!(held_by(b.lock(disk(0), LockMode::Exclusive, Duration::ZERO).unwrap_err()), HostId(1));
    assert_eq!(held_by(b.lock(disk(0), LockMode::Shared, Duration::ZERO).unwrap_err()), HostId(1));
    let twice = a.lock(disk(0), LockMode::Exclusive, LONG);
    assert!(matches!(twice, Err(KeeperError::Denied(DenyReason::Busy))), "{twice:?}");
    let first = lock.token();
    lock.release().unwrap();
    let lock = b.lock(disk(0), LockMode::Exclusive, Duration::ZERO).unwrap();
    assert!(lock.token() > first);

    // A dropped lock is given back too: the waiter gets it.
    let second = lock.token();
    let lock = std::thread::scope(|s| {
        let waiter = s.spawn(|| a.lock(disk(0), LockMode::Exclusive, LONG));
        drop(lock);
        waiter.join().unwrap().unwrap()
    });
    assert!(lock.token() > second);

    let shared_a = a.lock(disk(1), LockMode::Shared, Duration::ZERO).unwrap();
    let shared_b = b.lock(disk(1), LockMode::Shared, LONG).unwrap();
    shared_a.release().unwrap();
    assert_eq!(held_by(a.lock(disk(1), LockMode::Exclusive, Duration::ZERO).unwrap_err()), HostId(2));
    assert!(matches!(shared_b.hand_over(HostId(1)), Err(KeeperError::Denied(_))) && shared_b.is_held());
}

#[test]
fn a_lock_is_handed_over_to_a_living_host_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = formatted(dir.path());
    let (a, b) = pair(&path);
    let lock = a.lock(disk(0), LockMode::Exclusive, Duration::ZERO).unwrap();
    assert!(matches!(lock.hand_over(HostId(9)), Err(KeeperError::BadHost(HostId(9)))));
    // The target's lease is seen with the next scan at the latest.
    let token = loop {
        assert!(lock.is_held());
        match lock.hand_over(HostId(2)) {
            Err(KeeperError::BadHost(_)) => std::thread::sleep(Duration::from_millis(50)),
            other => break other.unwrap(),
        }
    };
    assert!(!lock.is_held());
    assert_eq!(token.owner.host, HostId(2));
    assert_eq!(held_by(a.lock(disk(0), LockMode::Exclusive, Duration::ZERO).unwrap_err()), HostId(2));
    let lock = b.lock(disk(0), LockMode::Exclusive, Duration::ZERO).unwrap();
    assert!(lock.token() > token);
}

#[test]
fn a_volume_that_fails_costs_the_lease_and_its_locks_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = formatted(dir.path());
    let keeper = LeaseKeeper::open(config(&path, 1)).unwrap();
    keeper.wait_held(LONG).unwrap();
    let lock = keeper.lock(disk(0), LockMode::Exclusive, Duration::ZERO).unwrap();
    let good = std::fs::read(&path).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();

    let mut seen = Vec::new();
    while !matches!(seen.last(), Some(KeeperEvent::Lost(_))) {
        let mut fds = [PollFd::new(keeper.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::NONE).unwrap();
        seen.extend(keeper.next_event());
    }
    assert_eq!(seen[0], KeeperEvent::Acquired(1));
    assert!(seen.contains(&KeeperEvent::Warning), "{seen:?}");
    assert!(!lock.is_held() && keeper.expires_in() == Duration::ZERO);
    assert!(matches!(lock.release(), Err(KeeperError::Lost(_))));

    std::fs::write(&path, good).unwrap();
    assert_eq!(keeper.wait_held(LONG).unwrap(), 2);
    let lock = keeper.lock(disk(0), LockMode::Exclusive, LONG).unwrap();
    assert!(lock.is_held());
}

#[test]
fn the_locks_of_a_host_that_is_gone_are_taken_only_once_that_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let path = formatted(dir.path());
    let (a, b) = pair(&path);
    let lock = a.lock(disk(0), LockMode::Exclusive, Duration::ZERO).unwrap();
    let dead = std::fs::read(&path).unwrap();
    drop((lock, a));
    // The volume as a host leaves it that lost its power: lease and lock are as they were.
    let mine = volume(&path).read_delta(HostId(2)).unwrap();
    std::fs::write(&path, dead).unwrap();
    volume(&path).write_delta(HostId(2), mine).unwrap();
    assert_eq!(held_by(b.lock(disk(0), LockMode::Exclusive, Duration::ZERO).unwrap_err()), HostId(1));
    b.declare_gone(HostId(1)).unwrap();
    let lock = b.lock(disk(0), LockMode::Exclusive, Duration::ZERO).unwrap();
    assert_eq!(lock.token().owner.host, HostId(2));
}

#[test]
fn dropping_gives_everything_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = formatted(dir.path());
    let keeper = LeaseKeeper::open(config(&path, 1)).unwrap();
    keeper.wait_held(LONG).unwrap();
    let lock = keeper.lock(disk(2), LockMode::Exclusive, Duration::ZERO).unwrap();
    // The lock keeps the lease alive.
    drop(keeper);
    assert!(lock.is_held());
    drop(lock);
    let v = volume(&path);
    assert!(v.read_delta(HostId(1)).unwrap().is_free());
    assert!(v.read_leader(2, disk(2).name).unwrap().is_free());
}

#[test]
fn mistakes_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = formatted(dir.path());
    assert!(matches!(LeaseKeeper::open(config(&path, 0)), Err(KeeperError::BadHost(_))));
    assert!(matches!(LeaseKeeper::open(config(&path, 65)), Err(KeeperError::BadHost(_))));
    let missing = LeaseKeeper::open(config(&dir.path().join("missing"), 1));
    assert!(matches!(missing, Err(KeeperError::Disk(_))));
    let other = KeeperConfig { space: name("OTHER"), ..config(&path, 1) };
    assert!(matches!(LeaseKeeper::open(other), Err(KeeperError::Disk(_))));
    let dog = KeeperConfig { watchdog: Some("/nonexistent/watchdog".into()), ..config(&path, 1) };
    assert!(matches!(LeaseKeeper::open(dog), Err(KeeperError::Watchdog(_))));
    let keeper = LeaseKeeper::open(config(&path, 1)).unwrap();
    assert!(matches!(keeper.wait_held(Duration::ZERO), Err(KeeperError::TimedOut)));
    let early = keeper.lock(disk(0), LockMode::Exclusive, Duration::ZERO);
    assert!(matches!(early, Err(KeeperError::Denied(DenyReason::NoLease))));
    keeper.wait_held(LONG).unwrap();
    let wrong = keeper.lock(Resource { index: 0, name: name("x") }, LockMode::Exclusive, Duration::ZERO);
    assert!(matches!(wrong, Err(KeeperError::Denied(DenyReason::Io))));
}
