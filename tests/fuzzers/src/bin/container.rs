//! Sections of a container: see `decamp_container::fuzzing::section`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: decamp_fuzzers::plant(decamp_container::fuzzing::section_seeds()),
    |bytes: &[u8]| decamp_container::fuzzing::section(bytes)
);
