//! Counters, to be read in the process or as Prometheus text.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::{Blk, Net};

/// Accesses of the guest that reached a bus.
#[derive(Default)]
pub(super) struct BusCounters {
    pub(super) mmio_reads: AtomicU64,
    pub(super) mmio_writes: AtomicU64,
    pub(super) port_reads: AtomicU64,
    pub(super) port_writes: AtomicU64,
}

impl BusCounters {
    pub(super) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// What counts.
#[derive(Default)]
pub(super) struct Sources {
    pub(super) bus: Arc<BusCounters>,
    pub(super) disks: Vec<(String, Arc<Blk>)>,
    pub(super) nets: Vec<(String, Arc<Net>)>,
    pub(super) balloon: Option<Arc<Balloon>>,
}

macro_rules! metrics {
    ($(#[$doc:meta])* $name:ident: $($(#[doc = $help:literal])* $field:ident,)*) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct $name {
            $($(#[doc = $help])* pub $field: u64,)*
        }

        impl $name {
            /// Name, explanation and value of each counter.
            fn each(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$((stringify!($field), concat!($($help),*), self.$field)),*]
            }
        }
    };
}

metrics! {
    /// Accesses of the guest to devices.
    BusMetrics:
    /// Reads of memory-mapped registers.
    mmio_reads,
    /// Writes of memory-mapped registers.
    mmio_writes,
    /// Reads of I/O ports.
    port_reads,
    /// Writes of I/O ports.
    port_writes,
}

metrics! {
    /// The vCPUs together.
    CpuMetrics:
    /// Instructions that the software CPU does not implement; the guest got an exception.
    unimplemented_instructions,
    /// Instructions that KVM could not emulate and the software CPU executed.
    assisted_instructions,
}

metrics! {
    /// A disk.
    DiskMetrics:
    /// Requests taken from the guest.
    requests,
    /// Requests answered, well or not.
    answered,
    /// Reads completed.
    reads,
    /// Bytes read.
    read_bytes,
    /// Writes completed.
    writes,
    /// Bytes written.
    write_bytes,
    /// Flushes completed.
    flushes,
    /// Discards and write-zeroes completed.
    discards,
    /// Requests that failed.
    errors,
    /// Times that a rate limit made requests wait.
    throttled,
}

metrics! {
    /// A network card.
    NetMetrics:
    /// Frames that the guest received.
    received,
    /// Bytes that the guest received.
    received_bytes,
    /// Frames that the guest sent.
    sent,
    /// Bytes that the guest sent.
    sent_bytes,
    /// Frames for the guest that fitted no buffer.
    receive_dropped,
    /// Frames for the guest that its filter refused.
    filtered,
    /// Frames of the guest that were refused.
    send_dropped,
    /// Times that a rate limit made frames wait.
    throttled,
}

/// All counters of a machine at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// The vCPUs.
    pub cpu: CpuMetrics,
    /// Accesses to devices. What an accelerator answers by itself is not counted.
    pub bus: BusMetrics,
    /// Disks, by name.
    pub disks: Vec<(String, DiskMetrics)>,
    /// Network cards, by name.
    pub nets: Vec<(String, NetMetrics)>,
    /// Bytes of guest memory that the balloon holds, when there is one.
    pub balloon_bytes: Option<u64>,
}

impl Sources {
    pub(super) fn read(&self) -> Metrics {
        macro_rules! load {
            ($type:ident, $from:expr, $($field:ident)*) => {
                $type { $($field: $from.$field.load(Ordering::Relaxed)),* }
            };
        }
        let disk = |blk: &Blk| {
            let c = blk.counters();
            load!(
                DiskMetrics, c,
                requests answered reads read_bytes writes write_bytes flushes discards errors throttled
            )
        };
        let net = |net: &Net| {
            let c = net.counters();
            load!(
                NetMetrics, c,
                received received_bytes sent sent_bytes receive_dropped filtered send_dropped throttled
            )
        };
        Metrics {
            cpu: CpuMetrics::default(),
            bus: load!(BusMetrics, self.bus, mmio_reads mmio_writes port_reads port_writes),
            disks: self.disks.iter().map(|(name, d)| (name.clone(), disk(d))).collect(),
            nets: self.nets.iter().map(|(name, n)| (name.clone(), net(n))).collect(),
            balloon_bytes: self.balloon.as_ref().map(|b| b.actual()),
        }
    }
}

impl Metrics {
    /// The counters in the text format of Prometheus, with `vm` as a label of each.
    pub fn prometheus(&self, vm: &str) -> String {
        let vm = escape(vm);
        let mut text = String::new();
        for (prefix, counters) in [("nacre_cpu", self.cpu.each()), ("nacre_bus", self.bus.each())] {
            let samples = counters.into_iter().map(|c| (format!("vm=\"{vm}\""), c));
            write_all(&mut text, prefix, samples.collect());
        }
        let labels = |kind: &str, name: &str| format!("vm=\"{vm}\",{kind}=\"{}\"", escape(name));
        let mut disks = Vec::new();
        for (name, disk) in &self.disks {
            disks.extend(disk.each().into_iter().map(|c| (labels("disk", name), c)));
        }
        write_all(&mut text, "nacre_disk", disks);
        let mut nets = Vec::new();
        for (name, net) in &self.nets {
            nets.extend(net.each().into_iter().map(|c| (labels("net", name), c)));
        }
        write_all(&mut text, "nacre_net", nets);
        if let Some(bytes) = self.balloon_bytes {
            text += "# HELP nacre_balloon_bytes Guest memory that the balloon holds.\n";
            text += "# TYPE nacre_balloon_bytes gauge\n";
            // Writing to a string does not fail.
            let _ = writeln!(text, "nacre_balloon_bytes{{vm=\"{vm}\"}} {bytes}");
        }
        text
    }
}

type Sample = (String, (&'static str, &'static str, u64));

/// Writes samples grouped by counter, as the format demands.
fn write_all(text: &mut String, prefix: &str, mut samples: Vec<Sample>) {
    // Stable: devices stay in their order.
    samples.sort_by_key(|(_, (name, ..))| *name);
    let mut last = "";
    for (labels, (name, help, value)) in samples {
        // Writing to a string does not fail.
        if name != last {
            let _ =
                writeln!(text, "# HELP {prefix}_{name}_total{help}\n# TYPE {prefix}_{name}_total counter");
            last = name;
        }
        let _ = writeln!(text, "{prefix}_{name}_total{{{labels}}} {value}");
    }
}

/// A label value.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_one_header_for_each_counter() {
        let disk = |reads| DiskMetrics { reads, ..DiskMetrics::default() };
        let metrics = Metrics {
            disks: vec![("a".into(), disk(1)), ("b\"x".into(), disk(2))],
            balloon_bytes: Some(4096),
            ..Metrics::default()
        };
        let text = metrics.prometheus("v");
        assert_eq!(text.matches("# TYPE nacre_disk_reads_total counter\n").count(), 1);
        assert!(text.contains("# HELP nacre_disk_reads_total Reads completed.\n"), "{text}");
        assert!(text.contains("nacre_disk_reads_total{vm=\"v\",disk=\"a\"} 1\n"));
        assert!(text.contains("nacre_disk_reads_total{vm=\"v\",disk=\"b\\\"x\"} 2\n"));
        assert!(text.contains("nacre_balloon_bytes{vm=\"v\"} 4096\n"));
        assert!(!text.contains("nacre_net"));
    }
}
