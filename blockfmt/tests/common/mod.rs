//! Helpers of the integration tests.
#![allow(dead_code, reason = "each test uses some of the helpers")]

pub mod chain;
pub mod crash;
pub mod differencing;
pub mod late;
pub mod nbd;

use std::path::Path;
use std::process::{Command, Output};

/// Runs a program of QEMU's and returns its output, whatever its exit status.
pub fn qemu(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output();
    output.unwrap_or_else(|e| panic!("cannot run {program} ({e}); install the Debian package qemu-utils"))
}

/// Runs a program of QEMU's that must succeed and returns its standard output.
pub fn qemu_ok(program: &str, args: &[&str]) -> String {
    let output = qemu(program, args);
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits until a thread has ended, or sleeps because it needs what the caller holds. `task` is where its
/// `/proc/thread-self` leads.
pub fn wait_until_blocked(thread: &std::thread::JoinHandle<()>, task: &Path) {
    let stat = Path::new("/proc").join(task).join("stat");
    let sleeps = || std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") S "));
    // More than once: an allocation may make it sleep for a moment, too.
    let mut seen = 0;
    while seen < 100 && !thread.is_finished() {
        std::thread::yield_now();
        seen = if sleeps() { seen + 1 } else { 0 };
    }
}

/// A path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// A small reproducible generator (xorshift64*).
pub struct Rng(pub u64);

impl Rng {
    /// The next 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }

    /// `len` random bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        for chunk in out.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
        out
    }
}

/// Performs random requests on a disk and the same ones on a plain array.
pub fn exercise(disk: &blockfmt::Disk, model: &mut [u8], rng: &mut Rng, requests: usize) {
    for _ in 0..requests {
        let size = model.len() as u64;
        let limit = [512, 4096, 70_000, 300_000][rng.below(4) as usize].min(size);
        let mut offset = rng.below(size);
        let mut len = (1 + rng.below(limit)).min(size - offset);
        if rng.below(2) == 0 {
            offset &= !511;
            len = len.next_multiple_of(512).min(size - offset);
        }
        let range = offset as usize..(offset + len) as usize;
        match rng.below(10) {
            0..=4 => {
                let data = rng.bytes(len as usize);
                disk.write_at(&data, offset).expect("write");
                model[range].copy_from_slice(&data);
            }
            5 => {
                let unmap = rng.below(2) == 0;
                let (offset, len) =
                    if rng.below(3) == 0 { (offset / 2, size - offset / 2) } else { (offset, len) };
                let len = len.min(1 << 20);
                disk.write_zeroes(offset, len, unmap).expect("write zeroes");
                model[offset as usize..(offset + len) as usize].fill(0);
            }
            6 => {
                disk.discard(offset, len).expect("discard");
                let mut seen = vec![0; len as usize];
                disk.read_at(&mut seen, offset).expect("read");
                for (now, before) in seen.iter().zip(&model[range.clone()]) {
                    assert!(now == before || *now == 0, "discarded bytes became something else");
                }
                model[range].copy_from_slice(&seen);
            }
            7 => disk.flush().expect("flush"),
            _ => {
                let mut seen = vec![0xa5; len as usize];
                disk.read_at(&mut seen, offset).expect("read");
                assert!(seen == model[range], "{len} bytes at {offset} differ");
            }
        }
    }
}

/// Compares a whole disk with a plain array.
pub fn assert_same(disk: &blockfmt::Disk, model: &[u8]) {
    assert_eq!(disk.size(), model.len() as u64);
    let mut seen = vec![0xa5; model.len()];
    disk.read_at(&mut seen, 0).expect("read");
    if seen != model {
        let at = seen.iter().zip(model).position(|(a, b)| a != b).expect("there is a difference");
        panic!("the disk differs from the model at byte {at}: {} instead of {}", seen[at], model[at]);
    }
}

/// Certificates of an authority, a server and a client, under the names that everybody uses.
pub fn make_certificates(dir: &Path) {
    let run = |args: &[&str]| {
        let output = Command::new("openssl").args(args).current_dir(dir).output();
        let output = output.expect("cannot run openssl; install the Debian package openssl");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let new =
        ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-x509", "-days", "2"];
    let ca = ["-subj", "/CN=test authority", "-keyout", "ca-key.pem", "-out", "ca-cert.pem"];
    let uses = ["-addext", "keyUsage=critical,keyCertSign,digitalSignature"];
    run(&[&new[..], &ca[..], &uses[..]].concat());
    for who in ["server", "client"] {
        let (key, out) = (format!("{who}-key.pem"), format!("{who}-cert.pem"));
        let signed = ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-subj", "/CN=localhost"];
        let names = [
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
        ];
        run(&[&new[..], &signed[..], &names[..], &["-keyout", &key, "-out", &out]].concat());
    }
}
