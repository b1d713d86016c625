//! Any vhost-user back-end against this side's network and block devices: what it answers, and what it writes into the
//! rings, ends with a result or an error.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use fuzz::virtio::{Handlers, QUEUE_SIZE, parts};
use fuzz::{drain, reached};
use libfuzzer_sys::fuzz_target;
use vmm_core::devices::virtio::vhost_user::VhostUserNetOptions;
use vmm_core::devices::virtio::{VhostUser, VirtioDevice};
use vmm_core::memory::GuestMemory;

const MEMORY: u64 = 1 << 18;
/// Most bytes that the back-end says: what a socket holds, so that nobody waits for a reader.
const INPUT_MAX: usize = 1 << 16;
/// Feature bit of several pairs of queues.
const NET_MQ: u64 = 1 << 22;

/// Makes a network command available: class, command, number of pairs, and a byte for the status.
fn command(memory: &GuestMemory, queue: usize, pairs: u8, slot: u16) {
    let [table, available, _] = parts(queue);
    let buffer = MEMORY - 4096;
    memory.write(buffer, &[4, 0, pairs, 0]).expect("buffer");
    for (i, (address, len, flags)) in [(buffer, 4u32, 1u16), (buffer + 64, 1, 2)].into_iter().enumerate() {
        let descriptor =
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &[1, 0]].concat();
        memory.write(table + i as u64 * 16, &descriptor).expect("descriptor");
    }
    memory.write(available + 4 + u64::from(slot % QUEUE_SIZE) * 2, &[0, 0]).expect("ring");
    memory.write(available + 2, &(slot + 1).to_le_bytes()).expect("ring");
}

// An input is what to make, how many steps follow, the steps, and then everything that the back-end says.
fuzz_target!(|data: &[u8]| {
    let [kind, count, rest @ ..] = data else { return };
    let (steps, answers) = rest.split_at(rest.len().min(usize::from(count % 32)));
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    (&theirs).write_all(&answers[..answers.len().min(INPUT_MAX)]).expect("answers");
    theirs.shutdown(Shutdown::Write).expect("socket");
    let device = if kind & 1 == 0 {
        let options =
            VhostUserNetOptions { pairs: 1 + u16::from(kind >> 1 & 3), ..VhostUserNetOptions::default() };
        VhostUser::net_over(ours, &options)
    } else {
        VhostUser::blk_over(ours, 1 + u16::from(kind >> 1 & 3), QUEUE_SIZE)
    };
    let Ok(device) = device else { return };
    reached("negotiated");
    let memory = GuestMemory::flat(MEMORY).expect("memory");
    let Some(mut handlers) = Handlers::start(&*device, &memory, u64::MAX) else { return };
    if handlers.handed_over() {
        reached("handed-over");
    }
    let count = device.queue_sizes().len();
    let has_control = device.device_type() == 1 && device.features() & NET_MQ != 0;
    let mut commands = 0;
    for step in steps {
        let value = step >> 3;
        match step & 7 {
            0 => handlers.events(),
            1 => handlers.timers(),
            2 if has_control => {
                command(&memory, count - 1, value, commands);
                commands += 1;
                handlers.kick(count - 1);
                reached("pairs-set");
            }
            2 | 3 => device.write_config(value.into(), &[1]),
            4 => handlers.restart(),
            // The back-end moves a used index.
            5 => drop(memory.write(parts(usize::from(value) % count)[2] + 2, &[value, value])),
            _ => {
                let state = device.save().expect("state");
                device.restore(&state).expect("restored");
            }
        }
        drain(&theirs);
    }
    handlers.stop();
    device.reset();
});
