//! Reading a case: front matter, steps, and what each of them has to give.

use std::collections::BTreeSet;

use serde_json::Value as Json;

use super::expect::{CELL, Expectations};
use super::setup::Setup;
use super::values::{json_of, value_of};
use crate::environment::Context;
use crate::error::{Error, Result};
use crate::value::Value;

/// The session that steps run in which name none.
pub(super) const MAIN: &str = "main";
/// What a case may need that a backend can say it lacks: the fields of
/// [`Capabilities`](crate::Capabilities).
pub(super) const NEEDS: &[&str] = &["fuel", "rollback", "snapshot", "deterministic"];

const VERBS: &str = "cell, set, get, vars, context, history, usage, tool, interrupt, snapshot, \
                     restore, fork, open, reset and close";

/// One case of the suite: cells and other steps, and what has to come of them.
///
/// The form of its text is in `tests/cases/README.md`.
#[derive(Debug, Clone)]
pub struct Case {
    name: String,
    pub(super) front: Front,
    pub(super) steps: Vec<Step>,
}

/// What a case says about itself, and what its session is opened with.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Front {
    pub(super) title: String,
    #[serde(default)]
    pub(super) contract: Vec<String>,
    #[serde(default)]
    pub(super) plain: bool,
    #[serde(default)]
    pub(super) needs: Vec<String>,
    #[serde(default)]
    pub(super) session: Setup,
}

#[derive(Debug, Clone)]
pub(super) struct Step {
    /// Where it is in the file, from 1.
    pub(super) line: usize,
    pub(super) session: String,
    pub(super) action: Action,
    pub(super) expected: Expectations,
}

#[derive(Debug, Clone)]
pub(super) enum Action {
    Cell { code: String, how: How },
    Set { name: String, value: Value },
    Get { name: String },
    Variables,
    Context { index: Option<u32>, context: Context },
    History { index: Option<u32>, messages: Json },
    Usage,
    Tool { tool: String, name: String },
    Interrupt,
    Snapshot { name: String },
    Restore { name: String },
    Fork { name: String },
    Open { name: String, setup: Box<Setup> },
    Reset,
    Close,
}

impl Action {
    /// What it observes, besides what every step does.
    pub(super) fn keys(&self) -> &'static [&'static str] {
        match self {
            Self::Cell { .. } => CELL,
            Self::Get { .. } => &["found", "value"],
            Self::Variables => &["names", "variables"],
            Self::Context { .. } | Self::History { .. } => &["index"],
            Self::Usage => &["calls", "models"],
            Self::Set { .. }
            | Self::Tool { .. }
            | Self::Interrupt
            | Self::Snapshot { .. }
            | Self::Restore { .. }
            | Self::Fork { .. }
            | Self::Open { .. }
            | Self::Reset
            | Self::Close => &[],
        }
    }
}

/// How a cell is run.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct How {
    /// Limits for this cell instead of its session's.
    #[serde(default)]
    pub(super) limits: Option<super::setup::LimitsSetup>,
    #[serde(default)]
    pub(super) interrupt_after_ms: Option<u64>,
    #[serde(default)]
    pub(super) drop_after_ms: Option<u64>,
}

impl Case {
    /// Reads a case.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] naming the case, the line, and what is wrong there.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let invalid = |line: usize, reason: String| {
            Error::invalid(format!("case `{name}`, line {line}"), reason)
        };
        let lines: Vec<&str> = text.lines().collect();
        let (front, mut at) = front_of(&lines).map_err(|(line, reason)| invalid(line, reason))?;
        let mut steps = Vec::new();
        while at < lines.len() {
            if lines[at].trim().is_empty() {
                at += 1;
                continue;
            }
            let rest = &lines[at + 1..];
            let length = rest.iter().position(|line| is_head(line)).unwrap_or(rest.len());
            let step = step_of(lines[at], &rest[..length], at + 1)
                .map_err(|(line, reason)| invalid(line, reason))?;
            steps.push(step);
            at += 1 + length;
        }
        let case = Self { name: name.to_owned(), front, steps };
        case.check().map_err(|(line, reason)| invalid(line, reason))?;
        Ok(case)
    }

    /// What makes no sense only as a whole.
    fn check(&self) -> Result<(), (usize, String)> {
        let front = &self.front;
        if self.steps.is_empty() {
            return Err((1, "it has no steps; one begins with a line `# %%`".into()));
        }
        if let Some(need) = front.needs.iter().find(|need| !NEEDS.contains(&need.as_str())) {
            return Err((1, format!("unknown need `{need}`; known are {}", NEEDS.join(", "))));
        }
        let known: BTreeSet<&str> = super::CONTRACT.iter().map(|(id, _)| *id).collect();
        if let Some(id) = front.contract.iter().find(|id| !known.contains(id.as_str())) {
            return Err((1, format!("the contract has no sentence `{id}`")));
        }
        for step in &self.steps {
            let Action::Cell { how, .. } = &step.action else {
                if front.plain {
                    return Err((step.line, "a plain case has cells and nothing else".into()));
                }
                continue;
            };
            let rolls_back = step.expected.is("rolled_back", &true.into());
            if (rolls_back || how.drop_after_ms.is_some()) && !self.needs("rollback") {
                let reason = "a cell that is rolled back or dropped needs \"rollback\"";
                return Err((step.line, reason.into()));
            }
        }
        Ok(())
    }

    /// Its name: that of its file, without the ending.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it shows, as a sentence.
    #[must_use]
    pub fn title(&self) -> &str {
        &self.front.title
    }

    /// The sentences of the contract that it is a case of, by the ids in [`CONTRACT`](super::CONTRACT).
    pub fn contract(&self) -> impl Iterator<Item = &str> {
        self.front.contract.iter().map(String::as_str)
    }

    /// Whether plain CPython can run it: see [`run_plain`](super::run_plain).
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.front.plain
    }

    /// Whether it needs this field of [`Capabilities`](crate::Capabilities).
    #[must_use]
    pub fn needs(&self, capability: &str) -> bool {
        self.front.needs.iter().any(|need| need == capability)
    }
}

fn is_head(line: &str) -> bool {
    line == "# %%" || line.starts_with("# %% ")
}

type Wrong = (usize, String);

/// The front matter, and where the steps begin.
fn front_of(lines: &[&str]) -> Result<(Front, usize), Wrong> {
    if lines.first() != Some(&"# /// case") {
        return Err((1, "a case begins with a line `# /// case`".into()));
    }
    let end = lines.iter().position(|line| *line == "# ///");
    let end = end.ok_or((1, "no line `# ///` ends the front matter".to_owned()))?;
    let toml = uncommented(&lines[1..end], "#", 2)?;
    let front = toml::from_str(&toml).map_err(|error| (1, error.message().to_owned()))?;
    let rest = &lines[end + 1..];
    let start = rest.iter().position(|line| !line.trim().is_empty()).unwrap_or(rest.len());
    if rest.get(start).is_some_and(|line| !is_head(line)) {
        return Err((end + start + 2, "a step begins with a line `# %%`".into()));
    }
    Ok((front, end + 1 + start))
}

/// Lines without the mark that begins each of them, and one space.
fn uncommented(lines: &[&str], mark: &str, first: usize) -> Result<String, Wrong> {
    let mut text = String::new();
    for (at, line) in lines.iter().enumerate() {
        let rest = line.strip_prefix(mark);
        let rest = rest.ok_or_else(|| (first + at, format!("a line here begins with `{mark}`")))?;
        text.push_str(rest.strip_prefix(' ').unwrap_or(rest));
        text.push('\n');
    }
    Ok(text)
}

/// A step: its head, and the lines up to the next one.
fn step_of(head: &str, body: &[&str], line: usize) -> Result<Step, Wrong> {
    let here = |reason: String| (line, reason);
    let (session, verb, rest) = split_head(head);
    let first = body.iter().position(|text| text.starts_with("#:")).unwrap_or(body.len());
    let (code, rest_of_body) = body.split_at(first);
    let last = rest_of_body.iter().rposition(|text| text.starts_with("#:")).map_or(0, |at| at + 1);
    let (expected, after) = rest_of_body.split_at(last);
    if after.iter().any(|text| !text.trim().is_empty()) {
        let reason = "code comes before what is expected of it, which ends the step";
        return Err((line + first + last + 1, reason.into()));
    }
    let action = action_of(verb, rest, code.join("\n").trim_end()).map_err(here)?;
    let toml = uncommented(expected, "#:", line + first + 1)?;
    let table: toml::Table =
        toml.parse().map_err(|error: toml::de::Error| (line + first + 1, error.to_string()))?;
    let mut expected =
        Expectations::parse(&table, action.keys()).map_err(|reason| (line + first + 1, reason))?;
    match &action {
        Action::Cell { .. } => expected.complete_cell(),
        // The environment is gone.
        Action::Close => {}
        _ => expected.complete_common(),
    }
    Ok(Step { line, session: session.to_owned(), action, expected })
}

/// `# %% [in SESSION] [VERB [rest]]`.
fn split_head(head: &str) -> (&str, &str, &str) {
    let text = head.trim_start_matches("# %%").trim();
    let (session, text) = match text.strip_prefix("in ") {
        Some(rest) => rest.trim_start().split_once(' ').unwrap_or((rest.trim_start(), "")),
        None => (MAIN, text),
    };
    let text = text.trim_start();
    let end = text.find([' ', '=']).unwrap_or(text.len());
    let (verb, rest) = text.split_at(end);
    (session, if verb.is_empty() { "cell" } else { verb }, rest.trim())
}

/// `NAME`, `NAME = VALUE`, `= VALUE` or nothing.
fn argument(rest: &str) -> Result<(Option<String>, Option<toml::Value>), String> {
    if rest.is_empty() {
        return Ok((None, None));
    }
    let has_name = !rest.starts_with('=');
    let has_value = toml_table(rest).is_ok() || !has_name;
    let text = match (has_name, has_value) {
        (true, true) => rest.to_owned(),
        (true, false) => format!("{rest} = 0"),
        (false, _) => format!("it {rest}"),
    };
    let table = toml_table(&text).map_err(|_| format!("`{rest}` is not `NAME = VALUE`"))?;
    let mut entries = table.into_iter();
    let (Some((name, value)), None) = (entries.next(), entries.next()) else {
        return Err(format!("`{rest}` is not `NAME = VALUE`"));
    };
    Ok((has_name.then_some(name), has_value.then_some(value)))
}

fn toml_table(text: &str) -> Result<toml::Table, toml::de::Error> {
    text.parse()
}

fn action_of(verb: &str, rest: &str, code: &str) -> Result<Action, String> {
    let (name, value) = argument(rest)?;
    let has_code = code.lines().any(|line| !line.trim().is_empty() && !line.starts_with('#'));
    if has_code && verb != "cell" {
        return Err(format!("a step `{verb}` has no code"));
    }
    let need = |what: &str| format!("`{verb}` takes {what}");
    let index = || match &name {
        Some(name) => name.parse().map(Some).map_err(|_| need("a number, or nothing")),
        None => Ok(None),
    };
    let named = || name.clone().ok_or_else(|| need("a name"));
    let given = || value.as_ref().ok_or_else(|| need("`= VALUE`"));
    let read = |value: toml::Value| value.try_into().map_err(|e: toml::de::Error| e.to_string());
    let action = match verb {
        "cell" => {
            let how = value.clone().map(|value| value.try_into()).transpose();
            let how = how.map_err(|error: toml::de::Error| error.message().to_owned())?;
            Action::Cell { code: code.to_owned(), how: how.unwrap_or_default() }
        }
        "set" => Action::Set { name: named()?, value: value_of(given()?)? },
        "get" => Action::Get { name: named()? },
        "vars" => Action::Variables,
        "context" => Action::Context { index: index()?, context: context_of(given()?)? },
        "history" => Action::History { index: index()?, messages: json_of(given()?)? },
        "usage" => Action::Usage,
        "tool" => {
            let tool = named()?;
            let name = value.as_ref().and_then(toml::Value::as_str).unwrap_or(&tool).to_owned();
            Action::Tool { tool, name }
        }
        "interrupt" => Action::Interrupt,
        "snapshot" => Action::Snapshot { name: named()? },
        "restore" => Action::Restore { name: named()? },
        "fork" => Action::Fork { name: named()? },
        "open" => {
            let setup = value.clone().map_or_else(|| Ok(Setup::default()), read)?;
            Action::Open { name: named()?, setup: Box::new(setup) }
        }
        "reset" => Action::Reset,
        "close" => Action::Close,
        _ => return Err(format!("unknown step `{verb}`; known are {VERBS}")),
    };
    Ok(action)
}

/// A text, bytes, or `{"$json" = "…"}`.
fn context_of(value: &toml::Value) -> Result<Context, String> {
    if let Some(json) = value.as_table().and_then(|table| table.get("$json")) {
        let text = json.as_str().ok_or("`$json` takes a text")?;
        return Ok(Context::Json(text.as_bytes().to_vec()));
    }
    match value_of(value)? {
        Value::Str(text) => Ok(Context::Text(text.into_bytes())),
        Value::Wtf8(bytes) => Ok(Context::Text(bytes)),
        Value::Bytes(bytes) => Ok(Context::Bytes(bytes)),
        _ => Err("a context is a text, `$bytes`, or `$json`".into()),
    }
}
