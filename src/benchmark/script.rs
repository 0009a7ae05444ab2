//! The cells of the workloads, and what has to come of them: the same for every subject.

use std::time::Duration;

use super::workload::{CpuPart, Workload};

pub(super) const AGENT: &str = include_str!("cells/agent.py");
/// The last line of the agent's run.
pub(super) const AGENT_STDOUT: &str = "total 4215.0\n";
const RLM: &str = include_str!("cells/rlm.py");
pub(super) const RLM_ANSWER: &str = "50 needles, 20 answers";
/// Bytes of the context of [`Workload::Rlm`].
pub(super) const RLM_BYTES: usize = 5_000_000;
pub(super) const CPU: &str = include_str!("cells/cpu.py");
/// Calls of a sample of [`Workload::LlmQuery`], whose mean it is.
const CALLS: u32 = 50;
/// What every model says.
pub(super) const ANSWER: &str = "yes";
/// What begins a prompt that takes [`Workload::MODEL_TIME`] to answer.
pub(super) const SLOW: &str = "slow";
/// Contexts are made of this: 100,000 bytes with one needle in them.
const LINE: &str = "Package: kaa-0123456789\nSection: misc\nDescription: a line of a long text\n";
const LINE_BYTES: usize = 100_000;

pub(super) const FIRST_CELL: &str = "print(1+1)";
pub(super) const FIRST_STDOUT: &str = "2\n";

/// The cells of a file.
pub(super) fn cells(text: &str) -> Vec<&str> {
    text.split("# %%\n").skip(1).map(str::trim_end).collect()
}

/// Those of the loop.
pub(super) fn rlm_cells() -> Vec<&'static str> {
    cells(RLM)
}

/// A cell that asks a model again and again, and prints the seconds that one call takes.
pub(super) fn calls() -> String {
    format!(
        "import time\nstart = time.perf_counter()\nfor _ in range({CALLS}): said = llm_query('a')\n\
         end = time.perf_counter()\nassert said == '{ANSWER}', said\nprint((end - start) / {CALLS})"
    )
}

/// A cell that asks a slow model for a batch, and what it prints.
pub(super) fn batch() -> (String, String) {
    let prompts = Workload::BATCH;
    let code = format!(
        "said = llm_query_batched(['{SLOW} ' + str(n) for n in range({prompts})])\n\
         print(len(said), set(said))"
    );
    (code, format!("{prompts} {{'{ANSWER}'}}\n"))
}

/// A cell that prints the seconds that a part of the set takes, after the set has been defined.
pub(super) fn cpu(part: CpuPart) -> String {
    format!("print(seconds('{}'))", part.name())
}

/// What contexts are made of, over and over.
pub(super) fn unit_of_text() -> String {
    let mut text = LINE.repeat(LINE_BYTES / LINE.len());
    text.push_str("needle");
    let missing = LINE_BYTES - text.len();
    text.extend(std::iter::repeat_n('.', missing.saturating_sub(1)));
    text.push('\n');
    text
}

/// A text of so many bytes.
pub(super) fn text(bytes: usize) -> Vec<u8> {
    unit_of_text().into_bytes().into_iter().cycle().take(bytes).collect()
}

/// What a cell printed, as seconds.
pub(super) fn seconds(text: &str) -> Option<f64> {
    let seconds: f64 = text.trim().parse().ok()?;
    (seconds.is_finite() && seconds >= 0.0 && seconds < Duration::from_secs(86_400).as_secs_f64())
        .then_some(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_have_the_length_and_the_needles_that_the_cells_count_on() {
        let text = text(RLM_BYTES);
        assert_eq!(text.len(), RLM_BYTES);
        let needles = text.windows(6).filter(|window| window == b"needle").count();
        assert_eq!(format!("{needles} needles, 20 answers"), RLM_ANSWER);
        assert_eq!((cells(AGENT).len(), rlm_cells().len()), (10, 4));
    }
}
