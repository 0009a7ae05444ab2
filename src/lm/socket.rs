//! Client of RLM's LM handler protocol.

use std::io;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time;

use super::wire::{CompletionJson, ReplyJson, RequestJson, values_at_most};
use super::{LmCompletion, LmError, LmHandler, LmKind, LmRequest, LmToken};
use crate::error::{Error, Result};
use crate::frame;

const CONNECT_TIMEOUT_MAX: Duration = Duration::from_secs(10);
/// RLM's own client waits as long.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(300);
/// More than what a server of Kaa's sends unless it's told to.
const REPLY_BYTES_MAX_DEFAULT: usize = 128 << 20;
/// The header's range; what a guest may ask is its environment's affair.
const REQUEST_BYTES_MAX: usize = u32::MAX as usize;

/// What RLM's client says when the reply has no list.
const NO_COMPLETIONS: &str = "No completions returned";

/// Passes calls to a server that speaks RLM's LM handler protocol, as `rlm.core.lm_handler` does.
///
/// Every call opens a connection, sends one frame, reads one and closes; a batch is one call with
/// all its prompts. The wire does not tell `rlm_query` from `llm_query`, so both are sent alike.
///
/// | limit | default |
/// |---|---|
/// | connecting | 10 s, or the timeout if that is shorter |
/// | timeout: sending the request and reading the reply | 300 s |
/// | size of a reply, checked before memory is taken for it | 128 MiB and the request's size |
/// | values in the JSON of a reply, fixed | 524,288 and those of the request |
///
/// A reply repeats its prompts, which therefore don't count: all that the request has is allowed
/// on top.
///
/// The request's size is not limited here beyond the protocol's 4 GiB, and `concurrency` of a
/// batch is the server's affair (RLM's runs 16 at once).
///
/// Failures are worded as RLM's own client does it: `Request failed: [Errno 111] Connection
/// refused` if there was no reply, the server's own text if it refused, `No completions returned`
/// for a batch without list.
/// A server in Python may send half of a surrogate pair (`"\ud83d"` alone), which is valid JSON but
/// no Unicode text: each such half becomes U+FFFD.
///
/// # Example
///
/// ```no_run
/// use kaa::lm::{LmHandler, LmKind, LmRequest, Prompt, SocketHandler};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let handler = SocketHandler::new("127.0.0.1:4242")?;
/// let prompt = Prompt::Text("Name a prime.".into());
/// let request = LmRequest { kind: LmKind::Llm, prompt, model: None, depth: 1 };
/// println!("{}", handler.complete(&request).await?.response);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct SocketHandler {
    address: String,
    timeout: Duration,
    reply_bytes_max: usize,
    token: Option<LmToken>,
}

impl SocketHandler {
    /// A handler for the server at `HOST:PORT`. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if that is not the form of `address`.
    ///
    /// # Example
    ///
    /// ```
    /// use kaa::lm::SocketHandler;
    ///
    /// for address in ["127.0.0.1:4242", "localhost:4242", "[::1]:4242"] {
    ///     SocketHandler::new(address).unwrap();
    /// }
    /// assert_eq!(
    ///     SocketHandler::new("localhost").unwrap_err().to_string(),
    ///     "LM handler address \"localhost\": write HOST:PORT, for example 127.0.0.1:4242"
    /// );
    /// ```
    pub fn new(address: impl Into<String>) -> Result<Self> {
        let address = address.into();
        if !is_host_and_port(&address) {
            return Err(Error::invalid(
                format!("LM handler address {address:?}"),
                "write HOST:PORT, for example 127.0.0.1:4242",
            ));
        }
        let (timeout, reply_bytes_max) = (TIMEOUT_DEFAULT, REPLY_BYTES_MAX_DEFAULT);
        Ok(Self { address, timeout, reply_bytes_max, token: None })
    }

    /// Gives up when the answer is not there after `timeout`, counted from the connection.
    ///
    /// # Example
    ///
    /// ```
    /// use std::time::Duration;
    /// use kaa::lm::SocketHandler;
    ///
    /// # fn main() -> kaa::Result<()> {
    /// let handler = SocketHandler::new("127.0.0.1:4242")?.with_timeout(Duration::from_secs(20));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Refuses replies, counted without the header, of more than `reply_bytes_max` bytes and as
    /// many as the request has, which they repeat. 128 MiB if this isn't said.
    ///
    /// # Example
    ///
    /// ```
    /// use kaa::lm::SocketHandler;
    ///
    /// # fn main() -> kaa::Result<()> {
    /// let handler = SocketHandler::new("127.0.0.1:4242")?.with_reply_bytes_max(1 << 20);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_reply_bytes_max(self, reply_bytes_max: usize) -> Self {
        Self { reply_bytes_max, ..self }
    }

    /// Sends `token` with every request, as an [`LmServer`](super::LmServer) with a token wants it.
    ///
    /// # Example
    ///
    /// ```
    /// use kaa::lm::{LmToken, SocketHandler};
    ///
    /// # fn main() -> kaa::Result<()> {
    /// let token = LmToken::new("b9f3c0a1d27e4856")?;
    /// let handler = SocketHandler::new("lm.internal:4242")?.with_token(token);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_token(self, token: LmToken) -> Self {
        Self { token: Some(token), ..self }
    }

    /// A request like `first`, still without what it asks.
    fn request<'a>(&'a self, first: &'a LmRequest) -> RequestJson<'a> {
        RequestJson {
            prompt: None,
            prompts: None,
            model: first.model.as_deref(),
            depth: first.depth,
            token: self.token.as_ref().map(LmToken::as_str),
        }
    }

    async fn exchange(&self, request: &RequestJson<'_>) -> Result<ReplyJson, LmError> {
        let payload = request.encode().map_err(request_failed)?;
        let connect_timeout = CONNECT_TIMEOUT_MAX.min(self.timeout);
        let stream = time::timeout(connect_timeout, TcpStream::connect(&self.address))
            .await
            .map_err(|_| timed_out(connect_timeout))?
            .map_err(request_failed)?;
        self.exchange_over(stream, &payload).await
    }

    async fn exchange_over(
        &self,
        mut stream: impl AsyncRead + AsyncWrite + Unpin,
        payload: &[u8],
    ) -> Result<ReplyJson, LmError> {
        let reply = time::timeout(self.timeout, async {
            frame::write_frame(&mut stream, payload, REQUEST_BYTES_MAX).await?;
            let bytes_max = self.reply_bytes_max.saturating_add(payload.len());
            frame::read_frame(&mut stream, bytes_max).await
        })
        .await
        .map_err(|_| timed_out(self.timeout))?
        .map_err(request_failed)?;
        // RLM's client takes an end before the header for an empty reply.
        let Some(reply) = reply else { return Ok(ReplyJson::default()) };
        ReplyJson::read(reply, values_at_most(payload))
            .map_err(|e| LmError::new(format!("Request failed: the reply can't be read: {e}")))
    }

    /// One request for prompts that share model and depth.
    async fn exchange_batch(&self, requests: &[LmRequest]) -> Vec<Result<LmCompletion, LmError>> {
        let Some(first) = requests.first() else { return Vec::new() };
        let reply = self.exchange(&self.batch(first, requests)).await;
        results_of(reply, requests.len())
    }

    /// A request for these, which share model and depth with the first of them.
    fn batch<'a>(&'a self, first: &'a LmRequest, requests: &'a [LmRequest]) -> RequestJson<'a> {
        let prompts = requests.iter().map(|request| (&request.prompt).into()).collect();
        RequestJson { prompts: Some(prompts), ..self.request(first) }
    }

    /// As a batch, over a connection that is there.
    #[cfg(feature = "fuzzing")]
    pub(crate) async fn ask_over(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        requests: &[LmRequest],
    ) -> Vec<Result<LmCompletion, LmError>> {
        let Some(first) = requests.first() else { return Vec::new() };
        let reply = match self.batch(first, requests).encode().map_err(request_failed) {
            Ok(payload) => self.exchange_over(stream, &payload).await,
            Err(error) => Err(error),
        };
        results_of(reply, requests.len())
    }
}

#[async_trait]
impl LmHandler for SocketHandler {
    /// A batch is one frame.
    fn batches(&self, _kind: LmKind) -> bool {
        true
    }

    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let prompt = Some((&request.prompt).into());
        let request = RequestJson { prompt, ..self.request(request) };
        let reply = self.exchange(&request).await?;
        match reply.error {
            Some(error) => Err(LmError::new(error)),
            None => CompletionJson::into_result(reply.chat_completion),
        }
    }

    async fn complete_batch(
        &self,
        requests: &[LmRequest],
        _concurrency: usize,
    ) -> Vec<Result<LmCompletion, LmError>> {
        // A guest's batch has one model and one depth and so is one request, but nothing in the
        // trait promises it.
        let mut results = Vec::with_capacity(requests.len());
        for batch in requests.chunk_by(|a, b| (&a.model, a.depth) == (&b.model, b.depth)) {
            results.extend(self.exchange_batch(batch).await);
        }
        results
    }
}

/// The results of a batch of so many prompts.
fn results_of(
    reply: Result<ReplyJson, LmError>,
    expected: usize,
) -> Vec<Result<LmCompletion, LmError>> {
    let all_failed = |error: LmError| vec![Err(error); expected];
    let reply = match reply {
        Ok(reply) => reply,
        Err(error) => return all_failed(error),
    };
    if let Some(error) = reply.error {
        return all_failed(LmError::new(error));
    }
    let completions = reply.chat_completions.unwrap_or_default();
    if completions.is_empty() {
        return all_failed(LmError::new(NO_COMPLETIONS));
    }
    let found = completions.len();
    if found != expected {
        // Which answer belongs to which prompt is anyone's guess.
        return all_failed(LmError::new(format!(
            "LM query failed - the handler sent {found} completions for {expected} prompts"
        )));
    }
    completions.into_iter().map(CompletionJson::into_result).collect()
}

fn is_host_and_port(address: &str) -> bool {
    let Some((host, port)) = address.rsplit_once(':') else { return false };
    let host_is_plausible = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(ipv6) => ipv6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.chars().all(|c| c.is_alphanumeric() || "-._".contains(c)),
    };
    let port_is_plausible =
        port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port != 0);
    host_is_plausible && port_is_plausible
}

/// Words an I/O error as Python does.
fn request_failed(error: io::Error) -> LmError {
    let text = error.to_string();
    let text = match (error.raw_os_error(), error.kind()) {
        (Some(code), _) => {
            let text = text.strip_suffix(&format!(" (os error {code})")).unwrap_or(&text);
            format!("[Errno {code}] {text}")
        }
        (None, io::ErrorKind::UnexpectedEof) => "Connection closed before message complete".into(),
        (None, _) => text,
    };
    LmError::new(format!("Request failed: {text}"))
}

fn timed_out(after: Duration) -> LmError {
    LmError::new(format!("Request failed: timed out after {after:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_host_and_port() {
        for address in ["127.0.0.1:1", "localhost:65535", "[::1]:80", "lm_handler.local:80"] {
            assert!(is_host_and_port(address), "{address}");
        }
        for address in [
            "",
            ":",
            ":80",
            "host",
            "host:",
            "host:0",
            "host:65536",
            "host:+80",
            "host:-1",
            "::1:80",
            "[::1]",
            "[x]:80",
            "http://host:80",
            "ho st:80",
            "user@host:80",
            " host:80",
        ] {
            assert!(!is_host_and_port(address), "{address}");
        }
    }
}
