//! VLAN tags (IEEE 802.1Q): reading, pushing, popping, rewriting.

use super::Packet;

/// Tag protocol identifier of a customer tag (802.1Q).
pub const TPID_C: u16 = 0x8100;
/// Tag protocol identifier of a service tag (802.1ad).
pub const TPID_S: u16 = 0x88a8;
/// Bits of a tag that hold the VLAN identifier.
pub const VID_MASK: u16 = 0x0fff;
/// Set in a key's tag word when the frame is tagged (the place of the drop-eligible bit, as OpenFlow's
/// `OFPVID_PRESENT`).
pub const PRESENT: u16 = 0x1000;

/// What happens to the outer tag on the way out of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum VlanOp {
    /// Leave the frame as it is.
    #[default]
    None,
    /// Remove the outer tag.
    Pop,
    /// Add an outer tag.
    Push {
        /// Tag protocol identifier.
        tpid: u16,
        /// Priority, drop-eligible bit and VLAN.
        tci: u16,
    },
    /// Replace the content of the outer tag.
    Set {
        /// Priority, drop-eligible bit and VLAN.
        tci: u16,
    },
}

/// Whether an EtherType announces a VLAN tag.
#[inline]
pub fn is_tpid(ethertype: u16) -> bool {
    ethertype == TPID_C || ethertype == TPID_S
}

/// The outer tag of a frame: (TPID, TCI).
#[inline]
pub fn outer_tag(head: &[u8]) -> Option<(u16, u16)> {
    let &[t0, t1, v0, v1] = head.get(12..16)? else { return None };
    let tpid = u16::from_be_bytes([t0, t1]);
    is_tpid(tpid).then(|| (tpid, u16::from_be_bytes([v0, v1])))
}

impl VlanOp {
    /// Applies the operation. A pop or set of an untagged frame does nothing.
    pub fn apply(self, p: &mut Packet) {
        match self {
            VlanOp::None => {}
            VlanOp::Pop => {
                if outer_tag(p.head()).is_some() {
                    p.head_mut().copy_within(0..12, 4);
                    p.shrink_front(4);
                    p.offload.shift(-4);
                }
            }
            VlanOp::Push { tpid, tci } => {
                if let Some(head) = p.grow_front(4) {
                    head.copy_within(4..16, 0);
                    head[12..14].copy_from_slice(&tpid.to_be_bytes());
                    head[14..16].copy_from_slice(&tci.to_be_bytes());
                    p.offload.shift(4);
                }
            }
            VlanOp::Set { tci } => {
                if outer_tag(p.head()).is_some() {
                    p.head_mut()[14..16].copy_from_slice(&tci.to_be_bytes());
                }
            }
        }
    }

    /// The operation that undoes this one on `p`, read before it is applied.
    pub fn inverse(self, p: &Packet) -> Self {
        match (self, outer_tag(p.head())) {
            (VlanOp::Push { .. }, _) => VlanOp::Pop,
            (VlanOp::Pop, Some((tpid, tci))) => VlanOp::Push { tpid, tci },
            (VlanOp::Set { .. }, Some((_, tci))) => VlanOp::Set { tci },
            _ => VlanOp::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_and_their_inverses() {
        let mut frame = vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0x81, 0x00, 0x20, 0x05, 0x08, 0x00];
        frame.resize(200, 9);
        for op in [VlanOp::Pop, VlanOp::Push { tpid: TPID_S, tci: 7 }, VlanOp::Set { tci: 9 }, VlanOp::None] {
            let mut p = Packet::from_frame(&frame);
            let back = op.inverse(&p);
            op.apply(&mut p);
            let len = match op {
                VlanOp::Pop => 196,
                VlanOp::Push { .. } => 204,
                _ => 200,
            };
            assert_eq!(p.len(), len);
            assert_eq!(p.to_vec() == frame, op == VlanOp::None);
            back.apply(&mut p);
            assert_eq!(p.to_vec(), frame);
        }
    }

    #[test]
    fn an_untagged_frame_is_left_alone() {
        let mut p = Packet::from_frame(&[5; 60]);
        VlanOp::Pop.apply(&mut p);
        VlanOp::Set { tci: 3 }.apply(&mut p);
        assert_eq!(p.to_vec(), [5; 60]);
    }
}
