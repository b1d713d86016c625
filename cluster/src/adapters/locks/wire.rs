//! How two hosts' lock managers talk: one TCP connection for each direction, authenticated by a shared key.
//!
//! Whoever has something to say connects. All numbers are big endian.
//!
//! | from | bytes | what |
//! |---|---|---|
//! | sender | 4, 2, 2, 8, 8, 16 | `NLM3`, own host, receiver's host, stream, first number, nonce |
//! | receiver | 16 | nonce |
//! | sender | 32 | proof: MAC of all of the above |
//! | receiver | 8, 32 | number of the last message that it has of this stream, MAC |
//! | sender | 4, 8, n, 32 | length n and flags, number, part of a JSON message, MAC |
//! | receiver | 8, 32 | number of the last message that it has, MAC |
//!
//! The top bit of the length is set if an answer is wanted, the next one if more parts of the message follow. A part is
//! short, so that nobody without the key can make the receiver keep much.
//!
//! The MAC is HMAC-SHA256 with a key made of the shared one and both nonces, so nothing of one connection is worth
//! anything on another; it covers the direction and how many were sent before. Messages are not encrypted.

use std::fs::File;
use std::io::{self, Read, Write};

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::types::HostId;

const MAGIC: [u8; 4] = *b"NLM3";
const HELLO: usize = 4 + 2 + 2 + 8 + 8 + 16;
const MAC: usize = 32;
/// The longest message in bytes.
pub(super) const LONGEST: usize = 1 << 20;
/// The longest part of one.
const PART: u32 = 64 << 10;
const ANSWER: u32 = 1 << 31;
const MORE: u32 = 1 << 30;

type Nonce = [u8; 16];

fn mac(key: &[u8], parts: &[&[u8]]) -> Hmac<Sha256> {
    // HMAC takes keys of any length.
    let mut mac =
        <Hmac<Sha256> as Mac>::new_from_slice(key).unwrap_or_else(|_| Hmac::new(&Default::default()));
    parts.iter().for_each(|part| mac.update(part));
    mac
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Random bytes of the kernel.
pub(super) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn array<R: Read, const N: usize>(from: &mut R) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// What a sender opens a connection with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub from: HostId,
    pub to: HostId,
    /// Names the numbering of messages; another one starts over.
    pub stream: u64,
    /// The number of the first message that the sender still has.
    pub first: u64,
}

impl Hello {
    fn encode(&self, nonce: &Nonce) -> [u8; HELLO] {
        let mut bytes = [0; HELLO];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.from.0.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.to.0.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.stream.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.first.to_be_bytes());
        bytes[24..].copy_from_slice(nonce);
        bytes
    }

    fn decode(bytes: &[u8; HELLO]) -> io::Result<Self> {
        let (fixed, rest) = bytes.split_at(8);
        let [m0, m1, m2, m3, f0, f1, t0, t1] = fixed.try_into().map_err(|_| invalid("short"))?;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(invalid("not a lock manager"));
        }
        let number = |at: usize| rest[at..at + 8].iter().fold(0, |n, b| n << 8 | u64::from(*b));
        Ok(Hello {
            from: HostId(u16::from_be_bytes([f0, f1])),
            to: HostId(u16::from_be_bytes([t0, t1])),
            stream: number(0),
            first: number(8),
        })
    }
}

/// One direction's MACs of a connection.
struct Seal {
    key: Vec<u8>,
    direction: u8,
    count: u64,
}

impl Seal {
    fn next(&mut self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = mac(&self.key, &[&[self.direction], &self.count.to_be_bytes()]);
        parts.iter().for_each(|part| mac.update(part));
        self.count += 1;
        mac
    }
}

/// The two ends' seals: sender to receiver, and back.
fn seals(key: &[u8], hello: &[u8; HELLO], nonce: &Nonce) -> (Seal, Seal) {
    let key = mac(key, &[b"connection", hello, nonce]).finalize().into_bytes().to_vec();
    let seal = |direction| Seal { key: key.clone(), direction, count: 0 };
    (seal(0), seal(1))
}

/// The sending end of a connection.
pub(super) struct Sending<S> {
    stream: S,
    there: Seal,
    back: Seal,
}

impl<S: Read + Write> Sending<S> {
    /// Opens a connection; gives the number of the last message that the receiver has.
    pub fn open(mut stream: S, key: &[u8], hello: &Hello) -> io::Result<(Self, u64)> {
        let hello = hello.encode(&random()?);
        stream.write_all(&hello)?;
        let nonce = array(&mut stream)?;
        let (mut there, back) = seals(key, &hello, &nonce);
        stream.write_all(&there.next(&[b"hello"]).finalize().into_bytes())?;
        let mut sending = Sending { stream, there, back };
        let last = sending.answer()?;
        Ok((sending, last))
    }

    /// Sends messages of consecutive numbers from `first` on; gives the number of the last one that arrived.
    pub fn send(&mut self, first: u64, messages: &[Vec<u8>]) -> io::Result<u64> {
        let mut bytes = Vec::new();
        for (at, message) in messages.iter().enumerate() {
            if message.len() > LONGEST {
                return Err(invalid("message too long"));
            }
            let number = (first + at as u64).to_be_bytes();
            let mut rest = message.as_slice();
            loop {
                let part = rest.split_off(..rest.len().min(PART as usize)).unwrap_or_default();
                let mut head = part.len() as u32;
                if !rest.is_empty() {
                    head |= MORE;
                } else if at + 1 == messages.len() {
                    head |= ANSWER;
                }
                let head = head.to_be_bytes();
                let mac = self.there.next(&[&head, &number, part]).finalize().into_bytes();
                for piece in [&head[..], &number, part, &mac] {
                    bytes.extend_from_slice(piece);
                }
                if rest.is_empty() {
                    break;
                }
            }
        }
        self.stream.write_all(&bytes)?;
        self.answer()
    }

    fn answer(&mut self) -> io::Result<u64> {
        let last: [u8; 8] = array(&mut self.stream)?;
        let seal: [u8; MAC] = array(&mut self.stream)?;
        let mac = self.back.next(&[&last]);
        mac.verify_slice(&seal).map_err(|_| invalid("another key"))?;
        Ok(u64::from_be_bytes(last))
    }
}

/// The receiving end of a connection.
pub(super) struct Receiving<S> {
    stream: S,
    there: Seal,
    back: Seal,
}

/// A message as it arrived.
pub(super) struct Arrived {
    pub number: u64,
    pub message: Vec<u8>,
    /// The sender waits for [`Receiving::answer`].
    pub answer: bool,
}

impl<S: Read + Write> Receiving<S> {
    /// Lets a sender prove who it is; [`Receiving::answer`] comes next.
    pub fn accept(mut stream: S, key: &[u8]) -> io::Result<(Self, Hello)> {
        let hello = array(&mut stream)?;
        let who = Hello::decode(&hello)?;
        let nonce = random()?;
        stream.write_all(&nonce)?;
        let (mut there, back) = seals(key, &hello, &nonce);
        let proof: [u8; MAC] = array(&mut stream)?;
        there.next(&[b"hello"]).verify_slice(&proof).map_err(|_| invalid("another key"))?;
        Ok((Receiving { stream, there, back }, who))
    }

    /// Tells the sender the number of the last message that has arrived.
    pub fn answer(&mut self, last: u64) -> io::Result<()> {
        let last = last.to_be_bytes();
        let mac = self.back.next(&[&last]).finalize().into_bytes();
        self.stream.write_all(&[&last[..], &mac].concat())
    }

    /// Waits for the next message.
    pub fn receive(&mut self) -> io::Result<Arrived> {
        let mut message = Vec::new();
        loop {
            let head: [u8; 4] = array(&mut self.stream)?;
            let number: [u8; 8] = array(&mut self.stream)?;
            let (length, flags) = (u32::from_be_bytes(head) & !(ANSWER | MORE), u32::from_be_bytes(head));
            if length > PART || message.len() + length as usize > LONGEST {
                return Err(invalid("message too long"));
            }
            let start = message.len();
            (&mut self.stream).take(length.into()).read_to_end(&mut message)?;
            let part = &message[start..];
            if part.len() != length as usize {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let seal: [u8; MAC] = array(&mut self.stream)?;
            let mac = self.there.next(&[&head, &number, part]);
            mac.verify_slice(&seal).map_err(|_| invalid("altered"))?;
            if flags & MORE == 0 {
                let answer = flags & ANSWER != 0;
                return Ok(Arrived { number: u64::from_be_bytes(number), message, answer });
            }
        }
    }

    /// What is read from.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.stream
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    const HELLO: Hello = Hello { from: HostId(1), to: HostId(2), stream: 77, first: 5 };

    /// What the sender says in all: its opening and two messages.
    const LENGTH: usize = super::HELLO + MAC + 2 * (4 + 8 + 3 + MAC);

    /// Both ends of a connection; `change` alters what goes to the receiver.
    fn exchange(sender: &'static [u8], change: impl Fn(usize, &mut u8)) -> Vec<io::Result<(u64, Vec<u8>)>> {
        let (ours, mut middle) = UnixStream::pair().unwrap();
        let (mut other, theirs) = UnixStream::pair().unwrap();
        let mut back = (other.try_clone().unwrap(), middle.try_clone().unwrap());
        thread::spawn(move || {
            let (mut sending, last) = Sending::open(ours, sender, &HELLO)?;
            assert_eq!(last, 4);
            assert_eq!(sending.send(5, &[b"one".to_vec(), b"two".to_vec()])?, 6);
            io::Result::Ok(())
        });
        thread::spawn(move || {
            let copied = io::copy(&mut back.0, &mut back.1);
            // The sender waits for nothing any more.
            let _ = back.1.shutdown(std::net::Shutdown::Both);
            copied
        });
        let receiver = thread::spawn(move || {
            let (mut receiving, hello) = match Receiving::accept(theirs, b"secret") {
                Ok(both) => both,
                Err(error) => return vec![Err(error)],
            };
            assert_eq!(hello, HELLO);
            receiving.answer(4).unwrap();
            let mut got = Vec::new();
            for number in 5..7 {
                let arrived = receiving.receive();
                let ok = arrived.is_ok();
                got.push(arrived.map(|a| (a.number, a.message)));
                if !ok {
                    return got;
                }
                if number == 6 {
                    receiving.answer(6).unwrap();
                }
            }
            got
        });
        let mut byte = [0];
        for at in 0..LENGTH {
            if middle.read_exact(&mut byte).is_err() {
                break;
            }
            change(at, &mut byte[0]);
            if other.write_all(&byte).is_err() {
                break;
            }
        }
        // The receiver waits for nothing any more.
        let _ = other.shutdown(std::net::Shutdown::Write);
        receiver.join().unwrap()
    }

    #[test]
    fn messages_arrive_and_whatever_was_altered_is_refused() {
        let all = exchange(b"secret", |_, _| ());
        let all: Vec<_> = all.into_iter().map(Result::unwrap).collect();
        assert_eq!(all, [(5, b"one".to_vec()), (6, b"two".to_vec())]);
        for flip in 0..LENGTH {
            let got = exchange(b"secret", |at, byte| *byte ^= u8::from(at == flip));
            assert!(got.iter().any(Result::is_err), "byte {flip}");
            let right = [(5, b"one".to_vec()), (6, b"two".to_vec())];
            assert!(got.into_iter().flatten().all(|m| right.contains(&m)), "byte {flip}");
        }
    }

    #[test]
    fn another_key_is_refused() {
        assert!(exchange(b"guess", |_, _| ())[0].is_err());
    }

    #[test]
    fn a_long_message_comes_in_short_parts_and_a_long_part_is_refused_before_it_comes() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let long: Vec<u8> = (0..3 * PART + 7).map(|n| n as u8).collect();
        let sent = long.clone();
        let sender = thread::spawn(move || {
            let (mut sending, _) = Sending::open(ours, b"secret", &HELLO)?;
            sending.send(5, &[sent, b"short".to_vec()])
        });
        let (mut receiving, _) = Receiving::accept(&mut theirs, b"secret").unwrap();
        receiving.answer(4).unwrap();
        let both = [(); 2].map(|()| receiving.receive().unwrap());
        assert!(both[0].message == long && !both[0].answer && both[0].number == 5);
        assert!(both[1].message == b"short" && both[1].answer && both[1].number == 6);
        receiving.answer(6).unwrap();
        assert_eq!(sender.join().unwrap().unwrap(), 6);

        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (there, back) = seals(b"secret", &[0; super::HELLO], &[0; 16]);
        let mut receiving = Receiving { stream: theirs, there, back };
        ours.write_all(&(PART + 1).to_be_bytes()).unwrap();
        ours.write_all(&[0; 8]).unwrap();
        // Nothing else comes, and nothing else is waited for.
        assert_eq!(receiving.receive().err().map(|e| e.kind()), Some(io::ErrorKind::InvalidData));
    }

    #[test]
    fn a_message_has_an_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (there, back) = seals(b"secret", &[0; super::HELLO], &[0; 16]);
        let mut sending = Sending { stream: ours, there, back };
        let long = vec![vec![0; LONGEST + 1]];
        assert_eq!(sending.send(1, &long).err().map(|e| e.kind()), Some(io::ErrorKind::InvalidData));
        // One who sends it nevertheless is not listened to up to its end, which never comes.
        let mut seal = sending.there;
        let sender = thread::spawn(move || {
            let (head, number, part) = ((PART | MORE).to_be_bytes(), 1u64.to_be_bytes(), [0; PART as usize]);
            loop {
                let mac = seal.next(&[&head, &number, &part]).finalize().into_bytes();
                sending.stream.write_all(&[&head[..], &number, &part, &mac].concat())?;
            }
            #[expect(unreachable_code, reason = "it names the type of the error")]
            io::Result::Ok(())
        });
        let (there, back) = seals(b"secret", &[0; super::HELLO], &[0; 16]);
        let mut receiving = Receiving { stream: &mut theirs, there, back };
        assert_eq!(receiving.receive().err().map(|e| e.kind()), Some(io::ErrorKind::InvalidData));
        drop(theirs);
        assert!(sender.join().unwrap().is_err());
    }
}
