//! Client of RLM's LM handler protocol.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use serde_json::ser::Formatter;
use tokio::net::TcpStream;
use tokio::time;

use super::{LmCompletion, LmError, LmHandler, LmRequest, ModelUsage, Prompt};
use crate::error::{Error, Result};
use crate::frame;

const CONNECT_TIMEOUT_MAX: Duration = Duration::from_secs(10);
/// RLM's own client waits as long.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(300);
const REPLY_BYTES_MAX_DEFAULT: usize = 64 << 20;
/// The header's range; what a guest may ask is its environment's affair.
const REQUEST_BYTES_MAX: usize = u32::MAX as usize;

/// What RLM's client says when the reply has no completion; models have seen this text.
const NO_COMPLETION: &str = "LM query failed - 'NoneType' object has no attribute 'response'";
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
/// | size of a reply, checked before memory is taken for it | 64 MiB |
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
        Ok(Self { address, timeout: TIMEOUT_DEFAULT, reply_bytes_max: REPLY_BYTES_MAX_DEFAULT })
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

    /// Refuses replies, counted without the header, of more than `reply_bytes_max` bytes.
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

    async fn exchange(&self, request: &RequestJson<'_>) -> Result<ReplyJson, LmError> {
        let payload = encode(request).map_err(request_failed)?;
        let connect_timeout = CONNECT_TIMEOUT_MAX.min(self.timeout);
        let mut stream = time::timeout(connect_timeout, TcpStream::connect(&self.address))
            .await
            .map_err(|_| timed_out(connect_timeout))?
            .map_err(request_failed)?;
        let reply = time::timeout(self.timeout, async {
            frame::write_frame(&mut stream, &payload, REQUEST_BYTES_MAX).await?;
            frame::read_frame(&mut stream, self.reply_bytes_max).await
        })
        .await
        .map_err(|_| timed_out(self.timeout))?
        .map_err(request_failed)?;
        // RLM's client takes an end before the header for an empty reply.
        let Some(mut reply) = reply else { return Ok(ReplyJson::default()) };
        replace_lone_surrogates(&mut reply);
        let unreadable = |e: &dyn fmt::Display| {
            LmError::new(format!("Request failed: the reply can't be read: {e}"))
        };
        // serde would also take a list of the fields in their order.
        if !reply.trim_ascii_start().starts_with(b"{") {
            return Err(unreadable(&"not a JSON object"));
        }
        serde_json::from_slice(&reply).map_err(|e| unreadable(&e))
    }

    /// One request for prompts that share model and depth.
    async fn exchange_batch(&self, requests: &[LmRequest]) -> Vec<Result<LmCompletion, LmError>> {
        let all_failed = |error: LmError| vec![Err(error); requests.len()];
        let Some(first) = requests.first() else { return Vec::new() };
        let request = RequestJson {
            prompt: None,
            prompts: Some(requests.iter().map(|request| (&request.prompt).into()).collect()),
            model: first.model.as_deref(),
            depth: first.depth,
        };
        let reply = match self.exchange(&request).await {
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
        if completions.len() != requests.len() {
            // Which answer belongs to which prompt is anyone's guess.
            let (expected, found) = (requests.len(), completions.len());
            return all_failed(LmError::new(format!(
                "LM query failed - the handler sent {found} completions for {expected} prompts"
            )));
        }
        completions.into_iter().map(CompletionJson::into_result).collect()
    }
}

#[async_trait]
impl LmHandler for SocketHandler {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let request = RequestJson {
            prompt: Some((&request.prompt).into()),
            prompts: None,
            model: request.model.as_deref(),
            depth: request.depth,
        };
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

/// The request; the order of the fields is the order on the wire.
#[derive(Serialize)]
struct RequestJson<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<PromptJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompts: Option<Vec<PromptJson<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<&'a str>,
    depth: i32,
}

#[derive(Serialize)]
#[serde(untagged)]
enum PromptJson<'a> {
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

#[derive(Default, Deserialize)]
struct ReplyJson {
    error: Option<String>,
    chat_completion: Option<CompletionJson>,
    chat_completions: Option<Vec<Option<CompletionJson>>>,
}

/// `RLMChatCompletion`; only the answer is required.
#[derive(Deserialize)]
struct CompletionJson {
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

#[derive(Deserialize)]
struct ModelUsageJson {
    total_calls: Option<u64>,
    total_input_tokens: Option<u64>,
    total_output_tokens: Option<u64>,
    total_cost: Option<f64>,
}

impl CompletionJson {
    fn into_result(completion: Option<Self>) -> Result<LmCompletion, LmError> {
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
            nested: false,
        })
    }
}

/// The bytes that Python's `json.dumps` makes: ASCII, with a space after `,` and `:`.
fn encode(request: &RequestJson<'_>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, PythonFormatter);
    request.serialize(&mut serializer)?;
    Ok(bytes)
}

struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        // Python escapes whatever is not printable ASCII; DEL is the one that serde leaves.
        let is_plain = |c: char| (' '..='~').contains(&c);
        let mut rest = fragment;
        while let Some((at, c)) = rest.char_indices().find(|(_, c)| !is_plain(*c)) {
            writer.write_all(&rest.as_bytes()[..at])?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            rest = &rest[at + c.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }
}

/// Overwrites each escaped half of a surrogate pair that stands alone by `\ufffd`.
///
/// `serde_json` refuses such text, and one half of an emoji must not cost a whole answer. Working on
/// the bytes covers keys and values alike, and needs no memory: the escapes are equally long.
pub(super) fn replace_lone_surrogates(json: &mut [u8]) {
    let mut at = 0;
    while at < json.len() {
        if json[at] != b'\\' {
            at += 1;
            continue;
        }
        match unit_at(json, at) {
            Some(0xd800..=0xdbff) if matches!(unit_at(json, at + 6), Some(0xdc00..=0xdfff)) => {
                at += 12;
            }
            Some(0xd800..=0xdfff) => {
                json[at + 2..at + 6].copy_from_slice(b"fffd");
                at += 6;
            }
            // Another escape: skip the escaped byte, it may be a backslash itself.
            _ => at += 2,
        }
    }
}

/// The UTF-16 unit that the six bytes `\uHHHH` at `at` stand for.
fn unit_at(json: &[u8], at: usize) -> Option<u16> {
    let digits = json.get(at..at.checked_add(6)?)?.strip_prefix(b"\\u")?;
    digits.iter().try_fold(0, |unit, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        Some(unit << 4 | u16::try_from(digit).ok()?)
    })
}

#[cfg(test)]
mod tests {
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
            let request =
                RequestJson { prompt: Some(prompt), prompts: None, model: None, depth: -1 };
            let bytes = encode(&request).unwrap();
            let expected = format!(r#"{{"prompt": {expected}, "depth": -1}}"#);
            assert_eq!(String::from_utf8(bytes).unwrap(), expected);
        }
    }

    #[test]
    fn only_lone_surrogates_are_replaced() {
        for (json, expected) in [
            (r"\ud83d\ude00", r"\ud83d\ude00"),
            (r"\uD83D\uDE00", r"\uD83D\uDE00"),
            (r"\ud800", r"\ufffd"),
            (r"\udc00 \ud800 ", r"\ufffd \ufffd "),
            (r"\ud800\ud83d\ude00", r"\ufffd\ud83d\ude00"),
            (r"\ude00\ud83d", r"\ufffd\ufffd"),
            (r"\\ud800", r"\\ud800"),
            (r"\\\ud800", r"\\\ufffd"),
            (r"\ud800\n", r"\ufffd\n"),
            (r"\ud800\u0041", r"\ufffd\u0041"),
            (r"\ud80", r"\ud80"),
            (r"\u+d80", r"\u+d80"),
            ("\\", "\\"),
        ] {
            let mut bytes = json.as_bytes().to_vec();
            replace_lone_surrogates(&mut bytes);
            assert_eq!(String::from_utf8(bytes).unwrap(), expected, "{json}");
        }
    }

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
