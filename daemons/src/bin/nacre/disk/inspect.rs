//! Commands that tell about images.

use super::common::{Image, Output, Secrets, Work, apply_options, policy, print_json};
use super::progress::human;
use anyhow::{Context, Result};
use blockfmt::format::check::{CheckReport, Repair};
use blockfmt::job::{self, Comparison};
use blockfmt::{CreateOptions, Format, OpenOptions};
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;

/// Tell about an image.
#[derive(Args)]
#[command(after_help = "Example:\n  nacre disk info -f qcow2 --backing-chain disk.qcow2")]
pub struct Info {
    #[command(flatten)]
    image: Image,
    /// Tell about the images below it, too.
    #[arg(long)]
    backing_chain: bool,
    #[command(flatten)]
    output: Output,
}

pub fn info(args: Info) -> Result<ExitCode> {
    let disk = args.image.options(true)?.backing(args.backing_chain).open(&args.image.path);
    let disk = disk.with_context(|| format!("Cannot open {}", args.image.path.display()))?;
    let mut list = Vec::new();
    for layer in disk.layers() {
        let mut value = serde_json::to_value(layer.info()?)?;
        if let Some(backing) = layer.backing() {
            // The names that qemu-img has for them.
            value["backing-filename"] = backing.path.into();
            value["backing-filename-format"] = backing.format.into();
        }
        if let Some(qcow2) = layer.as_qcow2() {
            let snapshots = qcow2.snapshots()?;
            if !snapshots.is_empty() {
                value["snapshots"] = serde_json::to_value(snapshots)?;
            }
        }
        list.push((layer.info()?, value));
    }
    if args.output.json() {
        let values: Vec<_> = list.into_iter().map(|(_, value)| value).collect();
        match (args.backing_chain, values.as_slice()) {
            (false, [one]) => print_json(one)?,
            _ => print_json(&values)?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    for (info, value) in list {
        daemons::outln!("image: {}", info.filename);
        daemons::outln!("file format: {}", info.format);
        daemons::outln!("virtual size: {} ({} bytes)", human(info.virtual_size), info.virtual_size);
        daemons::outln!("disk size: {}", human(info.actual_size));
        if let Some(size) = info.cluster_size {
            daemons::outln!("cluster_size: {size}");
        }
        if let Some(backing) = info.backing {
            daemons::outln!("backing file: {}", backing.path);
            daemons::outln!("backing file format: {}", backing.format.as_deref().unwrap_or("not named"));
        }
        if let Some(data) = info.format_specific["data"].as_object() {
            daemons::outln!("Format specific information:");
            data.iter().for_each(|(key, value)| daemons::outln!("    {}: {value}", key.replace('-', " ")));
        }
        for s in value["snapshots"].as_array().into_iter().flatten() {
            daemons::outln!(
                "snapshot {}: {}",
                s["id"].as_str().unwrap_or(""),
                s["name"].as_str().unwrap_or("")
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Check the consistency of an image.
///
/// Exit codes: 0 consistent, 1 the check failed, 2 corrupt, 3 clusters leak, 63 the format has no check.
#[derive(Args)]
#[command(after_help = "Example:\n  nacre disk check -f qcow2 -r leaks disk.qcow2")]
pub struct Check {
    #[command(flatten)]
    image: Image,
    /// Repair: "leaks" or "all".
    #[arg(short, long, value_parser = ["leaks", "all"])]
    repair: Option<String>,
    #[command(flatten)]
    output: Output,
}

/// Repair an image: the same as `check -r all`.
#[derive(Args)]
#[command(after_help = "Example:\n  nacre disk repair -f qcow2 disk.qcow2")]
pub struct RepairArgs {
    #[command(flatten)]
    image: Image,
    #[command(flatten)]
    output: Output,
}

pub fn repair(args: RepairArgs) -> ExitCode {
    check(Check { image: args.image, repair: Some("all".into()), output: args.output })
}

pub fn check(args: Check) -> ExitCode {
    if !matches!(args.image.format, Format::Qcow2 | Format::Vhdx) {
        eprintln!("nacre: Format {} has nothing to check", args.image.format);
        return ExitCode::from(63);
    }
    match try_check(&args) {
        Ok(report) if report.corruptions > 0 => ExitCode::from(2),
        Ok(report) if report.leaks > 0 => ExitCode::from(3),
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nacre: {}", daemons::describe(&error));
            ExitCode::FAILURE
        }
    }
}

fn try_check(args: &Check) -> Result<CheckReport> {
    let repair = match args.repair.as_deref() {
        None => Repair::Nothing,
        Some("leaks") => Repair::Leaks,
        Some(_) => Repair::All,
    };
    let read_only = repair == Repair::Nothing;
    let options = args.image.options(read_only)?.repair(true);
    let options = if read_only { options.backing(false) } else { options };
    let disk = options.open(&args.image.path);
    let disk = disk.with_context(|| format!("Cannot open {}", args.image.path.display()))?;
    let layer = disk.layers().remove(0);
    let report = layer.check(repair)?;
    if args.output.json() {
        print_json(&report)?;
        return Ok(report);
    }
    report.findings.iter().for_each(|finding| daemons::outln!("{finding}"));
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        daemons::outln!(
            "Repaired {} corruptions and {} leaks.",
            report.corruptions_fixed,
            report.leaks_fixed
        );
    }
    match report.is_clean() {
        true => daemons::outln!("No errors were found on the image."),
        false => daemons::outln!("{} corruptions, {} leaked clusters.", report.corruptions, report.leaks),
    }
    daemons::outln!(
        "{}/{} clusters allocated, {} fragmented, {} compressed; the image ends at {}",
        report.allocated_clusters,
        report.total_clusters,
        report.fragmented_clusters,
        report.compressed_clusters,
        report.image_end_offset
    );
    Ok(report)
}

/// Compare the contents of two disks.
///
/// Exit codes: 0 identical, 1 different, 2 the comparison failed.
#[derive(Args)]
#[command(after_help = "Example:\n  nacre disk compare -f qcow2 -F raw disk.qcow2 disk.raw")]
pub struct Compare {
    /// Format of the first image.
    #[arg(short, long, value_name = "FORMAT")]
    format: Format,
    /// Format of the second image.
    #[arg(short = 'F', long, value_name = "FORMAT")]
    second_format: Format,
    /// Sizes must be equal, too.
    #[arg(short, long)]
    strict: bool,
    /// Let the images name files outside of their own directories.
    #[arg(long)]
    trust_headers: bool,
    #[command(flatten)]
    secrets: Secrets,
    #[command(flatten)]
    work: Work,
    /// The images.
    first: PathBuf,
    second: PathBuf,
}

pub fn compare(args: Compare) -> ExitCode {
    match try_compare(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("nacre: {}", daemons::describe(&error));
            ExitCode::from(2)
        }
    }
}

fn try_compare(args: &Compare) -> Result<bool> {
    let open = |format, path: &PathBuf| {
        let options = OpenOptions::new(format).read_only(true).policy(policy(args.trust_headers));
        args.secrets.apply(options)?.open(path).with_context(|| format!("Cannot open {}", path.display()))
    };
    let (a, b) = (open(args.format, &args.first)?, open(args.second_format, &args.second)?);
    let result = match args.strict && a.size() != b.size() {
        true => None,
        false => Some(job::compare(&a, &b, &*args.work.control()?)?),
    };
    let (identical, text, offset) = match result {
        None => (false, "Strict mode: Image size mismatch!".to_owned(), None),
        Some(Comparison::Identical) => (true, "Images are identical.".to_owned(), None),
        Some(Comparison::Differs(at)) => (false, format!("Content mismatch at offset {at}!"), Some(at)),
    };
    match args.work.json {
        true => print_json(&json!({ "identical": identical, "offset": offset }))?,
        false => daemons::outln!("{text}"),
    }
    Ok(identical)
}

/// Tell how large the file of a converted image will be.
#[derive(Args)]
#[command(after_help = "Example:\n  nacre disk measure -f raw -O qcow2 disk.raw")]
pub struct Measure {
    #[command(flatten)]
    image: Image,
    /// Format of the new image.
    #[arg(short = 'O', long, value_name = "FORMAT")]
    target_format: Format,
    /// Options of the new format, as key=value.
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    #[command(flatten)]
    output: Output,
}

pub fn measure(args: Measure) -> Result<ExitCode> {
    let disk = args.image.open(true)?;
    let mut create = CreateOptions::new(args.target_format, disk.size());
    apply_options(&mut create, &args.options)?;
    let measure = job::measure(&disk, &create)?;
    match args.output.json() {
        true => print_json(&measure)?,
        false => {
            daemons::outln!("required size: {}", measure.required);
            daemons::outln!("fully allocated size: {}", measure.fully_allocated);
        }
    }
    Ok(ExitCode::SUCCESS)
}
