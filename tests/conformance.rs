//! The suite over Kaa's own backends, and its plain cases on CPython.
//!
//! One test for each case on each backend: `wasm::state`, `cpython::state`.

mod common;
#[path = "common/required.rs"]
mod required;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, OnceLock};

use kaa::conformance::{Case, Differences, cases, run, run_plain};
use kaa::{Backend, WasmBackend};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

/// What the suite runs over, or why it isn't here.
type Found<T> = &'static Result<T, String>;

/// A backend of the suite.
struct Row {
    name: &'static str,
    /// Cases at once.
    most: usize,
    find: fn() -> Found<Arc<dyn Backend>>,
}

const BACKENDS: &[Row] = &[Row { name: "wasm", most: 4, find: wasm }];

fn wasm() -> Found<Arc<dyn Backend>> {
    static FOUND: OnceLock<Result<Arc<dyn Backend>, String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let runtime = Arc::clone(common::runtime());
        Ok(Arc::new(WasmBackend::new(runtime, common::image("base"))))
    })
}

/// The host's CPython, if it's new enough for the language of the cases.
fn cpython() -> Found<PathBuf> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let script = "import sys; sys.exit(sys.version_info < (3, 11))";
        let status =
            Command::new("python3").args(["-I", "-c", script]).stdin(Stdio::null()).status();
        match status {
            Ok(status) if status.success() => Ok(PathBuf::from("python3")),
            _ => Err("there is no `python3` of 3.11 or newer".into()),
        }
    })
}

fn executor() -> &'static Runtime {
    static EXECUTOR: OnceLock<Runtime> = OnceLock::new();
    EXECUTOR.get_or_init(|| Runtime::new().expect("an executor"))
}

fn main() -> ExitCode {
    let all: &'static [Case] = files().leak();
    let table = std::fs::read_to_string(directory().join("differences.toml")).unwrap();
    let differences = Differences::parse(&table, all).unwrap_or_else(|error| panic!("{error}"));
    let differences: &'static Differences = Box::leak(Box::new(differences));
    let mut trials = Vec::new();
    for row in BACKENDS {
        let places: &'static Semaphore = Box::leak(Box::new(Semaphore::new(row.most)));
        trials.extend(all.iter().map(|case| {
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
        required::trial("cpython", name, cpython, move |python: &PathBuf| {
            let verdict = executor().block_on(run_plain(case, python));
            verdict.map(drop).map_err(|failure| Failed::from(failure.to_string()))
        })
    }));
    trials.push(Trial::test("suite::every_file_is_in_it", || every_file_is_in_the_suite(all)));
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
