//! What is configured of a shaper.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Most classes of one shaper.
const CLASSES_MAX: usize = 64;
/// Deepest nesting of classes.
const DEPTH_MAX: usize = 4;
/// Most bytes that may wait in one class.
const QUEUE_MAX: u32 = 16 << 20;
/// Largest rate, in kilobits a second.
const KBPS_MAX: u64 = 1_000_000_000;

/// Shaping of what goes out of a port: frames above the rate wait, in classes, instead of being dropped.
///
/// Classes form a tree below the port. A class gets its guaranteed rate whenever it has something to send. What is
/// left goes to the classes that have more to send and are below their ceilings: to those with the lowest
/// `priority` number first, equally among equals.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ShaperConfig {
    /// Kilobits a second that the port sends at most.
    pub kbps: u64,
    /// Kilobits that may leave at once after a pause, and one more frame; absent: a hundredth of a second's worth.
    /// The same share of its rate goes for each class.
    #[serde(default)]
    pub burst_kb: Option<u64>,
    /// Classes by name. Frames that none of them takes form one of their own, behind all others.
    #[serde(default)]
    pub classes: BTreeMap<String, ShaperClass>,
}

fn queue_bytes() -> u32 {
    256 << 10
}

/// A class of a [`ShaperConfig`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ShaperClass {
    /// Kilobits a second that are the class's own. Those of all classes together may not exceed those of the class
    /// (or port) that they are in.
    #[serde(default)]
    pub min_kbps: u64,
    /// Kilobits a second that the class sends at most; absent: as many as the class (or port) that it is in.
    #[serde(default)]
    pub max_kbps: Option<u64>,
    /// Who gets what is left: the lowest number first.
    #[serde(default)]
    pub priority: u8,
    /// Differentiated services code points of the IP packets that belong to the class.
    #[serde(default)]
    pub dscp: BTreeSet<u8>,
    /// Priorities (802.1Q) of the tagged frames that belong to the class, unless their code point belongs to another.
    #[serde(default)]
    pub pcp: BTreeSet<u8>,
    /// Most bytes that wait; frames beyond are dropped. A frame counts as 64 bytes at least, and an empty queue takes
    /// any.
    #[serde(default = "queue_bytes")]
    pub queue_bytes: u32,
    /// Classes that share this one's rates. A class with some takes no frames itself.
    #[serde(default)]
    pub classes: BTreeMap<String, ShaperClass>,
}

impl Default for ShaperClass {
    fn default() -> Self {
        Self {
            min_kbps: 0,
            max_kbps: None,
            priority: 0,
            dscp: BTreeSet::new(),
            pcp: BTreeSet::new(),
            queue_bytes: queue_bytes(),
            classes: BTreeMap::new(),
        }
    }
}

impl ShaperConfig {
    /// The class of frames that no class takes.
    pub(super) fn rest() -> ShaperClass {
        ShaperClass { priority: u8::MAX, ..ShaperClass::default() }
    }

    /// Refuses a configuration that makes no sense; `path` is where it stands in the document.
    pub(crate) fn check(&self, path: &str) -> Result<()> {
        check_rate(&format!("{path}.kbps"), self.kbps)?;
        if self.burst_kb == Some(0) {
            return Err(Error::config(format!("{path}.burst_kb"), "nothing could ever leave"));
        }
        let mut seen = Seen::default();
        check_classes(path, &self.classes, self.kbps, 1, &mut seen)
    }
}

fn check_rate(path: &str, kbps: u64) -> Result<()> {
    if (1..=KBPS_MAX).contains(&kbps) {
        return Ok(());
    }
    Err(Error::config(path, format!("use 1 to {KBPS_MAX}")))
}

/// What the classes looked at so far take.
#[derive(Default)]
struct Seen {
    classes: usize,
    dscp: BTreeSet<u8>,
    pcp: BTreeSet<u8>,
    /// A class takes all other frames.
    rest: bool,
}

fn check_classes(
    path: &str,
    classes: &BTreeMap<String, ShaperClass>,
    kbps: u64,
    depth: usize,
    seen: &mut Seen,
) -> Result<()> {
    for (name, c) in classes {
        let path = format!("{path}.classes.{name}");
        let wrong = |field: &str, reason: String| Err(Error::config(format!("{path}.{field}"), reason));
        seen.classes += 1;
        if seen.classes > CLASSES_MAX || depth > DEPTH_MAX {
            let reason = format!("a port has {CLASSES_MAX} classes at most, nested {DEPTH_MAX} deep");
            return Err(Error::config(path, reason));
        }
        if let Some(max) = c.max_kbps {
            check_rate(&format!("{path}.max_kbps"), max)?;
        }
        let ceiling = c.max_kbps.unwrap_or(kbps).min(kbps);
        if c.min_kbps > ceiling {
            return wrong("min_kbps", format!("the class sends {ceiling} at most"));
        }
        if !(2048..=QUEUE_MAX).contains(&c.queue_bytes) {
            return wrong("queue_bytes", format!("use 2048 to {QUEUE_MAX}"));
        }
        for (field, values, limit, taken) in
            [("dscp", &c.dscp, 64, &mut seen.dscp), ("pcp", &c.pcp, 8, &mut seen.pcp)]
        {
            if let Some(v) = values.iter().find(|v| **v >= limit || !taken.insert(**v)) {
                return wrong(field, format!("{v} is not below {limit}, or another class has it"));
            }
        }
        let selects = !c.dscp.is_empty() || !c.pcp.is_empty();
        if c.classes.is_empty() {
            if !selects && std::mem::replace(&mut seen.rest, true) {
                return wrong("dscp", "another class takes all other frames already".into());
            }
        } else {
            if selects {
                return wrong("classes", "a class that takes frames itself has no classes in it".into());
            }
            check_classes(&path, &c.classes, ceiling, depth + 1, seen)?;
            let sum: u64 = c.classes.values().map(|c| c.min_kbps).sum();
            if sum > c.min_kbps {
                return wrong("min_kbps", format!("the classes in it are guaranteed {sum}"));
            }
        }
    }
    let sum: u64 = classes.values().map(|c| c.min_kbps).sum();
    if depth == 1 && sum > kbps {
        let reason = format!("the classes are guaranteed {sum}, more than the port's {kbps}");
        return Err(Error::config(format!("{path}.classes"), reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn senseless_shapers_are_refused_with_the_path() {
        for (json, path) in [
            (r#"{"kbps":0}"#, "s.kbps"),
            (r#"{"kbps":8,"burst_kb":0}"#, "s.burst_kb"),
            (r#"{"kbps":8,"classes":{"a":{"min_kbps":5},"b":{"min_kbps":4,"dscp":[1]}}}"#, "s.classes"),
            (r#"{"kbps":8,"classes":{"a":{"min_kbps":9}}}"#, "s.classes.a.min_kbps"),
            (r#"{"kbps":8,"classes":{"a":{"min_kbps":5,"max_kbps":4}}}"#, "s.classes.a.min_kbps"),
            (r#"{"kbps":8,"classes":{"a":{"max_kbps":0}}}"#, "s.classes.a.max_kbps"),
            (r#"{"kbps":8,"classes":{"a":{},"b":{}}}"#, "s.classes.b.dscp"),
            (r#"{"kbps":8,"classes":{"a":{"dscp":[64]}}}"#, "s.classes.a.dscp"),
            (r#"{"kbps":8,"classes":{"a":{"pcp":[3]},"b":{"pcp":[3]}}}"#, "s.classes.b.pcp"),
            (r#"{"kbps":8,"classes":{"a":{"queue_bytes":5}}}"#, "s.classes.a.queue_bytes"),
            (r#"{"kbps":8,"classes":{"a":{"pcp":[1],"classes":{"b":{}}}}}"#, "s.classes.a.classes"),
            (
                r#"{"kbps":8,"classes":{"a":{"min_kbps":2,"classes":{"b":{"min_kbps":3}}}}}"#,
                "s.classes.a.min_kbps",
            ),
            (
                r#"{"kbps":8,"classes":{"a":{"classes":{"a":{"classes":{"a":{"classes":{"a":{"classes":{"a":{}}}}}}}}}}}"#,
                "s.classes.a.classes.a.classes.a.classes.a.classes.a",
            ),
        ] {
            let c: ShaperConfig = serde_json::from_str(json).unwrap();
            match c.check("s") {
                Err(Error::Config { path: p, .. }) => assert_eq!(p, path, "{json}"),
                r => panic!("{json}: {r:?}"),
            }
        }
        let good = r#"{"kbps":100,"classes":{"voice":{"dscp":[46],"pcp":[5],"min_kbps":10,"max_kbps":20},
            "bulk":{"min_kbps":50,"priority":2,"classes":{"a":{"min_kbps":50,"dscp":[8]},"b":{}}}}}"#;
        serde_json::from_str::<ShaperConfig>(good).unwrap().check("s").unwrap();
    }
}
