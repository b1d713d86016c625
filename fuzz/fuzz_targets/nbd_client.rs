//! Any bytes from an NBD server: the client's requests end with a result or an error, quickly and in bounded memory.
//! Each connection is sent the same bytes.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use blockfmt::nbd::{NbdOptions, NbdStorage};
use blockfmt::{Format, OpenOptions, OpenPolicy, Storage};
use fuzz::{exercise, reached};
use libfuzzer_sys::fuzz_target;

/// Most bytes sent: what a socket holds, so that nobody waits for a reader.
const INPUT_MAX: usize = 1 << 16;

/// What the server says.
static INPUT: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// The URI of a server that serves one connection after the other.
static URI: LazyLock<String> = LazyLock::new(|| {
    let dir = tempfile::tempdir_in("/dev/shm").expect("directory");
    let socket = dir.path().join("nbd");
    let listener = UnixListener::bind(&socket).expect("listen");
    std::thread::spawn(move || {
        let _dir = dir;
        for mut stream in listener.incoming().map_while(Result::ok) {
            let input = INPUT.lock().expect("lock").clone();
            // The client may leave at any time; it reads what was sent only while this end is open.
            let _ = stream.write_all(&input).and_then(|()| stream.shutdown(Shutdown::Write));
            let mut piece = vec![0; 1 << 20];
            while stream.read(&mut piece).is_ok_and(|n| n > 0) {}
        }
    });
    format!("nbd+unix:///e?socket={}", socket.display())
});

fuzz_target!(|input: &[u8]| {
    *INPUT.lock().expect("lock") = input[..input.len().min(INPUT_MAX)].to_vec();
    let options = NbdOptions {
        reconnect: Duration::ZERO,
        timeout: Duration::from_secs(2),
        contexts: vec!["qemu:dirty-bitmap:b".into()],
        ..NbdOptions::default()
    };
    let Ok(nbd) = NbdStorage::connect(&URI, options) else { return };
    reached("negotiated");
    let storage: &(dyn Storage + 'static) = &nbd;
    let mut bytes = [0; 512];
    if storage.read_at(&mut bytes, 0).is_ok() {
        reached("read");
    }
    if nbd.block_status("base:allocation", 0, 1 << 16).is_ok_and(|extents| !extents.is_empty()) {
        reached("block-status");
    }
    if nbd.block_status("qemu:dirty-bitmap:b", 0, u64::MAX).is_ok() {
        reached("bitmap");
    }
    if storage.write_at(&bytes, 512).is_ok() {
        reached("written");
    }
    let open = OpenOptions::new(Format::Raw).policy(OpenPolicy::deny());
    if let Ok(disk) = open.open_storage(Arc::new(nbd), "fuzz.nbd") {
        exercise(&disk, false);
    }
});
