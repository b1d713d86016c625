//! A saved machine with changed records: restoring it gives a machine that can be started, or an error.
//!
//! The input is records (see [`fuzz::records`]). Kind 0 replaces a part of the JSON of the machine's state: offset (16
//! bits), length (8 bits), the new text. Other kinds go into the stream as they are, before the state.
#![no_main]

use std::sync::OnceLock;

use fuzz::{reached, records};
use libfuzzer_sys::fuzz_target;
use vmm_core::machine::{AccelChoice, AfterSnapshot, MemoryConfig, RestoreOptions, Vm, VmConfig};
use vmm_core::migration::record::sealed;
use vmm_core::migration::{Record, StreamReader, StreamWriter};

const STATE: u32 = 4;
const END: u32 = 5;

fn config() -> VmConfig {
    VmConfig {
        accel: AccelChoice::Soft,
        memory: MemoryConfig { size: 2 << 20, ..MemoryConfig::default() },
        rng: true,
        balloon: true,
        ..VmConfig::default()
    }
}

/// The stream of a machine that never ran up to its state, and the state as JSON.
fn saved() -> &'static (Vec<u8>, Vec<u8>) {
    static SAVED: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
    SAVED.get_or_init(|| {
        let dir = tempfile::tempdir_in("/dev/shm").expect("directory");
        let (kernel, path) = (dir.path().join("kernel"), dir.path().join("saved"));
        // A Multiboot header and `jmp $`.
        let mut image = vec![0u8; 0x200];
        let words = |at: usize, words: &[u32], image: &mut Vec<u8>| {
            for (n, word) in words.iter().enumerate() {
                image[at + 4 * n..at + 4 * n + 4].copy_from_slice(&word.to_le_bytes());
            }
        };
        image[..16].copy_from_slice(b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0");
        words(16, &[2 | 3 << 16, 1, 0x10_0000, 52, 0, 0, 52 | 32 << 16, 1, 0], &mut image);
        words(52, &[1, 0x100, 0x10_0000, 0x10_0000, 0x100, 0x100, 7, 0x100], &mut image);
        words(84, &[0x1bad_b002, 0, 0u32.wrapping_sub(0x1bad_b002)], &mut image);
        image[0x100..0x102].copy_from_slice(&[0xeb, 0xfe]);
        std::fs::write(&kernel, image).expect("write");
        let mut config = config();
        config.boot.kernel = kernel;
        let vm = Vm::builder(config).build().expect("machine");
        vm.snapshot(&path, AfterSnapshot::StayPaused).expect("snapshot");
        let bytes = std::fs::read(&path).expect("read");
        let mut reader = StreamReader::new(bytes.as_slice()).expect("stream");
        let mut writer = StreamWriter::new(Vec::new()).expect("stream");
        loop {
            match reader.read().expect("record") {
                Record::State(state) => {
                    let json = serde_json::to_vec(&state).expect("state");
                    return (std::mem::take(writer.get_mut()), json);
                }
                record => writer.write(&record).expect("write"),
            }
        }
    })
}

fuzz_target!(|input: &[u8]| {
    let (stream, json) = saved();
    let (mut stream, mut json) = (stream.clone(), json.clone());
    for (kind, body) in records(input).take(16) {
        match (kind, body) {
            (0, [low, high, len, text @ ..]) => {
                let at = usize::from(u16::from_le_bytes([*low, *high])).min(json.len());
                let end = (at + usize::from(*len)).min(json.len());
                json.splice(at..end, text.iter().copied());
            }
            (kind, body) => stream.extend(sealed(kind.into(), body)),
        }
    }
    stream.extend(sealed(STATE, &json));
    stream.extend(sealed(END, &[]));
    match Vm::builder(config()).restore_from(stream.as_slice(), &RestoreOptions::default()) {
        Ok(vm) => {
            // What the state says of queues and interrupts is used from here on.
            if vm.start().is_ok() && vm.pause().is_ok() {
                reached("restored");
            }
        }
        Err(_) => reached("refused"),
    }
});
