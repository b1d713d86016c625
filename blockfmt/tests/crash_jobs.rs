//! Crashes while jobs run: what the guest flushed is there whichever layer counts as the active one, a job
//! that was acknowledged stays done, and one that was not may be started again.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::LayerOptions;
use blockfmt::format::qcow2::{Qcow2, Qcow2Options};
use blockfmt::format::vhd::Vhd;
use blockfmt::format::vhdx::{Vhdx, VhdxOptions};
use blockfmt::job::{self, ConvertOptions, JobControl, Migration, Mirror, MirrorMode};
use blockfmt::storage::{MemoryStorage, RecordingStorage};
use blockfmt::{BackingRef, CreateOptions, Disk, Format, Layer, Storage};
use common::Rng;
use common::crash::{
    History, SECTOR, SIZE, corruptions, crash, last_mark, marks, own_corruptions, rounds, sector,
};
use std::sync::{Arc, Mutex};

/// The mark of a job that was acknowledged.
const DONE: u64 = 1 << 40;
/// The mark of a disk that continues in "target".
const REDIRECTED: u64 = 1 << 41;

/// Clusters as overlays have them by default, with subclusters; bases then have none.
const OVERLAY: u64 = 128 << 10;

fn qcow2(cluster_size: u64) -> Qcow2Options {
    match cluster_size {
        OVERLAY => Qcow2Options::default().overlay(),
        _ => Qcow2Options { cluster_size: Some(cluster_size), ..Qcow2Options::default() },
    }
}

/// Files of a chain "base" <- "mid" <- "top", and another base and an empty target.
const NAMES: [&str; 5] = ["base", "mid", "top", "other", "target"];

/// The formats of "base", "mid", "top" and "other", and of "target".
#[derive(Clone, Copy)]
struct Formats {
    chain: Format,
    target: Format,
}

const QCOW2: Formats = Formats { chain: Format::Qcow2, target: Format::Qcow2 };

impl Formats {
    fn of(self, name: &str) -> Format {
        if name == "target" { self.target } else { self.chain }
    }
}

struct Rig {
    start: Vec<MemoryStorage>,
    /// What "mid" shows.
    mid: History,
    history: History,
}

fn group(images: &[MemoryStorage]) -> Vec<Arc<RecordingStorage>> {
    let named = NAMES.iter().zip(images);
    RecordingStorage::group(
        named.map(|(n, i)| ((*n).to_owned(), Arc::new(i.clone()) as Arc<dyn Storage>)).collect(),
    )
}

fn index(name: &str) -> usize {
    NAMES.iter().position(|n| *n == name).unwrap()
}

/// Opens the layers from `name` down, as the headers say.
fn layers(
    files: &[Arc<RecordingStorage>],
    name: &str,
    formats: Formats,
) -> blockfmt::Result<Vec<Arc<dyn Layer>>> {
    let mut out: Vec<Arc<dyn Layer>> = Vec::new();
    let mut next = Some(name.to_owned());
    while let Some(name) = next {
        let storage: Arc<dyn Storage> = files[index(&name)].clone();
        let options = LayerOptions::default();
        let layer: Arc<dyn Layer> = match formats.of(&name) {
            Format::Vhd => Arc::new(Vhd::open(storage, &options)?),
            Format::Vhdx => Arc::new(Vhdx::open(storage, &options)?),
            _ => Arc::new(Qcow2::open(storage, &options)?),
        };
        next = layer.backing().map(|b| b.path);
        out.push(layer);
    }
    Ok(out)
}

impl Rig {
    fn new(rng: &mut Rng, cluster_size: u64, formats: Formats) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        for (n, name) in NAMES.iter().enumerate() {
            let qcow2 = match n {
                0 | 3 if cluster_size == OVERLAY => Qcow2Options::default(),
                _ => qcow2(cluster_size),
            };
            let mut options = CreateOptions::new(formats.of(name), SIZE).qcow2(qcow2);
            options.vhd.block_size = 512 << 10;
            options.vhdx = VhdxOptions { block_size: Some(1 << 20), ..VhdxOptions::default() };
            if let Some(parent) = match n {
                1 => Some("base"),
                2 => Some("mid"),
                _ => None,
            } {
                options = options.backing(parent, formats.chain);
            }
            // A VHDX looks at the file that becomes its parent.
            options.create(&dir.path().join(name)).unwrap();
        }
        let start =
            NAMES.map(|name| MemoryStorage::from_bytes(&std::fs::read(dir.path().join(name)).unwrap()));
        let files = group(&start);
        let filled = SIZE / SECTOR as u64 * 3 / 4;
        let mut history = History::new(filled);
        let base = Disk::from_layers(layers(&files, "base", formats).unwrap(), false).unwrap();
        base.write_at(&(1..=filled).flat_map(sector).collect::<Vec<_>>(), 0).unwrap();
        drop(base);
        let other = Disk::from_layers(layers(&files, "other", formats).unwrap(), false).unwrap();
        other.write_at(&rng.bytes(SIZE as usize / 2), SIZE / 4).unwrap();
        drop(other);
        let mut mid = history.present();
        for name in ["mid", "top"] {
            let disk = Disk::from_layers(layers(&files, name, formats).unwrap(), false).unwrap();
            history.run(&disk, None, rng, 20);
            disk.close().unwrap();
            if name == "mid" {
                mid = history.present();
            }
        }
        history.settle();
        // The recorders share what they wrap only by name: take the contents out.
        let start = files.iter().map(image).collect();
        Rig { start, mid, history }
    }
}

fn image(file: &Arc<RecordingStorage>) -> MemoryStorage {
    let file: &dyn Storage = &**file;
    let mut bytes = vec![0; file.length().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    MemoryStorage::from_bytes(&bytes)
}

/// A job: the files, the disk that is in use, and the control.
type Run = fn(&[Arc<RecordingStorage>], &Disk, &JobControl) -> blockfmt::Result<()>;

#[derive(Clone, Copy)]
struct Scenario {
    name: &'static str,
    run: Run,
    /// The active image once the job is done.
    after: &'static str,
    /// Whether the guest writes while the job runs.
    busy: bool,
    /// Whether "target" holds the contents of the start when the job is done.
    copies: bool,
    /// Whether the job makes "target" itself and redirects the disk there.
    redirects: bool,
    /// Whether it takes the disk back to what "mid" holds.
    reverts: bool,
    formats: Formats,
}

impl Scenario {
    /// A job on qcow2 images beside a busy guest, which leaves "top" the active image.
    const fn new(name: &'static str, run: Run) -> Self {
        Scenario {
            name,
            run,
            after: "top",
            busy: true,
            copies: false,
            redirects: false,
            reverts: false,
            formats: QCOW2,
        }
    }

    const fn after(self, after: &'static str) -> Self {
        Scenario { after, ..self }
    }

    fn check(&self, seed: u64, cluster_size: u64) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut rng = Rng(seed);
        let formats = self.formats;
        let Rig { mut start, mid, history } = Rig::new(&mut rng, cluster_size, formats);
        if self.redirects {
            start[index("target")] = MemoryStorage::new();
        }
        let original = history.contents();
        let files = group(&start);
        let disk = Disk::from_layers(layers(&files, "top", formats).unwrap(), false).unwrap();
        let guest = Arc::new(Mutex::new((history, Rng(seed + 1000))));
        let control = JobControl::new().on_progress({
            let (guest, disk, record, busy) = (guest.clone(), disk.clone(), files[0].clone(), self.busy);
            move |progress| {
                // Only once the job has begun to look, and never from two of its threads at once.
                if busy
                    && progress.done > 0
                    && let Ok(mut guest) = guest.try_lock()
                {
                    let (history, rng) = &mut *guest;
                    history.run(&disk, Some(&record), rng, 6);
                }
            }
        });
        (self.run)(&files, &disk, &control).unwrap();
        assert_eq!(self.after, disk.layers()[0].storage().name(), "{}", self.name);
        drop(control); // with its handle to the disk
        files[0].mark(DONE);
        let mut guest = guest.lock().unwrap();
        let (history, guest_rng) = &mut *guest;
        if self.reverts {
            history.becomes(&mid);
            history.marks += 1;
            files[0].mark(history.marks);
        }
        history.run(&disk, Some(&files[0]), guest_rng, 15);
        drop(disk);

        let events = files[0].group_events();
        for round in 0..rounds(60) {
            let at = rng.below(events.len() as u64 + 1) as usize;
            let marks = || marks(&events[..at]).rev();
            let done = marks().any(|m| m == DONE);
            let redirected = marks().any(|m| m == REDIRECTED);
            let mark = marks().find(|m| *m < DONE).unwrap_or(0);
            let images = crash(&start, &events, at, &mut rng);
            let what = format!(
                "{} (seed {seed}, clusters of {cluster_size}), crash {round} at event {at} of {} ({})",
                self.name,
                events.len(),
                if done { "done" } else { "not done" }
            );
            let ask_qemu = round % 10 == 0;
            if ask_qemu {
                // It opens the backing files, too.
                for (name, image) in NAMES.iter().zip(&images) {
                    std::fs::write(dir.path().join(name), image.to_vec()).unwrap();
                }
            }
            for (name, image) in NAMES.iter().zip(&images) {
                let exists = *name != "target" || !self.redirects || redirected;
                if formats.of(name) == Format::Qcow2 && exists {
                    let found = own_corruptions(image);
                    let theirs = if ask_qemu { corruptions(image, dir.path()) } else { None };
                    assert!(
                        found.is_empty() && theirs.is_none(),
                        "{what}: {name}: {found:?}, qemu-img: {theirs:?}"
                    );
                }
            }
            let survivors = group(&images);
            let active = match (done, redirected) {
                (true, _) => self.after,
                (false, true) => "target",
                (false, false) => "top",
            };
            let open =
                |name| Disk::from_layers(layers(&survivors, name, formats).expect(&what), false).unwrap();
            let disk = open(active);
            history.check(&disk, mark, &what);
            if done && self.copies {
                let mut seen = vec![0; SIZE as usize];
                open("target").read_at(&mut seen, 0).expect(&what);
                assert!(seen == original, "{what}: the copy is not what was copied");
            }
            if !done && !self.reverts && round % 4 == 0 {
                // Start it again; it changes nothing that the guest sees.
                let mut before = vec![0; SIZE as usize];
                disk.read_at(&mut before, 0).unwrap();
                match (self.run)(&survivors, &disk, &JobControl::new()) {
                    Ok(()) => {}
                    // The last step of the job had been made; there is nothing left to merge.
                    Err(blockfmt::Error::InvalidOption(_)) => {}
                    Err(error) => panic!("{what}: {error:?}"),
                }
                let mut after = vec![0; SIZE as usize];
                disk.read_at(&mut after, 0).unwrap();
                assert!(before == after, "{what}: the second run changed the disk");
            }
        }
    }
}

fn target(files: &[Arc<RecordingStorage>], format: Format) -> blockfmt::Result<Disk> {
    Disk::from_layers(layers(files, "target", Formats { target: format, ..QCOW2 })?, false)
}

/// Makes "target" a child of `parent`, with clusters as the active layer's.
fn new_target(
    files: &[Arc<RecordingStorage>],
    disk: &Disk,
    parent: &str,
) -> blockfmt::Result<Arc<dyn Layer>> {
    let file = files[index("target")].clone();
    let options = CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2(disk.layers()[0].cluster_size()));
    options.backing(parent, Format::Qcow2).create_on(file.clone())?;
    Ok(Arc::new(Qcow2::open(file, &LayerOptions::default())?))
}

#[test]
fn merging() {
    let active =
        Scenario::new("commit of the active layer", |_, disk, control| job::commit(disk, 0, control));
    active.after("mid").check(1, 65536);
    active.after("mid").check(2, 4096);
    active.after("mid").check(5, OVERLAY);
    let inner = Scenario::new("commit of an inner layer", |_, disk, control| job::commit(disk, 1, control));
    inner.check(3, 65536);
    inner.check(4, 512);
    inner.check(6, OVERLAY);
    let all = Scenario::new("commit of two layers", |_, disk, control| job::commit_into(disk, 2, control));
    all.after("base").check(7, 65536);
    all.after("base").check(8, OVERLAY);
}

#[test]
fn pulling() {
    let all = Scenario::new("stream", |_, disk, control| job::stream(disk, 0, None, control));
    all.check(11, 65536);
    all.check(12, 4096);
    all.check(15, OVERLAY);
    let part = Scenario::new("stream of a part", |_, disk, control| job::stream(disk, 0, Some(2), control));
    part.check(13, 16384);
    part.check(16, OVERLAY);
    let rebase = Scenario::new("rebase", |files, disk, control| {
        let new = layers(files, "other", QCOW2)?;
        let reference = BackingRef { path: "other".into(), format: Some("qcow2".into()) };
        job::rebase(disk, &new, Some(&reference), control)
    });
    rebase.check(14, 16384);
    rebase.check(17, OVERLAY);
}

#[test]
fn merging_and_pulling_in_vhdx() {
    let formats = Formats { chain: Format::Vhdx, ..QCOW2 };
    let commit = Scenario::new("commit of the active VHDX", |_, disk, control| job::commit(disk, 0, control));
    Scenario { formats, ..commit.after("mid") }.check(51, 65536);
    let stream = Scenario::new("stream of VHDX", |_, disk, control| job::stream(disk, 0, None, control));
    Scenario { formats, ..stream }.check(52, 65536);
}

#[test]
fn deleting_snapshots() {
    // With another seed it may be less work to merge "top" into "mid".
    let pulled = Scenario::new("deletion by pulling up", |_, disk, control| match disk.layers().len() {
        3 => job::remove(disk, 1, control).map(drop),
        _ => Ok(()),
    });
    pulled.check(61, 65536);
    pulled.check(69, OVERLAY);
    let inner =
        Scenario::new("deletion by merging an inner layer", |_, disk, control| match disk.layers().len() {
            3 => job::remove(disk, 2, control).map(|gone| assert_eq!(gone, "mid")),
            _ => Ok(()),
        });
    inner.check(62, 16384);
    inner.check(65, OVERLAY);
    let merged = Scenario::new("deletion by merging the active layer", |files, disk, control| {
        let first = disk.layers()[0].storage().name() == "top";
        if first {
            disk.push_layer(new_target(files, disk, "top")?)?;
            files[0].mark(REDIRECTED);
        }
        // A second run may find that the guest wrote more to "target" than there is below.
        job::remove(disk, 1, control).map(|gone| assert!(!first || gone == "target"))
    });
    let merged = Scenario { redirects: true, ..merged };
    merged.check(63, 4096);
    merged.check(66, OVERLAY);
}

#[test]
fn rolling_back() {
    let back = Scenario::new("roll-back", |files, disk, _| {
        disk.roll_back_to(1, new_target(files, disk, "mid")?)?;
        files[0].mark(REDIRECTED);
        Ok(())
    });
    let back = Scenario { busy: false, redirects: true, reverts: true, ..back.after("target") };
    back.check(71, 65536);
    back.check(72, 4096);
    back.check(73, OVERLAY);
}

#[test]
fn redirecting() {
    let migration = Scenario::new("migration", |files, disk, control| {
        if disk.layers()[0].storage().name() == "target" {
            return Migration::resume(disk, None)?.run(control);
        }
        let migration = Migration::start(disk, new_target(files, disk, "top")?, None)?;
        files[0].mark(REDIRECTED);
        migration.run(control)
    });
    let migration = Scenario { redirects: true, ..migration.after("target") };
    migration.check(41, 65536);
    migration.check(42, 4096);
    migration.check(43, OVERLAY);
}

#[test]
fn mirroring() {
    Scenario::new("mirror", |files, disk, control| {
        let target = target(files, Format::Qcow2)?;
        Mirror::start(disk, &target, MirrorMode::Background, None)?.run(control)?.pivot(control)
    })
    .after("target")
    .check(21, 65536);
    let resumed = Scenario::new("mirror that goes on", |files, disk, control| {
        let target = target(files, Format::Qcow2)?;
        Mirror::resume(disk, &target, MirrorMode::Background)?.run(control)?.pivot(control)
    })
    .after("target");
    resumed.check(24, 4096);
    resumed.check(26, OVERLAY);
    let blocking = Scenario::new("write-blocking mirror to VHD", |files, disk, control| {
        let target = target(files, Format::Vhd)?;
        Mirror::start(disk, &target, MirrorMode::WriteBlocking, None)?.run(control)?.pivot(control)
    });
    let formats = Formats { target: Format::Vhd, ..QCOW2 };
    Scenario { formats, ..blocking.after("target") }.check(22, 65536);
}

#[test]
fn copying() {
    let backups: [(Format, Run); 3] = [
        (Format::Qcow2, |files, disk, control| {
            job::backup(disk, &target(files, Format::Qcow2)?, None, control)
        }),
        (Format::Vhd, |files, disk, control| job::backup(disk, &target(files, Format::Vhd)?, None, control)),
        (Format::Vhdx, |files, disk, control| {
            job::backup(disk, &target(files, Format::Vhdx)?, None, control)
        }),
    ];
    for (format, run) in backups {
        let formats = Formats { target: format, ..QCOW2 };
        let backup = Scenario { copies: true, formats, ..Scenario::new("backup", run) };
        backup.check(23, 4096);
        backup.check(27, OVERLAY);
    }
    let conversion = Scenario::new("compressing conversion", |files, disk, control| {
        let target = target(files, Format::Qcow2)?;
        // A second run finds what the first one left.
        let options = ConvertOptions { compress: true, target_is_zero: false, ..ConvertOptions::default() };
        job::convert(disk, &target, options, control)
    });
    let conversion = Scenario { copies: true, busy: false, ..conversion };
    conversion.check(25, 65536);
    conversion.check(28, OVERLAY);
}

/// Internal snapshots and bitmaps of one image.
#[test]
fn snapshots_and_bitmaps() {
    for (seed, cluster_size) in [(31, 65536), (32, 4096), (33, 512), (34, OVERLAY)] {
        snapshot_run(seed, cluster_size);
    }
}

fn snapshot_run(seed: u64, cluster_size: u64) {
    let mut rng = Rng(seed);
    let start = MemoryStorage::new();
    let create = CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2(cluster_size));
    let inner = Arc::new(start);
    create.create_on(inner.clone()).unwrap();
    let start = [MemoryStorage::clone(&inner)];
    let record = Arc::new(RecordingStorage::new(inner));
    let image = Arc::new(Qcow2::open(record.clone(), &LayerOptions::default()).unwrap());
    let disk = Disk::from_layers(vec![image.clone()], false).unwrap();
    let mut history = History::new(0);
    // What each snapshot held, and those that exist.
    let (mut saved, mut live): (Vec<(String, History)>, Vec<String>) = Default::default();
    for step in 0..9 {
        history.run(&disk, Some(&record), &mut rng, 10);
        match step % 3 {
            0 | 1 => {
                disk.flush().unwrap();
                history.marks += 1;
                record.mark(history.marks);
                image.create_snapshot(&format!("s{step}")).unwrap();
                live.push(format!("s{step}"));
                saved.push((format!("s{step}"), history.present()));
            }
            _ if rng.below(2) == 0 => {
                let name = &live[rng.below(live.len() as u64) as usize];
                image.revert_to_snapshot(name).unwrap();
                history.becomes(&saved.iter().find(|(n, _)| n == name).unwrap().1);
                history.marks += 1;
                record.mark(history.marks);
            }
            _ => image.delete_snapshot(&live.remove(0)).unwrap(),
        }
        if step == 4 {
            image.add_bitmap("changes", 4096).unwrap();
        }
    }
    history.run(&disk, Some(&record), &mut rng, 10);
    drop((disk, image));

    let events = record.group_events();
    for round in 0..rounds(120) {
        let at = rng.below(events.len() as u64 + 1) as usize;
        let mark = last_mark(&events, at);
        let survivor = Arc::new(crash(&start, &events, at, &mut rng).remove(0));
        let what = format!(
            "snapshots with clusters of {cluster_size}, crash {round} at event {at} of {}",
            events.len()
        );
        let image = Arc::new(Qcow2::open(survivor, &LayerOptions::default()).expect(&what));
        let disk = Disk::from_layers(vec![image.clone()], false).unwrap();
        history.check(&disk, mark, &what);
        // A bitmap that claims to be complete was closed properly, which happens at the very end only.
        for bitmap in image.bitmaps().expect(&what) {
            let complete = !bitmap.inconsistent && image.bitmap("changes").is_ok_and(|map| map.count() > 0);
            assert!(!complete || at + 40 > events.len(), "{what}: the bitmap counts as complete");
        }
        // What is written now must not reach the snapshots, and each holds what it held.
        for name in image.snapshots().expect(&what).into_iter().map(|s| s.name) {
            disk.write_at(&rng.bytes(300_000), rng.below(SIZE - 300_000)).expect(&what);
            image.revert_to_snapshot(&name).expect(&what);
            let state = &saved.iter().find(|(n, _)| *n == name).unwrap().1;
            state.check(&disk, u64::MAX, &format!("{what}: snapshot {name}"));
        }
    }
}
