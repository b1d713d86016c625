//! Counters in Prometheus' text format (version 0.0.4).

use std::fmt::Write;

use crate::stats::SIZE_CLASSES;
use crate::switch::{PortInfo, Switch};

impl Switch {
    /// All counters of the switch as a Prometheus page.
    pub fn prometheus(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_metrics(&mut out);
        out
    }

    fn write_metrics(&self, out: &mut String) -> std::fmt::Result {
        let ports = self.ports();
        let names = ports.first().map(|p| p.stats.fields()).unwrap_or_default();
        for (i, (name, _)) in names.iter().enumerate() {
            writeln!(out, "# TYPE nacre_switch_port_{name}_total counter")?;
            for p in &ports {
                let value = p.stats.fields()[i].1;
                writeln!(out, "nacre_switch_port_{name}_total{{port=\"{}\"}} {value}", escape(&p.name))?;
            }
        }
        writeln!(out, "# TYPE nacre_switch_port_rx_frame_size counter")?;
        for p in &ports {
            for (max, n) in SIZE_CLASSES.iter().zip(p.stats.rx_size) {
                let class = if *max == usize::MAX { "larger".to_string() } else { max.to_string() };
                let name = escape(&p.name);
                writeln!(out, "nacre_switch_port_rx_frame_size{{port=\"{name}\",upto=\"{class}\"}} {n}")?;
            }
        }
        writeln!(out, "# TYPE nacre_switch_port_up gauge")?;
        for p in &ports {
            writeln!(out, "nacre_switch_port_up{{port=\"{}\"}} {}", escape(&p.name), u8::from(p.link_up))?;
        }
        self.write_classes(&ports, out)?;
        writeln!(out, "# TYPE nacre_switch_drops_total counter")?;
        for (reason, n) in self.drops() {
            writeln!(out, "nacre_switch_drops_total{{reason=\"{reason}\"}} {n}")?;
        }
        let decisions = self.slow_path_decisions();
        writeln!(
            out,
            "# TYPE nacre_switch_slow_path_total counter\nnacre_switch_slow_path_total {decisions}"
        )?;
        for (name, n) in [
            ("mac_addresses", self.mac_table().len() as u64),
            ("mac_flaps", self.mac_flaps()),
            ("connections", self.connection_count() as u64),
        ] {
            writeln!(out, "# TYPE nacre_switch_{name} gauge\nnacre_switch_{name} {n}")?;
        }
        Ok(())
    }

    /// Counters of the classes that shapers have.
    fn write_classes(&self, ports: &[PortInfo], out: &mut String) -> std::fmt::Result {
        let mut rows = Vec::new();
        for p in ports {
            // A port that went meanwhile has none.
            let classes = self.class_stats(p.id).unwrap_or_default();
            rows.extend(classes.into_iter().map(|c| {
                let labels = format!("{{port=\"{}\",class=\"{}\"}}", escape(&p.name), escape(&c.name));
                (labels, [c.packets, c.bytes, c.dropped, c.waiting])
            }));
        }
        let names = [
            ("packets_total", "counter"),
            ("bytes_total", "counter"),
            ("dropped_total", "counter"),
            ("waiting", "gauge"),
        ];
        for (i, (name, kind)) in names.into_iter().enumerate().filter(|_| !rows.is_empty()) {
            writeln!(out, "# TYPE nacre_switch_class_{name} {kind}")?;
            for (labels, values) in &rows {
                writeln!(out, "nacre_switch_class_{name}{labels} {}", values[i])?;
            }
        }
        Ok(())
    }
}

/// A label's value as the format wants it.
fn escape(s: &str) -> String {
    s.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
