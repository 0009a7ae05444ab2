//! Random programs: Kaa does what CPython does, and the same every time.
//!
//! Programs of several cells are drawn from a grammar of most of the language and much of its library
//! (`differential/grammar.rs`), the same ones on every run. The session's state goes through all cells of
//! a program, and a last one shows all of it.
//!
//! - *Against CPython:* each program runs in a session of Kaa and in the machine's own `python3` (3.11 or
//!   newer; the guest is 3.15). Output, value, outcome, and the exception's type and message have to be
//!   the same; the few words that versions put differently are a table (`differential/cpython.rs`). Where
//!   there is no such Python the test is ignored, unless `KAA_REQUIRE` names `cpython`.
//! - *Against itself:* with a seed and a fixed clock each program has to do the same to the byte and to
//!   the unit of fuel: in a slot used before and in a new one, on other threads, beside load, in another
//!   process.
//!
//! A program that fails is shrunk, and printed as it can be pasted into a Python.
//!
//! | variable | |
//! |---|---|
//! | `KAA_DIFFERENTIAL_CASES` | how many programs, at least 1; without it 250, and a quarter of them for the fuel |
//! | `KAA_DIFFERENTIAL_SEED` | a number, of what is drawn; without it always the same |

mod common;
#[path = "differential/cpython.rs"]
mod cpython;
#[path = "differential/grammar.rs"]
mod grammar;
#[path = "common/law.rs"]
mod law;
#[path = "common/required.rs"]
mod required;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use common::{image, runtime};
use cpython::{Did, Reference, same};
use grammar::{Kinds, PRELUDE, PROBE, statement};
use kaa::{
    Backend, Clock, Environment, EnvironmentExt, EnvironmentOptions, Execution, Image, Limits,
    LocalBackend, LocalOptions, Outcome, Policy, Runtime, WasmBackend,
};
use law::{compare, fault, kaa, report, runner, seen};
use libtest_mimic::{Arguments, Failed, Trial};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

const CASES: &str = "KAA_DIFFERENTIAL_CASES";
const SEED: &str = "KAA_DIFFERENTIAL_SEED";

const CASES_DEFAULT: u32 = 250;
/// Sessions of processes take a tenth of a second each.
const CASES_LOCAL: u32 = 20;
/// Each is two processes.
const CASES_PROCESS: u32 = 4;
const CELLS_MAX: usize = 5;
const STATEMENTS_MAX: usize = 5;
/// Choices that a statement takes at most; beyond them it's as simple as can be.
const CHOICES_MAX: usize = 48;
/// What is usual: a grammar whose cells nearly all fail, or never, tests little.
const RAISED_PERCENT: std::ops::RangeInclusive<usize> = 8..=35;

fn main() -> ExitCode {
    let trials = vec![
        required::trial("cpython", "wasm_does_what_cpython_does", cpython::find, |()| {
            against_cpython(&wasm(), cases(), true)
        }),
        required::trial("cpython", "local_does_what_cpython_does", cpython::find, |()| {
            let path = std::env::var("PATH")?;
            let local = LocalBackend::new(LocalOptions { path, ..LocalOptions::default() });
            against_cpython(&local, CASES_LOCAL.min(cases()), false)
        }),
        Trial::test("every_run_is_the_same_to_the_unit_of_fuel", the_same_every_time),
        Trial::test("another_process_spends_the_same_fuel", in_another_process),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// The number in a variable, if that is there.
fn number(variable: &str) -> Option<u32> {
    let text = std::env::var_os(variable)?;
    let number = text.to_str().and_then(|text| text.parse().ok());
    Some(number.unwrap_or_else(|| panic!("{variable} is {text:?}, and no number")))
}

fn cases() -> u32 {
    let cases = number(CASES).unwrap_or(CASES_DEFAULT);
    assert!(
        cases > 0,
        "{CASES} is 0, but no programs show nothing: take 1 or more, or leave it out"
    );
    cases
}

fn seed() -> Option<u32> {
    number(SEED)
}

/// The choices of a program: of its cells, of their statements.
type Choices = Vec<Vec<Vec<u8>>>;

fn choices() -> impl Strategy<Value = Choices> {
    let one = prop::collection::vec(any::<u8>(), 0..CHOICES_MAX);
    let cell = prop::collection::vec(one, 1..=STATEMENTS_MAX);
    prop::collection::vec(cell, 1..=CELLS_MAX)
}

/// The program that they come to, and what its statements are of.
fn program(choices: &Choices) -> (Vec<String>, Kinds) {
    let mut kinds = Kinds::new();
    let mut cell = |choices: &Vec<Vec<u8>>| -> String {
        let lines: Vec<String> =
            choices.iter().map(|choices| statement(choices, &mut kinds)).collect();
        lines.join("\n")
    };
    let mut cells: Vec<String> = choices.iter().map(&mut cell).collect();
    cells.push(PROBE.to_owned());
    (cells, kinds)
}

fn executor() -> &'static tokio::runtime::Runtime {
    static EXECUTOR: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    EXECUTOR.get_or_init(|| tokio::runtime::Runtime::new().expect("an executor"))
}

/// Sessions in which the prelude has run.
fn begun(runtime: &Runtime) -> Image {
    let base = runtime.image("base", &|_| {}).unwrap();
    executor().block_on(async {
        let mut session = runtime.environment(&base, EnvironmentOptions::default()).unwrap();
        begin(&mut session).await.unwrap();
        runtime.template(&session.snapshot().await.unwrap()).unwrap()
    })
}

async fn begin<E: Environment + ?Sized>(session: &mut E) -> Result<(), TestCaseError> {
    let begun = session.execute(PRELUDE).await.map_err(|error| fault(&error))?;
    prop_assert_eq!(begun.outcome, Outcome::Completed, "{}", begun.stderr.text());
    Ok(())
}

fn wasm() -> WasmBackend {
    WasmBackend::new(Arc::clone(runtime()), begun(runtime()))
}

/// Counts of what was run.
#[derive(Default)]
struct Coverage {
    programs: usize,
    cells: usize,
    raised: usize,
    kinds: BTreeMap<&'static str, usize>,
}

fn against_cpython(backend: &dyn Backend, cases: u32, is_begun: bool) -> Result<(), Failed> {
    let started = Instant::now();
    let reference = Mutex::new(Reference::start()?);
    let coverage = Mutex::new(Coverage::default());
    let result = runner(cases, seed()).run(&choices(), |choices| {
        let (cells, kinds) = program(&choices);
        let expected = {
            let all: Vec<String> =
                std::iter::once(PRELUDE.to_owned()).chain(cells.clone()).collect();
            reference.lock().unwrap().run(&all).map_err(TestCaseError::fail)?.split_off(1)
        };
        let found = executor().block_on(async {
            let options = EnvironmentOptions::default();
            let mut session = backend.open(options).await.map_err(|error| fault(&error))?;
            if !is_begun {
                begin(&mut *session).await?;
            }
            let mut found = Vec::new();
            for cell in &cells {
                let execution = session.execute(cell).await.map_err(|error| fault(&error))?;
                found.push(Did::from(&execution));
            }
            Ok::<_, TestCaseError>(found)
        })?;
        let mut coverage = coverage.lock().unwrap();
        coverage.programs += 1;
        coverage.cells += cells.len() - 1;
        coverage.raised += expected[..cells.len() - 1].iter().filter(|did| did.raised()).count();
        for kind in kinds {
            *coverage.kinds.entry(kind).or_default() += 1;
        }
        drop(coverage);
        for (number, (found, expected)) in found.iter().zip(&expected).enumerate() {
            if !same(found, expected) {
                let shown = cells[..=number].join("\n# ---\n");
                let reason = format!(
                    "after the prelude:\n{shown}\n\nKaa:     {found:?}\nCPython: {expected:?}"
                );
                return Err(TestCaseError::fail(reason));
            }
        }
        Ok(())
    });
    report(result);
    let coverage = coverage.into_inner().unwrap();
    let share = 100 * coverage.raised / coverage.cells;
    eprintln!(
        "{}: {} programs, {} cells of which {share} % raised, {:.0?}; statements {:?}",
        backend.capabilities().backend,
        coverage.programs,
        coverage.cells,
        started.elapsed(),
        coverage.kinds
    );
    if cases >= CASES_DEFAULT {
        assert!(RAISED_PERCENT.contains(&share), "{share} % of the cells raise");
        for kind in grammar::kinds() {
            assert!(coverage.kinds.contains_key(kind), "no statement is of {kind}");
        }
    }
    Ok(())
}

/// Reproducible to the byte.
fn reproducible() -> EnvironmentOptions {
    let policy = Policy {
        seed: Some(5),
        clock: Clock::Fixed(1_700_000_000_000_000_000),
        ..Policy::default()
    };
    let limits = Limits { fuel: 20_000_000_000, ..Limits::default() };
    EnvironmentOptions { policy, limits, ..EnvironmentOptions::default() }
}

async fn run_in(runtime: &Runtime, image: &Image, cells: &[String]) -> kaa::Result<Vec<String>> {
    let mut session = runtime.environment(image, reproducible())?;
    let mut all = Vec::new();
    for cell in cells {
        all.push(seen(&session.execute(cell).await?));
    }
    Ok(all)
}

fn the_same_every_time() -> Result<(), Failed> {
    let cases = (cases() / 4).max(1);
    let begun = begun(runtime());
    let stop = Arc::new(AtomicBool::new(false));
    let busy: Vec<_> = (0..2).map(|_| executor().spawn(load(Arc::clone(&stop)))).collect();
    let cells = std::cell::Cell::new(0);
    let started = Instant::now();
    let result = runner(cases, seed()).run(&choices(), |choices| {
        let (program, _) = program(&choices);
        let run = |session: &Runtime, image: &Image| -> Result<Vec<String>, TestCaseError> {
            executor().block_on(run_in(session, image, &program)).map_err(|error| fault(&error))
        };
        let expected = run(runtime(), &begun)?;
        compare("in a slot used before", &program, &run(runtime(), &begun)?, &expected)?;
        let (image, cells_of) = (begun.clone(), program.clone());
        let elsewhere = executor().spawn(async move { run_in(runtime(), &image, &cells_of).await });
        let elsewhere = executor().block_on(elsewhere).expect("the task");
        let elsewhere = elsewhere.map_err(|error| fault(&error))?;
        compare("on another thread", &program, &elsewhere, &expected)?;
        let fresh = executor().block_on(async {
            // While these live no slot is free: they are more than an image keeps.
            let open = |_| runtime().environment(&begun, reproducible());
            let _others = (0..SLOTS).map(open).collect::<kaa::Result<Vec<_>>>()?;
            run_in(runtime(), &begun, &program).await
        });
        let fresh = fresh.map_err(|error| fault(&error))?;
        compare("in a new slot", &program, &fresh, &expected)?;
        cells.set(cells.get() + program.len());
        Ok(())
    });
    stop.store(true, Ordering::Release);
    for task in busy {
        executor().block_on(task)?;
    }
    report(result);
    eprintln!(
        "fuel: {cases} programs, {} cells, four times each, {:.0?}",
        cells.get(),
        started.elapsed()
    );
    Ok(())
}

/// Slots that an image keeps at most, and one.
const SLOTS: usize = 33;

/// Others, who compute all the time.
async fn load(stop: Arc<AtomicBool>) {
    let code = "x = [str(n) * 3 for n in range(20_000)]; sorted(x)[0]";
    while !stop.load(Ordering::Acquire) {
        let options = EnvironmentOptions::default();
        let mut session = runtime().environment(&image("base"), options).unwrap();
        let done: Execution = session.execute(code).await.unwrap();
        assert_eq!(done.outcome, Outcome::Completed);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn in_another_process() -> Result<(), Failed> {
    let here = tempfile::tempdir()?;
    let result = runner(CASES_PROCESS, seed()).run(&choices(), |choices| {
        let (mut program, _) = program(&choices);
        program.insert(0, PRELUDE.to_owned());
        let run = || kaa(here.path(), &["--seed=5", "--fixed-clock=1700000000"], &program);
        prop_assert_eq!(run(), run());
        Ok(())
    });
    report(result);
    Ok(())
}
