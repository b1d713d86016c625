//! Making images.

use super::common::{Secrets, apply_options, parse_size, policy, whole_sectors};
use anyhow::{Context, Result, bail};
use blockfmt::disk::as_path;
use blockfmt::{BackingRef, CreateOptions, Format, OpenOptions};
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Create an image.
#[derive(Args)]
#[command(after_help = "Examples:
  nacre disk create -f qcow2 disk.qcow2 20G
  nacre disk create -f qcow2 -o cluster_size=128k,extended_l2=on disk.qcow2 20G
  nacre disk create -f qcow2 -b base.qcow2 -F qcow2 child.qcow2
  nacre disk create -f vhdx -o subformat=fixed disk.vhdx 20G
  nacre disk create -f qcow2 -o encrypt.format=luks --secret-file key disk.qcow2 20G
  nacre disk create -f raw -o preallocation=full disk.raw 20G")]
pub struct Create {
    /// Format of the new image.
    #[arg(short, long, value_name = "FORMAT")]
    format: Format,
    /// Parent of the new image; a relative name is relative to the new image.
    #[arg(short, long, value_name = "FILE", requires = "backing_format")]
    backing: Option<PathBuf>,
    /// Format of the parent.
    #[arg(short = 'F', long, value_name = "FORMAT")]
    backing_format: Option<Format>,
    /// Options of the format, as key=value.
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    #[command(flatten)]
    secrets: Secrets,
    /// The new image. It must not exist.
    path: PathBuf,
    /// Size of the disk in bytes (suffixes K, M, G, T). A child takes its parent's if it is left out.
    #[arg(value_parser = parse_size)]
    size: Option<u64>,
    /// Whether options that are left out suit overlays, not what qemu-img does.
    #[arg(skip)]
    overlay: bool,
}

pub fn create(args: Create) -> Result<ExitCode> {
    let mut create = CreateOptions::new(args.format, 0);
    apply_options(&mut create, &args.options)?;
    if args.overlay {
        create.qcow2 = create.qcow2.overlay();
    }
    create.secret = args.secrets.read()?.into_iter().next();
    if let (Some(backing), Some(format)) = (&args.backing, args.backing_format) {
        // As qemu-img: a relative name is relative to the new image, and goes into its header as it is.
        let name = backing.to_str().context("The parent's name is not UTF-8")?;
        create.backing = Some(BackingRef { path: as_path(name.into()), format: Some(format.name().into()) });
    }
    if let Some(BackingRef { path: backing, format: Some(format) }) = &create.backing {
        let format: Format = format.parse()?;
        let backing = args.path.parent().unwrap_or(Path::new("")).join(backing);
        // The user named this file; what its header names is another matter.
        let parent = OpenOptions::new(format).read_only(true).policy(policy(false));
        let parent = args.secrets.apply(parent)?;
        let parent = parent.open(&backing).with_context(|| format!("Cannot open {}", backing.display()))?;
        if create.size == 0 {
            create.size = parent.size();
        }
    }
    if let Some(size) = args.size {
        create.size = size;
    } else if create.size == 0 && create.backing.is_none() {
        bail!("Name the size of the disk");
    }
    create.size = whole_sectors(args.format, create.size);
    create.create(&args.path).with_context(|| format!("Cannot create {}", args.path.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Create linked clones: qcow2 children that share one base.
///
/// They have clusters of 128 KiB with subclusters, so that small writes to a new clone copy nothing from the base. QEMU
/// reads such images since version 5.2; -o extended_l2=off makes clones for other readers.
#[derive(Args)]
#[command(after_help = "Examples:
  nacre disk clone -f qcow2 golden.qcow2 vm1.qcow2 vm2.qcow2 vm3.qcow2
  nacre disk clone -f qcow2 -o extended_l2=off golden.qcow2 vm4.qcow2
  nacre disk clone -f luks -o encrypt.format=luks --secret-file key golden.luks vm1.qcow2")]
pub struct Clone {
    /// Format of the base.
    #[arg(short, long, value_name = "FORMAT")]
    format: Format,
    /// Options of the clones, as key=value. Clones of an encrypted base are not encrypted unless these say so.
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    #[command(flatten)]
    secrets: Secrets,
    /// The base. It must not change as long as clones exist.
    base: PathBuf,
    /// The new images.
    #[arg(required = true)]
    clones: Vec<PathBuf>,
}

pub fn clone(args: Clone) -> Result<ExitCode> {
    args.secrets.read()?; // once: a descriptor has nothing to read any more
    for path in args.clones {
        create(Create {
            format: Format::Qcow2,
            backing: Some(args.base.clone()),
            backing_format: Some(args.format),
            options: args.options.clone(),
            secrets: args.secrets.clone(),
            path,
            size: None,
            overlay: true,
        })?;
    }
    Ok(ExitCode::SUCCESS)
}
