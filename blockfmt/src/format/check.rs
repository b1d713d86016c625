//! What a check of an image finds.

/// What a check may change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    #[default]
    Nothing,
    /// Leaked clusters.
    Leaks,
    /// Everything that can be repaired.
    All,
}

/// The result of a check. Names follow `qemu-img check --output=json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// Clusters that are used by more, or others, than their refcount says; and invalid entries.
    pub corruptions: u64,
    /// Clusters that nobody uses but whose refcount is not zero.
    pub leaks: u64,
    /// Corruptions that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Clusters of the virtual disk that the image holds.
    pub allocated_clusters: u64,
    /// Held clusters that are compressed.
    pub compressed_clusters: u64,
    /// Held clusters that do not follow their predecessor in the image.
    pub fragmented_clusters: u64,
    /// First byte after the last used cluster.
    pub image_end_offset: u64,
    /// Descriptions of the first findings.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<String>,
}

impl CheckReport {
    /// Whether nothing is wrong (any more).
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0
    }

    pub(crate) fn corruption(&mut self, what: String) {
        self.corruptions += 1;
        self.note(what);
    }

    pub(crate) fn note(&mut self, what: String) {
        if self.findings.len() < 100 {
            self.findings.push(what);
        }
    }
}
