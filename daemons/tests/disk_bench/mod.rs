//! A directory in which `nacre disk` and QEMU's programs run.

#![allow(dead_code, reason = "no test program uses all of it")]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

pub const MIB: usize = 1 << 20;

/// A directory in which commands run.
pub struct Bench(tempfile::TempDir);

impl Bench {
    pub fn new() -> Self {
        Self(tempfile::tempdir_in("/dev/shm").unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn run(&self, program: &str, args: &str) -> Output {
        let output = Command::new(program).args(args.split_whitespace()).current_dir(self.path()).output();
        output.unwrap_or_else(|e| panic!("cannot run {program} ({e}); install the Debian package qemu-utils"))
    }

    /// Runs `nacre disk` and returns its exit code and output.
    pub fn disk(&self, args: &str) -> (i32, String) {
        let output = self.run(env!("CARGO_BIN_EXE_nacre"), &format!("disk {args}"));
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8(text).unwrap())
    }

    /// A command that succeeds.
    pub fn ok(&self, args: &str) -> String {
        let (code, text) = self.disk(args);
        assert_eq!(code, 0, "nacre disk {args}: {text}");
        text
    }

    /// A command that succeeds and prints JSON.
    pub fn json(&self, args: &str) -> Value {
        let text = self.ok(args);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("nacre disk {args}: {e}: {text}"))
    }

    /// A command that fails with one line on the standard error.
    pub fn fails(&self, args: &str, code: i32, message: &str) {
        let (seen, text) = self.disk(args);
        assert_eq!(seen, code, "nacre disk {args}: {text}");
        assert!(text.contains(message), "nacre disk {args}: {text}");
    }

    pub fn qemu(&self, program: &str, args: &str) -> String {
        let output = self.run(program, args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Sends SIGINT to a command, slow enough to be running then, once `file` exists.
    pub fn interrupt(&self, args: &str, file: &str) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_nacre"))
            .args(format!("disk {args}").split(' '))
            .current_dir(self.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while !self.path().join(file).exists() {
            std::thread::yield_now();
        }
        // The signal may come before the command expects it; then it ends the process at once.
        std::thread::sleep(std::time::Duration::from_millis(300));
        kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(130));
        self.qemu("qemu-img", &format!("check -f qcow2 {file}"));
    }

    /// Makes "data.raw", 8 MiB with some zeros, and returns its bytes.
    pub fn data(&self) -> Vec<u8> {
        let mut seed = 1u64;
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 56) as u8
        };
        let mut bytes: Vec<u8> = (0..8 * MIB).map(|_| next()).collect();
        bytes[2 * MIB..4 * MIB].fill(0);
        bytes[6 * MIB..6 * MIB + 100].fill(0);
        std::fs::write(self.path().join("data.raw"), &bytes).unwrap();
        bytes
    }

    /// Asserts that QEMU finds an image sound and its contents equal to those of "data.raw".
    pub fn same_as_data(&self, image: &str, format: &str) {
        if format == "qcow2" {
            self.qemu("qemu-img", &format!("check -f qcow2 {image}"));
        }
        self.qemu("qemu-img", &format!("compare -f {format} -F raw {image} data.raw"));
    }
}
