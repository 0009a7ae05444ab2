//! One poll at a time, and many answers under way.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::{Instant, sleep, timeout};

use super::answer::{Models, Responder};
use super::{BACKOFF, Broker, BrokerOptions, Fault};
use crate::error::Error;
use crate::lm::LmHandler;

/// Bytes and number of answers that are kept for items that come again.
const KEPT_BYTES_MAX: usize = 64 << 20;
const KEPT_MAX: usize = 1024;
/// Bytes of requests under way, beyond which no more are taken: what a broker that isn't what it should
/// be can make the host hold, beside one answer of its own.
const HELD_BYTES_MAX: usize = 256 << 20;
/// Longer than any item waits.
const TIMEOUT_MAX: f64 = 24.0 * 60.0 * 60.0;

/// An item's id, and what stands for its request: a guest may use an id again for another.
type Key = (String, [u8; 32]);

impl Broker {
    /// Answers what guests ask until the broker is gone, and returns why. Dropping the future cancels
    /// the calls that are under way, on the next turn of the runtime.
    ///
    /// A request is given to the handler once, even if its delivery or its answer was lost on the way
    /// and it comes again; answers are sent until the broker has them. The handler is asked for
    /// completions ([`LmKind::Llm`](crate::lm::LmKind::Llm)); a panic in it fails its own request alone.
    ///
    /// The error is [`Error::Unavailable`] when the broker was out of reach for `gone_after`, and
    /// [`Error::Invalid`] if it doesn't take the token.
    pub async fn serve(&self, handler: Arc<dyn LmHandler>) -> Error {
        let BrokerOptions { batch_concurrency, prompts_max, .. } = self.options;
        self.attend(Arc::new(Models { handler, batch_concurrency, prompts_max })).await
    }

    /// As [`serve`](Self::serve), for whatever is asked.
    pub(crate) async fn attend(&self, responder: Arc<dyn Responder>) -> Error {
        let mut desk = Desk {
            broker: Arc::new(self.clone()),
            responder,
            calls: JoinSet::new(),
            held: HashMap::new(),
            kept: Kept::default(),
        };
        // Since when each poll has failed: one that waited for an answer in vain is a fault of now.
        let mut failing: Option<Instant> = None;
        let mut pause = BACKOFF.0;
        loop {
            match desk.poll().await {
                Some(Ok(found)) => {
                    (failing, pause) = (None, BACKOFF.0);
                    if !desk.take(&found) {
                        // Whoever has nothing to say takes its time, or else is made to.
                        sleep(BACKOFF.0).await;
                    }
                }
                Some(Err(Fault::Refused(
                    status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN),
                    reason,
                ))) => {
                    return Error::invalid(
                        "broker token",
                        format!("the broker refuses it ({status}): {reason}"),
                    );
                }
                Some(Err(Fault::Passing(reason) | Fault::Refused(_, reason))) => {
                    let since = *failing.get_or_insert_with(Instant::now);
                    if since.elapsed() >= self.options.gone_after {
                        let waited = self.options.gone_after;
                        return self.gone(&format!("out of reach for {waited:?}: {reason}"));
                    }
                    sleep(pause).await;
                    pause = (pause * 2).min(BACKOFF.1);
                }
                // A place became free.
                None => {}
            }
        }
    }

    /// Brings an answer to the broker, until it has it or nobody waits for it.
    async fn deliver(&self, id: &str, answer: &Json) {
        let mut body = json!({"id": id, "response": answer}).to_string().into_bytes();
        let until = Instant::now() + self.options.gone_after;
        let mut pause = BACKOFF.0;
        while Instant::now() < until {
            match self.call(Method::POST, "respond", Some(body.clone()), Duration::ZERO).await {
                Err(Fault::Passing(_)) => {}
                Err(Fault::Refused(StatusCode::PAYLOAD_TOO_LARGE, _)) => {
                    let error = json!({"error": "the answer is larger than the broker allows"});
                    body = json!({"id": id, "response": error}).to_string().into_bytes();
                }
                Ok(_) | Err(Fault::Refused(..)) => return,
            }
            sleep(pause).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }
}

/// A request that is under way.
struct Held {
    call: AbortHandle,
    bytes: usize,
}

/// What is under way.
struct Desk {
    broker: Arc<Broker>,
    responder: Arc<dyn Responder>,
    calls: JoinSet<(Key, Json)>,
    held: HashMap<String, Held>,
    kept: Kept,
}

impl Desk {
    /// What the broker says to one poll; `None` if it waited for a place and there is one.
    async fn poll(&mut self) -> Option<Result<Json, Fault>> {
        let options = &self.broker.options;
        let held: usize = self.held.values().map(|held| held.bytes).sum();
        let most = match held {
            0..HELD_BYTES_MAX => options.concurrency.saturating_sub(self.calls.len()),
            _ => 0,
        };
        let body = json!({
            "wait": options.poll.as_secs_f64(),
            "max": most,
            "held": self.held.keys().collect::<Vec<_>>(),
            "form": "text",
        });
        let body = body.to_string().into_bytes();
        let broker = Arc::clone(&self.broker);
        let mut poll = pin!(broker.call(Method::POST, "pending", Some(body), broker.options.poll));
        loop {
            tokio::select! {
                biased;
                Some(ended) = self.calls.join_next_with_id() => {
                    match ended {
                        Ok((id, (key, answer))) => {
                            self.release(id);
                            self.kept.keep(key, answer);
                        }
                        Err(error) => self.release(error.id()),
                    }
                    if most == 0 {
                        return None;
                    }
                }
                found = &mut poll => return Some(found),
            }
        }
    }

    fn release(&mut self, task: Id) {
        self.held.retain(|_, held| held.call.id() != task);
    }

    /// Begins with what was found, and stops what nobody waits for any more. Whether there was anything.
    fn take(&mut self, found: &Json) -> bool {
        let mut any = false;
        for id in found["gone"].as_array().into_iter().flatten().filter_map(Json::as_str) {
            if let Some(held) = self.held.remove(id) {
                any = true;
                held.call.abort();
            }
        }
        for item in found["pending"].as_array().into_iter().flatten() {
            let (Some(id), Some(request)) = (item["id"].as_str(), item["request"].as_str()) else {
                continue;
            };
            if self.held.contains_key(id) || !is_identifier(id) {
                continue;
            }
            // What is more than was asked for comes from something else than a broker.
            if self.calls.len() >= self.broker.options.concurrency {
                break;
            }
            any = true;
            let seconds = item["timeout"].as_f64().unwrap_or(0.0).clamp(0.0, TIMEOUT_MAX);
            let key = (id.to_owned(), Sha256::digest(request).into());
            let known = self.kept.find(&key);
            let (broker, responder) = (Arc::clone(&self.broker), Arc::clone(&self.responder));
            let (text, bytes) = (request.to_owned(), request.len());
            let call = self.calls.spawn(async move {
                let found = match known {
                    Some(known) => known,
                    None => {
                        // A task of its own, so that a panic is known to be one.
                        let asked = answered(responder, text);
                        let limit = Duration::from_secs_f64(seconds);
                        match timeout(limit, asked).await {
                            Ok(found) => found,
                            Err(_) => json!({"error": "Request timed out"}),
                        }
                    }
                };
                broker.deliver(&key.0, &found).await;
                (key, found)
            });
            self.held.insert(id.to_owned(), Held { call, bytes });
        }
        any
    }
}

/// Whether a broker takes it for an id.
fn is_identifier(id: &str) -> bool {
    let is_fine = |c: char| c.is_ascii_alphanumeric() || "_.:-".contains(c);
    (1..=64).contains(&id.len()) && id.chars().all(is_fine)
}

async fn answered(responder: Arc<dyn Responder>, text: String) -> Json {
    let mut one = JoinSet::new();
    one.spawn(async move { responder.respond(text).await });
    match one.join_next().await {
        Some(Ok(found)) => found,
        _ => json!({"error": "the host's handler panicked"}),
    }
}

/// Answers of late, oldest first.
#[derive(Default)]
struct Kept {
    answers: VecDeque<(Key, Json, usize)>,
    bytes: usize,
}

impl Kept {
    fn find(&self, key: &Key) -> Option<Json> {
        self.answers.iter().find(|(known, ..)| known == key).map(|(_, answer, _)| answer.clone())
    }

    fn keep(&mut self, key: Key, answer: Json) {
        if self.answers.iter().any(|(known, ..)| *known == key) {
            return;
        }
        let bytes = crate::lm::json_bytes(&answer);
        self.bytes += bytes;
        self.answers.push_back((key, answer, bytes));
        while self.bytes > KEPT_BYTES_MAX || self.answers.len() > KEPT_MAX {
            let Some((_, _, bytes)) = self.answers.pop_front() else { return };
            self.bytes -= bytes;
        }
    }
}
