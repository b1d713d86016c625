//! The stream of records that carries a machine: a file, or one direction of a connection.
//!
//! ```text
//! stream:  "NACREVM\n"  version (u32)  reserved (u32, 0)  record...
//! record:  kind (u32)  length (u32)  CRC-32 of kind, length and payload (u32)  reserved (u32, 0)  payload
//! ```
//! Numbers are little-endian. What describes the machine is JSON; guest memory is bytes.
//!
//! | kind | payload | direction |
//! |---|---|---|
//! | 1 description | JSON: [`Description`] | from the source |
//! | 2 pages | guest address (u64), then whole pages | from the source |
//! | 3 zeros | pairs of guest address and length (u64): pages that hold zeros | from the source |
//! | 4 state | JSON: [`MachineState`] | from the source |
//! | 5 end | nothing: all is sent, the source has closed its disks | from the source |
//! | 6 ready | nothing: the description fits | from the target |
//! | 7 prepared | nothing: all is loaded, the disks are open | from the target |
//! | 8 run | nothing: the machine is the target's | from the source |
//! | 9 running | nothing: it runs, or is paused as it was | from the target |
//! | 10 refused | text: why this side cannot go on | either |
//! | 11 park | nothing: as `end`, but the owner of both sides says later which of them goes on | from the source |
//!
//! A snapshot file is kinds 1, 2, 4 and 5 in this order, with the pages of memory that are not zero. A live migration sends
//! pages again that changed, and names those that became zero.
//!
//! Rules for change: a reader accepts every version up to its own. A field that is added to the JSON raises [`VERSION`] and
//! has a default that means what older versions did; a field or record never changes its meaning. Unknown fields and
//! records are errors: state that is not understood must not be dropped.

use std::io::{self, Read, Write};

use flate2::Crc;

use super::state::{Description, MachineState};
use crate::memory::PAGE_SIZE;

/// The newest version of the stream, and the one that is written.
pub const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"NACREVM\n";
const HEADER: usize = 16;
/// Pages of one record.
pub(super) const MAX_PAGES: usize = 64;
/// Ranges of one record of zeros.
pub(super) const MAX_ZEROS: usize = 4096;
const MAX_DESCRIPTION: u32 = 1 << 20;
/// 255 vCPUs with their XSAVE areas, and all devices that fit on a bus, are less.
const MAX_STATE: u32 = 64 << 20;
const MAX_TEXT: u32 = 4096;

/// Why a stream cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The file or the connection failed.
    #[error("Cannot read or write the machine's state")]
    Io(#[source] io::Error),
    /// It ends too early.
    #[error("The machine's state is truncated; it was not written to its end, or the connection was lost")]
    Truncated,
    /// The other side of a connection does nothing.
    #[error("The other side of the migration is silent; check it and the network between")]
    Silent,
    /// It is something else.
    #[error("This is no saved machine")]
    Magic,
    /// It was written by a newer version of this software.
    #[error("The machine's state has version {0}, {VERSION} is the newest that is known; use newer software")]
    Version(u32),
    /// Bytes changed.
    #[error("The machine's state is damaged: a checksum is wrong")]
    Checksum,
    /// A record breaks a rule.
    #[error("The machine's state is malformed: {0}")]
    Malformed(String),
}

impl From<io::Error> for StreamError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Silent,
            _ => Self::Io(error),
        }
    }
}

fn malformed(what: impl Into<String>) -> StreamError {
    StreamError::Malformed(what.into())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Description = 1,
    Pages = 2,
    Zeros = 3,
    State = 4,
    End = 5,
    Ready = 6,
    Prepared = 7,
    Run = 8,
    Running = 9,
    Refused = 10,
    Park = 11,
}

impl Kind {
    fn new(number: u32) -> Option<Self> {
        use Kind::{Description, End, Pages, Park, Prepared, Ready, Refused, Run, Running, State, Zeros};
        let all = [Description, Pages, Zeros, State, End, Ready, Prepared, Run, Running, Refused, Park];
        all.into_iter().find(|kind| *kind as u32 == number)
    }

    /// The longest payload.
    fn most(self) -> u32 {
        match self {
            Self::Description => MAX_DESCRIPTION,
            Self::Pages => 8 + (MAX_PAGES as u64 * PAGE_SIZE) as u32,
            Self::Zeros => 16 * MAX_ZEROS as u32,
            Self::State => MAX_STATE,
            Self::Refused => MAX_TEXT,
            Self::End | Self::Park | Self::Ready | Self::Prepared | Self::Run | Self::Running => 0,
        }
    }
}

/// A record that was read. Memory contents are borrowed from the reader.
#[derive(Debug, PartialEq)]
pub enum Record<'a> {
    /// What the machine is.
    Description(Box<Description>),
    /// The contents of whole pages.
    Pages {
        /// Guest address of the first.
        address: u64,
        /// The bytes.
        data: &'a [u8],
    },
    /// Pages that hold zeros.
    Zeros(Vec<(u64, u64)>),
    /// The state of processors and devices.
    State(Box<MachineState>),
    /// The source has sent everything.
    End,
    /// As [`Record::End`], but the target does not run it until its owner says so.
    Park,
    /// The target takes a machine of this description.
    Ready,
    /// The target has everything.
    Prepared,
    /// The target shall run it.
    Run,
    /// The target runs it.
    Running,
    /// The other side gives up.
    Refused(String),
}

/// Writes a stream.
pub struct StreamWriter<W> {
    out: W,
    buffer: Vec<u8>,
    written: u64,
}

impl<W: Write> StreamWriter<W> {
    /// Begins a stream.
    ///
    /// # Errors
    /// Fails when `out` does.
    pub fn new(mut out: W) -> Result<Self, StreamError> {
        let mut start = MAGIC.to_vec();
        start.extend(VERSION.to_le_bytes());
        start.extend([0; 4]);
        out.write_all(&start)?;
        Ok(Self { out, buffer: Vec::new(), written: start.len() as u64 })
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// What is written to.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.out
    }

    fn record(
        &mut self,
        kind: Kind,
        fill: impl FnOnce(&mut Vec<u8>) -> Result<(), StreamError>,
    ) -> Result<(), StreamError> {
        self.buffer.clear();
        self.buffer.resize(HEADER, 0);
        fill(&mut self.buffer)?;
        let len = u32::try_from(self.buffer.len() - HEADER).ok().filter(|len| *len <= kind.most());
        let len = len.ok_or_else(|| malformed("a record is too long"))?;
        self.buffer[..4].copy_from_slice(&(kind as u32).to_le_bytes());
        self.buffer[4..8].copy_from_slice(&len.to_le_bytes());
        let sum = checksum(&self.buffer[..8], &self.buffer[HEADER..]);
        self.buffer[8..12].copy_from_slice(&sum.to_le_bytes());
        self.out.write_all(&self.buffer)?;
        self.written += self.buffer.len() as u64;
        Ok(())
    }

    /// Writes a record. All but memory is flushed: the other side may be waiting for it.
    ///
    /// # Errors
    /// Fails when the record is longer than the format allows, or the file or connection fails.
    pub fn write(&mut self, record: &Record<'_>) -> Result<(), StreamError> {
        let json = |e: serde_json::Error| malformed(e.to_string());
        match record {
            Record::Description(d) => {
                self.record(Kind::Description, |out| serde_json::to_writer(out, d).map_err(json))
            }
            Record::Pages { address, data } => self.record(Kind::Pages, |out| {
                out.extend(address.to_le_bytes());
                out.extend_from_slice(data);
                Ok(())
            }),
            Record::Zeros(ranges) => self.record(Kind::Zeros, |out| {
                out.extend(
                    ranges
                        .iter()
                        .flat_map(|(address, len)| [address.to_le_bytes(), len.to_le_bytes()])
                        .flatten(),
                );
                Ok(())
            }),
            Record::State(state) => {
                self.record(Kind::State, |out| serde_json::to_writer(out, state).map_err(json))
            }
            Record::Refused(text) => self.record(Kind::Refused, |out| {
                out.extend(text.bytes().take(MAX_TEXT as usize));
                Ok(())
            }),
            Record::End => self.record(Kind::End, |_| Ok(())),
            Record::Park => self.record(Kind::Park, |_| Ok(())),
            Record::Ready => self.record(Kind::Ready, |_| Ok(())),
            Record::Prepared => self.record(Kind::Prepared, |_| Ok(())),
            Record::Run => self.record(Kind::Run, |_| Ok(())),
            Record::Running => self.record(Kind::Running, |_| Ok(())),
        }?;
        if !matches!(record, Record::Pages { .. } | Record::Zeros(_)) {
            self.out.flush()?;
        }
        Ok(())
    }
}

/// A record of any kind and contents with a right checksum: for fuzzing.
#[doc(hidden)]
pub fn sealed(kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut record = [kind.to_le_bytes(), (payload.len() as u32).to_le_bytes()].concat();
    record.extend(checksum(&record, payload).to_le_bytes());
    record.extend([0; 4]);
    record.extend_from_slice(payload);
    record
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(head);
    crc.update(payload);
    crc.sum()
}

/// Reads a stream that may come from anybody: every length is bounded, memory is claimed only for bytes that came.
pub struct StreamReader<R> {
    input: R,
    buffer: Vec<u8>,
}

impl<R: Read> StreamReader<R> {
    /// Begins to read a stream.
    ///
    /// # Errors
    /// Fails when it is none, or one of a newer version.
    pub fn new(mut input: R) -> Result<Self, StreamError> {
        let mut start = [0; 16];
        input.read_exact(&mut start)?;
        let [m @ .., v0, v1, v2, v3, r0, r1, r2, r3] = start;
        if m != MAGIC {
            return Err(StreamError::Magic);
        }
        match (u32::from_le_bytes([v0, v1, v2, v3]), [r0, r1, r2, r3]) {
            (0, _) => Err(malformed("version 0")),
            (newer, _) if newer > VERSION => Err(StreamError::Version(newer)),
            (_, [0, 0, 0, 0]) => Ok(Self { input, buffer: Vec::new() }),
            _ => Err(malformed("reserved bytes are set")),
        }
    }

    /// What is read from.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.input
    }

    /// Reads the next record.
    ///
    /// # Errors
    /// Fails when the stream ends, is damaged, or holds what this version does not know.
    pub fn read(&mut self) -> Result<Record<'_>, StreamError> {
        let mut header = [0; HEADER];
        self.input.read_exact(&mut header)?;
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let kind = Kind::new(word(0))
            .ok_or_else(|| malformed(format!("a record of the unknown kind {}", word(0))))?;
        let len = word(4);
        if len > kind.most() {
            return Err(malformed(format!("a record of {len} bytes")));
        }
        self.buffer.clear();
        // Grows as bytes come, whatever length was announced.
        let read = self.input.by_ref().take(len.into()).read_to_end(&mut self.buffer)?;
        if read < len as usize {
            return Err(StreamError::Truncated);
        }
        if word(12) != 0 {
            return Err(malformed("reserved bytes are set"));
        }
        if checksum(&header[..8], &self.buffer) != word(8) {
            return Err(StreamError::Checksum);
        }
        self.decode(kind)
    }

    fn decode(&self, kind: Kind) -> Result<Record<'_>, StreamError> {
        let payload = self.buffer.as_slice();
        let json = |e: serde_json::Error| malformed(e.to_string());
        Ok(match kind {
            Kind::Description => {
                Record::Description(Box::new(serde_json::from_slice(payload).map_err(json)?))
            }
            Kind::State => Record::State(Box::new(serde_json::from_slice(payload).map_err(json)?)),
            Kind::Pages => {
                let (address, data) =
                    payload.split_first_chunk().ok_or_else(|| malformed("pages without address"))?;
                let address = u64::from_le_bytes(*address);
                if data.is_empty() || !whole_pages(address, data.len() as u64) {
                    return Err(malformed("parts of pages"));
                }
                Record::Pages { address, data }
            }
            Kind::Zeros => {
                let (pairs, rest) = payload.as_chunks::<16>();
                let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
                let ranges: Vec<_> = pairs.iter().map(|p| (number(&p[..8]), number(&p[8..]))).collect();
                if !rest.is_empty() || !ranges.iter().all(|(address, len)| whole_pages(*address, *len)) {
                    return Err(malformed("parts of pages"));
                }
                Record::Zeros(ranges)
            }
            Kind::Refused => Record::Refused(String::from_utf8_lossy(payload).into_owned()),
            Kind::End => Record::End,
            Kind::Park => Record::Park,
            Kind::Ready => Record::Ready,
            Kind::Prepared => Record::Prepared,
            Kind::Run => Record::Run,
            Kind::Running => Record::Running,
        })
    }
}

fn whole_pages(address: u64, len: u64) -> bool {
    address.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE) && address.checked_add(len).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(records: &[Record<'_>]) -> Vec<u8> {
        let mut writer = StreamWriter::new(Vec::new()).unwrap();
        records.iter().for_each(|record| writer.write(record).unwrap());
        assert_eq!(writer.written(), writer.get_mut().len() as u64);
        writer.out
    }

    fn read_all(bytes: &[u8]) -> Result<usize, StreamError> {
        let mut reader = StreamReader::new(bytes)?;
        let mut count = 0;
        loop {
            let end = matches!(reader.read()?, Record::End);
            count += 1;
            if end {
                return Ok(count);
            }
        }
    }

    #[test]
    fn what_the_other_side_waits_for_does_not_stay_in_a_buffer() {
        let mut writer = StreamWriter::new(io::BufWriter::new(Vec::new())).unwrap();
        for record in [Record::Zeros(vec![(0, PAGE_SIZE)]), Record::Ready, Record::Refused("no".into())] {
            let waits = !matches!(record, Record::Zeros(_));
            writer.write(&record).unwrap();
            let written = writer.written();
            assert_eq!(writer.get_mut().get_ref().len() as u64 == written, waits, "{record:?}");
        }
    }

    #[test]
    fn records_survive_and_every_cut_or_flipped_bit_is_noticed() {
        let page = vec![7; 4096];
        let records = [
            Record::Pages { address: 0x1000, data: &page },
            Record::Zeros(vec![(0, 0x2000), (1 << 40, 0x1000)]),
            Record::Refused("No room".into()),
            Record::End,
        ];
        let bytes = stream(&records);
        let mut reader = StreamReader::new(bytes.as_slice()).unwrap();
        for record in &records {
            assert_eq!(reader.read().unwrap(), *record);
        }
        for cut in 0..bytes.len() {
            assert!(matches!(read_all(&bytes[..cut]), Err(StreamError::Truncated)), "cut at {cut}");
        }
        for bit in (0..bytes.len() * 8).step_by(7) {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(read_all(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn strangers_and_the_future_are_refused() {
        let end = stream(&[Record::End]);
        assert!(matches!(read_all(b"#!/bin/sh\nexec true"), Err(StreamError::Magic)));
        let mut newer = end.clone();
        newer[8] = VERSION as u8 + 1;
        assert!(matches!(read_all(&newer), Err(StreamError::Version(2))));
        let mut kind = end.clone();
        kind[16] = 99;
        assert!(matches!(read_all(&kind), Err(StreamError::Malformed(_))));
        // A length of 4 GiB claims no memory.
        let mut long = end.clone();
        long[20..24].fill(0xff);
        assert!(matches!(read_all(&long), Err(StreamError::Malformed(_))));
        for (address, len) in [(1, 4096), (0, 100), (u64::MAX - 4095, 8192)] {
            let bytes = stream(&[Record::Zeros(vec![(address, len)]), Record::End]);
            assert!(matches!(read_all(&bytes), Err(StreamError::Malformed(_))), "{address:#x}+{len:#x}");
        }
    }
}
