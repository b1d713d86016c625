//! A VM moves between real agents (leases on a real file, UDP, etcd) while it writes: its disk has one writer at any
//! moment, and its lock changes hands without ever being free.

#![expect(clippy::unwrap_used, reason = "a failure in a test's helper fails the test")]

mod etcd_server;

use std::fs::File;
use std::net::UdpSocket;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use cluster::adapters::{LeaseDisk, LeaseVolume};
use cluster::agent::{
    Agent, AgentConfig, AgentHandle, ApiReply, ApiRequest, VmEvents, VmRunner, resource_name,
};
use cluster::ha::{VmPhase, VmSpec};
use cluster::node::{VmAction, VmEvent};
use cluster::ondisk::{Geometry, Name};
use cluster::types::{HostId, LockspaceId, ResourceId, Resources, VmId};

const PATIENCE: Duration = Duration::from_secs(10);
const VM: VmId = VmId(7);
const MOVES: usize = 6;

/// The disk that all hosts reach.
struct Disk {
    file: File,
    writers: AtomicUsize,
    /// The guest's memory: how many records it has written. It travels with a move.
    memory: Mutex<u64>,
}

/// A guest that writes its next record again and again.
struct Guest {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Guest {
    fn run(disk: Arc<Disk>, host: HostId) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            assert_eq!(disk.writers.fetch_add(1, Ordering::SeqCst), 0, "two hosts write");
            let mut next = *disk.memory.lock().unwrap();
            while !stopped.load(Ordering::SeqCst) {
                let record = [next, u64::from(host.0)].map(u64::to_le_bytes).concat();
                disk.file.write_all_at(&record, next * 16).unwrap();
                next += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            *disk.memory.lock().unwrap() = next;
            disk.writers.fetch_sub(1, Ordering::SeqCst);
        });
        Guest { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap();
    }
}

struct Runner {
    host: HostId,
    disk: Arc<Disk>,
    events: VmEvents,
    guest: Option<Guest>,
}

impl Runner {
    fn halt(&mut self) {
        if let Some(guest) = self.guest.take() {
            guest.stop();
        }
    }
}

impl VmRunner for Runner {
    fn act(&mut self, vm: VmId, epoch: u64, action: VmAction) {
        let event = match action {
            VmAction::Start(_) | VmAction::Resume => {
                self.guest = Some(Guest::run(self.disk.clone(), self.host));
                VmEvent::Started
            }
            // It has nothing to set up.
            VmAction::Receive { .. } => return,
            VmAction::MoveTo(_) => {
                self.halt();
                VmEvent::Quiesced
            }
            VmAction::Stop | VmAction::Kill => {
                self.halt();
                VmEvent::Exited
            }
        };
        self.events.tell(vm, epoch, event, None);
    }

    fn usage(&mut self) -> Vec<(VmId, Resources)> {
        Vec::new()
    }

    fn reset(&mut self) {
        self.halt();
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.halt();
    }
}

fn config(dir: &Path, etcd: &str, ports: &[u16], host: usize) -> AgentConfig {
    let address = |port: &u16| format!("127.0.0.1:{port}");
    let hosts: Vec<_> =
        (1..).zip(ports).map(|(id, p)| serde_json::json!({"id": id, "addresses": [address(p)]})).collect();
    let config = serde_json::json!({
        "host": host + 1, "name": format!("host-{}", host + 1), "hosts": hosts,
        "links": [{"local": address(&ports[host])}], "key": dir.join("key"),
        "state": dir.join(format!("state{host}")), "socket": dir.join(format!("api{host}")),
        "store": {"etcd": {"endpoints": [etcd], "prefix": "/move"}},
        "volumes": [{"path": dir.join("leases"), "space": "moves"}],
        "timing": {"io_timeout": 2, "watchdog": 10}, "without_watchdog": true,
        "capacity": {"cpu": 4000, "memory": 4096}, "ha": {"repeat": 300},
        "heartbeat": {"interval": 500, "misses": 30, "settle": 5000, "stop": 5000},
    });
    serde_json::from_value(config).unwrap()
}

/// Asks every agent until one gives what is wanted.
fn until<T>(agents: &[AgentHandle], request: &ApiRequest, wanted: impl Fn(ApiReply) -> Option<T>) -> T {
    loop {
        if let Some(value) = agents.iter().find_map(|a| wanted(a.call(request.clone(), PATIENCE))) {
            return value;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Where the VM runs, once the coordinator says so.
fn home(agents: &[AgentHandle]) -> HostId {
    until(agents, &ApiRequest::Vms, |reply| match reply {
        ApiReply::Vms(vms) => {
            vms.iter().find(|v| v.record.phase == VmPhase::Running)?.record.place.map(|p| p.host)
        }
        _ => None,
    })
}

#[test]
fn a_vm_moves_between_agents_and_two_never_write() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let etcd = etcd_server::Server::start(&at("etcd"));
    drop(etcd.connect("/move"));
    std::fs::write(at("key"), "a secret of the test's own").unwrap();
    File::create(at("leases")).unwrap().set_len(4 << 20).unwrap();
    let space = Name::new("moves").unwrap();
    let volume = LeaseVolume::new(LeaseDisk::open(&at("leases"), Geometry::S512).unwrap(), space, 0);
    volume.format_space(2).unwrap();
    volume.format_resource(1, resource_name(1)).unwrap();
    let file = File::options().read(true).write(true).create_new(true).open(at("disk")).unwrap();
    let disk = Arc::new(Disk { file, writers: AtomicUsize::new(0), memory: Mutex::new(0) });

    // Other programs could take the ports before the agents do; they do not, in practice.
    let ports = [(); 3].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port());
    let agents = [0, 1, 2].map(|host| {
        let disk = disk.clone();
        let runner = move |events| Ok(Runner { host: HostId(host as u16 + 1), disk, events, guest: None });
        Agent::start(config(dir.path(), &etcd.url, &ports, host), runner).unwrap()
    });
    let handles = agents.each_ref().map(Agent::handle);
    let done = |reply| (reply == ApiReply::Done).then_some(());
    let disks = vec![ResourceId { lockspace: LockspaceId(0), index: 1 }];
    let demand = Resources { cpu: 100, memory: 100 };
    let spec = Arc::new(VmSpec { id: VM, demand, disks, ..VmSpec::default() });
    until(&handles, &ApiRequest::Start { spec }, done);
    let mut homes = vec![home(&handles)];
    for _ in 0..MOVES {
        let last = homes[homes.len() - 1];
        let host = HostId(last.0 % 3 + 1);
        until(&handles, &ApiRequest::Move { vm: VM, host }, done);
        while home(&handles) == last {}
        homes.push(home(&handles));
        assert_eq!(homes[homes.len() - 1], host, "{homes:?}");
    }
    // Only the last owner has the lock, with the highest token.
    let held: Vec<usize> = handles
        .iter()
        .map(|a| match a.call(ApiRequest::Locks, PATIENCE) {
            ApiReply::Locks(locks) => locks.iter().filter(|l| l.resource.index == 1).count(),
            other => panic!("{other:?}"),
        })
        .collect();
    let last = usize::from(homes[MOVES].0) - 1;
    assert_eq!((held.iter().sum::<usize>(), held[last]), (1, 1));
    let mut tokens: Vec<(u64, u64)> = Vec::new();
    for handle in &handles {
        let ApiReply::Events(events) = handle.call(ApiRequest::Events { after: 0, limit: 10_000 }, PATIENCE)
        else {
            panic!("no events")
        };
        let taken = events.iter().filter(|e| e.kind == "lock.taken");
        tokens.extend(taken.map(|e| (e.time, e.message.rsplit(' ').next().unwrap().parse::<u64>().unwrap())));
    }
    tokens.sort_unstable();
    assert_eq!(tokens.len(), MOVES + 1, "each owner took it once: {tokens:?}");
    assert!(tokens.is_sorted_by(|a, b| a.1 < b.1), "{tokens:?}");
    drop(agents);

    // Every record was written once, in order, by the owners in turn.
    let written = *disk.memory.lock().unwrap();
    let mut owners = Vec::new();
    for n in 0..written {
        let mut record = [0; 16];
        disk.file.read_exact_at(&mut record, n * 16).unwrap();
        let (sequence, host) = record.split_at(8);
        assert_eq!(sequence, n.to_le_bytes());
        owners.push(HostId(u16::from_le_bytes([host[0], host[1]])));
    }
    owners.dedup();
    assert_eq!(owners, homes);
}
