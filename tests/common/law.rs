//! What tests over programs drawn at random share: how they're drawn, and when two runs are the same.

use std::path::Path;
use std::process::Command;

use kaa::{Error, Execution};
use proptest::test_runner::{
    Config, RngAlgorithm, TestCaseError, TestCaseResult, TestError, TestRng, TestRunner,
};
use serde_json::Value as Json;

/// Draws the same programs each time, others for another seed, and keeps no files about those that fail:
/// they are printed.
pub(crate) fn runner(cases: u32, seed: Option<u32>) -> TestRunner {
    let config =
        Config { cases, failure_persistence: None, max_shrink_iters: 300, ..Config::default() };
    let algorithm = RngAlgorithm::ChaCha;
    let rng = seed.map_or_else(
        || TestRng::deterministic_rng(algorithm),
        |seed| TestRng::from_seed(algorithm, &seed.to_le_bytes().repeat(8)),
    );
    TestRunner::new_with_rng(config, rng)
}

/// Fails with the smallest program that fails.
pub(crate) fn report<T: std::fmt::Debug>(result: Result<(), TestError<T>>) {
    match result {
        Ok(()) => {}
        Err(TestError::Fail(reason, drawn)) => panic!("{drawn:#?}\n{reason}"),
        Err(TestError::Abort(reason)) => panic!("{reason}"),
    }
}

pub(crate) fn fault(error: &Error) -> TestCaseError {
    TestCaseError::fail(error.to_string())
}

/// All of a cell's execution that must be the same.
pub(crate) fn seen(execution: &Execution) -> String {
    let Execution { outcome, limit, rolled_back, stdout, stderr, .. } = execution;
    let Execution { value, exception, variables, final_answer, usage, .. } = execution;
    format!(
        "{outcome:?} {limit:?} {rolled_back}\n{:?} {}\n{:?} {}\n{value:?}\n{exception:?}\n\
         {variables:?}\n{final_answer:?}\nfuel {:?}, memory {}",
        stdout.text(),
        stdout.total_bytes,
        stderr.text(),
        stderr.total_bytes,
        usage.fuel,
        usage.memory_bytes
    )
}

/// The first cell that did something else, and from where on.
pub(crate) fn compare(
    how: &str,
    program: &[String],
    found: &[String],
    law: &[String],
) -> TestCaseResult {
    for (cell, (found, law)) in program.iter().zip(found.iter().zip(law)) {
        if found != law {
            let at = found.bytes().zip(law.bytes()).take_while(|(one, other)| one == other).count();
            let from = |text: &str| {
                let bytes = &text.as_bytes()[at.saturating_sub(60)..];
                String::from_utf8_lossy(&bytes[..bytes.len().min(400)]).into_owned()
            };
            let (found, law) = (from(found), from(law));
            let reason = format!("{how}: cell {cell:?}\nis: …{found}\nshould be: …{law}");
            return Err(TestCaseError::fail(reason));
        }
    }
    Ok(())
}

/// The cells of a run of the program `kaa`, without the times, which are the machine's.
pub(crate) fn kaa(directory: &Path, flags: &[&str], program: &[String]) -> Vec<Json> {
    let output = Command::new(env!("CARGO_BIN_EXE_kaa"))
        .current_dir(directory)
        .env("KAA_CACHE", crate::common::store_root())
        .args(["run", "--json"])
        .args(flags)
        .args(program.iter().flat_map(|cell| ["-c", cell]))
        .output()
        .unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let parse = |line: &str| {
        let mut cell: Json = serde_json::from_str(line).unwrap();
        cell["cell"] = Json::Null;
        for time in ["compute_ms", "wall_ms", "host_wait_ms"] {
            cell["usage"][time] = Json::Null;
        }
        cell
    };
    let cells: Vec<Json> = stdout.lines().map(parse).collect();
    assert_eq!(cells.len(), program.len(), "{}", String::from_utf8_lossy(&output.stderr));
    cells
}
