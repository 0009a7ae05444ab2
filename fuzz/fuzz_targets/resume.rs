//! Runs the target `resume`; see `src/targets/resume.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| kaa_fuzz::run("resume", input));
