//! Time as the guest sees it: the time-stamp counter, the KVM clock, HLT until a deadline.

use std::sync::Arc;

use iced_x86::code_asm::*;
use softcpu::{Budget, Clock, CpuConfig, Exit};

use super::rig::*;

/// Writes EDX:EAX to a model-specific register.
fn write_msr(a: &mut CodeAssembler, msr: u32, value: u64) {
    a.mov(ecx, msr).unwrap();
    a.mov(eax, value as u32).unwrap();
    a.mov(edx, (value >> 32) as u32).unwrap();
    a.wrmsr().unwrap();
}

#[test]
fn the_counter_can_be_written_and_hidden() {
    let mut rig = Rig::with_clock(Arc::new(Clock::deterministic(1_000_000)), Some(1));
    let end = rig.execute(&Rig::long_mode(), |a| {
        write_msr(a, 0xc000_0103, 0x55);
        write_msr(a, 0x10, 0x7_0000_0000);
        a.rdtscp().unwrap();
        a.mov(esi, eax).unwrap();
        a.mov(edi, edx).unwrap();
        a.mov(ebp, ecx).unwrap();
        a.rdtsc().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((end.gpr[7], end.gpr[2], end.gpr[5]), (7, 7, 0x55));
    // One tick for each of the instructions between.
    assert_eq!(end.gpr[0] - end.gpr[6], 4);
    // CR4.TSD keeps programs from it, but not the kernel.
    let mut s = Rig::user_mode();
    s.cr4 |= 4;
    assert_eq!(rig.fault(&s, |a| a.rdtsc().unwrap()), Some((13, Some(0), 0)));
    assert_eq!(rig.fault(&s, |a| a.rdtscp().unwrap()), Some((13, Some(0), 0)));
    let mut s = Rig::long_mode();
    s.cr4 |= 4;
    rig.execute(&s, |a| {
        a.rdtsc().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(rig.frame(), None);
}

/// RDRAND and RDSEED follow the seed, set CF and clear the other flags.
#[test]
fn random_numbers_follow_the_seed() {
    let draw = |seed| {
        let mut rig = Rig::with_clock(Arc::new(Clock::deterministic(1_000_000)), seed);
        let mut s = Rig::long_mode();
        s.rflags |= 0x8d4;
        let end = rig.execute(&s, |a| {
            a.rdrand(rax).unwrap();
            a.rdseed(rbx).unwrap();
            a.rdrand(cx).unwrap();
            a.hlt().unwrap();
        });
        assert_eq!(end.rflags & 0x8d5, 1);
        (end.gpr[0], end.gpr[3], end.gpr[1])
    };
    assert_eq!(draw(Some(5)), draw(Some(5)));
    assert_ne!(draw(Some(5)), draw(Some(6)));
    // The host's numbers do not repeat.
    assert_ne!(draw(None), draw(None));
    let (first, second, third) = draw(Some(5));
    assert!(first != second && third < 0x1_0000);
}

/// `pvclock_vcpu_time_info` leads from the time-stamp counter to nanoseconds since the machine was made.
#[test]
fn the_kvm_clock_tells_the_machines_time() {
    for khz in [1_000_000, 2_400_000, 25_000] {
        let clock = Arc::new(Clock::deterministic(khz));
        let mut rig = Rig::with_clock(clock.clone(), Some(1));
        rig.execute(&Rig::long_mode(), |a| {
            write_msr(a, 0x10, 1 << 40);
            write_msr(a, 0x4b56_4d01, WINDOW_RAM | 1);
            write_msr(a, 0x4b56_4d00, WINDOW_RAM + 0x40);
            a.hlt().unwrap();
        });
        let word = |at: u64| rig.get(WINDOW_RAM + at);
        assert_eq!(word(0) as u32 & 1, 0, "a version under change is odd");
        let (base, system, multiplier) = (word(8), word(16), word(24) & 0xffff_ffff);
        let (shift, flags) = ((word(24) >> 32) as u8 as i8, word(24) >> 40 & 0xff);
        assert_eq!(flags & 1, 1, "stable across processors");
        // A second later.
        let ticks = u64::from(khz) * 1000;
        let scaled = if shift < 0 { ticks >> -shift } else { ticks << shift };
        let passed = ((u128::from(scaled) * u128::from(multiplier)) >> 32) as u64;
        assert!(passed.abs_diff(1_000_000_000) < 1000, "{khz} kHz: {passed}");
        // The counter was set in between: the clock has not noticed.
        assert!(base >= 1 << 40 && system < 1_000_000, "{base:#x} {system}");
        assert!(system <= clock.now_ns());
        let seconds = word(0x44) as u32;
        assert!(seconds > 1_600_000_000, "the wall clock says {seconds}");
        assert!(word(0x48) as u32 <= 999_999_999);
    }
    // CPUID tells of it, unless it is switched off.
    for (leaves, signature) in [(true, u64::from(u32::from_le_bytes(*b"KVMK"))), (false, 0)] {
        let config = CpuConfig { kvm_leaves: leaves, ..CpuConfig::new(Arc::new(Clock::host(1_000_000))) };
        let mut rig = Rig::with_config(config);
        let cpuid = |a: &mut CodeAssembler| {
            a.mov(eax, 0x4000_0000).unwrap();
            a.cpuid().unwrap();
            a.hlt().unwrap();
        };
        assert_eq!(rig.execute(&Rig::long_mode(), cpuid).gpr[3], signature);
        let set = |a: &mut CodeAssembler| {
            write_msr(a, 0x4b56_4d01, WINDOW_RAM | 1);
            a.hlt().unwrap();
        };
        rig.execute(&Rig::long_mode(), set);
        assert_eq!(rig.frame().map(|f| f.vector), if leaves { None } else { Some(13) });
        // No hypercall is announced; KVM's interface answers, and without it there is none.
        let call = |a: &mut CodeAssembler| {
            a.mov(eax, 5).unwrap();
            a.vmmcall().unwrap();
            a.hlt().unwrap();
        };
        let end = rig.execute(&Rig::long_mode(), call);
        match rig.frame() {
            None => assert_eq!((leaves, end.gpr[0] as i64), (true, -1000)),
            Some(frame) => assert_eq!((leaves, frame.vector), (false, 6)),
        }
    }
}

/// A guest that goes on in another machine, whose counter has another frequency, finds its KVM clock going on.
#[test]
fn the_kvm_clock_goes_on_in_another_machine() {
    const BEFORE: u64 = 5_000_000_000_000;
    let registered = {
        let mut rig = Rig::with_clock(Arc::new(Clock::deterministic(2_400_000)), Some(1));
        rig.execute(&Rig::long_mode(), |a| {
            write_msr(a, 0x4b56_4d01, WINDOW_RAM | 1);
            a.hlt().unwrap();
        })
    };
    let clock = Arc::new(Clock::deterministic(1_000_000));
    let mut rig = Rig::with_clock(clock.clone(), Some(1));
    clock.set_system_time(BEFORE);
    let mut state = registered;
    (state.rip, state.mp_state) = (CODE, softcpu::MpState::Running);
    let end = rig.execute(&state, |a| {
        a.rdtsc().unwrap();
        a.hlt().unwrap();
    });
    let (base, system) = (rig.get(WINDOW_RAM + 8), rig.get(WINDOW_RAM + 16));
    assert!((BEFORE..BEFORE + 1000).contains(&system) && clock.system_time() >= system, "{system}");
    assert!(base <= end.gpr[0] && end.gpr[0] - base < 100, "{base} {}", end.gpr[0]);
    // A tick is a nanosecond here.
    assert_eq!((rig.get(WINDOW_RAM + 24) & 0xffff_ffff, rig.get(WINDOW_RAM + 28) as u8), (1 << 31, 1));
}

/// In deterministic mode HLT takes no time of the host, and exactly as much of the guest's as the deadline says.
#[test]
fn a_halted_processor_skips_to_its_deadline() {
    let mut rig = Rig::with_clock(Arc::new(Clock::deterministic(1_000_000)), Some(1));
    const FAR: u64 = 3_600_000_000_000;
    let handler = assemble(HANDLERS + 0x400, |a| {
        a.rdtsc().unwrap();
        a.cli().unwrap();
        a.hlt().unwrap();
    });
    rig.memory.write(HANDLERS + 0x400, &handler).unwrap();
    rig.execute(&Rig::long_mode(), |a| {
        write_msr(a, 0x6e0, FAR);
        a.sti().unwrap();
        a.hlt().unwrap();
    });
    let end = rig.cpu.state();
    let now = end.gpr[2] << 32 | end.gpr[0];
    assert!((FAR..FAR + 10).contains(&now), "{now}");
    assert!(rig.cpu.executed() < 100);
}

/// A processor that waits in HLT uses no time of the host.
#[test]
fn a_halted_processor_sleeps() {
    let mut rig = Rig::new();
    rig.code(|a| {
        a.sti().unwrap();
        a.hlt().unwrap();
    });
    rig.cpu.set_state(&Rig::long_mode());
    let handle = rig.cpu.handle();
    let cpu = &mut rig.cpu;
    let (start, stop) = (std::sync::Barrier::new(2), std::time::Duration::from_millis(300));
    let used = std::thread::scope(|scope| {
        let running = scope.spawn(|| {
            start.wait();
            let before = thread_time();
            assert_eq!(cpu.run(Budget::UNLIMITED), Exit::Kicked);
            thread_time() - before
        });
        start.wait();
        std::thread::sleep(stop);
        handle.kick();
        running.join().unwrap()
    });
    assert!(used < stop / 4, "{used:?} of processor time in {stop:?} of sleep");
}

/// Processor time of the calling thread.
fn thread_time() -> std::time::Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a live variable of the type that the call fills.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) }, 0);
    std::time::Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
