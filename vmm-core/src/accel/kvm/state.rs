//! CPU state between KVM's structures and ours.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_debugregs,
    kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcr,
    kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use softcpu::{DescriptorTable, MpState, Msrs, Segment, SegmentAttributes};

use super::msr::{self, index};
use super::{failed, xsave};
use crate::accel::{AccelError, ApicState, CpuState, ExtraState, PendingEvent};

/// MSRs of [`CpuState`], in the order of [`msr_fields`].
const CPU_MSRS: [u32; 15] = [
    index::TSC,
    index::STAR,
    index::LSTAR,
    index::CSTAR,
    index::SFMASK,
    index::KERNEL_GS_BASE,
    index::TSC_AUX,
    index::SYSENTER_CS,
    index::SYSENTER_ESP,
    index::SYSENTER_EIP,
    index::PAT,
    index::MISC_ENABLE,
    index::SPEC_CTRL,
    index::KVM_WALL_CLOCK,
    index::KVM_SYSTEM_TIME,
];

/// The fields for [`CPU_MSRS`].
fn msr_fields<'a>(tsc: &'a mut u64, msrs: &'a mut Msrs) -> [&'a mut u64; CPU_MSRS.len()] {
    [
        tsc,
        &mut msrs.star,
        &mut msrs.lstar,
        &mut msrs.cstar,
        &mut msrs.sfmask,
        &mut msrs.kernel_gs_base,
        &mut msrs.tsc_aux,
        &mut msrs.sysenter_cs,
        &mut msrs.sysenter_esp,
        &mut msrs.sysenter_eip,
        &mut msrs.pat,
        &mut msrs.misc_enable,
        &mut msrs.spec_ctrl,
        &mut msrs.kvm_wall_clock,
        &mut msrs.kvm_system_time,
    ]
}

fn os(operation: &'static str) -> impl FnOnce(std::io::Error) -> AccelError {
    move |source| AccelError::Os { operation, source }
}

fn segment_from_kvm(s: &kvm_segment) -> Segment {
    let bit = |value: u8, shift: u32| u16::from(value & 1) << shift;
    let present = s.present & u8::from(s.unusable == 0);
    let attributes = u16::from(s.type_ & 15)
        | bit(s.s, 4)
        | u16::from(s.dpl & 3) << 5
        | bit(present, 7)
        | bit(s.avl, 12)
        | bit(s.l, 13)
        | bit(s.db, 14)
        | bit(s.g, 15);
    Segment { selector: s.selector, attributes: SegmentAttributes(attributes), limit: s.limit, base: s.base }
}

fn segment_to_kvm(s: &Segment) -> kvm_segment {
    let a = s.attributes;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: a.kind(),
        present: a.present().into(),
        dpl: a.dpl(),
        db: a.big().into(),
        s: a.is_code_or_data().into(),
        l: a.long().into(),
        g: a.granular().into(),
        avl: (a.0 >> 12 & 1) as u8,
        unusable: (!a.present()).into(),
        ..Default::default()
    }
}

fn table_from_kvm(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: t.base, limit: t.limit }
}

fn table_to_kvm(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, ..Default::default() }
}

/// Reads the state of a vCPU that is not running.
pub fn read(vcpu: &VcpuFd) -> Result<CpuState, AccelError> {
    let regs = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let debug = vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?;
    let events = vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    let mp_state = vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
    let mut state = CpuState::reset();
    state.gpr = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    state.rip = regs.rip;
    state.rflags = regs.rflags;
    let segments = [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs];
    state.segments = segments.map(segment_from_kvm);
    state.ldtr = segment_from_kvm(&sregs.ldt);
    state.tr = segment_from_kvm(&sregs.tr);
    state.gdtr = table_from_kvm(&sregs.gdt);
    state.idtr = table_from_kvm(&sregs.idt);
    (state.cr0, state.cr2, state.cr3, state.cr4) = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4);
    state.xcr0 = read_xcr0(vcpu)?;
    state.dr = [debug.db[0], debug.db[1], debug.db[2], debug.db[3], 0, 0, debug.dr6, debug.dr7];
    for (number, value) in msr::read(vcpu, &CPU_MSRS).map_err(os("KVM_GET_MSRS"))? {
        if let Some(n) = CPU_MSRS.iter().position(|&m| m == number) {
            *msr_fields(&mut state.tsc, &mut state.msrs)[n] = value;
        }
    }
    state.msrs.efer = sregs.efer;
    state.fpu = xsave::fpu(&*read_xsave(vcpu)?);
    state.mp_state = match mp_state.mp_state {
        KVM_MP_STATE_HALTED => MpState::Halted,
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => MpState::WaitForSipi,
        // After SIPI the vCPU starts with its next run.
        KVM_MP_STATE_RUNNABLE | KVM_MP_STATE_SIPI_RECEIVED => MpState::Running,
        other => return Err(AccelError::InvalidState(format!("KVM's multiprocessing state {other}"))),
    };
    state.interrupt_shadow = events.interrupt.shadow != 0;
    state.nmi_blocked = events.nmi.masked != 0;
    state.nmi_pending = events.nmi.pending != 0 || events.nmi.injected != 0;
    Ok(state)
}

fn read_xcr0(vcpu: &VcpuFd) -> Result<u64, AccelError> {
    // A guest without XSAVE has no XCR0, and KVM says so with no registers.
    let xcrs = vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?;
    let count = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
    Ok(xcrs.xcrs[..count].iter().find(|x| x.xcr == 0).map_or(1, |x| x.value))
}

/// Loads the state into a vCPU that is not running; drops an event under delivery.
pub fn write(vcpu: &VcpuFd, state: &CpuState) -> Result<(), AccelError> {
    write_all(vcpu, state, &[])?;
    let mut events = vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    events.exception = Default::default();
    events.exception_has_payload = 0;
    events.interrupt = Default::default();
    events.nmi.injected = 0;
    write_events(vcpu, state, events)
}

/// Loads the state that [`read`] returned and one instruction changed: time and events under delivery stay.
pub fn advance(vcpu: &VcpuFd, state: &CpuState) -> Result<(), AccelError> {
    write_all(vcpu, state, &[index::TSC, index::KVM_WALL_CLOCK, index::KVM_SYSTEM_TIME])?;
    let events = vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    write_events(vcpu, state, events)
}

fn write_events(vcpu: &VcpuFd, state: &CpuState, mut events: kvm_vcpu_events) -> Result<(), AccelError> {
    events.interrupt.shadow = state.interrupt_shadow.into();
    events.nmi.pending = state.nmi_pending.into();
    events.nmi.masked = state.nmi_blocked.into();
    events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    vcpu.set_vcpu_events(&events).map_err(failed("KVM_SET_VCPU_EVENTS"))
}

/// Writes the general registers, segments, descriptor tables, CR0 to CR4 and EFER.
pub fn write_registers(vcpu: &VcpuFd, state: &CpuState) -> Result<(), AccelError> {
    let old = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let [es, cs, ss, ds, fs, gs] = state.segments.each_ref().map(segment_to_kvm);
    let sregs = kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: segment_to_kvm(&state.tr),
        ldt: segment_to_kvm(&state.ldtr),
        gdt: table_to_kvm(&state.gdtr),
        idt: table_to_kvm(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        efer: state.msrs.efer,
        // The task priority and the APIC's base belong to the extra state.
        cr8: old.cr8,
        apic_base: old.apic_base,
        interrupt_bitmap: [0; 4],
    };
    vcpu.set_sregs(&sregs)
        .map_err(|e| AccelError::InvalidState(format!("KVM refuses the system registers ({e})")))?;
    let g = &state.gpr;
    let regs = kvm_regs {
        rax: g[0],
        rcx: g[1],
        rdx: g[2],
        rbx: g[3],
        rsp: g[4],
        rbp: g[5],
        rsi: g[6],
        rdi: g[7],
        r8: g[8],
        r9: g[9],
        r10: g[10],
        r11: g[11],
        r12: g[12],
        r13: g[13],
        r14: g[14],
        r15: g[15],
        rip: state.rip,
        rflags: state.rflags,
    };
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
}

/// Writes everything but events, and the MSRs in `kept`.
fn write_all(vcpu: &VcpuFd, state: &CpuState, kept: &[u32]) -> Result<(), AccelError> {
    write_registers(vcpu, state)?;
    if read_xcr0(vcpu)? != state.xcr0 {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: state.xcr0, ..Default::default() };
        vcpu.set_xcrs(&xcrs)
            .map_err(|e| AccelError::InvalidState(format!("KVM refuses XCR0 {:#x} ({e})", state.xcr0)))?;
    }
    let mut area = read_xsave(vcpu)?;
    xsave::set_fpu(&mut area, &state.fpu);
    write_xsave(vcpu, &area)?;
    write_msrs(vcpu, state, kept)?;
    let [db0, db1, db2, db3, _, _, dr6, dr7] = state.dr;
    let debug = kvm_debugregs { db: [db0, db1, db2, db3], dr6, dr7, ..Default::default() };
    vcpu.set_debug_regs(&debug)
        .map_err(|e| AccelError::InvalidState(format!("KVM refuses the debug registers ({e})")))?;
    write_mp_state(vcpu, state.mp_state)
}

fn write_msrs(vcpu: &VcpuFd, state: &CpuState, kept: &[u32]) -> Result<(), AccelError> {
    let (mut tsc, mut msrs) = (state.tsc, state.msrs);
    let fields = msr_fields(&mut tsc, &mut msrs);
    let values = CPU_MSRS.into_iter().zip(fields.map(|f| *f));
    let values: Vec<_> = values.filter(|(number, _)| !kept.contains(number)).collect();
    let refused = msr::write(vcpu, &values).map_err(os("KVM_SET_MSRS"))?;
    // A register that this vCPU does not have is no loss while it holds nothing.
    match refused.iter().find(|(_, value)| *value != 0) {
        Some((number, value)) => {
            Err(AccelError::InvalidState(format!("KVM refuses {value:#x} in MSR {number:#x}")))
        }
        None => Ok(()),
    }
}

fn write_mp_state(vcpu: &VcpuFd, state: MpState) -> Result<(), AccelError> {
    let current = vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?.mp_state;
    let wanted = match state {
        MpState::Running | MpState::Shutdown => KVM_MP_STATE_RUNNABLE,
        MpState::Halted => KVM_MP_STATE_HALTED,
        // Before the first INIT: the vCPU waits just as well.
        MpState::WaitForSipi if current == KVM_MP_STATE_UNINITIALIZED => current,
        MpState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    if wanted != current {
        vcpu.set_mp_state(kvm_mp_state { mp_state: wanted }).map_err(failed("KVM_SET_MP_STATE"))?;
    }
    Ok(())
}

fn read_xsave(vcpu: &VcpuFd) -> Result<Box<xsave::Area>, AccelError> {
    let area = vcpu.get_xsave().map_err(failed("KVM_GET_XSAVE"))?;
    Ok(Box::new(xsave::from_words(&area.region)))
}

fn write_xsave(vcpu: &VcpuFd, area: &xsave::Area) -> Result<(), AccelError> {
    super::sys::set_xsave(vcpu, area)
        .map_err(|e| AccelError::InvalidState(format!("KVM refuses the XSAVE area ({e})")))
}

/// Reads the local APIC, the event under delivery, and the other MSRs.
pub fn read_extra(vcpu: &VcpuFd, more_msrs: &[u32]) -> Result<ExtraState, AccelError> {
    let lapic = vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    let bytes = lapic.regs.map(|b| b as u8);
    let registers = bytes.chunks_exact(16).map(|r| u32::from_le_bytes([r[0], r[1], r[2], r[3]])).collect();
    let named = [index::APIC_BASE, index::TSC_DEADLINE];
    let values = msr::read(vcpu, &named).map_err(os("KVM_GET_MSRS"))?;
    let value = |number| values.iter().find(|v| v.0 == number).map_or(0, |v| v.1);
    let apic = ApicState { base: value(named[0]), registers, tsc_deadline: value(named[1]) };
    let events = vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    let pending = if events.exception.injected != 0 || events.exception.pending != 0 {
        let error_code = (events.exception.has_error_code != 0).then_some(events.exception.error_code);
        Some(PendingEvent::Exception { vector: events.exception.nr, error_code })
    } else if events.interrupt.injected != 0 {
        let vector = events.interrupt.nr;
        Some(match events.interrupt.soft {
            0 => PendingEvent::Interrupt { vector },
            _ => PendingEvent::SoftwareInterrupt { vector },
        })
    } else {
        None
    };
    let msrs = msr::read(vcpu, more_msrs).map_err(os("KVM_GET_MSRS"))?;
    Ok(ExtraState { apic, pending, msrs, xsave: read_xsave(vcpu)?.to_vec() })
}

/// Loads what [`read_extra`] returned.
pub fn write_extra(vcpu: &VcpuFd, state: &ExtraState, known_msrs: &[u32]) -> Result<(), AccelError> {
    if !state.xsave.is_empty() {
        let area = state.xsave.as_slice().try_into().map_err(|_| {
            AccelError::InvalidState(format!("XSAVE area of {} bytes instead of 4096", state.xsave.len()))
        })?;
        write_xsave(vcpu, area)?;
    }
    let mut values = vec![(index::APIC_BASE, state.apic.base)];
    values.extend(state.msrs.iter().filter(|(number, _)| known_msrs.contains(number)));
    let refused = msr::write(vcpu, &values).map_err(os("KVM_SET_MSRS"))?;
    if let Some((number, value)) = refused.first().filter(|(number, _)| *number == index::APIC_BASE) {
        return Err(AccelError::InvalidState(format!("KVM refuses {value:#x} in MSR {number:#x}")));
    }
    for (number, value) in refused {
        // Read-only here, or a value that another host's processor had.
        tracing::debug!("MSR {number:#x} does not take {value:#x}");
    }
    let mut lapic = kvm_lapic_state::default();
    if state.apic.registers.len() != lapic.regs.len() / 16 {
        return Err(AccelError::InvalidState("a local APIC has 64 registers".into()));
    }
    for (slot, register) in lapic.regs.chunks_exact_mut(16).zip(&state.apic.registers) {
        for (to, from) in slot.iter_mut().zip(register.to_le_bytes()) {
            *to = from as _;
        }
    }
    vcpu.set_lapic(&lapic)
        .map_err(|e| AccelError::InvalidState(format!("KVM refuses the local APIC ({e})")))?;
    // The deadline counts only in the APIC's TSC-deadline mode: after its registers.
    msr::write(vcpu, &[(index::TSC_DEADLINE, state.apic.tsc_deadline)]).map_err(os("KVM_SET_MSRS"))?;
    let mut events = vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    match state.pending {
        None => {}
        Some(PendingEvent::Exception { vector, error_code }) => {
            events.exception.injected = 1;
            events.exception.nr = vector;
            events.exception.has_error_code = error_code.is_some().into();
            events.exception.error_code = error_code.unwrap_or(0);
        }
        Some(PendingEvent::Interrupt { vector }) => {
            events.interrupt.injected = 1;
            events.interrupt.nr = vector;
        }
        Some(PendingEvent::SoftwareInterrupt { vector }) => {
            events.interrupt.injected = 1;
            events.interrupt.soft = 1;
            events.interrupt.nr = vector;
        }
    }
    vcpu.set_vcpu_events(&events).map_err(failed("KVM_SET_VCPU_EVENTS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive_the_round_trip() {
        let code = Segment {
            selector: 0x10,
            attributes: SegmentAttributes(0xa09b),
            limit: 0xffff_ffff,
            base: 0x1234_5678_9abc,
        };
        assert_eq!(segment_from_kvm(&segment_to_kvm(&code)), code);
        let kvm = segment_to_kvm(&code);
        assert_eq!((kvm.type_, kvm.s, kvm.dpl, kvm.present, kvm.l, kvm.db, kvm.g), (0xb, 1, 0, 1, 1, 0, 1));
        let null = segment_to_kvm(&Segment::default());
        assert_eq!((null.present, null.unusable), (0, 1));
        let unusable = kvm_segment { present: 1, unusable: 1, ..Default::default() };
        assert!(!segment_from_kvm(&unusable).attributes.present());
    }
}
