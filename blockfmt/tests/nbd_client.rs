//! The NBD client against our server, QEMU's and nbdkit, with and without TLS.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::format::qcow2::Qcow2Options;
use blockfmt::nbd::{Export, NbdOptions, NbdStorage, Server, TlsClient, TlsServer};
use blockfmt::{CreateOptions, Disk, Error, Format, OpenOptions, Storage};
use common::{Rng, assert_same, exercise, make_certificates, qemu, qemu_ok, text};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

const SIZE: u64 = 6 << 20;

/// A server program that ends with the test.
struct Program(Child);

impl Program {
    fn start(program: &str, package: &str, args: &[&str], socket: &Path) -> Self {
        let child = Command::new(program).args(args).spawn();
        let child = child
            .unwrap_or_else(|e| panic!("cannot run {program} ({e}); install the Debian package {package}"));
        let mut program = Program(child);
        while !socket.exists() {
            assert!(program.0.try_wait().unwrap().is_none(), "the server ended");
            std::thread::sleep(Duration::from_millis(10));
        }
        program
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn uri(export: &str, socket: &Path) -> String {
    format!("nbd+unix:///{export}?socket={}", text(socket))
}

fn open(uri: &str) -> Disk {
    OpenOptions::new(Format::Raw).open(uri).unwrap()
}

fn serve(dir: &Path) -> (Server, Disk) {
    let path = dir.join("disk.qcow2");
    CreateOptions::new(Format::Qcow2, SIZE).create(&path).unwrap();
    let disk = OpenOptions::new(Format::Qcow2).open(&path).unwrap();
    let server = Server::new();
    for (name, read_only) in [("disk", false), ("fixed", true)] {
        let export = Export { name: name.into(), description: String::new(), disk: disk.clone(), read_only };
        server.add_export(export).unwrap();
    }
    (server, disk)
}

#[test]
fn our_server() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (server, served) = serve(dir.path());
    let socket = dir.path().join("s");
    server.listen_unix(&socket).unwrap();
    let tcp = server.listen_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let mut model = vec![0; SIZE as usize];
    let mut rng = Rng(1);
    for uri in [uri("disk", &socket), format!("nbd://{tcp}/disk")] {
        let disk = open(&uri);
        exercise(&disk, &mut model, &mut rng, 100);
        assert_same(&served, &model);
        // Many threads on several connections, each in a part of its own.
        std::thread::scope(|scope| {
            for (n, part) in model.chunks_mut(1 << 20).enumerate() {
                let disk = &disk;
                scope.spawn(move || {
                    let mut rng = Rng(100 + n as u64);
                    for _ in 0..20 {
                        let at = rng.below(part.len() as u64 - 5000) as usize;
                        let data = rng.bytes(5000);
                        disk.write_at(&data, ((n << 20) + at) as u64).unwrap();
                        part[at..at + 5000].copy_from_slice(&data);
                        let mut seen = vec![0; part.len()];
                        disk.read_at(&mut seen, (n << 20) as u64).unwrap();
                        assert!(seen == part);
                    }
                });
            }
        });
        disk.flush().unwrap();
        assert_same(&served, &model);
    }
    // Holes are seen through the connection.
    served.write_zeroes(1 << 20, 1 << 20, true).unwrap();
    let storage = NbdStorage::connect(&uri("disk", &socket), NbdOptions::default()).unwrap();
    assert_eq!(storage.data_at(1 << 20, 4 << 20).unwrap(), (false, 1 << 20));
    let error = storage.set_len(SIZE + 1).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTSUP));
    let fixed = open(&uri("fixed", &socket));
    assert!(matches!(fixed.write_at(&[1], 0), Err(Error::ReadOnly)));
    let missing = OpenOptions::new(Format::Raw).open(uri("none", &socket)).unwrap_err();
    assert_eq!(missing.errno(), libc::EIO);
}

#[test]
fn servers_of_others() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let [q, k, r, image, raw] = ["q", "k", "r", "a.qcow2", "raw"].map(|name| dir.path().join(name));
    let mut rng = Rng(2);
    let mut model = vec![0; SIZE as usize];
    // qemu-nbd, with an image inside of the export.
    qemu_ok("qemu-img", &["create", "-f", "qcow2", text(&image), "6M"]);
    let args = ["-f", "qcow2", "-t", "-e", "8", "-x", "a b", "-k", text(&q), text(&image)];
    let program = Program::start("qemu-nbd", "qemu-utils", &args, &q);
    let disk = open(&uri("a%20b", &q));
    exercise(&disk, &mut model, &mut rng, 150);
    assert_same(&disk, &model);
    disk.flush().unwrap();
    drop(disk);
    drop(program);
    assert_same(&OpenOptions::new(Format::Qcow2).open(&image).unwrap(), &model);
    // nbdkit, which insists on blocks of 4 KiB, and on requests of few of them.
    for most in ["4096", "12288", "32M"] {
        let most = format!("blocksize-maximum={most}");
        let policy = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-error-policy=error"];
        let args = ["-f", "-U", text(&k), "--filter=blocksize-policy", "memory", "6M", &most];
        let program = Program::start("nbdkit", "nbdkit", &[&args[..], &policy[..]].concat(), &k);
        let disk = open(&uri("", &k));
        model.fill(0);
        exercise(&disk, &mut model, &mut rng, 150);
        assert_same(&disk, &model);
        drop(disk);
        drop(program);
        std::fs::remove_file(&k).unwrap();
    }
    // A chain whose top is remote: formats work over the wire, too.
    std::fs::write(&raw, vec![0; 8 << 20]).unwrap();
    let args = ["-f", "raw", "-t", "-e", "8", "-k", text(&r), text(&raw)];
    let _program = Program::start("qemu-nbd", "qemu-utils", &args, &r);
    let remote = NbdStorage::connect(&uri("", &r), NbdOptions::default()).unwrap();
    let qcow2 = Qcow2Options { cluster_size: Some(4096), ..Qcow2Options::default() };
    let create = CreateOptions::new(Format::Qcow2, 1 << 20).qcow2(qcow2);
    let error = create.create_on(std::sync::Arc::new(remote)).unwrap_err();
    assert_eq!(error.errno(), libc::ENOTSUP, "an export cannot be truncated: {error}");
}

#[test]
fn lost_connections() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (socket, raw) = (dir.path().join("s"), dir.path().join("raw"));
    std::fs::write(&raw, vec![7; SIZE as usize]).unwrap();
    let args = ["-f", "raw", "-t", "-e", "8", "-k", text(&socket), text(&raw)];
    let start = || Program::start("qemu-nbd", "qemu-utils", &args, &socket);
    let program = start();
    let options = NbdOptions { reconnect: Duration::from_secs(60), ..NbdOptions::default() };
    let storage = NbdStorage::connect(&uri("", &socket), options).unwrap();
    let storage: &dyn Storage = &storage;
    storage.write_at(&[1; 512], 0).unwrap();
    storage.sync().unwrap();
    let restart = |program: Program| {
        drop(program);
        let _ = std::fs::remove_file(&socket);
        start()
    };
    // What was flushed survives; the reader notices nothing.
    let program = restart(program);
    let mut seen = [0; 1024];
    storage.read_at(&mut seen, 0).unwrap();
    assert!(seen[..512] == [1; 512] && seen[512..] == [7; 512]);
    storage.write_at(&[2; 512], 0).unwrap();
    storage.sync().unwrap();
    // What was not flushed may be lost, and nobody claims otherwise.
    storage.write_at(&[3; 512], 0).unwrap();
    let program = restart(program);
    storage.read_at(&mut seen, 0).unwrap();
    assert!(storage.sync().is_err());
    assert!(storage.sync().is_err(), "the failure is forgotten");
    drop(program);
    let _ = std::fs::remove_file(&socket);
    let options = NbdOptions { reconnect: Duration::ZERO, ..NbdOptions::default() };
    assert!(NbdStorage::connect(&uri("", &socket), options).is_err());
}

/// A server that offers contexts for ever, or more than were asked for, costs no memory.
#[test]
fn contexts_that_nobody_asked_for() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let socket = dir.path().join("nbd");
    let listener = UnixListener::bind(&socket).unwrap();
    let reply = |option: u32, kind: u32, data: &[u8]| {
        let head = [&0x3_e889_0455_65a9u64.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes()];
        [&head.concat()[..], &(data.len() as u32).to_be_bytes(), data].concat()
    };
    let context = |id: u8, name: &[u8]| reply(10, 4, &[&[0, 0, 0, id][..], name].concat());
    let export = [&[0; 2][..], &SIZE.to_be_bytes(), &[0, 1]].concat();
    let says = [
        b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
        reply(11, 0x8000_0001, b""),
        reply(8, 1, b""),
        context(1, b"base:allocation"),
        context(2, b"base:allocation"),
        context(3, b"qemu:dirty-bitmap:other").repeat(1000),
        reply(10, 1, b""),
        reply(7, 3, &export),
        reply(7, 1, b""),
    ];
    let peer = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&says.concat()).unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
    });
    let storage = NbdStorage::connect(&uri("e", &socket), NbdOptions::default()).unwrap();
    assert_eq!(storage.contexts().collect::<Vec<_>>(), ["base:allocation"]);
    drop(storage);
    peer.join().unwrap();
}

trait Peer: Read + Write {}

impl<T: Read + Write> Peer for T {}

/// A server of the oldest protocol, with TLS if the client wants it, that answers `reads` requests only once it has got
/// all of them, the last one first. A byte of its export is the number of its page.
fn reversing_server(listener: &TcpListener, reads: usize, tls: Option<TlsServer>) -> std::io::Result<()> {
    let (plain, _) = listener.accept()?;
    let mut s: Box<dyn Peer> = Box::new(plain.try_clone()?);
    s.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    s.read_exact(&mut [0; 4])?;
    loop {
        let mut option = [0; 16];
        s.read_exact(&mut option)?;
        let len = u32::from_be_bytes(option[12..].try_into().unwrap());
        s.read_exact(&mut vec![0; len as usize])?;
        if option[11] == 1 {
            break; // the name of the export
        }
        let starts_tls = tls.as_ref().filter(|_| option[11] == 5);
        let answer = if starts_tls.is_some() { [0, 0, 0, 1] } else { [0x80, 0, 0, 1] };
        let head = 0x0003_e889_0455_65a9u64.to_be_bytes();
        s.write_all(&[&head[..], &[0, 0, 0, option[11]], &answer, &[0; 4]].concat())?;
        if let Some(tls) = starts_tls {
            s = Box::new(tls.accept(plain.try_clone()?)?);
        }
    }
    s.write_all(&[&SIZE.to_be_bytes()[..], &[0, 1]].concat())?;
    let mut requests = Vec::new();
    for _ in 0..reads {
        let mut request = [0; 28];
        s.read_exact(&mut request)?;
        requests.push(request);
    }
    for request in requests.iter().rev() {
        let offset = u64::from_be_bytes(request[16..24].try_into().unwrap());
        let len = u32::from_be_bytes(request[24..].try_into().unwrap());
        s.write_all(&[&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &request[8..16]].concat())?;
        s.write_all(&vec![(offset / 4096) as u8; len as usize])?;
        s.flush()?;
    }
    s.read_exact(&mut [0; 28]) // goodbye
}

#[test]
fn requests_of_many_threads_share_a_connection() {
    const READS: usize = 50;
    let pki = tempfile::tempdir().unwrap();
    make_certificates(pki.path());
    for with_tls in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let tls = with_tls.then(|| TlsServer::from_directory(pki.path(), true).unwrap());
        let server = std::thread::spawn(move || reversing_server(&listener, READS, tls));
        let uri = match with_tls {
            false => format!("nbd://localhost:{port}/"),
            true => format!("nbds://localhost:{port}/?tls-certificates={}", text(pki.path())),
        };
        // A client that waits for one answer before the next request gets none.
        let options = NbdOptions {
            timeout: Duration::from_secs(20),
            reconnect: Duration::ZERO,
            ..NbdOptions::default()
        };
        let storage = NbdStorage::connect(&uri, options).unwrap();
        std::thread::scope(|scope| {
            for n in 0..READS {
                let storage: &dyn Storage = &storage;
                scope.spawn(move || {
                    let mut seen = vec![0xff; 512 * (n + 1)];
                    storage.read_at(&mut seen, n as u64 * 4096).unwrap();
                    assert!(seen.iter().all(|byte| *byte == n as u8));
                });
            }
        });
        drop(storage);
        server.join().unwrap().unwrap();
    }
}

#[test]
fn tls() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (pki, other) = (dir.path().join("pki"), dir.path().join("other"));
    for place in [&pki, &other] {
        std::fs::create_dir(place).unwrap();
        make_certificates(place);
    }
    let (server, served) = serve(dir.path());
    server.require_tls(TlsServer::from_directory(&pki, true).unwrap());
    let tcp = server.listen_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let secure = |pki: &Path| format!("nbds://localhost:{}/disk?tls-certificates={}", tcp.port(), text(pki));
    let mut model = vec![0; SIZE as usize];
    let disk = open(&secure(&pki));
    exercise(&disk, &mut model, &mut Rng(3), 100);
    assert_same(&served, &model);
    drop(disk);
    // Without TLS, and with somebody else's certificates, nothing is served.
    let refused = |uri: &str| {
        let options = NbdOptions { reconnect: Duration::ZERO, ..NbdOptions::default() };
        NbdStorage::connect(uri, options).expect_err(uri)
    };
    refused(&format!("nbd://localhost:{}/disk", tcp.port()));
    refused(&secure(&other));
    // QEMU and libnbd speak to our server.
    let raw = dir.path().join("model");
    std::fs::write(&raw, &model).unwrap();
    let object = format!("tls-creds-x509,id=t,dir={},endpoint=client", text(&pki));
    let image = format!("driver=nbd,host=localhost,port={},export=disk,tls-creds=t", tcp.port());
    let model_image = format!("driver=raw,file.filename={}", text(&raw));
    qemu_ok("qemu-img", &["compare", "--object", &object, "--image-opts", &image, &model_image]);
    let plain = format!("driver=nbd,host=localhost,port={},export=disk", tcp.port());
    assert!(!qemu("qemu-img", &["info", "--image-opts", &plain]).status.success());
    let copy = dir.path().join("copy");
    let output = Command::new("nbdcopy").args([&secure(&pki), text(&copy)]).output();
    let output = output.expect("cannot run nbdcopy; install the Debian package libnbd-bin");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(std::fs::read(&copy).unwrap() == model);
    // Our client speaks to QEMU's server.
    let object = format!("tls-creds-x509,id=t,dir={},endpoint=server,verify-peer=yes", text(&pki));
    let socket = dir.path().join("q");
    let args = [
        "--object",
        &object,
        "--tls-creds",
        "t",
        "-f",
        "raw",
        "-t",
        "-e",
        "8",
        "-k",
        text(&socket),
        text(&raw),
    ];
    let _program = Program::start("qemu-nbd", "qemu-utils", &args, &socket);
    let uri = format!("nbds+unix:///?socket={}&tls-certificates={}", text(&socket), text(&pki));
    assert_same(&open(&uri), &model);
}

#[test]
fn what_a_peer_said_last_is_heard_also_after_a_write_failed() {
    let dir = tempfile::tempdir().unwrap();
    let (pki, nobody) = (dir.path().join("pki"), dir.path().join("nobody"));
    std::fs::create_dir(&pki).unwrap();
    std::fs::create_dir(&nobody).unwrap();
    make_certificates(&pki);
    std::fs::copy(pki.join("ca-cert.pem"), nobody.join("ca-cert.pem")).unwrap();
    let tls = TlsServer::from_directory(&pki, true).unwrap();
    // Connects, and writes until that fails: the server has gone before the first write.
    let write = |certificates: &Path, last_words: &'static [u8]| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let tls = tls.clone();
        let server = std::thread::spawn(move || {
            let mut stream = tls.accept(listener.accept().unwrap().0)?;
            stream.write_all(last_words)
        });
        let client = TlsClient::from_directory(certificates).unwrap();
        let mut stream = client.connect(TcpStream::connect(address).unwrap(), "localhost").unwrap();
        let served = server.join().unwrap();
        let error = loop {
            if let Err(error) = stream.write_all(&[0; 4096]) {
                break error.to_string();
            }
        };
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).unwrap_err();
        (served.is_ok(), error, heard)
    };
    let (served, error, heard) = write(&nobody, b"");
    assert!(!served && heard.is_empty() && error.contains("CertificateRequired"), "{error}");
    // One that was let in hears what was said to it.
    let (served, error, heard) = write(&pki, b"go away");
    assert!(served && heard == b"go away", "{error}");
}
