//! Plain cases on CPython itself: what Kaa gives has to be what Python is.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Map, Value as Json, json};
use tokio::io::AsyncWriteExt;

use super::case::{Action, Case};
use super::expect::{CELL, Observation};
use super::run::listed;
use super::{Failure, Verdict};

/// The program that runs the cells; its head says how.
const PROGRAM: &str = include_str!("cpython.py");
/// How long all cells of a case may take together.
const PATIENCE: Duration = Duration::from_secs(60);
/// What stands for the backend's name in failures.
const NAME: &str = "CPython";

/// Runs a plain case with the interpreter `python`, 3.9 or newer. Only what CPython itself defines is
/// compared: output, the last value, exceptions and exits.
///
/// # Errors
///
/// A [`Failure`] whose text says which cell gave what instead of what; also for a case that isn't
/// [plain](Case::is_plain), and when the interpreter can't be started.
pub async fn run_plain(case: &Case, python: &Path) -> Result<Verdict, Failure> {
    let failure = |step, reason: String| Failure::new(case, step, NAME, reason);
    if !case.is_plain() {
        return Err(failure(0, "the case isn't plain: CPython alone can't run it".into()));
    }
    let cells = case.steps.iter().filter_map(|step| match &step.action {
        Action::Cell { code, .. } => Some(code.as_str()),
        _ => None,
    });
    let cells: Vec<&str> = cells.collect();
    let reports = tokio::time::timeout(PATIENCE, reports(python, &cells));
    let reports = reports.await.map_err(|_| failure(0, format!("no end after {PATIENCE:?}")))?;
    let reports = reports.map_err(|reason| failure(0, reason))?;
    for (at, (step, report)) in case.steps.iter().zip(&reports).enumerate() {
        let mut seen = Observation::new();
        for (name, value) in report {
            if let Some(key) = CELL.iter().find(|key| *key == name) {
                seen.insert(key, value.clone());
            }
        }
        let mismatches = step.expected.compare_seen(&seen);
        listed(&mismatches, &seen).map_err(|reason| failure(at + 1, reason))?;
    }
    match reports.len() == case.steps.len() {
        true => Ok(Verdict::Passed),
        false => Err(failure(reports.len(), "the interpreter ended in this cell".into())),
    }
}

/// What each cell gave.
async fn reports(python: &Path, cells: &[&str]) -> Result<Vec<Map<String, Json>>, String> {
    let started = |error: std::io::Error| format!("{}: {error}", python.display());
    let mut child = tokio::process::Command::new(python)
        .args(["-I", "-u", "-c", PROGRAM])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(started)?;
    let mut stdin = child.stdin.take().ok_or("the interpreter has no stdin")?;
    stdin.write_all(json!(cells).to_string().as_bytes()).await.map_err(started)?;
    drop(stdin);
    let output = child.wait_with_output().await.map_err(started)?;
    let lines = String::from_utf8_lossy(&output.stdout);
    let reports = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>();
    reports.map_err(|error| {
        let words = String::from_utf8_lossy(&output.stderr);
        format!("{} said something else than reports: {error}\n{words}", python.display())
    })
}
