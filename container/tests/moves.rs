//! Real containers, moved for real: runc, CRIU, Redis, keepers in processes of their own, one
//! network and one mount namespace for the whole run, which takes all of it away at its end.
//!
//! Run as `keeper --config FILE` this executable is the keeper that `decamp keeper` will be.

#[path = "cases/adoption.rs"]
mod adoption;
#[path = "cases/archives.rs"]
mod archives;
#[path = "cases/ends.rs"]
mod ends;
#[path = "cases/failing.rs"]
mod failing;
#[path = "cases/filters.rs"]
mod filters;
#[path = "cases/forked.rs"]
mod forked;
#[path = "cases/going.rs"]
mod going;
#[path = "cases/harmless.rs"]
mod harmless;
#[path = "cases/huge.rs"]
mod huge;
#[path = "cases/mapped.rs"]
mod mapped;
#[path = "cases/memory.rs"]
mod memory;
#[path = "cases/obstacles.rs"]
mod obstacles;
#[path = "cases/podman.rs"]
mod podman;
#[path = "cases/podman_files.rs"]
mod podman_files;
#[path = "cases/restless.rs"]
mod restless;
#[path = "cases/rollback.rs"]
mod rollback;
#[path = "cases/runtimes.rs"]
mod runtimes;
#[path = "cases/segments.rs"]
mod segments;
mod support;
#[path = "cases/volumes.rs"]
mod volumes;
#[path = "cases/ways.rs"]
mod ways;

use support::{Case, main_with};

fn main() {
    let cases = [
        Case { name: "crun_is_in_charge_elsewhere", run: runtimes::crun_is_in_charge_elsewhere },
        Case { name: "crun_deletes_what_came", run: runtimes::crun_deletes_what_came },
        Case { name: "runtimes_that_do_not_do", run: runtimes::runtimes_that_do_not_do },
        Case { name: "cgroup_namespace_goes_along", run: runtimes::cgroup_namespace_goes_along },
        Case {
            name: "terminal_goes_along_under_runc",
            run: runtimes::terminal_goes_along_under_runc,
        },
        Case {
            name: "terminal_goes_along_under_crun",
            run: runtimes::terminal_goes_along_under_crun,
        },
        Case { name: "adopted_from_runc_moves", run: adoption::adopted_from_runc_moves },
        Case { name: "adopted_from_crun_moves", run: adoption::adopted_from_crun_moves },
        Case {
            name: "adopted_redis_keeps_its_connection",
            run: adoption::adopted_redis_keeps_its_connection,
        },
        Case { name: "given_back_it_runs_on", run: adoption::given_back_it_runs_on },
        Case { name: "held_it_does_not_run_again", run: adoption::held_it_does_not_run_again },
        Case {
            name: "a_cgroup_below_its_own_keeps_it_here",
            run: adoption::a_cgroup_below_its_own_keeps_it_here,
        },
        Case {
            name: "the_end_of_an_adopted_one_is_told",
            run: adoption::the_end_of_an_adopted_one_is_told,
        },
        Case { name: "adopted_terminal_goes_along", run: adoption::adopted_terminal_goes_along },
        Case { name: "podman_is_in_charge_elsewhere", run: podman::podman_is_in_charge_elsewhere },
        Case {
            name: "podman_with_crun_is_in_charge_elsewhere",
            run: podman::podman_with_crun_is_in_charge_elsewhere,
        },
        Case {
            name: "podman_redis_keeps_its_connection",
            run: podman::podman_redis_keeps_its_connection,
        },
        Case {
            name: "podman_does_not_start_what_was_held",
            run: podman::podman_does_not_start_what_was_held,
        },
        Case {
            name: "podman_shared_memory_moves_live",
            run: podman::podman_shared_memory_moves_live,
        },
        Case {
            name: "podman_that_gave_up_is_asked_for_nothing",
            run: podman::podman_that_gave_up_is_asked_for_nothing,
        },
        Case {
            name: "podman_forgets_what_was_not_noted",
            run: podman::podman_forgets_what_was_not_noted,
        },
        Case {
            name: "podman_says_what_does_not_go_along",
            run: podman::podman_says_what_does_not_go_along,
        },
        Case { name: "podman_volumes_go_along", run: podman_files::podman_volumes_go_along },
        Case { name: "podman_terminal_goes_along", run: podman_files::podman_terminal_goes_along },
        Case {
            name: "podman_init_and_secrets_go_along",
            run: podman_files::podman_init_and_secrets_go_along,
        },
        Case { name: "podman_names_its_user_anew", run: podman_files::podman_names_its_user_anew },
        Case { name: "podman_has_it_back", run: podman::podman_has_it_back },
        Case {
            name: "podman_that_forgets_nothing_is_asked_again",
            run: podman::podman_that_forgets_nothing_is_asked_again,
        },
        Case {
            name: "podman_forgets_what_did_not_come",
            run: podman::podman_forgets_what_did_not_come,
        },
        Case { name: "adopted_input_goes_along", run: adoption::adopted_input_goes_along },
        Case { name: "podman_restores_our_file", run: archives::podman_restores_our_file },
        Case { name: "podmans_file_is_restored", run: archives::podmans_file_is_restored },
        Case {
            name: "an_image_that_stayed_mounted_goes",
            run: archives::an_image_that_stayed_mounted_goes,
        },
        Case { name: "what_cannot_be_adopted", run: adoption::what_cannot_be_adopted },
        Case { name: "shared_memory_moves_live", run: segments::shared_memory_moves_live },
        Case {
            name: "shared_memory_survives_a_stop",
            run: segments::shared_memory_survives_a_stop,
        },
        Case {
            name: "withheld_shared_page_is_noticed",
            run: segments::withheld_shared_page_is_noticed,
        },
        Case { name: "volumes_go_along", run: volumes::volumes_go_along },
        Case { name: "parts_of_a_volume_go_along", run: volumes::parts_of_a_volume_go_along },
        Case {
            name: "what_is_not_there_does_not_move",
            run: volumes::what_is_not_there_does_not_move,
        },
        Case { name: "shared_files_move_live", run: segments::shared_files_move_live },
        Case {
            name: "withheld_page_of_a_file_is_noticed",
            run: segments::withheld_page_of_a_file_is_noticed,
        },
        Case {
            name: "what_lies_on_a_tmpfs_is_announced",
            run: segments::what_lies_on_a_tmpfs_is_announced,
        },
        Case { name: "measure_shared", run: segments::measure_shared },
    ];
    let more = ways::CASES.into_iter().chain(obstacles::CASES).chain(filters::CASES);
    let more = more.chain(harmless::CASES).chain(mapped::CASES).chain(forked::CASES);
    let own = going::CASES.into_iter().chain(rollback::CASES).chain(failing::CASES);
    let own = own.chain(restless::CASES).chain(memory::CASES).chain(ends::CASES).chain(huge::CASES);
    main_with(&own.chain(cases).chain(more).collect::<Vec<_>>());
}
