//! The floor: CPython's own `exec` in an interpreter that goes on living.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use async_trait::async_trait;
use serde_json::{Value as Json, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::script;
use super::sessions::{cold_process, pause};
use super::subject::{Facts, Missed, Subject};
use super::workload::{Block, Workload};

const MEASURER: &str = include_str!("cells/in_process.py");
/// No report is longer.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// Cells run by `exec` in one process of CPython, without any isolation: what the others are compared
/// to. A session there is a dict, a model call a function call; only what the interpreter does itself
/// takes time.
#[derive(Debug)]
pub struct InProcess {
    name: String,
    python: PathBuf,
    process: Option<Process>,
}

#[derive(Debug)]
struct Process {
    /// Ends with this.
    _child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    executable: PathBuf,
}

impl InProcess {
    /// By this interpreter: a path, or a name that is looked for on the `PATH`.
    #[must_use]
    pub fn new(python: impl Into<PathBuf>) -> Self {
        Self { name: "in-process".into(), python: python.into(), process: None }
    }

    async fn start(&self) -> Result<(Process, Facts), Missed> {
        let mut command = Command::new(&self.python);
        command.args(["-c", MEASURER]).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let failed = |error| Missed::because(format!("{}: {error}", self.python.display()));
        let mut child = command.spawn().map_err(failed)?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Missed::because("the process has no stdin and stdout"));
        };
        let mut process = Process {
            _child: child,
            stdin,
            stdout: BufReader::new(stdout),
            executable: PathBuf::new(),
        };
        let facts = process.ask(&json!({})).await?;
        let text = |key: &str| facts[key].as_str().unwrap_or_default().to_owned();
        process.executable = text("executable").into();
        let what = "`exec` in one process that goes on living";
        Ok((process, Facts::new(what, text("python"), false)))
    }

    /// What the process is told of a workload.
    fn task(workload: Workload, block: &Block) -> Json {
        let mut task = json!({
            "workload": workload.to_string(), "samples": block.samples,
            "seconds": block.time.as_secs_f64(),
        });
        let more = match workload {
            Workload::LlmQuery => json!({"code": script::calls()}),
            Workload::Batch => {
                let (code, stdout) = script::batch();
                let seconds = Workload::MODEL_TIME.as_secs_f64();
                json!({"code": code, "stdout": stdout, "model_seconds": seconds})
            }
            Workload::Context { megabytes } => {
                json!({"line": script::unit_of_text(), "bytes": u64::from(megabytes) * 1_000_000})
            }
            Workload::Agent => {
                json!({"cells": script::cells(script::AGENT), "stdout": script::AGENT_STDOUT})
            }
            Workload::Rlm => json!({
                "line": script::unit_of_text(), "bytes": script::RLM_BYTES,
                "cells": script::rlm_cells(), "answer": script::RLM_ANSWER,
            }),
            Workload::Cpu(part) => json!({"setup": script::CPU, "code": script::cpu(part)}),
            _ => Json::Null,
        };
        if let (Json::Object(task), Json::Object(more)) = (&mut task, more) {
            task.extend(more);
        }
        task
    }

    async fn cold(executable: &Path, block: &Block) -> Result<Vec<f64>, Missed> {
        let arguments = ["-c", script::FIRST_CELL].map(str::to_owned);
        let since = std::time::Instant::now();
        let mut samples = Vec::new();
        while block.goes_on(samples.len(), since) {
            samples.push(cold_process(executable, &arguments).await?);
            pause().await;
        }
        Ok(samples)
    }
}

impl Process {
    async fn ask(&mut self, task: &Json) -> Result<Json, Missed> {
        let failed = |error: std::io::Error| Missed::because(format!("its process: {error}"));
        self.stdin.write_all(format!("{task}\n").as_bytes()).await.map_err(failed)?;
        let mut line = String::new();
        let mut bounded = (&mut self.stdout).take(LINE_BYTES_MAX);
        bounded.read_line(&mut line).await.map_err(failed)?;
        serde_json::from_str(&line).map_err(|_| Missed::because("its process has ended"))
    }
}

#[async_trait]
impl Subject for InProcess {
    fn name(&self) -> &str {
        &self.name
    }

    async fn describe(&mut self) -> Result<Facts, Missed> {
        let (process, facts) = self.start().await?;
        self.process = Some(process);
        Ok(facts)
    }

    async fn measure(&mut self, workload: Workload, block: &Block) -> Result<Vec<f64>, Missed> {
        // Out of its place while it's asked: one that isn't asked to the end can't be asked again.
        let gone = || Missed::because("its process has ended");
        let mut process = self.process.take().ok_or_else(gone)?;
        if workload == Workload::Cold {
            let executable = process.executable.clone();
            self.process = Some(process);
            return Self::cold(&executable, block).await;
        }
        let said = process.ask(&Self::task(workload, block)).await?;
        self.process = Some(process);
        match (&said["samples"], &said["missed"]) {
            (Json::Array(samples), _) => Ok(samples.iter().filter_map(Json::as_f64).collect()),
            (_, Json::String(reason)) => Err(Missed::because(reason.as_str())),
            _ => Err(Missed::because("its process says nothing that could be understood")),
        }
    }

    async fn close(&mut self) {
        self.process = None;
    }
}
