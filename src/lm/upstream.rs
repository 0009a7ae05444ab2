//! Models behind an HTTP interface: what OpenAI's and Anthropic's have in common.
//!
//! `chat` says what of a guest's prompt is sent, `transport` is one try over HTTP, `retry` says when
//! there is another, `openai` and `anthropic` are the two formats.

mod anthropic;
mod chat;
mod openai;
mod options;
mod proxy;
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
pub(crate) use self::transport::{tls, trusted_roots};
use super::wire::replace_lone_surrogates;
use super::{LmCompletion, LmError, LmRequest, ModelUsage};
use super::{estimated_tokens, tokens_of};
use crate::error::{Error, Result};

/// What both handlers are: a model at a server, and the calls of it that are under way.
#[derive(Debug)]
struct Upstream {
    model: String,
    options: UpstreamOptions,
    transport: Transport,
    turns: Semaphore,
}

/// What an answer may be as long as, before there was one.
const ANSWER_TOKENS_EXPECTED: u64 = 1_000;

/// What a server said to a prompt.
struct Answer {
    /// Its text, or why it has none.
    text: Result<String, String>,
    counts: Counts,
}

/// What a server says that an answer cost.
#[derive(Clone, Copy, Default, PartialEq)]
struct Counts {
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

    /// What a prompt is likely to cost, where the price is known.
    fn expected_cost(&self, request: &LmRequest) -> Option<f64> {
        let tokens = estimated_tokens(request.prompt.bytes());
        self.options.price.map(|price| price.of(tokens, ANSWER_TOKENS_EXPECTED))
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
            let try_timeout = self.options.try_timeout;
            let until = deadline.min(time::Instant::now() + try_timeout);
            let fault = match self.transport.send(once, until).await {
                Some(Ok(answer)) => return Ok(answer),
                Some(Err(fault)) => fault,
                None if until < deadline => {
                    Fault::passing(format!("no answer within {try_timeout:?}"))
                }
                None => {
                    let reason = format!("no answer within {timeout:?}{}", after(tries - 1));
                    return Err(self.error(reason));
                }
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

    /// Reads the answer to a request; `wanted` takes what's needed out of its JSON.
    fn read<T: DeserializeOwned>(
        &self,
        request: &LmRequest,
        mut bytes: Vec<u8>,
        wanted: impl FnOnce(T) -> Answer,
    ) -> Result<LmCompletion, LmError> {
        replace_lone_surrogates(&mut bytes);
        let quote = |text: &str| self.transport.quote(text);
        let reply = serde_json::from_slice(&bytes).map_err(|e| {
            // These quote what they don't want.
            let found = quote(&e.to_string());
            self.error(match e.classify() {
                Category::Data => format!("the answer has not the form of a completion: {found}"),
                _ => format!("the answer is not JSON: {found}"),
            })
        })?;
        let Answer { text, counts } = wanted(reply);
        let usage = vec![self.usage(request, text.as_deref().unwrap_or_default(), counts)];
        let reason = match text {
            Ok(response) => {
                let model = request.model.as_ref().unwrap_or(&self.model).clone();
                return Ok(LmCompletion { model, response, usage, ..LmCompletion::default() });
            }
            Err(reason) => reason,
        };
        if !is_failure(&bytes) {
            return Err(self.error(quote(&reason)).with_usage(usage));
        }
        let error = self.error(format!("the server says: {}", self.transport.said(&bytes)));
        // What failed is paid for only where the server counts it.
        let is_counted = counts != Counts::default();
        Err(if is_counted { error.with_usage(usage) } else { error })
    }

    fn usage(&self, request: &LmRequest, text: &str, counts: Counts) -> ModelUsage {
        let input_tokens =
            counts.input_tokens.unwrap_or_else(|| tokens_of(&request.prompt.to_text()));
        let output_tokens = counts.output_tokens.unwrap_or_else(|| tokens_of(text));
        let price = self.options.price;
        let cost = price.map(|price| price.of(input_tokens, output_tokens)).or(counts.cost);
        ModelUsage { model: self.model.clone(), calls: 1, input_tokens, output_tokens, cost }
    }

    /// One call: `body` words the prompt, `wanted` reads the answer.
    async fn complete<T: DeserializeOwned>(
        &self,
        request: &LmRequest,
        body: Result<Vec<u8>, String>,
        wanted: impl FnOnce(T) -> Answer + Send,
    ) -> Result<LmCompletion, LmError> {
        let start = Instant::now();
        let body = body.map_err(|reason| self.error(reason))?;
        let bytes = self.post(body).await?;
        let completion = self.read(request, bytes, wanted)?;
        Ok(LmCompletion { execution_time: start.elapsed(), ..completion })
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
