//! See `decamp_vm::fuzzing::section`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| decamp_vm::fuzzing::section(bytes));
