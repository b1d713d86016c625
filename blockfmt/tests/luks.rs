//! LUKS, alone and inside of qcow2: against a model, against QEMU in both directions, with wrong secrets.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::check::Repair;
use blockfmt::format::qcow2::Qcow2Options;
use blockfmt::job::{self, ConvertOptions, JobControl};
use blockfmt::{
    CipherMode, CreateOptions, Disk, Error, Format, Hash, IvGenerator, LuksOptions, OpenOptions, Secret,
};
use common::{Rng, assert_same, exercise, qemu, qemu_ok, text};
use std::path::{Path, PathBuf};

const SIZE: u64 = (3 << 20) + 512 * 3;
const SECRET: &str = "correct horse\n";

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        std::fs::write(dir.path().join("secret"), SECRET).unwrap();
        Place(dir)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn object(&self) -> String {
        format!("secret,id=s,file={}", text(&self.at("secret")))
    }

    /// QEMU's arguments for an image that the secret opens.
    fn image(&self, format: Format, path: &Path) -> String {
        let key = if format == Format::Luks { "key-secret" } else { "encrypt.key-secret" };
        format!("driver={format},{key}=s,file.filename={}", text(path))
    }

    fn assert_qemu_sees(&self, format: Format, path: &Path, model: &[u8]) {
        let raw = path.with_extension("model");
        std::fs::write(&raw, model).unwrap();
        let (object, image) = (self.object(), self.image(format, path));
        let model = format!("driver=raw,file.filename={}", text(&raw));
        qemu_ok("qemu-img", &["compare", "--object", &object, "--image-opts", &image, &model]);
        if format == Format::Qcow2 {
            qemu_ok("qemu-img", &["check", "--object", &object, "--image-opts", &image]);
        }
    }
}

fn open(format: Format, path: &Path) -> Disk {
    OpenOptions::new(format).secret(Secret::new(SECRET)).open(path).unwrap()
}

fn fast() -> LuksOptions {
    LuksOptions { iter_time_ms: 1, ..LuksOptions::default() }
}

fn variants() -> Vec<LuksOptions> {
    let mut out = Vec::new();
    for (mode, iv) in [
        (CipherMode::Xts, IvGenerator::Plain64),
        (CipherMode::Cbc, IvGenerator::Essiv),
        (CipherMode::Cbc, IvGenerator::Plain),
    ] {
        for (key_bits, hash) in [(256, Hash::Sha256), (128, Hash::Sha1), (256, Hash::Sha512)] {
            out.push(LuksOptions { mode, iv, key_bits, hash, ..fast() });
        }
    }
    out
}

fn encrypted(luks: LuksOptions) -> CreateOptions {
    let qcow2 = Qcow2Options { encryption: Some(luks), ..Qcow2Options::default() };
    CreateOptions::new(Format::Qcow2, SIZE).qcow2(qcow2).secret(Secret::new(SECRET))
}

/// QEMU's options for `luks`, each with a prefix.
fn qemu_options(luks: &LuksOptions, prefix: &str) -> String {
    let mode = if luks.mode == CipherMode::Xts { "xts" } else { "cbc" };
    let iv = match luks.iv {
        IvGenerator::Plain => "plain",
        IvGenerator::Plain64 => "plain64",
        IvGenerator::Essiv => "essiv",
    };
    let hash = format!("{:?}", luks.hash).to_lowercase();
    let p = prefix;
    let essiv = if iv == "essiv" { format!(",{p}ivgen-hash-alg=sha256") } else { String::new() };
    format!(
        "{p}key-secret=s,{p}iter-time=10,{p}cipher-alg=aes-{},{p}cipher-mode={mode},{p}ivgen-alg={iv},\
         {p}hash-alg={hash}{essiv}",
        luks.key_bits
    )
}

/// Lets QEMU create an image, again if it was interrupted while it measured the speed of key derivation.
fn qemu_creates(args: &[&str]) {
    for _ in 0..50 {
        let output = qemu("qemu-img", args);
        let error = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return;
        }
        assert!(error.contains("accurate CPU usage"), "qemu-img {args:?}: {error}");
    }
    panic!("QEMU cannot measure the speed of key derivation on a machine this busy");
}

#[test]
fn our_images_are_read_by_qemu() {
    let place = Place::new();
    for (n, luks) in variants().into_iter().enumerate() {
        let path = place.at(&format!("{n}.qcow2"));
        encrypted(luks.clone()).create(&path).unwrap();
        let mut model = vec![0; SIZE as usize];
        let mut rng = Rng(10 + n as u64);
        for _ in 0..2 {
            exercise(&open(Format::Qcow2, &path), &mut model, &mut rng, 60);
            assert_same(&open(Format::Qcow2, &path), &model);
            place.assert_qemu_sees(Format::Qcow2, &path, &model);
        }
        assert!(open(Format::Qcow2, &path).layers()[0].check(Repair::Nothing).unwrap().is_clean());
        let path = place.at(&format!("{n}.luks"));
        let create = CreateOptions::new(Format::Luks, SIZE).luks(luks).secret(Secret::new(SECRET));
        create.create(&path).unwrap();
        let disk = open(Format::Luks, &path);
        disk.write_at(&model, 0).unwrap();
        exercise(&disk, &mut model, &mut rng, 60);
        drop(disk);
        place.assert_qemu_sees(Format::Luks, &path, &model);
    }
}

#[test]
fn images_of_qemu_are_read_and_changed() {
    let place = Place::new();
    let (raw, object) = (place.at("src.raw"), place.object());
    let mut rng = Rng(30);
    let mut model = rng.bytes(SIZE as usize);
    model[1 << 20..2 << 20].fill(0);
    std::fs::write(&raw, &model).unwrap();
    for (n, luks) in variants().into_iter().step_by(2).enumerate() {
        for (format, prefix) in [(Format::Luks, ""), (Format::Qcow2, "encrypt.")] {
            let path = place.at(&format!("{n}.{format}"));
            let mut options = qemu_options(&luks, prefix);
            if format == Format::Qcow2 {
                options += ",encrypt.format=luks";
                // Sub-clusters, small clusters, the old version: not always the defaults.
                options += [",extended_l2=on", ",cluster_size=4k", ",compat=0.10"][n % 3];
            }
            let size = SIZE.to_string();
            let create =
                ["create", "--object", &object, "-f", format.name(), "-o", &options, text(&path), &size];
            qemu_creates(&create);
            let image = place.image(format, &path);
            let source = format!("driver=raw,file.filename={}", text(&raw));
            let convert = ["convert", "-n", "--object", &object, "--image-opts", "--target-image-opts"];
            qemu_ok("qemu-img", &[&convert[..], &[&source, &image]].concat());
            let disk = open(format, &path);
            assert_same(&disk, &model);
            let mut changed = model.clone();
            exercise(&disk, &mut changed, &mut rng, 80);
            drop(disk);
            place.assert_qemu_sees(format, &path, &changed);
            assert!(matches!(OpenOptions::new(format).open(&path), Err(Error::SecretNeeded(_))));
            let wrong = OpenOptions::new(format).secret(Secret::new("wrong"));
            assert!(matches!(wrong.open(&path), Err(Error::WrongSecret(_))));
        }
    }
}

#[test]
fn encrypted_children_jobs_and_temporary_layers() {
    let place = Place::new();
    encrypted(fast()).create(&place.at("base.qcow2")).unwrap();
    let mut rng = Rng(50);
    let mut model = vec![0; SIZE as usize];
    exercise(&open(Format::Qcow2, &place.at("base.qcow2")), &mut model, &mut rng, 40);
    let mut child = encrypted(fast()).backing("base.qcow2", Format::Qcow2);
    child.qcow2.extended_l2 = Some(true);
    child.create(&place.at("child.qcow2")).unwrap();
    let disk = open(Format::Qcow2, &place.at("child.qcow2"));
    exercise(&disk, &mut model, &mut rng, 40);
    disk.snapshot(&place.at("top.qcow2"), &encrypted(fast())).unwrap();
    exercise(&disk, &mut model, &mut rng, 40);
    job::commit(&disk, 0, &JobControl::new()).unwrap();
    assert_same(&disk, &model);
    drop(disk);
    let child = place.at("child.qcow2");
    assert_same(&open(Format::Qcow2, &child), &model);
    // A temporary layer over an encrypted disk.
    let before = std::fs::read(&child).unwrap();
    let options = OpenOptions::new(Format::Qcow2).secret(Secret::new(SECRET)).non_persistent(place.0.path());
    let mut other = model.clone();
    exercise(&options.open(&child).unwrap(), &mut other, &mut rng, 40);
    assert!(std::fs::read(&child).unwrap() == before);
    // Zeros are written, as a new LUKS image holds noise.
    let target = place.at("copy.luks");
    let create = CreateOptions::new(Format::Luks, SIZE).luks(fast()).secret(Secret::new(SECRET));
    create.create(&target).unwrap();
    let (source, copy) = (open(Format::Qcow2, &child), open(Format::Luks, &target));
    job::convert(&source, &copy, ConvertOptions::default(), &JobControl::new()).unwrap();
    assert_same(&copy, &model);
    copy.resize(SIZE + 4096).unwrap();
    model.resize(SIZE as usize + 4096, 0);
    assert_same(&copy, &model);
    drop(copy);
    place.assert_qemu_sees(Format::Luks, &target, &model);
    // No sector of the disk is in the files.
    let plain = &model[..];
    for file in ["base.qcow2", "child.qcow2", "copy.luks"] {
        let bytes = std::fs::read(place.at(file)).unwrap();
        let sectors: std::collections::HashSet<&[u8]> = bytes.chunks_exact(512).collect();
        let leaked = plain.chunks_exact(512).filter(|s| s.iter().any(|b| *b != s[0]));
        assert_eq!(leaked.filter(|s| sectors.contains(s)).count(), 0, "{file} holds plain text");
    }
    let legacy = place.at("legacy.qcow2");
    let made = qemu(
        "qemu-img",
        &[
            "create",
            "--object",
            &place.object(),
            "-f",
            "qcow2",
            "-o",
            "encryption=on,encrypt.key-secret=s",
            text(&legacy),
            "1M",
        ],
    );
    if made.status.success() {
        let error = OpenOptions::new(Format::Qcow2).secret(Secret::new(SECRET)).open(&legacy).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
}
