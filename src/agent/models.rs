//! Calls of language models from inside a cell.

use serde_json::{Value as Json, json};

use super::{Answer, CALL_BYTES_KEPT_MAX, Conversation, Done};
use crate::environment::{LmCall, Profile};
use crate::error::{Error, Result};
use crate::lm::{LmCompletion, LmError, LmKind, LmRequest, Prompt};
use crate::protocol::{LmCallMessage, Message, decode_within, encode_text, text_of};
use crate::value::Value;

impl Conversation {
    pub(super) fn call_lm(&mut self, message: Message) -> Result<Answer> {
        let (call, body) = message.parse::<LmCallMessage>()?;
        let count = call.prompts.as_ref().map_or(1, Vec::len);
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let refuse = |text: String| {
            let results = (0..count).map(|_| Err(LmError::new(text.clone()))).collect();
            Done::Lm { requests: Vec::new(), results }
        };
        let Some(handler) = self.lm.clone() else {
            let done = refuse("No LM handler configured".into());
            return Ok(Answer::Now(self.finish(done)));
        };
        let spent = self.calls.lm;
        if spent.saturating_add(count) > self.limits.lm_calls {
            let done = refuse(format!(
                "LM call limit exceeded: {spent} + {count} > {}",
                self.limits.lm_calls
            ));
            return Ok(Answer::Now(self.finish(done)));
        }
        let bytes = self.calls.bytes.saturating_add(body.len());
        if bytes > CALL_BYTES_KEPT_MAX {
            let done = refuse(format!(
                "prompts and responses of one cell exceed {CALL_BYTES_KEPT_MAX} bytes"
            ));
            return Ok(Answer::Now(self.finish(done)));
        }
        let quota = self.quota.clone();
        if let Some(Err(error)) = quota.as_ref().map(|quota| quota.calls(count)) {
            let done = refuse(error.to_string());
            return Ok(Answer::Now(self.finish(done)));
        }
        self.calls.bytes = bytes;
        self.calls.lm += count;
        let kind = if call.kind == "rlm" { LmKind::Rlm } else { LmKind::Llm };
        let request =
            |prompt| LmRequest { kind, prompt, model: call.model.clone(), depth: self.depth };
        let requests: Vec<_> = prompts(call.prompts, body)?.into_iter().map(request).collect();
        let concurrency = self.limits.lm_concurrency as usize;
        Ok(Answer::Later(Box::pin(async move {
            let most = concurrency.min(requests.len());
            let permits = match &quota {
                // Those who answer with sessions must not wait for what these need.
                Some(quota) if !handler.nests(kind) => {
                    Some(quota.permits(u32::try_from(most).unwrap_or(u32::MAX)).await)
                }
                _ => None,
            };
            let concurrency = permits.as_ref().map_or(concurrency, |leave| leave.count() as usize);
            let results = match (call.batched, &requests[..]) {
                (false, [request]) => vec![handler.complete(request).await],
                _ => handler.complete_batch(&requests, concurrency).await,
            };
            Done::Lm { requests, results }
        })))
    }

    pub(super) fn finish_lm(
        &mut self,
        requests: Vec<LmRequest>,
        results: Vec<Result<LmCompletion, LmError>>,
    ) -> Message {
        if !requests.is_empty() && results.len() != requests.len() {
            let text = format!(
                "the LM handler gave {} answers to {} prompts",
                results.len(),
                requests.len()
            );
            return Message::new(json!({ "error": text }));
        }
        if self.profile == Profile::OpenEnv
            && let Some(error) = results.iter().find_map(|result| result.as_ref().err())
        {
            return Message::new(json!({ "error": error.message }));
        }
        let is_single = matches!(results.as_slice(), [Ok(one)] if !one.response.is_empty());
        let (mut requests, mut results) = (requests.into_iter(), results.into_iter());
        if is_single
            && requests.len() == 1
            && let (Some(request), Some(Ok(completion))) = (requests.next(), results.next())
        {
            return self.finish_single(request, completion);
        }
        let mut message = Message::default();
        let body = &mut message.body;
        let mut encode = |text: &str| encode_text(text, body);
        let responses: Vec<Json> = results
            .map(|result| match (requests.next(), result) {
                (Some(request), Ok(completion)) => {
                    self.calls.bytes = self.calls.bytes.saturating_add(completion.response.len());
                    let response = encode(&completion.response);
                    self.book(request.kind, &completion);
                    self.calls.completions.push(LmCall { prompt: request.prompt, completion });
                    response
                }
                (_, Err(error)) => encode(&format!("Error: {error}")),
                (None, Ok(completion)) => encode(&completion.response),
            })
            .collect();
        message.header.insert("responses".into(), responses.into());
        message
    }

    /// Counts what a call cost.
    fn book(&self, kind: LmKind, completion: &LmCompletion) {
        self.ledger.add(&completion.usage);
        let nests = self.lm.as_ref().is_some_and(|handler| handler.nests(kind));
        if let Some(quota) = self.quota.as_ref().filter(|_| !nests) {
            quota.book(&completion.usage);
        }
    }

    /// A single answer goes without a header, which would have to be taken apart, and is lent to the
    /// message.
    fn finish_single(&mut self, request: LmRequest, mut completion: LmCompletion) -> Message {
        self.calls.bytes = self.calls.bytes.saturating_add(completion.response.len());
        self.book(request.kind, &completion);
        let body = std::mem::take(&mut completion.response).into_bytes();
        self.calls.completions.push(LmCall { prompt: request.prompt, completion });
        self.calls.is_lent = true;
        Message { body, letter: true, ..Message::default() }
    }

    /// The message that [`finish`](Self::finish) made was sent, or can't be.
    pub(crate) fn take_back(&mut self, message: Message) {
        if std::mem::take(&mut self.calls.is_lent)
            && let Some(call) = self.calls.completions.last_mut()
        {
            call.completion.response = text_of(message.body);
        }
    }
}

/// The prompts of a call.
fn prompts(encoded: Option<Vec<Json>>, body: Vec<u8>) -> Result<Vec<Prompt>> {
    let Some(encoded) = encoded else { return Ok(vec![Prompt::Text(text_of(body))]) };
    let mut allowance = body.len();
    let prompt = |json| prompt_of(decode_within(json, &body, &mut allowance)?);
    encoded.into_iter().map(prompt).collect()
}

fn prompt_of(value: Value) -> Result<Prompt> {
    match value {
        Value::Str(text) => Ok(Prompt::Text(text)),
        Value::Wtf8(bytes) => Ok(Prompt::Text(text_of(bytes))),
        messages @ (Value::List(_) | Value::Map(_)) => messages
            .to_json()
            .map(Prompt::Messages)
            .ok_or_else(|| Error::protocol("a prompt with parts that JSON has no form for")),
        _ => Err(Error::protocol("a prompt that is neither text nor messages")),
    }
}
