//! One suite that every accelerator passes: tiny guests, assembled here, exercise each promise of the traits in
//! `vmm_core::accel`.
//!
//! A host whose accelerator is known to be incomplete says so in [`harness::Target::holes`]: the case then demands
//! the documented failure instead of the promise, so that nothing is skipped without notice.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod harness;

mod assist;
mod debug;
mod interrupts;
mod io;
mod memory;
mod running;
mod smp;
mod state;
mod system;

/// Makes tests of cases, each with the accelerator that `$target` opens.
macro_rules! tests {
    ($target:expr; $($group:ident: $($case:ident)*;)*) => {
        $($(
            #[test]
            fn $case() {
                if let Some(target) = $target {
                    crate::$group::$case(&target);
                }
            }
        )*)*
    };
}

/// All cases with one accelerator.
macro_rules! conformance {
    ($target:expr) => {
        tests! {
            $target;
            io: port_accesses_of_each_size mmio_accesses_of_each_size string_port_io doorbells_replace_the_bus
                doorbells_can_be_removed accesses_nobody_answers queued_writes_keep_their_order
                more_writes_than_a_queue_holds;
            interrupts: a_line_wakes_a_halted_cpu messages_arrive_unless_masked event_descriptors_send_messages
                an_nmi_interrupts_a_loop the_apic_timer_fires a_bad_message_is_an_error_or_dropped
                lines_are_bounded;
            smp: init_and_sipi_start_another_cpu cpu_ids_are_checked;
            memory: regions_and_the_hole_between_them dirty_pages_are_reported_once dirty_tracking_must_be_on
                more_dirty_pages_than_a_ring_holds dirty_pages_of_several_cpus linear_addresses_translate;
            running: kicks_stop_a_running_cpu kicks_wake_a_halted_cpu a_kick_before_the_run_counts
                a_triple_fault_ends_the_run port_exits_complete_before_a_kick;
            state: registers_survive_the_round_trip registers_of_a_boot_protocol_are_all_that_changes
                sse_state_survives_the_round_trip a_guest_moves_to_another_machine bad_state_is_refused the_chipset_survives_the_round_trip;
            debug: single_steps software_breakpoints hardware_breakpoints debugging_can_be_switched_off;
        }
    };
}

mod kvm {
    conformance!(crate::harness::kvm());
}

/// Either way in which KVM reports dirty pages, whatever this host's default is.
macro_rules! dirty_pages {
    ($target:expr) => {
        tests! {
            $target;
            memory: dirty_pages_are_reported_once dirty_tracking_must_be_on more_dirty_pages_than_a_ring_holds
                dirty_pages_of_several_cpus;
        }
    };
}

mod kvm_dirty_log {
    dirty_pages!(crate::harness::kvm_dirty_log());
}

mod kvm_dirty_ring {
    dirty_pages!(crate::harness::kvm_dirty_ring());
}

mod kvm_assisted {
    conformance!(crate::harness::kvm_assisted());
    tests! {
        crate::harness::kvm_assisted();
        assist: what_kvm_cannot_emulate_is_executed time_goes_on assisted_writes_are_dirty
            what_neither_knows_is_a_fault;
    }
}

mod soft {
    conformance!(Some(crate::harness::soft()));
    // What is not asked of every accelerator: a KVM that is software fails at much of the kernel code in here.
    tests! {
        Some(crate::harness::soft());
        system: ipis_reach_whom_they_address an_nmi_by_ipi tsc_deadlines_fire_in_x2apic_mode
            a_tlb_shoot_down_by_ipi eight_cpus_count_together two_hundred_and_fifty_five_cpus
            a_halted_machine_uses_no_time a_state_with_all_of_efer;
    }
}
