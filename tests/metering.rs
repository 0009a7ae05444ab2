//! The rewritten module behaves like the original and pays for all of its work.
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
    FLOOR_EXPORT, FUEL_EXPORT, InstrumentError, Instrumented, Options, instrument,
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
const AMPLE_FUEL: i64 = 1 << 50;
const MODULES: u64 = 2000;

#[test]
fn random_modules_behave_the_same_and_pay_for_their_work() {
    let engines = Engines::new();
    let mut tally = Tally::default();
    for seed in 0..MODULES {
        let Some(wasm) = random_module(seed) else { continue };
        check_module(&engines, &wasm, seed, &mut tally);
    }
    println!("{tally:?}");
    // The generator's luck must not empty the test.
    assert!(tally.modules > MODULES / 2, "{tally:?}");
    assert!(tally.completed > 500 && tally.trapped > 300 && tally.endless > 100, "{tally:?}");
}

/// Control flow by name; each function is called with several arguments.
const SHAPES: &[(&str, &str)] = &[
    ("empty loop", r#"(func (export "f") (loop))"#),
    ("endless loop", r#"(func (export "f") (loop (br 0)))"#),
    (
        "counted loop",
        r#"(func (export "f") (param i32) (result i32) (local i32)
        (loop (local.set 1 (i32.add (local.get 1) (local.get 0)))
            (br_if 0 (local.tee 0 (i32.shr_u (local.get 0) (i32.const 1))))) (local.get 1))"#,
    ),
    (
        "chain of br_if",
        r#"(func (export "f") (param i32) (result i32)
        (block (block (block
            (br_if 0 (i32.eqz (local.get 0)))
            (br_if 1 (i32.eq (local.get 0) (i32.const 1)))
            (br_if 2 (i32.lt_s (local.get 0) (i32.const 0)))
            (return (i32.mul (local.get 0) (local.get 0))))
            (return (i32.const 10))) (return (i32.const 20))) (i32.const 30))"#,
    ),
    (
        "switch",
        r#"(func (export "f") (param i32) (result i32)
        (loop $next (block $c (block $b (block $a
            (br_table $a $b $next $c (i32.and (local.get 0) (i32.const 3))))
            (local.set 0 (i32.add (local.get 0) (i32.const 1))) (br $next))
            (local.set 0 (i32.shr_u (local.get 0) (i32.const 2))) (br $next)))
        (local.get 0))"#,
    ),
    (
        "nested loops",
        r#"(func (export "f") (param i32) (result i32) (local i32 i32)
        (local.set 0 (i32.and (local.get 0) (i32.const 15)))
        (loop $a (local.set 1 (local.get 0))
            (loop $b (local.set 2 (i32.add (local.get 2) (i32.const 1)))
                (br_if $b (i32.gt_s (local.tee 1 (i32.sub (local.get 1) (i32.const 1)))
                    (i32.const 0))))
            (br_if $a (i32.gt_s (local.tee 0 (i32.sub (local.get 0) (i32.const 1)))
                (i32.const 0))))
        (local.get 2))"#,
    ),
    (
        "recursion",
        r#"(func $f (export "f") (param i32) (result i32)
        (local.set 0 (i32.and (local.get 0) (i32.const 15)))
        (if (result i32) (i32.lt_u (local.get 0) (i32.const 2)) (then (local.get 0))
            (else (i32.add (call $f (i32.sub (local.get 0) (i32.const 1)))
                (call $f (i32.sub (local.get 0) (i32.const 2)))))))"#,
    ),
    ("tail calls without end", r#"(func $f (export "f") (return_call $f))"#),
    (
        "call_indirect",
        r#"(table funcref (elem $a $b)) (type $t (func (param i32) (result i32)))
        (func $a (type $t) (i32.add (local.get 0) (i32.const 1)))
        (func $b (type $t) (loop (br_if 0 (i32.eqz (local.get 0)))) (local.get 0))
        (func (export "f") (param i32) (result i32)
            (call_indirect (type $t) (local.get 0) (i32.and (local.get 0) (i32.const 3))))"#,
    ),
    (
        "free functions",
        r#"(func $leaf (param i32) (result i32)
            (if (result i32) (local.get 0) (then (i32.const 3)) (else
                (i32.mul (i32.mul (local.get 0) (local.get 0)) (local.get 0)))))
        (func (export "f") (param i32) (result i32)
            (i32.add (call $leaf (local.get 0)) (call $leaf (i32.const 0))))
        (func (export "g") (param i32) (result i32) (return_call $leaf (local.get 0)))"#,
    ),
    (
        "exceptions",
        r#"(tag $e (param i32))
        (func $throws (param i32) (throw $e (local.get 0)))
        (func (export "caught") (param i32) (result i32) (block $h (result i32)
            (try_table (catch $e $h) (call $throws (local.get 0))) (i32.const 7))
            (i32.add (i32.const 1)))
        (func (export "caught by a loop") (param i32) (result i32)
            (local.set 0 (i32.and (local.get 0) (i32.const 15)))
            (loop $again (result i32)
                (if (i32.eqz (local.get 0)) (then (return (i32.const 1))))
                (local.set 0 (i32.sub (local.get 0) (i32.const 1)))
                (try_table (catch_all $again) (call $throws (local.get 0))) (i32.const 2)))
        (func (export "caught by the function") (param i32) (result i32)
            (try_table (catch $e 0) (call $throws (local.get 0))) (i32.const 9))
        (func (export "uncaught") (param i32) (call $throws (local.get 0)))"#,
    ),
    (
        "bulk operators",
        r#"(memory (export "m") 1) (table $t (export "t") 10 funcref)
        (func (export "fill") (param i32 i32 i32)
            (memory.fill (local.get 0) (local.get 1) (local.get 2)))
        (func (export "copy") (param i32 i32 i32)
            (memory.copy (local.get 0) (local.get 1) (local.get 2)))
        (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
        (func (export "table") (param i32) (result i32)
            (table.grow $t (ref.null func) (local.get 0)))
        (func (export "all") (memory.fill (i32.const 1) (i32.const 2) (i32.const -1)))"#,
    ),
    (
        "code that is not reached",
        r#"(memory 1)
        (func (export "f") (param i32) (result i32)
            (loop (br_if 0 (i32.const 0))
                (return (local.get 0)) (memory.fill) (br_if 0) (if (then (br 1)))
                (loop (br 0)) (drop))
            (unreachable))"#,
    ),
    (
        "start",
        r#"(global $g (export "g") (mut i32) (i32.const 0)) (start $s)
        (func $s (loop (global.set $g (i32.add (global.get $g) (i32.const 1)))
            (br_if 0 (i32.lt_s (global.get $g) (i32.const 9)))))
        (func (export "f") (result i32) (global.get $g))"#,
    ),
    (
        "references",
        r#"(import "env" "i" (func $i)) (table (export "t") 3 funcref)
        (elem (table 0) (i32.const 0) func $f $i) (elem declare func $g)
        (global (export "g") funcref (ref.func $g))
        (func $f (export "f") (table.set (i32.const 2) (ref.func $g)) (call $i))
        (func $g (call $f))"#,
    ),
];

#[test]
fn shapes_of_control_flow_behave_the_same_and_pay_for_their_work() {
    let engines = Engines::new();
    for (name, text) in SHAPES {
        println!("{name}");
        let mut tally = Tally::default();
        let wasm = module(text);
        for seed in 0..20 {
            check_module(&engines, &wasm, seed, &mut tally);
        }
        assert_eq!(tally.modules, 20, "{name}: {tally:?}");
    }
}

fn module(text: &str) -> Vec<u8> {
    wat::parse_str(format!("(module {text})")).unwrap()
}

fn metered(text: &str) -> Instrumented {
    let options = Options { meter: true, export_functions: Vec::new() };
    instrument(&module(text), &options).unwrap()
}

/// Calls the export `f` and returns how it ended and what it cost.
fn fuel_of(text: &str, arguments: &[i32], floor: Option<i64>) -> Ended {
    let (run, _) = Run::metered(&Engines::new(), &metered(text), AMPLE_FUEL);
    let mut run = run.unwrap();
    if let Some(floor) = floor {
        run.budget = 0;
        run.set_floor(floor);
    }
    run.call("f", &arguments.iter().map(|argument| Val::I32(*argument)).collect::<Vec<_>>())
}

#[test]
fn fuel_is_known_exactly() {
    // One for the entry, one for the header.
    assert_eq!(fuel_of(SHAPES[0].1, &[], None).fuel, 2);
    // Each iteration: the header and the branch.
    assert_eq!(fuel_of(SHAPES[1].1, &[], Some(-1000)).fuel, 1001);
    // Entry, operand, branch; then a cheap path that gets the prepaid 200 back, or the 200.
    let parting =
        r#"(func (export "f") (param i32) (block (br_if 0 (local.get 0)) (return)) WORK)"#;
    let parting = parting.replace("WORK", &"(global.set $g (i32.const 1))".repeat(100));
    let parting = format!("(global $g (mut i32) (i32.const 0)) {parting}");
    assert_eq!(fuel_of(&parting, &[0], None).fuel, 3);
    assert_eq!(fuel_of(&parting, &[1], None).fuel, 203);
    // Entry, try_table, throw; the handler pays for itself.
    let handler =
        r#"(tag $e) (func (export "f") (block (try_table (catch $e 0) (throw $e))) WORK)"#;
    let handler = handler.replace("WORK", &"(drop (i32.const 1))".repeat(100));
    assert_eq!(fuel_of(&handler, &[], None).fuel, 2 + 1000 + 100);
    let fill = r#"(memory 1) (func (export "f") (param i32)
        (memory.fill (i32.const 0) (i32.const 0) (local.get 0)))"#;
    let small = fuel_of(fill, &[16], None);
    assert_eq!(small.end, End::Values(Vec::new()));
    // The size is charged before the operator traps, as what it is: unsigned.
    let large = fuel_of(fill, &[-1], None);
    assert_eq!(large.end, End::Trap(Trap::MemoryOutOfBounds));
    assert_eq!(large.fuel - small.fuel, u64::from(u32::MAX) - 16);
    let grow = r#"(memory 1) (func (export "f") (param i32) (drop (memory.grow (local.get 0))))"#;
    let page = fuel_of(grow, &[1], None).fuel - fuel_of(grow, &[0], None).fuel;
    assert_eq!(page, 65536);
    let pages = fuel_of(grow, &[-1], None).fuel - fuel_of(grow, &[0], None).fuel;
    assert_eq!(pages, u64::from(u32::MAX) * 65536);
    // No host to grant more: the size is not worked off.
    assert_eq!(fuel_of(fill, &[1000], Some(-100)).end, End::OutOfFuel);
}

#[test]
fn small_functions_are_paid_for_by_their_callers() {
    let report = metered(
        r#"(func $leaf (param i32) (result i32) (local.get 0))
        (func $exported (export "g"))
        (func $loops (loop))
        (table 1 funcref) (func $indirect (call_indirect (i32.const 0)))
        (func (export "f") (drop (call $leaf (i32.const 0))) (call $loops))"#,
    )
    .report;
    assert_eq!((report.functions, report.functions_free, report.charges.functions), (5, 1, 4));
}

#[test]
fn data_segments_become_the_initial_memory() {
    let done = metered(
        r#"(memory (export "memory") 4) (data (i32.const 70000) "ab\00") (data (i32.const 1) "x")
        (data (i32.const 70001) "c") (data (i32.const 200000) "\00\00")"#,
    );
    assert_eq!((done.memory_pages_min, done.memory.len()), (4, 2 * 65536));
    assert_eq!((&done.memory[..3], &done.memory[70000..70003]), (&b"\0x\0"[..], &b"ac\0"[..]));
    assert_eq!(done.report.data_segments, 4);
}

#[test]
fn functions_are_exported_by_name() {
    let wasm = module(r#"(func $a) (func $b (export "b")) (global (mut i32) (i32.const 3))"#);
    let options = Options { meter: true, export_functions: vec!["a".to_owned()] };
    let done = instrument(&wasm, &options).unwrap();
    let module = Module::new(&Engine::default(), &done.module).unwrap();
    let names: Vec<_> = module.exports().map(|export| export.name().to_owned()).collect();
    assert_eq!(names, ["b", "kaa:global:0", "kaa:fn:a", "kaa:fuel", "kaa:floor"]);
    assert_eq!(module.imports().len(), 1);
    let plain = instrument(&wasm, &Options { meter: false, ..options }).unwrap();
    let module = Module::new(&Engine::default(), &plain.module).unwrap();
    assert_eq!((module.imports().len(), module.exports().len()), (0, 3));
}

#[test]
fn what_cannot_be_rewritten_is_refused_with_a_sentence() {
    let cases = [
        ("(memory 1) (data \"a\")", "has passive data segments"),
        ("(import \"a\" \"b\" (memory 1))", "imports a memory"),
        ("(memory 1) (memory 1)", "has several memories"),
        ("(memory i64 1)", "has a 64-bit memory"),
        ("(memory 1 1 shared)", "has a shared memory"),
        ("(table i64 1 funcref)", "has a 64-bit table"),
        (
            "(import \"a\" \"b\" (global i32)) (memory 1) (data (global.get 0) \"a\")",
            "has data at an offset that is not constant",
        ),
        ("(memory 1) (data (i32.const 65535) \"ab\")", "does not fit in the initial memory"),
        (
            "(memory 1) (data (i32.const 0) \"a\") (func $s) (start $s)",
            "has a start function and data segments",
        ),
        ("(func (export \"kaa:fuel\"))", "already has an export kaa:fuel"),
        ("(memory 1) (data (i32.const 0) \"a\") (func data.drop 0)", "is not valid"),
        ("(func try catch_all end)", "uses legacy exceptions"),
    ];
    for (text, sentence) in cases {
        let options = Options { meter: true, export_functions: Vec::new() };
        let error = instrument(&module(text), &options).unwrap_err().to_string();
        assert!(error.contains(sentence), "{text}: {error}");
    }
    let options = Options { meter: false, export_functions: vec!["a".to_owned(), "b".to_owned()] };
    let error = instrument(&module("(func $a)"), &options).unwrap_err().to_string();
    assert_eq!(error, "the name section names no function b");
    assert!(instrument(b"\0asm", &options).is_err());
    // Each prefix of a module is an error or, where it ends between sections, a module.
    let whole = module(SHAPES[10].1);
    for length in 0..whole.len() {
        let _ = instrument(&whole[..length], &Options { meter: true, ..Options::default() });
    }
}

#[derive(Debug, Default)]
struct Tally {
    modules: u64,
    refused: u64,
    completed: u64,
    trapped: u64,
    endless: u64,
    /// Runs that ended at the host's stack limit: where that is depends on the machine code.
    overflowed: u64,
    worst_ratio: u64,
}

fn check_module(engines: &Engines, wasm: &[u8], seed: u64, tally: &mut Tally) {
    let options = Options { meter: true, export_functions: Vec::new() };
    let rewritten = match instrument(wasm, &options) {
        Ok(rewritten) => rewritten,
        Err(InstrumentError::Unsupported(_) | InstrumentError::DataOutOfBounds { .. }) => {
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
enum End {
    Values(Vec<String>),
    Trap(Trap),
    OutOfFuel,
    StackOverflow,
    Other(String),
}

#[derive(Debug, PartialEq)]
struct Ended {
    end: End,
    fuel: u64,
}

struct Engines {
    reference: Engine,
    metered: Engine,
}

impl Engines {
    fn new() -> Self {
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
struct Run {
    store: Store<Host>,
    instance: Instance,
    fuel: Option<Global>,
    budget: i64,
}

const OUT_OF_FUEL: &str = "kaa: out of fuel";

impl Run {
    fn reference(engines: &Engines, wasm: &[u8], budget: u64) -> (Option<Self>, Ended) {
        Self::new(&engines.reference, wasm, budget as i64, false)
    }

    fn metered(engines: &Engines, module: &Instrumented, budget: i64) -> (Option<Self>, Ended) {
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

    fn set_floor(&mut self, floor: i64) {
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

    fn call(&mut self, function: &str, arguments: &[Val]) -> Ended {
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
            .filter(|(name, _)| !name.starts_with("kaa:"))
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

/// Splitmix64: the same modules on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

fn random_module(seed: u64) -> Option<Vec<u8>> {
    let mut random = Random(seed);
    let length = 1024 + (random.next() % 4096) as usize;
    let bytes: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
    let data = seed.is_multiple_of(4);
    let config = wasm_smith::Config {
        allow_start_export: !data,
        // Without bulk operators all data segments are active ones.
        bulk_memory_enabled: !data,
        // This also keeps them within the memory.
        disallow_traps: data,
        reference_types_enabled: !data,
        gc_enabled: seed.is_multiple_of(3) && !data,
        max_data_segments: if data { 3 } else { 0 },
        export_everything: seed % 5 < 3,
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
    let module = wasm_smith::Module::new(config, &mut arbitrary::Unstructured::new(&bytes));
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
