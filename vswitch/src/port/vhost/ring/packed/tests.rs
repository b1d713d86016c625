//! A device that dies anywhere while it gives buffers back, and its successor.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::port::vhost::memory::RegionInfo;

/// Of each descriptor's buffer, which has a place of its own.
const BUFFER: u32 = 100;
const EVENTS: u64 = 0x1000;
const BUFFERS: u64 = 0x2000;
const HEADER: usize = 12;

/// A driver that offers chains in order and takes them back in order.
struct Driver {
    file: File,
    memory: GuestMemory,
    size: u16,
    /// Whether it receives, or sends.
    receives: bool,
    avail: Position,
    used: Position,
    /// Chains that the device has, and where they are.
    offered: VecDeque<Chain>,
    next_id: u16,
}

impl Driver {
    fn new(size: u16, receives: bool) -> Self {
        let file = tempfile::tempfile().unwrap();
        let bytes = BUFFERS + u64::from(BUFFER) * u64::from(size);
        file.set_len(bytes).unwrap();
        let region = RegionInfo { guest: 0, size: bytes, user: 0, offset: 0 };
        let memory = GuestMemory::default().with_region(region, &file.try_clone().unwrap().into()).unwrap();
        let start = Position { index: 0, wrap: true };
        let offered = VecDeque::new();
        Self { file, memory, size, receives, avail: start, used: start, offered, next_id: 7 }
    }

    /// A device that takes over.
    fn device(&self) -> PackedRing {
        self.adopt().unwrap()
    }

    fn adopt(&self) -> Result<PackedRing, RingError> {
        let part = |at| self.memory.translate(at, 4).unwrap();
        let at = RingAddresses {
            desc: part(0),
            avail: part(EVENTS),
            used: part(EVENTS + 4),
            used_log: None,
            desc_log: None,
        };
        let features =
            RingFeatures { packed: true, mergeable: true, header: HEADER, ..RingFeatures::default() };
        // SAFETY: the parts are within the mapped region, which lives as long as the driver.
        unsafe { PackedRing::new(&self.memory, self.size, at, features, 0x8000_8000) }
    }

    fn room(&self) -> u16 {
        self.size - self.offered.iter().map(|c| c.count).sum::<u16>()
    }

    /// Makes a chain available; `false` if there is no room for it.
    fn offer(&mut self, count: u16) -> bool {
        if count > self.room() {
            return false;
        }
        let chain = Chain { at: self.avail, id: self.next_id, count };
        self.next_id += 1;
        for i in (0..count).rev() {
            let at = self.avail.advanced(i, self.size);
            let flags = if at.wrap { AVAIL } else { USED }
                | if self.receives { WRITE } else { 0 }
                | if i + 1 < count { NEXT } else { 0 };
            let mut d = (BUFFERS + u64::from(BUFFER) * u64::from(at.index)).to_le_bytes().to_vec();
            d.extend(BUFFER.to_le_bytes());
            d.extend([chain.id, flags].map(u16::to_le_bytes).concat());
            self.file.write_all_at(&d, 16 * u64::from(at.index)).unwrap();
        }
        self.avail = self.avail.advanced(count, self.size);
        self.offered.push_back(chain);
        true
    }

    fn rest(&self, at: Position) -> u64 {
        let mut rest = [0; 8];
        self.file.read_exact_at(&mut rest, 16 * u64::from(at.index) + 8).unwrap();
        u64::from_le_bytes(rest)
    }

    /// Takes back what was given back: the bytes written to each chain, and what it could hold.
    fn take(&mut self) -> Vec<(u32, u32)> {
        let mut all = Vec::new();
        while let Some(chain) = self.offered.front().copied() {
            let d = Descriptor::new(0, self.rest(self.used));
            if d.flags & (AVAIL | USED) != PackedRing::used_flags(self.used) {
                break;
            }
            assert_eq!(d.id, chain.id);
            all.push((d.len, BUFFER * u32::from(chain.count)));
            self.used = self.used.advanced(chain.count, self.size);
            self.offered.pop_front();
        }
        all
    }

    /// As a device that gives only the first descriptor of a chain back: the others stay as they were offered.
    fn undo_retirement(&self, chains: &[Chain]) {
        for c in chains {
            for at in (1..c.count).map(|i| c.at.advanced(i, self.size)) {
                let flags = if at.wrap { AVAIL } else { USED };
                let rest = self.rest(at) & !(u64::from(AVAIL | USED) << 48) | u64::from(flags) << 48;
                self.file.write_all_at(&rest.to_le_bytes(), 16 * u64::from(at.index) + 8).unwrap();
            }
        }
    }
}

/// Takes or fills buffers without giving them back: a burst of frames of these lengths.
fn work(d: &mut Driver, ring: &mut PackedRing, frames: &[usize]) {
    let mut burst = Burst::new();
    if d.receives {
        for len in frames {
            assert!(burst.push_frame(&vec![0xab; *len]));
        }
        ring.copy_in(&d.memory, &Batch::all(burst.packets())).unwrap();
    } else {
        ring.pop(&d.memory, &mut burst).unwrap();
        let taken = ring.pending.drain(..).map(|chain| Used { chain, len: 0, more: false });
        ring.written.extend(taken);
    }
}

/// Whether every packet among buffers that a driver took is whole: all but the last buffer of one are full.
fn whole(taken: &[(u32, u32)], lens: &[usize]) -> bool {
    let mut taken = taken.iter();
    for len in lens {
        let mut left = (HEADER + len) as u32;
        let Some(first) = taken.next() else { return true };
        let mut next = Some(first);
        while let Some((len, room)) = next {
            if *len != left.min(*room) {
                return false;
            }
            left -= len;
            if left == 0 {
                break;
            }
            next = taken.next();
        }
        if left > 0 {
            return false;
        }
    }
    taken.next().is_none()
}

#[derive(Clone, Debug)]
struct Death {
    size: u16,
    receives: bool,
    /// Laps, more or less, before.
    before: Vec<(Vec<u16>, Vec<usize>)>,
    /// Whether they were served by a device that marks the first descriptor of a chain only.
    other_device: bool,
    chains: Vec<u16>,
    frames: Vec<usize>,
    /// Steps that it does: two for each buffer, the first of which marks the tail.
    steps: usize,
    /// What the driver offers then.
    reused: Vec<u16>,
}

fn death() -> impl Strategy<Value = Death> {
    let chains = || vec(1u16..5, 0..20);
    let frames = || vec(60usize..900, 0..8);
    (4u16..24, any::<bool>(), vec((chains(), frames()), 0..12), any::<bool>())
        .prop_flat_map(move |start| (Just(start), chains(), frames(), 0usize..40, chains()))
        .prop_map(|((size, receives, before, other_device), chains, frames, steps, reused)| Death {
            size,
            receives,
            before,
            other_device,
            chains,
            frames,
            steps,
            reused,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if std::env::var_os("NACRE_LONG").is_some() { 200_000 } else { 3000 }))]

    #[test]
    fn a_successor_goes_on_where_a_device_died(death in death()) {
        let mut d = Driver::new(death.size, death.receives);
        let mut ring = d.device();
        ring.arm(&d.memory, false);
        for (chains, frames) in &death.before {
            chains.iter().for_each(|n| _ = d.offer(*n));
            work(&mut d, &mut ring, frames);
            let served: Vec<Chain> = ring.written.iter().map(|u| u.chain).collect();
            ring.publish(&d.memory);
            if death.other_device {
                d.undo_retirement(&served);
            }
            d.take();
        }
        death.chains.iter().for_each(|n| _ = d.offer(*n));
        work(&mut d, &mut ring, &death.frames);
        let order: Vec<Used> = ring.in_order_of_return().copied().collect();
        for u in &order[..order.len().min(death.steps / 2)] {
            ring.give_back(&d.memory, u);
        }
        if let Some(u) = order.get(death.steps / 2).filter(|_| death.steps % 2 == 1) {
            ring.retire_tail(&d.memory, u.chain);
        }
        drop(ring);
        let mut taken = d.take();
        prop_assert!(!d.receives || whole(&taken, &death.frames), "the driver sees a part of a packet");
        death.reused.iter().for_each(|n| _ = d.offer(*n));
        let mut ring = d.device();
        let more = d.take();
        if d.receives {
            taken.extend(&more);
            prop_assert!(whole(&taken, &death.frames), "a packet stays in parts");
        } else {
            prop_assert!(more.is_empty());
        }
        prop_assert_eq!(ring.next_used, d.used);
        // All that is offered can still be used.
        if d.receives {
            while !d.offered.is_empty() {
                work(&mut d, &mut ring, &[60]);
                prop_assert!(!ring.written.is_empty());
                ring.publish(&d.memory);
                d.take();
            }
        } else {
            work(&mut d, &mut ring, &[]);
            ring.publish(&d.memory);
            d.take();
        }
        prop_assert!(d.offered.is_empty());
        prop_assert_eq!(ring.next_used, d.avail);
    }

    /// Whatever a guest has written to its ring, and as the note.
    #[test]
    fn any_ring_is_taken_over(
        size in 1u16..24,
        (index, wrap) in (0u16..30, any::<bool>()),
        ring in vec((0u64..0x4000, 0u32..0x100, any::<u16>(), 0u16..8, 0u16..4), 24),
    ) {
        let d = Driver::new(size, true);
        for (i, (addr, len, id, kind, state)) in (0..).zip(&ring).take(size.into()) {
            let flags = kind | (state & 1) << 7 | (state & 2) << 14;
            let bytes = [&addr.to_le_bytes()[..], &len.to_le_bytes(), &id.to_le_bytes(), &flags.to_le_bytes()];
            d.file.write_all_at(&bytes.concat(), 16 * i).unwrap();
        }
        let note = Position { index, wrap }.encode() + 1;
        d.file.write_all_at(&note.to_le_bytes(), EVENTS + 4).unwrap();
        match d.adopt() {
            Ok(ring) => prop_assert!(ring.next_used.index < size),
            Err(e) => {
                prop_assert_eq!(e, RingError::Index);
                prop_assert!(index >= size);
            }
        }
    }
}
