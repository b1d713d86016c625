//! The memory balloon.

use vmm_core::devices::virtio::{Balloon, BalloonOptions, VirtioDevice};

use crate::conformance::{self, Subject};
use crate::driver::{Buffer, Guest, TRANSPORTS, Transport};

const ALL: u64 = u64::MAX;
const PAGE: u64 = 4096;

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|p| p.to_le_bytes()).collect()
}

fn first_word(guest: &Guest, page: u64) -> u32 {
    guest.memory.read_obj::<u32>(page * PAGE).unwrap()
}

#[test]
fn conforms() {
    conformance::run(&Subject {
        make: || Balloon::new(BalloonOptions::default()).unwrap(),
        device_type: 5,
        queue: 0,
        needs: 0,
        request: |guest| (vec![guest.readable(&numbers(&[9000, 9001]))], 0),
    });
}

#[test]
fn inflated_pages_return_to_the_host() {
    for transport in TRANSPORTS {
        let balloon = Balloon::new(BalloonOptions::default()).unwrap();
        let mut guest = Guest::new(transport, balloon.clone());
        let mut queues = guest.bring_up(ALL, 32);
        assert_eq!(queues.len(), 5);
        balloon.set_target(5 * PAGE);
        guest.wait_interrupt(None);
        assert_eq!(guest.config_u32(0), 5);
        for page in 8000..8010u64 {
            guest.memory.fill(page * PAGE, 4096, 7).unwrap();
        }
        // Up, down, apart, repeated, and outside of RAM.
        let pages = guest.readable(&numbers(&[8000, 8001, 8003, 8002, 8006, 8006, u32::MAX]));
        guest.exchange(&mut queues[0], &[pages]);
        let gone = (8000..8010).map(|p| first_word(&guest, p) == 0).collect::<Vec<_>>();
        assert_eq!(gone, [true, true, true, true, false, false, true, false, false, false]);
        guest.write(guest.config_address() + 4, &5u32.to_le_bytes());
        assert_eq!(balloon.actual(), 5 * PAGE);
        assert!(balloon.discarded() >= 5 * PAGE);
        let pages = guest.readable(&numbers(&[8000]));
        guest.exchange(&mut queues[1], &[pages]);
    }
}

#[test]
fn statistics_are_fetched_on_request() {
    let balloon = Balloon::new(BalloonOptions::default()).unwrap();
    let mut guest = Guest::new(Transport::PciMsix, balloon.clone());
    let mut queues = guest.bring_up(ALL, 32);
    assert_eq!(balloon.statistics(), None);
    let sent = |free: u64| -> Vec<u8> {
        let one = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        [one(4, free), one(5, 1 << 30), one(999, 1)].concat()
    };
    for round in 1..4 {
        // A buffer that waits is not lost over a pause.
        guest.lifecycle().pause().unwrap();
        guest.start();
        let buffer = guest.readable(&sent(round << 20));
        queues[2].submit(&[buffer]);
        guest.notify(2);
        balloon.request_statistics();
        guest.wait_used(&mut queues[2]);
        let got = balloon.statistics().unwrap();
        assert_eq!((got.free, got.total, got.swap_in), (Some(round << 20), Some(1 << 30), None));
    }
}

#[test]
fn reported_and_hinted_pages_return_to_the_host() {
    let balloon = Balloon::new(BalloonOptions::default()).unwrap();
    let mut guest = Guest::new(Transport::PciMsix, balloon.clone());
    let mut queues = guest.bring_up(ALL, 32);
    let free = |page: u64| Buffer { address: page * PAGE, len: 8192, writable: true };
    let fill = |guest: &Guest| guest.memory.fill(8000 * PAGE, 8192, 7).unwrap();
    fill(&guest);
    guest.exchange(&mut queues[4], &[free(8000)]);
    assert_eq!(first_word(&guest, 8001), 0, "reported");
    // Hints that nobody asked for change nothing.
    fill(&guest);
    guest.exchange(&mut queues[3], &[free(8000)]);
    assert_ne!(first_word(&guest, 8001), 0);
    balloon.request_free_pages();
    guest.wait_interrupt(None);
    let id = guest.config_u32(8);
    for (command, used) in [(id + 1, false), (id, true)] {
        let command = guest.readable(&command.to_le_bytes());
        guest.exchange(&mut queues[3], &[command]);
        guest.exchange(&mut queues[3], &[free(8000)]);
        assert_eq!(first_word(&guest, 8001) == 0, used);
    }
    let stop = guest.readable(&0u32.to_le_bytes());
    guest.exchange(&mut queues[3], &[stop]);
    guest.wait_interrupt(None);
    assert_eq!(guest.config_u32(8), 1, "done");
}

/// Optional queues that are not negotiated take no index.
#[test]
fn queues_are_numbered_by_what_is_negotiated() {
    const REPORTING: u64 = 1 << 5;
    let balloon = Balloon::new(BalloonOptions { deflate_on_oom: false, reporting: true }).unwrap();
    assert_eq!(balloon.features() & 1 << 2, 0);
    let mut guest = Guest::new(Transport::PciMsix, balloon);
    let mut queues = guest.bring_up(REPORTING, 32);
    guest.memory.fill(8000 * PAGE, 4096, 7).unwrap();
    guest.exchange(&mut queues[2], &[Buffer { address: 8000 * PAGE, len: 4096, writable: true }]);
    assert_eq!(first_word(&guest, 8000), 0);
}
