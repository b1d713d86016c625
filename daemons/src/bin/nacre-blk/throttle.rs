//! Groups of disks whose requests are limited together.

use blockfmt::disk::{Limits, Throttle};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A group, perhaps of one disk, and its limits.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupSpec {
    /// The group's name.
    pub group: String,
    /// The exports in it; none removes the group. An export may be in several groups.
    #[serde(default)]
    pub disks: Vec<String>,
    /// Bytes and requests a second, of all disks of the group together.
    #[serde(default)]
    pub limits: Limits,
}

/// All groups, by name.
#[derive(Default)]
pub struct Groups(BTreeMap<String, (Arc<Throttle>, Vec<String>)>);

impl Groups {
    /// Makes, changes or removes a group.
    pub fn set(&mut self, spec: &GroupSpec) {
        if spec.disks.is_empty() {
            self.0.remove(&spec.group);
            return;
        }
        let make = || (Arc::new(Throttle::new(spec.limits)), Vec::new());
        let (throttle, disks) = self.0.entry(spec.group.clone()).or_insert_with(make);
        throttle.set(spec.limits);
        disks.clone_from(&spec.disks);
    }

    /// What limits a disk.
    pub fn of(&self, disk: &str) -> Vec<Arc<Throttle>> {
        let groups = self.0.values().filter(|(_, disks)| disks.iter().any(|name| name == disk));
        groups.map(|(throttle, _)| throttle.clone()).collect()
    }

    /// Takes a disk out of all groups.
    pub fn forget(&mut self, disk: &str) {
        for (_, disks) in self.0.values_mut() {
            disks.retain(|name| name != disk);
        }
        self.0.retain(|_, (_, disks)| !disks.is_empty());
    }
}
