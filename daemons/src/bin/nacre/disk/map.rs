//! Where a disk's bytes are.

use super::common::{Image, Output, parse_size, print_json};
use anyhow::Result;
use blockfmt::{Disk, Format, Source};
use clap::Args;
use serde_json::json;
use std::process::ExitCode;

/// List where the disk's bytes are.
///
/// JSON has the keys of qemu-img: "depth" is the number of the image in the chain that decides, from 0; "present" is
/// false for what no image holds; "offset" is the place in the file of that image, of bytes that are there as they are.
#[derive(Args)]
#[command(after_help = "Examples:
  nacre disk map -f qcow2 --output=json disk.qcow2
  nacre disk map -f qcow2 --start-offset=1G --max-length=64M disk.qcow2")]
pub struct Map {
    #[command(flatten)]
    image: Image,
    /// First byte of the disk that is listed (suffixes K, M, G, T).
    #[arg(short, long, value_name = "OFFSET", default_value = "0", value_parser = parse_size)]
    start_offset: u64,
    /// Most bytes that are listed [default: up to the end].
    #[arg(short = 'l', long, value_name = "LENGTH", value_parser = parse_size)]
    max_length: Option<u64>,
    #[command(flatten)]
    output: Output,
}

/// Neighbouring bytes of one kind.
#[derive(Clone)]
struct Run {
    start: u64,
    length: u64,
    kind: Kind,
    /// The data file of the image, and the offset in it, if they are there as they are.
    place: Option<(u32, u64)>,
}

#[derive(Clone, Copy, PartialEq)]
struct Kind {
    depth: usize,
    present: bool,
    data: bool,
    compressed: bool,
}

impl Run {
    /// The bytes at `start`, of at most `len`.
    fn at(disk: &Disk, start: u64, len: u64) -> Result<Self> {
        let layers = disk.layers();
        let (extent, holder) = disk.map(start, len)?;
        let zero = matches!(extent.source, Source::Zero { .. } | Source::Below);
        let (depth, present) = match holder {
            None => (layers.len() - 1, false),
            // Below a disk that is larger than its parent there is nothing.
            Some(depth) if zero && start >= layers[depth].size() => (depth.saturating_sub(1), false),
            Some(depth) => (depth, true),
        };
        let place = match extent.source {
            Source::Data { file, offset } => Some((file, offset)),
            // A hole has its place, too.
            _ if present && layers[depth].format() == Format::Raw => Some((0, start)),
            _ => None,
        };
        let compressed = extent.source == Source::Opaque { compressed: true };
        let kind = Kind { depth, present, data: !zero, compressed };
        Ok(Run { start, length: extent.len, kind, place })
    }

    /// Whether `next` continues this one, also in the file.
    fn continues(&self, next: &Run) -> bool {
        self.kind == next.kind && self.place.map(|(file, offset)| (file, offset + self.length)) == next.place
    }
}

pub fn map(args: Map) -> Result<ExitCode> {
    let disk = args.image.open(true)?;
    let end = args.max_length.map_or(disk.size(), |len| args.start_offset.saturating_add(len));
    let end = end.min(disk.size());
    let mut runs: Vec<Run> = Vec::new();
    let mut start = args.start_offset;
    while start < end {
        let run = Run::at(&disk, start, end - start)?;
        start += run.length;
        match runs.last_mut() {
            Some(last) if last.continues(&run) => last.length += run.length,
            _ => runs.push(run),
        }
    }
    match args.output.json() {
        true => print_json(&runs.iter().map(describe).collect::<Vec<_>>())?,
        false => print(&disk, &runs),
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(run: &Run) -> serde_json::Value {
    let Kind { depth, present, data, compressed } = run.kind;
    let mut value = json!({
        "start": run.start, "length": run.length, "depth": depth, "present": present,
        "zero": !data, "data": data, "compressed": compressed,
    });
    if let Some((_, offset)) = run.place {
        value["offset"] = offset.into();
    }
    value
}

fn print(disk: &Disk, runs: &[Run]) {
    daemons::outln!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to");
    let layers = disk.layers();
    for run in runs.iter().filter(|run| run.kind.data) {
        let layer = &layers[run.kind.depth];
        let (place, file) = match run.place {
            Some((file, offset)) => (format!("{offset:#x}"), layer.data_file(file)),
            None if run.kind.compressed => ("compressed".into(), layer.storage()),
            None => ("encrypted".into(), layer.storage()),
        };
        let name = file.name();
        daemons::outln!(
            "{:<16}{:<16}{place:<16}{name}",
            format!("{:#x}", run.start),
            format!("{:#x}", run.length)
        );
    }
}
