//! The NBD server against QEMU's, libnbd's and a hostile client.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::nbd::{Export, NbdOptions, NbdStorage, Server};
use blockfmt::{CreateOptions, Disk, Format, OpenOptions};
use common::{Rng, assert_same, qemu_ok, text};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

const SIZE: u64 = (5 << 20) + 512;

fn libnbd(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let output =
        output.unwrap_or_else(|e| panic!("cannot run {program} ({e}); install the package libnbd-bin"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A server with a qcow2 disk "disk" and the same one read-only as "fixed".
fn serve(dir: &Path, seed: u64) -> (Server, Disk, Vec<u8>, String) {
    let path = dir.join("disk.qcow2");
    CreateOptions::new(Format::Qcow2, SIZE).create(&path).unwrap();
    let disk = OpenOptions::new(Format::Qcow2).open(&path).unwrap();
    let mut model = vec![0; SIZE as usize];
    let data = Rng(seed).bytes(1 << 20);
    disk.write_at(&data, 2 << 20).unwrap();
    model[2 << 20..3 << 20].copy_from_slice(&data);
    let server = Server::new();
    for (name, read_only) in [("disk", false), ("fixed", true)] {
        let (name, description) = (name.to_owned(), "a test disk".to_owned());
        server.add_export(Export { name, description, disk: disk.clone(), read_only }).unwrap();
    }
    let socket = dir.join("nbd.sock");
    server.listen_unix(&socket).unwrap();
    let uri = format!("nbd+unix:///disk?socket={}", text(&socket));
    (server, disk, model, uri)
}

#[test]
fn qemu_reads_and_writes() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (server, disk, mut model, uri) = serve(dir.path(), 1);
    let raw = dir.path().join("model.raw");
    std::fs::write(&raw, &model).unwrap();
    qemu_ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, text(&raw)]);
    let map = qemu_ok("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let data: Vec<_> = map.as_array().unwrap().iter().filter(|e| e["data"] == true).collect();
    assert_eq!(data.len(), 1, "{map}");
    assert_eq!((&data[0]["start"], &data[0]["length"]), (&(2 << 20).into(), &(1 << 20).into()));
    let io = ["-f", "raw", "-c", "write -P 9 1000 70000", "-c", "write -z 2500k 10k"];
    let more = ["-c", "write -f -P 3 4M 64k", "-c", "discard 3M 64k", "-c", "flush", &uri];
    let out = qemu_ok("qemu-io", &[&io[..], &more[..]].concat());
    assert!(!out.contains("failed"), "{out}");
    model[1000..71000].fill(9);
    model[2500 << 10..2510 << 10].fill(0);
    model[4 << 20..(4 << 20) + (64 << 10)].fill(3);
    assert_same(&disk, &model);
    let fixed = uri.replace("/disk?", "/fixed?");
    let out = common::qemu("qemu-io", &["-f", "raw", "-c", "write 0 512", &fixed]);
    assert!(!out.status.success(), "a write to a read-only export succeeded");
    drop(server);
    assert!(!dir.path().join("nbd.sock").exists());
}

#[test]
fn libnbd_lists_and_copies() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (server, disk, model, uri) = serve(dir.path(), 2);
    let list = libnbd("nbdinfo", &["--list", "--json", &uri.replace("/disk?", "/?")]);
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list["exports"].as_array().unwrap().len(), 2, "{list}");
    assert_eq!(list["exports"][0]["description"], "a test disk");
    assert_eq!(list["exports"][0]["can_multi_conn"], true);
    assert_eq!(list["exports"][0]["export-size"], SIZE);
    let map = libnbd("nbdinfo", &["--map", "--totals", &uri]);
    assert!(map.contains("hole,zero") && map.contains("1048576"), "{map}");
    // Out with several connections, and back in.
    let raw = dir.path().join("out.raw");
    libnbd("nbdcopy", &["--connections=4", &uri, text(&raw)]);
    assert!(std::fs::read(&raw).unwrap() == model, "nbdcopy read something else");
    let new = Rng(3).bytes(SIZE as usize);
    std::fs::write(&raw, &new).unwrap();
    libnbd("nbdcopy", &["--connections=4", "--flush", text(&raw), &uri]);
    assert_same(&disk, &new);
    assert_eq!(server.exports().len(), 2);
}

fn handshake(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    let mut hello = [0; 18];
    stream.read_exact(&mut hello).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    stream
}

fn option(stream: &mut TcpStream, number: u32, data: &[u8]) {
    stream.write_all(b"IHAVEOPT").unwrap();
    stream.write_all(&number.to_be_bytes()).unwrap();
    stream.write_all(&(data.len() as u32).to_be_bytes()).unwrap();
    stream.write_all(data).unwrap();
}

fn reply_to_option(stream: &mut TcpStream) -> (u32, Vec<u8>) {
    let mut head = [0; 20];
    stream.read_exact(&mut head).unwrap();
    let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
    let mut data = vec![0; word(16) as usize];
    stream.read_exact(&mut data).unwrap();
    (word(12), data)
}

fn request(stream: &mut TcpStream, magic: u32, command: u16, offset: u64, len: &[u8]) {
    let mut out = magic.to_be_bytes().to_vec();
    out.extend(0u16.to_be_bytes());
    out.extend(command.to_be_bytes());
    out.extend(77u64.to_be_bytes());
    out.extend(offset.to_be_bytes());
    out.extend(len);
    stream.write_all(&out).unwrap();
}

#[test]
fn extended_headers_and_hostile_clients() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (server, disk, model, _) = serve(dir.path(), 4);
    let address = server.listen_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    // Extended headers, which no packaged client speaks yet: block status of the whole disk.
    let mut s = handshake(address);
    option(&mut s, 11, b"");
    assert_eq!(reply_to_option(&mut s).0, 1);
    let contexts = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
    option(&mut s, 10, contexts);
    assert_eq!(reply_to_option(&mut s), (4, b"\0\0\0\x01base:allocation".to_vec()));
    assert_eq!(reply_to_option(&mut s).0, 1);
    option(&mut s, 7, b"\0\0\0\x04disk\0\0");
    while reply_to_option(&mut s).0 == 3 {}
    request(&mut s, 0x21e4_1c71, 7, 0, &SIZE.to_be_bytes());
    let mut head = [0; 32];
    s.read_exact(&mut head).unwrap();
    assert_eq!(head[..8], [0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 6]);
    assert_eq!(head[8..16], 77u64.to_be_bytes());
    assert_eq!(head[24..32], (8u64 + 3 * 16).to_be_bytes());
    let mut payload = [0; 56];
    s.read_exact(&mut payload).unwrap();
    assert_eq!(payload[8..24], [(2u64 << 20).to_be_bytes(), 3u64.to_be_bytes()].concat());
    assert_eq!(payload[24..40], [(1u64 << 20).to_be_bytes(), 0u64.to_be_bytes()].concat());
    // Reads beyond the end and of absurd lengths are errors, and the connection lives on.
    for (offset, len) in [(SIZE, 512), (u64::MAX, 512), (0, 1 << 62), (0, 0)] {
        request(&mut s, 0x21e4_1c71, 0, offset, &u64::to_be_bytes(len));
        s.read_exact(&mut head).unwrap();
        assert_eq!(head[6..8], [0x80, 1], "{offset} {len}");
        s.read_exact(&mut [0; 6]).unwrap();
    }
    request(&mut s, 0x21e4_1c71, 0, 2 << 20, &u64::to_be_bytes(512));
    s.read_exact(&mut head).unwrap();
    let mut data = [0; 520];
    s.read_exact(&mut data).unwrap();
    assert!(data[8..] == model[2 << 20..(2 << 20) + 512]);
    // Nonsense ends a connection, not the server.
    for bytes in [&b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"[..], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut s = handshake(address);
        s.write_all(bytes).unwrap();
        let mut rest = Vec::new();
        let _ = s.read_to_end(&mut rest); // ends, with or without a reset
    }
    // Truncated strings are refused.
    let mut s = handshake(address);
    option(&mut s, 7, b"\0\0\xff\xffdisk");
    assert_eq!(reply_to_option(&mut s).0, 0x8000_0003);
    option(&mut s, 7, b"\0\0\0\x04none\0\0");
    assert_eq!(reply_to_option(&mut s).0, 0x8000_0006);
    option(&mut s, 10, contexts);
    assert_eq!(reply_to_option(&mut s).0, 0x8000_0003, "contexts need structured replies");
    // Removal ends the clients of an export; others stay.
    let mut s = handshake(address);
    option(&mut s, 1, b"disk");
    s.read_exact(&mut [0; 10]).unwrap();
    server.remove_export("disk").unwrap();
    assert_eq!(s.read(&mut [0; 1]).unwrap_or(0), 0);
    assert_eq!(server.exports().len(), 1);
    assert_same(&disk, &model);
}

#[test]
fn dirty_bitmaps_are_metadata_contexts() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (server, disk, _, uri) = serve(dir.path(), 5);
    let layer = disk.layers().remove(0);
    let image = layer.as_qcow2().unwrap();
    for name in ["b0", "b1"] {
        image.add_bitmap(name, 65536).unwrap();
        server.show_bitmap("disk", name, image.bitmap(name).unwrap()).unwrap();
    }
    assert!(server.show_bitmap("none", "b0", image.bitmap("b0").unwrap()).is_err());
    assert!(server.show_bitmap("disk", "b0", image.bitmap("b0").unwrap()).is_err());
    disk.write_at(&[1; 100], 70_000).unwrap();
    disk.write_at(&[1; 70_000], 4 << 20).unwrap();
    let info = libnbd("nbdinfo", &["--json", &uri]);
    assert!(info.contains("qemu:dirty-bitmap:b0") && info.contains("qemu:dirty-bitmap:b1"), "{info}");
    let map = libnbd("nbdinfo", &["--map=qemu:dirty-bitmap:b1", "--json", &uri]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let runs: Vec<_> =
        map.as_array().unwrap().iter().map(|e| (&e["offset"], &e["length"], &e["type"])).collect();
    let expected = [
        (0, 65536, 0),
        (65536, 65536, 1),
        (131_072, (4 << 20) - 131_072, 0),
        (4 << 20, 131_072, 1),
        ((4 << 20) + 131_072, SIZE - (4 << 20) - 131_072, 0),
    ];
    assert_eq!(runs.len(), expected.len(), "{map}");
    for (seen, (offset, len, kind)) in runs.into_iter().zip(expected) {
        assert!(*seen.0 == offset && *seen.1 == len && *seen.2 == kind, "{map}");
    }
    // Our own client reads both contexts of one reply.
    let options = NbdOptions { contexts: vec!["qemu:dirty-bitmap:b1".into()], ..NbdOptions::default() };
    let client = NbdStorage::connect(&uri, options).unwrap();
    assert_eq!(client.contexts().count(), 2);
    let status = client.block_status("qemu:dirty-bitmap:b1", 65536, 100_000).unwrap();
    assert_eq!(status, [(65536, 1), (34_464, 0)]);
    assert!(!client.block_status("base:allocation", 0, 4096).unwrap().is_empty());
}
