//! The receive filter that the driver sets through the control queue.

use serde::{Deserialize, Serialize};

/// Addresses of one table; a driver with more gets everything.
const MAX_ADDRESSES: usize = 64;

/// Which frames the driver wants.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Filter {
    pub(super) mac: [u8; 6],
    /// Everything.
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
    pub(super) all_unicast: bool,
    pub(super) no_multicast: bool,
    pub(super) no_unicast: bool,
    pub(super) no_broadcast: bool,
    unicast: Vec<[u8; 6]>,
    multicast: Vec<[u8; 6]>,
}

impl Filter {
    /// The filter of a driver that sets none: everything passes.
    pub(super) fn new(mac: [u8; 6]) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Vec::new(),
            multicast: Vec::new(),
        }
    }

    /// Sets both tables; a table that is too long lets everything of its kind pass.
    pub(super) fn set_tables(&mut self, unicast: Vec<[u8; 6]>, multicast: Vec<[u8; 6]>) {
        (self.unicast, self.multicast) = (unicast, multicast);
    }

    pub(super) fn accepts(&self, frame: &[u8]) -> bool {
        if self.promiscuous {
            return true;
        }
        let Some(target) = frame.first_chunk::<6>() else { return false };
        let within =
            |all: bool, table: &Vec<[u8; 6]>| all || table.len() > MAX_ADDRESSES || table.contains(target);
        if *target == [0xff; 6] {
            !self.no_broadcast
        } else if target[0] & 1 != 0 {
            !self.no_multicast && within(self.all_multicast, &self.multicast)
        } else {
            !self.no_unicast && (*target == self.mac || within(self.all_unicast, &self.unicast))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_and_tables_select() {
        let mut filter = Filter::new([2, 0, 0, 0, 0, 1]);
        let (own, other, group, all) =
            ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2], [1, 0, 94, 0, 0, 1], [0xff; 6]);
        let check = |filter: &Filter| [own, other, group, all].map(|a| filter.accepts(&a));
        assert_eq!(check(&filter), [true; 4]);
        filter.promiscuous = false;
        assert_eq!(check(&filter), [true, false, false, true]);
        filter.set_tables(vec![other], vec![group]);
        assert_eq!(check(&filter), [true; 4]);
        filter.no_broadcast = true;
        filter.no_multicast = true;
        assert_eq!(check(&filter), [true, true, false, false]);
        filter.set_tables(vec![], vec![]);
        filter.all_unicast = true;
        filter.no_multicast = false;
        filter.all_multicast = true;
        assert_eq!(check(&filter), [true, true, true, false]);
        filter.no_unicast = true;
        assert_eq!(check(&filter), [false, false, true, false]);
        assert!(!filter.accepts(&[1, 2]));
    }
}
