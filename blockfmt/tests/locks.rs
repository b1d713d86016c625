//! Neither QEMU nor we open what the other holds.

mod common;

use blockfmt::{CreateOptions, Error, Format, LockMode, OpenOptions};
use common::{qemu, qemu_ok, text};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

#[test]
fn qemu_refuses_what_we_hold() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    CreateOptions::new(Format::Raw, 1 << 20).create(&path).unwrap();
    let image = text(&path);
    let disk = OpenOptions::new(Format::Raw).open(&path).unwrap();
    let output = qemu("qemu-io", &["-f", "raw", "-c", "write 0 4k", image]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("lock"), "{output:?}");
    drop(disk);
    qemu_ok("qemu-io", &["-f", "raw", "-c", "write 0 4k", image]);

    let reader = OpenOptions::new(Format::Raw).read_only(true).open(&path).unwrap();
    qemu_ok("qemu-io", &["-r", "-f", "raw", "-c", "read 0 4k", image]);
    let output = qemu("qemu-io", &["-f", "raw", "-c", "write 0 4k", image]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("lock"), "{output:?}");
    drop(reader);
}

#[test]
fn we_refuse_what_qemu_holds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    CreateOptions::new(Format::Raw, 1 << 20).create(&path).unwrap();
    let mut child = Command::new("qemu-io")
        .args(["-f", "raw", text(&path)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("cannot run qemu-io; install the Debian package qemu-utils");
    // qemu-io answers a command only after it opened the image.
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    writeln!(stdin, "length").unwrap();
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    for read_only in [false, true] {
        let result = OpenOptions::new(Format::Raw).read_only(read_only).open(&path);
        assert!(matches!(result, Err(Error::Locked { .. })), "{result:?}");
    }
    OpenOptions::new(Format::Raw).read_only(true).lock(LockMode::None).open(&path).unwrap();
    drop(stdin);
    assert!(child.wait().unwrap().success());
    OpenOptions::new(Format::Raw).open(&path).unwrap();
}
