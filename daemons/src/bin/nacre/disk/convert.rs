//! Copying disks into an image of another format.

use super::common::{Image, Work, apply_options, parse_size, policy, whole_sectors};
use anyhow::{Context, Result, bail};
use blockfmt::job::{self, ConvertOptions};
use blockfmt::nbd::Uri;
use blockfmt::{BackingRef, CreateOptions, Disk, Format, OpenOptions};
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Copy a disk, or several one behind the other, into an image of another (or the same) format.
///
/// The image is new, or, with -n, one that exists: a file, a block device or an NBD export, whose format -O names and
/// which must be large enough. It is written in place then, and what it has beyond the end of the copy stays.
#[derive(Args)]
#[command(override_usage = "nacre disk convert [OPTIONS] -f <FORMAT> -O <FORMAT> <SOURCE>... <TARGET>")]
#[command(after_help = "Examples:
  nacre disk convert -p -f raw -O qcow2 disk.raw disk.qcow2
  nacre disk convert -f raw -O qcow2 'nbd://backup.example/root' root.qcow2
  nacre disk convert -c -f qcow2 -O qcow2 -o compression_type=zstd disk.qcow2 small.qcow2
  nacre disk convert -n -f qcow2 -O raw disk.qcow2 /dev/vg/disk
  nacre disk convert -f raw -O qcow2 part1.raw part2.raw whole.qcow2
  nacre disk convert -f qcow2 -O qcow2 -B base.qcow2 -F qcow2 disk.qcow2 child.qcow2")]
pub struct Convert {
    #[command(flatten)]
    image: Image,
    /// Format of the target.
    #[arg(short = 'O', long, value_name = "FORMAT")]
    target_format: Format,
    /// Options of the new image's format, as key=value.
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Make the new image a child of this one, a relative name being relative to the new image, and write only what
    /// differs.
    #[arg(short = 'B', long, value_name = "FILE", requires = "backing_format")]
    backing: Option<String>,
    /// Format of the parent.
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<Format>,
    /// Write into a target that exists, and make none.
    #[arg(short = 'n', long, conflicts_with_all = ["options", "backing"])]
    no_create: bool,
    /// The target reads as zeros everywhere: write none.
    #[arg(long, requires = "no_create")]
    target_is_zero: bool,
    /// Compress (qcow2).
    #[arg(short, long)]
    compress: bool,
    /// Leave out runs of at least this many zero bytes, a multiple of 512; 0 writes everything and leaves the target
    /// allocated in full.
    #[arg(short = 'S', long, value_name = "SIZE", default_value = "4K", value_parser = parse_size)]
    sparse_size: u64,
    /// Threads that work at the same time; 0 for one per processor, and more while they wait for storage.
    #[arg(short = 'm', long, default_value_t = 0)]
    threads: usize,
    /// Write in any order, which is done anyway unless -m is 1.
    #[arg(short = 'W', long)]
    out_of_order: bool,
    /// How the target uses the host's page cache; it is flushed at the end in any case.
    #[arg(short = 't', long, value_enum, value_name = "MODE", default_value = "writeback")]
    cache: Cache,
    /// How the sources use the host's page cache.
    #[arg(short = 'T', long, value_enum, value_name = "MODE", default_value = "writeback")]
    source_cache: Cache,
    #[command(flatten)]
    work: Work,
    /// Further sources, and at last the target: a new file, the URI of an NBD export, or with -n what exists.
    #[arg(required = true, value_name = "TARGET")]
    rest: Vec<PathBuf>,
}

/// Uses of the page cache, by the names of qemu-img.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Cache {
    /// Through it.
    Writeback,
    /// Through it.
    Unsafe,
    /// Through it.
    Writethrough,
    /// Around it.
    None,
    /// Around it.
    Directsync,
}

impl Cache {
    fn direct(self) -> bool {
        matches!(self, Cache::None | Cache::Directsync)
    }
}

pub fn convert(args: Convert) -> Result<ExitCode> {
    let (target, sources) = args.rest.split_last().context("Name the target")?;
    let sources: Vec<_> = std::iter::once(&args.image.path).chain(sources).collect();
    let open = |path: &&PathBuf| args.open_source(path);
    let disks = sources.iter().map(open).collect::<Result<Vec<_>>>()?;
    let create = args.create_options(job::concatenated_size(&disks)?)?;
    let new = !args.no_create && !target.to_str().is_some_and(Uri::matches);
    if new {
        if target.exists() {
            bail!("Cannot create {}: it exists; remove it, or write into it with -n", target.display());
        }
        create.create(target).with_context(|| format!("Cannot create {}", target.display()))?;
    }
    let control = args.work.control()?;
    let run = || -> Result<()> {
        let disk = args.open_target(target)?;
        let child = new && create.backing.is_some();
        let options = ConvertOptions {
            compress: args.compress,
            threads: args.threads,
            target_is_zero: (new && !child) || args.target_is_zero,
            sparse_size: args.sparse_size,
            // What the parent has need not be written.
            resume: child && !args.compress,
        };
        let result = job::concatenate(&disks, &disk, options, &control);
        disk.close()?;
        Ok(result?)
    };
    if let Err(error) = run() {
        if new {
            // A partial image is of no use.
            let _ = std::fs::remove_file(target);
        }
        let names: Vec<_> = sources.iter().map(|path| path.display().to_string()).collect();
        return Err(error.context(format!("Cannot convert {}", names.join(", "))));
    }
    args.work.report(&control)?;
    Ok(ExitCode::SUCCESS)
}

impl Convert {
    fn open_source(&self, path: &Path) -> Result<Disk> {
        let disk = self.image.options(true)?.direct(self.source_cache.direct()).open(path);
        disk.with_context(|| format!("Cannot open {}", path.display()))
    }

    fn open_target(&self, path: &Path) -> Result<Disk> {
        // The parent was named on the command line.
        let parent = self.backing.iter().map(|name| path.parent().unwrap_or(Path::new("")).join(name));
        let policy = policy(self.image.trust_headers).allow(parent);
        let options = OpenOptions::new(self.target_format).policy(policy);
        let options = self.image.secrets.apply(options.direct(self.cache.direct()))?;
        options.open(path).with_context(|| format!("Cannot open {}", path.display()))
    }

    /// How a new image is made.
    fn create_options(&self, size: u64) -> Result<CreateOptions> {
        let mut create = CreateOptions::new(self.target_format, size);
        apply_options(&mut create, &self.options)?;
        create.size = whole_sectors(self.target_format, size);
        create.secret = self.image.secrets.read()?.into_iter().next();
        if let (Some(path), Some(format)) = (&self.backing, self.backing_format) {
            create.backing = Some(BackingRef { path: path.clone(), format: Some(format.name().into()) });
        }
        Ok(create)
    }
}
