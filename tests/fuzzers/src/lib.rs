//! What all fuzzers have in common: each begins with inputs that mean something. What they try is in the module
//! `fuzzing` of each crate.

use std::path::Path;

/// Puts `seeds` into the directory that the environment names, if it does, for a fuzzer to begin with.
pub fn plant(seeds: Vec<Vec<u8>>) {
    let Some(directory) = std::env::var_os("DECAMP_FUZZ_SEEDS") else { return };
    for (number, seed) in seeds.iter().enumerate() {
        let path = Path::new(&directory).join(format!("seed-{number}"));
        std::fs::write(path, seed).expect("a seed is written");
    }
}
