//! Properties of the tree on a virtual clock: ceilings, guarantees, no idling, order, bounds.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::config::{ShaperClass, ShaperConfig};
use super::tree::Tree;
use crate::clock::{MILLISECOND, Nanos, SECOND};

/// Longest frame of these tests.
const FRAME: usize = 1514;
const START: Nanos = 3600 * SECOND;

#[derive(Clone, Copy, Debug)]
struct Frame {
    leaf: usize,
    number: u64,
    bytes: usize,
}

/// A tree under load, and what left it when.
struct Run {
    tree: Tree<Frame>,
    now: Nanos,
    number: u64,
    left: Vec<(Nanos, Frame)>,
    waiting: [usize; 5],
    refused: usize,
}

impl Run {
    fn new(config: &ShaperConfig) -> Self {
        config.check("").unwrap();
        Self { tree: Tree::new(config), now: START, number: 0, left: Vec::new(), waiting: [0; 5], refused: 0 }
    }

    fn offer(&mut self, leaf: usize, bytes: usize) {
        self.number += 1;
        let frame = Frame { leaf, number: self.number, bytes };
        if self.tree.pass(leaf, bytes, self.now) {
            self.left.push((self.now, frame));
        } else if self.tree.enqueue(leaf, frame, bytes) {
            self.waiting[leaf] += 1;
        } else {
            self.refused += 1;
        }
    }

    /// Serves until `end`, waking up exactly when the tree says; `refill` runs before each look.
    fn serve(&mut self, end: Nanos, mut refill: impl FnMut(&mut Self)) {
        loop {
            refill(self);
            while let Some(frame) = self.tree.dequeue(self.now) {
                self.waiting[frame.leaf] -= 1;
                self.left.push((self.now, frame));
                refill(self);
            }
            let Some(next) = self.tree.next().filter(|n| *n < end) else { break };
            assert!(next > self.now, "a frame may leave and does not");
            assert!(self.tree.dequeue(next - 1).is_none(), "a frame may leave before the time told");
            self.now = next;
        }
        self.now = end;
    }

    /// Keeps some frames waiting in each of the leaves.
    fn fill(&mut self, leaves: &[usize], bytes: usize) {
        for &leaf in leaves {
            while self.waiting[leaf] < 4 {
                self.offer(leaf, bytes);
            }
        }
    }

    fn bits(&self, leaf: usize, from: Nanos, to: Nanos) -> u64 {
        let inside = self.left.iter().filter(|(t, f)| f.leaf == leaf && (from..to).contains(t));
        inside.map(|(_, f)| f.bytes as u64 * 8).sum()
    }
}

fn class(min: u64, max: Option<u64>, priority: u8, dscp: u8) -> ShaperClass {
    ShaperClass { min_kbps: min, max_kbps: max, priority, dscp: [dscp].into(), ..ShaperClass::default() }
}

fn config(kbps: u64, classes: Vec<(&str, ShaperClass)>) -> ShaperConfig {
    let classes = classes.into_iter().map(|(n, c)| (n.to_string(), c)).collect();
    ShaperConfig { kbps, burst_kb: None, classes }
}

/// Two leaves in a class of their own, two beside it; rates are per mille of the port's.
fn shaper() -> impl Strategy<Value = ShaperConfig> {
    let leaf = || (0u64..200, proptest::option::of(200u64..900), 0u8..3);
    let inner = (0u64..100, proptest::option::of(500u64..900));
    (10_000u64..100_000, [leaf(), leaf(), leaf(), leaf()], inner, 0u8..3).prop_map(
        |(kbps, leaves, (extra, inner_max), priority)| {
            let rate = |mille: u64| kbps * mille / 1000;
            let classes: Vec<ShaperClass> = leaves
                .iter()
                .zip(1u8..)
                .map(|(&(min, max, priority), dscp)| class(rate(min), max.map(rate), priority, dscp))
                .collect();
            let names = ["a", "b", "c", "d"].map(String::from);
            let mut all: BTreeMap<String, ShaperClass> = names.into_iter().zip(classes).collect();
            let inside: BTreeMap<_, _> =
                ["a", "b"].iter().filter_map(|n| Some((n.to_string(), all.remove(*n)?))).collect();
            let min = inside.values().map(|c| c.min_kbps).sum::<u64>() + rate(extra);
            let inner = ShaperClass {
                min_kbps: min,
                max_kbps: inner_max.map(rate).map(|m| m.max(min)),
                priority,
                classes: inside,
                ..ShaperClass::default()
            };
            all.insert("0".into(), inner);
            ShaperConfig { kbps, burst_kb: None, classes: all }
        },
    )
}

/// Ceilings of a configuration: kilobits a second, and the leaves below.
fn ceilings(c: &ShaperConfig) -> Vec<(u64, Vec<usize>)> {
    let inner = &c.classes["0"];
    let leaf_max = [
        inner.classes["a"].max_kbps,
        inner.classes["b"].max_kbps,
        c.classes["c"].max_kbps,
        c.classes["d"].max_kbps,
    ];
    let mut all = vec![(c.kbps, vec![0, 1, 2, 3, 4])];
    all.extend(inner.max_kbps.map(|m| (m, vec![0, 1])));
    all.extend(leaf_max.iter().enumerate().filter_map(|(i, m)| Some(((*m)?, vec![i]))));
    all
}

/// What is said of a frame: leaf (4: none of the classes), length, time since the one before.
fn arrivals() -> impl Strategy<Value = Vec<(usize, usize, Nanos)>> {
    let gap = prop_oneof![3 => Just(0), 2 => 0..200_000u64, 1 => 0..20 * MILLISECOND];
    proptest::collection::vec((0usize..5, 14..=FRAME, gap), 1..400)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if std::env::var_os("NACRE_LONG").is_some() { 20_000 } else { 300 }))]

    /// Whatever comes in: no ceiling is exceeded, no frame overtakes another of its class, and all leave.
    #[test]
    fn ceilings_and_order_hold(c in shaper(), arrivals in arrivals()) {
        let mut run = Run::new(&c);
        for (leaf, bytes, gap) in &arrivals {
            run.serve(run.now + gap, |_| {});
            run.offer(*leaf, *bytes);
        }
        run.serve(run.now + 3600 * SECOND, |_| {});
        prop_assert!(run.tree.is_empty());
        prop_assert_eq!(run.left.len() + run.refused, arrivals.len());
        for leaf in 0..5 {
            let numbers: Vec<u64> = run.left.iter().filter(|(_, f)| f.leaf == leaf).map(|(_, f)| f.number).collect();
            prop_assert!(numbers.is_sorted());
        }
        for (kbps, leaves) in ceilings(&c) {
            let sent: Vec<_> = run.left.iter().filter(|(_, f)| leaves.contains(&f.leaf)).collect();
            for (i, (from, _)) in sent.iter().enumerate() {
                // What left before the last frame of each stretch: the rate's worth and one burst.
                let mut bits = 0;
                for (to, f) in &sent[i..] {
                    let allowed = u128::from(kbps) * 1000 * u128::from(to - from) / u128::from(SECOND) + u128::from(kbps) * 10;
                    prop_assert!(bits <= allowed, "{bits} bits in {} ns at {kbps} kbit/s of {leaves:?}", to - from);
                    bits += f.bytes as u128 * 8;
                }
            }
        }
    }

    /// Classes that always have something to send get what they are guaranteed, whatever the others send; and while
    /// one without a ceiling does, the port sends at its full rate.
    #[test]
    fn guarantees_hold_and_nothing_idles(c in shaper(), greedy in 1usize..32, sizes in [300..=FRAME, 300..=FRAME]) {
        let mut run = Run::new(&c);
        let greedy: Vec<usize> = (0..5).filter(|l| greedy >> l & 1 != 0).collect();
        let (from, to) = (START + SECOND / 5, START + 6 * SECOND / 5);
        run.serve(to, |r| {
            for l in &greedy {
                r.fill(&[*l], sizes[l % 2]);
            }
        });
        let inner = &c.classes["0"];
        let own = [inner.classes["a"].min_kbps, inner.classes["b"].min_kbps, c.classes["c"].min_kbps, c.classes["d"].min_kbps, 0];
        // Up to a frame of each class, and a burst of the class, may fall across either end.
        let slack = |kbps: u64| kbps * 20 + 8 * (5 * FRAME) as u64;
        for &l in &greedy {
            let got = run.bits(l, from, to);
            prop_assert!(got + slack(own[l]) >= own[l] * 1000, "leaf {l} got {got} of {} in {c:?}", own[l] * 1000);
        }
        if greedy.iter().any(|l| [0, 1].contains(l)) && inner.min_kbps > 0 {
            let both = run.bits(0, from, to) + run.bits(1, from, to);
            let limited = greedy.iter().filter(|l| **l < 2).all(|l| inner.classes[["a", "b"][*l]].max_kbps.is_some());
            prop_assert!(limited || both + slack(inner.min_kbps) >= inner.min_kbps * 1000, "{both} of {}", inner.min_kbps * 1000);
        }
        let free = |l: usize| match l {
            0 => inner.max_kbps.is_none() && inner.classes["a"].max_kbps.is_none(),
            1 => inner.max_kbps.is_none() && inner.classes["b"].max_kbps.is_none(),
            2 => c.classes["c"].max_kbps.is_none(),
            3 => c.classes["d"].max_kbps.is_none(),
            _ => true,
        };
        if greedy.iter().any(|l| free(*l)) {
            let all: u64 = (0..5).map(|l| run.bits(l, from, to)).sum();
            prop_assert!(all + 2 * 8 * FRAME as u64 >= c.kbps * 1000, "{all} of {}", c.kbps * 1000);
        }
    }
}

#[test]
fn what_is_left_goes_by_priority_and_equally_among_equals() {
    let c = config(
        100_000,
        vec![
            ("a", class(10_000, None, 2, 1)),
            ("b", class(0, None, 1, 2)),
            ("c", class(0, None, 1, 3)),
            ("d", class(20_000, Some(30_000), 0, 4)),
        ],
    );
    let mut run = Run::new(&c);
    let (from, to) = (START + SECOND, START + 3 * SECOND);
    run.serve(to, |r| r.fill(&[0, 1, 2, 3, 4], 1000));
    let mbit: Vec<u64> = (0..5).map(|l| (run.bits(l, from, to) + 1_000_000) / 2_000_000).collect();
    // 10 are a's own; d takes 30, its ceiling; b and c share the rest; the fifth, behind all, gets nothing.
    assert_eq!(mbit, [10, 30, 30, 30, 0]);
}

#[test]
fn a_class_that_was_idle_does_not_save_up() {
    let c = config(10_000, vec![("a", class(0, None, 0, 1)), ("b", class(0, None, 0, 2))]);
    let mut run = Run::new(&c);
    let middle = START + 2 * SECOND;
    run.serve(middle, |r| r.fill(&[0], 1000));
    run.serve(middle + 2 * SECOND, |r| r.fill(&[0, 1], 1000));
    let second = |l| run.bits(l, middle, middle + 2 * SECOND) as i64;
    assert!((second(0) - second(1)).abs() < 100_000, "{} and {}", second(0), second(1));
}

#[test]
fn queues_are_bounded_but_take_a_frame_of_any_size() {
    let mut small = class(0, None, 0, 1);
    small.queue_bytes = 4096;
    let c = config(8, vec![("a", small)]);
    let mut run = Run::new(&c);
    // The burst of 80 bits is gone.
    run.offer(0, FRAME);
    run.offer(0, 9000);
    run.offer(0, 60);
    assert_eq!((run.tree.stats()[0].waiting, run.refused), (1, 1));
    let mut run = Run::new(&c);
    for _ in 0..1000 {
        run.offer(0, 14);
    }
    // 4096 bytes hold 64 of the shortest frames; one left at once, with the bucket not empty.
    assert_eq!(run.tree.stats()[0].waiting, 64);
    assert_eq!(run.tree.stats()[0].dropped as usize, run.refused);
    assert_eq!(run.tree.drain().len(), 64);
    assert!(run.tree.is_empty() && run.tree.next().is_none());
}

#[test]
fn frames_find_their_class() {
    let mut tagged = class(0, None, 0, 46);
    tagged.pcp = [5, 6].into();
    let c = config(8, vec![("bulk", class(0, None, 0, 8)), ("voice", tagged)]);
    let t = Tree::<()>::new(&c);
    assert_eq!(t.leaf(Some(8), None), 0);
    assert_eq!(t.leaf(Some(46), Some(0)), 1);
    assert_eq!(t.leaf(Some(8), Some(5)), 0, "the code point comes first");
    assert_eq!(t.leaf(Some(1), Some(6)), 1);
    assert_eq!(t.leaf(None, None), 2);
    assert_eq!(t.stats()[2].name, "");
}
