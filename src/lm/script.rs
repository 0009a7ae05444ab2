//! Answers from a script: tests and demos without a model.

use std::fmt;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use regex::{Captures, Regex};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use super::{LmCompletion, LmError, LmHandler, LmRequest, ModelUsage, tokens_of};
use crate::error::{Error, Result};

/// The name under which answers are booked when neither guest nor script names a model.
const MODEL: &str = "scripted";

/// Answers by rule instead of by model: no key, no network, the same answer every time.
///
/// A script is a JSON object; unknown fields are refused:
///
/// | field | meaning | when left out |
/// |---|---|---|
/// | `model` | name reported when the guest names no model | `"scripted"` |
/// | `latency_ms` | how long every answer takes | 0 |
/// | `rules` | list of rules; the first that matches answers | none |
/// | `default` | a rule without condition, asked last | a prompt that no rule matches is an error |
///
/// and a rule has
///
/// | field | meaning |
/// |---|---|
/// | `contains` | condition: the prompt contains this text |
/// | `regex` | condition instead: this regular expression matches somewhere in the prompt |
/// | `response` | what the model says |
/// | `error` | or instead: the message of a failed call |
/// | `latency_ms` | how long this answer takes; when left out, the script's |
///
/// A chat is matched as its JSON text. Expressions are those of the crate `regex`: `(?s)` lets `.`
/// match newlines, `(?i-u)` ignores the case of ASCII letters.
///
/// `response` and `error` are templates:
///
/// | in the template | becomes |
/// |---|---|
/// | `$1`, `${1}`, `${name}` | what this group of `regex` matched; empty if it took no part |
/// | `${prompt}` | the prompt |
/// | `${prompt_chars}` | its length in characters, Python's `len(prompt)` |
/// | `$$` | a dollar sign |
///
/// Tokens are estimated as one per four characters, rounded up. `execution_time` is the scripted
/// latency, so that a recorded run does not differ from the next one. Plain and recursive calls
/// are answered alike.
///
/// # Example
///
/// ```
/// use kaa::lm::{LmHandler, LmKind, LmRequest, Prompt, ScriptedHandler};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let handler = ScriptedHandler::from_json(
///     r#"{
///         "rules": [
///             {"regex": "capital of (?P<country>\\w+)", "response": "${country} has one."},
///             {"contains": "overload", "error": "429: try later"}
///         ],
///         "default": {"response": "I read ${prompt_chars} characters."}
///     }"#,
/// )?;
/// let ask = |text: &str| {
///     let prompt = Prompt::Text(text.into());
///     let request = LmRequest { kind: LmKind::Llm, prompt, model: None, depth: 1 };
///     async { let request = request; handler.complete(&request).await }
/// };
/// assert_eq!(ask("What is the capital of Peru?").await?.response, "Peru has one.");
/// assert_eq!(ask("overload").await.unwrap_err().message, "429: try later");
/// assert_eq!(ask("hello").await?.response, "I read 5 characters.");
/// # Ok(())
/// # }
/// ```
pub struct ScriptedHandler {
    model: String,
    source: Source,
}

enum Source {
    Rules(Vec<Rule>),
    Function(Box<Function>),
}

type Function = dyn Fn(&LmRequest) -> Result<String, LmError> + Send + Sync;

impl ScriptedHandler {
    /// Reads a script; the form is in the [type's docs](Self).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names the rule by its number, counted from 1, and says what is wrong.
    ///
    /// # Example: an error names the rule
    ///
    /// ```
    /// use kaa::lm::ScriptedHandler;
    ///
    /// let script = r#"{"rules": [{"contains": "a", "response": "costs $5"}]}"#;
    /// let error = ScriptedHandler::from_json(script).unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "LM script, rule 1: `$5` in the response names no group of the rule's regex; \
    ///      write `$$` for a dollar sign"
    /// );
    /// ```
    pub fn from_json(text: &str) -> Result<Self> {
        let script: ScriptJson = serde_json::from_str(text)
            .map_err(|e| e.to_string())
            .and_then(read_object)
            .map_err(|reason| Error::invalid("LM script", reason))?;
        let mut rules = Vec::with_capacity(script.rules.len() + 1);
        for (i, rule) in script.rules.into_iter().enumerate() {
            let rule = Rule::parse(rule, script.latency_ms)
                .map_err(|reason| Error::invalid(format!("LM script, rule {}", i + 1), reason))?;
            rules.push(rule);
        }
        if let Some(rule) = script.default {
            let rule = Rule::parse_default(rule, script.latency_ms)
                .map_err(|reason| Error::invalid("LM script, default", reason))?;
            rules.push(rule);
        }
        Ok(Self { model: script.model, source: Source::Rules(rules) })
    }

    /// Answers with what `answer` returns; it runs on the caller's task and must not block.
    ///
    /// # Example
    ///
    /// ```
    /// use kaa::lm::{LmError, ScriptedHandler};
    ///
    /// let handler = ScriptedHandler::from_fn(|request| match request.depth {
    ///     1 => Ok("from the root".into()),
    ///     depth => Err(LmError::new(format!("depth {depth} is too deep"))),
    /// });
    /// ```
    pub fn from_fn(
        answer: impl Fn(&LmRequest) -> Result<String, LmError> + Send + Sync + 'static,
    ) -> Self {
        Self { model: MODEL.into(), source: Source::Function(Box::new(answer)) }
    }

    /// Answers every prompt with itself; a chat comes back as its JSON text.
    ///
    /// # Example
    ///
    /// ```
    /// use kaa::lm::{LmHandler, LmKind, LmRequest, Prompt, ScriptedHandler};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), kaa::lm::LmError> {
    /// let prompt = Prompt::Text("hi".into());
    /// let request = LmRequest { kind: LmKind::Llm, prompt, model: None, depth: 1 };
    /// assert_eq!(ScriptedHandler::echo().complete(&request).await?.response, "hi");
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn echo() -> Self {
        Self::from_fn(|request| Ok(request.prompt.to_text().into_owned()))
    }
}

impl fmt::Debug for ScriptedHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = match &self.source {
            Source::Rules(rules) => format!("{} rules", rules.len()),
            Source::Function(_) => "a function".into(),
        };
        f.debug_struct("ScriptedHandler")
            .field("model", &self.model)
            .field("source", &source)
            .finish()
    }
}

#[async_trait]
impl LmHandler for ScriptedHandler {
    fn model_name(&self, _depth: i32) -> Option<&str> {
        Some(&self.model)
    }

    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let prompt = request.prompt.to_text();
        let (response, execution_time) = match &self.source {
            Source::Rules(rules) => {
                let Some((answer, latency)) = rules.iter().find_map(|rule| rule.apply(&prompt))
                else {
                    return Err(LmError::new("no rule of the LM script matches the prompt"));
                };
                // Even a sleep of zero costs a turn of the timer.
                if !latency.is_zero() {
                    tokio::time::sleep(latency).await;
                }
                (answer?, latency)
            }
            Source::Function(answer) => {
                let start = Instant::now();
                (answer(request)?, start.elapsed())
            }
        };
        let model = request.model.as_ref().unwrap_or(&self.model).clone();
        let usage = vec![ModelUsage {
            model: model.clone(),
            calls: 1,
            input_tokens: tokens_of(&prompt),
            output_tokens: tokens_of(&response),
            cost: None,
        }];
        Ok(LmCompletion { model, response, usage, execution_time, ..LmCompletion::default() })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ScriptJson {
    #[serde(default = "default_model")]
    model: String,
    #[serde(default)]
    latency_ms: u64,
    // Rules are read one by one, so that an error can say which one it is in.
    #[serde(default)]
    rules: Vec<Json>,
    default: Option<Json>,
}

/// Reads an object; serde alone would also take a list of the fields in their order.
fn read_object<T: DeserializeOwned>(json: Json) -> Result<T, String> {
    if !json.is_object() {
        return Err(format!("expected an object, found {json}"));
    }
    serde_json::from_value(json).map_err(|e| e.to_string())
}

fn default_model() -> String {
    MODEL.into()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleJson {
    contains: Option<String>,
    regex: Option<String>,
    response: Option<String>,
    error: Option<String>,
    latency_ms: Option<u64>,
}

struct Rule {
    condition: Condition,
    answer: Template,
    fails: bool,
    latency: Duration,
}

enum Condition {
    Always,
    Contains(String),
    Regex(Regex),
}

impl Rule {
    fn parse(json: Json, latency_ms: u64) -> Result<Self, String> {
        let rule: RuleJson = read_object(json)?;
        let condition = match (&rule.contains, &rule.regex) {
            (Some(text), None) if text.is_empty() => {
                return Err("`contains` is empty; for an answer to any prompt use `default`".into());
            }
            (Some(text), None) => Condition::Contains(text.clone()),
            (None, Some(pattern)) => {
                let regex = Regex::new(pattern).map_err(|e| format!("`regex` is wrong: {e}"))?;
                Condition::Regex(regex)
            }
            _ => return Err("give either `contains` or `regex`".into()),
        };
        Self::with_condition(condition, rule, latency_ms)
    }

    fn parse_default(json: Json, latency_ms: u64) -> Result<Self, String> {
        let rule: RuleJson = read_object(json)?;
        if rule.contains.is_some() || rule.regex.is_some() {
            return Err("it answers any prompt; a rule with a condition belongs in `rules`".into());
        }
        Self::with_condition(Condition::Always, rule, latency_ms)
    }

    fn with_condition(
        condition: Condition,
        rule: RuleJson,
        latency_ms: u64,
    ) -> Result<Self, String> {
        let (field, text, fails) = match (rule.response, rule.error) {
            (Some(text), None) => ("response", text, false),
            (None, Some(text)) => ("error", text, true),
            _ => return Err("give either `response` or `error`".into()),
        };
        let regex = match &condition {
            Condition::Regex(regex) => Some(regex),
            Condition::Always | Condition::Contains(_) => None,
        };
        let answer = Template::parse(&text, field, regex)?;
        let latency = Duration::from_millis(rule.latency_ms.unwrap_or(latency_ms));
        Ok(Self { condition, answer, fails, latency })
    }

    /// The answer and how long it takes, or `None` if the rule is not about this prompt.
    fn apply(&self, prompt: &str) -> Option<(Result<String, LmError>, Duration)> {
        let captures = match &self.condition {
            Condition::Always => None,
            Condition::Contains(text) if prompt.contains(text) => None,
            Condition::Contains(_) => return None,
            Condition::Regex(regex) => Some(regex.captures(prompt)?),
        };
        let text = self.answer.render(prompt, captures.as_ref());
        let answer = if self.fails { Err(LmError::new(text)) } else { Ok(text) };
        Some((answer, self.latency))
    }
}

/// A text with holes. Names are resolved when the script is read: a typing error must not become
/// an empty answer in the middle of a run.
struct Template(Vec<Piece>);

enum Piece {
    Text(String),
    Group(usize),
    Prompt,
    PromptChars,
}

impl Template {
    fn parse(text: &str, field: &str, regex: Option<&Regex>) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('$') {
            pieces.push(Piece::Text(before.into()));
            if let Some(tail) = after.strip_prefix('$') {
                pieces.push(Piece::Text("$".into()));
                rest = tail;
                continue;
            }
            let (name, tail) = match after.strip_prefix('{') {
                Some(braced) => braced.split_once('}').ok_or_else(|| {
                    format!("`${{` in the {field} has no `}}`; write `$$` for a dollar sign")
                })?,
                None => {
                    let end = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
                    after.split_at(end)
                }
            };
            let piece = Piece::resolve(name, regex).ok_or_else(|| {
                format!(
                    "`${name}` in the {field} names no group of the rule's regex; \
                     write `$$` for a dollar sign"
                )
            })?;
            pieces.push(piece);
            rest = tail;
        }
        pieces.push(Piece::Text(rest.into()));
        Ok(Self(pieces))
    }

    fn render(&self, prompt: &str, captures: Option<&Captures<'_>>) -> String {
        let mut out = String::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Prompt => out.push_str(prompt),
                Piece::PromptChars => out.push_str(&prompt.chars().count().to_string()),
                Piece::Group(group) => {
                    let found = captures.and_then(|captures| captures.get(*group));
                    out.push_str(found.map_or("", |found| found.as_str()));
                }
            }
        }
        out
    }
}

impl Piece {
    fn resolve(name: &str, regex: Option<&Regex>) -> Option<Self> {
        match name {
            "prompt" => return Some(Self::Prompt),
            "prompt_chars" => return Some(Self::PromptChars),
            _ => {}
        }
        let regex = regex?;
        let group = match name.parse::<usize>() {
            Ok(number) => Some(number).filter(|number| *number < regex.captures_len()),
            Err(_) => regex.capture_names().position(|group| group == Some(name)),
        };
        group.map(Self::Group)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm::{LmKind, Prompt};

    fn request(prompt: Prompt) -> LmRequest {
        LmRequest { kind: LmKind::Llm, prompt, model: None, depth: 1 }
    }

    async fn ask(handler: &ScriptedHandler, prompt: &str) -> Result<String, String> {
        let answer = handler.complete(&request(Prompt::Text(prompt.into()))).await;
        answer.map(|completion| completion.response).map_err(|error| error.message)
    }

    #[tokio::test]
    async fn the_first_matching_rule_answers() {
        let handler = ScriptedHandler::from_json(
            r#"{"rules": [
                {"contains": "both", "response": "first"},
                {"regex": "^(\\w+) both|(?P<n>\\d+)(x)?", "response": "<$1|${n}|${3}|$0>"},
                {"contains": "price", "response": "$$5 for ${prompt_chars}: ${prompt}"},
                {"regex": "fail (.*)", "error": "no $1"}
            ]}"#,
        )
        .unwrap();
        let none = "no rule of the LM script matches the prompt";
        for (prompt, expected) in [
            ("both 12", Ok("first")),
            ("say 12x", Ok("<|12|x|12x>")),
            ("say 12", Ok("<|12||12>")),
            ("price \u{e9}", Ok("$5 for 7: price \u{e9}")),
            ("fail over", Err("no over")),
            ("", Err(none)),
        ] {
            let expected = expected.map(String::from).map_err(String::from);
            assert_eq!(ask(&handler, prompt).await, expected, "{prompt}");
        }
    }

    #[test]
    fn a_bad_script_names_the_rule_and_the_remedy() {
        for (script, expected) in [
            ("{", "LM script: EOF while parsing"),
            ("[]", "LM script: expected an object, found []"),
            (r#"{"rule": []}"#, "LM script: unknown field `rule`"),
            (r#"{"latency_ms": -1}"#, "LM script: invalid value"),
            (r#"{"default": {}}"#, "LM script, default: give either `response` or `error`"),
            (r#"{"default": {"regex": "a", "error": "b"}}"#, "LM script, default: it answers any"),
        ] {
            check_refused(script, expected);
        }
        for (rule, expected) in [
            ("{}", "give either `contains` or `regex`"),
            ("7", "expected an object, found 7"),
            (r#"{"contains": "a", "regex": "a"}"#, "give either `contains` or `regex`"),
            (r#"{"contains": "a"}"#, "give either `response` or `error`"),
            (r#"{"contains": "", "error": "a"}"#, "`contains` is empty"),
            (r#"{"contain": "a"}"#, "unknown field `contain`"),
            (r#"{"regex": "(", "error": "a"}"#, "`regex` is wrong"),
            (r#"{"regex": "(a)", "error": "$2"}"#, "`$2` in the error names no group"),
            (r#"{"contains": "a", "response": "$1"}"#, "`$1` in the response names no group"),
            (r#"{"contains": "a", "response": "a$"}"#, "`$` in the response names no group"),
            (r#"{"contains": "a", "response": "${x"}"#, "`${` in the response has no `}`"),
        ] {
            let script = format!(r#"{{"rules": [{{"contains": "a", "error": "b"}}, {rule}]}}"#);
            check_refused(&script, &format!("LM script, rule 2: {expected}"));
        }
    }

    fn check_refused(script: &str, expected: &str) {
        let error = ScriptedHandler::from_json(script).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{script}");
        assert!(error.to_string().starts_with(expected), "{script}: {error}");
    }

    #[tokio::test]
    async fn reports_model_tokens_and_scripted_latency() {
        let script = r#"{"model": "demo", "latency_ms": 1, "default": {"response": "12345678"}}"#;
        let handler = ScriptedHandler::from_json(script).unwrap();
        let start = Instant::now();
        let mut asked = request(Prompt::Text("\u{e4}bcde".into()));
        let answer = handler.complete(&asked).await.unwrap();
        assert!(start.elapsed() >= Duration::from_millis(1));
        assert_eq!(answer.execution_time, Duration::from_millis(1));
        let usage = ModelUsage {
            model: "demo".into(),
            calls: 1,
            input_tokens: 2,
            output_tokens: 2,
            cost: None,
        };
        assert_eq!((answer.model.as_str(), answer.usage), ("demo", vec![usage]));

        asked.model = Some("other".into());
        let answer = handler.complete(&asked).await.unwrap();
        assert_eq!((answer.model.as_str(), answer.usage[0].model.as_str()), ("other", "other"));
    }

    #[tokio::test]
    async fn batches_keep_their_order_and_chats_match_as_json() {
        let echo = ScriptedHandler::echo();
        let chat = serde_json::json!([{"role": "user"}]);
        let asked = vec![
            request(Prompt::Text("a".into())),
            request(Prompt::Messages(chat)),
            request(Prompt::Text("b".into())),
        ];
        let answers = echo.complete_batch(&asked, 2).await;
        let texts: Vec<_> = answers.into_iter().map(|answer| answer.unwrap().response).collect();
        assert_eq!(texts, ["a", r#"[{"role":"user"}]"#, "b"]);

        let failing = ScriptedHandler::from_fn(|_| Err(LmError::new("kaput")));
        for answer in failing.complete_batch(&asked, 2).await {
            assert_eq!(answer, Err(LmError::new("llm() call failed - kaput")));
        }
    }
}
