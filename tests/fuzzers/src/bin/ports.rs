//! The serial port and the power device: see `decamp_vm::fuzzing::ports`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: decamp_fuzzers::plant(decamp_vm::fuzzing::ports_seeds()),
    |bytes: &[u8]| decamp_vm::fuzzing::ports(bytes)
);
