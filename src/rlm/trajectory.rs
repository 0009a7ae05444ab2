//! What a run did, in RLM's log format: a line of JSON about the run, then one per turn.
//!
//! The format is that of `rlm.logger.RLMLogger` 0.1.3, which its visualizer reads. It differs in size:
//! RLM writes all variables, the whole context twice among them, with every block. Here variables are
//! their short `repr`, the context is in the first block only, and that with its first characters;
//! long texts are cut.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use rand::RngExt;
use serde_json::{Map, Value as Json, json};

use super::observation::cut;
use crate::environment::{Context, Execution, LmCall, Output, Variable};
use crate::lm::{UsageSummary, json_bytes};

/// Characters kept of the context, and of each prompt and response of a sub-call.
const TEXT_CHARS_MAX: usize = 10_000;
/// Characters kept of each of a block's streams: what a model sees of them by default.
const STREAM_CHARS_MAX: usize = 20_000;
/// Characters kept of all the sub-calls of a block together, as far as each keeps a few.
const CALLS_CHARS_MAX: usize = 1_000_000;
const CALL_CHARS_MIN: usize = 200;
/// Bytes of a trajectory that is kept in memory; the turns after them are not in it.
const KEPT_BYTES_MAX: usize = 16 << 20;

/// One turn, when it's over.
pub(super) struct Turn<'a> {
    pub(super) prompt: &'a [Json],
    pub(super) response: &'a str,
    /// As [`Trajectory::block`] made them.
    pub(super) blocks: Vec<Json>,
    pub(super) final_answer: Option<&'a str>,
    pub(super) time: Duration,
}

/// The record of one run.
pub(super) struct Trajectory {
    metadata: Json,
    /// Kept only for whoever asked for it.
    iterations: Option<Vec<Json>>,
    kept_bytes: usize,
    count: u32,
    file: Option<(PathBuf, File)>,
    context: Option<String>,
}

impl Trajectory {
    pub(super) fn new(metadata: Json, kept: bool) -> Self {
        let iterations = kept.then(Vec::new);
        Self { metadata, iterations, kept_bytes: 0, count: 0, file: None, context: None }
    }

    /// Writes it to a new file in this directory as well, which is made when it isn't there.
    pub(super) fn log_to(&mut self, directory: &Path) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        let time = now().strftime("%Y-%m-%d_%H-%M-%S").to_string();
        let id: u32 = rand::rng().random();
        let path = directory.join(format!("rlm_{time}_{id:08x}.jsonl"));
        let file = File::options().append(true).create_new(true).open(&path)?;
        self.file = Some((path, file));
        self.write("metadata", self.metadata.clone())
    }

    pub(super) fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|(path, _)| path.as_path())
    }

    /// What the next blocks have as their context.
    pub(super) fn set_context(&mut self, context: &Context) {
        let (Context::Text(bytes) | Context::Bytes(bytes) | Context::Json(bytes)) = context;
        // Enough for the characters that are kept, whatever they are.
        let begin = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * TEXT_CHARS_MAX)]);
        let kept: String = begin.chars().take(TEXT_CHARS_MAX).collect();
        self.context = Some(match bytes.len() - kept.len().min(bytes.len()) {
            0 => kept,
            rest => format!("{kept}... + [{rest} bytes...]"),
        });
    }

    /// The record of a block that was run.
    pub(super) fn block(&mut self, code: &str, run: &Execution, variables: &[Variable]) -> Json {
        let mut locals: Map<String, Json> = variables
            .iter()
            .filter(|variable| !is_context(&variable.name))
            .map(|variable| (variable.name.clone(), shown(variable)))
            .collect();
        if let Some(context) = self.context.take() {
            locals.insert("context".into(), context.into());
        }
        let chars =
            (CALLS_CHARS_MAX / run.lm_calls.len().max(1) / 2).clamp(CALL_CHARS_MIN, TEXT_CHARS_MAX);
        let stream = |output: &Output| cut(output.text().into_owned(), STREAM_CHARS_MAX);
        json!({
            "code": code,
            "result": {
                "stdout": stream(&run.stdout),
                "stderr": stream(&run.stderr),
                "locals": locals,
                "execution_time": run.usage.wall.as_secs_f64(),
                "rlm_calls": run.lm_calls.iter().map(|one| call(one, chars)).collect::<Vec<_>>(),
                "final_answer": run.final_answer,
            },
        })
    }

    /// Adds a turn.
    pub(super) fn add(&mut self, turn: Turn<'_>) -> io::Result<()> {
        self.count += 1;
        let entry = json!({
            "iteration": self.count,
            "prompt": turn.prompt,
            "response": turn.response,
            "code_blocks": turn.blocks,
            "final_answer": turn.final_answer,
            "iteration_time": turn.time.as_secs_f64(),
        });
        if let Some(iterations) = &mut self.iterations {
            self.kept_bytes = self.kept_bytes.saturating_add(json_bytes(&entry));
            match self.kept_bytes <= KEPT_BYTES_MAX {
                true => iterations.push(stamped("iteration", entry.clone())),
                false => self.metadata["truncated"] = true.into(),
            }
        }
        match self.file {
            Some(_) => self.write("iteration", entry),
            None => Ok(()),
        }
    }

    /// The whole trajectory, in the form of `RLMLogger.get_trajectory`.
    pub(super) fn into_json(self) -> Option<Json> {
        let iterations = self.iterations?;
        Some(json!({ "run_metadata": self.metadata, "iterations": iterations }))
    }

    /// After a failure nothing more is written: a gap would look like a turn that never was.
    fn write(&mut self, kind: &str, entry: Json) -> io::Result<()> {
        let Some((_, file)) = &mut self.file else { return Ok(()) };
        let mut line = ascii(&stamped(kind, entry).to_string());
        line.push('\n');
        let written = file.write_all(line.as_bytes());
        if written.is_err() {
            self.file = None;
        }
        written
    }
}

fn now() -> jiff::Zoned {
    Timestamp::now().to_zoned(TimeZone::UTC)
}

fn stamped(kind: &str, mut entry: Json) -> Json {
    entry["type"] = kind.into();
    entry["timestamp"] = now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string().into();
    entry
}

/// JSON without anything but ASCII, as Python writes it: there are characters that a terminal obeys, and
/// whoever looks at a log may have it on one.
fn ascii(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            ' '..='~' => text.push(c),
            // Nothing of the kind is ever outside of a string.
            _ => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| {
                let _ = write!(text, "\\u{unit:04x}");
            }),
        }
    }
    text
}

fn is_context(name: &str) -> bool {
    let number = name.strip_prefix("context_");
    name == "context" || number.is_some_and(|number| number.bytes().all(|b| b.is_ascii_digit()))
}

/// Numbers as such, everything else as its `repr`.
fn shown(variable: &Variable) -> Json {
    let number = match variable.type_name.as_str() {
        "int" | "float" => variable.repr.parse().ok().map(Json::Number),
        "bool" => Some(Json::Bool(variable.repr == "True")),
        "NoneType" => Some(Json::Null),
        _ => None,
    };
    number.unwrap_or_else(|| variable.repr.clone().into())
}

/// `RLMChatCompletion`, with the numbers of tokens that the visualizer looks for.
fn call(call: &LmCall, chars: usize) -> Json {
    let completion = &call.completion;
    let mut usage = UsageSummary::default();
    usage.add(&completion.usage);
    let mut entry = json!({
        "root_model": completion.model,
        "prompt": cut(call.prompt.to_text().into_owned(), chars),
        "response": cut(completion.response.clone(), chars),
        "usage_summary": usage.to_json(),
        "execution_time": completion.execution_time.as_secs_f64(),
        "prompt_tokens": usage.input_tokens(),
        "completion_tokens": usage.output_tokens(),
    });
    if let Some(metadata) = &completion.metadata {
        entry["metadata"] = metadata.clone();
    }
    entry
}
