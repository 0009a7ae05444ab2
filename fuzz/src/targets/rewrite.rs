//! Modules that are rewritten: they do what they did before, and no fuel lasts forever.
//!
//! An input is a module, or else a byte of choices and what wasm-smith makes a module of. What has to
//! hold is in `tests/metering/differential.rs`: the same results, traps, memory, globals and tables, paid
//! for by at least what wasmtime itself counts, and an end to each run that has no more fuel. Of bytes
//! that are no module, or one that can't be rewritten, it is said so.

use std::sync::OnceLock;

use kaa::wasm::rewrite::{Options, SLICE_IMPORT, instrument};
use wasmparser::{Parser, Payload};
use wasmtime::Module;

use super::differential::{Engines, Kind, Tally, check_module, smith_module};
use super::input::Input;

/// Wasm pages of a module's first memory: it is laid out whole.
const MEMORY_PAGES_MAX: u64 = 64;

pub(crate) fn run(input: &[u8]) -> bool {
    static ENGINES: OnceLock<Engines> = OnceLock::new();
    let engines = ENGINES.get_or_init(Engines::new);
    let (seed, mut tally) = (input.len() as u64, Tally::default());
    let module = if input.starts_with(b"\0asm") {
        let options = Options { meter: true, export_functions: Vec::new() };
        let is_whole = is_small(input) && instrument(input, &options).is_ok();
        (is_whole && Module::validate(&engines.reference, input).is_ok()).then(|| input.to_vec())
    } else {
        let mut input = Input(input);
        let choices = input.u8();
        let kind = Kind {
            data: choices & 3 == 3,
            gc: choices & 4 != 0,
            export_everything: choices & 8 != 0,
        };
        smith_module(kind, input.0)
    };
    if let Some(module) = module.filter(|module| !imports_slice(module)) {
        check_module(engines, &module, seed, &mut tally);
    }
    tally.modules > 0
}

/// Whether the memory of a module is small.
fn is_small(module: &[u8]) -> bool {
    let mut sections = Parser::new(0).parse_all(module).map_while(Result::ok);
    !sections.any(|payload| match payload {
        Payload::MemorySection(section) => {
            section.into_iter().flatten().any(|memory| memory.initial > MEMORY_PAGES_MAX)
        }
        _ => false,
    })
}

/// Whether a module imports what only a rewritten one does: the harness would answer as Kaa.
fn imports_slice(module: &[u8]) -> bool {
    let mut sections = Parser::new(0).parse_all(module).map_while(Result::ok);
    sections.any(|payload| match payload {
        Payload::ImportSection(imports) => {
            imports.into_imports().flatten().any(|import| import.module == SLICE_IMPORT.0)
        }
        _ => false,
    })
}
