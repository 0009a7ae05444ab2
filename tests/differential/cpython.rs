//! The reference: the machine's own CPython, and in which words its versions differ.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use kaa::{Execution, Outcome};
use serde_json::{Value as Json, json};

/// Runs the cells of one program; its head says how.
const CELLS: &str = include_str!("../../src/conformance/cpython.py");
const PROGRAMS: &str = include_str!("reference.py");
/// How long a program may compute; programs of the grammar take some milliseconds.
const SECONDS: u32 = 10;
/// The version from which on the grammar is understood (`except*`, `match`).
const OLDEST: &str = "3.11";

/// What a cell did that any Python has to do.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Did {
    outcome: String,
    stdout: String,
    value: Option<String>,
    exception: Option<(String, String)>,
}

impl Did {
    pub(crate) fn raised(&self) -> bool {
        self.exception.is_some()
    }
}

impl From<&Execution> for Did {
    fn from(execution: &Execution) -> Self {
        let outcome = match execution.outcome {
            Outcome::Exited { code } => format!("exited {code}"),
            // A limit is no part of the language: shown as it is, it is like nothing that CPython does.
            Outcome::LimitReached => format!("stopped by {:?}", execution.limit),
            outcome => outcome.name().to_owned(),
        };
        let exception = execution.exception.as_ref();
        Self {
            outcome,
            stdout: execution.stdout.text().into_owned(),
            value: execution.value.clone(),
            exception: exception.map(|one| (one.type_name.clone(), one.message.clone())),
        }
    }
}

/// Messages of exceptions that versions of CPython word differently: one is the other if both begin with
/// something of the same row.
const REWORDED: &[(&str, &[&str])] = &[
    // 3.14 says the same for all kinds of division.
    (
        "ZeroDivisionError",
        &["division by zero", "integer", "float", "complex", "Fraction", "0.0 cannot", "zero to a"],
    ),
    // 3.12: "iterable argument".
    ("ValueError", &["min()", "max()"]),
    // 3.14 says how many there were.
    ("ValueError", &["too many values to unpack"]),
    // 3.14 shows no value.
    ("ValueError", &["list.index(x)", "-", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]),
    // 3.15 says how many there were, and which.
    ("TypeError", &["not all arguments converted during string formatting"]),
    ("TypeError", &["%d format: a real number is required", "format argument "]),
    // 3.14 says what was expected.
    ("ValueError", &["math domain error", "expected a "]),
];

/// Whether both did the same, but for words that depend on the version.
pub(crate) fn same(one: &Did, other: &Did) -> bool {
    let (Some((kind, message)), Some((other_kind, other_message))) =
        (&one.exception, &other.exception)
    else {
        return one == other;
    };
    let begins = |text: &str, words: &[&str]| words.iter().any(|word| text.starts_with(word));
    let reworded = REWORDED
        .iter()
        .any(|(of, words)| *of == kind && begins(message, words) && begins(other_message, words));
    (&one.outcome, &one.stdout, kind) == (&other.outcome, &other.stdout, other_kind)
        && (message == other_message || reworded)
}

/// An interpreter that waits for programs.
pub(crate) struct Reference {
    process: Child,
    programs: ChildStdin,
    reports: BufReader<ChildStdout>,
}

impl Reference {
    pub(crate) fn start() -> Result<Self, String> {
        find().as_ref().map_err(Clone::clone)?;
        let mut process = Command::new("python3")
            .args(["-I", "-u", "-W", "ignore", "-c", PROGRAMS, CELLS, &SECONDS.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("starting python3: {error}"))?;
        let programs = process.stdin.take().expect("stdin is a pipe");
        let reports = BufReader::new(process.stdout.take().expect("stdout is a pipe"));
        Ok(Self { process, programs, reports })
    }

    /// What each cell did.
    pub(crate) fn run(&mut self, cells: &[String]) -> Result<Vec<Did>, String> {
        let said = |error: std::io::Error| format!("the reference: {error}");
        writeln!(self.programs, "{}", json!(cells)).map_err(said)?;
        self.programs.flush().map_err(said)?;
        let mut all = Vec::new();
        loop {
            let mut line = String::new();
            self.reports.read_line(&mut line).map_err(said)?;
            let report: Json = serde_json::from_str(&line)
                .map_err(|error| format!("the reference said {line:?}: {error}"))?;
            if report.is_null() {
                break;
            }
            all.push(did(&report));
        }
        match all.len() == cells.len() {
            true => Ok(all),
            false => Err(format!("the reference ended in cell {} of {cells:#?}", all.len() + 1)),
        }
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn did(report: &Json) -> Did {
    let text = |name: &str| report[name].as_str().map(str::to_owned);
    let outcome = match text("outcome").unwrap_or_default().as_str() {
        "exited" => format!("exited {}", report["exit_code"]),
        other => other.to_owned(),
    };
    let exception = text("exception_type").map(|kind| {
        let whole = text("exception").unwrap_or_default();
        let message = whole.strip_prefix(&format!("{kind}: ")).unwrap_or_default().to_owned();
        (kind, message)
    });
    Did { outcome, stdout: text("stdout").unwrap_or_default(), value: text("value"), exception }
}

/// The machine's Python, if it's new enough.
pub(crate) fn find() -> &'static Result<(), String> {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let numbers = OLDEST.replace('.', ", ");
        let script = format!("import sys; sys.exit(sys.version_info < ({numbers}))");
        let mut command = Command::new("python3");
        match command.args(["-I", "-c", &script]).stdin(Stdio::null()).status() {
            Ok(status) if status.success() => Ok(()),
            _ => Err(format!("there is no `python3` of {OLDEST} or newer")),
        }
    })
}
