//! Any bytes from an NBD client: the server answers or ends the connection, and nothing is left of it.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use blockfmt::job::DirtyMap;
use blockfmt::nbd::{Export, Server};
use blockfmt::storage::MemoryStorage;
use blockfmt::{CreateOptions, Format, OpenOptions, OpenPolicy};
use fuzz::reached;
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 1 << 20;
const EXPORTS: [(&str, bool); 2] = [("disk", false), ("fixed", true)];
/// Most bytes sent: what a socket holds, so that nobody waits for a reader.
const INPUT_MAX: usize = 1 << 16;
/// Most bytes read back; a client that asked for more leaves early.
const OUTPUT_MAX: u64 = 4 << 20;

struct World {
    server: Server,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let dir = tempfile::tempdir_in("/dev/shm").expect("directory");
    let (server, socket) = (Server::new(), dir.path().join("nbd"));
    server.listen_unix(&socket).expect("listen");
    World { server, socket, _dir: dir }
});

fn talk(socket: &Path, input: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket).expect("connect");
    // The server may leave before it has read everything.
    let _ = stream.write_all(input).and_then(|()| stream.shutdown(Shutdown::Write));
    let mut output = Vec::new();
    let _ = stream.take(OUTPUT_MAX).read_to_end(&mut output);
    output
}

fuzz_target!(|input: &[u8]| {
    let World { server, socket, .. } = &*WORLD;
    for (name, read_only) in EXPORTS {
        let storage = Arc::new(MemoryStorage::new());
        CreateOptions::new(Format::Qcow2, SIZE).create_on(storage.clone()).expect("create");
        let open = OpenOptions::new(Format::Qcow2).policy(OpenPolicy::deny());
        let disk = open.open_storage(storage, name).expect("open");
        let export = Export { name: name.into(), description: "a disk".into(), disk, read_only };
        server.add_export(export).expect("export");
        let bitmap = DirtyMap::new(SIZE, 1 << 16).expect("bitmap");
        bitmap.mark(1 << 17, 1 << 16);
        server.show_bitmap(name, "b", Arc::new(bitmap)).expect("bitmap");
    }
    let output = talk(socket, &input[..input.len().min(INPUT_MAX)]);
    let has = |magic: u32| output.windows(4).any(|w| w == magic.to_be_bytes());
    if has(0x6744_6698) {
        reached("simple-reply");
    }
    if has(0x668e_33ef) {
        reached("structured-reply");
    }
    if has(0x6e8a_278c) {
        reached("extended-reply");
    }
    for (name, _) in EXPORTS {
        // Waits for the export's requests.
        server.remove_export(name).expect("remove");
    }
});
