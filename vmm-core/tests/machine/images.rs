//! What Debian guests of tests boot from.
//!
//! The kernel comes from Debian's archive by `tests/guest/make-image`, into the directory that `NACRE_TEST_CACHE` names
//! or one below Cargo's target directory, once.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Two tests must not make the same file at once.
static MAKING: Mutex<()> = Mutex::new(());

/// The directory with the kernel, initrd and root disk of a Debian suite (an empty name is the host's own).
pub fn images(suite: &str, parts: &[&str]) -> PathBuf {
    let cache = match std::env::var_os("NACRE_TEST_CACHE") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("images"),
    };
    let dir = cache.join(if suite.is_empty() { "stable" } else { suite });
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/guest/make-image");
    let _lock = MAKING.lock().unwrap_or_else(|e| e.into_inner());
    for part in parts {
        let status = Command::new(&script).arg(part).arg(&dir).env("SUITE", suite).status().unwrap();
        assert!(status.success(), "{} {part} {} failed", script.display(), dir.display());
    }
    dir
}
