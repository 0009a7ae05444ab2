//! What a handler of an HTTP interface may be told.

use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value as Json};

use crate::error::{Error, Result};

/// Parts of a request that the handler itself decides.
const OWN_PARAMETERS: [&str; 4] = ["model", "messages", "system", "stream"];
/// More than any server takes; a semaphore has no more permits anyway.
const CONCURRENCY_MAX: usize = 1 << 16;
/// A timer's range is not without end; a day is longer than any call.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// A text that must not be seen: `Debug` shows nothing of it, and no error message has it.
///
/// ```
/// use kaa::lm::Secret;
///
/// let key = Secret::new("sk-123");
/// assert_eq!(format!("{key:?}"), "Secret(..)");
/// assert_eq!(key.expose(), "sk-123");
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps `text` from being shown.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for whoever must send it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What a million tokens cost, in US dollars.
///
/// ```
/// let price = kaa::lm::Price { input: 1.25, output: 10.0 };
/// assert_eq!(price.of(2_000_000, 100_000), 3.5);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Price {
    /// A million tokens sent.
    pub input: f64,
    /// A million tokens received.
    pub output: f64,
}

impl Price {
    /// What so many tokens cost.
    #[must_use]
    pub fn of(&self, input_tokens: u64, output_tokens: u64) -> f64 {
        (input_tokens as f64 * self.input + output_tokens as f64 * self.output) / 1e6
    }
}

/// When a call that failed is tried again.
///
/// That is done after the statuses 408, 409, 429 and 5xx (unless the server's header `x-should-retry`
/// says otherwise), when there is no connection, when one ends before the answer is there, and when a
/// try takes longer than [`UpstreamOptions::try_timeout`]. The
/// waits double from `base` to `cap`, each shortened by chance by up to a half, so that calls which
/// failed together don't come back together. A server's `Retry-After` is added to the wait.
///
/// ```
/// use std::time::Duration;
/// use kaa::lm::Retries;
///
/// let patient = Retries { max: 8, ..Retries::default() };
/// assert_eq!(patient.base, Duration::from_millis(500));
/// assert_eq!(Retries::NONE.max, 0);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retries {
    /// Tries after the first; 4 by default.
    pub max: u32,
    /// The first wait; 0.5 s by default.
    pub base: Duration,
    /// The longest wait; 30 s by default.
    pub cap: Duration,
    /// When a server asks to be left alone for longer than this, the call fails at once; 60 s by
    /// default.
    pub retry_after_max: Duration,
}

impl Retries {
    /// One try only.
    pub const NONE: Self = Self { max: 0, ..Self::STANDARD };

    const STANDARD: Self = Self {
        max: 4,
        base: Duration::from_millis(500),
        cap: Duration::from_secs(30),
        retry_after_max: Duration::from_secs(60),
    };
}

impl Default for Retries {
    fn default() -> Self {
        Self::STANDARD
    }
}

/// A proxy that requests go through.
///
/// ```
/// use kaa::lm::{HttpProxy, OpenAiHandler, Secret, UpstreamOptions};
///
/// let proxy = HttpProxy {
///     url: Secret::new("socks5://proxy:1080"),
///     source: "http_proxy".into(),
///     except: "localhost,127.0.0.0/8".into(),
/// };
/// let to = |base_url: &str| {
///     let (base_url, proxy) = (Some(base_url.to_owned()), Some(proxy.clone()));
///     OpenAiHandler::new("m", UpstreamOptions { base_url, proxy, ..Default::default() })
/// };
/// assert!(to("http://localhost:8000/v1").is_ok());
/// assert!(to("http://far.example/v1").unwrap_err().to_string().starts_with("http_proxy: only http"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpProxy {
    /// Its address, such as `http://proxy:3128`; may hold a user and a password.
    pub url: Secret,
    /// Where the address was named, such as `http_proxy`: errors say so. Empty: nothing.
    pub source: String,
    /// Hosts that are reached without it, separated by commas: names with all below them, addresses,
    /// networks such as `10.0.0.0/8`, or `*`. For these the address isn't even looked at.
    pub except: String,
}

/// How a handler of an HTTP interface reaches its server, and what a call may take.
///
/// | field | default |
/// |---|---|
/// | `base_url` | the provider's own |
/// | `key` | none is sent |
/// | `connect_timeout` | 10 s for a connection, with TLS |
/// | `timeout` | 300 s for a call, with all waits and tries |
/// | `try_timeout` | 120 s for one try; then there is another, while `timeout` allows it |
/// | `answer_bytes_max` | 16 MiB for an answer, checked while it arrives |
/// | `concurrency` | 256 calls under way at once; others wait their turn |
/// | `retries` | [`Retries::default`] |
/// | `price` | unknown: no cost is booked, unless the server names one |
/// | `output_tokens_max` | the server's; 8192 for Anthropic, which has none |
/// | `remote_parts` | false: a chat can have only texts and images given inline |
/// | `parameters`, `headers`, `proxy` | none |
///
/// ```
/// use kaa::lm::{OpenAiHandler, Secret, UpstreamOptions};
///
/// # fn main() -> kaa::Result<()> {
/// let options = UpstreamOptions {
///     base_url: Some("http://127.0.0.1:8000/v1".into()),
///     key: Some(Secret::new("local")),
///     ..UpstreamOptions::default()
/// };
/// let handler = OpenAiHandler::new("small", options)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct UpstreamOptions {
    /// Where the interface begins: `https://api.openai.com/v1` for OpenAI's, `https://api.anthropic.com`
    /// for Anthropic's. It goes over the network as it's written: with `http://` so does the key.
    pub base_url: Option<String>,
    /// The key that the server asks for.
    pub key: Option<Secret>,
    /// Added to the error when the server refuses the key: where to look, such as
    /// `is OPENAI_API_KEY right?`. Empty: nothing.
    pub key_hint: String,
    /// How long a connection may take to come about.
    pub connect_timeout: Duration,
    /// How long a call may take, with waiting for its turn and all tries.
    pub timeout: Duration,
    /// How long one try may take, from its connection to the end of its answer. One that takes longer is
    /// given up and counts as a fault, so that a server which hangs is asked again; it may charge for
    /// both. Models that think for minutes need more, and a longer `timeout`.
    pub try_timeout: Duration,
    /// Bytes of an answer; a longer one is an error.
    pub answer_bytes_max: usize,
    /// Calls under way at once, counted until their answer is there, with the waits between tries.
    pub concurrency: usize,
    /// When a call that failed is tried again.
    pub retries: Retries,
    /// What tokens cost.
    pub price: Option<Price>,
    /// Tokens of an answer: `max_completion_tokens` for OpenAI itself, `max_tokens` for all others.
    pub output_tokens_max: Option<u32>,
    /// Whether a chat may have parts that the server fetches or looks up, such as an image by its URL.
    ///
    /// A guest builds its chats: with this it can send what it knows to any address, as a part of a
    /// URL, and reach addresses of the network that a server of one's own runs in. So a chat can
    /// otherwise only have texts and images given inline (`image_url` with a `data:` URL, Anthropic's
    /// `image` in base64), and of a message's other keys `name`, `tool_calls`, `tool_call_id` and
    /// `refusal`; all else is an error of the call. With this, all parts and keys are passed on.
    pub remote_parts: bool,
    /// What else is said in each request, such as `temperature`.
    pub parameters: Map<String, Json>,
    /// More headers of each request; their values may be secrets.
    pub headers: Vec<(String, Secret)>,
    /// The proxy to go through. The variables of the environment that name proxies aren't read.
    pub proxy: Option<HttpProxy>,
}

impl Default for UpstreamOptions {
    fn default() -> Self {
        Self {
            base_url: None,
            key: None,
            key_hint: String::new(),
            connect_timeout: Duration::from_secs(10),
            timeout: Duration::from_secs(300),
            try_timeout: Duration::from_secs(120),
            answer_bytes_max: 16 << 20,
            concurrency: 256,
            retries: Retries::default(),
            price: None,
            output_tokens_max: None,
            remote_parts: false,
            parameters: Map::new(),
            headers: Vec::new(),
            proxy: None,
        }
    }
}

impl UpstreamOptions {
    /// What can be said about them without the server.
    pub(in crate::lm) fn validate(&self) -> Result<()> {
        let within = |what: &str, time: Duration| match time {
            Duration::ZERO => Err(Error::invalid(what, "it must be more than 0")),
            time if time > TIMEOUT_MAX => Err(Error::invalid(what, "it must be at most 24 hours")),
            _ => Ok(()),
        };
        within("timeout", self.timeout)?;
        within("try_timeout", self.try_timeout)?;
        within("connect_timeout", self.connect_timeout)?;
        if !(1..=CONCURRENCY_MAX).contains(&self.concurrency) {
            let reason = format!("it must be between 1 and {CONCURRENCY_MAX}");
            return Err(Error::invalid("concurrency", reason));
        }
        if self.output_tokens_max == Some(0) {
            return Err(Error::invalid("output_tokens_max", "it must be more than 0"));
        }
        if let Some(Price { input, output }) = self.price
            && ![input, output].iter().all(|price| price.is_finite() && *price >= 0.0)
        {
            return Err(Error::invalid("price", "it must be a number that is not negative"));
        }
        if let Some(name) = OWN_PARAMETERS.iter().find(|name| self.parameters.contains_key(**name))
        {
            let reason = "the handler sets it itself; leave it out";
            return Err(Error::invalid(format!("parameters.{name}"), reason));
        }
        Ok(())
    }
}
