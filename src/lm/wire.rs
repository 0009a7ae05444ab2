//! RLM's wire types and their JSON, both ways.
//!
//! The order of the fields is the order on the wire, and texts and numbers are written as Python
//! does. What a server sends differs from RLM's bytes in this alone:
//!
//! * A chat that a reply repeats has its keys sorted; RLM keeps their order, and repeated keys and
//!   numbers of any size as Python reads them.
//! * Usage stands under the model that answered, where RLM's takes the name that the request gave,
//!   and in a batch each answer has its own, where RLM's has that of the last call in all of them.
//!   An answer without text, null in RLM's, is empty.
//! * Errors about text that is no JSON, or no request, have Kaa's words unless they are about its
//!   first characters.

mod json;

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value as Json};

use self::json::python_error;
pub(super) use self::json::{replace_lone_surrogates, values_at_most};
use super::{LmCompletion, LmError, MODEL_NAME_BYTES_MAX, ModelUsage, Prompt, UsageSummary};

/// What RLM's client says when the reply has no completion; models have seen this text.
const NO_COMPLETION: &str = "LM query failed - 'NoneType' object has no attribute 'response'";
const NO_PROMPT: &str = "Missing 'prompt' or 'prompts' in request.";
/// RLM's depth of a request that has none.
const DEPTH_MISSING: i32 = -1;
/// JSON values that a request may have, see [`values_at_most`]: the smallest objects of this number
/// take some 80 MB, and a batch of ten thousand chats has room for eight messages in each.
const REQUEST_VALUES_MAX: usize = 1 << 18;
/// As [`REQUEST_VALUES_MAX`], for a reply without what it repeats of the request: ten thousand
/// answers of one model have about 130,000.
const REPLY_VALUES_MAX: usize = 1 << 19;

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
pub(crate) struct Asked {
    pub(crate) prompts: AskedPrompts,
    pub(crate) model: Option<String>,
    pub(crate) depth: i32,
}

#[derive(Debug, PartialEq)]
pub(crate) enum AskedPrompts {
    One(Prompt),
    /// At least one; answered as a list.
    Batch(Vec<Prompt>),
}

/// The object that a payload is; an error is the text for the client.
pub(crate) fn read_object(mut payload: Vec<u8>) -> Result<Map<String, Json>, String> {
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
    pub(crate) fn read(mut request: Map<String, Json>, prompts_max: usize) -> Result<Self, String> {
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
            // Each prompt of a batch has its own.
            Some(Json::String(model)) if model.len() > MODEL_NAME_BYTES_MAX => {
                let length = model.len();
                return Err(format!(
                    "'model' has {length} bytes; it can have {MODEL_NAME_BYTES_MAX}"
                ));
            }
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

/// The length of an answer in a reply, without the prompt that it repeats. What isn't known before
/// all others are there, such as its time, is left out.
pub(super) fn answer_bytes(
    model: Option<&str>,
    result: &Result<LmCompletion, LmError>,
) -> io::Result<usize> {
    let prompt = Prompt::Text(String::new());
    json::encoded_bytes(&match result {
        Ok(completion) => AnswerJson::new(model, &prompt, completion, Duration::ZERO),
        Err(error) => AnswerJson::failed(model.unwrap_or_default(), &prompt, error),
    })
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
    /// The reply that a payload is; an error says why it's none. What it repeats of its request
    /// has `echo_values` values: they aren't kept, and so don't count.
    pub(super) fn read(mut payload: Vec<u8>, echo_values: usize) -> Result<Self, String> {
        if values_at_most(&payload) > REPLY_VALUES_MAX.saturating_add(echo_values) {
            return Err(format!("it has more than {REPLY_VALUES_MAX} JSON values"));
        }
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
    #[serde(default, deserialize_with = "text_or_null")]
    root_model: String,
    /// RLM's handler sends null when a model refused.
    #[serde(deserialize_with = "text_or_null")]
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

/// A text, or null for the empty one.
fn text_or_null<'de, D: Deserializer<'de>>(json: D) -> Result<String, D::Error> {
    Option::deserialize(json).map(Option::unwrap_or_default)
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
            // No call earns money: a sum of costs must not shrink.
            cost: usage.total_cost.filter(|cost| cost.is_finite() && *cost >= 0.0),
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
mod tests;
