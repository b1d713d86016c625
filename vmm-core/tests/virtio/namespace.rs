//! A network namespace of its own for one test.

use std::process::Command;

/// Runs `test` on a thread in a new network namespace, which vanishes with it. Needs root.
pub fn inside(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: no memory is passed. The new namespace holds for this thread and those it starts.
        let rc = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(rc, 0, "cannot make a network namespace; run the tests as root");
        test();
    });
    thread.join().unwrap();
}

/// Runs `ip` with arguments in the namespace of the calling thread.
pub fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().expect("install the Debian package iproute2");
    assert!(status.success(), "ip {arguments:?}");
}
