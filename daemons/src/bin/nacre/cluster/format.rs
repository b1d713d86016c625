//! `nacre cluster format`.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::ExitCode;

use ::cluster::adapters::{LeaseDisk, LeaseVolume};
use ::cluster::agent::resource_name;
use ::cluster::ondisk::{Geometry, Name};
use anyhow::{Context, bail};
use clap::Parser;

/// Prepare a file or block device for leases, laid out as sanlock lays them out. What it held is lost.
#[derive(Parser)]
#[command(after_help = "\
A file is made, or grown, as needed. Areas have numbers from 0; a virtual machine names one for each of its disks.

Example:
  nacre cluster format /srv/shared/leases --space vms --areas 64")]
pub struct Args {
    /// The file or block device, the same on all hosts.
    volume: PathBuf,
    /// The lockspace's name.
    #[arg(long)]
    space: String,
    /// How many lease areas to make.
    #[arg(long, default_value_t = 64)]
    areas: u32,
    /// Where the lockspace begins, in bytes.
    #[arg(long, default_value_t = 0)]
    offset: u64,
    /// The sector size: 512 or 4096.
    #[arg(long, default_value_t = 512)]
    sector: u32,
    /// The size of an area in MiB: 1, or with 4096-byte sectors 1, 2, 4 or 8.
    #[arg(long, default_value_t = 1)]
    area: u32,
    /// The I/O timeout in seconds that the hosts will use.
    #[arg(long, default_value_t = 10)]
    io_timeout: u16,
    /// Format even if there are leases.
    #[arg(long)]
    force: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let space = Name::new(&args.space).context("The lockspace's name is too long")?;
    let size = args.area.checked_mul(1 << 20).context("The area is too large")?;
    let geometry = Geometry::new(args.sector, size)?;
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&args.volume);
    let file = file.with_context(|| format!("Cannot open {}", args.volume.display()))?;
    let wanted = args.offset.checked_add((u64::from(args.areas) + 1) * u64::from(size));
    let wanted = wanted.context("The offset is too large")?;
    let meta = file.metadata()?;
    if meta.is_file() && meta.len() < wanted {
        file.set_len(wanted).with_context(|| format!("Cannot grow {}", args.volume.display()))?;
    }
    drop(file);
    let volume = LeaseVolume::new(LeaseDisk::open(&args.volume, geometry)?, space, args.offset);
    let used = volume.read_space(1).is_ok();
    if used && !args.force {
        bail!("{} holds leases already; if no host uses them, give --force", args.volume.display());
    }
    for index in 0..args.areas {
        volume.format_resource(index, resource_name(index))?;
    }
    volume.format_space(args.io_timeout)?;
    Ok(ExitCode::SUCCESS)
}
