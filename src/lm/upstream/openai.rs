//! OpenAI's chat completions.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::chat::messages;
use super::reply::{First, Loose, Number, Text};
use super::{Answer, Counts, Upstream, UpstreamOptions, UserText};
use crate::error::Result;
use crate::lm::{LmCompletion, LmError, LmHandler, LmRequest, Prompt, Secret};

const BASE_URL: &str = "https://api.openai.com/v1";

/// Answers by a model behind OpenAI's chat completions, which most servers of models speak: it posts to
/// `{base_url}/chat/completions`.
///
/// A text is sent as one message of a user; a chat as it is, if all in it is a text or an image given
/// inline (see [`UpstreamOptions::remote_parts`]). What is asked is always the model that the
/// handler was made for; a name that the guest gives is only repeated in the
/// [completion](LmCompletion::model) (to choose by name there is [`ModelRouter`](crate::lm::ModelRouter)).
/// Usage is booked under the handler's name for the model: the server's count of tokens, or where it
/// gives none one per four characters. An answer without text, such as a refusal, is an error that has
/// its usage, for it is paid for too.
///
/// Errors are short and begin with the model's name; none has the key in it. See [`UpstreamOptions`]
/// for the limits and [`Retries`](super::Retries) for what is tried again. Redirects aren't followed. A
/// call belongs to the future that it's in: to drop that ends the request.
///
/// # Example
///
/// ```no_run
/// use kaa::lm::{LmHandler, LmKind, LmRequest, OpenAiHandler, Prompt, Secret, UpstreamOptions};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let key = Some(Secret::new(std::env::var("OPENAI_API_KEY")?));
/// let handler = OpenAiHandler::new("gpt-5", UpstreamOptions { key, ..Default::default() })?;
/// let prompt = Prompt::Text("Name a prime.".into());
/// let request = LmRequest { kind: LmKind::Llm, prompt, model: None, depth: 1 };
/// println!("{}", handler.complete(&request).await?.response);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct OpenAiHandler {
    upstream: Upstream,
    /// What the server calls the limit of an answer's tokens.
    limit_name: &'static str,
}

impl OpenAiHandler {
    /// The base URL of OpenAI itself.
    pub const BASE_URL: &'static str = BASE_URL;

    /// A handler for `model`, as the provider names it. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) names the option that can't be used;
    /// [`Error::Unavailable`](crate::Error::Unavailable) if the system has no certificates for TLS.
    ///
    /// # Example
    ///
    /// ```
    /// use kaa::lm::{OpenAiHandler, UpstreamOptions};
    ///
    /// let base_url = Some("api.example.org".to_owned());
    /// let error = OpenAiHandler::new("m", UpstreamOptions { base_url, ..Default::default() });
    /// assert_eq!(
    ///     error.unwrap_err().to_string(),
    ///     "base_url: it is no URL; write it as https://HOST/v1"
    /// );
    /// ```
    pub fn new(model: impl Into<String>, options: UpstreamOptions) -> Result<Self> {
        let base_url = options.base_url.clone().unwrap_or_else(|| BASE_URL.to_owned());
        let limit_name = match base_url.trim_end_matches('/') {
            BASE_URL => "max_completion_tokens",
            _ => "max_tokens",
        };
        let bearer = |key: &Secret| Secret::new(format!("Bearer {}", key.expose()));
        let key = options.key.as_ref().map(|key| ("authorization", bearer(key)));
        let path = "/chat/completions";
        let upstream = Upstream::new(model.into(), options, &base_url, path, key.as_slice())?;
        Ok(Self { upstream, limit_name })
    }

    fn body(&self, prompt: &Prompt) -> Result<Vec<u8>, String> {
        let options = &self.upstream.options;
        let messages = match prompt {
            Prompt::Text(text) => MessagesJson::Text([UserText::new(text)]),
            Prompt::Messages(chat) => MessagesJson::Chat(messages(chat, options.remote_parts)?),
        };
        let mut more = Map::new();
        if let Some(most) = options.output_tokens_max {
            more.insert(self.limit_name.into(), most.into());
        }
        more.extend(options.parameters.clone());
        let body = BodyJson { model: &self.upstream.model, messages, more };
        serde_json::to_vec(&body).map_err(|e| e.to_string())
    }

    /// Reads the body of an answer.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn read(&self, request: &LmRequest, body: Vec<u8>) -> Result<LmCompletion, LmError> {
        self.upstream.read(request, body, ReplyJson::answer)
    }
}

#[async_trait]
impl LmHandler for OpenAiHandler {
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
    messages: MessagesJson<'a>,
    #[serde(flatten)]
    more: Map<String, Json>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum MessagesJson<'a> {
    Text([UserText<'a>; 1]),
    Chat(&'a [Json]),
}

#[derive(Deserialize)]
struct ReplyJson {
    #[serde(default)]
    choices: First<ChoiceJson>,
    usage: Option<Loose<UsageJson>>,
}

#[derive(Deserialize)]
struct ChoiceJson {
    message: Option<MessageJson>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct MessageJson {
    #[serde(default)]
    content: Text,
    refusal: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct UsageJson {
    prompt_tokens: Number,
    completion_tokens: Number,
    /// In US dollars; some routers of models say it.
    cost: Number,
}

impl ReplyJson {
    fn answer(self) -> Answer {
        let usage = self.usage.and_then(Loose::object).unwrap_or_default();
        let counts = Counts {
            input_tokens: usage.prompt_tokens.count(),
            output_tokens: usage.completion_tokens.count(),
            cost: usage.cost.number().filter(|cost| *cost >= 0.0),
        };
        Answer { text: text(self.choices.0), counts }
    }
}

/// The text of an answer, or why it has none.
fn text(choice: Option<ChoiceJson>) -> Result<String, String> {
    let choice = choice.ok_or("the answer has no choices")?;
    let message = choice.message.ok_or("the answer's choice has no message")?;
    message.content.0.ok_or_else(|| match (message.refusal, choice.finish_reason) {
        (Some(refusal), _) => format!("the model refused: {refusal}"),
        (None, Some(why)) => format!("the answer has no text (finish_reason {why})"),
        (None, None) => "the answer has no text".into(),
    })
}
