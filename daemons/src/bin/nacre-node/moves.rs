//! Moving VMs between hosts while they run: what is said to their processes for it.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cluster::agent::AgentConfig;
use cluster::types::{HostId, VmId};
use serde_json::{Value, json};

/// How long a process may take to offer its socket, or to wait for a machine on another host.
const PATIENCE: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_millis(100);
/// Ports that the VMs share, each by its number.
const PORTS: u32 = 1000;

/// Where the hosts wait for VMs.
#[derive(Clone, Debug)]
pub struct Moves {
    hosts: BTreeMap<HostId, IpAddr>,
    me: HostId,
    port: u16,
    bandwidth: Option<u64>,
    certificates: Option<PathBuf>,
}

impl Moves {
    /// What the configuration says of moves; `None` when it does not want them.
    pub fn new(config: &AgentConfig) -> Option<Self> {
        let migration = config.migration.as_ref()?;
        let hosts = config.hosts.iter().filter_map(|h| Some((h.id, h.addresses.first()?.ip()))).collect();
        Some(Self {
            hosts,
            me: config.host,
            port: migration.port,
            bandwidth: migration.bandwidth,
            certificates: migration.certificates.clone(),
        })
    }

    fn address(&self, host: HostId, vm: VmId) -> Option<String> {
        let ip = self.hosts.get(&host)?;
        let port = u32::from(self.port).checked_add(vm.0 % PORTS).and_then(|p| u16::try_from(p).ok())?;
        Some(format!("tcp:{}", std::net::SocketAddr::new(*ip, port)))
    }

    /// Where this host waits for a VM.
    pub fn here(&self, vm: VmId) -> Option<String> {
        self.address(self.me, vm)
    }

    /// The directory of what TLS needs, if VMs come and go encrypted.
    pub fn certificates(&self) -> Option<&Path> {
        self.certificates.as_deref()
    }

    /// Sends the VM behind `control` to a host, where it stays paused, as it is here then, with its disks closed.
    pub fn send(&self, control: &Path, vm: VmId, to: HostId) -> Result<(), String> {
        let to = self.address(to, vm).ok_or("This host does not know where that one waits for VMs")?;
        let request = json!({
            "command": "migrate",
            "to": to,
            "tls_certificates": self.certificates,
            "park": true,
            "bandwidth": self.bandwidth,
        });
        let until = Instant::now() + PATIENCE;
        loop {
            let reply = ask(control, &request).map_err(|e| e.to_string())?;
            match reply["error"].as_str() {
                None => return Ok(()),
                // Its process there may begin a little later.
                Some(_) if reply["unreachable"] == true && Instant::now() < until => {
                    std::thread::sleep(RETRY)
                }
                Some(why) => return Err(why.to_owned()),
            }
        }
    }
}

/// Lets a paused VM go on; it opens its disks. `stop` ends the wait for its process.
pub fn resume(control: &Path, stop: &AtomicBool) -> Result<(), String> {
    let until = Instant::now() + PATIENCE;
    loop {
        match ask(control, &json!({ "command": "resume" })) {
            Ok(reply) => return reply["error"].as_str().map_or(Ok(()), |why| Err(why.to_owned())),
            // It offers its socket when it has all of the VM.
            Err(_) if Instant::now() < until && !stop.load(Ordering::Relaxed) => std::thread::sleep(RETRY),
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// Whether the VM behind `control` runs.
pub fn runs(control: &Path) -> bool {
    ask(control, &json!({ "command": "status" })).is_ok_and(|reply| reply["state"] == "running")
}

/// Asks a VM's process, and waits for the reply or the process's end.
fn ask(control: &Path, request: &Value) -> io::Result<Value> {
    let mut stream = UnixStream::connect(control)?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    serde_json::from_str(&line).map_err(|_| io::Error::other("Its process ended"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vm_has_a_port_on_each_host() {
        let hosts = [(1, "10.0.0.1"), (2, "fd00::2")].map(|(id, ip)| (HostId(id), ip.parse().unwrap()));
        let moves =
            Moves { hosts: hosts.into(), me: HostId(1), port: 7500, bandwidth: None, certificates: None };
        assert_eq!(moves.here(VmId(7)).as_deref(), Some("tcp:10.0.0.1:7507"));
        assert_eq!(moves.address(HostId(2), VmId(2001)).as_deref(), Some("tcp:[fd00::2]:7501"));
        assert_eq!(moves.address(HostId(3), VmId(1)), None);
        assert_eq!(Moves { port: 65000, ..moves }.here(VmId(999)), None, "there are no more ports");
    }
}
