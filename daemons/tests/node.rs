//! The host agent's API over TLS: who has no good certificate is told nothing.

#![expect(clippy::unwrap_used, reason = "a failure in a test's helper fails the test")]

mod certificates;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Output};

use certificates::{authority, certificate, client};

struct Node(Child);

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn nacre(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nacre")).arg("cluster").args(args).output().unwrap()
}

#[test]
fn the_api_over_tls_wants_a_good_certificate_of_each_side() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (ours, others) = (authority(at("ours")), authority(at("others")));
    certificate(&ours, &ours, "server", "2");
    certificate(&ours, &ours, "client", "2");
    let (nobody, stranger, late) =
        (client(at("nobody"), &ours), client(at("stranger"), &ours), client(at("late"), &ours));
    certificate(&others, &stranger, "client", "2");
    certificate(&ours, &late, "client", "-1");
    let wary = client(at("wary"), &others);
    certificate(&ours, &wary, "client", "2");

    let leases = at("leases");
    let formatted =
        nacre(&["format", leases.to_str().unwrap(), "--space", "s", "--areas", "1", "--io-timeout", "1"]);
    assert!(formatted.status.success(), "{formatted:?}");
    std::fs::write(at("key"), "a secret of the test's own").unwrap();
    // Other programs could take the ports before the agent does; they do not, in practice.
    let link = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = serde_json::json!({
        "host": 1, "name": "one", "hosts": [{"id": 1, "addresses": [link]}], "links": [{"local": link}],
        "key": at("key"), "state": at("state"), "socket": at("api"), "store": "local",
        "remote": {"address": format!("127.0.0.1:{port}"), "certificates": ours},
        "volumes": [{"path": leases, "space": "s"}], "timing": {"io_timeout": 1, "watchdog": 10},
        "without_watchdog": true, "capacity": {"cpu": 1000, "memory": 1024},
    });
    std::fs::write(at("node.json"), config.to_string()).unwrap();
    let node = Command::new(env!("CARGO_BIN_EXE_nacre-node")).arg("--config").arg(at("node.json")).spawn();
    let _node = Node(node.unwrap());
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        std::thread::yield_now();
    }

    let name = format!("localhost:{port}");
    let ask = |host: &str, certificates: &Path| {
        let certificates = certificates.to_str().unwrap();
        nacre(&["status", "--json", "--connect", host, "--certificates", certificates])
    };
    let answered = |output: Output| {
        let reply: serde_json::Value = serde_json::from_slice(&output.stdout).expect("an answer");
        assert_eq!(reply["status"]["name"], "one");
    };
    let refused = |output: Output, why: &str| {
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(1), &b""[..]), "{error}");
        assert!(error.contains(why), "{error}");
    };
    answered(ask(&name, &ours));
    refused(ask(&name, &nobody), "CertificateRequired");
    refused(ask(&name, &stranger), "UnknownCA");
    refused(ask(&name, &late), "CertificateExpired");
    // The client does not trust the agent's authority, or asks for another name.
    refused(ask(&name, &wary), "UnknownIssuer");
    refused(ask(&format!("127.0.0.1:{port}"), &ours), "not valid for name");
    // Without TLS nobody is answered.
    let mut plain = TcpStream::connect(("127.0.0.1", port)).unwrap();
    plain.write_all(b"{\"command\":\"status\"}\n").unwrap();
    let mut said = Vec::new();
    // The connection may be reset while this reads.
    let _ = plain.read_to_end(&mut said);
    assert!(!String::from_utf8_lossy(&said).contains("status"));
    // Those who say nothing, however many they are, take nobody's place.
    let _silent: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    answered(ask(&name, &ours));
}
