//! Anthropic's messages.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::chat::{messages, of_message, quoted};
use super::reply::{Loose, Number, Text};
use super::{Answer, Counts, Upstream, UpstreamOptions};
use crate::error::Result;
use crate::lm::{LmCompletion, LmError, LmHandler, LmRequest, Prompt, Secret};

const BASE_URL: &str = "https://api.anthropic.com";
const VERSION: &str = "2023-06-01";
/// The interface asks for a limit.
const OUTPUT_TOKENS_MAX: u32 = 8192;

/// Answers by a model behind Anthropic's messages: it posts to `{base_url}/v1/messages`.
///
/// A chat is put in the form that the interface wants: what the roles `system` and `developer` say is
/// joined by blank lines and sent as `system`, and messages of the same role that follow each other
/// become one. A message of the assistant at the end is the beginning of the answer. All else is as with
/// [`OpenAiHandler`](super::OpenAiHandler). Tokens that the server keeps or finds in its cache count as
/// sent, at the full price.
///
/// # Example
///
/// ```no_run
/// use kaa::lm::{AnthropicHandler, LmHandler, LmKind, LmRequest, Prompt, Secret, UpstreamOptions};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let key = Some(Secret::new(std::env::var("ANTHROPIC_API_KEY")?));
/// let options = UpstreamOptions { key, ..Default::default() };
/// let handler = AnthropicHandler::new("claude-sonnet-4-5", options)?;
/// let prompt = Prompt::Text("Name a prime.".into());
/// let request = LmRequest { kind: LmKind::Llm, prompt, model: None, depth: 1 };
/// println!("{}", handler.complete(&request).await?.response);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct AnthropicHandler {
    upstream: Upstream,
}

impl AnthropicHandler {
    /// The base URL of Anthropic itself.
    pub const BASE_URL: &'static str = BASE_URL;

    /// A handler for `model`, as the provider names it. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// As [`OpenAiHandler::new`](super::OpenAiHandler::new).
    ///
    /// # Example
    ///
    /// ```
    /// use kaa::lm::{AnthropicHandler, UpstreamOptions};
    ///
    /// let options = UpstreamOptions { concurrency: 0, ..UpstreamOptions::default() };
    /// assert_eq!(
    ///     AnthropicHandler::new("m", options).unwrap_err().to_string(),
    ///     "concurrency: it must be between 1 and 65536"
    /// );
    /// ```
    pub fn new(model: impl Into<String>, options: UpstreamOptions) -> Result<Self> {
        let base_url = options.base_url.clone().unwrap_or_else(|| BASE_URL.to_owned());
        let mut headers = vec![("anthropic-version", Secret::new(VERSION))];
        headers.extend(options.key.clone().map(|key| ("x-api-key", key)));
        let upstream = Upstream::new(model.into(), options, &base_url, "/v1/messages", &headers)?;
        Ok(Self { upstream })
    }

    fn body(&self, prompt: &Prompt) -> Result<Vec<u8>, String> {
        let options = &self.upstream.options;
        let chat = match prompt {
            Prompt::Text(text) => ChatJson::of_text(text),
            Prompt::Messages(chat) => ChatJson::of_messages(messages(chat, options.remote_parts)?)?,
        };
        let mut more = Map::new();
        let most = options.output_tokens_max.unwrap_or(OUTPUT_TOKENS_MAX);
        more.insert("max_tokens".into(), most.into());
        more.extend(options.parameters.clone());
        let body = BodyJson { model: &self.upstream.model, chat, more };
        serde_json::to_vec(&body).map_err(|e| e.to_string())
    }

    /// Reads the body of an answer.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn read(&self, request: &LmRequest, body: Vec<u8>) -> Result<LmCompletion, LmError> {
        self.upstream.read(request, body, ReplyJson::answer)
    }
}

#[async_trait]
impl LmHandler for AnthropicHandler {
    fn model_name(&self, _depth: i32) -> Option<&str> {
        Some(self.upstream.model())
    }

    fn expected_cost(&self, request: &LmRequest) -> Option<f64> {
        self.upstream.expected_cost(request)
    }

    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        self.upstream.complete(request, self.body(&request.prompt), ReplyJson::answer).await
    }
}

#[derive(Serialize)]
struct BodyJson<'a> {
    model: &'a str,
    #[serde(flatten)]
    chat: ChatJson<'a>,
    #[serde(flatten)]
    more: Map<String, Json>,
}

#[derive(Serialize)]
struct ChatJson<'a> {
    #[serde(skip_serializing_if = "String::is_empty")]
    system: String,
    messages: Vec<MessageJson<'a>>,
}

#[derive(Serialize)]
struct MessageJson<'a> {
    role: &'a str,
    content: Vec<PartJson<'a>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum PartJson<'a> {
    Text { r#type: &'static str, text: &'a str },
    Other(&'a Json),
}

impl<'a> PartJson<'a> {
    fn text(text: &'a str) -> Self {
        Self::Text { r#type: "text", text }
    }
}

impl<'a> ChatJson<'a> {
    fn of_text(text: &'a str) -> Self {
        let message = MessageJson { role: "user", content: vec![PartJson::text(text)] };
        Self { system: String::new(), messages: vec![message] }
    }

    fn of_messages(list: &'a [Json]) -> Result<Self, String> {
        let mut chat = Self { system: String::new(), messages: Vec::new() };
        for (i, message) in list.iter().enumerate() {
            let parts = parts(&message["content"])
                .ok_or_else(|| of_message(i, "its content is neither a text nor a list"))?;
            match message["role"].as_str().unwrap_or_default() {
                "system" | "developer" => chat.add_system(&parts, i)?,
                role @ ("user" | "assistant") => match chat.messages.last_mut() {
                    Some(last) if last.role == role => last.content.extend(parts),
                    _ => chat.messages.push(MessageJson { role, content: parts }),
                },
                role => {
                    let role = quoted(role);
                    let reason =
                        format!("role {role} is not known here; use system, user or assistant");
                    return Err(of_message(i, &reason));
                }
            }
        }
        if chat.messages.is_empty() {
            return Err("the prompt has no message of a user".into());
        }
        Ok(chat)
    }

    fn add_system(&mut self, parts: &[PartJson<'_>], i: usize) -> Result<(), String> {
        for part in parts {
            let text = match part {
                PartJson::Text { text, .. } => Some(*text),
                PartJson::Other(json) => json["text"].as_str(),
            };
            let text = text.ok_or_else(|| of_message(i, "a system message can have only text"))?;
            if !self.system.is_empty() {
                self.system.push_str("\n\n");
            }
            self.system.push_str(text);
        }
        Ok(())
    }
}

fn parts(content: &Json) -> Option<Vec<PartJson<'_>>> {
    match content {
        Json::String(text) => Some(vec![PartJson::text(text)]),
        Json::Array(parts) => Some(parts.iter().map(PartJson::Other).collect()),
        _ => None,
    }
}

#[derive(Deserialize)]
struct ReplyJson {
    content: Option<Text>,
    stop_reason: Option<String>,
    #[serde(default)]
    usage: Loose<UsageJson>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct UsageJson {
    input_tokens: Number,
    cache_creation_input_tokens: Number,
    cache_read_input_tokens: Number,
    output_tokens: Number,
}

impl ReplyJson {
    fn answer(self) -> Answer {
        let usage = self.usage.object().unwrap_or_default();
        let cached = [&usage.cache_creation_input_tokens, &usage.cache_read_input_tokens];
        let cached = cached.iter().filter_map(|count| count.count()).fold(0, u64::saturating_add);
        let counts = Counts {
            input_tokens: usage.input_tokens.count().map(|input| input.saturating_add(cached)),
            output_tokens: usage.output_tokens.count(),
            cost: None,
        };
        let is_refused = self.stop_reason.as_deref() == Some("refusal");
        let text = match self.content {
            None => Err("the answer has no content".to_owned()),
            Some(Text(text)) => match text.unwrap_or_default() {
                text if text.is_empty() && is_refused => Err("the model refused to answer".into()),
                text => Ok(text),
            },
        };
        Answer { text, counts }
    }
}
