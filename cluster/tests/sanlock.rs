//! Byte compatibility with sanlock: its tools read our areas, we read theirs.

#![expect(clippy::unwrap_used, reason = "a failure in a test's helper fails the test")]

use std::path::Path;
use std::process::Command;

use cluster::adapters::{DiskError, LeaseDisk, LeaseVolume};
use cluster::lease::DeltaRecord;
use cluster::lock::Leader;
use cluster::ondisk::{DBlock, Geometry, HostBlock, ModeBlock, Name};
use cluster::types::{HostId, Incarnation};

fn sanlock(args: &[&str]) -> String {
    let out = Command::new("sanlock")
        .arg("direct")
        .args(args)
        .output()
        .expect("sanlock is missing: install the Debian package sanlock");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "sanlock direct {args:?}: {text}");
    text
}

fn field(text: &str, name: &str) -> String {
    let line = text.lines().find(|l| l.split(' ').next() == Some(name));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).split_once(' ').unwrap().1.to_owned()
}

fn name(s: &str) -> Name {
    Name::new(s).unwrap()
}

fn volume(path: &Path, geometry: Geometry) -> LeaseVolume {
    std::fs::File::create(path).unwrap().set_len(4 * geometry.area_size() as u64).unwrap();
    LeaseVolume::new(LeaseDisk::open(path, geometry).unwrap(), name("SPACE"), 0)
}

const GEOMETRIES: [(u32, u32, &str); 3] =
    [(512, 1 << 20, "1M"), (4096, 1 << 20, "1M"), (4096, 8 << 20, "8M")];

#[test]
fn our_areas_are_what_sanlock_writes() {
    for (sector, area, align) in GEOMETRIES {
        let geometry = Geometry::new(sector, area).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        let v = volume(&ours, geometry);
        v.format_space(10).unwrap();
        v.format_resource(1, name("disk-1")).unwrap();
        std::fs::File::create(&theirs).unwrap().set_len(4 * u64::from(area)).unwrap();
        let sizes = ["-Z", &sector.to_string(), "-A", align];
        let space = format!("SPACE:0:{}:0", theirs.display());
        sanlock(&[&["init", "-s", &space][..], &sizes].concat());
        let resource = format!("SPACE:disk-1:{}:{}", theirs.display(), 2 * area);
        sanlock(&[&["init", "-r", &resource][..], &sizes].concat());
        let (a, b) = (std::fs::read(&ours).unwrap(), std::fs::read(&theirs).unwrap());
        let different = a.iter().zip(&b).position(|(a, b)| a != b);
        assert_eq!(different, None, "sector {sector}, area {area}");
        // And we read what it wrote.
        let t = LeaseVolume::new(LeaseDisk::open(&theirs, geometry).unwrap(), name("SPACE"), 0);
        assert!(t.read_space(200).unwrap().iter().all(DeltaRecord::is_free));
        assert!(t.read_leader(1, name("disk-1")).unwrap().is_free());
        assert!(matches!(t.read_leader(1, name("disk-2")), Err(DiskError::Foreign { .. })));
        assert!(matches!(t.read_leader(0, name("disk-1")), Err(DiskError::Layout { .. })));
    }
}

#[test]
fn sanlock_reads_our_leases() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases");
    let v = volume(&path, Geometry::S512);
    v.format_space(10).unwrap();
    v.format_resource(0, name("disk-7")).unwrap();
    let delta = DeltaRecord {
        owner: HostId(3),
        generation: 5,
        timestamp: 1234,
        name: name("host-three"),
        io_timeout: 10,
    };
    v.write_delta(HostId(3), delta).unwrap();
    let text = sanlock(&["read_leader", "-s", &format!("SPACE:3:{}:0", path.display())]);
    let expected = [
        ("owner_id", "3"),
        ("owner_generation", "5"),
        ("timestamp", "1234"),
        ("resource_name", "host-three"),
    ];
    for (key, value) in expected {
        assert_eq!(field(&text, key), value);
    }
    let owner = Incarnation { host: HostId(3), generation: 5 };
    let leader = Leader { owner, lver: 42, timestamp: 1300, short_hold: false, writer: owner };
    v.write_leader(0, name("disk-7"), leader).unwrap();
    let block = HostBlock {
        paxos: DBlock {
            mbal: 2003,
            bal: 2003,
            input: owner,
            input_timestamp: 1300,
            lver: 42,
            released: false,
        },
        mode: ModeBlock { shared: true, generation: 5 },
    };
    v.write_block(0, HostId(3), block).unwrap();
    let text = sanlock(&["read_leader", "-r", &format!("SPACE:disk-7:{}:1048576", path.display())]);
    for (key, value) in [("owner_id", "3"), ("owner_generation", "5"), ("lver", "42"), ("write_id", "3")] {
        assert_eq!(field(&text, key), value);
    }
    let dump = sanlock(&["dump", &format!("{}:0:2097152", path.display())]);
    assert!(dump.contains("host-three") && dump.contains("disk-7"), "{dump}");
    assert_eq!(v.read_delta(HostId(3)).unwrap(), delta);
    assert_eq!(v.read_leader(0, name("disk-7")).unwrap(), leader);
    assert_eq!(v.read_blocks(0, 4).unwrap()[2], block);
}

#[test]
fn damage_and_hosts_out_of_range_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases");
    let v = volume(&path, Geometry::S512);
    assert!(matches!(v.read_delta(HostId(1)), Err(DiskError::Layout { .. })), "not formatted");
    assert!(matches!(v.read_delta(HostId(2001)), Err(DiskError::NoRoom(_))));
    assert!(matches!(v.write_block(0, HostId(0), HostBlock::default()), Err(DiskError::NoRoom(_))));
    assert!(LeaseDisk::open(Path::new("/nonexistent/leases"), Geometry::S512).is_err());
}
