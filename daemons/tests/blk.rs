//! The contract of `nacre-blk`: exports over NBD, the JSON API while clients are connected, and an orderly end.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use blockfmt::format::qcow2::Qcow2Options;
use blockfmt::{CreateOptions, Format, LockMode, LuksOptions, OpenOptions, Secret};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// The export of most tests.
const DISK: &str = "name=disk,path=disk.qcow2,format=qcow2";

struct Daemon {
    dir: tempfile::TempDir,
    child: Child,
}

impl Daemon {
    /// A daemon that exports "disk.qcow2", of 16 MiB with 1 MiB of data and perhaps a bitmap, as "disk".
    fn start(bitmap: bool) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let image = dir.path().join("disk.qcow2");
        CreateOptions::new(Format::Qcow2, 16 * MIB).create(&image).unwrap();
        let disk = OpenOptions::new(Format::Qcow2).open(&image).unwrap();
        disk.write_at(&[5; MIB as usize], MIB).unwrap();
        if bitmap {
            disk.layers()[0].as_qcow2().unwrap().add_bitmap("daily", 65536).unwrap();
        }
        disk.close().unwrap();
        drop(disk);
        Daemon::start_with(dir, DISK, Stdio::null())
    }

    fn start_with(dir: tempfile::TempDir, export: &str, input: Stdio) -> Self {
        Daemon { child: Self::spawn(dir.path(), export, input), dir }
    }

    fn spawn(dir: &Path, export: &str, input: Stdio) -> Child {
        let mut child = Command::new(env!("CARGO_BIN_EXE_nacre-blk"))
            .args(["--export", export, "--unix", "nbd", "--api", "api"])
            .current_dir(dir)
            .stdin(input)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "listening unix nbd\n");
        child
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn api(&self, command: &Value) -> Value {
        let socket = self.at("api");
        // The socket appears a moment after the line that the daemon prints.
        let mut stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(_) => std::thread::yield_now(),
            }
        };
        stream.write_all(format!("{command}\n").as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn ok(&self, command: Value) -> Value {
        let reply = self.api(&command);
        assert!(reply.get("error").is_none(), "{command}: {reply}");
        reply
    }

    /// Runs a job to its end and returns its last report.
    fn job(&self, command: Value) -> Value {
        self.wait(&self.ok(command)["job"])
    }

    /// Waits for the end of a job and returns its last report.
    fn wait(&self, number: &Value) -> Value {
        loop {
            let jobs = self.ok(json!({ "command": "jobs" }));
            let job = jobs["jobs"].as_array().unwrap().iter().find(|j| j["job"] == *number).unwrap();
            if job["state"] != "running" {
                return job.clone();
            }
            std::thread::yield_now();
        }
    }

    /// Copies the disk with a command of `nacre disk`, through the API, and returns its report.
    fn command_line(&self, command: &[&str], target: &str) -> Value {
        let run = Command::new(env!("CARGO_BIN_EXE_nacre"))
            .arg("disk")
            .args(command)
            .args(["--json", "-O", "qcow2", "--via"])
            .args([self.at("api"), "disk".into(), self.at(target)])
            .output()
            .unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        serde_json::from_slice(&run.stdout).unwrap()
    }

    fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.at("nbd").display())
    }

    /// Runs commands of `qemu-io` on an export.
    fn io(&self, name: &str, commands: &[&str]) -> String {
        let mut run = Command::new("qemu-io");
        run.args(["-f", "raw"]);
        if name == "more" {
            run.arg("-r"); // exported without writes
        }
        commands.iter().for_each(|c| {
            run.args(["-c", c]);
        });
        let output = run.arg(self.uri(name)).output();
        let output = output.unwrap_or_else(|e| panic!("cannot run qemu-io ({e}); install qemu-utils"));
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(output.status.success() && !text.contains("failed"), "{commands:?}: {text}");
        text
    }

    /// Ends the daemon as a crash does.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends the daemon with SIGTERM, which must go well.
    fn end(&mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn check(path: &Path) {
    let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

fn read(path: &Path, offset: u64) -> u8 {
    let disk = OpenOptions::new(Format::Qcow2).read_only(true).open(path).unwrap();
    let mut byte = [0];
    disk.read_at(&mut byte, offset).unwrap();
    byte[0]
}

#[test]
fn exports_come_and_go() {
    let mut d = Daemon::start(false);
    d.io("disk", &["read -P 5 1M 1M", "read -P 0 2M 1M", "write -P 6 2M 64k", "flush"]);
    CreateOptions::new(Format::Raw, MIB).create(&d.at("more.raw")).unwrap();
    let add =
        json!({ "command": "add", "name": "more", "path": "more.raw", "format": "raw", "readonly": true });
    d.ok(add.clone());
    assert!(d.api(&add)["error"].is_string(), "twice the same name");
    let list = d.ok(json!({ "command": "list" }));
    assert_eq!(list["exports"].as_array().unwrap().len(), 2);
    d.io("more", &["read -P 0 0 1M"]);
    d.ok(json!({ "command": "remove", "name": "more" }));
    assert!(d.api(&json!({ "command": "remove", "name": "more" }))["error"].is_string());
    d.ok(json!({ "command": "resize", "name": "disk", "size": 20 * MIB }));
    d.io("disk", &["write -P 7 19M 64k", "read -P 5 1M 1M"]);
    for bad in
        [json!({ "command": "explode" }), json!([]), json!({ "command": "resize", "name": "x", "size": 1 })]
    {
        assert!(d.api(&bad)["error"].is_string(), "{bad}");
    }
    d.end();
    assert!(!d.at("nbd").exists() && !d.at("api").exists(), "sockets are removed");
    check(&d.at("disk.qcow2"));
    assert_eq!((read(&d.at("disk.qcow2"), 2 * MIB), read(&d.at("disk.qcow2"), 19 * MIB)), (6, 7));
}

#[test]
fn direct_exports_bypass_the_page_cache() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for name in ["disk.qcow2", "more.qcow2", "cached.qcow2"] {
        CreateOptions::new(Format::Qcow2, 16 * MIB).create(&dir.path().join(name)).unwrap();
    }
    let mut d = Daemon::start_with(dir, &format!("{DISK},direct"), Stdio::null());
    let add = |name: &str, direct: bool| {
        json!({ "command": "add", "name": name, "path": format!("{name}.qcow2"),
        "format": "qcow2", "direct": direct })
    };
    d.ok(add("more", true));
    d.ok(add("cached", false));
    for (name, direct) in [("disk", true), ("more", true), ("cached", false)] {
        let path = d.at(&format!("{name}.qcow2"));
        let process = format!("/proc/{}", d.child.id());
        let files = std::fs::read_dir(format!("{process}/fd")).unwrap().map(|entry| entry.unwrap());
        let mut images = files.filter(|file| std::fs::read_link(file.path()).is_ok_and(|link| link == path));
        let number = images.next().expect("the image is open").file_name();
        let info = std::fs::read_to_string(format!("{process}/fdinfo/{}", number.display())).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        let flags = i32::from_str_radix(flags, 8).unwrap();
        assert_eq!(flags & nix::libc::O_DIRECT != 0, direct, "{name}: {info}");
    }
    d.io("disk", &["write -P 6 1000 3000", "read -P 6 1000 3000", "read -P 0 4000 96"]);
    d.end();
}

#[test]
fn snapshots_and_merges_while_clients_are_connected() {
    let mut d = Daemon::start(false);
    let take = |path: &str| json!({ "command": "snapshot", "disks": [{ "name": "disk", "path": path }] });
    d.ok(take("one.qcow2"));
    d.io("disk", &["write -P 6 1M 64k", "flush"]);
    assert!(d.api(&take("one.qcow2"))["error"].is_string(), "the image exists");
    assert!(d.at("one.qcow2").exists());
    let mut two = take("two.qcow2");
    two["disks"][0]["options"] = json!("colour=red");
    assert!(d.api(&two)["error"].as_str().unwrap().contains("colour"));
    two["disks"][0]["options"] = json!("extended_l2=off");
    d.ok(two);
    let cluster = |name: &str| {
        let options = OpenOptions::new(Format::Qcow2).read_only(true).lock(LockMode::None);
        options.open(d.at(name)).unwrap().geometry().cluster
    };
    assert_eq!((cluster("one.qcow2"), cluster("two.qcow2")), (128 << 10, 64 << 10));
    d.io("disk", &["write -P 7 3M 64k", "read -P 6 1M 64k"]);
    assert_eq!(d.job(json!({ "command": "commit", "name": "disk" }))["state"], "done");
    d.io("disk", &["read -P 6 1M 64k", "read -P 7 3M 64k"]);
    assert_eq!(d.job(json!({ "command": "stream", "name": "disk" }))["state"], "done");
    d.io("disk", &["read -P 6 1M 64k", "read -P 7 3M 64k", "read -P 5 1088k 64k"]);
    d.end();
    // The first image is what it was; "one" has everything and depends on nothing.
    assert_eq!(read(&d.at("disk.qcow2"), MIB), 5);
    std::fs::remove_file(d.at("disk.qcow2")).unwrap();
    check(&d.at("one.qcow2"));
    assert_eq!((read(&d.at("one.qcow2"), MIB), read(&d.at("one.qcow2"), 3 * MIB)), (6, 7));
}

#[test]
fn disks_are_copied_and_migrated() {
    let mut d = Daemon::start(true);
    let copy = |command: &str, path: &str| json!({ "command": command, "name": "disk", "path": path, "format": "qcow2" });
    assert_eq!(d.job(copy("backup", "full.qcow2"))["state"], "done");
    d.io("disk", &["write -P 8 4M 64k", "flush"]);
    let mut increment = copy("backup", "increment.qcow2");
    increment["bitmap"] = "daily".into();
    let report = d.job(increment);
    assert_eq!((&report["state"], &report["done"]), (&json!("done"), &json!(65536)), "{report}");
    // A slow job is cancelled, and another one is refused meanwhile.
    let mut slow = copy("mirror", "slow.qcow2");
    slow["rate"] = 1.into();
    let number = d.ok(slow)["job"].clone();
    assert!(d.api(&copy("mirror", "other.qcow2"))["error"].as_str().unwrap().contains("already"));
    d.ok(json!({ "command": "cancel", "job": number }));
    loop {
        let jobs = d.ok(json!({ "command": "jobs" }));
        let state =
            jobs["jobs"].as_array().unwrap().iter().find(|j| j["job"] == number).unwrap()["state"].clone();
        if state != "running" {
            assert_eq!(state, "cancelled");
            break;
        }
    }
    assert!(!d.at("slow.qcow2").exists());
    // The command line reaches the same jobs.
    let report = d.command_line(&["mirror", "--mode", "write-blocking", "--switch"], "new.qcow2");
    assert!(report["bytes"].as_u64() >= Some(16 * MIB), "{report}");
    d.io("disk", &["write -P 9 5M 64k", "read -P 8 4M 64k"]);
    d.end();
    for (name, values) in [("full", (5, 0, 0)), ("disk", (5, 8, 0)), ("new", (5, 8, 9))] {
        let path = d.at(&format!("{name}.qcow2"));
        check(&path);
        assert_eq!((read(&path, MIB), read(&path, 4 * MIB), read(&path, 5 * MIB)), values, "{name}");
    }
}

#[test]
fn a_mirror_goes_on_after_a_crash() {
    let mut d = Daemon::start(false);
    let mirror = |rate: u64, resume: bool| {
        json!({ "command": "mirror", "name": "disk", "path": "copy.qcow2", "format": "qcow2", "rate": rate,
            "resume": resume })
    };
    d.ok(mirror(1, false));
    d.kill();
    d.child = Daemon::spawn(d.dir.path(), "name=disk,path=disk.qcow2,format=qcow2", Stdio::null());
    d.io("disk", &["write -P 6 2M 64k", "flush"]);
    assert!(d.api(&mirror(0, false))["error"].is_string(), "the image exists");
    assert_eq!(d.job(mirror(0, true))["state"], "done");
    d.end();
    let path = d.at("copy.qcow2");
    check(&path);
    assert_eq!((read(&path, MIB), read(&path, 2 * MIB)), (5, 6));
}

#[test]
fn a_disk_is_redirected_and_its_migration_survives_a_crash() {
    let mut d = Daemon::start(false);
    std::fs::create_dir(d.at("new")).unwrap();
    let migrate = |rate: u64| {
        json!({ "command": "migrate", "name": "disk", "path": "new/disk.qcow2", "format": "qcow2",
            "mode": "redirect", "rate": rate })
    };
    d.ok(migrate(1));
    // The job has hardly begun, but what is written is in the new image only.
    d.io("disk", &["write -P 6 2M 64k", "read -P 5 1M 64k", "flush"]);
    assert!(d.api(&migrate(0))["error"].as_str().unwrap().contains("already"));
    d.kill();
    assert_eq!(read(&d.at("disk.qcow2"), 2 * MIB), 0);
    let export = "name=disk,path=new/disk.qcow2,format=qcow2,allow=disk.qcow2";
    d.child = Daemon::spawn(d.dir.path(), export, Stdio::null());
    d.io("disk", &["read -P 6 2M 64k", "read -P 5 1M 64k"]);
    // The command line reaches the same job.
    let report = d.command_line(&["migrate"], "new/disk.qcow2");
    assert!(report["job"].is_number() && report["bytes"].as_u64() > Some(0), "{report}");
    d.io("disk", &["read -P 6 2M 64k", "read -P 5 1M 64k", "write -P 7 3M 64k"]);
    let taken = d
        .api(&json!({ "command": "migrate", "name": "disk", "path": "disk.qcow2", "format": "qcow2",
        "mode": "redirect" }));
    assert!(taken["error"].as_str().unwrap().contains("Cannot create"), "{taken}");
    d.end();
    std::fs::remove_file(d.at("disk.qcow2")).unwrap();
    let image = d.at("new/disk.qcow2");
    let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&image).output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 3)), "a crash may leak clusters, no more: {output:?}");
    assert_eq!((read(&image, MIB), read(&image, 2 * MIB), read(&image, 3 * MIB)), (5, 6, 7));
}

#[test]
fn snapshots_are_listed_rolled_back_to_and_deleted() {
    let mut d = Daemon::start(false);
    let take = |path: &str| json!({ "command": "snapshot", "disks": [{ "name": "disk", "path": path }] });
    d.ok(take("one.qcow2"));
    d.io("disk", &["write -P 6 1M 64k"]);
    d.ok(take("two.qcow2"));
    d.io("disk", &["write -P 7 1M 64k"]);
    let images = |d: &Daemon| {
        let tree = d.ok(json!({ "command": "tree" }))["images"].clone();
        let deeper = |node: &Value| Some(node["children"][0].clone()).filter(Value::is_object);
        let chain = std::iter::successors(Some(tree[0].clone()), deeper);
        chain.map(|node| node["image"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(images(&d), ["disk.qcow2", "one.qcow2", "two.qcow2"]);
    let back = |image: &str, path: &str| json!({ "command": "roll-back", "name": "disk", "image": image, "path": path });
    assert!(d.api(&back("two.qcow2", "back.qcow2"))["error"].is_string(), "the active image");
    assert!(!d.at("back.qcow2").exists());
    d.ok(back("one.qcow2", "back.qcow2"));
    d.io("disk", &["read -P 6 1M 64k", "write -P 8 2M 64k"]);
    assert_eq!(images(&d), ["disk.qcow2", "one.qcow2", "back.qcow2"]);
    let delete = |image: &str| json!({ "command": "delete-snapshot", "name": "disk", "image": image });
    assert_eq!(d.job(delete("two.qcow2"))["state"], "failed");
    assert_eq!(d.job(delete("one.qcow2"))["state"], "done");
    assert_eq!(images(&d).len(), 2);
    d.io("disk", &["read -P 6 1M 64k", "read -P 5 1088k 64k", "read -P 8 2M 64k"]);
    d.end();
    assert_eq!(read(&d.at("disk.qcow2"), MIB), 5, "the other snapshot is what it was");
}

#[test]
fn groups_of_disks_are_limited_together() {
    let mut d = Daemon::start(false);
    CreateOptions::new(Format::Raw, MIB).create(&d.at("more.raw")).unwrap();
    d.ok(json!({ "command": "add", "name": "second", "path": "more.raw", "format": "raw" }));
    let group = |disks: Value, limits: Value| json!({ "command": "throttle", "group": "gold", "disks": disks, "limits": limits });
    for bad in [group(json!(["disk", "third"]), json!({})), group(json!(["disk"]), json!({ "colour": 1 }))] {
        assert!(d.api(&bad)["error"].is_string(), "{bad}");
    }
    d.ok(group(json!(["disk", "second"]), json!({ "write-operations": 4 })));
    let start = std::time::Instant::now();
    d.io("disk", &["write 0 4k", "write 0 4k"]);
    d.io("second", &["write 0 4k", "write 0 4k"]);
    assert!(start.elapsed() >= std::time::Duration::from_millis(700), "the fourth write waits for three");
    d.ok(json!({ "command": "throttle", "group": "gold" }));
    d.ok(json!({ "command": "remove", "name": "second" }));
    d.end();
}

#[test]
fn clones_share_their_base_and_disks_forget() {
    let mut d = Daemon::start(false);
    d.ok(json!({ "command": "remove", "name": "disk" }));
    for name in ["a", "b"] {
        let options = CreateOptions::new(Format::Qcow2, 16 * MIB).backing("disk.qcow2", Format::Qcow2);
        options.create(&d.at(name)).unwrap();
        d.ok(json!({ "command": "add", "name": name, "path": name, "format": "qcow2", "share-bases": true }));
        d.io(name, &["read -P 5 1M 64k", "write -P 6 1M 64k"]);
    }
    let stats = d.ok(json!({ "command": "stats" }))["shared-bases"].clone();
    assert_eq!((&stats["bases"], &stats["shared"], &stats["opened"]), (&json!(1), &json!(1), &json!(1)));
    assert!(stats["lookups"].as_u64() > stats["misses"].as_u64(), "{stats}");
    d.ok(json!({ "command": "remove", "name": "a" }));
    d.ok(json!({ "command": "add", "name": "brief", "path": "a", "format": "qcow2", "share-bases": true,
        "non-persistent": d.dir.path() }));
    d.io("brief", &["write -P 7 1M 64k", "read -P 7 1M 64k"]);
    d.ok(json!({ "command": "remove", "name": "brief" }));
    // A backup goes to an export, here one of the same daemon.
    CreateOptions::new(Format::Raw, 16 * MIB).create(&d.at("copy.raw")).unwrap();
    d.ok(json!({ "command": "add", "name": "copy", "path": "copy.raw", "format": "raw" }));
    let backup = json!({ "command": "backup", "name": "b", "path": d.uri("copy"), "format": "raw" });
    assert_eq!(d.job(backup)["state"], "done");
    d.io("copy", &["read -P 6 1M 64k", "read -P 5 1088k 64k"]);
    d.end();
    assert_eq!((read(&d.at("a"), MIB), read(&d.at("disk.qcow2"), MIB)), (6, 5));
}

#[test]
fn a_killed_daemon_starts_again_where_it_was() {
    let mut daemon = Daemon::start(false);
    daemon.ok(json!({ "command": "list" })); // the API's socket appears last
    daemon.kill();
    assert!(daemon.at("nbd").exists() && daemon.at("api").exists(), "the killed daemon left its sockets");
    daemon.child = Daemon::spawn(daemon.dir.path(), DISK, Stdio::null());
    UnixStream::connect(daemon.at("nbd")).unwrap();
    daemon.ok(json!({ "command": "list" }));
}

#[test]
fn what_is_encrypted_stays_encrypted() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let key = dir.path().join("key");
    std::fs::write(&key, "open sesame").unwrap();
    let secret = Secret::from_file(&key).unwrap();
    let luks = LuksOptions { iter_time_ms: 1, ..LuksOptions::default() };
    let qcow2 = Qcow2Options { encryption: Some(luks.clone()), ..Qcow2Options::default() };
    let image = dir.path().join("disk.qcow2");
    CreateOptions::new(Format::Qcow2, 4 * MIB).qcow2(qcow2).secret(secret.clone()).create(&image).unwrap();
    let more = dir.path().join("more.luks");
    CreateOptions::new(Format::Luks, MIB).luks(luks).secret(secret.clone()).create(&more).unwrap();
    // The passphrase comes through a descriptor, and through files.
    let input = std::fs::File::open(&key).unwrap();
    let mut d = Daemon::start_with(dir, &format!("{DISK},secret-fd=0"), input.into());
    let mut add = json!({ "command": "add", "name": "luks", "path": "more.luks", "format": "luks" });
    assert!(d.api(&add)["error"].as_str().unwrap().contains("secret"), "without a secret");
    add["secret-files"] = json!(["nothing"]);
    assert!(d.api(&add)["error"].as_str().unwrap().contains("nothing"), "without the file");
    add["secret-files"] = json!(["key"]);
    d.ok(add);
    d.io("luks", &["write -P 3 0 64k", "flush"]);
    d.io("disk", &["write -P 5 1M 64k"]);
    d.ok(json!({ "command": "snapshot", "disks": [{ "name": "disk", "path": "top.qcow2" }] }));
    d.io("disk", &["write -P 6 2M 64k", "read -P 5 1M 64k", "flush"]);
    let mirror = |path: &str, format: &str| json!({ "command": "mirror", "name": "disk", "path": path, "format": format });
    assert!(d.api(&mirror("plain.raw", "raw"))["error"].as_str().unwrap().contains("encrypted"));
    assert!(!d.at("plain.raw").exists());
    for (path, format) in [("copy.luks", "luks"), ("copy.qcow2", "qcow2")] {
        assert_eq!(d.job(mirror(path, format))["state"], "done", "{path}");
    }
    d.end();
    for (name, format) in
        [("top.qcow2", Format::Qcow2), ("copy.luks", Format::Luks), ("copy.qcow2", Format::Qcow2)]
    {
        let path = d.at(name);
        assert!(OpenOptions::new(format).read_only(true).open(&path).is_err(), "{name} needs no passphrase");
        let disk = OpenOptions::new(format).read_only(true).secret(secret.clone()).open(&path).unwrap();
        for (offset, value) in [(MIB, 5), (2 * MIB, 6), (3 * MIB, 0)] {
            let mut bytes = [0xff; 512];
            disk.read_at(&mut bytes, offset).unwrap();
            assert!(bytes == [value; 512], "{name} at {offset}");
        }
        let bytes = std::fs::read(&path).unwrap();
        assert!(!bytes.windows(64).any(|w| w == [5; 64] || w == [6; 64]), "{name} shows plain text");
    }
}

#[test]
fn a_disk_whose_parent_changed_is_exported_on_demand_only() {
    let mut d = Daemon::start(false);
    std::fs::write(d.at("base"), [5; 65536]).unwrap();
    CreateOptions::new(Format::Qcow2, 65536).backing("base", Format::Raw).create(&d.at("child")).unwrap();
    std::fs::write(d.at("base"), [6; 65536 * 2]).unwrap();
    let mut add = json!({ "command": "add", "name": "child", "path": "child", "format": "qcow2" });
    let refused = d.api(&add)["error"].as_str().unwrap().to_owned();
    assert!(refused.contains("rebase -u"), "{refused}");
    add["changed-parents"] = json!(true);
    d.ok(add);
    d.io("child", &["read -P 6 0 64k"]);
    d.end();
    // The same on the command line.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for name in ["base", "child"] {
        std::fs::copy(d.at(name), dir.path().join(name)).unwrap();
    }
    let export = "name=child,path=child,format=qcow2,changed-parents";
    let mut d = Daemon::start_with(dir, export, Stdio::null());
    d.io("child", &["read -P 6 0 64k"]);
    d.end();
}

#[test]
fn a_backup_shows_no_write_that_follows_the_reply() {
    let d = Daemon::start(false);
    let client = OpenOptions::new(Format::Raw).open(d.uri("disk")).unwrap();
    for n in 1..=30 {
        let name = format!("{n}.raw");
        let backup = json!({ "command": "backup", "name": "disk", "path": d.at(&name), "format": "raw" });
        client.write_at(&[n; 4096], 0).unwrap();
        let job = d.ok(backup);
        client.write_at(&[0xff; 4096], 0).unwrap();
        assert_eq!(d.wait(&job["job"])["state"], "done");
        assert_eq!(std::fs::read(d.at(&name)).unwrap()[..4096], [n; 4096]);
    }
}

#[test]
fn a_copy_that_cannot_start_leaves_no_image() {
    let d = Daemon::start(false);
    let copy = |command: &str, name: &str| json!({ "command": command, "name": "disk", "path": d.at(name), "format": "qcow2", "rate": 1 });
    d.ok(copy("mirror", "first"));
    for command in ["mirror", "backup"] {
        let reply = d.api(&copy(command, "second"));
        assert!(reply["error"].as_str().unwrap().contains("works on export"), "{reply}");
        assert!(!d.at("second").exists());
    }
    d.ok(json!({ "command": "cancel", "job": 1 }));
}
