//! Runs the target `lm_wire`; see `src/targets/lm_wire.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| kaa_fuzz::run("lm_wire", input));
