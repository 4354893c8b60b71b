//! Virtio devices with a hostile driver: see `decamp_vm::fuzzing::device`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: decamp_fuzzers::plant(decamp_vm::fuzzing::device_seeds()),
    |bytes: &[u8]| decamp_vm::fuzzing::device(bytes)
);
