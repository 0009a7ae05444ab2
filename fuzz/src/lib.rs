//! The fuzz targets of Kaa: what they do with an input, and how inputs change.
//!
//! The bodies are in `targets/`, which `tests/fuzz_corpus.rs` includes too, so that a stable toolchain
//! runs every input that was kept.

mod mutate;
mod targets;

pub use mutate::mutate_cell;

/// Does with an input what the target of this name does.
///
/// # Panics
///
/// When something doesn't hold that has to; that is what is looked for.
pub fn run(target: &str, input: &[u8]) {
    // Whether it was good is what the tests ask for, so that their corpus has both kinds.
    let _is_good = targets::run(target, input);
}
