//! Runs of a module as it was and as it is rewritten, side by side.
//!
//! The reference is the original module under wasmtime's own fuel, whose costs are set here to
//! those of the rule in `src/wasm/meter.rs`. Two independent counts of the same execution are then
//! compared. With W the reference's count and F the fuel that the rewritten module charged:
//!
//! **W <= F.** Each operator is covered by a charge before it. wasmtime may save its count late
//! when a trap ends a run, but never counts too much.
//!
//! **F <= K * W** for runs that end normally. What F has more than W, each for an operator (or a
//! function entry) that W counts with at least 1, and no operator has two of them:
//! - where control parts: at most `SLACK`, and 1 for the loop header that a branch leads back to,
//!   which wasmtime charges only on entry;
//! - a direct call of a function that its callers pay for: that function's costliest path, at most
//!   64, instead of the one it took, on a weight of 2;
//! - an indirect call: 12, on a weight of 4, for such a function that it may have reached;
//! - entering a loop: 1. It is counted by the operator that led there, at worst the branch, call or
//!   entry before it, as loops that nest without an operator between are few (`LOOPS_NEST`).
//!
//! `memory.grow`, `throw` and `array.new_fixed` cost more than wasmtime's bytes can say: modules
//! with these are left out of this one.
//!
//! **Every run ends** within its budget, the overdraft and one acyclic path per frame.

use kaa::wasm::rewrite::{
    EXPORT_PREFIX, FLOOR_EXPORT, FUEL_EXPORT, InstrumentError, Instrumented, Options, instrument,
};
use wasmtime::{
    Caller, Config, Engine, Extern, Global, Instance, Linker, Module, OperatorCost, Ref, Store,
    StoreLimits, StoreLimitsBuilder, Trap, Val, ValType,
};

/// The most that one path may pay too much at one place where control parts.
const SLACK: u64 = 64;
const LOOPS_NEST: u64 = 10;
const K: u64 = 2 + SLACK + LOOPS_NEST;
/// What a reference run may use: it ends endless loops.
const REFERENCE_FUEL: u64 = 300_000;
/// More than the acyclic paths in the frames that fit on the stack (256 KiB) can cost.
const PATHS_MAX: u64 = 10_000_000;
/// More than any run in here uses.
pub(crate) const AMPLE_FUEL: i64 = 1 << 50;

#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) modules: u64,
    pub(crate) refused: u64,
    pub(crate) completed: u64,
    pub(crate) trapped: u64,
    pub(crate) endless: u64,
    /// Runs that ended at the host's stack limit: where that is depends on the machine code.
    overflowed: u64,
    worst_ratio: u64,
}

pub(crate) fn check_module(engines: &Engines, wasm: &[u8], seed: u64, tally: &mut Tally) {
    let options = Options { meter: true, export_functions: Vec::new() };
    let rewritten = match instrument(wasm, &options) {
        Ok(rewritten) => rewritten,
        Err(InstrumentError::Unsupported(_) | InstrumentError::DataOutOfBounds { .. }) => {
            return tally.refused += 1;
        }
        // A fuzzer learns the names from the comparisons.
        Err(InstrumentError::ExportReserved { name }) if name.starts_with(EXPORT_PREFIX) => {
            return tally.refused += 1;
        }
        Err(error) => panic!("seed {seed}: {error}"),
    };
    let (reference, start) = Run::reference(engines, wasm, REFERENCE_FUEL);
    if start.end == End::OutOfFuel {
        // The host has no hold on the floor before an instance is there.
        return;
    }
    let (metered, metered_start) = Run::metered(engines, &rewritten, AMPLE_FUEL);
    let (again, again_start) = Run::metered(engines, &rewritten, AMPLE_FUEL);
    assert_eq!(metered_start, again_start, "seed {seed}");
    let (Some(mut reference), Some(mut metered), Some(mut again)) = (reference, metered, again)
    else {
        assert_eq!(start.end, metered_start.end, "seed {seed}");
        return;
    };
    if !rewritten.memory.is_empty() && !metered.lay_out(&rewritten.memory) {
        return tally.refused += 1;
    }
    again.lay_out(&rewritten.memory);
    tally.modules += 1;
    let unbounded_operators = has_operators_beyond_the_table(wasm);
    for (index, function) in reference.functions().iter().enumerate() {
        let Some(arguments) = reference.arguments(function, seed + index as u64) else { continue };
        let at = format!("seed {seed}, function {function}");
        let expected = reference.call(function, &arguments);
        if expected.end == End::OutOfFuel {
            tally.endless += 1;
            check_stops(engines, &rewritten, function, &arguments, &at);
            return;
        }
        let found = metered.call(function, &arguments);
        if expected.end == End::StackOverflow || found.end == End::StackOverflow {
            tally.overflowed += 1;
            return;
        }
        assert_eq!(expected.end, found.end, "{at}");
        assert_eq!(reference.state(), metered.state(), "{at}");
        assert_eq!(found, again.call(function, &arguments), "{at}: not deterministic");
        assert!(expected.fuel <= found.fuel, "{at}: {} <= {}", expected.fuel, found.fuel);
        if let End::Values(_) = found.end {
            tally.completed += 1;
            if !unbounded_operators {
                tally.worst_ratio = tally.worst_ratio.max(found.fuel / expected.fuel.max(1));
                assert!(found.fuel <= K * expected.fuel, "{at}: {found:?} {expected:?}");
            }
        } else {
            tally.trapped += 1;
        }
    }
}

/// A call that the reference could not finish ends in a fresh instance, for want of fuel, and
/// little below the floor.
fn check_stops(
    engines: &Engines,
    rewritten: &Instrumented,
    function: &str,
    arguments: &[Val],
    at: &str,
) {
    let sized = rewritten.report.charges.bulk_operators > 0;
    for (budget, overdraft) in [(0, 0), (1, 10), (1000, 0), (20_000, 5_000)] {
        let (Some(mut run), _) = Run::metered(engines, rewritten, AMPLE_FUEL) else { continue };
        run.lay_out(&rewritten.memory);
        run.budget = budget;
        run.set_floor(-overdraft);
        let ended = run.call(function, arguments);
        assert!(matches!(ended.end, End::OutOfFuel | End::StackOverflow), "{at}: {ended:?}");
        // What one size operand asks for is charged whole before it is checked.
        let most = (budget + overdraft) as u64 + PATHS_MAX;
        assert!(sized || ended.fuel <= most, "{at}: {ended:?}");
    }
}

/// How a call ended.
#[derive(Debug, PartialEq)]
pub(crate) enum End {
    Values(Vec<String>),
    Trap(Trap),
    OutOfFuel,
    StackOverflow,
    Other(String),
}

#[derive(Debug, PartialEq)]
pub(crate) struct Ended {
    pub(crate) end: End,
    pub(crate) fuel: u64,
}

pub(crate) struct Engines {
    pub(crate) reference: Engine,
    metered: Engine,
}

impl Engines {
    pub(crate) fn new() -> Self {
        let mut config = Config::new();
        config.wasm_exceptions(true).wasm_gc(true).wasm_function_references(true);
        config.wasm_tail_call(true).wasm_relaxed_simd(true).relaxed_simd_deterministic(true);
        config.cranelift_nan_canonicalization(true);
        // Nothing here is deep on purpose, and the test threads have small stacks.
        config.max_wasm_stack(256 << 10);
        // Compiling is most of the work here, and what is compiled runs once.
        config.cranelift_opt_level(wasmtime::OptLevel::None);
        // Thousands of reservations of 4 GiB cost more than bounds checks.
        config.memory_reservation(1 << 20).memory_guard_size(0);
        let metered = Engine::new(&config).unwrap();
        config.consume_fuel(true).operator_cost(costs());
        Self { reference: Engine::new(&config).unwrap(), metered }
    }
}

/// The weights of `src/wasm/meter.rs`, as far as they fit.
fn costs() -> OperatorCost {
    let mut costs = OperatorCost::new();
    for division in [
        &mut costs.I32DivS,
        &mut costs.I32DivU,
        &mut costs.I32RemS,
        &mut costs.I32RemU,
        &mut costs.I64DivS,
        &mut costs.I64DivU,
        &mut costs.I64RemS,
        &mut costs.I64RemU,
    ] {
        *division = 8;
    }
    for float in [&mut costs.F32Div, &mut costs.F64Div, &mut costs.F32Sqrt, &mut costs.F64Sqrt] {
        *float = 4;
    }
    (costs.Call, costs.ReturnCall) = (2, 2);
    // 16, of which 12 are for a function that the call may reach.
    (costs.CallIndirect, costs.ReturnCallIndirect) = (4, 4);
    (costs.CallRef, costs.ReturnCallRef) = (4, 4);
    (costs.Throw, costs.ThrowRef) = (u8::MAX, u8::MAX);
    (costs.MemoryGrow, costs.TableGrow) = (u8::MAX, u8::MAX);
    let sizes = &mut costs.variable;
    sizes.memory_grow_per_page = u8::MAX;
    for table in [
        &mut sizes.table_copy_per_element,
        &mut sizes.table_fill_per_element,
        &mut sizes.table_init_per_element,
        &mut sizes.table_grow_per_element,
    ] {
        *table = 8;
    }
    for array in [
        &mut sizes.array_copy_per_element,
        &mut sizes.array_fill_per_element,
        &mut sizes.array_new_elem_per_element,
        &mut sizes.array_init_elem_per_element,
        &mut sizes.array_new_default_per_element,
        &mut sizes.array_new_per_element,
    ] {
        *array = 16;
    }
    costs
}

struct Host {
    limits: StoreLimits,
    /// Granted at the next `slice`, once.
    grant: i64,
}

/// An instance, of the original (`budget` counts wasmtime's fuel) or of the rewritten module.
pub(crate) struct Run {
    store: Store<Host>,
    instance: Instance,
    fuel: Option<Global>,
    pub(crate) budget: i64,
}

const OUT_OF_FUEL: &str = "kaa: out of fuel";

impl Run {
    fn reference(engines: &Engines, wasm: &[u8], budget: u64) -> (Option<Self>, Ended) {
        Self::new(&engines.reference, wasm, budget as i64, false)
    }

    pub(crate) fn metered(
        engines: &Engines,
        module: &Instrumented,
        budget: i64,
    ) -> (Option<Self>, Ended) {
        Self::new(&engines.metered, &module.module, budget, true)
    }

    fn new(engine: &Engine, wasm: &[u8], budget: i64, metered: bool) -> (Option<Self>, Ended) {
        let module = Module::new(engine, wasm).unwrap();
        let limits = StoreLimitsBuilder::new().memory_size(4 << 20).table_elements(10_000).build();
        let mut store = Store::new(engine, Host { limits, grant: budget });
        store.limiter(|host| &mut host.limits);
        if !metered {
            store.set_fuel(budget as u64).unwrap();
        }
        let mut linker = Linker::new(engine);
        linker
            .func_wrap("kaa", "slice", |mut caller: Caller<'_, Host>| {
                let fuel = caller.get_export(FUEL_EXPORT).and_then(Extern::into_global).unwrap();
                let granted = std::mem::take(&mut caller.data_mut().grant);
                let left = fuel.get(&mut caller).unwrap_i64() + granted;
                fuel.set(&mut caller, Val::I64(left))?;
                if left < 0 { Err(wasmtime::Error::msg(OUT_OF_FUEL)) } else { Ok(()) }
            })
            .unwrap();
        linker.define_unknown_imports_as_default_values(&mut store, &module).unwrap();
        match linker.instantiate(&mut store, &module) {
            Err(error) => (None, Ended { end: end_of(&error), fuel: 0 }),
            Ok(instance) => {
                let fuel = instance.get_global(&mut store, FUEL_EXPORT);
                let run = Self { store, instance, fuel, budget };
                (Some(run), Ended { end: End::Values(Vec::new()), fuel: 0 })
            }
        }
    }

    pub(crate) fn set_floor(&mut self, floor: i64) {
        let global = self.instance.get_global(&mut self.store, FLOOR_EXPORT).unwrap();
        global.set(&mut self.store, Val::I64(floor)).unwrap();
    }

    fn floor(&mut self) -> i64 {
        let global = self.instance.get_global(&mut self.store, FLOOR_EXPORT);
        global.map_or(i64::MIN, |global| global.get(&mut self.store).unwrap_i64())
    }

    fn lay_out(&mut self, bytes: &[u8]) -> bool {
        let exports: Vec<_> = self.instance.exports(&mut self.store).collect();
        let memory = exports.into_iter().find_map(|export| export.into_memory());
        memory.is_some_and(|memory| memory.write(&mut self.store, 0, bytes).is_ok())
    }

    fn functions(&mut self) -> Vec<String> {
        let exports = self.instance.exports(&mut self.store);
        let is_function = |export: wasmtime::Export<'_>| {
            let name = export.name().to_owned();
            export.into_func().map(|_| name)
        };
        exports.filter_map(is_function).collect()
    }

    /// Arguments for a function; `None` if one cannot be made up.
    fn arguments(&mut self, function: &str, seed: u64) -> Option<Vec<Val>> {
        let mut random = Random(seed);
        let function = self.instance.get_func(&mut self.store, function)?;
        let argument = |ty: ValType| match ty {
            ValType::I32 => Some(Val::I32(random.next() as i32 >> (random.next() % 32))),
            ValType::I64 => Some(Val::I64(random.next() as i64 >> (random.next() % 64))),
            ValType::F32 => Some(Val::F32(((random.next() % 1000) as f32).to_bits())),
            ValType::F64 => Some(Val::F64((random.next() as f64).to_bits())),
            ValType::V128 => Some(Val::V128(u128::from(random.next()).into())),
            ValType::Ref(ty) if ty.is_nullable() => Some(Val::null_ref(ty.heap_type())),
            ValType::Ref(_) => None,
        };
        function.ty(&self.store).params().map(argument).collect()
    }

    pub(crate) fn call(&mut self, function: &str, arguments: &[Val]) -> Ended {
        let function = self.instance.get_func(&mut self.store, function).unwrap();
        let mut results = vec![Val::I32(0); function.ty(&self.store).results().len()];
        match self.fuel {
            Some(fuel) => fuel.set(&mut self.store, Val::I64(self.budget)).unwrap(),
            None => self.store.set_fuel(self.budget as u64).unwrap(),
        }
        self.store.data_mut().grant = 0;
        let called = function.call(&mut self.store, arguments, &mut results);
        let left = match self.fuel {
            Some(fuel) => fuel.get(&mut self.store).unwrap_i64(),
            None => self.store.get_fuel().unwrap() as i64,
        };
        let end = match called {
            Ok(()) => End::Values(results.iter().map(show).collect()),
            Err(_) if left < self.floor() => End::OutOfFuel,
            Err(error) => end_of(&error),
        };
        // A pending exception would otherwise be the next call's.
        self.store.take_pending_exception();
        Ended { end, fuel: (self.budget - left) as u64 }
    }

    /// All that can be seen of the state through the original's exports.
    fn state(&mut self) -> Vec<String> {
        let exports = self.instance.exports(&mut self.store);
        let exports: Vec<_> = exports
            .map(|export| (export.name().to_owned(), export.into_extern()))
            .filter(|(name, _)| !name.starts_with(EXPORT_PREFIX))
            .collect();
        let store = &mut self.store;
        let show = |(name, export): (String, Extern)| match export {
            Extern::Global(global) => format!("{name} {}", show(&global.get(&mut *store))),
            Extern::Memory(memory) => format!("{name} {:x}", checksum(memory.data(&*store))),
            Extern::Table(table) => {
                let size = table.size(&*store).min(64);
                let null = (0..size).map(|at| is_null(&table.get(&mut *store, at).unwrap()));
                format!("{name} {size} {:?}", null.collect::<Vec<_>>())
            }
            _ => name,
        };
        exports.into_iter().map(show).collect()
    }
}

fn end_of(error: &wasmtime::Error) -> End {
    match error.downcast_ref::<Trap>() {
        Some(Trap::OutOfFuel) => End::OutOfFuel,
        Some(Trap::StackOverflow) => End::StackOverflow,
        Some(trap) => End::Trap(*trap),
        None if error.root_cause().to_string() == OUT_OF_FUEL => End::OutOfFuel,
        // Without numbers: the indices of types differ between engines.
        None => End::Other(error.root_cause().to_string().replace(char::is_numeric, "")),
    }
}

fn show(value: &Val) -> String {
    match value {
        Val::I32(_) | Val::I64(_) | Val::F32(_) | Val::F64(_) | Val::V128(_) => {
            format!("{value:?}")
        }
        // Two runs do not share references.
        reference => format!("null: {}", reference.ref_().is_some_and(|value| is_null(&value))),
    }
}

fn is_null(value: &Ref) -> bool {
    value.is_null()
}

/// FNV-1a.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325 ^ bytes.len() as u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Splitmix64: the same on every machine.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// What a module has that not all can have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    /// Data, and then no bulk operators, references and traps.
    pub(crate) data: bool,
    pub(crate) gc: bool,
    pub(crate) export_everything: bool,
}

/// The module that these bytes choose.
pub(crate) fn smith_module(kind: Kind, bytes: &[u8]) -> Option<Vec<u8>> {
    let Kind { data, gc, export_everything } = kind;
    let config = wasm_smith::Config {
        allow_start_export: !data,
        // Without bulk operators all data segments are active ones.
        bulk_memory_enabled: !data,
        // This also keeps them within the memory.
        disallow_traps: data,
        reference_types_enabled: !data,
        gc_enabled: gc && !data,
        max_data_segments: if data { 3 } else { 0 },
        export_everything,
        min_exports: 4,
        min_funcs: 3,
        max_funcs: 12,
        max_instructions: 200,
        max_imports: 4,
        max_memory32_bytes: 1 << 20,
        max_table_elements: 1000,
        min_memories: 1,
        max_memories: 1,
        max_tables: 2,
        memory64_enabled: false,
        threads_enabled: false,
        ..wasm_smith::Config::default()
    };
    let module = wasm_smith::Module::new(config, &mut arbitrary::Unstructured::new(bytes));
    module.ok().map(|module| module.to_bytes())
}

/// Operators whose cost in the rule does not fit into wasmtime's bytes.
fn has_operators_beyond_the_table(wasm: &[u8]) -> bool {
    use wasmparser::{Operator, Parser, Payload};
    let bodies = Parser::new(0).parse_all(wasm).filter_map(|payload| match payload.unwrap() {
        Payload::CodeSectionEntry(body) => Some(body),
        _ => None,
    });
    bodies.into_iter().any(|body| {
        body.get_operators_reader().unwrap().into_iter().any(|operator| {
            matches!(
                operator.unwrap(),
                Operator::MemoryGrow { .. }
                    | Operator::TableGrow { .. }
                    | Operator::Throw { .. }
                    | Operator::ThrowRef
                    | Operator::ArrayNewFixed { .. }
            )
        })
    })
}
