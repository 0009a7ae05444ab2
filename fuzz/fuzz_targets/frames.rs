//! Runs the target `frames`; see `src/targets/frames.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| kaa_fuzz::run("frames", input));
