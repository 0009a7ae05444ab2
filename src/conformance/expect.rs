//! What a step of a case has to give, and where what it gave is something else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};

use serde_json::Value as Json;

use super::values::{json_of, shown, value_of};

/// What came of one step, by name. What isn't in it could not be observed.
pub(super) type Observation = BTreeMap<&'static str, Json>;

/// Characters of a value that a failure shows.
const SHOWN_CHARS_MAX: usize = 2_000;

/// What a step observes, whatever it does.
const COMMON: &[&str] = &["error", "error_kind", "status"];
/// What a cell observes.
pub(super) const CELL: &[&str] = &[
    "at_once",
    "compute_ms",
    "exception",
    "exception_type",
    "exit_code",
    "final_answer",
    "final_answer_bytes",
    "finished",
    "host_wait_ms",
    "limit",
    "lm_calls",
    "lm_prompts",
    "memory_bytes",
    "new_variables",
    "outcome",
    "rolled_back",
    "stderr",
    "stderr_bytes",
    "stderr_kept",
    "stderr_truncated",
    "stdout",
    "stdout_bytes",
    "stdout_kept",
    "stdout_truncated",
    "tool_calls",
    "traceback",
    "value",
    "variables",
    "wall_ms",
];

/// What a step may say about a key: `stdout_contains = "x"`.
const SUFFIXES: &[&str] = &["_contains", "_lacks", "_starts", "_ends", "_min", "_max"];

#[derive(Debug, Clone, PartialEq)]
enum Check {
    Is(Json),
    Contains(Vec<String>),
    Lacks(Vec<String>),
    Starts(String),
    Ends(String),
    Min(f64),
    Max(f64),
}

/// One line of what a step has to give.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Expectation {
    key: &'static str,
    check: Check,
}

/// Where a step gave something else.
#[derive(Debug)]
pub(super) struct Mismatch {
    key: &'static str,
    expected: String,
    found: Option<Json>,
}

impl Mismatch {
    pub(super) fn is_about_error(&self) -> bool {
        is_about_error(self.key)
    }
}

fn is_about_error(key: &str) -> bool {
    matches!(key, "error" | "error_kind")
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.key)?;
        writeln!(f, "    expected {}", self.expected)?;
        match &self.found {
            Some(found) => write!(f, "    found    {}", short(found)),
            None => write!(f, "    found    nothing"),
        }
    }
}

/// A value as it's shown in a failure: texts of several lines line by line.
pub(super) fn short(value: &Json) -> String {
    let text = match value {
        Json::String(text) if text.trim_end().contains('\n') => {
            let mut lines = String::new();
            for line in text.split_inclusive('\n') {
                let _ = write!(lines, "\n             {}", Json::from(line));
            }
            lines
        }
        value => value.to_string(),
    };
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((at, _)) => format!("{}... ({} bytes)", &text[..at], text.len()),
        None => text,
    }
}

/// Everything that a step has to give.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Expectations(Vec<Expectation>);

impl Expectations {
    /// Reads `key = value` of TOML, where the key is one of `keys` or of those that all steps have.
    pub(super) fn parse(table: &toml::Table, keys: &[&'static str]) -> Result<Self, String> {
        let mut list = Vec::new();
        for (name, value) in table {
            let all = || COMMON.iter().chain(keys);
            let found = match all().find(|key| *key == name) {
                Some(key) => Some((*key, "")),
                None => SUFFIXES.iter().find_map(|suffix| {
                    let base = name.strip_suffix(suffix)?;
                    all().find(|key| **key == base).map(|key| (*key, *suffix))
                }),
            };
            let Some((key, suffix)) = found else {
                let known: BTreeSet<&str> = all().copied().collect();
                let known = known.into_iter().collect::<Vec<_>>().join(", ");
                return Err(format!("this step has no `{name}`; it has {known}"));
            };
            let check = check_of(suffix, value, key == "value" && !keys.contains(&"outcome"))
                .map_err(|reason| format!("`{name}`: {reason}"))?;
            list.push(Expectation { key, check });
        }
        Ok(Self(list))
    }

    /// Adds what a cell has to give when its case doesn't say: it completes and is silent.
    pub(super) fn complete_cell(&mut self) {
        self.complete_common();
        if self.is_about_error() || self.is("finished", &false.into()) {
            return;
        }
        let raises = ["exception", "exception_type", "traceback"].iter().any(|key| self.has(key));
        let exits = self.has("exit_code");
        let is_limited = self.has("limit") && !self.has("outcome");
        let outcome = match () {
            () if is_limited && !raises => "limit",
            () if raises => "raised",
            () if exits => "exited",
            () => "completed",
        };
        self.default("outcome", outcome.into());
        self.default("limit", Json::Null);
        self.default("rolled_back", false.into());
        if !self.has("final_answer_bytes") {
            self.default("final_answer", Json::Null);
        }
        self.default("value", Json::Null);
        self.default("stdout", "".into());
        if self.is("outcome", &"completed".into()) {
            self.default("stderr", "".into());
            self.default("exception", Json::Null);
        }
    }

    /// Adds what any step has to give when its case doesn't say.
    pub(super) fn complete_common(&mut self) {
        if !self.has("error_kind") {
            self.default("error", Json::Null);
        }
        self.default("status", "ready".into());
    }

    fn default(&mut self, key: &'static str, value: Json) {
        if !self.has(key) {
            self.0.push(Expectation { key, check: Check::Is(value) });
        }
    }

    fn has(&self, key: &str) -> bool {
        self.0.iter().any(|one| one.key == key)
    }

    /// Whether exactly this is expected.
    pub(super) fn is(&self, key: &str, value: &Json) -> bool {
        self.0.iter().any(|one| one.key == key && one.check == Check::Is(value.clone()))
    }

    /// Whether the step is to fail on the host's side.
    pub(super) fn is_about_error(&self) -> bool {
        self.0.iter().any(|one| is_about_error(one.key) && one.check != Check::Is(Json::Null))
    }

    /// These expectations, but for the keys that `instead` has.
    pub(super) fn overlaid(&self, instead: &Self) -> Self {
        let rest = self.0.iter().filter(|one| !instead.has(one.key));
        Self(rest.chain(&instead.0).cloned().collect())
    }

    /// What `instead` replaces in these.
    pub(super) fn replaced(&self, instead: &Self) -> Self {
        Self(self.0.iter().filter(|one| instead.has(one.key)).cloned().collect())
    }

    /// Where the observation is something else.
    pub(super) fn compare(&self, observation: &Observation) -> Vec<Mismatch> {
        let mismatches = self.0.iter().filter_map(|one| {
            let found = observation.get(one.key);
            let is_met = found.is_some_and(|found| one.check.is_met(found));
            (!is_met).then(|| Mismatch {
                key: one.key,
                expected: one.check.to_string(),
                found: found.cloned(),
            })
        });
        mismatches.collect()
    }

    /// Where the observation, which has only some of the keys, is something else.
    pub(super) fn compare_seen(&self, observation: &Observation) -> Vec<Mismatch> {
        let seen = self.0.iter().filter(|one| observation.contains_key(one.key));
        Self(seen.cloned().collect()).compare(observation)
    }
}

fn check_of(suffix: &str, value: &toml::Value, is_python: bool) -> Result<Check, String> {
    let text = || value.as_str().map(str::to_owned).ok_or("it takes a text");
    let texts = || match value {
        toml::Value::String(text) => Ok(vec![text.clone()]),
        toml::Value::Array(items) if !items.is_empty() => {
            let texts = items.iter().map(|item| item.as_str().map(str::to_owned));
            texts.collect::<Option<Vec<_>>>().ok_or("it takes a text or a list of texts")
        }
        _ => Err("it takes a text or a list of texts"),
    };
    let number = || match value {
        toml::Value::Integer(value) => Ok(*value as f64),
        toml::Value::Float(value) => Ok(*value),
        _ => Err("it takes a number"),
    };
    Ok(match suffix {
        "" if is_python => Check::Is(shown(&value_of(value)?)),
        // TOML has no null, and no key has an empty table.
        "" if value.as_table().is_some_and(toml::Table::is_empty) => Check::Is(Json::Null),
        "" => Check::Is(json_of(value)?),
        "_contains" => Check::Contains(texts()?),
        "_lacks" => Check::Lacks(texts()?),
        "_starts" => Check::Starts(text()?),
        "_ends" => Check::Ends(text()?),
        "_min" => Check::Min(number()?),
        _ => Check::Max(number()?),
    })
}

impl Check {
    fn is_met(&self, found: &Json) -> bool {
        let text = found.as_str();
        match self {
            Self::Is(expected) => expected == found,
            Self::Contains(parts) => {
                text.is_some_and(|text| parts.iter().all(|part| text.contains(part.as_str())))
            }
            Self::Lacks(parts) => {
                text.is_some_and(|text| !parts.iter().any(|part| text.contains(part.as_str())))
            }
            Self::Starts(start) => text.is_some_and(|text| text.starts_with(start.as_str())),
            Self::Ends(end) => text.is_some_and(|text| text.ends_with(end.as_str())),
            Self::Min(least) => found.as_f64().is_some_and(|found| found >= *least),
            Self::Max(most) => found.as_f64().is_some_and(|found| found <= *most),
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Is(value) => f.write_str(&short(value)),
            Self::Contains(parts) => write!(f, "a text with {}", quoted(parts)),
            Self::Lacks(parts) => write!(f, "a text without {}", quoted(parts)),
            Self::Starts(start) => write!(f, "a text that starts with {}", Json::from(&**start)),
            Self::Ends(end) => write!(f, "a text that ends with {}", Json::from(&**end)),
            Self::Min(least) => write!(f, "at least {least}"),
            Self::Max(most) => write!(f, "at most {most}"),
        }
    }
}

fn quoted(parts: &[String]) -> String {
    parts.iter().map(|part| Json::from(&**part).to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expectations(text: &str) -> Expectations {
        Expectations::parse(&text.parse().unwrap(), CELL).unwrap()
    }

    #[test]
    fn each_check_can_fail() {
        let found: Observation =
            [("stdout", Json::from("abc")), ("compute_ms", Json::from(5)), ("value", Json::Null)]
                .into();
        for (met, not_met) in [
            ("stdout = 'abc'", "stdout = 'ab'"),
            ("stdout_contains = ['a', 'c']", "stdout_contains = ['a', 'd']"),
            ("stdout_lacks = 'd'", "stdout_lacks = ['d', 'b']"),
            ("stdout_starts = 'ab'", "stdout_starts = 'b'"),
            ("stdout_ends = 'bc'", "stdout_ends = 'b'"),
            ("compute_ms_min = 5", "compute_ms_min = 6"),
            ("compute_ms_max = 5", "compute_ms_max = 4.5"),
            ("value = {}", "value = 'None'"),
            ("stdout = 'abc'", "wall_ms_max = 5"),
        ] {
            assert!(expectations(met).compare(&found).is_empty(), "{met}");
            assert_eq!(expectations(not_met).compare(&found).len(), 1, "{not_met}");
        }
        assert!(expectations("wall_ms_max = 5").compare_seen(&found).is_empty());
    }

    #[test]
    fn keys_that_a_step_lacks_are_refused_by_name() {
        for (text, words) in [
            ("stdouts = 'x'", "this step has no `stdouts`"),
            ("stdout_min = 'x'", "`stdout_min`: it takes a number"),
            ("stdout_contains = []", "`stdout_contains`: it takes a text or a list of texts"),
        ] {
            let error = Expectations::parse(&text.parse().unwrap(), CELL).unwrap_err();
            assert!(error.starts_with(words), "{error}");
        }
    }

    #[test]
    fn what_a_cell_does_not_say_is_silence() {
        for (text, outcome) in [
            ("", "completed"),
            ("exception = 'E'", "raised"),
            ("exit_code = 1", "exited"),
            ("limit = 'wall'", "limit"),
        ] {
            let mut expected = expectations(text);
            expected.complete_cell();
            assert!(expected.is("outcome", &outcome.into()), "{text}");
            assert!(expected.is("stdout", &"".into()), "{text}");
        }
        let mut refused = expectations("error_kind = 'Invalid'");
        refused.complete_cell();
        assert!(!refused.has("outcome") && !refused.has("error"));
    }
}
