//! Differencing disks of VHD and VHDX: against a model, libvhdi and chains of mixed formats.
#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

use super::{Rng, assert_same, exercise, text};
use blockfmt::job::{self, JobControl};
use blockfmt::{CreateOptions, Disk, Format, OpenOptions};
use std::path::Path;
use std::process::Command;

/// A format with differencing disks.
pub struct Family {
    pub format: Format,
    /// Options of a dynamic image.
    pub create: fn() -> CreateOptions,
    /// Panics if QEMU sees something else in a file.
    pub assert_qemu_sees: fn(&Path, &[u8]),
    /// Panics unless an image is sound.
    pub assert_clean: fn(&Disk),
}

/// What libvhdi reads from a chain, the child first.
pub fn libvhdi_view(chain: &[&Path]) -> Vec<u8> {
    let script = "\
import sys, pyvhdi
files = [pyvhdi.file() for _ in sys.argv[1:]]
for f, name in zip(files, sys.argv[1:]): f.open(name)
for child, parent in zip(files, files[1:]): child.set_parent(parent)
sys.stdout.buffer.write(files[0].read_buffer(files[0].get_media_size()))";
    let output = Command::new("/usr/bin/python3").args(["-c", script]).args(chain).output();
    let output = output.expect("cannot run python3; install the Debian packages python3 and python3-libvhdi");
    assert!(
        output.status.success(),
        "libvhdi failed (is the Debian package python3-libvhdi installed?): {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// Random writes and zeroing of whole units of 4 KiB: libvhdi takes the eight sectors of a bitmap's byte for
/// one unit, so that finer changes read differently there.
fn change_units(disk: &Disk, model: &mut [u8], rng: &mut Rng) {
    for n in 0..40 {
        let units = model.len() as u64 / 4096;
        let first = rng.below(units);
        let len = (1 + rng.below(if n % 4 == 0 { 800 } else { 9 })).min(units - first) * 4096;
        let range = (first * 4096) as usize..(first * 4096 + len) as usize;
        if n % 3 == 0 {
            disk.write_zeroes(first * 4096, len, true).unwrap();
            model[range].fill(0);
        } else {
            let data = rng.bytes(len as usize);
            disk.write_at(&data, first * 4096).unwrap();
            model[range].copy_from_slice(&data);
        }
    }
}

impl Family {
    fn open(&self, path: &Path) -> Disk {
        OpenOptions::new(self.format).open(path).unwrap()
    }

    /// A base, a child and a grandchild that names it by its absolute path, as libvhdi and we see them.
    pub fn agrees_with_libvhdi(&self) {
        self.agrees_with(true, libvhdi_view);
    }

    /// The same as another program and we see them; `view` is what it reads from a chain, the child first.
    pub fn agrees_with(&self, absolute: bool, view: impl Fn(&[&Path]) -> Vec<u8>) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let at = |name: &str| dir.path().join(name);
        (self.create)().create(&at("base")).unwrap();
        let mut rng = Rng(70);
        let mut model = rng.bytes((self.create)().size as usize);
        self.open(&at("base")).write_at(&model, 0).unwrap();
        (self.create)().backing("base", self.format).create(&at("mid")).unwrap();
        change_units(&self.open(&at("mid")), &mut model, &mut rng);
        let name = if absolute { text(&at("mid")).to_owned() } else { "mid".to_owned() };
        (self.create)().backing(name, self.format).create(&at("top")).unwrap();
        let disk = self.open(&at("top"));
        assert_eq!(disk.layers().len(), 3);
        change_units(&disk, &mut model, &mut rng);
        (self.assert_clean)(&disk);
        drop(disk);
        let seen = view(&[&at("top"), &at("mid"), &at("base")]);
        assert_eq!(seen.len(), model.len());
        if let Some(at) = seen.iter().zip(&model).position(|(a, b)| a != b) {
            panic!("the other program sees {} instead of {} at byte {at}", seen[at], model[at]);
        }
        // Zeros in the child hide both ancestors, in blocks that have space and in blocks that do not.
        let disk = self.open(&at("top"));
        for (offset, len) in [(700, 5), (511, 1026), (3 << 20, 512), ((5 << 20) + 100, 3 << 20)] {
            disk.write_zeroes(offset, len, true).unwrap();
            model[offset as usize..(offset + len) as usize].fill(0);
        }
        assert_same(&disk, &model);
        exercise(&disk, &mut model, &mut rng, 60);
        drop(disk);
        assert_same(&self.open(&at("top")), &model);
    }

    /// Chains with raw and qcow2 images between and below, merged and flattened in the end.
    pub fn mixes_and_merges(&self) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut rng = Rng(80);
        let size = (self.create)().size;
        let mut model = rng.bytes(size as usize);
        std::fs::write(at("base"), &model).unwrap();
        (self.create)().backing("base", Format::Raw).create(&at("a")).unwrap();
        exercise(&self.open(&at("a")), &mut model, &mut rng, 40);
        CreateOptions::new(Format::Qcow2, size).backing("a", self.format).create(&at("b")).unwrap();
        exercise(&OpenOptions::new(Format::Qcow2).open(at("b")).unwrap(), &mut model, &mut rng, 40);
        (self.create)().backing("b", Format::Qcow2).create(&at("c")).unwrap();
        let disk = self.open(&at("c"));
        exercise(&disk, &mut model, &mut rng, 40);
        disk.snapshot(&at("d"), &(self.create)()).unwrap();
        exercise(&disk, &mut model, &mut rng, 40);
        assert_same(&disk, &model);
        drop(disk);
        let disk = self.open(&at("d"));
        assert_eq!(disk.layers().len(), 5);
        assert_same(&disk, &model);
        // Merge the top into its parent, go on, and flatten the rest.
        job::commit(&disk, 0, &JobControl::new()).unwrap();
        assert_same(&disk, &model);
        drop(disk);
        let disk = self.open(&at("c"));
        assert_same(&disk, &model);
        job::stream(&disk, 0, None, &JobControl::new()).unwrap();
        assert_eq!(disk.layers().len(), 1);
        assert_same(&disk, &model);
        (self.assert_clean)(&disk);
        drop(disk);
        (self.assert_qemu_sees)(&at("c"), &model);
    }
}
