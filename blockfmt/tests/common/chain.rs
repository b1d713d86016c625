//! A chain of images that a guest and jobs use.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

use super::{Rng, assert_same, exercise, qemu_ok, text};
use blockfmt::format::qcow2::Qcow2Options;
use blockfmt::job::JobControl;
use blockfmt::{CreateOptions, Disk, Format, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub const SIZE: u64 = 4 << 20;

/// A disk over several images, with a model of its contents.
pub struct Chain {
    pub dir: tempfile::TempDir,
    pub disk: Disk,
    pub model: Vec<u8>,
    pub rng: Rng,
}

impl Chain {
    /// A raw base and `depth` qcow2 layers on top, each with contents of its own.
    pub fn new(seed: u64, depth: usize) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut rng = Rng(seed);
        let mut model = rng.bytes(SIZE as usize);
        model[1 << 20..2 << 20].fill(0);
        std::fs::write(dir.path().join("0"), &model).unwrap();
        let options = CreateOptions::new(Format::Qcow2, SIZE).backing("0", Format::Raw);
        options.create(&dir.path().join("1")).unwrap();
        let disk = OpenOptions::new(Format::Qcow2).open(dir.path().join("1")).unwrap();
        let mut chain = Chain { dir, disk, model, rng };
        chain.exercise(40);
        for n in 2..=depth {
            let extended_l2 = [Some(true), Some(false), None][n % 3];
            let qcow2 = Qcow2Options { extended_l2, ..Qcow2Options::default() };
            let options = CreateOptions::new(Format::Qcow2, 0).qcow2(qcow2);
            chain.disk.snapshot(&chain.at(n), &options).unwrap();
            chain.exercise(40);
        }
        chain
    }

    pub fn at(&self, n: usize) -> PathBuf {
        self.dir.path().join(n.to_string())
    }

    pub fn exercise(&mut self, requests: usize) {
        exercise(&self.disk, &mut self.model, &mut self.rng, requests);
    }

    /// Runs a job while another thread keeps using the disk.
    pub fn busy<R: Send>(&mut self, job: impl FnOnce(&Disk) -> R + Send) -> R {
        let disk = self.disk.clone();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (done, disk) = (&done, &disk);
            let job = scope.spawn(move || {
                let result = job(disk);
                done.store(true, Ordering::Release);
                result
            });
            while !done.load(Ordering::Acquire) {
                exercise(disk, &mut self.model, &mut self.rng, 5);
            }
            job.join().unwrap()
        })
    }

    /// Checks contents now and after opening the file again, and what QEMU thinks.
    pub fn verify(self, top: &Path, layers: usize) {
        assert_same(&self.disk, &self.model);
        assert_eq!(self.disk.layers().len(), layers);
        drop(self.disk);
        for entry in std::fs::read_dir(self.dir.path()).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if name != "0" && path.extension().is_none() {
                qemu_ok("qemu-img", &["check", "-f", "qcow2", text(&path)]);
            }
        }
        let disk = OpenOptions::new(Format::Qcow2).open(top).unwrap();
        assert_eq!(disk.layers().len(), layers);
        assert_same(&disk, &self.model);
        drop(disk);
        let raw = top.with_extension("view");
        qemu_ok("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(top), text(&raw)]);
        assert!(std::fs::read(raw).unwrap() == self.model, "QEMU sees something else");
    }
}

/// A control that cancels its own job after some bytes.
pub fn cancelling(stop_at: u64) -> Arc<JobControl> {
    Arc::new_cyclic(|weak: &std::sync::Weak<JobControl>| {
        let weak = weak.clone();
        JobControl::new().on_progress(move |progress| {
            if progress.done > stop_at
                && let Some(control) = weak.upgrade()
            {
                control.cancel();
            }
        })
    })
}
