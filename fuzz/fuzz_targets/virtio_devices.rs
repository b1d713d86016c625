//! Any guest against every virtio device: its handlers, called in this thread, neither panic nor hang, and write to no
//! guest memory but the used rings and the buffers that the guest made writable.
#![no_main]

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use arbitrary::{Arbitrary, Unstructured};
use fuzz::reached;
use fuzz::virtio::{Handlers, QUEUE_SIZE, parts};
use libfuzzer_sys::fuzz_target;
use vmm_core::devices::virtio::blk::{BlkOptions, MemoryDisk};
use vmm_core::devices::virtio::iov::GuestVectors;
use vmm_core::devices::virtio::net::{
    HEADER_LEN, Header, NetBackend, NetOptions, NetPort, Sent, net_features,
};
use vmm_core::devices::virtio::{
    Balloon, BalloonOptions, Blk, Console, ConsolePort, Net, Rng, VirtioDevice, Vsock,
};
use vmm_core::memory::GuestMemory;

/// Rings below, buffers above; each queue has a page for each of its three parts.
const MEMORY: u64 = 1 << 18;
const BUFFERS: u64 = 1 << 17;

#[derive(Arbitrary, Debug)]
struct Piece {
    address: u16,
    len: u16,
    device_writes: bool,
    data: Vec<u8>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A chain for a queue.
    Chain {
        queue: u8,
        indirect: bool,
        pieces: Vec<Piece>,
    },
    /// Any bytes anywhere, rings included.
    Poke {
        address: u32,
        data: Vec<u8>,
    },
    Kick {
        queue: u8,
    },
    Events,
    Timer,
    ReadConfig {
        offset: u16,
        len: u8,
    },
    WriteConfig {
        offset: u16,
        data: Vec<u8>,
    },
}

#[derive(Arbitrary, Debug)]
struct Case {
    device: u8,
    features: u64,
    steps: Vec<Step>,
}

/// A network that sends everything back.
#[derive(Clone, Default)]
struct Echo(Arc<Mutex<VecDeque<Vec<u8>>>>);

impl NetBackend for Echo {
    fn offloads(&self) -> u64 {
        net_features::CSUM | net_features::HOST_TSO4 | net_features::HOST_TSO6
    }

    fn open(&self, _index: u16) -> io::Result<Box<dyn NetPort>> {
        Ok(Box::new(self.clone()))
    }
}

impl NetPort for Echo {
    fn descriptor(&self) -> Option<RawFd> {
        None
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(bytes) = self.0.lock().expect("lock").pop_front() else { return Ok(None) };
        let len = HEADER_LEN + bytes.len();
        frame[..HEADER_LEN].fill(0);
        frame[HEADER_LEN..len].copy_from_slice(&bytes);
        Ok(Some(len))
    }

    fn send(&mut self, _header: &Header, frame: &mut GuestVectors<'_>) -> io::Result<Sent> {
        let mut queue = self.0.lock().expect("lock");
        if queue.len() < 64 {
            queue.push_back(frame.gather().to_vec());
        }
        Ok(Sent::Yes)
    }

    fn reconnect(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn device(kind: u8) -> Arc<dyn VirtioDevice> {
    let null = || Some(std::fs::File::options().write(true).open("/dev/null").expect("/dev/null").into());
    match kind % 6 {
        0 => Blk::new(Arc::new(MemoryDisk::new(1 << 16)), &BlkOptions::default()),
        1 => Net::new(Arc::new(Echo::default()), &NetOptions::default()).expect("net"),
        2 => {
            let ports = vec![ConsolePort::new("a", None, null()), ConsolePort::new("b", None, null())];
            Console::new(ports).expect("console")
        }
        3 => Rng::new().expect("rng"),
        4 => {
            let socket = std::env::temp_dir().join(format!("nacre-fuzz-vsock-{}", std::process::id()));
            let _ = std::fs::remove_file(&socket);
            Vsock::new(3, &socket).expect("vsock")
        }
        _ => Balloon::new(BalloonOptions::default()).expect("balloon"),
    }
}

/// Writes a chain into a queue's rings and makes it available; marks what the device may write.
fn offer(memory: &GuestMemory, queue: usize, indirect: bool, pieces: &[Piece], writable: &mut [bool]) {
    let [table, available, _] = parts(queue);
    let mut index = [0; 2];
    memory.read(available + 2, &mut index).expect("ring");
    let slot = u64::from(u16::from_le_bytes(index) % QUEUE_SIZE);
    let limit = if indirect { 64 } else { 3 };
    let pieces = &pieces[..pieces.len().min(limit)];
    // Chains of different slots share descriptors now and then, as a wrong driver's do.
    let first = (slot * 3) % u64::from(QUEUE_SIZE - 3);
    let (base, number) = if indirect { (BUFFERS + (slot << 11), 0) } else { (table, first) };
    for (i, piece) in pieces.iter().enumerate() {
        let address = BUFFERS + 0x8000 + u64::from(piece.address);
        let data = &piece.data[..piece.data.len().min(piece.len.into())];
        memory.write(address, data).expect("buffer");
        if piece.device_writes {
            let end = (address + u64::from(piece.len)).min(MEMORY);
            writable[address as usize..end as usize].fill(true);
        }
        let next = i + 1 < pieces.len();
        let flags = u16::from(next) | u16::from(piece.device_writes) << 1;
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&address.to_le_bytes());
        descriptor[8..12].copy_from_slice(&u32::from(piece.len).to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        descriptor[14..].copy_from_slice(&(number as u16 + i as u16 + 1).to_le_bytes());
        memory.write(base + (number + i as u64) * 16, &descriptor).expect("descriptor");
    }
    if indirect {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&base.to_le_bytes());
        descriptor[8..12].copy_from_slice(&(pieces.len() as u32 * 16).to_le_bytes());
        descriptor[12] = 4;
        memory.write(table + first * 16, &descriptor).expect("descriptor");
    }
    memory.write(available + 4 + slot * 2, &(first as u16).to_le_bytes()).expect("ring");
    memory.write(available + 2, &(u16::from_le_bytes(index).wrapping_add(1)).to_le_bytes()).expect("ring");
}

fuzz_target!(|data: &[u8]| {
    let Ok(case) = Case::arbitrary(&mut Unstructured::new(data)) else { return };
    let device = device(case.device);
    let memory = GuestMemory::flat(MEMORY).expect("memory");
    let Some(mut handlers) = Handlers::start(&*device, &memory, case.features) else { return };
    let count = device.queue_sizes().len();
    let mut before = vec![0; MEMORY as usize];
    let mut after = vec![0; MEMORY as usize];
    let mut writable = vec![false; MEMORY as usize];
    for queue in 0..count {
        // The used ring, and the event index behind the available ring's end.
        writable[parts(queue)[2] as usize..][..0x1000].fill(true);
    }
    for step in case.steps.iter().take(64) {
        match step {
            Step::Chain { queue, indirect, pieces } => {
                let queue = usize::from(*queue) % count;
                offer(&memory, queue, *indirect, pieces, &mut writable);
                continue;
            }
            Step::Poke { address, data } => {
                // Wrong rings may point anywhere, so from now on anything may be written.
                let _ = memory.write(u64::from(*address) % MEMORY, data);
                writable.fill(true);
                continue;
            }
            _ => {}
        }
        memory.read(0, &mut before).expect("memory");
        match step {
            Step::Kick { queue } => {
                let queue = usize::from(*queue) % count;
                handlers.kick(queue);
                let mut used = [0; 2];
                memory.read(parts(queue)[2] + 2, &mut used).expect("ring");
                if used != [0; 2] {
                    reached("buffer-used");
                }
            }
            Step::Events => handlers.events(),
            Step::Timer => handlers.timers(),
            Step::ReadConfig { offset, len } => {
                let mut bytes = vec![0; (*len).into()];
                device.read_config(u64::from(*offset), &mut bytes);
            }
            Step::WriteConfig { offset, data } => device.write_config(u64::from(*offset), data),
            Step::Chain { .. } | Step::Poke { .. } => {}
        }
        memory.read(0, &mut after).expect("memory");
        for (address, (old, new)) in before.iter().zip(&after).enumerate() {
            // A page that the driver gives to the balloon loses its contents.
            let given = *new == 0 && device.device_type() == 5;
            assert!(old == new || writable[address] || given, "{} wrote {address:#x}", device.name());
        }
    }
    handlers.stop();
    device.reset();
});
