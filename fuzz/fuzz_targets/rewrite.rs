//! Runs the target `rewrite`; see `src/targets/rewrite.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| kaa_fuzz::run("rewrite", input));
