//! Runs the target `cell`; see `src/targets/cell.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| kaa_fuzz::run("cell", input));

// Bytes that change at random are hardly ever Python: three times of four whole lines do.
libfuzzer_sys::fuzz_mutator!(|input: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed % 4 == 0 {
        return libfuzzer_sys::fuzzer_mutate(input, size, max_size);
    }
    let mut cell = input[..size].to_vec();
    kaa_fuzz::mutate_cell(&mut cell, seed);
    cell.truncate(max_size);
    input[..cell.len()].copy_from_slice(&cell);
    cell.len()
});
