//! What came of a step, under the names that cases use.

use std::time::Duration;

use serde_json::{Value as Json, json};

use super::expect::Observation;
use crate::environment::{Execution, Outcome, Output, Variable};
use crate::error::Error;

/// The error of a step, or that there was none.
pub(super) fn error(seen: &mut Observation, error: Option<&Error>) {
    seen.insert("error", error.map_or(Json::Null, |error| error.to_string().into()));
    seen.insert("error_kind", error.map_or(Json::Null, |error| kind(error).into()));
}

fn kind(error: &Error) -> &'static str {
    match error {
        Error::Invalid { .. } => "Invalid",
        Error::Poisoned { .. } => "Poisoned",
        Error::Closed => "Closed",
        Error::Unsupported { .. } => "Unsupported",
        Error::Quota { .. } => "Quota",
        Error::Unavailable { .. } => "Unavailable",
        Error::Incompatible { .. } => "Incompatible",
        Error::Protocol { .. } => "Protocol",
        Error::Io { .. } => "Io",
        Error::Internal(_) => "Internal",
    }
}

/// Variables as `name: type = repr`.
pub(super) fn variables(seen: &mut Observation, variables: &[Variable]) {
    let row = |one: &Variable| format!("{}: {} = {}", one.name, one.type_name, one.repr);
    seen.insert("variables", variables.iter().map(row).collect());
    seen.insert("names", variables.iter().map(|one| one.name.as_str()).collect());
}

/// Everything about a cell that ran.
pub(super) fn execution(seen: &mut Observation, execution: &Execution) {
    let Execution { outcome, exception, usage, .. } = execution;
    let exit_code = match outcome {
        Outcome::Exited { code } => json!(code),
        _ => Json::Null,
    };
    let named = exception.as_ref().map(|exception| match exception.message.as_str() {
        "" => exception.type_name.clone(),
        message => format!("{}: {message}", exception.type_name),
    });
    seen.insert("outcome", outcome.name().into());
    seen.insert("exit_code", exit_code);
    seen.insert("limit", json!(execution.limit.map(|limit| limit.name())));
    seen.insert("rolled_back", execution.rolled_back.into());
    for (name, output) in [
        (["stdout", "stdout_bytes", "stdout_kept", "stdout_truncated"], &execution.stdout),
        (["stderr", "stderr_bytes", "stderr_kept", "stderr_truncated"], &execution.stderr),
    ] {
        let [text, total, kept, truncated] = name;
        seen.insert(text, output.text().into());
        seen.insert(total, output.total_bytes.into());
        seen.insert(kept, output.bytes.len().into());
        seen.insert(truncated, output.truncated.into());
    }
    seen.insert("value", json!(execution.value));
    seen.insert("exception", json!(named));
    seen.insert("exception_type", json!(exception.as_ref().map(|one| &one.type_name)));
    seen.insert("traceback", json!(exception.as_ref().map(|one| &one.traceback)));
    seen.insert("final_answer", json!(execution.final_answer));
    seen.insert("final_answer_bytes", json!(execution.final_answer.as_ref().map(String::len)));
    variables(seen, &execution.variables);
    let new = execution.variables.iter().filter(|one| one.new);
    seen.insert("new_variables", new.map(|one| one.name.as_str()).collect());
    let calls = execution.lm_calls.iter();
    let calls = calls.map(|call| json!([call.prompt.to_text(), call.completion.response]));
    seen.insert("lm_calls", calls.collect());
    seen.insert("lm_prompts", usage.lm_calls.into());
    seen.insert("tool_calls", usage.tool_calls.into());
    seen.insert("memory_bytes", usage.memory_bytes.into());
    let ms = |time: Duration| json!(time.as_secs_f64() * 1000.0);
    seen.insert("compute_ms", ms(usage.compute));
    seen.insert("wall_ms", ms(usage.wall));
    seen.insert("host_wait_ms", ms(usage.host_wait));
}

/// What holds for every result, whatever the cell.
pub(super) fn invariants(execution: &Execution, has_fuel: bool) -> Result<(), String> {
    let Execution { outcome, exception, stdout, stderr, usage, .. } = execution;
    let cut =
        |output: &Output| output.truncated == (output.total_bytes > output.bytes.len() as u64);
    let has_exception = exception.is_some();
    let checks = [
        (cut(stdout) || stdout.truncated, "stdout is cut and not called so"),
        (cut(stderr) || stderr.truncated, "stderr is cut and not called so"),
        (*outcome != Outcome::Raised || has_exception, "a cell raised, and no exception is told"),
        (*outcome != Outcome::Completed || !has_exception, "a completed cell has an exception"),
        (usage.fuel.is_some() == has_fuel, "fuel is told though it isn't counted, or the reverse"),
        (execution.lm_calls.len() <= usage.lm_calls as usize, "more answers than LM calls"),
        (usage.wall >= usage.host_wait, "the host waited for longer than the cell took"),
    ];
    match checks.into_iter().find(|(holds, _)| !holds) {
        None => Ok(()),
        Some((_, what)) => Err(format!("{what}: {outcome:?}, {usage:?}")),
    }
}
