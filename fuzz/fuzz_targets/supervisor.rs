//! Runs the target `supervisor`; see `src/targets/supervisor.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| kaa_fuzz::run("supervisor", input));
