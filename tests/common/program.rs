//! The program as its user runs it: a directory, variables, command lines, and what they must do.

#![allow(dead_code, reason = "every user of this needs a part of it")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// A script that searches its context by a cell, and answers.
pub(crate) const ANSWERS: &str = r#"{
    "rules": [{"contains": "kaa-42", "response": "FINAL(found kaa-42)"}],
    "default": {"response": "```repl\nprint([line for line in context.split('\\n') if 'needle' in line])\n```"}
}"#;

/// What one command line must do: `stdout` is all of it, and stderr has every one of these parts.
pub(crate) struct Case<'a> {
    pub(crate) words: &'a str,
    pub(crate) cells: &'a [&'a str],
    pub(crate) stdin: &'a str,
    pub(crate) code: i32,
    pub(crate) stdout: &'a str,
    pub(crate) stderr: &'a [&'a str],
}

/// One that succeeds.
pub(crate) fn ok<'a>(words: &'a str, cells: &'a [&'a str], stdout: &'a str) -> Case<'a> {
    Case { words, cells, stdin: "", code: 0, stdout, stderr: &[] }
}

/// One that ends with `code` and prints nothing.
pub(crate) fn fails<'a>(
    words: &'a str,
    cells: &'a [&'a str],
    code: i32,
    stderr: &'a [&'a str],
) -> Case<'a> {
    Case { words, cells, stdin: "", code, stdout: "", stderr }
}

/// A directory in which the program runs, and what every one of its command lines begins with.
pub(crate) struct Place {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) backend: String,
    /// Variables beside those of the tests.
    pub(crate) variables: Vec<(String, String)>,
    /// What becomes the program, with its arguments, if that isn't started as it is.
    pub(crate) launcher: Vec<String>,
    /// What no output may show.
    pub(crate) hidden: Vec<String>,
}

impl Place {
    pub(crate) fn new(backend: impl Into<String>) -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            backend: backend.into(),
            variables: Vec::new(),
            launcher: Vec::new(),
            hidden: Vec::new(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn set(&mut self, variable: &str, value: impl Into<String>) {
        self.variables.push((variable.to_owned(), value.into()));
    }

    /// Starts `command WORDS`, on the place's backend unless the words name one.
    pub(crate) fn spawn(&self, words: &str, cells: &[&str]) -> Child {
        let mut line = self.launcher.iter().map(String::as_str).chain([env!("CARGO_BIN_EXE_kaa")]);
        let mut command = Command::new(line.next().unwrap());
        command.args(line);
        let (name, rest) = words.split_once(' ').unwrap_or((words, ""));
        let directory: &Path = self.directory.path();
        // Empty: nothing that isn't in WebAssembly needs anything of it.
        command.current_dir(directory).env("KAA_CACHE", directory.join("cache")).arg(name);
        // Nobody's account at Modal is used.
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("MODAL_") {
                command.env_remove(variable);
            }
        }
        command.env("MODAL_CONFIG_PATH", directory.join("no.toml"));
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        if ["run", "repl", "complete"].contains(&name) && !rest.contains("--backend") {
            command.args(self.backend.split_whitespace());
        }
        command.args(rest.split_whitespace());
        command.args(cells.iter().flat_map(|cell| ["-c", cell]));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// Runs `command WORDS` to its end.
    pub(crate) fn run(&self, words: &str, cells: &[&str], stdin: &str) -> Output {
        let mut child = self.spawn(words, cells);
        // A program that doesn't read closes the pipe.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        self.ended(child)
    }

    /// Waits for the end of one that was started.
    pub(crate) fn ended(&self, child: Child) -> Output {
        let output = child.wait_with_output().unwrap();
        let said = text(&output.stdout) + &text(&output.stderr);
        for hidden in &self.hidden {
            assert!(!said.contains(hidden), "{hidden} is shown: {said}");
        }
        output
    }

    pub(crate) fn check(&self, cases: &[Case<'_>]) {
        for case in cases {
            let output = self.run(case.words, case.cells, case.stdin);
            let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
            let seen =
                format!("{} {:?}\nstdout: {stdout}\nstderr: {stderr}", case.words, case.cells);
            assert_eq!(output.status.code(), Some(case.code), "{seen}");
            assert_eq!(stdout, case.stdout, "{seen}");
            for part in case.stderr {
                assert!(stderr.contains(part), "{part:?} is not in stderr of {seen}");
            }
        }
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
