use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::super::super::device::Interrupt;
use super::super::super::queue::Queue;
use super::*;

const SIZE: u16 = 8;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFER: u64 = 0x1_0000;

struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn queue(&self, _: usize) {}
    fn config(&self) {}
    fn queue_event(&self, _: usize) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }
}

/// A guest with one queue, its relay, and the back-end's view of that.
struct Setup {
    context: Context,
    relay: Relay,
    chain: Chain,
}

impl Setup {
    fn new(indirect: bool) -> Self {
        let memory = GuestMemory::flat(1 << 20).unwrap();
        let layout = QueueLayout {
            size: SIZE,
            descriptors: DESCRIPTORS,
            driver: AVAILABLE,
            device: USED,
            event_idx: false,
            indirect,
        };
        let queue = Queue::new(memory.clone(), layout, (0, 0)).unwrap();
        let context = Context::detached(memory, vec![Some(queue)], Arc::new(NoInterrupt)).unwrap();
        let rings = allocate(&context.memory, 1, SIZE).unwrap();
        let relay = Relay::new(rings, &context).unwrap();
        Self { context, relay, chain: Chain::default() }
    }

    /// The guest makes chains of two descriptors available, one at each head.
    fn submit(&self, heads: &[u16]) {
        let memory = &self.context.memory;
        for head in heads {
            let segment = |n: u16, len| Segment { address: BUFFER + 0x1000 * u64::from(head + n), len };
            let parts = [(segment(0, 16), 0), (segment(1, 512), WRITE)];
            write_chain(memory, DESCRIPTORS, &[*head, head + 1], &parts).unwrap();
            let index = memory.load_u16(AVAILABLE + 2, Ordering::Relaxed).unwrap();
            let entry = AVAILABLE + 4 + 2 * u64::from(index % SIZE);
            memory.store_u16(entry, *head, Ordering::Relaxed).unwrap();
            memory.store_u16(AVAILABLE + 2, index.wrapping_add(1), Ordering::Relaxed).unwrap();
        }
    }

    fn forward(&mut self) -> Result<(), DeviceError> {
        self.relay.forward(0, &mut self.chain, &mut self.context)
    }

    /// What the back-end finds in its available ring from `from` on: heads, and the addresses of their buffers.
    fn seen(&self, from: u16) -> Vec<(u16, Vec<u64>)> {
        let (memory, ring) = (&self.relay.memory, self.relay.ring(0).unwrap().0);
        let index = memory.load_u16(ring.driver + 2, Ordering::Relaxed).unwrap();
        let head_at = |i: u16| memory.load_u16(ring.driver + 4 + 2 * u64::from(i % SIZE), Ordering::Relaxed);
        let heads = (0..index.wrapping_sub(from)).map(|n| head_at(from.wrapping_add(n)).unwrap());
        heads.map(|head| (head, self.addresses(ring.descriptors, head))).collect()
    }

    fn addresses(&self, table: u64, mut index: u16) -> Vec<u64> {
        let mut found = Vec::new();
        loop {
            let mut bytes = [0; 16];
            self.relay.memory.read(table + 16 * u64::from(index), &mut bytes).unwrap();
            let address = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let flags = u16::from_le_bytes([bytes[12], bytes[13]]);
            if flags & INDIRECT != 0 {
                return self.addresses(address, 0);
            }
            found.push(address);
            if flags & NEXT == 0 {
                return found;
            }
            index = u16::from_le_bytes([bytes[14], bytes[15]]);
        }
    }

    /// The back-end returns a buffer, or something that is none.
    fn complete(&self, head: u32, len: u32) {
        let (memory, ring) = (&self.relay.memory, self.relay.ring(0).unwrap().0);
        let index = memory.load_u16(ring.device + 2, Ordering::Relaxed).unwrap();
        let element = u64::from(head) | u64::from(len) << 32;
        memory.write_obj(ring.device + 4 + 8 * u64::from(index % SIZE), &element.to_le()).unwrap();
        memory.store_u16(ring.device + 2, index.wrapping_add(1), Ordering::Release).unwrap();
    }

    fn give_back(&mut self) -> Result<(), DeviceError> {
        self.relay.give_back(0, &mut self.context)
    }

    /// The guest's used ring: heads and lengths, oldest first.
    fn used(&self, from: u16) -> Vec<(u16, u32)> {
        let memory = &self.context.memory;
        let index = memory.load_u16(USED + 2, Ordering::Relaxed).unwrap();
        let element = |i: u16| {
            let [head, len]: [u32; 2] = memory.read_obj(USED + 4 + 8 * u64::from(i % SIZE)).unwrap();
            (head as u16, len)
        };
        (0..index.wrapping_sub(from)).map(|n| element(from.wrapping_add(n))).collect()
    }
}

#[test]
fn buffers_come_back_in_the_guests_order() {
    for indirect in [false, true] {
        let mut setup = Setup::new(indirect);
        for round in 0..20u16 {
            let from = round.wrapping_mul(3);
            setup.submit(&[4, 0, 6]);
            setup.forward().unwrap();
            let seen = setup.seen(from);
            let buffers = |head: u64| vec![BUFFER + 0x1000 * head, BUFFER + 0x1000 * (head + 1)];
            let addresses: Vec<_> = seen.iter().map(|(_, addresses)| addresses.clone()).collect();
            assert_eq!(addresses, [buffers(4), buffers(0), buffers(6)]);
            setup.complete(seen[2].0.into(), 30);
            setup.give_back().unwrap();
            assert_eq!(setup.used(from), [], "two others are before it");
            setup.complete(seen[0].0.into(), 10);
            setup.give_back().unwrap();
            assert_eq!(setup.used(from), [(4, 10)]);
            setup.complete(seen[1].0.into(), 20);
            setup.give_back().unwrap();
            assert_eq!(setup.used(from), [(4, 10), (0, 20), (6, 30)]);
        }
    }
}

#[test]
fn a_back_end_returns_only_what_it_has() {
    type Break = fn(&Setup, u32);
    let wrongs: [Break; 4] = [
        |setup, head| setup.complete(head + 1, 0),
        |setup, _| setup.complete(u32::from(SIZE), 0),
        |setup, _| setup.complete(u32::MAX, 0),
        |setup, head| {
            setup.complete(head, 0);
            setup.complete(head, 0);
        },
    ];
    for wrong in wrongs {
        let mut setup = Setup::new(true);
        setup.submit(&[0]);
        setup.forward().unwrap();
        let head = setup.seen(0)[0].0;
        wrong(&setup, head.into());
        assert!(matches!(setup.give_back(), Err(DeviceError::Backend(_))));
    }
}

/// Chains of a guest that share descriptors may have more of them than the queue is long.
#[test]
fn more_descriptors_than_there_are_stop_the_device() {
    let mut setup = Setup::new(false);
    setup.submit(&[0, 0, 0, 0]);
    setup.forward().unwrap();
    setup.submit(&[0]);
    assert!(matches!(setup.forward(), Err(DeviceError::Queue(QueueError::TooLong))));
}
