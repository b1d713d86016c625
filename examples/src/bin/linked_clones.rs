//! Disposable runners: every job gets a machine of its own on a linked clone of one base disk, and the clone is thrown
//! away afterwards: `linked_clones IMAGES COMMAND...`. The base is never written.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use examples::{Output, script_guest};
use nacre_engine::blockfmt::{CreateOptions, Format};
use nacre_engine::vmm_core::machine::{StopReason, Vm};

/// Runs a command in a clone's root file system; returns what it printed and how large the clone became.
fn job(images: &Path, work: &Path, name: &str, command: &str) -> Result<(String, u64)> {
    let (base, clone) = (images.join("base.raw"), work.join(format!("{name}.qcow2")));
    let size = std::fs::metadata(&base).context("Make base.raw with tests/guest/make-image rootfs")?.len();
    let parent = base.canonicalize()?;
    CreateOptions::new(Format::Qcow2, size).backing(parent.to_string_lossy(), Format::Raw).create(&clone)?;

    let quoted = command.replace('\'', r"'\''");
    let script = format!(
        "mount -o rw /dev/vda /mnt && mount -t devtmpfs dev /mnt/dev && echo BEGIN && busybox chroot /mnt sh -c '{quoted}' && echo END; umount /mnt/dev /mnt"
    );
    let mut config = script_guest(images, work, name, &script)?;
    config.disks.push(serde_json::from_value(
        serde_json::json!({"path": clone, "format": "qcow2", "allow": [parent.parent()]}),
    )?);
    let output = Output::default();
    let vm = Vm::builder(config).serial_output(output.sink()).build()?;
    vm.start()?;
    let reason = vm.wait();
    drop(vm); // closes the clone
    let text = output.text();
    let body = text.split_once("BEGIN\n").and_then(|(_, rest)| rest.split_once("END\n"));
    ensure!(reason == StopReason::PowerOff && body.is_some(), "{name} failed ({reason:?}):\n{text}");
    let written = std::fs::metadata(&clone)?.len();
    std::fs::remove_file(&clone)?;
    Ok((body.unwrap_or_default().0.to_owned(), written))
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let images = arguments.next().context("usage: linked_clones IMAGES COMMAND...")?;
    let work = std::env::temp_dir().join(format!("linked-clones-{}", std::process::id()));
    std::fs::create_dir_all(&work)?;
    let results = std::thread::scope(|scope| {
        let (images, work) = (Path::new(&images), work.as_path());
        let threads: Vec<_> = arguments
            .enumerate()
            .map(|(i, command)| scope.spawn(move || job(images, work, &format!("runner-{i}"), &command)))
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a job does not panic")).collect::<Vec<_>>()
    });
    std::fs::remove_dir_all(&work)?;
    for (i, result) in results.into_iter().enumerate() {
        let (text, written) = result?;
        print!("runner-{i} (its clone grew to {} KiB):\n{text}", written >> 10);
    }
    Ok(())
}
