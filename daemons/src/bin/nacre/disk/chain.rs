//! Commands on the chain below an image.

use super::common::{Image, Work, policy};
use anyhow::{Context, Result, bail};
use blockfmt::disk::parent_name;
use blockfmt::{BackingRef, Format, OpenOptions, job};
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Merge an image into its parent, or into one further below.
///
/// Afterwards that one has the contents of the disk; the images above it are not needed any more. Those between lose
/// theirs, and so do other images on top of them or of the one that takes the contents. Ctrl-C leaves the disk as it is
/// (the images between are lost nevertheless); the same command goes on.
#[derive(Args)]
#[command(after_help = "Examples:
  nacre disk commit -p -f qcow2 child.qcow2
  nacre disk commit -f qcow2 -b base.qcow2 grandchild.qcow2")]
pub struct Commit {
    #[command(flatten)]
    image: Image,
    /// The image of the chain that takes the contents [default: the parent].
    #[arg(short, long, value_name = "FILE")]
    base: Option<PathBuf>,
    #[command(flatten)]
    work: Work,
}

pub fn commit(args: Commit) -> Result<ExitCode> {
    let disk = args.image.open(false)?;
    let below = args.base.as_deref().map_or(Ok(1), |base| disk.find_layer(base))?;
    if below == 0 {
        bail!("An image is not merged into itself");
    }
    let control = args.work.control()?;
    job::commit_into(&disk, below, &control)?;
    disk.close()?;
    args.work.report(&control)?;
    Ok(ExitCode::SUCCESS)
}

/// Copy what the images below hold into an image, so that it does not depend on them.
#[derive(Args)]
#[command(after_help = "Examples:
  nacre disk stream -p -f qcow2 disk.qcow2
  nacre disk stream -f qcow2 --base golden.qcow2 disk.qcow2")]
pub struct Stream {
    #[command(flatten)]
    image: Image,
    /// Keep depending on this image of the chain.
    #[arg(long)]
    base: Option<PathBuf>,
    #[command(flatten)]
    work: Work,
}

pub fn stream(args: Stream) -> Result<ExitCode> {
    let disk = args.image.open(false)?;
    let base = args.base.as_deref().map(|base| disk.find_layer(base)).transpose()?;
    let control = args.work.control()?;
    job::stream(&disk, 0, base, &control)?;
    disk.close()?;
    args.work.report(&control)?;
    Ok(ExitCode::SUCCESS)
}

/// Put an image on top of another parent; the contents of the disk stay the same.
#[derive(Args)]
#[command(after_help = "Examples:
  nacre disk rebase -f qcow2 -b new-base.qcow2 -F qcow2 disk.qcow2
  nacre disk rebase -u -f qcow2 -b moved/base.qcow2 -F qcow2 disk.qcow2")]
pub struct Rebase {
    #[command(flatten)]
    image: Image,
    /// The new parent; empty for none.
    #[arg(short, long, value_name = "FILE")]
    backing: String,
    /// Format of the new parent.
    #[arg(short = 'F', long, value_name = "FORMAT")]
    backing_format: Option<Format>,
    /// Only change the name of the parent. Its contents must be what the old parent's were.
    #[arg(short, long)]
    r#unsafe: bool,
    #[command(flatten)]
    work: Work,
}

pub fn rebase(args: Rebase) -> Result<ExitCode> {
    let (mut reference, mut layers) = (None, Vec::new());
    if !args.backing.is_empty() {
        let format = args.backing_format.context("Name the format of the new parent with -F")?;
        let path = parent_name(Path::new(&args.backing), &args.image.path)?;
        reference = Some(BackingRef { path, format: Some(format.name().into()) });
        if !args.r#unsafe {
            let options = OpenOptions::new(format).read_only(true).policy(policy(args.image.trust_headers));
            let parent = args.image.secrets.apply(options)?.open(&args.backing);
            layers = parent.with_context(|| format!("Cannot open {}", args.backing))?.layers();
        }
    }
    if args.r#unsafe {
        let image = args.image.options(false)?.open_layer_alone(&args.image.path);
        let image = image.with_context(|| format!("Cannot open {}", args.image.path.display()))?;
        image.set_backing(reference.as_ref())?;
        image.close()?;
        return Ok(ExitCode::SUCCESS);
    }
    let disk = args.image.open(false)?;
    let control = args.work.control()?;
    job::rebase(&disk, &layers, reference.as_ref(), &control)?;
    disk.close()?;
    args.work.report(&control)?;
    Ok(ExitCode::SUCCESS)
}
