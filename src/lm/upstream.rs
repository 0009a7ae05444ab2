//! Models behind an HTTP interface: what OpenAI's and Anthropic's have in common.
//!
//! `chat` says what of a guest's prompt is sent, `transport` is one try over HTTP, `retry` says when
//! there is another, `openai` and `anthropic` are the two formats.

mod anthropic;
mod chat;
mod openai;
mod options;
mod reply;
mod retry;
mod transport;

use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::Value as Json;
use serde_json::error::Category;
use tokio::sync::Semaphore;
use tokio::time;

pub use self::anthropic::AnthropicHandler;
pub use self::openai::OpenAiHandler;
pub use self::options::{HttpProxy, Price, Retries, Secret, UpstreamOptions};
use self::transport::{Fault, Transport};
use super::tokens_of;
use super::wire::replace_lone_surrogates;
use super::{LmCompletion, LmError, LmRequest, ModelUsage};
use crate::error::{Error, Result};

/// What both handlers are: a model at a server, and the calls of it that are under way.
#[derive(Debug)]
struct Upstream {
    model: String,
    options: UpstreamOptions,
    transport: Transport,
    turns: Semaphore,
}

/// What a server said to a prompt.
struct Answer {
    text: String,
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    /// In US dollars, where the server names it.
    cost: Option<f64>,
}

impl Upstream {
    fn new(
        model: String,
        options: UpstreamOptions,
        base_url: &str,
        path: &str,
        headers: &[(&str, Secret)],
    ) -> Result<Self> {
        if model.trim().is_empty() {
            return Err(Error::invalid(
                "model",
                "the name is empty; write it as the provider does",
            ));
        }
        options.validate()?;
        let transport = Transport::new(&options, base_url, path, headers)?;
        let turns = Semaphore::new(options.concurrency);
        Ok(Self { model, options, transport, turns })
    }

    pub(super) fn model(&self) -> &str {
        &self.model
    }

    /// An error of this model.
    fn error(&self, reason: impl std::fmt::Display) -> LmError {
        LmError::new(format!("{}: {reason}", self.model))
    }

    /// The answer to `body`, after as many tries as it takes and may take.
    async fn post(&self, body: Vec<u8>) -> Result<Vec<u8>, LmError> {
        let timeout = self.options.timeout;
        let deadline = time::Instant::now() + timeout;
        let turn = time::timeout_at(deadline, self.turns.acquire()).await;
        // A turn that comes with the deadline is of no use.
        let turn = turn.ok().and_then(Result::ok).filter(|_| time::Instant::now() < deadline);
        let Some(_turn) = turn else {
            let most = self.options.concurrency;
            return Err(self.error(format!(
                "no turn within {timeout:?}: there were {most} calls under way all the time"
            )));
        };
        let request = self.transport.request(body);
        let mut tries = 0;
        loop {
            // A body of bytes can be sent as often as wanted.
            let Some(once) = request.try_clone() else {
                return Err(self.error("the request can't be repeated"));
            };
            tries += 1;
            let Ok(result) = time::timeout_at(deadline, self.transport.send(once)).await else {
                return Err(self.error(format!("no answer within {timeout:?}{}", after(tries - 1))));
            };
            let fault = match result {
                Ok(answer) => return Ok(answer),
                Err(fault) => fault,
            };
            let wait = self.wait(&fault, tries, deadline).map_err(|error| self.error(error))?;
            time::sleep(wait).await;
        }
    }

    /// How long to wait before another try, or why there is none.
    fn wait(&self, fault: &Fault, tries: u32, deadline: time::Instant) -> Result<Duration, String> {
        let retries = &self.options.retries;
        let limited = if fault.limited { "rate limited: " } else { "" };
        let reason = format!("{limited}{}", fault.reason);
        if !fault.again {
            return Err(reason);
        }
        if let Some(asked) = fault.after
            && asked > retries.retry_after_max
        {
            let most = retries.retry_after_max;
            return Err(format!(
                "{reason} (the server asks to wait for {asked:?}; at most {most:?} are waited)"
            ));
        }
        if tries > retries.max {
            return Err(format!("{reason}{}", after(tries)));
        }
        let wait = retry::wait(retries, tries, fault.after);
        if wait >= deadline.saturating_duration_since(time::Instant::now()) {
            let timeout = self.options.timeout;
            return Err(format!(
                "{reason}{}, and the next would begin beyond the limit of {timeout:?}",
                after(tries)
            ));
        }
        Ok(wait)
    }

    /// Reads an answer; `wanted` takes what's needed out of its JSON, if that is there.
    fn read<T: DeserializeOwned>(
        &self,
        mut bytes: Vec<u8>,
        wanted: impl FnOnce(T) -> Result<Answer, String>,
    ) -> Result<Answer, LmError> {
        replace_lone_surrogates(&mut bytes);
        let quote = |text: &str| self.transport.quote(text);
        match serde_json::from_slice(&bytes) {
            Ok(reply) => wanted(reply).map_err(|reason| match is_failure(&bytes) {
                true => self.error(format!("the server says: {}", self.transport.said(&bytes))),
                false => self.error(quote(&reason)),
            }),
            // These quote what they don't want.
            Err(e) => Err(self.error(match e.classify() {
                Category::Data => {
                    format!(
                        "the answer has not the form of a completion: {}",
                        quote(&e.to_string())
                    )
                }
                _ => format!("the answer is not JSON: {}", quote(&e.to_string())),
            })),
        }
    }

    fn completion(
        &self,
        request: &LmRequest,
        answer: Answer,
        execution_time: Duration,
    ) -> LmCompletion {
        let input_tokens =
            answer.input_tokens.unwrap_or_else(|| tokens_of(&request.prompt.to_text()));
        let output_tokens = answer.output_tokens.unwrap_or_else(|| tokens_of(&answer.text));
        let price = self.options.price;
        let cost = price.map(|price| price.of(input_tokens, output_tokens)).or(answer.cost);
        let usage =
            ModelUsage { model: self.model.clone(), calls: 1, input_tokens, output_tokens, cost };
        LmCompletion {
            model: request.model.as_ref().unwrap_or(&self.model).clone(),
            response: answer.text,
            usage: vec![usage],
            execution_time,
            ..LmCompletion::default()
        }
    }

    /// One call: `body` words the prompt, `wanted` reads the answer.
    async fn complete<T: DeserializeOwned>(
        &self,
        request: &LmRequest,
        body: Result<Vec<u8>, String>,
        wanted: impl FnOnce(T) -> Result<Answer, String> + Send,
    ) -> Result<LmCompletion, LmError> {
        let start = Instant::now();
        let body = body.map_err(|reason| self.error(reason))?;
        let bytes = self.post(body).await?;
        let answer = self.read(bytes, wanted)?;
        Ok(self.completion(request, answer, start.elapsed()))
    }
}

/// How many tries there were, if that says anything.
fn after(tries: u32) -> String {
    match tries {
        0 | 1 => String::new(),
        tries => format!(" (after {tries} tries)"),
    }
}

/// Some servers say that they failed with the status of success.
fn is_failure(bytes: &[u8]) -> bool {
    const FAILURE_BYTES_MAX: usize = 64 << 10;
    let json: Option<Json> =
        (bytes.len() <= FAILURE_BYTES_MAX).then(|| serde_json::from_slice(bytes).ok()).flatten();
    json.is_some_and(|json| json.get("error").is_some_and(|error| !error.is_null()))
}

/// The message that a plain text is.
#[derive(serde::Serialize)]
struct UserText<'a> {
    role: &'static str,
    content: &'a str,
}

impl<'a> UserText<'a> {
    fn new(content: &'a str) -> Self {
        Self { role: "user", content }
    }
}
