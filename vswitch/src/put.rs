//! Big-endian fields of messages, as network protocols have them.

/// Writes big-endian fields.
pub(crate) trait Put {
    fn put8(&mut self, v: u8);
    fn put16(&mut self, v: u16);
    fn put32(&mut self, v: u32);
    fn put64(&mut self, v: u64);
    /// The low `bytes` bytes of a number.
    fn put_number(&mut self, v: u128, bytes: usize);
    fn zeros(&mut self, n: usize);
    /// Text cut and padded to `n` bytes, the last of them zero.
    fn put_text(&mut self, s: &str, n: usize);
    /// Zeros up to a multiple of eight bytes since `start`.
    fn pad8(&mut self, start: usize);
    /// Overwrites two bytes with the number of bytes since `start`.
    fn put_len(&mut self, at: usize, start: usize);
}

impl Put for Vec<u8> {
    fn put8(&mut self, v: u8) {
        self.push(v);
    }

    fn put16(&mut self, v: u16) {
        self.extend_from_slice(&v.to_be_bytes());
    }

    fn put32(&mut self, v: u32) {
        self.extend_from_slice(&v.to_be_bytes());
    }

    fn put64(&mut self, v: u64) {
        self.extend_from_slice(&v.to_be_bytes());
    }

    fn put_number(&mut self, v: u128, bytes: usize) {
        self.extend_from_slice(&v.to_be_bytes()[16 - bytes.min(16)..]);
    }

    fn zeros(&mut self, n: usize) {
        self.resize(self.len() + n, 0);
    }

    fn put_text(&mut self, s: &str, n: usize) {
        let mut cut = s.len().min(n - 1);
        while !s.is_char_boundary(cut) {
            cut -= 1;
        }
        self.extend_from_slice(&s.as_bytes()[..cut]);
        self.zeros(n - cut);
    }

    fn pad8(&mut self, start: usize) {
        let len = self.len() - start;
        self.zeros(len.next_multiple_of(8) - len);
    }

    fn put_len(&mut self, at: usize, start: usize) {
        let len = (self.len() - start) as u16;
        self[at..at + 2].copy_from_slice(&len.to_be_bytes());
    }
}
