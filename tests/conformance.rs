//! The suite over Kaa's own backends, and its plain cases on CPython.
//!
//! One test for each case on each backend: `wasm::state`, `cpython::state`.

#[path = "conformance/backends.rs"]
mod backends;
#[path = "common/modal.rs"]
mod cloud;
mod common;
#[path = "common/docker.rs"]
mod lab;
#[path = "conformance/liar.rs"]
mod liar;
#[path = "conformance/nothing.rs"]
mod nothing;
#[path = "common/required.rs"]
mod required;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use backends::executor;
use kaa::Backend;
use kaa::conformance::{Case, Differences, Verdict, cases, run, run_plain};
use liar::{Liar, Lie};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::sync::Semaphore;

fn main() -> ExitCode {
    let all: &'static [Case] = files().leak();
    let table = std::fs::read_to_string(directory().join("differences.toml")).unwrap();
    let differences = Differences::parse(&table, all).unwrap_or_else(|error| panic!("{error}"));
    let differences: &'static Differences = Box::leak(Box::new(differences));
    let mut trials = Vec::new();
    for row in backends::ALL {
        let places: &'static Semaphore = Box::leak(Box::new(Semaphore::new(row.most)));
        trials.extend(all.iter().filter(|case| (row.has)(case)).map(|case| {
            let name = format!("{}::{}", row.name, case.name());
            required::trial(row.name, name, row.find, move |backend: &Arc<dyn Backend>| {
                let verdict = executor().block_on(async {
                    let _place = places.acquire().await;
                    run(case, &**backend, differences).await
                });
                verdict.map(drop).map_err(|failure| Failed::from(failure.to_string()))
            })
        }));
    }
    trials.extend(all.iter().filter(|case| case.is_plain()).map(|case| {
        let name = format!("cpython::{}", case.name());
        required::trial("cpython", name, backends::cpython, move |python: &PathBuf| {
            let verdict = executor().block_on(run_plain(case, python));
            verdict.map(drop).map_err(|failure| Failed::from(failure.to_string()))
        })
    }));
    trials.push(Trial::test("suite::every_file_is_in_it", || every_file_is_in_the_suite(all)));
    trials.push(Trial::test("suite::the_tables_are_current", || the_tables_are_current(all)));
    trials.push(required::trial("wasm", "suite::lies_are_noticed", backends::wasm, |backend| {
        lies_are_noticed(backend, all)
    }));
    trials.push(Trial::test("suite::a_backend_of_others_is_judged", || {
        a_backend_of_others_is_judged(all)
    }));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases")
}

/// The cases as they are in the directory, so that a new one can be run before the suite has it.
fn files() -> Vec<Case> {
    let entries = std::fs::read_dir(directory()).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|ending| ending == "py")).collect();
    paths.sort_unstable();
    let read = |path: &PathBuf| {
        let name = path.file_stem().unwrap().to_str().unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        Case::parse(name, &text).unwrap_or_else(|error| panic!("{error}"))
    };
    paths.iter().map(read).collect()
}

fn every_file_is_in_the_suite(files: &[Case]) -> Result<(), Failed> {
    let files: Vec<&str> = files.iter().map(Case::name).collect();
    let cases = cases()?;
    let names: Vec<&str> = cases.iter().map(Case::name).collect();
    assert_eq!(names, files, "the list in src/conformance/embedded.rs is that of tests/cases");
    Differences::own(&cases)?;
    Ok(())
}

fn the_tables_are_current(all: &[Case]) -> Result<(), Failed> {
    let table = std::fs::read_to_string(directory().join("differences.toml"))?;
    let tables = Differences::parse(&table, all)?.to_markdown(all);
    let readme = std::fs::read_to_string(directory().join("README.md"))?;
    if readme.ends_with(&format!("-->\n\n{tables}")) {
        return Ok(());
    }
    Err(format!("tests/cases/README.md has to end with\n\n{tables}").into())
}

/// One that can do nothing fails nearly everything, but refuses as it should what it says it lacks.
fn a_backend_of_others_is_judged(all: &[Case]) -> Result<(), Failed> {
    let judge = |name: &str| {
        let case = all.iter().find(|case| case.name() == name).expect("there is such a case");
        executor().block_on(run(case, &nothing::Nothing, &Differences::none()))
    };
    assert_eq!(judge("limit_fuel"), Ok(Verdict::Lacks("fuel")));
    assert_eq!(judge("tools_limit").map_err(|failure| failure.step()), Err(1));
    let text = judge("state").unwrap_err().to_string();
    let expected = "state on nothing, step 2 (tests/cases/state.py:17):\n";
    assert!(text.starts_with(expected), "{text}");
    for part in ["expected \"raised\"", "found    \"completed\"", "division by zero"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    for case in all.iter().filter(|case| case.is_plain()) {
        assert!(judge(case.name()).is_err(), "{} passes a backend that does nothing", case.name());
    }
    Ok(())
}

/// `(lie, the case that has to notice it)`.
const LIES: &[(Lie, &str)] = &[
    (Lie::Stdout, "state"),
    (Lie::Streams, "output_streams"),
    (Lie::Outcome, "exceptions"),
    (Lie::Message, "exceptions"),
    (Lie::Value, "value"),
    (Lie::RolledBack, "limit_hard"),
    (Lie::Fuel, "limit_fuel"),
    (Lie::Fuel, "state"),
    (Lie::Rollback, "limit_hard"),
    (Lie::Rollback, "drop"),
    (Lie::Set, "variables_names"),
    (Lie::Index, "contexts"),
    (Lie::Status, "reset"),
    (Lie::Restore, "snapshot_restore"),
    (Lie::Fork, "fork"),
    (Lie::LmCalls, "lm_calls"),
    (Lie::Truncated, "output_cap"),
    (Lie::Answer, "answer"),
    (Lie::Wall, "waiting"),
];

/// The suite fails a backend that keeps most of the contract, and passes the one that it lies about.
fn lies_are_noticed(backend: &Arc<dyn Backend>, all: &[Case]) -> Result<(), Failed> {
    let play = |lie, case: &Case| {
        let liar = Liar { inner: Arc::clone(backend), lie };
        executor().block_on(run(case, &liar, &Differences::none()))
    };
    for (lie, name) in LIES {
        let case = all.iter().find(|case| case.name() == *name).expect("there is such a case");
        assert_eq!(play(Lie::Nothing, case), Ok(Verdict::Passed), "{name}");
        if let Ok(verdict) = play(*lie, case) {
            return Err(format!("{name} did not notice the lie {lie:?}: {verdict:?}").into());
        }
    }
    Ok(())
}
