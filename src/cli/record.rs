//! The JSON object of a cell, with its keys in the documented order.

use kaa::lm::{ModelUsage, Prompt};
use kaa::{Execution, LmCall, Status, Usage};
use serde::Serialize;
use serde_json::Value as Json;
use std::borrow::Cow;
use std::time::Duration;

use super::cell_code;

#[derive(Serialize)]
struct Record<'a> {
    cell: usize,
    outcome: &'static str,
    limit: Option<&'static str>,
    rolled_back: bool,
    /// Whether the session has lost its state.
    poisoned: bool,
    exit_code: i32,
    stdout: Cow<'a, str>,
    stderr: Cow<'a, str>,
    stdout_bytes: u64,
    stderr_bytes: u64,
    stdout_truncated: bool,
    stderr_truncated: bool,
    value: Option<&'a str>,
    exception: Option<ExceptionRecord<'a>>,
    variables: Vec<VariableRecord<'a>>,
    final_answer: Option<&'a str>,
    lm_calls: Vec<LmCallRecord<'a>>,
    usage: UsageRecord,
}

#[derive(Serialize)]
struct ExceptionRecord<'a> {
    #[serde(rename = "type")]
    type_name: &'a str,
    message: &'a str,
    traceback: &'a str,
}

#[derive(Serialize)]
struct VariableRecord<'a> {
    name: &'a str,
    #[serde(rename = "type")]
    type_name: &'a str,
    repr: &'a str,
}

#[derive(Serialize)]
struct LmCallRecord<'a> {
    model: &'a str,
    prompt: Cow<'a, Json>,
    response: &'a str,
    usage: Vec<ModelUsageRecord<'a>>,
    execution_ms: f64,
}

#[derive(Serialize)]
struct ModelUsageRecord<'a> {
    model: &'a str,
    calls: u64,
    input_tokens: u64,
    output_tokens: u64,
    cost: Option<f64>,
}

#[derive(Serialize)]
struct UsageRecord {
    fuel: Option<u64>,
    compute_ms: f64,
    wall_ms: f64,
    host_wait_ms: f64,
    memory_bytes: u64,
    lm_calls: u32,
}

/// The object of the cell with this number, counted from 1, as one line without its newline.
pub(super) fn line(cell: usize, execution: &Execution, status: Status) -> String {
    let record = Record {
        cell,
        outcome: execution.outcome.name(),
        limit: execution.limit.map(kaa::Limit::name),
        rolled_back: execution.rolled_back,
        poisoned: status == Status::Poisoned,
        exit_code: cell_code(execution.outcome),
        stdout: execution.stdout.text(),
        stderr: execution.stderr.text(),
        stdout_bytes: execution.stdout.total_bytes,
        stderr_bytes: execution.stderr.total_bytes,
        stdout_truncated: execution.stdout.truncated,
        stderr_truncated: execution.stderr.truncated,
        value: execution.value.as_deref(),
        exception: execution.exception.as_ref().map(|exception| ExceptionRecord {
            type_name: &exception.type_name,
            message: &exception.message,
            traceback: &exception.traceback,
        }),
        variables: execution
            .variables
            .iter()
            .map(|v| VariableRecord { name: &v.name, type_name: &v.type_name, repr: &v.repr })
            .collect(),
        final_answer: execution.final_answer.as_deref(),
        lm_calls: execution.lm_calls.iter().map(lm_call).collect(),
        usage: usage(&execution.usage),
    };
    serde_json::to_string(&record).expect("a record has only text keys")
}

fn lm_call(call: &LmCall) -> LmCallRecord<'_> {
    let completion = &call.completion;
    LmCallRecord {
        model: &completion.model,
        prompt: match &call.prompt {
            Prompt::Text(text) => Cow::Owned(Json::String(text.clone())),
            Prompt::Messages(messages) => Cow::Borrowed(messages),
        },
        response: &completion.response,
        usage: completion.usage.iter().map(model_usage).collect(),
        execution_ms: milliseconds(completion.execution_time),
    }
}

fn model_usage(usage: &ModelUsage) -> ModelUsageRecord<'_> {
    ModelUsageRecord {
        model: &usage.model,
        calls: usage.calls,
        input_tokens: usage.input_tokens,
        output_tokens: usage.output_tokens,
        cost: usage.cost,
    }
}

fn usage(usage: &Usage) -> UsageRecord {
    UsageRecord {
        fuel: usage.fuel,
        compute_ms: milliseconds(usage.compute),
        wall_ms: milliseconds(usage.wall),
        host_wait_ms: milliseconds(usage.host_wait),
        memory_bytes: usage.memory_bytes,
        lm_calls: usage.lm_calls,
    }
}

/// Milliseconds, to the microsecond.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}
