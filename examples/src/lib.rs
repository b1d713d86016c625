//! What several examples share: a small guest out of a Linux kernel, busybox and a shell script.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use nacre_engine::vmm_core::machine::VmConfig;

/// Mounts what a script needs and loads the virtio modules of the initrd.
const PROLOGUE: &str = "#!/bin/sh
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
while read -r m; do insmod \"/modules/$m\"; done </modules/order 2>/dev/null
exec </dev/null >/dev/ttyS0 2>&1
";

/// Switches off, without cards that may send meanwhile: see `tests/guest/rootfs/etc/rc`.
const EPILOGUE: &str = "for d in /sys/class/net/eth*; do ip link set ${d##*/} down; done 2>/dev/null
poweroff -f
";

/// A machine of 128 MiB that runs a shell script instead of booting a distribution, and then switches itself off.
/// `images` holds the kernel and the initrd that `tests/guest/make-image` makes; `work` gets the script's initrd.
pub fn script_guest(images: &Path, work: &Path, name: &str, script: &str) -> Result<VmConfig> {
    let mut config = VmConfig::default();
    config.memory.size = 128 << 20;
    config.boot.kernel = images.join("vmlinuz");
    config.boot.initrd = Some(initrd_with_script(&images.join("initrd"), work, name, script)?);
    config.boot.command_line = "console=ttyS0 loglevel=1 cryptomgr.notests rdinit=/script".into();
    Ok(config)
}

/// The kernel unpacks archives one over the other, so a script is added by appending an archive with one file.
fn initrd_with_script(initrd: &Path, work: &Path, name: &str, script: &str) -> Result<PathBuf> {
    let path = work.join(format!("{name}.initrd"));
    let script = format!("{PROLOGUE}{script}\n{EPILOGUE}");
    let mut archive = std::fs::read(initrd)
        .with_context(|| format!("Cannot read {}; make it with tests/guest/make-image", initrd.display()))?;
    archive.resize(archive.len().next_multiple_of(4), 0);
    entry(&mut archive, "script", 0o100_755, script.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    std::fs::File::create(&path)?.write_all(&archive)?;
    Ok(path)
}

/// One file of a cpio archive in the "newc" format (initramfs buffer format, Linux documentation).
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let fields = [1, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    archive.extend(b"070701");
    fields.iter().for_each(|field| archive.extend(format!("{field:08x}").bytes()));
    archive.extend(name.bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(data);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// What a guest printed on its serial port, up to a limit. Clones share it; give one to `VmBuilder::serial_output`.
#[derive(Clone, Default)]
pub struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    /// A guest cannot fill the host's memory by printing: what exceeds this many bytes is dropped.
    pub const LIMIT: usize = 1 << 20;

    /// The function that takes the guest's bytes.
    pub fn sink(&self) -> impl Fn(&[u8]) + Send + Sync + 'static {
        let bytes = self.0.clone();
        move |data| {
            let mut bytes = bytes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let room = Self::LIMIT - bytes.len();
            bytes.extend(&data[..data.len().min(room)]);
        }
    }

    /// The text so far, with Unix line ends.
    pub fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        String::from_utf8_lossy(&bytes).replace("\r\n", "\n")
    }
}
