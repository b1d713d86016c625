//! A disk tool: creates, describes, reads and copies virtual disks.
//!
//! ```text
//! disk_tool create FORMAT SIZE IMAGE [BACKING-FORMAT BACKING]
//! disk_tool info   FORMAT IMAGE
//! disk_tool copy   FORMAT IMAGE FORMAT COPY
//! ```

use anyhow::{Result, bail};
use nacre_engine::blockfmt::job::{ConvertOptions, JobControl, Progress, convert};
use nacre_engine::blockfmt::{CreateOptions, Disk, Format, OpenOptions, Source};

fn info(disk: &Disk) -> Result<()> {
    println!("{} bytes in {} layers", disk.size(), disk.layers().len());
    let (mut offset, mut data) = (0, 0);
    while offset < disk.size() {
        let (extent, _layer) = disk.map(offset, disk.size() - offset)?;
        // What no layer has reads as zeros.
        if !matches!(extent.source, Source::Zero { .. } | Source::Below) {
            data += extent.len;
        }
        offset += extent.len;
    }
    println!("{data} bytes of data, {} bytes of zeros", disk.size() - data);
    Ok(())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["create", format, size, image] => {
            CreateOptions::new(format.parse()?, size.parse()?).create(image.as_ref())?;
        }
        ["create", format, size, image, backing_format, backing] => {
            let backing_format: Format = backing_format.parse()?;
            CreateOptions::new(format.parse()?, size.parse()?)
                .backing(backing, backing_format)
                .create(image.as_ref())?;
        }
        ["info", format, image] => {
            info(&OpenOptions::new(format.parse()?).read_only(true).open(image)?)?;
        }
        ["copy", format, image, target_format, target] => {
            let source = OpenOptions::new(format.parse()?).read_only(true).open(image)?;
            let target_format: Format = target_format.parse()?;
            CreateOptions::new(target_format, source.size()).create(target.as_ref())?;
            let target = OpenOptions::new(target_format).open(target)?;
            let control = JobControl::new().on_progress(|Progress { done, total }| {
                eprint!("\r{:3} %", done * 100 / total.max(1));
            });
            convert(&source, &target, ConvertOptions::default(), &control)?;
            target.close()?;
            eprintln!();
        }
        _ => bail!("usage: disk_tool create|info|copy ..."),
    }
    Ok(())
}
