//! Runs the target `snapshot`; see `src/targets/snapshot.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| kaa_fuzz::run("snapshot", input));
