//! One suite for every store, and the election on top of it.

#![expect(clippy::unwrap_used, reason = "a failure in a test's helper fails the test")]

use std::sync::Arc;

use cluster::ha::{HostRecord, Update, VmPhase, VmRecord, VmSpec};
use cluster::store::{LocalStore, Store};
use cluster::types::{HostId, Incarnation, Resources, VmId};

fn vm(id: u32, epoch: u64) -> Update {
    let spec = Arc::new(VmSpec {
        id: VmId(id),
        priority: 0,
        depends_on: vec![],
        demand: Resources::default(),
        disks: vec![],
        definition: "{}".into(),
    });
    Update::Vm(VmRecord { spec, wanted: true, place: None, epoch, phase: VmPhase::Waiting })
}

fn conforms(store: &mut dyn Store) {
    let one = Incarnation { host: HostId(1), generation: 1 };
    let two = Incarnation { host: HostId(2), generation: 1 };
    assert_eq!(store.observe().unwrap(), None);
    assert!(!store.write(7, &[vm(1, 1)]).unwrap(), "a write needs the key");
    let (a, b) = (store.grant(5000).unwrap(), store.grant(5000).unwrap());
    let first = store.campaign(one, a).unwrap().unwrap();
    assert_eq!((first.host, first.lease), (one, a));
    assert_eq!(store.campaign(two, b).unwrap(), Some(first), "the key exists");
    assert_eq!(store.observe().unwrap(), Some(first));
    assert!(store.renew(a).unwrap());
    let host = Update::Host(HostId(1), HostRecord { boot: 3, ..HostRecord::default() });
    assert!(store.write(first.token, &[host, vm(1, 1), vm(2, 1), vm(1, 2)]).unwrap());
    assert!(!store.write(first.token + 1, &[vm(1, 9)]).unwrap());
    assert!(store.write(first.token, &[Update::Forget(VmId(2))]).unwrap());
    for halted in [true, false, true] {
        assert!(store.write(first.token, &[Update::Halt(halted)]).unwrap());
        assert_eq!(store.load().unwrap().halted, halted);
    }
    let state = store.load().unwrap();
    assert_eq!(state.hosts[&HostId(1)].boot, 3);
    assert_eq!(state.vms.keys().copied().collect::<Vec<_>>(), [VmId(1)]);
    assert_eq!(state.vms[&VmId(1)].epoch, 2, "the last write of a record wins");
    store.resign(a).unwrap();
    assert_eq!(store.observe().unwrap(), None);
    assert!(!store.renew(a).unwrap());
    let second = store.campaign(two, b).unwrap().unwrap();
    assert!(second.token > first.token && second.host == two);
    assert!(!store.write(first.token, &[vm(1, 8)]).unwrap(), "the old token is dead");
    assert_eq!(store.load().unwrap(), state);
    store.resign(b).unwrap();
}

#[test]
fn the_local_store_conforms_and_its_tokens_rise_across_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cluster.redb");
    let mut store = LocalStore::open(&path).unwrap();
    conforms(&mut store);
    let me = Incarnation { host: HostId(1), generation: 2 };
    let lease = store.grant(5000).unwrap();
    let token = store.campaign(me, lease).unwrap().unwrap().token;
    drop(store);
    let mut store = LocalStore::open(&path).unwrap();
    assert_eq!(store.observe().unwrap(), None, "leases end with the process");
    let lease = store.grant(5000).unwrap();
    assert!(store.campaign(me, lease).unwrap().unwrap().token > token);
    assert_eq!(store.load().unwrap().vms.len(), 1);
}

#[cfg(feature = "etcd")]
mod etcd_server;

#[cfg(feature = "etcd")]
mod etcd {
    use super::etcd_server::Server;
    use super::{Store, conforms};

    #[test]
    fn etcd_conforms() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(dir.path());
        conforms(&mut server.connect("/test"));
    }

    #[test]
    fn a_dead_member_is_an_error_in_time_not_a_hang() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(dir.path());
        let mut store = server.connect("/test");
        drop(server);
        assert!(store.observe().is_err());
        assert!(store.write(1, &[]).is_err());
    }
}
