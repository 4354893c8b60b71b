//! What a peer says by itself: see `decamp_shared::fuzzing::wire`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: decamp_fuzzers::plant(decamp_shared::fuzzing::wire_seeds()),
    |bytes: &[u8]| decamp_shared::fuzzing::wire(bytes)
);
