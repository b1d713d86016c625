//! Saving and loading a local APIC.

use std::sync::atomic::Ordering;

use super::*;
use crate::accel::{AccelError, ApicState, PendingEvent};

const REGISTERS: u32 = 64;

fn invalid(what: &str) -> AccelError {
    AccelError::InvalidState(what.into())
}

impl LocalApic {
    /// The state at time `tsc`.
    pub(in crate::accel::soft) fn save(&self, tsc: u64) -> ApicState {
        let register = |n| match n {
            // As in the xAPIC page, in x2APIC mode too.
            ID => self.shared.id << 24,
            n => self.read(n, tsc),
        };
        ApicState {
            base: self.shared.base.load(Ordering::SeqCst),
            registers: (0..REGISTERS).map(register).collect(),
            tsc_deadline: match self.timer_mode() {
                TimerMode::TscDeadline => self.deadline.unwrap_or(0),
                _ => 0,
            },
        }
    }

    /// Loads what [`Self::save`] returned. An interrupt that was taken and not delivered waits again.
    pub(in crate::accel::soft) fn load(
        &mut self,
        state: &ApicState,
        pending: Option<PendingEvent>,
        tsc: u64,
    ) -> Result<(), AccelError> {
        let registers: &[u32; REGISTERS as usize] =
            state.registers.as_slice().try_into().map_err(|_| invalid("a local APIC has 64 registers"))?;
        let get = |n: u32| registers[n as usize];
        let bits = |n: u32| &registers[n as usize..n as usize + 8];
        let mode = state.base & (BASE_ENABLE | BASE_X2APIC);
        if mode == BASE_X2APIC || state.base & !(mode | BASE_BSP | BASE_PAGE) != 0 {
            return Err(invalid("the base of the local APIC"));
        }
        let taken = match pending {
            Some(PendingEvent::Interrupt { vector }) => {
                if bits(ISR)[usize::from(vector / 32)] & 1 << (vector % 32) == 0 {
                    return Err(invalid("an interrupt under delivery that the APIC does not serve"));
                }
                Some(vector)
            }
            // The instruction that caused it is executed again.
            _ => None,
        };
        let shared = &self.shared;
        shared.base.store(state.base, Ordering::SeqCst);
        shared.svr.store(get(SVR) & 0x1ff, Ordering::SeqCst);
        shared.ldr.store(get(LDR) & 0xff00_0000, Ordering::SeqCst);
        shared.dfr.store(get(DFR) | 0x0fff_ffff, Ordering::SeqCst);
        shared.tmr.load(bits(TMR));
        shared.irr.load(bits(IRR));
        self.isr.load(bits(ISR));
        if let Some(vector) = taken {
            self.isr.clear(vector);
            shared.irr.set(vector);
        }
        self.tpr = get(TPR) as u8;
        self.esr = get(ESR);
        self.icr = u64::from(get(ICR_HIGH)) << 32 | u64::from(get(ICR_LOW));
        for (index, entry) in self.lvt.iter_mut().enumerate() {
            *entry = get(LVT_TIMER + index as u32) & LVT_WRITABLE[index];
        }
        self.divide = get(TIMER_DIVIDE) & 0xb;
        self.initial = get(TIMER_INITIAL);
        self.started = tsc;
        self.deadline = match self.timer_mode() {
            TimerMode::TscDeadline => (state.tsc_deadline != 0).then_some(state.tsc_deadline),
            TimerMode::Reserved => None,
            _ => {
                let left = u64::from(get(TIMER_CURRENT).min(self.initial));
                (left != 0).then(|| tsc.saturating_add(self.clock.ns_to_tsc(left * self.count_ns())))
            }
        };
        Ok(())
    }
}
