//! State sections of a VM, and what else a peer says of one: see `decamp_vm::fuzzing::section`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: decamp_fuzzers::plant(decamp_vm::fuzzing::section_seeds()),
    |bytes: &[u8]| decamp_vm::fuzzing::section(bytes)
);
