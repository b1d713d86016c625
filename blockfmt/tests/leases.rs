//! The hook for leases of a cluster: asked before an image is used, told after it was closed.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

use blockfmt::job::{self, JobControl};
use blockfmt::storage::{LeaseError, Leases};
use blockfmt::{CreateOptions, Error, Format, LockMode, OpenOptions};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

const SIZE: u64 = 1 << 20;

/// The leases of a cluster of two hosts: one writer or several readers of an image.
#[derive(Debug, Default)]
struct Cluster(Mutex<BTreeMap<String, Vec<(u32, LockMode)>>>);

#[derive(Debug)]
struct Host {
    number: u32,
    cluster: Arc<Cluster>,
}

fn name(image: &Path) -> String {
    assert!(image.is_absolute(), "{image:?}");
    image.file_name().unwrap().to_str().unwrap().to_owned()
}

impl Leases for Host {
    fn acquire(&self, image: &Path, mode: LockMode) -> Result<(), LeaseError> {
        let mut leases = self.cluster.0.lock().unwrap();
        let held = leases.entry(name(image)).or_default();
        let conflicts = |(host, other): &(u32, LockMode)| {
            *host != self.number && (mode != LockMode::Read || *other != LockMode::Read)
        };
        match held.iter().find(|lease| conflicts(lease)) {
            Some((host, _)) => Err(format!("Host {host} has it").into()),
            None => {
                held.push((self.number, mode));
                Ok(())
            }
        }
    }

    fn release(&self, image: &Path, mode: LockMode) {
        let mut leases = self.cluster.0.lock().unwrap();
        let held = leases.get_mut(&name(image)).unwrap();
        let at = held.iter().position(|lease| *lease == (self.number, mode));
        held.swap_remove(at.expect("what is given back was granted"));
    }
}

impl Cluster {
    /// Who holds what, without what nobody holds.
    fn held(&self) -> Vec<(String, Vec<(u32, LockMode)>)> {
        let leases = self.0.lock().unwrap();
        leases.clone().into_iter().filter(|(_, held)| !held.is_empty()).collect()
    }
}

fn held(list: &[(&str, LockMode)]) -> Vec<(String, Vec<(u32, LockMode)>)> {
    list.iter().map(|(name, mode)| ((*name).to_owned(), vec![(1, *mode)])).collect()
}

#[test]
fn every_image_is_asked_for_and_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    CreateOptions::new(Format::Raw, SIZE).create(&at("base")).unwrap();
    CreateOptions::new(Format::Qcow2, SIZE).backing("base", Format::Raw).create(&at("disk")).unwrap();
    let cluster = Arc::new(Cluster::default());
    // No locks of this host: only the leases keep the two apart, as on different hosts.
    let open = |number, name: &str| {
        let leases = Arc::new(Host { number, cluster: cluster.clone() });
        OpenOptions::new(Format::Qcow2).leases(leases).open(at(name))
    };
    let disk = open(1, "disk").unwrap();
    assert_eq!(cluster.held(), held(&[("base", LockMode::Read), ("disk", LockMode::Write)]));
    match open(2, "disk") {
        Err(error @ Error::NoLease { .. }) => {
            assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "Host 1 has it");
        }
        other => panic!("{other:?}"),
    }
    // Another name of the same file is the same image.
    std::os::unix::fs::symlink("disk", at("alias")).unwrap();
    assert!(matches!(open(2, "alias"), Err(Error::NoLease { .. })));

    // Snapshots and jobs ask as well, and an image that a job wrote to is read again afterwards.
    disk.snapshot(&at("top"), &CreateOptions::new(Format::Qcow2, 0)).unwrap();
    disk.write_at(&[1; 4096], 0).unwrap();
    job::commit(&disk, 1, &JobControl::new()).unwrap();
    assert_eq!(cluster.held(), held(&[("base", LockMode::Read), ("top", LockMode::Write)]));
    job::commit(&disk, 0, &JobControl::new()).unwrap();
    assert_eq!(cluster.held(), held(&[("base", LockMode::Write)]));
    drop(disk);
    assert_eq!(cluster.held(), []);
    drop(open(2, "disk").unwrap());
    assert_eq!(cluster.held(), []);
}

#[test]
fn a_job_that_gets_no_lease_leaves_the_chain_alone() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    CreateOptions::new(Format::Qcow2, SIZE).create(&at("base")).unwrap();
    for name in ["one", "two"] {
        CreateOptions::new(Format::Qcow2, SIZE).backing("base", Format::Qcow2).create(&at(name)).unwrap();
    }
    let cluster = Arc::new(Cluster::default());
    let open = |number, name: &str| {
        let leases = Arc::new(Host { number, cluster: cluster.clone() });
        OpenOptions::new(Format::Qcow2).leases(leases).open(at(name)).unwrap()
    };
    let (one, two) = (open(1, "one"), open(2, "two"));
    let result = job::commit(&one, 0, &JobControl::new());
    assert!(matches!(result, Err(Error::NoLease { .. })), "{result:?}");
    assert_eq!(one.layers().len(), 2);
    let readers =
        |cluster: &Cluster| cluster.held().into_iter().find(|(name, _)| name == "base").unwrap().1.len();
    assert_eq!(readers(&cluster), 2, "the job gave up its own lease");
    drop(two);
    job::commit(&one, 0, &JobControl::new()).unwrap();
}
