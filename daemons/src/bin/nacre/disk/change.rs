//! Commands that make or change one image.

use super::common::{Image, Work, apply_options, parse_size, print_json, whole_sectors};
use super::progress::human;
use anyhow::{Context, Result, bail};
use blockfmt::disk::Preallocation;
use blockfmt::{CreateOptions, Format, job};
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Change the size of a disk.
#[derive(Args)]
#[command(after_help = "Examples:
  nacre disk resize -f qcow2 disk.qcow2 +10G
  nacre disk resize -f qcow2 --preallocation=falloc disk.qcow2 +10G
  nacre disk resize -f qcow2 --shrink disk.qcow2 5G")]
pub struct Resize {
    #[command(flatten)]
    image: Image,
    /// The new size, or a difference with a sign (suffixes K, M, G, T).
    #[arg(allow_hyphen_values = true)]
    size: String,
    /// Allow to make the disk smaller. What is cut off is lost.
    #[arg(long)]
    shrink: bool,
    /// Allocate the new space in advance: off, metadata, falloc (reserved) or full (written with zeros).
    #[arg(long, value_name = "MODE", default_value = "off")]
    preallocation: Preallocation,
}

pub fn resize(args: Resize) -> Result<ExitCode> {
    let disk = args.image.open(false)?;
    let parse = |text: &str| parse_size(text).map_err(anyhow::Error::msg);
    let size = match (args.size.strip_prefix('+'), args.size.strip_prefix('-')) {
        (Some(more), _) => disk.size().checked_add(parse(more)?),
        (_, Some(less)) => disk.size().checked_sub(parse(less)?),
        _ => Some(parse(&args.size)?),
    };
    let size = size.context("The new size is out of range")?;
    let size = whole_sectors(disk.layers()[0].format(), size);
    if size < disk.size() && !args.shrink {
        bail!("Shrinking loses data; use --shrink if the space is unused");
    }
    disk.resize_with(size, args.preallocation)?;
    disk.close()?;
    Ok(ExitCode::SUCCESS)
}

/// Take, list, apply or delete internal snapshots of a qcow2 image; take or delete external ones.
///
/// An external snapshot is an image with another one on top, which takes the writes from then on. "create -b" rolls back
/// to one. Snapshots of a disk that nacre-blk exports are taken through its API.
#[derive(Args)]
#[command(after_help = "Examples:
  nacre disk snapshot -f qcow2 -c before-upgrade disk.qcow2
  nacre disk snapshot -f qcow2 -a before-upgrade disk.qcow2
  nacre disk snapshot -f qcow2 --external tuesday.qcow2 monday.qcow2
  nacre disk snapshot -f qcow2 --delete-image monday.qcow2 disk.qcow2")]
pub struct Snapshot {
    #[command(flatten)]
    image: Image,
    #[command(flatten)]
    action: Action,
    /// Format of the new image (with --external) [default: qcow2].
    #[arg(short = 'O', long, value_name = "FORMAT", requires = "external")]
    target_format: Option<Format>,
    /// Options of the new image, as key=value (with --external).
    #[arg(short, value_name = "OPTIONS", requires = "external")]
    options: Vec<String>,
    #[command(flatten)]
    work: Work,
}

#[derive(Args)]
#[group(multiple = false)]
struct Action {
    /// List the snapshots (the default).
    #[arg(short, long)]
    list: bool,
    /// Take a snapshot.
    #[arg(short, long, value_name = "NAME")]
    create: Option<String>,
    /// Bring the disk back to a snapshot.
    #[arg(short, long, value_name = "NAME")]
    apply: Option<String>,
    /// Delete a snapshot.
    #[arg(short, long, value_name = "NAME")]
    delete: Option<String>,
    /// Take an external snapshot: make this new image, and let it take the writes from now on. The disk is to be opened
    /// by it; the present image, of any format, keeps the disk as it is.
    #[arg(long, value_name = "NEW")]
    external: Option<PathBuf>,
    /// Delete the external snapshot that an image below the disk keeps: the image is merged with the one on top of it,
    /// into that or the other way, whichever is less work. The disk must be its only child. Prints which image is of no
    /// use any more and which one the disk is.
    #[arg(long, value_name = "FILE")]
    delete_image: Option<PathBuf>,
}

pub fn snapshot(args: Snapshot) -> Result<ExitCode> {
    let action = &args.action;
    if let Some(image) = &action.delete_image {
        return delete_image(&args, image);
    }
    if let Some(image) = &action.external {
        return take_external(&args, image);
    }
    let change = action.create.is_some() || action.apply.is_some() || action.delete.is_some();
    let disk = args.image.open(!change)?;
    let layer = disk.layers().remove(0);
    let image = layer.as_qcow2().context("Only qcow2 images have internal snapshots")?;
    if let Some(name) = &action.create {
        image.create_snapshot(name)?;
    } else if let Some(name) = &action.apply {
        image.revert_to_snapshot(name)?;
    } else if let Some(name) = &action.delete {
        image.delete_snapshot(name)?;
    } else if args.work.json {
        print_json(&image.snapshots()?)?;
    } else {
        daemons::outln!("{:<8}{:<32}{:>12}{:>14}", "ID", "NAME", "DATE", "DISK SIZE");
        for s in image.snapshots()? {
            daemons::outln!("{:<8}{:<32}{:>12}{:>14}", s.id, s.name, s.date_sec, human(s.disk_size));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn take_external(args: &Snapshot, new: &Path) -> Result<ExitCode> {
    // For writing: nobody else writes to the image then.
    let disk = args.image.open(false)?;
    let snapshot = disk.layers()[0].storage().name();
    let mut create = CreateOptions::new(args.target_format.unwrap_or(Format::Qcow2), disk.size());
    apply_options(&mut create, &args.options)?;
    create.secret = args.image.secrets.read()?.into_iter().next();
    disk.snapshot(new, &create).with_context(|| format!("Cannot create {}", new.display()))?;
    disk.close()?;
    match args.work.json {
        true => print_json(&json!({ "snapshot": snapshot, "active": new }))?,
        false => daemons::outln!("{snapshot} keeps the disk as it is; the disk is {}", new.display()),
    }
    Ok(ExitCode::SUCCESS)
}

fn delete_image(args: &Snapshot, image: &Path) -> Result<ExitCode> {
    let disk = args.image.open(false)?;
    let control = args.work.control()?;
    let unused = job::remove(&disk, disk.find_layer(image)?, &control)?;
    disk.close()?;
    let active = disk.layers()[0].storage().name();
    match args.work.json {
        true => print_json(&json!({ "unused": unused, "active": active }))?,
        false => daemons::outln!("{unused} is of no use any more; the disk is {active}"),
    }
    Ok(ExitCode::SUCCESS)
}

/// Change or list the persistent dirty bitmaps of a qcow2 image.
///
/// Of several actions, the bitmap is first added, then cleared, then merged into, then enabled or disabled.
#[derive(Args)]
#[command(after_help = "Examples:
  nacre disk bitmap -f qcow2 --add disk.qcow2 daily
  nacre disk bitmap -f qcow2 --add --merge monday --merge tuesday --disable disk.qcow2 both
  nacre disk bitmap -f qcow2 --list --json disk.qcow2")]
pub struct Bitmap {
    #[command(flatten)]
    image: Image,
    /// Name of the bitmap that is changed.
    #[arg(requires = "BitmapActions", conflicts_with = "list")]
    name: Option<String>,
    #[command(flatten)]
    actions: BitmapActions,
    /// Bytes of the disk that one bit stands for (with --add).
    #[arg(short, long, default_value = "64K", value_parser = parse_size)]
    granularity: u64,
    /// Take the sources of --merge from this image.
    #[arg(short = 'b', long, value_name = "IMAGE", requires_all = ["merge", "source_format"])]
    source: Option<PathBuf>,
    /// Format of that image.
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "source")]
    source_format: Option<Format>,
    /// Print JSON (with --list).
    #[arg(long, conflicts_with = "name")]
    json: bool,
}

#[derive(Args)]
#[group(multiple = true)]
struct BitmapActions {
    /// List the bitmaps (the default).
    #[arg(short, long)]
    list: bool,
    /// Add a bitmap, which records changes from now on.
    #[arg(long, requires = "name")]
    add: bool,
    /// Remove the bitmap.
    #[arg(long, requires = "name", conflicts_with_all = ["add", "clear", "merge", "enable", "disable"])]
    remove: bool,
    /// Let the bitmap say that nothing changed.
    #[arg(long, requires = "name")]
    clear: bool,
    /// Mark what this bitmap has marked, too; may be repeated.
    #[arg(long, value_name = "SOURCE", requires = "name")]
    merge: Vec<String>,
    /// Record changes from now on.
    #[arg(long, requires = "name", conflicts_with = "disable")]
    enable: bool,
    /// Record no changes from now on.
    #[arg(long, requires = "name")]
    disable: bool,
}

pub fn bitmap(args: Bitmap) -> Result<ExitCode> {
    let actions = &args.actions;
    let disk = args.image.open(args.name.is_none())?;
    let layer = disk.layers().remove(0);
    let no_bitmaps = "Only qcow2 images have bitmaps";
    let image = layer.as_qcow2().context(no_bitmaps)?;
    if let Some(name) = &args.name {
        if actions.add {
            image.add_bitmap(name, args.granularity)?;
        }
        if actions.remove {
            image.remove_bitmap(name)?;
        }
        if actions.clear {
            image.clear_bitmap(name)?;
        }
        if !actions.merge.is_empty() {
            let other = match (&args.source, args.source_format) {
                (Some(path), Some(format)) => {
                    Some(Image { path: path.clone(), format, ..args.image.clone() }.open(true)?)
                }
                _ => None,
            };
            let source = other.as_ref().map_or_else(|| layer.clone(), |other| other.layers().remove(0));
            if source.size() != layer.size() {
                bail!("Bitmaps of disks of different sizes cannot be merged");
            }
            for from in &actions.merge {
                let from = source.as_qcow2().context(no_bitmaps)?.bitmap(from)?;
                image.merge_bitmap(name, &from)?;
            }
        }
        if actions.enable || actions.disable {
            image.enable_bitmap(name, actions.enable)?;
        }
        disk.close()?;
    } else if args.json {
        print_json(&image.bitmaps()?)?;
    } else {
        for b in image.bitmaps()? {
            let state = match (b.inconsistent, b.enabled) {
                (true, _) => "inconsistent",
                (_, true) => "enabled",
                _ => "disabled",
            };
            daemons::outln!("{}: granularity {}, {state}", b.name, human(b.granularity));
        }
    }
    Ok(ExitCode::SUCCESS)
}
