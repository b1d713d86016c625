//! Runs every example as its users do.
//!
//! The guests' kernel and images come from Debian's archive by `tests/guest/make-image`, into the directory that
//! `NACRE_TEST_CACHE` names or one below Cargo's target directory, once.
#![expect(clippy::unwrap_used, reason = "a failure in a test's helper fails the test")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

fn images() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let cache = match std::env::var_os("NACRE_TEST_CACHE") {
            Some(dir) => PathBuf::from(dir),
            None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("images"),
        };
        let dir = cache.join("stable");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/guest/make-image");
        for part in ["kernel", "initrd", "rootfs"] {
            let status = Command::new(&script).arg(part).arg(&dir).status().unwrap();
            assert!(status.success(), "{} {part} {} failed", script.display(), dir.display());
        }
        dir
    })
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).env("RUST_BACKTRACE", "0").output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
fn succeeds(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    stdout(&output)
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn boot_linux() {
    let (kernel, initrd) = (images().join("vmlinuz"), images().join("initrd"));
    let program = env!("CARGO_BIN_EXE_boot_linux");
    let text = succeeds(program, &[path(&kernel), path(&initrd), "console=ttyS0 cryptomgr.notests boottest"]);
    assert!(text.contains("initrd: userland reached"), "{text}");
    let missing = run(program, &["/nonexistent/vmlinuz"]);
    assert!(!missing.status.success());
    assert!(String::from_utf8_lossy(&missing.stderr).contains("/nonexistent/vmlinuz"), "{missing:?}");
}

#[test]
fn the_sandbox_returns_output_and_status_and_keeps_its_limits() {
    let program = env!("CARGO_BIN_EXE_sandbox");
    let images = path(images());
    let good = run(program, &[images, "300", "128", "echo it\\'s fine; echo $((6 * 7)); exit 3"]);
    assert_eq!(stdout(&good), "it's fine\n42\n");
    assert_eq!(good.status.code(), Some(3));
    let slow = run(program, &[images, "1", "128", "sleep 1000"]);
    assert_eq!(slow.status.code(), Some(124), "{slow:?}");
    let greedy = run(program, &[images, "300", "128", "busybox tail /dev/zero; echo survived"]);
    assert_eq!(greedy.status.code(), Some(125), "{greedy:?}");
    assert!(!stdout(&greedy).contains("survived"));
}

#[test]
fn only_machines_of_one_vlan_hear_each_other_in_the_network_lab() {
    let text = succeeds(env!("CARGO_BIN_EXE_network_lab"), &[path(images())]);
    assert_eq!(text.lines().count(), 12, "{text}");
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let same = words[0].split('-').next() == words[words.len() - 1].split('-').next();
        assert_eq!(words.len() == 3, same, "{line}");
    }
}

#[test]
fn linked_clones_do_not_see_each_other_and_leave_the_base_alone() {
    let base = images().join("base.raw");
    let before = std::fs::read(&base).unwrap();
    let job = "ls /root; echo mine >/root/file; sync; cat /root/file";
    let text = succeeds(env!("CARGO_BIN_EXE_linked_clones"), &[path(images()), job, job]);
    assert_eq!(text.lines().filter(|line| *line == "mine").count(), 2, "{text}");
    assert_eq!(text.lines().filter(|line| *line == "file").count(), 0, "{text}");
    assert!(std::fs::read(&base).unwrap() == before, "the base changed");
}

#[test]
fn a_custom_device_gives_the_guest_the_bytes_of_its_seed() {
    let program = env!("CARGO_BIN_EXE_custom_device");
    let runs = ["7", "7", "8"].map(|seed| succeeds(program, &[path(images()), seed]));
    assert!(runs[0].contains("virtio_rng.0") && runs[0].contains("00000000  "), "{}", runs[0]);
    // The driver's buffers have 64 bytes, and the kernel may have drawn some of one for itself.
    for (text, seed) in runs.iter().zip([7u64, 7, 8]) {
        let mut state = seed;
        let numbers = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        });
        let buffer: Vec<u8> = numbers.take(64).collect();
        let drawn: Vec<u8> = text
            .lines()
            .filter(|line| line.starts_with("000000") && line.len() > 8)
            .flat_map(|line| line.split('|').next().unwrap_or_default().split_whitespace().skip(1))
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect();
        assert_eq!(drawn.len(), 32, "{text}");
        assert!(buffer.repeat(2).windows(32).any(|window| window == drawn), "{drawn:x?} of {buffer:x?}");
    }
}

#[test]
fn the_disk_tool_makes_describes_and_copies_disks() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let program = env!("CARGO_BIN_EXE_disk_tool");
    let mut data = vec![0; 1 << 20];
    data[123_456..200_000].fill(7);
    std::fs::write(file("base.raw"), &data).unwrap();
    succeeds(program, &["create", "qcow2", "1048576", &file("child.qcow2"), "raw", "base.raw"]);
    let info = succeeds(program, &["info", "qcow2", &file("child.qcow2")]);
    assert!(info.starts_with("1048576 bytes in 2 layers\n"), "{info}");
    succeeds(program, &["copy", "qcow2", &file("child.qcow2"), "vhd", &file("copy.vhd")]);
    succeeds(program, &["copy", "vhd", &file("copy.vhd"), "raw", &file("copy.raw")]);
    assert!(std::fs::read(file("copy.raw")).unwrap()[..1 << 20] == data);
    let wrong = run(program, &["info", "vhd", &file("base.raw")]);
    assert_eq!(wrong.status.code(), Some(1), "{wrong:?}");
}

#[test]
fn two_hosts_share_a_disk_and_lose_no_increment() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (leases, image) = (file("leases"), file("disk.qcow2"));
    let program = env!("CARGO_BIN_EXE_shared_disk");
    succeeds(program, &["format", &leases, &image]);
    let hosts = ["1", "2"].map(|host| {
        let arguments = ["host", &leases, &image, host, "4"];
        Command::new(program).args(arguments).stdout(std::process::Stdio::piped()).spawn().unwrap()
    });
    let mut numbers: Vec<u64> = Vec::new();
    for host in hosts {
        let output = host.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let number = |line: &str| line.split(' ').nth(3).unwrap().parse::<u64>().unwrap();
        numbers.extend(stdout(&output).lines().map(number));
    }
    numbers.sort_unstable();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7, 8]);
}
