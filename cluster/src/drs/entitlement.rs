//! Who gets how much of a host that is short: reservations first, the rest by shares, up to demand and limit.

use super::model::VmLoad;

/// How much processor (MHz) each VM is entitled to on a host of `capacity`.
///
/// Every VM gets its reservation (scaled down if even those do not fit); what is left is shared out by
/// weight, and what a VM cannot use goes to the others.
pub fn entitlements(capacity: u64, vms: &[VmLoad]) -> Vec<u64> {
    let want: Vec<u64> = vms.iter().map(|v| v.need().cpu).collect();
    let reserved: u128 = vms.iter().zip(&want).map(|(v, w)| u128::from(v.reservation.cpu.min(*w))).sum();
    let mut got: Vec<u64> = vms
        .iter()
        .zip(&want)
        .map(|(v, w)| {
            let r = v.reservation.cpu.min(*w);
            if reserved > u128::from(capacity) {
                (u128::from(r) * u128::from(capacity) / reserved) as u64
            } else {
                r
            }
        })
        .collect();
    let mut left = capacity.saturating_sub(got.iter().sum());
    loop {
        let open: Vec<usize> = (0..vms.len()).filter(|i| got[*i] < want[*i] && vms[*i].shares > 0).collect();
        let weight: u64 = open.iter().map(|i| u64::from(vms[*i].shares)).sum();
        if weight == 0 || left == 0 {
            return got;
        }
        let round = left;
        for i in open {
            let part = (u128::from(round) * u128::from(vms[i].shares) / u128::from(weight)) as u64;
            let given = part.max(1).min(want[i] - got[i]).min(left);
            got[i] += given;
            left -= given;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Resources, VmId};

    fn vm(demand: u64, reservation: u64, limit: Option<u64>, shares: u32) -> VmLoad {
        let cpu = |cpu: u64| Resources { cpu, memory: 0 };
        VmLoad {
            id: VmId(1),
            host: None,
            demand: cpu(demand),
            reservation: cpu(reservation),
            limit: limit.map(|l| Resources { cpu: l, memory: u64::MAX }),
            shares,
            size: 0,
        }
    }

    #[test]
    fn shares_divide_what_reservations_leave_and_limits_cap() {
        let vms = [vm(1000, 0, None, 3000), vm(1000, 0, None, 1000)];
        assert_eq!(entitlements(400, &vms), [300, 100]);
        let vms = [vm(1000, 600, None, 1), vm(1000, 0, None, 1000)];
        let got = entitlements(1000, &vms);
        assert!(got[0] >= 600 && got.iter().sum::<u64>() == 1000);
        let vms = [vm(1000, 0, Some(100), 1000), vm(1000, 0, None, 1000)];
        assert_eq!(entitlements(1000, &vms), [100, 900]);
        assert_eq!(entitlements(500, &[vm(1000, 1000, None, 1), vm(1000, 1000, None, 1)]), [250, 250]);
        assert_eq!(entitlements(5000, &[vm(700, 0, None, 1)]), [700]);
        let all = vm(u64::MAX, u64::MAX, None, 1);
        assert_eq!(entitlements(1000, &[all.clone(), all]), [500, 500]);
    }
}
