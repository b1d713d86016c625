//! Our queue code against the `virtio-queue` crate over arbitrary rings.

use proptest::prelude::*;
use virtio_queue::{Queue as Oracle, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_core::devices::virtio::{Chain, Queue, QueueLayout, Segment};
use vmm_core::memory::GuestMemory;

const SIZE: u16 = 8;
const RAM: u64 = 0x1_0000;
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const INDIRECT: u64 = 0x3000;
const NEXT_FLAG: u16 = 1;
const WRITE_FLAG: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

#[derive(Clone, Debug)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn bytes(&self) -> Vec<u8> {
        [
            &self.address.to_le_bytes()[..],
            &self.len.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.next.to_le_bytes(),
        ]
        .concat()
    }
}

fn direct() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![8 => 0x4000..0xf000u64, 1 => RAM - 64..RAM + 64, 1 => any::<u64>()];
    let len = prop_oneof![8 => 1..200u32, 1 => Just(0u32), 1 => any::<u32>()];
    let flags = prop_oneof![4 => Just(NEXT_FLAG), 2 => Just(0), 2 => Just(NEXT_FLAG | WRITE_FLAG), 2 => Just(WRITE_FLAG)];
    (address, len, flags, 0..SIZE + 1).prop_map(|(address, len, flags, next)| Descriptor {
        address,
        len,
        flags,
        next,
    })
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let table = (0..3u64, 0..5u32, 0..8u16, 0..4u16, prop_oneof![9 => Just(0), 1 => 1..16u32]).prop_map(
        |(table, entries, next, extra, ragged)| Descriptor {
            address: INDIRECT + table * 64,
            len: entries * 16 + ragged,
            flags: INDIRECT_FLAG | extra,
            next,
        },
    );
    prop_oneof![3 => direct(), 1 => table]
}

struct Rings {
    ours: GuestMemory,
    theirs: GuestMemoryMmap,
}

impl Rings {
    fn new() -> Self {
        let theirs = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        Self { ours: GuestMemory::flat(RAM).unwrap(), theirs }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.ours.write(address, bytes).unwrap();
        self.theirs.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn queues(&self, event_idx: bool) -> (Queue, Oracle) {
        let layout = QueueLayout {
            size: SIZE,
            descriptors: TABLE,
            driver: AVAILABLE,
            device: USED,
            event_idx,
            indirect: true,
        };
        let ours = Queue::new(self.ours.clone(), layout, (0, 0)).unwrap();
        let mut theirs = Oracle::new(SIZE).unwrap();
        theirs.set_size(SIZE);
        theirs.set_desc_table_address(Some(TABLE as u32), None);
        theirs.set_avail_ring_address(Some(AVAILABLE as u32), None);
        theirs.set_used_ring_address(Some(USED as u32), None);
        theirs.set_event_idx(event_idx);
        theirs.set_ready(true);
        assert!(theirs.is_valid(&self.theirs));
        (ours, theirs)
    }
}

/// What the oracle read, when it is a chain that a device may accept.
fn acceptable(
    chain: &[virtio_queue::desc::RawDescriptor],
    tables: &[Descriptor],
) -> Option<(Vec<Segment>, Vec<Segment>)> {
    let ragged = |d: &Descriptor| {
        d.flags & INDIRECT_FLAG != 0 && (!d.len.is_multiple_of(16) || d.flags & NEXT_FLAG != 0)
    };
    let last = virtio_queue::desc::split::Descriptor::from(*chain.last()?);
    if last.has_next() || tables.iter().any(ragged) {
        return None;
    }
    let (mut readable, mut writable, mut total) = (Vec::new(), Vec::new(), 0u64);
    for raw in chain {
        let d = virtio_queue::desc::split::Descriptor::from(*raw);
        if d.len() == 0 {
            continue;
        }
        let (address, len) = (d.addr().0, d.len());
        total += u64::from(len);
        if address.checked_add(u64::from(len)).is_none_or(|end| end > RAM) || total > u64::from(u32::MAX) {
            return None;
        }
        let segment = Segment { address, len };
        if d.is_write_only() {
            writable.push(segment);
        } else if writable.is_empty() {
            readable.push(segment);
        } else {
            return None;
        }
    }
    Some((readable, writable))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// What we accept is what the oracle reads; what we refuse is not acceptable.
    #[test]
    fn chains_agree(
        table in prop::collection::vec(descriptor(), usize::from(SIZE)),
        indirect in prop::collection::vec(direct(), 16),
        heads in prop::collection::vec(0..SIZE + 1, 1..=usize::from(SIZE)),
    ) {
        let rings = Rings::new();
        rings.write(TABLE, &table.iter().flat_map(Descriptor::bytes).collect::<Vec<_>>());
        rings.write(INDIRECT, &indirect.iter().flat_map(Descriptor::bytes).collect::<Vec<_>>());
        let ring: Vec<u8> = heads.iter().flat_map(|h| h.to_le_bytes()).collect();
        rings.write(AVAILABLE + 4, &ring);
        rings.write(AVAILABLE + 2, &(heads.len() as u16).to_le_bytes());
        let (mut ours, mut theirs) = rings.queues(false);
        let mut chain = Chain::default();
        for head in &heads {
            let oracle: Option<Vec<_>> = theirs
                .pop_descriptor_chain(&rings.theirs)
                .map(|c| c.map(virtio_queue::desc::RawDescriptor::from).collect());
            match ours.pop(&mut chain) {
                Ok(popped) => {
                    prop_assert!(popped);
                    prop_assert_eq!(chain.head(), *head);
                    let Some(read) = oracle else { return Err(TestCaseError::fail("the oracle refuses")) };
                    let reached: Vec<_> = reached(&table, *head);
                    let expected = acceptable(&read, &reached);
                    prop_assert_eq!(
                        Some((chain.readable().to_vec(), chain.writable().to_vec())), expected
                    );
                }
                Err(_) => {
                    if let Some(read) = oracle {
                        prop_assert_eq!(acceptable(&read, &reached(&table, *head)), None);
                    }
                    break;
                }
            }
        }
    }

    /// Both ask for the same interrupts.
    #[test]
    fn interrupts_agree(
        steps in prop::collection::vec((1..4u16, any::<u16>(), any::<bool>()), 1..60),
        near in any::<bool>(),
    ) {
        for event_idx in [false, true] {
            let rings = Rings::new();
            let (mut ours, mut theirs) = rings.queues(event_idx);
            let mut used = 0u16;
            for (count, event, flag) in &steps {
                let event = if near { used.wrapping_add(event % 8).wrapping_sub(2) } else { *event };
                rings.write(AVAILABLE, &u16::from(*flag).to_le_bytes());
                rings.write(AVAILABLE + 4 + 2 * u64::from(SIZE), &event.to_le_bytes());
                for _ in 0..*count {
                    ours.push(3, 77).unwrap();
                    theirs.add_used(&rings.theirs, 3, 77).unwrap();
                    used = used.wrapping_add(1);
                }
                prop_assert_eq!(ours.used_index().unwrap(), used);
                // The oracle leaves the flag to its caller.
                let expected = if event_idx {
                    theirs.needs_notification(&rings.theirs).unwrap()
                } else {
                    !flag
                };
                // Its first call has nothing to compare with and always asks.
                if event_idx && used == *count {
                    ours.needs_interrupt().unwrap();
                } else {
                    prop_assert_eq!(ours.needs_interrupt().unwrap(), expected);
                }
            }
            let mut a = vec![0; 6 + 8 * usize::from(SIZE)];
            let mut b = a.clone();
            rings.ours.read(USED, &mut a).unwrap();
            rings.theirs.read_slice(&mut b, GuestAddress(USED)).unwrap();
            prop_assert_eq!(a, b, "the used rings are equal");
        }
    }
}

/// The direct descriptors that a chain from `head` passes.
fn reached(table: &[Descriptor], head: u16) -> Vec<Descriptor> {
    let mut all = Vec::new();
    let mut index = usize::from(head);
    while let Some(d) = table.get(index).filter(|_| all.len() < table.len()) {
        all.push(d.clone());
        if d.flags & INDIRECT_FLAG != 0 || d.flags & NEXT_FLAG == 0 {
            break;
        }
        index = usize::from(d.next);
    }
    all
}
