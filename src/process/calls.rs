//! Calls of a session's worker that come by a broker.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value as Json, json};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::CallCarrier;
use crate::broker::{Broker, Responder};
use crate::error::{Error, Result};
use crate::protocol::Message;

/// Bytes of a call or an answer: as many as the broker takes of a guest, in base64 and with what is
/// around them. Longer calls take the other way.
pub(crate) const CARRIED_BYTES_MAX: usize = 11 << 20;
/// Bytes of an answer, likewise.
const ANSWER_BYTES_MAX: usize = 47 << 20;

/// The calls that a broker brings. A task of its own talks with it, so that answers are sent also after
/// the turn; it ends when this is dropped.
pub(crate) struct BrokerCalls {
    queue: mpsc::Receiver<Carried>,
    answers: HashMap<u64, oneshot::Sender<Message>>,
    last_key: u64,
    /// Whose calls count.
    worker: u64,
    talking: JoinHandle<String>,
    /// Why there is no broker any more.
    end: Option<String>,
}

/// A call, and where its answer goes.
struct Carried {
    worker: u64,
    bytes: Bytes,
    reply: oneshot::Sender<Message>,
}

/// What a worker posts, and anything else in the sandbox can, too.
#[derive(Deserialize)]
struct Posted {
    frame: String,
    worker: u64,
}

/// Puts what is asked into the queue.
struct Queue(mpsc::Sender<Carried>);

#[async_trait]
impl Responder for Queue {
    async fn respond(&self, text: String) -> Json {
        let Ok(Posted { frame, worker }) = serde_json::from_str(&text) else {
            return json!({"error": "it is no call of a session; ask with `llm_query` there"});
        };
        drop(text);
        let bytes = match STANDARD.decode(frame) {
            Ok(bytes) => Bytes::from(bytes),
            Err(error) => return json!({"error": format!("the frame is not base64: {error}")}),
        };
        let (reply, answer) = oneshot::channel();
        // The session is closed, or has another worker, if nobody answers.
        let gone = json!({"error": "the worker is gone"});
        if self.0.send(Carried { worker, bytes, reply }).await.is_err() {
            return gone;
        }
        answer.await.map_or(gone, |message| encoded(&message))
    }
}

/// An answer as the worker reads it.
fn encoded(message: &Message) -> Json {
    let head = message.head();
    let length = head.len() + message.body.len();
    if length > ANSWER_BYTES_MAX {
        let text =
            format!("the answer has {length} bytes; by a broker it may have {ANSWER_BYTES_MAX}");
        return encoded(&Message::new(json!({"error": text, "type": "RuntimeError"})));
    }
    json!({"frame": STANDARD.encode([&head[..], &message.body].concat())})
}

impl BrokerCalls {
    /// Begins to ask for calls, until `ended` says why there is no broker any more. Needs a runtime.
    pub(crate) fn new(
        broker: Broker,
        ended: impl Future<Output = String> + Send + 'static,
    ) -> Self {
        // The broker's options bound how many are under way; here they only pass by.
        let (send, queue) = mpsc::channel(1);
        let talking = tokio::spawn(async move {
            tokio::select! {
                error = broker.attend(Arc::new(Queue(send))) => error.to_string(),
                reason = ended => reason,
            }
        });
        Self { queue, answers: HashMap::new(), last_key: 0, worker: 0, talking, end: None }
    }
}

#[async_trait]
impl CallCarrier for BrokerCalls {
    async fn next(&mut self) -> Result<(u64, Bytes)> {
        while let Some(Carried { worker, bytes, reply }) = self.queue.recv().await {
            // Those of workers before this one, and those that nobody waits for any more, are dropped.
            if worker == self.worker && !reply.is_closed() {
                self.last_key += 1;
                self.answers.insert(self.last_key, reply);
                return Ok((self.last_key, bytes));
            }
        }
        if self.end.is_none() {
            let end = (&mut self.talking).await;
            self.end = Some(end.unwrap_or_else(|error| error.to_string()));
        }
        Err(Error::Poisoned { reason: self.end.clone().unwrap_or_default() })
    }

    fn answer(&mut self, key: u64, message: Message) {
        if let Some(reply) = self.answers.remove(&key) {
            // Without the task nobody waits for it.
            drop(reply.send(message));
        }
    }

    fn begin_worker(&mut self, worker: u64) {
        self.worker = worker;
        self.answers.clear();
    }
}

impl Drop for BrokerCalls {
    fn drop(&mut self) {
        self.talking.abort();
    }
}
