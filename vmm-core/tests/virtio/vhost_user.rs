//! The vhost-user front-end against real back-ends: DPDK's net_vhost and QEMU's storage daemon.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use tempfile::TempDir;
use vmm_core::accel::soft::SoftHypervisor;
use vmm_core::accel::{CpuState, Hypervisor, IoBus, VcpuExit, VcpuHandle, VmSpec};
use vmm_core::devices::virtio::net::net_features as f;
use vmm_core::devices::virtio::vhost_user::{VhostUserError, VhostUserNetOptions};
use vmm_core::devices::virtio::{Status, VhostUser, VirtioDevice, features};
use vmm_core::memory::{GuestMemory, WriteObserver};

use crate::driver::{Buffer, DriverQueue, Guest, MEMORY, TRANSPORTS, Transport};

/// A back-end process; dropping it ends it.
struct Backend(Child);

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Backend {
    fn start(command: &mut Command, package: &str, socket: &Path) -> Self {
        let name = command.get_program().to_owned();
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child =
            command.spawn().unwrap_or_else(|e| panic!("{name:?}: {e}; install the Debian package {package}"));
        // The socket appears when the back-end listens.
        for _ in 0..3000 {
            if socket.exists() {
                return Self(child);
            }
            assert!(child.try_wait().unwrap().is_none(), "{name:?} ended");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("{name:?} does not listen");
    }

    /// A switch port that sends every frame back.
    fn testpmd(dir: &Path, socket: &Path, queues: u16) -> Self {
        let _ = std::fs::remove_file(socket);
        let device = format!("net_vhost0,iface={},queues={queues}", socket.display());
        let arguments =
            ["-l", "0,1", "--no-pci", "--no-huge", "--no-shconf", "-m", "256", "--no-telemetry", "--vdev"];
        let queue_count = [format!("--rxq={queues}"), format!("--txq={queues}")];
        let mut command = Command::new("dpdk-testpmd");
        command.args(arguments).arg(device).arg("--").args(["--forward-mode=io", "--auto-start"]);
        command.args(["--total-num-mbufs=4096", "--no-lsc-interrupt", "--stats-period=60"]).args(queue_count);
        Self::start(command.env("XDG_RUNTIME_DIR", dir), "dpdk", socket)
    }

    fn storage(socket: &Path, image: &Path) -> Self {
        let _ = std::fs::remove_file(socket);
        let mut command = Command::new("qemu-storage-daemon");
        command.arg("--blockdev").arg(format!("driver=file,node-name=disk,filename={}", image.display()));
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on",
            socket.display()
        ));
        Self::start(&mut command, "qemu-utils", socket)
    }
}

fn sockets() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vhost.sock");
    (dir, socket)
}

fn frame(tag: u8) -> Vec<u8> {
    let mut frame = vec![tag; 200];
    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

const HELLO: u8 = 0xff;

/// Sends frames until one comes back: a port that just came up loses some.
fn warm_up(guest: &mut Guest, tx: &mut DriverQueue, rx: &mut DriverQueue) {
    let outgoing = [guest.readable(&[0; 12]), guest.readable(&frame(HELLO))];
    let incoming = guest.writable(2048);
    rx.submit(&[incoming]);
    guest.notify(rx.index);
    for _ in 0..1000 {
        tx.submit(&outgoing);
        guest.notify(tx.index);
        for _ in 0..20 {
            std::thread::sleep(std::time::Duration::from_millis(1));
            while tx.poll_quietly().is_some() {}
            if rx.poll_quietly().is_some() {
                return;
            }
        }
    }
    panic!("no frame comes back");
}

/// Sends a frame on `tx` and waits for it on `rx`.
fn echo(guest: &mut Guest, tx: &mut DriverQueue, rx: &mut DriverQueue, tag: u8) {
    let incoming = guest.writable(2048);
    let outgoing = [guest.readable(&[0; 12]), guest.readable(&frame(tag))];
    rx.submit(&[incoming]);
    guest.notify(rx.index);
    tx.submit(&outgoing);
    guest.notify(tx.index);
    loop {
        let (_, len) = guest.wait_used(rx);
        let received = guest.bytes(incoming)[12..len as usize].to_vec();
        if received == frame(tag) {
            break;
        }
        assert_eq!(received, frame(HELLO), "left over from the warming up");
        rx.submit(&[incoming]);
        guest.notify(rx.index);
    }
    while tx.poll_quietly().is_none() {
        std::thread::yield_now();
    }
}

/// testpmd polls on two processors: one at a time, or a small host has none left for the rest.
static TESTPMD: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

/// The transports, the last of them also with a relay between the rings.
fn transports() -> impl Iterator<Item = (Transport, GuestMemory)> {
    let plain = TRANSPORTS.map(|transport| (transport, GuestMemory::flat(MEMORY).unwrap()));
    let relayed = [Transport::PciMsix, Transport::PciIntx].map(|transport| (transport, observed().0));
    plain.into_iter().chain(relayed)
}

/// Memory whose writes somebody has to hear of, and those that were reported.
fn observed() -> (GuestMemory, Reported) {
    struct Log(Reported);
    impl WriteObserver for Log {
        fn written(&self, address: u64, len: u64) {
            self.0.lock().push((address, len));
        }
    }
    let memory = GuestMemory::flat(MEMORY).unwrap();
    let reported = Reported::default();
    memory.set_write_observer(Some(Box::new(Log(reported.clone()))));
    (memory, reported)
}

type Reported = Arc<parking_lot::Mutex<Vec<(u64, u64)>>>;

#[test]
fn dpdk_sends_frames_back() {
    let _alone = TESTPMD.lock();
    let (dir, socket) = sockets();
    let mut backend = Backend::testpmd(dir.path(), &socket, 1);
    for (transport, memory) in transports() {
        let device = VhostUser::net(&socket, &VhostUserNetOptions::default()).unwrap();
        let mut guest = Guest::with_memory(transport, device, memory);
        for wanted in [0, f::MRG_RXBUF | f::STATUS | features::INDIRECT_DESC] {
            let mut queues = guest.bring_up(wanted, 64);
            let [rx, tx] = &mut queues[..] else { panic!("{} queues", queues.len()) };
            warm_up(&mut guest, tx, rx);
            for tag in 0..70 {
                echo(&mut guest, tx, rx, tag);
            }
            // A pause takes the queues back and a start hands them over again.
            guest.lifecycle().pause().unwrap();
            guest.start();
            warm_up(&mut guest, tx, rx);
            echo(&mut guest, tx, rx, 99);
        }
        // The back-end restarts: the link goes down and up, and frames flow again.
        let mut queues = guest.bring_up(f::STATUS, 64);
        let [rx, tx] = &mut queues[..] else { unreachable!() };
        warm_up(&mut guest, tx, rx);
        echo(&mut guest, tx, rx, 1);
        let link = |guest: &Guest| guest.config_u32(4) >> 16 & 1;
        drop(backend);
        while link(&guest) == 1 {
            guest.wait_interrupt(None);
        }
        backend = Backend::testpmd(dir.path(), &socket, 1);
        while link(&guest) == 0 {
            guest.wait_interrupt(None);
        }
        warm_up(&mut guest, tx, rx);
        echo(&mut guest, tx, rx, 2);
    }
}

#[test]
fn dpdk_serves_several_pairs() {
    let _alone = TESTPMD.lock();
    let (dir, socket) = sockets();
    let _backend = Backend::testpmd(dir.path(), &socket, 2);
    let options = VhostUserNetOptions { pairs: 2, mtu: Some(1500), ..Default::default() };
    let mut guest = Guest::new(Transport::PciMsix, VhostUser::net(&socket, &options).unwrap());
    let mut queues = guest.bring_up(f::MQ | f::CTRL_VQ | f::MTU | f::STATUS, 64);
    assert_eq!(queues.len(), 5);
    assert_eq!(guest.config_u32(8), 1500 << 16 | 2);
    for (command, status) in [([4, 0, 2, 0], 0), ([4, 0, 3, 0], 1), ([4, 0, 0, 0], 1), ([9, 9, 0, 0], 1)] {
        let buffers = [guest.readable(&command), guest.writable(1)];
        guest.exchange(&mut queues[4], &buffers);
        assert_eq!(guest.bytes(buffers[1]), [status], "{command:?}");
    }
    let [rx0, tx0, rx1, tx1, _] = &mut queues[..] else { unreachable!() };
    warm_up(&mut guest, tx0, rx0);
    echo(&mut guest, tx0, rx0, 5);
    warm_up(&mut guest, tx1, rx1);
    echo(&mut guest, tx1, rx1, 6);
}

fn block(guest: &mut Guest, queue: &mut DriverQueue, kind: u32, sector: u64, data: Buffer) -> u8 {
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    let buffers = [guest.readable(&header), data, guest.writable(1)];
    guest.exchange(queue, &buffers);
    guest.bytes(buffers[2])[0]
}

#[test]
fn qemu_serves_a_disk() {
    let (dir, socket) = sockets();
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, vec![0x11; 1 << 20]).unwrap();
    let mut backend = Backend::storage(&socket, &image);
    for (transport, memory) in transports() {
        let device = VhostUser::blk(&socket, 4, 128).unwrap();
        assert_eq!(device.device_type(), 2);
        let mut guest = Guest::with_memory(transport, device, memory);
        assert_eq!(guest.config_u64(0), 2048);
        let mut queues = guest.bring_up(u64::MAX, 64);
        let queue = &mut queues[0];
        for sector in 0..80 {
            let data = guest.readable(&[sector as u8; 512]);
            assert_eq!(block(&mut guest, queue, 1, sector, data), 0);
            let back = guest.writable(512);
            assert_eq!(block(&mut guest, queue, 0, sector, back), 0);
            assert_eq!(guest.bytes(back), [sector as u8; 512]);
        }
        let beyond = guest.writable(512);
        assert_eq!(block(&mut guest, queue, 0, 2048, beyond), 1);
        // The back-end restarts with requests waiting.
        drop(backend);
        let header = guest.readable(&[0; 16]);
        let buffers = [header, guest.writable(512), guest.writable(1)];
        queue.submit(&buffers);
        guest.notify(0);
        backend = Backend::storage(&socket, &image);
        guest.wait_used(queue);
        assert_eq!(guest.bytes(buffers[1]), [0; 512]);
    }
}

/// What the back-end wrote to each part of a chain is reported, and before the buffer is in the used ring.
#[test]
fn writes_of_a_back_end_are_reported_before_the_driver_sees_them() {
    let (dir, socket) = sockets();
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, vec![0x11; 1 << 20]).unwrap();
    let _backend = Backend::storage(&socket, &image);
    for wanted in [0, features::INDIRECT_DESC, features::INDIRECT_DESC | features::EVENT_IDX] {
        let (memory, reported) = observed();
        let device = VhostUser::blk(&socket, 1, 64).unwrap();
        let mut guest = Guest::with_memory(Transport::PciMsix, device, memory);
        let mut queues = guest.bring_up(wanted, 16);
        let queue = &mut queues[0];
        for round in 0..20 {
            let header = guest.readable(&[0; 16]);
            let buffers = [header, guest.writable(512), guest.writable(1024), guest.writable(1)];
            if wanted & features::INDIRECT_DESC != 0 && round % 2 == 0 {
                let table = guest.allocate(4096);
                queue.submit_indirect(table, &buffers);
            } else {
                queue.submit(&buffers);
            }
            // What the guest wrote itself is in it, too.
            reported.lock().clear();
            guest.notify(0);
            guest.wait_used(queue);
            assert_eq!(guest.bytes(buffers[2]), [0x11; 1024]);
            let log = reported.lock().clone();
            let index = |address: u64| log.iter().position(|w| w.0 == address);
            let seen = index(queue.used + 2).expect("the used index is written by the device");
            for buffer in &buffers[1..] {
                let at = index(buffer.address).unwrap_or_else(|| panic!("{buffer:x?} is missing: {log:x?}"));
                assert!(at < seen && log[at].1 == u64::from(buffer.len), "{log:x?}");
            }
            assert_eq!(index(header.address), None, "only writable parts are reported");
        }
    }
}

/// A guest on the software CPU runs code from a disk of another process, and other code at the same place after it was
/// read again.
#[test]
fn code_from_a_back_end_is_decoded_anew() {
    /// Ends the run when the guest writes to a port.
    struct Stop {
        value: AtomicU8,
        vcpu: OnceLock<Arc<dyn VcpuHandle>>,
    }
    impl IoBus for Stop {
        fn mmio_read(&self, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: u64, _: &[u8]) {}
        fn port_read(&self, _: u16, _: &mut [u8]) {}
        fn port_write(&self, _: u16, data: &[u8]) {
            self.value.store(data[0], Ordering::SeqCst);
            self.vcpu.get().unwrap().kick();
        }
    }
    let (dir, socket) = sockets();
    let image = dir.path().join("disk.raw");
    // again: mov al, value; out 0x80, al; jmp again
    let sector = |value: u8| {
        let mut sector = vec![0xb0, value, 0xe6, 0x80, 0xeb, 0xfa];
        sector.resize(512, 0);
        sector
    };
    std::fs::write(&image, (0..32).flat_map(sector).collect::<Vec<_>>()).unwrap();
    let _backend = Backend::storage(&socket, &image);

    let memory = GuestMemory::flat(MEMORY).unwrap();
    let bus = Arc::new(Stop { value: AtomicU8::new(0xff), vcpu: OnceLock::new() });
    let spec = VmSpec { memory: memory.clone(), vcpus: 1, model: None, tsc_khz: None, bus: bus.clone() };
    let vm = SoftHypervisor::new().create_vm(spec).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    assert!(bus.vcpu.set(vcpu.handle()).is_ok());
    let mut guest = Guest::with_memory(Transport::Mmio, VhostUser::blk(&socket, 1, 64).unwrap(), memory);
    let mut queues = guest.bring_up(0, 16);
    let code = guest.writable(512);
    for value in 0..32 {
        assert_eq!(block(&mut guest, &mut queues[0], 0, value, code), 0);
        if value == 0 {
            let mut state = CpuState::reset();
            state.segments[1].base = code.address;
            state.rip = 0;
            vcpu.set_state(&state).unwrap();
        }
        assert!(matches!(vcpu.run(), Ok(VcpuExit::Interrupted)));
        assert_eq!(u64::from(bus.value.load(Ordering::SeqCst)), value);
    }
}

#[test]
fn a_missing_or_foreign_back_end_is_an_error() {
    let (_dir, socket) = sockets();
    let options = VhostUserNetOptions::default();
    assert!(matches!(VhostUser::net(&socket, &options), Err(VhostUserError::Connect { .. })));
    for answer in
        [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], &[1, 0, 0, 0, 5, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], b""]
    {
        let _ = std::fs::remove_file(&socket);
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let peer = std::thread::spawn(move || {
            use std::io::{Read, Write};
            let (mut stream, _): (UnixStream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; 12]).unwrap();
            stream.write_all(answer).unwrap();
        });
        let result = VhostUser::net(&socket, &options);
        assert!(matches!(result, Err(VhostUserError::Protocol(_) | VhostUserError::Io(_))));
        peer.join().unwrap();
    }
}

/// A back-end that dies and stays away stops nothing: the device can be reset and dropped.
#[test]
fn a_dead_back_end_blocks_nobody() {
    let (dir, socket) = sockets();
    let backend = Backend::testpmd(dir.path(), &socket, 1);
    let device = VhostUser::net(&socket, &VhostUserNetOptions::default()).unwrap();
    let weak = Arc::downgrade(&device);
    let mut guest = Guest::new(Transport::PciMsix, device);
    drop(guest.bring_up(0, 64));
    drop(backend);
    guest.lifecycle().pause().unwrap();
    guest.start();
    guest.set_status(0);
    drop(guest.bring_up(0, 64));
    assert_eq!(guest.status() & Status::NEEDS_RESET, 0);
    drop(guest);
    assert!(weak.upgrade().is_none());
}
