//! An etcd server of one member, and connections to it.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cluster::store::{EtcdStore, Store};

/// A server that ends with this.
pub struct Server {
    process: Child,
    /// Where clients find it.
    pub url: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Server {
    /// Starts a server that keeps its data in `dir`.
    pub fn start(dir: &Path) -> Self {
        let port = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let [client, peer] = [(); 2].map(|()| format!("http://127.0.0.1:{}", port()));
        let process = Command::new("etcd")
            .arg("--data-dir")
            .arg(dir)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is missing: install the Debian package etcd-server");
        Server { process, url: client }
    }

    /// Connects as soon as the server answers.
    pub fn connect(&self, prefix: &str) -> EtcdStore {
        for _ in 0..600 {
            if let Ok(mut store) = EtcdStore::connect(std::slice::from_ref(&self.url), prefix)
                && store.observe().is_ok()
            {
                return store;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("etcd does not answer at {}", self.url);
    }
}
