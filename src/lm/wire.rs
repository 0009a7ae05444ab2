//! RLM's wire types and their JSON, both ways.
//!
//! The order of the fields is the order on the wire: whoever compares bytes with RLM's finds none
//! that differ.

mod json;

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value as Json};

pub(super) use self::json::replace_lone_surrogates;
use self::json::{python_error, values_at_most};
use super::{LmCompletion, LmError, ModelUsage, Prompt, UsageSummary};

/// What RLM's client says when the reply has no completion; models have seen this text.
const NO_COMPLETION: &str = "LM query failed - 'NoneType' object has no attribute 'response'";
const NO_PROMPT: &str = "Missing 'prompt' or 'prompts' in request.";
/// RLM's depth of a request that has none.
const DEPTH_MISSING: i32 = -1;
/// JSON values that a request may have, see [`values_at_most`]: the smallest objects of this number
/// take some 80 MB, and a batch of ten thousand chats has room for eight messages in each.
const REQUEST_VALUES_MAX: usize = 1 << 18;

/// A request as a client sends it.
#[derive(Serialize)]
pub(super) struct RequestJson<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt: Option<PromptJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompts: Option<Vec<PromptJson<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) model: Option<&'a str>,
    pub(super) depth: i32,
    /// Kaa's own; RLM ignores what it doesn't know.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) token: Option<&'a str>,
}

#[derive(Clone, Copy, Serialize)]
#[serde(untagged)]
pub(super) enum PromptJson<'a> {
    Text(&'a str),
    Messages(&'a Json),
}

impl<'a> From<&'a Prompt> for PromptJson<'a> {
    fn from(prompt: &'a Prompt) -> Self {
        match prompt {
            Prompt::Text(text) => Self::Text(text),
            Prompt::Messages(json) => Self::Messages(json),
        }
    }
}

impl RequestJson<'_> {
    pub(super) fn encode(&self) -> io::Result<Vec<u8>> {
        json::encode(self)
    }
}

/// A request as a server takes it.
#[derive(Debug, PartialEq)]
pub(super) struct Asked {
    pub(super) prompts: AskedPrompts,
    pub(super) model: Option<String>,
    pub(super) depth: i32,
}

#[derive(Debug, PartialEq)]
pub(super) enum AskedPrompts {
    One(Prompt),
    /// At least one; answered as a list.
    Batch(Vec<Prompt>),
}

/// The object that a payload is; an error is the text for the client.
pub(super) fn read_object(mut payload: Vec<u8>) -> Result<Map<String, Json>, String> {
    if values_at_most(&payload) > REQUEST_VALUES_MAX {
        return Err(format!("the request has more than {REQUEST_VALUES_MAX} JSON values"));
    }
    replace_lone_surrogates(&mut payload);
    match serde_json::from_slice(&payload) {
        Ok(Json::Object(request)) => Ok(request),
        Ok(_) => Err("Request must be a JSON object".into()),
        Err(error) => {
            Err(python_error(&payload).unwrap_or_else(|| format!("Invalid JSON: {error}")))
        }
    }
}

impl Asked {
    /// What a request's object asks for; an error is the text for the client.
    pub(super) fn read(mut request: Map<String, Json>, prompts_max: usize) -> Result<Self, String> {
        let prompts = match request.remove("prompts") {
            None | Some(Json::Null) => Vec::new(),
            Some(Json::Array(prompts)) if prompts.len() > prompts_max => {
                let count = prompts.len();
                return Err(format!("{count} prompts in one request; at most {prompts_max} fit"));
            }
            Some(Json::Array(prompts)) => prompts,
            Some(other) => {
                return Err(format!("'prompts' must be a list of prompts, not {}", kind(&other)));
            }
        };
        let prompts = if prompts.is_empty() {
            let prompt = request.remove("prompt").filter(is_truthy).ok_or(NO_PROMPT)?;
            AskedPrompts::One(read_prompt(prompt, || "'prompt'".into())?)
        } else {
            let prompts = prompts.into_iter().enumerate();
            let prompts =
                prompts.map(|(i, prompt)| read_prompt(prompt, || format!("'prompts'[{i}]")));
            AskedPrompts::Batch(prompts.collect::<Result<_, _>>()?)
        };
        let model = match request.remove("model") {
            None | Some(Json::Null) => None,
            // As in RLM, an empty name is none.
            Some(Json::String(model)) => Some(model).filter(|model| !model.is_empty()),
            Some(other) => return Err(format!("'model' must be a string, not {}", kind(&other))),
        };
        let depth = match request.remove("depth") {
            None | Some(Json::Null) => DEPTH_MISSING,
            Some(depth) => depth
                .as_i64()
                .and_then(|depth| i32::try_from(depth).ok())
                .ok_or("'depth' must be a whole number of 32 bits")?,
        };
        Ok(Self { prompts, model, depth })
    }
}

fn read_prompt(json: Json, name: impl FnOnce() -> String) -> Result<Prompt, String> {
    match json {
        Json::String(text) => Ok(Prompt::Text(text)),
        Json::Array(_) | Json::Object(_) => Ok(Prompt::Messages(json)),
        other => Err(format!(
            "{} must be a string, a message or a list of messages, not {}",
            name(),
            kind(&other)
        )),
    }
}

/// What Python takes for true.
fn is_truthy(json: &Json) -> bool {
    match json {
        Json::Null | Json::Bool(false) => false,
        Json::Bool(true) => true,
        Json::Number(number) => number.as_f64() != Some(0.0),
        Json::String(text) => !text.is_empty(),
        Json::Array(list) => !list.is_empty(),
        Json::Object(object) => !object.is_empty(),
    }
}

fn kind(json: &Json) -> &'static str {
    match json {
        Json::Null => "null",
        Json::Bool(_) => "a bool",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

/// A reply as a server sends it: always the three keys, in RLM's order, two of them null.
pub(super) enum Reply<'a> {
    One(AnswerJson<'a>),
    Batch(Vec<AnswerJson<'a>>),
    Error(&'a str),
}

impl Reply<'_> {
    pub(super) fn encode(&self) -> io::Result<Vec<u8>> {
        json::encode(self)
    }
}

impl Serialize for Reply<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut reply = serializer.serialize_map(Some(3))?;
        let nulls = match self {
            Self::One(answer) => {
                reply.serialize_entry("chat_completion", answer)?;
                ["chat_completions", "error"]
            }
            Self::Batch(answers) => {
                reply.serialize_entry("chat_completions", answers)?;
                ["chat_completion", "error"]
            }
            Self::Error(message) => {
                reply.serialize_entry("error", message)?;
                ["chat_completion", "chat_completions"]
            }
        };
        for key in nulls {
            reply.serialize_entry(key, &())?;
        }
        reply.end()
    }
}

/// `RLMChatCompletion` as a server sends it.
#[derive(Serialize)]
pub(super) struct AnswerJson<'a> {
    root_model: &'a str,
    prompt: PromptJson<'a>,
    response: &'a str,
    usage_summary: UsageOut,
    execution_time: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<&'a Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

impl<'a> AnswerJson<'a> {
    /// A completion; `model` is the name that the request gave.
    pub(super) fn new(
        model: Option<&'a str>,
        prompt: &'a Prompt,
        completion: &'a LmCompletion,
        execution_time: Duration,
    ) -> Self {
        let root_model = model.unwrap_or(&completion.model);
        let mut usage = UsageSummary::default();
        match completion.usage.as_slice() {
            [] => usage.add(&[ModelUsage { model: root_model.into(), ..ModelUsage::default() }]),
            used => usage.add(used),
        }
        Self {
            root_model,
            prompt: prompt.into(),
            response: &completion.response,
            usage_summary: UsageOut(usage),
            execution_time: execution_time.as_secs_f64(),
            metadata: completion.metadata.as_ref(),
            error: None,
        }
    }

    /// The slot of a batch whose call failed.
    pub(super) fn failed(root_model: &'a str, prompt: &'a Prompt, error: &'a LmError) -> Self {
        Self {
            root_model,
            prompt: prompt.into(),
            response: "",
            usage_summary: UsageOut(UsageSummary::default()),
            execution_time: 0.0,
            metadata: None,
            error: Some(&error.message),
        }
    }
}

struct UsageOut(UsageSummary);

impl Serialize for UsageOut {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let models: BTreeMap<&str, ModelUsageJson> =
            self.0.models().map(|usage| (usage.model.as_str(), usage.into())).collect();
        let mut summary = serializer.serialize_map(None)?;
        summary.serialize_entry("model_usage_summaries", &models)?;
        if let Some(cost) = self.0.cost() {
            summary.serialize_entry("total_cost", &cost)?;
        }
        summary.end()
    }
}

/// A reply as a client takes it.
#[derive(Default, Deserialize)]
pub(super) struct ReplyJson {
    pub(super) error: Option<String>,
    pub(super) chat_completion: Option<CompletionJson>,
    pub(super) chat_completions: Option<Vec<Option<CompletionJson>>>,
}

impl ReplyJson {
    /// The reply that a payload is; an error says why it's none.
    pub(super) fn read(mut payload: Vec<u8>) -> Result<Self, String> {
        replace_lone_surrogates(&mut payload);
        // serde would also take a list of the fields in their order.
        if !payload.trim_ascii_start().starts_with(b"{") {
            return Err("not a JSON object".into());
        }
        serde_json::from_slice(&payload).map_err(|e| e.to_string())
    }
}

/// `RLMChatCompletion`; only the answer is required.
#[derive(Deserialize)]
pub(super) struct CompletionJson {
    #[serde(default)]
    root_model: String,
    response: String,
    #[serde(default)]
    usage_summary: Option<UsageJson>,
    #[serde(default)]
    execution_time: Option<f64>,
    #[serde(default)]
    metadata: Option<Json>,
    #[serde(default)]
    error: Option<String>,
}

#[derive(Deserialize)]
struct UsageJson {
    // Sorted, so that the same reply is reported the same way each time.
    #[serde(default)]
    model_usage_summaries: BTreeMap<String, ModelUsageJson>,
}

#[derive(Serialize, Deserialize)]
struct ModelUsageJson {
    total_calls: Option<u64>,
    total_input_tokens: Option<u64>,
    total_output_tokens: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_cost: Option<f64>,
}

impl From<&ModelUsage> for ModelUsageJson {
    fn from(usage: &ModelUsage) -> Self {
        Self {
            total_calls: Some(usage.calls),
            total_input_tokens: Some(usage.input_tokens),
            total_output_tokens: Some(usage.output_tokens),
            total_cost: usage.cost,
        }
    }
}

impl CompletionJson {
    pub(super) fn into_result(completion: Option<Self>) -> Result<LmCompletion, LmError> {
        let Some(completion) = completion else { return Err(LmError::new(NO_COMPLETION)) };
        // As in RLM's client, an empty error is none.
        if let Some(error) = completion.error.filter(|error| !error.is_empty()) {
            return Err(LmError::new(error));
        }
        let usage = completion.usage_summary.map(|usage| usage.model_usage_summaries);
        let usage = usage.unwrap_or_default().into_iter().map(|(model, usage)| ModelUsage {
            model,
            calls: usage.total_calls.unwrap_or(0),
            input_tokens: usage.total_input_tokens.unwrap_or(0),
            output_tokens: usage.total_output_tokens.unwrap_or(0),
            cost: usage.total_cost,
        });
        let seconds = completion.execution_time.unwrap_or(0.0);
        Ok(LmCompletion {
            model: completion.root_model,
            response: completion.response,
            usage: usage.collect(),
            // A negative or absurd time is no reason to lose the answer.
            execution_time: Duration::try_from_secs_f64(seconds).unwrap_or_default(),
            metadata: completion.metadata,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{Strategy, any, prop_oneof};
    use proptest::sample;

    use super::*;

    #[test]
    fn requests_are_encoded_as_python_does() {
        let chat = serde_json::json!([{"content": "\u{7f}\u{0}\n\"\\/", "role": "user"}]);
        for (prompt, expected) in [
            (PromptJson::Text("h\u{e9}"), r#""h\u00e9""#),
            (PromptJson::Text("\u{1f600}~"), r#""\ud83d\ude00~""#),
            (PromptJson::Text("\t\u{8}\u{c}\r\u{1b}"), r#""\t\b\f\r\u001b""#),
            (
                PromptJson::Messages(&chat),
                r#"[{"content": "\u007f\u0000\n\"\\/", "role": "user"}]"#,
            ),
        ] {
            let request = RequestJson {
                prompt: Some(prompt),
                prompts: None,
                model: None,
                depth: -1,
                token: None,
            };
            let bytes = request.encode().unwrap();
            let expected = format!(r#"{{"prompt": {expected}, "depth": -1}}"#);
            assert_eq!(String::from_utf8(bytes).unwrap(), expected);
        }
    }

    fn asked(payload: &str) -> Result<Asked, String> {
        Asked::read(read_object(payload.into())?, 2)
    }

    #[test]
    fn requests_are_read_as_python_does() {
        let one = |text: &str| AskedPrompts::One(Prompt::Text(text.into()));
        let batch = |texts: &[&str]| {
            AskedPrompts::Batch(texts.iter().map(|text| Prompt::Text((*text).into())).collect())
        };
        let chat = AskedPrompts::One(Prompt::Messages(serde_json::json!({"role": "user"})));
        for (payload, prompts, model, depth) in [
            (r#"{"prompt": "a"}"#, one("a"), None, -1),
            (r#"{"prompt": "a", "depth": null, "model": null}"#, one("a"), None, -1),
            (r#"{"prompt": "a", "depth": 3, "model": "m", "new": [1]}"#, one("a"), Some("m"), 3),
            (r#"{"prompt": "a", "model": ""}"#, one("a"), None, -1),
            (r#"{"prompt": "a", "prompt": "b"}"#, one("b"), None, -1),
            (r#"{"prompt": {"role": "user"}}"#, chat, None, -1),
            (r#"{"prompt": "a", "prompts": ["b", ""]}"#, batch(&["b", ""]), None, -1),
            (r#"{"prompt": "a", "prompts": []}"#, one("a"), None, -1),
            (r#"{"prompt": "\ud83d", "prompts": null}"#, one("\u{fffd}"), None, -1),
        ] {
            let expected = Asked { prompts, model: model.map(str::to_owned), depth };
            assert_eq!(asked(payload), Ok(expected), "{payload}");
        }
    }

    #[test]
    fn what_is_no_request_is_named() {
        for (payload, expected) in [
            ("{}", NO_PROMPT),
            (r#"{"prompt": {}, "prompts": []}"#, NO_PROMPT),
            (r#"{"prompt": 0}"#, NO_PROMPT),
            ("[1]", "Request must be a JSON object"),
            ("\"prompt\"", "Request must be a JSON object"),
            ("null", "Request must be a JSON object"),
            ("", "Expecting value: line 1 column 1 (char 0)"),
            (
                r#"{"prompt": 5}"#,
                "'prompt' must be a string, a message or a list of messages, not a number",
            ),
            (
                r#"{"prompts": ["a", null]}"#,
                "'prompts'[1] must be a string, a message or a list of messages, not null",
            ),
            (r#"{"prompts": "ab"}"#, "'prompts' must be a list of prompts, not a string"),
            (r#"{"prompts": ["", "", ""]}"#, "3 prompts in one request; at most 2 fit"),
            (r#"{"prompt": "a", "model": 1}"#, "'model' must be a string, not a number"),
            (r#"{"prompt": "a", "depth": 1.5}"#, "'depth' must be a whole number of 32 bits"),
            (r#"{"prompt": "a", "depth": 1e99}"#, "'depth' must be a whole number of 32 bits"),
            (
                r#"{"prompt": "a", "depth": 2147483648}"#,
                "'depth' must be a whole number of 32 bits",
            ),
        ] {
            assert_eq!(asked(payload).unwrap_err(), expected, "{payload}");
        }
        for payload in ["{\"prompt\": \"a\"", "{} {}", "{\"a\": 1e999}", "{\"a\":\"\\x\"}"] {
            let error = asked(payload).unwrap_err();
            assert!(error.starts_with("Invalid JSON: "), "{payload}: {error}");
        }
        let deep = asked(&"[".repeat(REQUEST_VALUES_MAX - 1)).unwrap_err();
        assert!(deep.starts_with("Invalid JSON: recursion limit"), "{deep}");
        let many = format!("[{}1]", "1,".repeat(REQUEST_VALUES_MAX));
        let error = asked(&many).unwrap_err();
        assert_eq!(error, "the request has more than 262144 JSON values");
    }

    proptest::proptest! {
        #[test]
        fn whatever_comes_is_a_request_or_an_error(pieces in pieces()) {
            let _ = read_object(pieces.concat()).and_then(|request| Asked::read(request, 2));
        }
    }

    /// Texts that are almost requests.
    fn pieces() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let words = [
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "\"",
            "\\",
            " ",
            "\n",
            "\"prompt\":",
            "\"prompts\":",
            "\"depth\":",
            "1",
            "-1e9",
            "null",
            "\"a\"",
            "\\ud83d",
            "\\u",
            "{\"",
            "\u{e9}",
        ];
        let words: Vec<Vec<u8>> = words.map(Vec::from).into();
        let piece = prop_oneof![sample::select(words), vec(any::<u8>(), 1)];
        vec(piece, 0..30)
    }

    #[test]
    fn usage_has_rlms_fields_in_their_order() {
        let usage = |model: &str, cost| ModelUsage {
            model: model.into(),
            calls: 1,
            input_tokens: 2,
            output_tokens: 3,
            cost,
        };
        let completion = LmCompletion {
            model: "m".into(),
            usage: vec![usage("m", Some(0.5)), usage("c", None), usage("m", Some(0.25))],
            metadata: Some(serde_json::json!({"iterations": [1.0]})),
            ..LmCompletion::default()
        };
        let prompt = Prompt::Text("p".into());
        let answer = AnswerJson::new(None, &prompt, &completion, Duration::ZERO);
        assert_eq!(
            String::from_utf8(json::encode(&answer).unwrap()).unwrap(),
            concat!(
                r#"{"root_model": "m", "prompt": "p", "response": "", "#,
                r#""usage_summary": {"model_usage_summaries": {"c": {"total_calls": 1, "#,
                r#""total_input_tokens": 2, "total_output_tokens": 3}, "m": {"total_calls": 2, "#,
                r#""total_input_tokens": 4, "total_output_tokens": 6, "total_cost": 0.75}}, "#,
                r#""total_cost": 0.75}, "execution_time": 0.0, "#,
                r#""metadata": {"iterations": [1.0]}}"#,
            )
        );
    }
}
