//! The Internet checksum (RFC 1071) and the checksums of IP, TCP, UDP and ICMP.

/// Adds `data`, as big-endian 16-bit words, to a running sum. An odd last byte counts as the high half of a word,
/// so only the last part of a message may have odd length.
pub fn sum(data: &[u8], start: u64) -> u64 {
    let mut acc = start;
    let mut words = data.chunks_exact(4);
    for w in &mut words {
        acc += u64::from(u32::from_be_bytes([w[0], w[1], w[2], w[3]]));
    }
    let mut rest = words.remainder().chunks_exact(2);
    for w in &mut rest {
        acc += u64::from(u16::from_be_bytes([w[0], w[1]]));
    }
    if let [b] = rest.remainder() {
        acc += u64::from(*b) << 8;
    }
    acc
}

/// Folds a running sum to 16 bits.
pub fn fold(mut acc: u64) -> u16 {
    while acc >> 16 != 0 {
        acc = (acc & 0xffff) + (acc >> 16);
    }
    acc as u16
}

/// The checksum field for a message whose running sum is `acc`.
pub fn finish(acc: u64) -> u16 {
    !fold(acc)
}

/// Running sum of the pseudo header of TCP, UDP and ICMPv6. `src` and `dst` are both 4 or both 16 bytes.
pub fn pseudo(src: &[u8], dst: &[u8], proto: u8, len: usize) -> u64 {
    sum(src, sum(dst, u64::from(proto) + (len as u64 & 0xffff) + (len as u64 >> 16)))
}

/// Writes the header checksum of an IPv4 header (without its payload).
pub fn set_ipv4(header: &mut [u8]) {
    header[10..12].fill(0);
    let c = finish(sum(header, 0));
    header[10..12].copy_from_slice(&c.to_be_bytes());
}

/// Updates a checksum field after a 16-bit aligned part of the message changed from `old` to `new` (RFC 1624).
/// A UDP checksum of zero (none) stays zero when `udp` is set.
pub fn update(field: &mut [u8], old: &[u8], new: &[u8], udp: bool) {
    let before = u16::from_be_bytes([field[0], field[1]]);
    if udp && before == 0 {
        return;
    }
    let removed = u64::from(!fold(sum(old, 0)));
    let mut c = finish(sum(new, removed + u64::from(!before)));
    if udp && c == 0 {
        c = 0xffff;
    }
    field[..2].copy_from_slice(&c.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_example_of_rfc_1071() {
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0)), 0xddf2);
    }

    proptest! {
        #[test]
        fn an_incremental_update_equals_a_new_sum(mut m in proptest::collection::vec(any::<u8>(), 20..60),
                                                  new: [u8; 4]) {
            m.truncate(m.len() & !1);
            m[0..2].fill(0);
            let c = finish(sum(&m, 0));
            m[0..2].copy_from_slice(&c.to_be_bytes());
            let old: [u8; 4] = m[8..12].try_into().unwrap();
            m[8..12].copy_from_slice(&new);
            let (field, _) = m.split_at_mut(2);
            update(field, &old, &new, false);
            prop_assert_eq!(fold(sum(&m, 0)), 0xffff);
        }
    }
}
