//! Seeded random numbers and the values that find bugs.

/// xoshiro256**, seeded by SplitMix64: small, and the same on every platform and in every version.
#[derive(Clone)]
pub struct Random([u64; 4]);

impl Random {
    pub fn new(seed: u64) -> Self {
        let mut x = seed;
        Self(std::array::from_fn(|_| {
            x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        }))
    }

    pub fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    /// True in `n` of 100 cases.
    pub fn percent(&mut self, n: u64) -> bool {
        self.below(100) < n
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer: a boundary of some width, a small number or random bits.
    pub fn integer(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(4),
            1 => {
                let width = self.pick(&[8, 16, 32, 64]);
                let boundary = self.pick(&[0u64, u64::MAX, 1 << (width - 1), (1 << (width - 1)) - 1]);
                boundary.wrapping_add(self.below(3)).wrapping_sub(1)
            }
            2 => self.below(256),
            3 => self.next() as i32 as i64 as u64,
            4 => 1 << self.below(64),
            5 => self.next() >> self.below(64),
            _ => self.next(),
        }
    }

    fn float64(&mut self) -> u64 {
        let sign = self.next() & 1 << 63;
        sign | match self.below(12) {
            0 => 0,
            1 => 0x7ff0_0000_0000_0000,
            2 => 0x7ff8_0000_0000_0000 | self.next() >> 13,
            3 => 0x7ff0_0000_0000_0001 | self.next() >> 14,
            4 => self.next() >> 12,
            5 => 0x3ff0_0000_0000_0000,
            6 => self.pick(&[
                0x7fef_ffff_ffff_ffff,
                0x0010_0000_0000_0000,
                1,
                0x43e0_0000_0000_0000,
                0x41e0_0000_0000_0000,
            ]),
            7 => (self.integer() as i32 as f64).abs().to_bits(),
            8 => (self.below(1000) as f64 / 8.0).to_bits(),
            9 => 0x3f00_0000_0000_0000 + (self.next() >> 10),
            _ => self.next() >> 1,
        }
    }

    fn float32(&mut self) -> u32 {
        let sign = self.next() as u32 & 1 << 31;
        sign | match self.below(12) {
            0 => 0,
            1 => 0x7f80_0000,
            2 => 0x7fc0_0000 | self.next() as u32 >> 10,
            3 => 0x7f80_0001 | self.next() as u32 >> 11,
            4 => self.next() as u32 >> 9,
            5 => 0x3f80_0000,
            6 => self.pick(&[0x7f7f_ffff, 0x0080_0000, 1, 0x4f00_0000, 0x5f00_0000]),
            7 => (self.integer() as i16 as f32).abs().to_bits(),
            8 => (self.below(1000) as f32 / 8.0).to_bits(),
            9 => 0x3c00_0000 + (self.next() as u32 >> 6),
            _ => self.next() as u32 >> 1,
        }
    }

    /// The content of an XMM register or of 16 bytes of memory.
    pub fn vector(&mut self) -> u128 {
        let wide = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
        match self.below(5) {
            0 => wide(self.float64(), self.float64()),
            1 => {
                let mut lanes = || u64::from(self.float32()) << 32 | u64::from(self.float32());
                wide(lanes(), lanes())
            }
            2 => wide(self.integer(), self.integer()),
            // Text, for string comparison: few distinct bytes and zeros.
            3 => wide(self.next() & 0x0303_0303_0303_0303, self.next() & 0x0303_0303_0303_0303),
            _ => wide(self.next(), self.next()),
        }
    }

    /// The content of an x87 register: 80 bits, among them formats that the processor rejects.
    pub fn extended(&mut self) -> u128 {
        let integer_bit = 1u64 << 63;
        let sign = self.next() as u16 & 0x8000;
        let (exponent, significand) = match self.below(12) {
            0 => (0, 0),
            1 => (0x7fff, integer_bit),
            2 => (0x7fff, integer_bit | self.next() >> 1),
            3 => (0, self.next()),
            4 => (self.next() as u16 & 0x7fff, self.next()),
            5 => (0x3fff, integer_bit),
            6 => (0x7fff, self.next()),
            7 => (0x3fff + self.below(70) as u16, integer_bit | self.integer()),
            8 => (0x3fff - self.below(70) as u16, integer_bit | self.next()),
            9 => (self.pick(&[1, 0x7ffe, 0x3c01, 0x43fe, 0x3f81, 0x407e]), integer_bit | self.next()),
            _ => (0x3ff0 + self.below(32) as u16, integer_bit | self.next()),
        };
        u128::from(sign | exponent) << 64 | u128::from(significand)
    }
}
