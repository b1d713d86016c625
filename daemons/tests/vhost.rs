//! `nacre-blk` as a vhost-user-blk back-end: for a driver in this process and for QEMU.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod vhost_driver;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use blockfmt::{CreateOptions, Format, OpenOptions};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{
    Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_driver::{AVAILABLE, DATA, Driver, Guest, MEMORY, NEXT, PAGE, QUEUE_SIZE, SLOTS, STRIDE, WRITE};
use vm_memory::{Bytes, GuestAddress};

const SECTOR: usize = 512;

struct Daemon {
    dir: tempfile::TempDir,
    child: Child,
    crashed: bool,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        CreateOptions::new(Format::Qcow2, 8 << 20).create(&dir.path().join("disk.qcow2")).unwrap();
        let child = Self::spawn(dir.path());
        Daemon { dir, child, crashed: false }
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
        self.crashed = true;
        std::fs::remove_file(self.at("vhost")).unwrap();
        std::fs::remove_file(self.at("api")).unwrap();
        self.child = Self::spawn(self.dir.path());
    }

    /// Gives a command over the API.
    fn command(&self, command: serde_json::Value) {
        let mut stream = loop {
            match UnixStream::connect(self.at("api")) {
                Ok(stream) => break stream,
                Err(_) => std::thread::yield_now(),
            }
        };
        stream.write_all(format!("{command}\n").as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        assert_eq!(line, "{}\n");
    }

    fn resize(&self, size: u64) {
        self.command(json!({ "command": "resize", "name": "disk", "size": size }));
    }

    /// Lets a write in now and then only, which takes longer than any test.
    fn hold_writes(&self) {
        let limits = json!({ "write-operations": 1, "write-bytes": 1 });
        self.command(json!({ "command": "throttle", "group": "g", "disks": ["disk"], "limits": limits }));
    }

    fn end(&mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
        let image = self.at("disk.qcow2");
        let check = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(image).output().unwrap();
        // A crash may leave clusters that nothing refers to (3), never errors.
        let sound = check.status.success() || (self.crashed && check.status.code() == Some(3));
        assert!(sound, "{}", String::from_utf8_lossy(&check.stdout));
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

/// A descriptor of somebody else.
struct BorrowedDescriptor(RawFd);

impl AsRawFd for BorrowedDescriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// What a back-end sends to its front-end.
#[derive(Default)]
struct Changes(AtomicUsize);

impl VhostUserFrontendReqHandler for Changes {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(0)
    }
}

#[test]
fn a_driver_is_told_of_a_new_size() {
    let mut daemon = Daemon::start();
    let mut guest = Guest::new();
    let changes = Arc::new(Changes::default());
    for (round, size) in [(1, 16u64 << 20), (2, 4 << 20), (3, 24 << 20)] {
        let mut handler = FrontendReqHandler::new(changes.clone()).unwrap();
        let channel = BorrowedDescriptor(handler.get_tx_raw_fd());
        let mut driver = Driver::connect_with_channel(&daemon.at("vhost"), &guest, &channel);
        driver.capacity(); // an answer: what was sent before is known there
        daemon.resize(size);
        handler.handle_request().unwrap();
        assert_eq!(changes.0.load(Ordering::Relaxed), round);
        assert_eq!(driver.capacity(), size / SECTOR as u64);
        let last = size / SECTOR as u64 - 1;
        assert_eq!(driver.write(&mut guest, 0, last, &[9; SECTOR]), 0);
        assert_eq!(driver.write(&mut guest, 0, last + 1, &[9; SECTOR]), 1, "beyond the end");
    }
    // Nobody has to listen.
    let mut driver = Driver::connect(&daemon.at("vhost"), &guest, false);
    daemon.resize(20 << 20);
    assert_eq!(driver.capacity(), (20 << 20) / SECTOR as u64);
    drop(driver);
    daemon.end();
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

/// The slots whose requests were completed since `from`, in that order.
fn completions(guest: &Guest, queue: usize, from: u16) -> Vec<u16> {
    (from..guest.used(queue)).map(|n| guest.done(queue, n)).collect()
}

#[test]
fn what_was_in_flight_is_done_once_after_a_crash() {
    let mut daemon = Daemon::start();
    let mut guest = Guest::new();
    let driver = Driver::connect_with_record(&daemon.at("vhost"), &mut guest);
    for sector in [0, 8, 16] {
        assert_eq!(driver.write(&mut guest, 0, sector, &[0xee; SECTOR]), 0);
    }
    assert_eq!(driver.run(&mut guest, 0, (4, 0), (0, 0), 0), 0);
    daemon.hold_writes();
    let before = guest.used(0);
    for slot in 0..3 {
        let data = DATA + u64::from(slot) * PAGE;
        guest.memory.write_slice(&[slot as u8 + 1; SECTOR], GuestAddress(data)).unwrap();
        guest.submit_in(0, slot, (1, u64::from(slot) * 8), (data, SECTOR as u32), 0);
    }
    driver.kicks[0].write(1).unwrap();
    // The first may pass; one waits, and the back-end is killed while it does.
    while !(0..3).any(|slot| guest.in_flight(0, slot)) || guest.used(0) == before {
        std::thread::yield_now();
    }
    daemon.crash();
    drop(driver);
    assert!((0..3).any(|slot| guest.in_flight(0, slot)), "the record outlives the back-end");
    let driver = Driver::connect_with_record(&daemon.at("vhost"), &mut guest);
    driver.finish(&guest, 0);
    assert_eq!(completions(&guest, 0, before), [0, 1, 2]);
    assert!((0..3).all(|slot| guest.status(0, slot) == 0 && !guest.in_flight(0, slot)));
    for slot in 0..3 {
        assert!(driver.read(&mut guest, 1, slot * 8, SECTOR) == [slot as u8 + 1; SECTOR]);
    }
    drop(driver);
    daemon.end();
}

#[test]
fn the_record_says_what_is_done_again_and_in_which_order() {
    let mut daemon = Daemon::start();
    let mut guest = Guest::new();
    assert_eq!(Driver::connect_with_record(&daemon.at("vhost"), &mut guest).stop(), [0, 0]);
    // A back-end took four writes of the same sector and completed the second one; a fifth was not taken.
    for slot in 0..5 {
        let data = DATA + u64::from(slot) * PAGE;
        guest.memory.write_slice(&[slot as u8 + 1; SECTOR], GuestAddress(data)).unwrap();
        guest.submit_in(0, slot, (1, 8), (data, SECTOR as u32), 0);
    }
    guest.complete(0, 1);
    guest.put_in_flight(0, &[2, 0, 3], 1);
    let driver = Driver::connect_with_record(&daemon.at("vhost"), &mut guest);
    driver.finish(&guest, 0);
    assert_eq!(completions(&guest, 0, 0), [1, 2, 0, 3, 4]);
    assert!(driver.read(&mut guest, 1, 8, SECTOR) == [5; SECTOR]);
    assert_eq!(driver.stop(), [5, 1]);
    // Its completion was seen by the driver, and the record had no time to say so.
    let before = guest.used(0);
    guest.submit_again(0, 2);
    guest.complete(0, 2);
    guest.put_in_flight(0, &[2], before);
    let (given, file) = guest.record.as_ref().unwrap();
    assert_eq!((given.num_queues, given.queue_size), (2, QUEUE_SIZE));
    file.write_all_at(&6u16.to_le_bytes(), 12).unwrap();
    let driver = Driver::connect_with_record(&daemon.at("vhost"), &mut guest);
    driver.finish(&guest, 0);
    assert!(driver.read(&mut guest, 1, 8, SECTOR) == [5; SECTOR], "it was not done again");
    assert!(!guest.in_flight(0, 2));
    assert_eq!(driver.write(&mut guest, 0, 9, &[6; SECTOR]), 0);
    assert_eq!(completions(&guest, 0, before), [2, 0]);
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
    // A record that is too short, one in a file that is, and memory beyond the end of its file.
    let short = std::fs::File::from(memfd_create("short", MFdFlags::MFD_CLOEXEC).unwrap());
    let connect = || {
        let mut front = Frontend::connect(daemon.at("vhost"), 2).unwrap();
        front.set_owner().unwrap();
        front.set_features(front.get_features().unwrap()).unwrap();
        front.get_protocol_features().unwrap();
        front.set_protocol_features(Protocol::INFLIGHT_SHMFD | Protocol::REPLY_ACK).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front
    };
    for (claimed, len) in [(100, 1 << 20), (1 << 20, 100)] {
        short.set_len(len).unwrap();
        let given = VhostUserInflight::new(claimed, 0, 2, QUEUE_SIZE);
        connect().set_inflight_fd(&given, short.as_raw_fd()).unwrap_err();
    }
    let region = VhostUserMemoryRegionInfo {
        memory_size: 1 << 20,
        mmap_handle: short.as_raw_fd(),
        ..Default::default()
    };
    connect().set_mem_table(&[region]).unwrap_err();
    // One in which everything is in flight.
    let driver = Driver::connect_with_record(&daemon.at("vhost"), &mut fresh);
    drop(driver);
    fresh.put_in_flight(0, &(0..QUEUE_SIZE / 3).collect::<Vec<_>>(), fresh.used(0));
    drop(Driver::connect_with_record(&daemon.at("vhost"), &mut fresh));
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
    // The disk address packet: one sector, to 0000:8000, from sector 1.
    finish_boot_sector(code.concat(), [16, 0, 1, 0, 0x00, 0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
}

/// A boot sector that writes itself to the sectors 1 to 9, with the number of each at `NUMBER`, prints a dot on port 0xe9
/// after each, and ends QEMU.
fn writing_boot_sector() -> Vec<u8> {
    let code = [
        &[0x31, 0xc0, 0x8e, 0xd8][..],               // xor ax, ax; mov ds, ax
        &[0xbe, 0x40, 0x7c, 0xb8, 0x00, 0x43],       // again: mov si, 0x7c40; mov ax, 0x4300 (extended write)
        &[0xcd, 0x13, 0x72, 0x0f],                   // int 0x13; jc end
        &[0xb0, 0x2e, 0xe6, 0xe9],                   // mov al, '.'; out 0xe9, al
        &[0xfe, 0x06, 0x48, 0x7c],                   // inc byte [0x7c48]
        &[0x80, 0x3e, 0x48, 0x7c, 0x0a, 0x72, 0xe7], // cmp byte [0x7c48], 10; jb again
        &[0xe6, 0xf4, 0xf4, 0xeb, 0xfd],             // end: out 0xf4, al; hlt; jmp
    ];
    // The disk address packet: one sector, from 0000:7c00, to sector 1.
    let packet = [16, 0, 1, 0, 0x00, 0x7c, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    finish_boot_sector(code.concat(), packet)
}

/// Where [`writing_boot_sector`] has the number of the sector.
const NUMBER: usize = 0x48;

fn finish_boot_sector(code: Vec<u8>, packet: [u8; 16]) -> Vec<u8> {
    let mut sector = code;
    sector.resize(0x40, 0);
    sector.extend(packet);
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector
}

/// A QEMU whose firmware boots from the export; what it prints goes to `output`.
fn qemu(daemon: &Daemon) -> Command {
    let chardev = format!("socket,id=c,path={},reconnect=1", daemon.at("vhost").display());
    let output = format!("file:{}", daemon.at("output").display());
    let mut qemu = Command::new("timeout");
    qemu.args(["120", "qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-display", "none", "-no-reboot"])
        .args(["-nodefaults", "-object", "memory-backend-memfd,id=m,size=64M,share=on"])
        .args(["-machine", "q35,memory-backend=m", "-chardev", &chardev])
        .args(["-device", "vhost-user-blk-pci,id=d,chardev=c,num-queues=2,bootindex=0"])
        .args(["-debugcon", &output, "-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .stderr(Stdio::piped());
    qemu
}

/// Waits until a QEMU has printed something.
fn wait_for_output(daemon: &Daemon, qemu: &mut Child) {
    while std::fs::metadata(daemon.at("output")).map_or(0, |m| m.len()) == 0 {
        assert!(qemu.try_wait().unwrap().is_none(), "install the packages qemu-system-x86 and seabios");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn qemu_goes_on_after_a_crash_in_the_midst_of_a_write() {
    let mut daemon = Daemon::start();
    let mut guest = Guest::new();
    let driver = Driver::connect(&daemon.at("vhost"), &guest, false);
    assert_eq!(driver.write(&mut guest, 0, 0, &writing_boot_sector()), 0);
    assert_eq!(driver.write(&mut guest, 0, 1, &[0xff; 16 * SECTOR]), 0);
    assert_eq!(driver.run(&mut guest, 0, (4, 0), (0, 0), 0), 0);
    drop(driver);
    daemon.hold_writes();
    let mut child = qemu(&daemon).spawn().unwrap();
    // The first write is done and the second one waits, or is about to.
    wait_for_output(&daemon, &mut child);
    std::thread::sleep(Duration::from_millis(200));
    daemon.crash();
    let error = child.wait_with_output().unwrap().stderr;
    let seen = std::fs::read(daemon.at("output")).unwrap();
    assert_eq!(seen, b".........", "{}", String::from_utf8_lossy(&error));
    let driver = Driver::connect(&daemon.at("vhost"), &Guest::new(), false);
    drop(driver);
    daemon.end();
    let disk = OpenOptions::new(Format::Qcow2).read_only(true).open(daemon.at("disk.qcow2")).unwrap();
    for number in 1..10 {
        let (mut seen, mut wanted) = (vec![0; SECTOR], writing_boot_sector());
        wanted[NUMBER] = number;
        disk.read_at(&mut seen, u64::from(number) * SECTOR as u64).unwrap();
        // The firmware changes the packet that tells how much was written.
        assert!(seen[..0x40] == wanted[..0x40] && seen[NUMBER..] == wanted[NUMBER..], "sector {number}");
    }
}

#[test]
fn qemu_tells_its_guest_of_a_new_size() {
    let mut daemon = Daemon::start();
    let mut guest = Guest::new();
    let driver = Driver::connect(&daemon.at("vhost"), &guest, false);
    // Prints a dot and waits for ever.
    let code = vec![0xb0, 0x2e, 0xe6, 0xe9, 0xf4, 0xeb, 0xfd];
    assert_eq!(driver.write(&mut guest, 0, 0, &finish_boot_sector(code, [0; 16])), 0);
    drop(driver);
    let monitor = format!("unix:{},server=on,wait=off", daemon.at("monitor").display());
    let mut child = qemu(&daemon).args(["-qmp", &monitor]).spawn().unwrap();
    wait_for_output(&daemon, &mut child);
    let mut stream = UnixStream::connect(daemon.at("monitor")).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    lines.next().unwrap().unwrap(); // the greeting
    let mut ask = |command: serde_json::Value| -> serde_json::Value {
        stream.write_all(format!("{command}\n").as_bytes()).unwrap();
        serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap()
    };
    ask(json!({ "execute": "qmp_capabilities" }));
    let path = json!({ "path": "/machine/peripheral/d/virtio-backend" });
    // Bit 1 of the interrupt status: the configuration space changed (virtio 1.2, section 4.1.4.5).
    let mut changed = || {
        let reply = ask(json!({ "execute": "x-query-virtio-status", "arguments": path }));
        reply["return"]["isr"].as_u64().unwrap_or_else(|| panic!("{reply}")) & 2 != 0
    };
    assert!(!changed());
    daemon.resize(16 << 20);
    while !changed() {
        std::thread::sleep(Duration::from_millis(10)); // QEMU ends after a while
    }
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    child.wait().unwrap();
    daemon.end();
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
    let qemu = qemu(&daemon).output().unwrap();
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
