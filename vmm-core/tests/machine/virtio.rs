//! A freestanding guest that drives devices itself: it starts its other processors, finds the disk and the network
//! card on PCI, takes their MSI-X interrupts, moves data both ways, and reports over the debug port. What it reports is
//! the same on every accelerator.

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vmm_core::machine::{StopReason, VmConfig};

use super::{accelerators, config, guest, out8, power_off, run};

const CPUS: u32 = 3;
const APIC: u32 = 0xfee0_0000;
const ECAM: u32 = 0xe000_0000;
/// Below 1 MiB: what other processors start with, and count up; the stack.
const TRAMPOLINE: u32 = 0x6000;
const COUNTER: u32 = 0x5000;
const STACK: u32 = 0x7_0000;
/// Above the program: tables, queues and buffers.
const IDT: u32 = 0x20_0000;
const IDTR: u32 = IDT + 0xff0;
/// How often each interrupt came, by number of the source.
const IRQS: u32 = 0x20_1000;
const BUFFERS: u32 = 0x21_0000;
/// The code segment that a guest is entered with.
const CODE_SEGMENT: u32 = 0x10;
/// Registers within the BAR of a virtio device of this machine.
const NOTIFY: u32 = 0x3000;
const NEXT: u32 = 1;
const WRITABLE: u32 = 2;
const SECTOR: u32 = 512;
/// Header and frame, which are as long in both directions.
const HEADER: u32 = 12;
const FRAME: u32 = 64;

type Result = std::result::Result<(), IcedError>;

/// A queue of a device: where its registers and its rings are, and the source of its interrupts.
#[derive(Clone, Copy)]
struct Queue {
    bar: u32,
    index: u32,
    rings: u32,
    source: u32,
}

const DISK: Queue = Queue { bar: 0xc000_0000, index: 0, rings: 0x30_0000, source: 0 };
const RECEIVE: Queue = Queue { bar: 0xc001_0000, index: 0, rings: 0x31_0000, source: 1 };
const SEND: Queue = Queue { bar: 0xc001_0000, index: 1, rings: 0x32_0000, source: 2 };

impl Queue {
    fn descriptor(self, a: &mut CodeAssembler, n: u32, address: u32, len: u32, flags: u32) -> Result {
        let at = self.rings + 16 * n;
        a.mov(dword_ptr(at), address)?;
        a.mov(dword_ptr(at + 4), 0)?;
        a.mov(dword_ptr(at + 8), len)?;
        a.mov(dword_ptr(at + 12), flags | (n + 1) << 16)
    }

    /// Makes the chain at descriptor 0 the `nth` available one.
    fn submit(self, a: &mut CodeAssembler, nth: u32) -> Result {
        let available = self.rings + 0x1000;
        a.mov(word_ptr(available + 4 + 2 * nth), 0)?;
        a.mov(word_ptr(available + 2), nth + 1)?;
        a.mov(word_ptr(self.bar + NOTIFY + 4 * self.index), self.index)
    }

    /// Sleeps until `count` interrupts came; as many chains must have been used.
    fn wait(self, a: &mut CodeAssembler, count: u32) -> Result {
        let (mut again, mut done) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.cli()?;
        a.cmp(dword_ptr(IRQS + 4 * self.source), count)?;
        a.jae(done)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(again)?;
        a.set_label(&mut done)?;
        a.cmp(word_ptr(self.rings + 0x2000 + 2), count)?;
        fail_unless_equal(a, 10 + self.source as u8)
    }
}

/// Ends the machine with `code` unless the zero flag is set.
fn fail_unless_equal(a: &mut CodeAssembler, code: u8) -> Result {
    let mut good = a.create_label();
    a.je(good)?;
    out8(a, 0xf4, code)?;
    a.set_label(&mut good)?;
    a.zero_bytes()
}

fn text(a: &mut CodeAssembler, text: &str) -> Result {
    text.bytes().try_for_each(|byte| {
        a.mov(al, u32::from(byte))?;
        a.out(0xe9, al)
    })
}

/// Prints EAX in hexadecimal.
fn number(a: &mut CodeAssembler) -> Result {
    let (mut again, mut digit) = (a.create_label(), a.create_label());
    a.mov(edx, eax)?;
    a.mov(ecx, 8)?;
    a.set_label(&mut again)?;
    a.rol(edx, 4)?;
    a.mov(eax, edx)?;
    a.and(eax, 15)?;
    a.add(eax, i32::from(b'0'))?;
    a.cmp(eax, i32::from(b'9'))?;
    a.jbe(digit)?;
    a.add(eax, i32::from(b'a' - b'9' - 1))?;
    a.set_label(&mut digit)?;
    a.out(0xe9, al)?;
    a.dec(ecx)?;
    a.jnz(again)
}

/// Adds up the 32-bit words of a buffer in EAX, and adds `more` to each.
fn sum(a: &mut CodeAssembler, at: u32, len: u32, more: i32) -> Result {
    let mut again = a.create_label();
    a.mov(esi, at)?;
    a.mov(ecx, len / 4)?;
    a.xor(eax, eax)?;
    a.set_label(&mut again)?;
    a.add(eax, dword_ptr(esi))?;
    a.add(dword_ptr(esi), more)?;
    a.add(esi, 4)?;
    a.dec(ecx)?;
    a.jnz(again)
}

/// Lets `vector` count the interrupts of `source`.
fn gate(a: &mut CodeAssembler, vector: u32, source: u32) -> Result {
    let mut over = a.create_label();
    // The return address is the handler's.
    a.call(over)?;
    a.push(eax)?;
    a.inc(dword_ptr(IRQS + 4 * source))?;
    a.xor(eax, eax)?;
    a.mov(dword_ptr(APIC + 0xb0), eax)?;
    a.pop(eax)?;
    a.iretd()?;
    a.set_label(&mut over)?;
    a.pop(eax)?;
    a.mov(word_ptr(IDT + 8 * vector), ax)?;
    a.mov(word_ptr(IDT + 8 * vector + 2), CODE_SEGMENT)?;
    a.mov(word_ptr(IDT + 8 * vector + 4), 0x8e00)?;
    a.shr(eax, 16)?;
    a.mov(word_ptr(IDT + 8 * vector + 6), ax)
}

fn start_other_cpus(a: &mut CodeAssembler) -> Result {
    let code = {
        let mut a = CodeAssembler::new(16)?;
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.lock().inc(dword_ptr(COUNTER))?;
        let mut forever = a.create_label();
        a.set_label(&mut forever)?;
        a.hlt()?;
        a.jmp(forever)?;
        a.assemble(TRAMPOLINE.into())?
    };
    for (at, byte) in (TRAMPOLINE..).zip(code) {
        a.mov(byte_ptr(at), u32::from(byte))?;
    }
    for id in 1..CPUS {
        a.mov(dword_ptr(APIC + 0x310), id << 24)?;
        a.mov(dword_ptr(APIC + 0x300), 0x4500)?;
        a.mov(dword_ptr(APIC + 0x300), 0x4600 | TRAMPOLINE >> 12)?;
    }
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(dword_ptr(COUNTER), CPUS - 1)?;
    a.jne(wait)?;
    text(a, "cpus ")?;
    a.mov(eax, dword_ptr(COUNTER))?;
    a.inc(eax)?;
    number(a)
}

/// Finds the virtio device with this PCI ID, places its BAR, routes an interrupt for each of its queues, and brings it up.
fn bring_up(a: &mut CodeAssembler, id: u32, queues: &[Queue]) -> Result {
    let bar = queues[0].bar;
    let (mut look, mut found) = (a.create_label(), a.create_label());
    a.mov(esi, ECAM)?;
    a.set_label(&mut look)?;
    a.cmp(dword_ptr(esi), (id << 16 | 0x1af4) as i32)?;
    a.je(found)?;
    a.add(esi, 0x8000)?;
    a.cmp(esi, (ECAM + 0x10_0000) as i32)?;
    a.jb(look)?;
    out8(a, 0xf4, 1)?;
    a.set_label(&mut found)?;
    a.mov(dword_ptr(esi + 0x10), bar)?;
    a.mov(dword_ptr(esi + 0x14), 0)?;
    // Memory accesses and bus mastering.
    a.mov(word_ptr(esi + 4), 6)?;
    // The MSI-X capability: its table first, then its switch.
    let (mut walk, mut msix) = (a.create_label(), a.create_label());
    a.movzx(eax, byte_ptr(esi + 0x34))?;
    a.set_label(&mut walk)?;
    a.cmp(byte_ptr(esi + eax), 0x11)?;
    a.je(msix)?;
    a.movzx(eax, byte_ptr(esi + eax + 1))?;
    a.jmp(walk)?;
    a.set_label(&mut msix)?;
    a.mov(ecx, dword_ptr(esi + eax + 4))?;
    a.and(ecx, !7)?;
    a.add(ecx, bar as i32)?;
    for queue in queues {
        let entry = 16 * queue.index as i32;
        a.mov(dword_ptr(ecx + entry), APIC)?;
        a.mov(dword_ptr(ecx + entry + 4), 0)?;
        a.mov(dword_ptr(ecx + entry + 8), 0x40 + queue.source)?;
        a.mov(dword_ptr(ecx + entry + 12), 0)?;
    }
    a.mov(word_ptr(esi + eax + 2), 0x8000)?;
    for status in [0, 1, 3] {
        a.mov(byte_ptr(bar + 0x14), status)?;
    }
    // VERSION_1, and nothing else.
    a.mov(dword_ptr(bar + 0x08), 1)?;
    a.mov(dword_ptr(bar + 0x0c), 1)?;
    a.mov(byte_ptr(bar + 0x14), 0xb)?;
    a.mov(al, byte_ptr(bar + 0x14))?;
    a.cmp(al, 0xb)?;
    fail_unless_equal(a, 2)?;
    for queue in queues {
        a.mov(word_ptr(bar + 0x16), queue.index)?;
        a.mov(word_ptr(bar + 0x18), 8)?;
        a.mov(word_ptr(bar + 0x1a), queue.index)?;
        for (register, ring) in [(0x20, 0), (0x28, 0x1000), (0x30, 0x2000)] {
            a.mov(dword_ptr(bar + register), queue.rings + ring)?;
            a.mov(dword_ptr(bar + register + 4), 0)?;
        }
        a.mov(word_ptr(bar + 0x1c), 1)?;
    }
    a.mov(byte_ptr(bar + 0x14), 0xf)
}

/// Sends the `nth` request to the disk and waits until it is done.
fn request(a: &mut CodeAssembler, nth: u32, write: bool, sector: u32) -> Result {
    let (header, status, data) = (BUFFERS, BUFFERS + 0x100, BUFFERS + 0x1000);
    a.mov(dword_ptr(header), u32::from(write))?;
    a.mov(dword_ptr(header + 4), 0)?;
    a.mov(dword_ptr(header + 8), sector)?;
    a.mov(dword_ptr(header + 12), 0)?;
    a.mov(byte_ptr(status), 0xff)?;
    DISK.descriptor(a, 0, header, 16, NEXT)?;
    DISK.descriptor(a, 1, data, SECTOR, if write { NEXT } else { NEXT | WRITABLE })?;
    DISK.descriptor(a, 2, status, 1, WRITABLE)?;
    DISK.submit(a, nth)?;
    DISK.wait(a, nth + 1)?;
    a.cmp(byte_ptr(status), 0)?;
    fail_unless_equal(a, 3)
}

fn program(a: &mut CodeAssembler) -> Result {
    a.mov(esp, STACK)?;
    // The PICs stay silent; the local APIC is on.
    out8(a, 0x21, 0xff)?;
    out8(a, 0xa1, 0xff)?;
    a.mov(dword_ptr(APIC + 0xf0), 0x1ff)?;
    for queue in [DISK, RECEIVE, SEND] {
        gate(a, 0x40 + queue.source, queue.source)?;
    }
    a.mov(word_ptr(IDTR), 0x7ff)?;
    a.mov(dword_ptr(IDTR + 2), IDT)?;
    a.lidt(dword_ptr(IDTR))?;
    start_other_cpus(a)?;

    bring_up(a, 0x1042, &[DISK])?;
    request(a, 0, false, 3)?;
    text(a, "\nread ")?;
    sum(a, BUFFERS + 0x1000, SECTOR, 1)?;
    number(a)?;
    request(a, 1, true, 5)?;

    bring_up(a, 0x1041, &[RECEIVE, SEND])?;
    let (received, sent) = (BUFFERS + 0x2000, BUFFERS + 0x3000);
    RECEIVE.descriptor(a, 0, received, 2048, WRITABLE)?;
    RECEIVE.submit(a, 0)?;
    // To everybody; what follows the addresses is the type and a pattern.
    for at in (0..FRAME).step_by(4) {
        let word = if at < 8 { u32::MAX } else { at * 0x0101_0101 };
        a.mov(dword_ptr(sent + HEADER + at), word)?;
    }
    SEND.descriptor(a, 0, sent, HEADER + FRAME, 0)?;
    SEND.submit(a, 0)?;
    SEND.wait(a, 1)?;
    RECEIVE.wait(a, 1)?;
    text(a, "\nreceived ")?;
    // The length in the used ring.
    a.mov(eax, dword_ptr(RECEIVE.rings + 0x2000 + 8))?;
    number(a)?;
    text(a, " ")?;
    sum(a, received + HEADER, FRAME, 0)?;
    number(a)?;
    text(a, "\n")?;
    power_off(a)
}

/// What the card's other end makes of a frame: the addresses stay.
fn answer(frame: &mut [u8]) {
    frame[14..].iter_mut().for_each(|byte| *byte = byte.wrapping_mul(3));
}

/// Answers one frame.
fn peer(listener: UnixListener) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut stream, _): (UnixStream, _) = listener.accept().unwrap();
        let mut len = [0; 4];
        stream.read_exact(&mut len).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(len) as usize];
        stream.read_exact(&mut frame).unwrap();
        answer(&mut frame);
        stream.write_all(&len).unwrap();
        stream.write_all(&frame).unwrap();
        // Until the machine ends.
        assert_eq!(stream.read(&mut len).unwrap(), 0);
    })
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()))
}

#[test]
fn a_guest_of_our_own_drives_disk_and_card() {
    let kernel = guest::kernel(program);
    let dir = tempfile::tempdir().unwrap();
    let sector: Vec<u8> = (0..SECTOR).map(|n| ((n * 7) >> 2) as u8).collect();
    let mut frame: Vec<u8> = (0..FRAME).map(|n| if n < 8 { 0xff } else { (n & !3) as u8 }).collect();
    answer(&mut frame);
    let total = |bytes: &[u8]| words(bytes).fold(0u32, u32::wrapping_add);
    let expected = format!(
        "cpus {CPUS:08x}\nread {:08x}\nreceived {:08x} {:08x}\n",
        total(&sector),
        HEADER + FRAME,
        total(&frame)
    );
    for (n, accel) in accelerators().into_iter().enumerate() {
        let disk = dir.path().join(format!("disk{n}"));
        let file = std::fs::File::options().read(true).write(true).create_new(true).open(&disk).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&sector, 3 * u64::from(SECTOR)).unwrap();
        let socket = dir.path().join(format!("net{n}"));
        let other_end = peer(UnixListener::bind(&socket).unwrap());
        // A KVM that is software does not know how interrupts return.
        let mut config = VmConfig { cpus: CPUS, kvm_assist: true, ..config(kernel.path(), accel) };
        let disk_config = serde_json::json!({"path": disk, "format": "raw"});
        config.disks.push(serde_json::from_value(disk_config).unwrap());
        let net = serde_json::json!({"backend": {"unix": socket}});
        config.nets.push(serde_json::from_value(net).unwrap());
        assert_eq!(run(config), (expected.clone(), StopReason::PowerOff), "{accel:?}");
        other_end.join().unwrap();
        let mut written = vec![0; SECTOR as usize];
        file.read_exact_at(&mut written, 5 * u64::from(SECTOR)).unwrap();
        assert!(words(&written).eq(words(&sector).map(|word| word.wrapping_add(1))), "{accel:?}");
    }
}
