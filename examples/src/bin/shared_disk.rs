//! Two hosts that share a disk safely: each takes the disk's lock on a shared lease volume before it opens the disk,
//! and never writes without it. Run `host` on both at once; no increment is lost.
//!
//! ```text
//! shared_disk format LEASES IMAGE             once
//! shared_disk host   LEASES IMAGE HOST TIMES  on each host; HOST is its number, 1 or 2
//! ```

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use nacre_engine::blockfmt::{CreateOptions, Format, OpenOptions};
use nacre_engine::cluster::adapters::{LeaseDisk, LeaseVolume};
use nacre_engine::cluster::keeper::{KeeperConfig, LeaseKeeper, Lock, Resource};
use nacre_engine::cluster::lease::Timing;
use nacre_engine::cluster::lock::LockMode;
use nacre_engine::cluster::ondisk::{Geometry, Name};
use nacre_engine::cluster::types::HostId;

const PATIENCE: Duration = Duration::from_secs(120);

fn format(leases: &Path, image: &Path) -> Result<()> {
    std::fs::File::create(leases)?.set_len(4 << 20)?;
    let volume = LeaseVolume::new(LeaseDisk::open(leases, Geometry::S512)?, Name::new("pair")?, 0);
    volume.format_space(1)?;
    volume.format_resource(0, Name::new("counter")?)?;
    Ok(CreateOptions::new(Format::Qcow2, 1 << 20).create(image)?)
}

/// Adds one to the number in the disk's first bytes.
fn increment(image: &Path, lock: &Lock) -> Result<u64> {
    let disk = OpenOptions::new(Format::Qcow2).open(image)?;
    let mut number = [0; 8];
    disk.read_at(&mut number, 0)?;
    let next = u64::from_le_bytes(number) + 1;
    // The lease may have run out meanwhile: a host that was stopped and goes on must look before it writes.
    ensure!(lock.is_held(), "The lease was lost; nothing was written");
    disk.write_at(&next.to_le_bytes(), 0)?;
    disk.flush()?;
    disk.close()?;
    Ok(next)
}

fn host(leases: &Path, image: &Path, host: u16, times: u32) -> Result<()> {
    let name = Name::new(&format!("host-{host}"))?;
    let config = KeeperConfig {
        // Short, so that the example is quick; the default survives 80 s without the volume.
        timing: Timing { io_timeout: 1, watchdog: 10 },
        ..KeeperConfig::new(leases, Name::new("pair")?, HostId(host), name)
    };
    let keeper = LeaseKeeper::open(config)?;
    keeper.wait_held(PATIENCE)?;
    let disk = Resource { index: 0, name: Name::new("counter")? };
    for _ in 0..times {
        let lock = keeper.lock(disk, LockMode::Exclusive, PATIENCE)?;
        println!("host {host} wrote {} under token {}", increment(image, &lock)?, lock.token().lver);
        lock.release()?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["format", leases, image] => format(leases.as_ref(), image.as_ref()),
        ["host", leases, image, number, times] => {
            host(leases.as_ref(), image.as_ref(), number.parse()?, times.parse()?)
        }
        _ => bail!("usage: shared_disk format LEASES IMAGE | host LEASES IMAGE HOST TIMES"),
    }
}
