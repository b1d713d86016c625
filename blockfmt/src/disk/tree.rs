//! Listing snapshots.

use super::Disk;
use crate::{Format, Layer, Result};
use std::sync::Arc;

/// An image, with those on top of it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotNode {
    /// The image's name, usually a path.
    pub image: String,
    /// Its format.
    pub format: Format,
    /// Whether it is the active image of a disk; otherwise it keeps the disk's contents of an earlier time.
    pub active: bool,
    /// Names of the internal snapshots, in order of time.
    pub snapshots: Vec<String>,
    /// The images on top of it.
    pub children: Vec<SnapshotNode>,
}

struct Node {
    layer: Arc<dyn Layer>,
    active: bool,
    children: Vec<Node>,
}

/// The images of several disks as trees: each base with what depends on it. The order is that of the disks.
pub fn snapshot_tree(disks: &[Disk]) -> Result<Vec<SnapshotNode>> {
    let mut roots = Vec::new();
    for disk in disks {
        let mut level: &mut Vec<Node> = &mut roots;
        for (index, layer) in disk.layers().into_iter().enumerate().rev() {
            let known = level.iter().position(|node| is_same_file(&node.layer, &layer));
            let at = known.unwrap_or_else(|| {
                level.push(Node { layer, active: false, children: Vec::new() });
                level.len() - 1
            });
            level[at].active |= index == 0;
            level = &mut level[at].children;
        }
    }
    roots.into_iter().map(describe).collect()
}

fn is_same_file(a: &Arc<dyn Layer>, b: &Arc<dyn Layer>) -> bool {
    let (a, b) = (a.storage(), b.storage());
    match (a.file_id(), b.file_id()) {
        (Some(a), Some(b)) => a == b,
        _ => a.name() == b.name(),
    }
}

fn describe(node: Node) -> Result<SnapshotNode> {
    let image = node.layer.as_qcow2();
    let snapshots = image.map(|image| image.snapshots()).transpose()?.unwrap_or_default();
    Ok(SnapshotNode {
        image: node.layer.storage().name(),
        format: node.layer.format(),
        active: node.active,
        snapshots: snapshots.into_iter().map(|snapshot| snapshot.name).collect(),
        children: node.children.into_iter().map(describe).collect::<Result<_>>()?,
    })
}
