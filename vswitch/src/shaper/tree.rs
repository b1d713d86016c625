//! The queues of a shaper and the order in which they are served.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

use super::bucket::{Bucket, Picos, duration, nanos, picos};
use super::config::{ShaperClass, ShaperConfig};
use crate::clock::Nanos;

/// What a frame counts at least in a queue, so that short ones do not take more memory than the limit allows.
const FRAME_MIN: usize = 64;
/// Share of a second that may leave at once, unless configured.
const BURSTS_A_SECOND: u64 = 100;

/// A class, or the port (node 0).
#[derive(Debug)]
struct Node {
    parent: Option<usize>,
    depth: usize,
    /// What is guaranteed; none for the port, which lends whatever it has.
    own: Option<Bucket>,
    ceiling: Option<Bucket>,
    priority: u8,
}

/// A class that takes frames.
#[derive(Debug)]
struct Leaf<T> {
    name: String,
    node: usize,
    queue: VecDeque<(T, usize)>,
    bytes: usize,
    limit: usize,
    /// Bytes sent beyond the guarantee: whoever has had least is next.
    borrowed: u64,
    sent: (u64, u64),
    dropped: u64,
}

/// Counters of a class that takes frames.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ClassStats {
    /// Name, behind those of the classes that it is in: `bulk/backup`. Empty: frames that no class takes.
    pub name: String,
    /// Frames sent.
    pub packets: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Frames dropped because the queue was full.
    pub dropped: u64,
    /// Frames that wait.
    pub waiting: u64,
}

/// Frames `T` of several classes on their way out of one port.
#[derive(Debug)]
pub(super) struct Tree<T> {
    nodes: Vec<Node>,
    leaves: Vec<Leaf<T>>,
    by_dscp: [Option<u8>; 64],
    by_pcp: [Option<u8>; 8],
    rest: u8,
    waiting: usize,
    /// What the leaf that was served last has borrowed: where one that had nothing to send joins in.
    turn: u64,
}

impl<T> Tree<T> {
    /// Empty queues. The configuration has been checked.
    pub fn new(config: &ShaperConfig) -> Self {
        let burst = match config.burst_kb {
            Some(kb) => duration(kb, config.kbps),
            None => duration(1, BURSTS_A_SECOND),
        };
        let port = Node {
            parent: None,
            depth: 0,
            own: None,
            ceiling: Some(Bucket::new(config.kbps, burst)),
            priority: 0,
        };
        let mut tree = Self {
            nodes: vec![port],
            leaves: Vec::new(),
            by_dscp: [None; 64],
            by_pcp: [None; 8],
            rest: u8::MAX,
            waiting: 0,
            turn: 0,
        };
        tree.add(&config.classes, 0, "", burst);
        if usize::from(tree.rest) >= tree.leaves.len() {
            tree.add(&BTreeMap::from([(String::new(), ShaperConfig::rest())]), 0, "", burst);
        }
        tree
    }

    fn add(&mut self, classes: &BTreeMap<String, ShaperClass>, parent: usize, path: &str, burst: Picos) {
        for (name, c) in classes {
            let node = self.nodes.len();
            self.nodes.push(Node {
                parent: Some(parent),
                depth: self.nodes[parent].depth + 1,
                own: (c.min_kbps > 0).then(|| Bucket::new(c.min_kbps, burst)),
                ceiling: c.max_kbps.map(|max| Bucket::new(max, burst)),
                priority: c.priority,
            });
            let name = format!("{path}{name}");
            if !c.classes.is_empty() {
                self.add(&c.classes, node, &format!("{name}/"), burst);
                continue;
            }
            // At most 65 by the configuration's check.
            let leaf = self.leaves.len() as u8;
            c.dscp.iter().for_each(|d| self.by_dscp[usize::from(d & 63)] = Some(leaf));
            c.pcp.iter().for_each(|p| self.by_pcp[usize::from(p & 7)] = Some(leaf));
            if c.dscp.is_empty() && c.pcp.is_empty() {
                self.rest = leaf;
            }
            self.leaves.push(Leaf {
                name,
                node,
                queue: VecDeque::new(),
                bytes: 0,
                limit: c.queue_bytes as usize,
                borrowed: 0,
                sent: (0, 0),
                dropped: 0,
            });
        }
    }

    /// The leaf of a frame with this code point (of an IP packet) and priority (of a tagged frame).
    pub fn leaf(&self, dscp: Option<u8>, pcp: Option<u8>) -> usize {
        let by_dscp = dscp.and_then(|d| self.by_dscp[usize::from(d & 63)]);
        let by_pcp = || pcp.and_then(|p| self.by_pcp[usize::from(p & 7)]);
        by_dscp.or_else(by_pcp).unwrap_or(self.rest).into()
    }

    /// Whether no frame waits.
    pub fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    fn path(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(Some(node), |n| self.nodes[*n].parent)
    }

    /// The node at whose expense a leaf may send now: itself, or the nearest above it that has something left. `None`:
    /// a ceiling is reached.
    fn lender(&self, leaf: usize, now: Picos) -> Option<usize> {
        let mut lender = None;
        for n in self.path(self.leaves[leaf].node) {
            let node = &self.nodes[n];
            if node.ceiling.as_ref().is_some_and(|c| !c.is_open(now)) {
                return None;
            }
            let has = node.parent.is_none() || node.own.as_ref().is_some_and(|o| o.is_open(now));
            if lender.is_none() && has {
                lender = Some(n);
            }
        }
        lender
    }

    fn charge(&mut self, leaf: usize, lender: usize, bytes: usize, now: Picos) {
        let mut lends = false;
        let mut at = Some(self.leaves[leaf].node);
        while let Some(n) = at {
            let node = &mut self.nodes[n];
            lends |= n == lender;
            if let Some(c) = &mut node.ceiling {
                c.charge(bytes, now);
            }
            if lends && let Some(own) = &mut node.own {
                own.charge(bytes, now);
            }
            at = node.parent;
        }
        let l = &mut self.leaves[leaf];
        self.turn = l.borrowed;
        if lender != l.node {
            l.borrowed += bytes as u64;
        }
        l.sent = (l.sent.0 + 1, l.sent.1 + bytes as u64);
    }

    /// Whether a frame may leave at once, without waiting; if so it is paid for.
    pub fn pass(&mut self, leaf: usize, bytes: usize, now: Nanos) -> bool {
        let now = picos(now);
        if !self.is_empty() {
            return false;
        }
        let Some(lender) = self.lender(leaf, now) else { return false };
        self.charge(leaf, lender, bytes, now);
        true
    }

    /// Adds a frame at the end of its queue; `false`: the queue is full and the frame lost.
    pub fn enqueue(&mut self, leaf: usize, frame: T, bytes: usize) -> bool {
        let turn = self.turn;
        let l = &mut self.leaves[leaf];
        let counts = bytes.max(FRAME_MIN);
        if l.queue.is_empty() {
            l.borrowed = l.borrowed.max(turn);
        } else if l.bytes + counts > l.limit {
            l.dropped += 1;
            return false;
        }
        l.bytes += counts;
        l.queue.push_back((frame, bytes));
        self.waiting += 1;
        true
    }

    /// The frame that leaves next, if one may leave now.
    pub fn dequeue(&mut self, now: Nanos) -> Option<T> {
        let now = picos(now);
        let rank = |i: usize, l: &Leaf<T>| {
            let lender = self.lender(i, now)?;
            // Guarantees come before what is left over; the inner ones first.
            Some((Reverse(self.nodes[lender].depth), self.nodes[l.node].priority, l.borrowed, i, lender))
        };
        let waiting = self.leaves.iter().enumerate().filter(|(_, l)| !l.queue.is_empty());
        let (_, _, _, leaf, lender) = waiting.filter_map(|(i, l)| rank(i, l)).min()?;
        let (frame, bytes) = self.leaves[leaf].queue.pop_front()?;
        self.leaves[leaf].bytes -= bytes.max(FRAME_MIN);
        self.waiting -= 1;
        self.charge(leaf, lender, bytes, now);
        Some(frame)
    }

    /// When the next frame that waits may leave; `None`: none waits.
    pub fn next(&self) -> Option<Nanos> {
        let opens = |l: &Leaf<T>| {
            let ceilings = self.path(l.node).filter_map(|n| self.nodes[n].ceiling.as_ref());
            ceilings.map(Bucket::opens_at).max().unwrap_or(0)
        };
        self.leaves.iter().filter(|l| !l.queue.is_empty()).map(opens).min().map(nanos)
    }

    /// Takes all frames out, each queue in order.
    pub fn drain(&mut self) -> Vec<T> {
        self.waiting = 0;
        let mut all = Vec::new();
        for l in &mut self.leaves {
            l.bytes = 0;
            all.extend(l.queue.drain(..).map(|(frame, _)| frame));
        }
        all
    }

    /// Counters of each leaf.
    pub fn stats(&self) -> Vec<ClassStats> {
        let row = |l: &Leaf<T>| ClassStats {
            name: l.name.clone(),
            packets: l.sent.0,
            bytes: l.sent.1,
            dropped: l.dropped,
            waiting: l.queue.len() as u64,
        };
        self.leaves.iter().map(row).collect()
    }
}
