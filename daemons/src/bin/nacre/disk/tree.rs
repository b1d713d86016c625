//! Listing snapshots as a tree.

use super::common::{Secrets, policy, print_json};
use anyhow::{Context, Result};
use blockfmt::disk::{SnapshotNode, snapshot_tree};
use blockfmt::{Format, LockMode, OpenOptions};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// List images and the snapshots below them as a tree.
///
/// An image that others are based on keeps the contents of its disk from an earlier time. Active images are marked
/// with "*", internal snapshots of an image are listed behind it.
#[derive(Args)]
#[command(after_help = "Example:\n  nacre disk tree -f qcow2 vm1.qcow2 vm2.qcow2")]
pub struct Tree {
    /// Format of the images.
    #[arg(short, long, value_name = "FORMAT")]
    format: Format,
    /// Let the images name files outside of their own directories.
    #[arg(long)]
    trust_headers: bool,
    /// Open the images even if another process uses them.
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    secrets: Secrets,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// The images of the disks.
    #[arg(required = true)]
    images: Vec<PathBuf>,
}

pub fn tree(args: Tree) -> Result<ExitCode> {
    let options = OpenOptions::new(args.format).read_only(true).policy(policy(args.trust_headers));
    let options = if args.force_share { options.lock(LockMode::None) } else { options };
    let options = args.secrets.apply(options)?;
    let open = |path: &PathBuf| options.open(path).with_context(|| format!("Cannot open {}", path.display()));
    let disks = args.images.iter().map(open).collect::<Result<Vec<_>>>()?;
    let trees = snapshot_tree(&disks)?;
    match args.json {
        true => print_json(&trees)?,
        false => daemons::out!("{}", trees.iter().map(|tree| draw(tree, "", "")).collect::<String>()),
    }
    Ok(ExitCode::SUCCESS)
}

/// A line for an image and those for what is on top of it; `first` goes before the line, `rest` before the others.
fn draw(node: &SnapshotNode, first: &str, rest: &str) -> String {
    let mut text = format!("{first}{}", node.image);
    if node.active {
        text += " *";
    }
    if !node.snapshots.is_empty() {
        text += &format!(" [{}]", node.snapshots.join(", "));
    }
    text.push('\n');
    for (n, child) in node.children.iter().enumerate() {
        let (branch, below) =
            if n + 1 < node.children.len() { ("├─ ", "│  ") } else { ("└─ ", "   ") };
        text += &draw(child, &format!("{rest}{branch}"), &format!("{rest}{below}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_are_drawn() {
        let node = |image: &str, children: Vec<SnapshotNode>| SnapshotNode {
            image: image.into(),
            format: Format::Qcow2,
            active: children.is_empty(),
            snapshots: Vec::new(),
            children,
        };
        let mut leaf = node("b", Vec::new());
        leaf.snapshots = vec!["one".into(), "two".into()];
        let tree = node("base", vec![node("mid", vec![node("a", Vec::new()), leaf]), node("c", Vec::new())]);
        let text = "base\n├─ mid\n│  ├─ a *\n│  └─ b * [one, two]\n└─ c *\n";
        assert_eq!(draw(&tree, "", ""), text);
    }
}
