//! The wasmtime engine: one configuration for compiling and for running.

use std::sync::Arc;
use std::time::Duration;

use wasmtime::{Config, Engine, OptLevel};

use super::memory::{GC_GUARD, GC_RESERVATION, GUARD, RESERVATION, SlotCreator};
use super::stack::StackPool;
use crate::error::{Error, Result};

/// Stack that compiled guest code may use. CPython's own recursion checks count on 8 MiB.
const WASM_STACK_BYTES: usize = 8 << 20;
/// Stack of the fiber that a guest runs on. What is beyond [`WASM_STACK_BYTES`] is headroom for host
/// functions called from the deepest guest frame: without it, deep recursion would abort the process.
const FIBER_STACK_BYTES: usize = 2 * WASM_STACK_BYTES;

const _: () = assert!(FIBER_STACK_BYTES - WASM_STACK_BYTES >= 1 << 20, "host frames need room");

/// What decides whether an artifact fits: bumped when [`config`] changes in a way that wasmtime's
/// own check of artifacts doesn't see.
pub(crate) const CONFIG_VERSION: u32 = 1;

/// How guests are metered. Everything but the default is for measuring what metering costs, and for
/// checking one count against another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Metering {
    /// Kaa's own pass: counts, stops, yields.
    #[default]
    Kaa,
    /// Nothing counts, so that nothing can stop a guest that computes, and it never yields.
    Off,
    /// wasmtime's fuel: counts, and does nothing else.
    WasmtimeFuel,
    /// wasmtime's epochs: the guest yields its thread each time 10 ms are over, and nothing else.
    WasmtimeEpochs,
}

/// How long an epoch is: what wasmtime's own documentation takes for an example.
const EPOCH: Duration = Duration::from_millis(10);

impl Metering {
    /// What the images of this metering have behind their names.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Kaa => "",
            Self::Off => ".unmetered",
            Self::WasmtimeFuel => ".wasmtime-fuel",
            Self::WasmtimeEpochs => ".wasmtime-epochs",
        }
    }
}

fn config(metering: Metering) -> Config {
    let mut config = Config::new();
    config
        .consume_fuel(metering == Metering::WasmtimeFuel)
        .epoch_interruption(metering == Metering::WasmtimeEpochs)
        .wasm_exceptions(true)
        // The checks of the fuel pass hardly ever fire, and it says so.
        .wasm_branch_hinting(true)
        .max_wasm_stack(WASM_STACK_BYTES)
        .async_stack_size(FIBER_STACK_BYTES)
        .memory_reservation(RESERVATION as u64)
        .memory_reservation_for_growth(0)
        .memory_guard_size(GUARD as u64)
        .guard_before_linear_memory(false)
        .memory_may_move(false)
        .gc_heap_reservation(GC_RESERVATION as u64)
        .gc_heap_reservation_for_growth(0)
        .gc_heap_guard_size(GC_GUARD as u64)
        .gc_heap_may_move(false)
        .gc_heap_initial_size(0)
        .with_host_memory(Arc::new(SlotCreator))
        .with_host_stack(Arc::new(StackPool::default()))
        .cranelift_opt_level(OptLevel::Speed)
        // Off in every profile: it would also give debug builds of Kaa artifacts of their own.
        .cranelift_debug_verifier(false)
        .concurrency_support(false)
        // Nobody unwinds or symbolizes guest code; leaving the tables out halves the artifact.
        .generate_address_map(false)
        .native_unwind_info(false)
        .wasm_backtrace_max_frames(None);
    config
}

/// A new engine.
///
/// # Errors
///
/// [`Error::Internal`] when the machine's processor or system is one that wasmtime has no support for.
pub(crate) fn engine(metering: Metering) -> Result<Engine> {
    let engine = Engine::new(&config(metering))
        .map_err(|e| Error::Internal(format!("starting the Wasm engine: {e:#}")))?;
    if metering == Metering::WasmtimeEpochs {
        count_epochs(&engine)?;
    }
    Ok(engine)
}

/// Begins a new epoch again and again, for as long as the engine is there.
fn count_epochs(engine: &Engine) -> Result<()> {
    let engine = engine.weak();
    let count = move || {
        while let Some(engine) = engine.upgrade() {
            engine.increment_epoch();
            drop(engine);
            std::thread::sleep(EPOCH);
        }
    };
    let thread = std::thread::Builder::new().name("kaa-epochs".into()).spawn(count);
    thread.map(|_| ()).map_err(|e| Error::io("starting a thread that counts epochs", e))
}
