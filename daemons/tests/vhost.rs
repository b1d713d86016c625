//! `nacre-blk` as a vhost-user-blk back-end: for a driver in this process and for QEMU.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod vhost_driver;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use blockfmt::{CreateOptions, Format, OpenOptions};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vhost_driver::{AVAILABLE, DATA, Driver, Guest, MEMORY, NEXT, PAGE, SLOTS, STRIDE, WRITE};
use vm_memory::{Bytes, GuestAddress};

const SECTOR: usize = 512;

struct Daemon {
    dir: tempfile::TempDir,
    child: Child,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        CreateOptions::new(Format::Qcow2, 8 << 20).create(&dir.path().join("disk.qcow2")).unwrap();
        let child = Self::spawn(dir.path());
        Daemon { dir, child }
    }

    fn spawn(dir: &Path) -> Child {
        let mut child = Command::new(env!("CARGO_BIN_EXE_nacre-blk"))
            .args(["--export", "name=disk,path=disk.qcow2,format=qcow2,vhost=vhost,queues=2", "--api", "api"])
            .current_dir(dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "listening vhost-user vhost\n");
        child
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Ends the daemon without a warning and starts another one on the same disk.
    fn crash(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::fs::remove_file(self.at("vhost")).unwrap();
        std::fs::remove_file(self.at("api")).unwrap();
        self.child = Self::spawn(self.dir.path());
    }

    fn resize(&self, size: u64) {
        let mut stream = loop {
            match UnixStream::connect(self.at("api")) {
                Ok(stream) => break stream,
                Err(_) => std::thread::yield_now(),
            }
        };
        let command = serde_json::json!({ "command": "resize", "name": "disk", "size": size });
        stream.write_all(format!("{command}\n").as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        assert_eq!(line, "{}\n");
    }

    fn end(&mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
        let image = self.at("disk.qcow2");
        let check = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(image).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_driver_uses_every_request_on_two_queues() {
    let mut daemon = Daemon::start();
    let mut guest = Guest::new();
    for slots in [false, true] {
        guest.available = [guest.used(0), guest.used(1)];
        let mut driver = Driver::connect(&daemon.at("vhost"), &guest, slots);
        assert_eq!(driver.capacity(), (8 << 20) / SECTOR as u64);
        let data: Vec<u8> = (0..8 * SECTOR).map(|i| (i * 7 + usize::from(slots)) as u8).collect();
        assert_eq!(driver.write(&mut guest, 0, 100, &data), 0);
        assert_eq!(driver.run(&mut guest, 0, (4, 0), (0, 0), 0), 0, "flush");
        assert!(driver.read(&mut guest, 1, 100, 8 * SECTOR) == data);
        assert!(driver.read(&mut guest, 1, 99, SECTOR) == [0; SECTOR]);
        assert_eq!(driver.run(&mut guest, 0, (8, 0), (DATA, 20), WRITE), 0, "identifier");
        let mut name = [0; 5];
        guest.memory.read_slice(&mut name, GuestAddress(DATA)).unwrap();
        assert_eq!(&name, b"disk\0");
        assert_eq!(driver.erase(&mut guest, 13, 101, 2, 1), 0);
        let left = driver.read(&mut guest, 1, 100, 4 * SECTOR);
        assert!(left[..SECTOR] == data[..SECTOR] && left[SECTOR..3 * SECTOR].iter().all(|b| *b == 0));
        assert!(left[3 * SECTOR..] == data[3 * SECTOR..4 * SECTOR]);
        assert_eq!(driver.erase(&mut guest, 11, 0, 16384, 0), 0);
        assert_eq!(driver.erase(&mut guest, 11, 0, 8, 1), 2, "a discard has no flags");
        assert_eq!(driver.erase(&mut guest, 13, 0, 1 << 22, 0), 1, "longer than announced");
        assert!(driver.read(&mut guest, 1, 100, 4 * SECTOR).iter().all(|b| *b == 0));
        assert_eq!(driver.write(&mut guest, 0, (8 << 20) / 512, &[1; SECTOR]), 1, "beyond the end");
        assert_eq!(driver.write(&mut guest, 0, u64::MAX, &[1; SECTOR]), 1);
        assert_eq!(driver.write(&mut guest, 0, 0, &[1; 100]), 1, "not whole sectors");
        assert_eq!(driver.run(&mut guest, 0, (99, 0), (0, 0), 0), 2, "unknown");
    }
    daemon.end();
}

#[test]
fn a_new_size_is_in_the_configuration_space() {
    let mut daemon = Daemon::start();
    let mut guest = Guest::new();
    let mut driver = Driver::connect(&daemon.at("vhost"), &guest, false);
    assert_eq!(driver.capacity(), (8 << 20) / SECTOR as u64);
    daemon.resize(16 << 20);
    assert_eq!(driver.capacity(), (16 << 20) / SECTOR as u64);
    assert_eq!(driver.write(&mut guest, 0, 20000, &[9; SECTOR]), 0);
    drop(driver);
    daemon.end();
    let disk = OpenOptions::new(Format::Qcow2).read_only(true).open(daemon.at("disk.qcow2")).unwrap();
    let mut byte = [0];
    disk.read_at(&mut byte, 20000 * SECTOR as u64).unwrap();
    assert_eq!(byte, [9]);
}

#[test]
fn a_session_ends_and_a_daemon_crashes_without_losing_requests() {
    let mut daemon = Daemon::start();
    let mut guest = Guest::new();
    let driver = Driver::connect(&daemon.at("vhost"), &guest, false);
    assert_eq!(driver.write(&mut guest, 0, 8, &[1; SECTOR]), 0);
    assert_eq!(driver.run(&mut guest, 0, (4, 0), (0, 0), 0), 0);
    drop(driver);
    // Made available while nobody serves the queue.
    guest.memory.write_slice(&[2; SECTOR], GuestAddress(DATA)).unwrap();
    guest.submit(0, 1, 9, DATA, SECTOR as u32, 0);
    let driver = Driver::connect(&daemon.at("vhost"), &guest, false);
    assert_eq!(driver.finish(&guest, 0), 0);
    assert_eq!(driver.run(&mut guest, 0, (4, 0), (0, 0), 0), 0);
    daemon.crash();
    drop(driver);
    guest.memory.write_slice(&[3; SECTOR], GuestAddress(DATA)).unwrap();
    guest.submit(0, 1, 10, DATA, SECTOR as u32, 0);
    let driver = Driver::connect(&daemon.at("vhost"), &guest, true);
    assert_eq!(driver.finish(&guest, 0), 0);
    let seen = driver.read(&mut guest, 1, 8, 3 * SECTOR);
    assert_eq!((seen[0], seen[SECTOR], seen[2 * SECTOR]), (1, 2, 3));
    drop(driver);
    daemon.end();
}

#[test]
fn requests_in_flight_survive_crashes() {
    let mut daemon = Daemon::start();
    let mut guest = Guest::new();
    let place = |round: u16, slot: u16| u64::from(round * SLOTS + slot) * (PAGE / SECTOR as u64);
    let content = |round: u16, slot: u16| ((round * SLOTS + slot) % 251 + 1) as u8;
    // Space for all of them: new metadata survives a crash only after a flush.
    let driver = Driver::connect(&daemon.at("vhost"), &guest, false);
    for part in 0..16 {
        assert_eq!(driver.write(&mut guest, 0, part * 128, &[0xff; 65536]), 0);
    }
    assert_eq!(driver.run(&mut guest, 0, (4, 0), (0, 0), 0), 0);
    drop(driver);
    for round in 0..8 {
        let driver = Driver::connect(&daemon.at("vhost"), &guest, round % 2 == 0);
        let before = guest.used(0);
        for slot in 0..SLOTS {
            let data = DATA + u64::from(slot) * PAGE;
            guest.memory.write_slice(&[content(round, slot); PAGE as usize], GuestAddress(data)).unwrap();
            guest.submit_in(0, slot, (1, place(round, slot)), (data, PAGE as u32), 0);
        }
        driver.kicks[0].write(1).unwrap();
        while round % 2 == 0 && guest.used(0) == before {
            std::thread::yield_now(); // else the crash may come before the first one is done
        }
        daemon.crash();
        drop(driver);
        let driver = Driver::connect(&daemon.at("vhost"), &guest, false);
        driver.finish(&guest, 0);
        assert!((0..SLOTS).all(|slot| guest.status(0, slot) == 0), "round {round}");
    }
    let driver = Driver::connect(&daemon.at("vhost"), &guest, false);
    for (round, slot) in (0..8).flat_map(|round| (0..SLOTS).map(move |slot| (round, slot))) {
        let seen = driver.read(&mut guest, 1, place(round, slot), PAGE as usize);
        assert!(seen.iter().all(|byte| *byte == content(round, slot)), "round {round}, request {slot}");
    }
    drop(driver);
    daemon.end();
}

#[test]
fn a_hostile_driver_harms_only_itself() {
    let mut daemon = Daemon::start();
    let mut guest = Guest::new();
    let driver = Driver::connect(&daemon.at("vhost"), &guest, false);
    // A buffer outside of memory: the request is used up without an answer.
    assert_eq!(driver.run(&mut guest, 0, (0, 0), (MEMORY as u64 - 100, 512), WRITE), 0xff);
    assert_eq!(driver.run(&mut guest, 0, (0, 0), (u64::MAX - 100, 512), WRITE), 0xff);
    // A chain that loops, and an index far ahead.
    guest.submit(0, 0, 0, DATA, 512, WRITE);
    guest.put(2 * 16 + 12, NEXT | WRITE);
    guest.put(2 * 16 + 14, 0u16);
    driver.kicks[0].write(1).unwrap();
    guest.put(STRIDE + AVAILABLE + 2, 0x7fffu16);
    driver.kicks[1].write(1).unwrap();
    drop(driver);
    let mut fresh = Guest::new();
    let driver = Driver::connect(&daemon.at("vhost"), &fresh, false);
    assert_eq!(driver.write(&mut fresh, 0, 8, &[1; SECTOR]), 0);
    drop(driver);
    // Bytes that are no message.
    UnixStream::connect(daemon.at("vhost")).unwrap().write_all(&[0xff; 100]).unwrap();
    let driver = Driver::connect(&daemon.at("vhost"), &fresh, false);
    assert!(driver.read(&mut fresh, 1, 8, SECTOR) == [1; SECTOR]);
    drop(driver);
    daemon.end();
}

/// A boot sector that prints eight bytes of sector 1 on port 0xe9, copies this sector to sector 2 and ends QEMU.
fn boot_sector() -> Vec<u8> {
    let code = [
        &[0x31, 0xc0, 0x8e, 0xd8][..],               // xor ax, ax; mov ds, ax
        &[0xbe, 0x40, 0x7c, 0xb4, 0x42],             // mov si, 0x7c40; mov ah, 0x42 (extended read)
        &[0xcd, 0x13, 0x72, 0x18],                   // int 0x13; jc end
        &[0xbe, 0x00, 0x80, 0xb9, 0x08, 0x00],       // mov si, 0x8000; mov cx, 8
        &[0xac, 0xe6, 0xe9, 0xe2, 0xfb],             // lodsb; out 0xe9, al; loop
        &[0xc6, 0x06, 0x48, 0x7c, 0x02],             // mov byte [0x7c48], 2
        &[0xbe, 0x40, 0x7c, 0xb8, 0x00, 0x43],       // mov si, 0x7c40; mov ax, 0x4300 (extended write)
        &[0xcd, 0x13, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd], // int 0x13; end: out 0xf4, al; hlt; jmp
    ];
    let mut sector = code.concat();
    sector.resize(0x40, 0);
    // The disk address packet: one sector, to 0000:8000, from sector 1.
    sector.extend([16, 0, 1, 0, 0x00, 0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector
}

#[test]
fn firmware_in_qemu_boots_from_the_export() {
    let mut daemon = Daemon::start();
    let mut guest = Guest::new();
    let driver = Driver::connect(&daemon.at("vhost"), &guest, false);
    assert_eq!(driver.write(&mut guest, 0, 0, &boot_sector()), 0);
    let mut text = b"from it!".to_vec();
    text.resize(SECTOR, 0x5a);
    assert_eq!(driver.write(&mut guest, 0, 1, &text), 0);
    drop(driver);
    let chardev = format!("socket,id=c,path={}", daemon.at("vhost").display());
    let output = format!("file:{}", daemon.at("output").display());
    let qemu = Command::new("timeout")
        .args(["120", "qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-display", "none", "-no-reboot"])
        .args(["-nodefaults", "-object", "memory-backend-memfd,id=m,size=64M,share=on"])
        .args(["-machine", "q35,memory-backend=m", "-chardev", &chardev])
        .args(["-device", "vhost-user-blk-pci,chardev=c,num-queues=2,bootindex=0"])
        .args(["-debugcon", &output, "-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&qemu.stderr);
    assert!(!error.contains("No such file"), "install the packages qemu-system-x86 and seabios: {error}");
    let seen = std::fs::read(daemon.at("output")).unwrap_or_default();
    assert_eq!(String::from_utf8_lossy(&seen), "from it!", "{error}");
    let driver = Driver::connect(&daemon.at("vhost"), &Guest::new(), false);
    drop(driver);
    daemon.end();
    let disk = OpenOptions::new(Format::Qcow2).read_only(true).open(daemon.at("disk.qcow2")).unwrap();
    let mut copy = vec![0; SECTOR];
    disk.read_at(&mut copy, 2 * SECTOR as u64).unwrap();
    assert!(copy == text, "what the firmware wrote is on the disk");
}
