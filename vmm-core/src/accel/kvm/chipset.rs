//! The in-kernel interrupt controllers, timer and clock between KVM's structures and ours.

use std::time::Duration;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_ioapic_state,
    kvm_irqchip, kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use super::failed;
use crate::accel::{AccelError, ChipsetState, IOAPIC_PINS, IoApicState, PicState, PitCounterState, PitState};

/// Where the IO-APIC answers.
const IOAPIC_ADDRESS: u64 = 0xfec0_0000;
/// Flags of `kvm_pit_state2`: the PIT's interrupt is replaced by the HPET's; the speaker data bit.
const PIT_SPEAKER: u32 = 1 << 1;
/// ELCR bits that exist in the first and the second PIC.
const ELCR_MASKS: [u8; 2] = [0xf8, 0xde];

/// Reads the chipset.
pub fn read(vm: &VmFd, with_pit: bool) -> Result<ChipsetState, AccelError> {
    let pics = [pic_from_kvm(&read_pic(vm, 0)?), pic_from_kvm(&read_pic(vm, 1)?)];
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(failed("KVM_GET_IRQCHIP"))?;
    // SAFETY: the kernel filled the variant of the chip that was asked for.
    let ioapic = unsafe { chip.chip.ioapic };
    let ioapic = IoApicState {
        select: ioapic.ioregsel as u8,
        id: (ioapic.id & 15) as u8,
        levels: ioapic.irr,
        // SAFETY: both variants of an entry are plain 64-bit words.
        redirection: ioapic.redirtbl.iter().map(|e| unsafe { e.bits }).collect(),
    };
    let pit = if with_pit {
        let pit = vm.get_pit2().map_err(failed("KVM_GET_PIT2"))?;
        let now = monotonic();
        let counters = pit.channels.each_ref().map(|c| counter_from_kvm(c, now));
        Some(PitState { counters, speaker: pit.flags & PIT_SPEAKER != 0 })
    } else {
        None
    };
    let clock = vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?.clock;
    Ok(ChipsetState { pics, ioapic, pit, clock })
}

/// Loads the chipset.
pub fn write(vm: &VmFd, state: &ChipsetState, with_pit: bool) -> Result<(), AccelError> {
    if state.ioapic.redirection.len() != IOAPIC_PINS as usize {
        return Err(AccelError::InvalidState(format!("an IO-APIC has {IOAPIC_PINS} inputs")));
    }
    write_pics(vm, &state.pics)?;
    let mut ioapic = kvm_ioapic_state {
        base_address: IOAPIC_ADDRESS,
        ioregsel: state.ioapic.select.into(),
        id: (state.ioapic.id & 15).into(),
        irr: state.ioapic.levels,
        ..Default::default()
    };
    for (to, from) in ioapic.redirtbl.iter_mut().zip(&state.ioapic.redirection) {
        to.bits = *from;
    }
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    chip.chip.ioapic = ioapic;
    vm.set_irqchip(&chip).map_err(failed("KVM_SET_IRQCHIP"))?;
    match &state.pit {
        Some(pit) if with_pit => {
            let now = monotonic();
            let channels = pit.counters.each_ref().map(|c| counter_to_kvm(c, now));
            let flags = if pit.speaker { PIT_SPEAKER } else { 0 };
            let pit = kvm_pit_state2 { channels, flags, ..Default::default() };
            vm.set_pit2(&pit).map_err(failed("KVM_SET_PIT2"))?;
        }
        None => {}
        Some(_) => return Err(AccelError::InvalidState("the machine has no interval timer".into())),
    }
    let clock = kvm_clock_data { clock: state.clock, ..Default::default() };
    vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
}

/// Loads the interrupt controllers for I/O ports; a new VM has them with every input unmasked.
pub fn write_pics(vm: &VmFd, pics: &[PicState; 2]) -> Result<(), AccelError> {
    for (n, pic) in pics.iter().enumerate() {
        let mut chip = kvm_irqchip { chip_id: pic_id(n), ..Default::default() };
        chip.chip.pic = pic_to_kvm(pic, ELCR_MASKS[n]);
        vm.set_irqchip(&chip).map_err(failed("KVM_SET_IRQCHIP"))?;
    }
    Ok(())
}

fn pic_id(n: usize) -> u32 {
    if n == 0 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE }
}

fn read_pic(vm: &VmFd, n: usize) -> Result<kvm_pic_state, AccelError> {
    let mut chip = kvm_irqchip { chip_id: pic_id(n), ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(failed("KVM_GET_IRQCHIP"))?;
    // SAFETY: the kernel filled the variant of the chip that was asked for.
    Ok(unsafe { chip.chip.pic })
}

fn pic_from_kvm(pic: &kvm_pic_state) -> PicState {
    PicState {
        irr: pic.irr,
        isr: pic.isr,
        imr: pic.imr,
        lines: pic.last_irr,
        level: pic.elcr,
        base: pic.irq_base,
        init_step: pic.init_state,
        needs_word4: pic.init4 != 0,
        auto_eoi: pic.auto_eoi != 0,
        read_isr: pic.read_reg_select != 0,
        poll: pic.poll != 0,
        special_mask: pic.special_mask != 0,
        special_fully_nested: pic.special_fully_nested_mode != 0,
        highest: pic.priority_add & 7,
        rotate_on_auto_eoi: pic.rotate_on_auto_eoi != 0,
    }
}

fn pic_to_kvm(pic: &PicState, elcr_mask: u8) -> kvm_pic_state {
    kvm_pic_state {
        last_irr: pic.lines,
        irr: pic.irr,
        imr: pic.imr,
        isr: pic.isr,
        priority_add: pic.highest & 7,
        irq_base: pic.base,
        read_reg_select: pic.read_isr.into(),
        poll: pic.poll.into(),
        special_mask: pic.special_mask.into(),
        init_state: pic.init_step.min(3),
        auto_eoi: pic.auto_eoi.into(),
        rotate_on_auto_eoi: pic.rotate_on_auto_eoi.into(),
        special_fully_nested_mode: pic.special_fully_nested.into(),
        init4: pic.needs_word4.into(),
        elcr: pic.level & elcr_mask,
        elcr_mask,
    }
}

/// The host's monotonic clock, on which KVM notes when a counter was loaded.
fn monotonic() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` lives across the call, and this clock is always there.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn counter_from_kvm(channel: &kvm_pit_channel_state, now: Duration) -> PitCounterState {
    let loaded = Duration::from_nanos(channel.count_load_time.max(0) as u64);
    PitCounterState {
        count: channel.count,
        latched_count: (channel.count_latched != 0).then_some(channel.latched_count),
        latch_step: channel.count_latched,
        latched_status: (channel.status_latched != 0).then_some(channel.status),
        read_step: channel.read_state,
        write_step: channel.write_state,
        write_low: channel.write_latch,
        access: channel.rw_mode,
        mode: channel.mode,
        bcd: channel.bcd != 0,
        gate: channel.gate != 0,
        age: u64::try_from(now.saturating_sub(loaded).as_nanos()).unwrap_or(u64::MAX),
    }
}

fn counter_to_kvm(counter: &PitCounterState, now: Duration) -> kvm_pit_channel_state {
    let loaded = now.saturating_sub(Duration::from_nanos(counter.age));
    kvm_pit_channel_state {
        count: counter.count.min(0x1_0000),
        latched_count: counter.latched_count.unwrap_or(0),
        count_latched: if counter.latched_count.is_some() { counter.latch_step } else { 0 },
        status_latched: counter.latched_status.is_some().into(),
        status: counter.latched_status.unwrap_or(0),
        read_state: counter.read_step,
        write_state: counter.write_step,
        write_latch: counter.write_low,
        rw_mode: counter.access,
        mode: counter.mode,
        bcd: counter.bcd.into(),
        gate: counter.gate.into(),
        count_load_time: i64::try_from(loaded.as_nanos()).unwrap_or(i64::MAX),
    }
}
