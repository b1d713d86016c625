//! Any bytes as a virtqueue: taking chains from it ends, and every segment of a chain is RAM.
#![no_main]

use fuzz::reached;
use libfuzzer_sys::fuzz_target;
use vmm_core::devices::virtio::{Chain, Queue, QueueLayout};
use vmm_core::memory::GuestMemory;

fuzz_target!(|data: &[u8]| {
    let [flags, size, ring @ ..] = data else { return };
    let memory = GuestMemory::flat(0x1_0000).expect("memory");
    // The available ring comes first and the table next, so that short inputs have both.
    let _ = memory.write(0, &ring[..ring.len().min(0xf000)]);
    let layout = QueueLayout {
        size: 1 << (size % 9),
        descriptors: 0x400,
        driver: 0,
        device: 0x2000,
        event_idx: flags & 1 != 0,
        indirect: flags & 2 != 0,
    };
    let Ok(mut queue) = Queue::new(memory.clone(), layout, (0, 0)) else { return };
    let mut chain = Chain::default();
    for _ in 0..600 {
        match queue.pop(&mut chain) {
            Ok(true) => {
                reached("chain");
                for segment in chain.readable().iter().chain(chain.writable()) {
                    assert!(memory.contains(segment.address, segment.len.into()));
                }
                let mut bytes = [0; 64];
                let _ = chain.reader(&memory).read(&mut bytes);
                let _ = chain.writer(&memory).write(&bytes);
                let _ = queue.push(chain.head(), chain.writable_len());
                let _ = queue.needs_interrupt();
            }
            Ok(false) | Err(_) => break,
        }
    }
    let _ = queue.enable_notification();
});
