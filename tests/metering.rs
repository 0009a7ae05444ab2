//! The rewritten module behaves like the original and pays for all of its work.
//!
//! What is compared, and how closely, is in `metering/differential.rs`.

#[path = "metering/differential.rs"]
mod differential;

use differential::{
    AMPLE_FUEL, End, Ended, Engines, Kind, Random, Run, Tally, check_module, smith_module,
};
use kaa::wasm::rewrite::{Instrumented, Options, instrument};
use wasmtime::{Engine, Module, Trap, Val};

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
        ("(func (export \"kaa:fuel\"))", "exports \"kaa:fuel\": names from kaa: on are"),
        // None of those that are added, but the host would take it for a global's.
        ("(func (export \"kaa:global:9\"))", "exports \"kaa:global:9\""),
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
    let twice = Options { meter: false, export_functions: vec!["a".to_owned(); 2] };
    let error = instrument(&module("(func $a)"), &twice).unwrap_err().to_string();
    assert_eq!(error, "function a is to be exported twice");
    assert!(instrument(b"\0asm", &options).is_err());
    // Each prefix of a module is an error or, where it ends between sections, a module.
    let whole = module(SHAPES[10].1);
    for length in 0..whole.len() {
        let _ = instrument(&whole[..length], &Options { meter: true, ..Options::default() });
    }
}

fn random_module(seed: u64) -> Option<Vec<u8>> {
    let mut random = Random(seed);
    let length = 1024 + (random.next() % 4096) as usize;
    let bytes: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
    let kind = Kind {
        data: seed.is_multiple_of(4),
        gc: seed.is_multiple_of(3),
        export_everything: seed % 5 < 3,
    };
    smith_module(kind, &bytes)
}
