//! A descriptor chain that was read from a queue, and cursors over its bytes.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::memory::{AccessError, GuestMemory};

/// A part of a buffer: contiguous in guest-physical memory, known to be RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
}

/// One buffer that the driver made available: a device-readable part, then a device-writable part.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    pub(super) head: u16,
    pub(super) readable: Vec<Segment>,
    pub(super) writable: Vec<Segment>,
}

impl Chain {
    /// What [`super::Queue::push`] returns the buffer by.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The parts that the device may read.
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// The parts that the device may write.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Bytes that the device may read. A chain has at most 4 GiB in total.
    pub fn readable_len(&self) -> u32 {
        self.readable.iter().map(|s| s.len).sum()
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> u32 {
        self.writable.iter().map(|s| s.len).sum()
    }

    /// A cursor at the start of the readable part.
    pub fn reader<'a>(&'a self, memory: &'a GuestMemory) -> Reader<'a> {
        Reader(Cursor { memory, segments: &self.readable, offset: 0, done: 0 })
    }

    /// A cursor at the start of the writable part.
    pub fn writer<'a>(&'a self, memory: &'a GuestMemory) -> Writer<'a> {
        Writer(Cursor { memory, segments: &self.writable, offset: 0, done: 0 })
    }
}

struct Cursor<'a> {
    memory: &'a GuestMemory,
    segments: &'a [Segment],
    /// Offset within the first of `segments`.
    offset: u32,
    done: u32,
}

impl Cursor<'_> {
    fn remaining(&self) -> u32 {
        self.segments.iter().map(|s| s.len).sum::<u32>() - self.offset
    }

    /// The next contiguous part of at most `len` bytes.
    fn next(&mut self, len: usize) -> Option<Segment> {
        let first = self.segments.first()?;
        let len = u32::try_from(len).unwrap_or(u32::MAX).min(first.len - self.offset);
        let part = Segment { address: first.address + u64::from(self.offset), len };
        self.offset += len;
        self.done += len;
        if self.offset == first.len {
            self.segments = &self.segments[1..];
            self.offset = 0;
        }
        Some(part)
    }

    /// The parts of the next `len` bytes, or of what is left when that is less.
    fn take(&mut self, len: usize, parts: &mut Vec<Segment>) -> usize {
        let mut done = 0;
        while done < len
            && let Some(part) = self.next(len - done)
        {
            parts.push(part);
            done += part.len as usize;
        }
        done
    }
}

/// Reads the device-readable part of a chain from the front.
pub struct Reader<'a>(Cursor<'a>);

impl Reader<'_> {
    /// Bytes not read yet.
    pub fn remaining(&self) -> u32 {
        self.0.remaining()
    }

    /// Copies up to `data.len()` bytes; returns how many there were.
    ///
    /// # Errors
    /// Fails when the memory is not RAM (never for a chain from a [`super::Queue`]).
    pub fn read(&mut self, data: &mut [u8]) -> Result<usize, AccessError> {
        let mut done = 0;
        while done < data.len()
            && let Some(part) = self.0.next(data.len() - done)
        {
            let end = done + part.len as usize;
            self.0.memory.read(part.address, &mut data[done..end])?;
            done = end;
        }
        Ok(done)
    }

    /// Copies a plain-data object, or `None` when fewer bytes are left.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_obj<T: FromBytes + IntoBytes>(&mut self) -> Result<Option<T>, AccessError> {
        let mut value = T::new_zeroed();
        let n = self.read(value.as_mut_bytes())?;
        Ok((n == size_of::<T>()).then_some(value))
    }

    /// Appends the parts of the next `len` bytes to `parts` instead of copying; returns how many bytes there were.
    pub fn take(&mut self, len: usize, parts: &mut Vec<Segment>) -> usize {
        self.0.take(len, parts)
    }
}

/// Writes the device-writable part of a chain from the front.
pub struct Writer<'a>(Cursor<'a>);

impl Writer<'_> {
    /// Bytes that still fit.
    pub fn remaining(&self) -> u32 {
        self.0.remaining()
    }

    /// Bytes written (or taken) so far: the used length of the chain.
    pub fn written(&self) -> u32 {
        self.0.done
    }

    /// Copies as much of `data` as fits; returns how much.
    ///
    /// # Errors
    /// Fails when the memory is not RAM (never for a chain from a [`super::Queue`]).
    pub fn write(&mut self, data: &[u8]) -> Result<usize, AccessError> {
        let mut done = 0;
        while done < data.len()
            && let Some(part) = self.0.next(data.len() - done)
        {
            let end = done + part.len as usize;
            self.0.memory.write(part.address, &data[done..end])?;
            done = end;
        }
        Ok(done)
    }

    /// Copies a plain-data object; false when it does not fit (a prefix is then written).
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_obj<T: IntoBytes + Immutable>(&mut self, value: &T) -> Result<bool, AccessError> {
        Ok(self.write(value.as_bytes())? == size_of::<T>())
    }

    /// Appends the parts of the next `len` bytes to `parts` instead of copying; returns how many bytes there were.
    pub fn take(&mut self, len: usize, parts: &mut Vec<Segment>) -> usize {
        self.0.take(len, parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_cross_segments_and_stop_at_the_end() {
        let memory = GuestMemory::flat(0x1000).unwrap();
        let segments = vec![Segment { address: 0x10, len: 3 }, Segment { address: 0x20, len: 5 }];
        let chain = Chain { head: 0, readable: segments.clone(), writable: segments };
        let mut w = chain.writer(&memory);
        assert_eq!(w.write(&[1, 2]).unwrap(), 2);
        assert!(w.write_obj(&0x0605_0403u32).unwrap());
        assert_eq!((w.written(), w.remaining()), (6, 2));
        assert!(!w.write_obj(&0x0a09_0807u32).unwrap());
        assert_eq!(w.written(), 8);
        let mut r = chain.reader(&memory);
        let mut data = [0; 7];
        assert_eq!(r.read(&mut data).unwrap(), 7);
        assert_eq!(data, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(r.read_obj::<u16>().unwrap(), None);
        let mut parts = Vec::new();
        let mut r = chain.reader(&memory);
        assert_eq!(r.take(2, &mut parts), 2);
        assert_eq!(r.take(100, &mut parts), 6);
        let expected = [(0x10, 2), (0x12, 1), (0x20, 5)].map(|(address, len)| Segment { address, len });
        assert_eq!(parts, expected);
    }
}
