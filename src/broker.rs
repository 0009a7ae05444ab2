//! Model calls of code in a cloud sandbox, which a host answers over HTTP.
//!
//! In the sandbox runs [`SCRIPT`], a queue that needs nothing but Python 3.9: `python3 -c SCRIPT` with
//! one line of JSON on stdin, which it keeps open: `{"host_token": …, "guest_token": …, "port": 8080}`.
//! Code in the sandbox posts what RLM's clients post to `http://127.0.0.1:8080/enqueue`, with the header
//! `Authorization: Bearer GUEST_TOKEN`. The sandbox's platform makes the port reachable, and [`Broker`]
//! asks there for what is pending. The start of the script says all of the protocol.
//!
//! ```no_run
//! use std::sync::Arc;
//! use kaa::broker::{Broker, BrokerOptions};
//! use kaa::lm::{ScriptedHandler, Secret};
//!
//! # async fn example(url: &str, host_token: String) -> kaa::Result<()> {
//! let token = Secret::new(host_token);
//! let broker = Broker::connect(url, token, BrokerOptions::default()).await?;
//! let error = broker.serve(Arc::new(ScriptedHandler::echo())).await;
//! println!("the sandbox is gone: {error}");
//! # Ok(())
//! # }
//! ```

mod answer;
mod serve;

use std::path::PathBuf;
use std::time::Duration;

use reqwest::{Client, Method, StatusCode, Url};
use serde_json::Value as Json;
use tokio::time::{Instant, sleep, timeout_at};

#[cfg(feature = "modal")]
pub(crate) use self::answer::Responder;
use crate::error::{Error, Result};
use crate::lm::{Secret, tls, trusted_roots};

/// The program in the sandbox.
pub const SCRIPT: &str = concat!(
    include_str!("../guest/broker/queue.py"),
    "\n\n",
    include_str!("../guest/broker/server.py"),
);

/// Bytes of what the broker says at once; items beyond them come with the next poll.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// What the slowest line carries that is put up with.
const SLOW_BYTES_A_SECOND: usize = 1 << 20;
/// The waits between two tries double from the first of these to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How a broker is asked.
#[derive(Debug, Clone)]
pub struct BrokerOptions {
    /// How long the broker may take to be there; 60 s by default.
    pub ready_timeout: Duration,
    /// How long it may be out of reach, from the first poll that failed, before it is taken for gone; 30 s
    /// by default.
    pub gone_after: Duration,
    /// How long a poll waits for requests; 20 s by default, at most 60 s.
    pub poll: Duration,
    /// Time for a connection, and beyond the poll's own for any answer to begin or go on; 10 s by default.
    /// What is long may take a second for each MiB of it besides.
    pub timeout: Duration,
    /// Requests that are answered at once, a batch counting as one; 16 by default.
    pub concurrency: usize,
    /// Prompts of one batch that are under way at once; 16 by default.
    pub batch_concurrency: usize,
    /// Prompts in a batch; 10,000 by default. A larger one gets an error.
    pub prompts_max: usize,
    /// Certificates in PEM that are trusted besides those of the system.
    pub root_certificates: Option<PathBuf>,
}

impl Default for BrokerOptions {
    fn default() -> Self {
        Self {
            ready_timeout: Duration::from_secs(60),
            gone_after: Duration::from_secs(30),
            poll: Duration::from_secs(20),
            timeout: Duration::from_secs(10),
            concurrency: 16,
            batch_concurrency: 16,
            prompts_max: 10_000,
            root_certificates: None,
        }
    }
}

/// The host's side of a broker. Calls that are under way end when it stops serving.
#[derive(Debug, Clone)]
pub struct Broker {
    client: Client,
    url: Url,
    token: Secret,
    options: BrokerOptions,
}

/// Why the broker didn't do what it was asked.
enum Fault {
    /// Another try may go better.
    Passing(String),
    /// It answered so, which no other try would change.
    Refused(StatusCode, String),
}

impl Broker {
    /// Waits until the broker at `url` is there; `token` is its host token.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if an argument can't be used, among them a URL of plain HTTP to another machine, [`Error::Io`] if the certificates can't be read,
    /// [`Error::Unavailable`] if the broker isn't there within `ready_timeout`.
    pub async fn connect(url: &str, token: Secret, options: BrokerOptions) -> Result<Self> {
        let refuse = |reason: &str| Err(Error::invalid("broker url", reason));
        let Ok(url) = Url::parse(url) else {
            return refuse("it is no URL; write it as https://HOST");
        };
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return refuse("it must begin with https:// or http:// and a host");
        }
        if url.scheme() == "http" && !is_loopback(url.host_str().unwrap_or_default()) {
            return refuse(
                "the token would be readable on the way; write https://, or this machine",
            );
        }
        if token.expose().is_empty() || token.expose().contains(|c: char| !c.is_ascii_graphic()) {
            return Err(Error::invalid("broker token", "it must be ASCII without spaces"));
        }
        for (name, is_zero) in [
            ("concurrency", options.concurrency == 0),
            ("batch_concurrency", options.batch_concurrency == 0),
            ("prompts_max", options.prompts_max == 0),
            ("timeout", options.timeout.is_zero()),
        ] {
            if is_zero {
                return Err(Error::invalid(name, "it must be more than 0"));
            }
        }
        let roots = trusted_roots(options.root_certificates.as_deref())?;
        let client = Client::builder()
            .user_agent(concat!("kaa/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(options.timeout)
            .tcp_nodelay(true)
            .no_proxy()
            .tls_backend_preconfigured(tls(url.scheme() == "https", roots)?)
            .build()
            .map_err(|e| Error::unavailable("an HTTP client", format!("{}", e.without_url())))?;
        let broker = Self { client, url, token, options };
        broker.ready().await?;
        Ok(broker)
    }

    async fn ready(&self) -> Result<()> {
        let until = Instant::now() + self.options.ready_timeout;
        let mut pause = BACKOFF.0;
        loop {
            let reason = match self.call(Method::GET, "health", None, Duration::ZERO).await {
                Ok(_) => return Ok(()),
                Err(Fault::Passing(reason) | Fault::Refused(_, reason)) => reason,
            };
            if Instant::now() + pause >= until {
                let waited = self.options.ready_timeout;
                return Err(self.gone(&format!("it wasn't there within {waited:?}: {reason}")));
            }
            sleep(pause).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    fn gone(&self, reason: &str) -> Error {
        Error::unavailable(format!("the broker at {}", self.url.authority()), reason)
    }

    /// One request, and what the broker answers within `wait` and the timeout.
    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        wait: Duration,
    ) -> Result<Json, Fault> {
        let passing = |e: reqwest::Error| Fault::Passing(reason(&e));
        let url = format!("{}/{path}", self.url.as_str().trim_end_matches('/'));
        let mut request = self.client.request(method, url);
        if path != "health" {
            request = request.bearer_auth(self.token.expose());
        }
        let timeout = self.options.timeout;
        let mut begins = wait + timeout;
        if let Some(body) = body {
            begins += Duration::from_secs((body.len() / SLOW_BYTES_A_SECOND) as u64);
            request = request.header("content-type", "application/json").body(body);
        }
        let late = |_| Fault::Passing("no answer in time".to_owned());
        let until = Instant::now() + begins;
        let ends = until + Duration::from_secs((ANSWER_BYTES_MAX / SLOW_BYTES_A_SECOND) as u64);
        let sent = timeout_at(until, request.send()).await;
        let mut response = sent.map_err(late)?.map_err(passing)?;
        let mut answer = Vec::new();
        loop {
            let next = timeout_at((Instant::now() + timeout).min(ends), response.chunk());
            let Some(chunk) = next.await.map_err(late)?.map_err(passing)? else { break };
            if chunk.len() > ANSWER_BYTES_MAX - answer.len() {
                return Err(Fault::Passing(format!("it says more than {ANSWER_BYTES_MAX} bytes")));
            }
            answer.extend_from_slice(&chunk);
        }
        let status = response.status();
        let json: Option<Json> = serde_json::from_slice(&answer).ok();
        match json {
            Some(json) if status.is_success() => Ok(json),
            // An error that the broker words itself; others come from what is in between.
            Some(json) if status.is_client_error() && json["code"].is_string() => {
                let text = json["error"].as_str().unwrap_or_default();
                Err(Fault::Refused(status, format!("HTTP {}: {text}", status.as_u16())))
            }
            _ => Err(Fault::Passing(format!("HTTP {}", status.as_u16()))),
        }
    }
}

/// Whether the host of a URL is this machine: then nobody reads on the way what is sent in plain text.
pub(crate) fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// What lies at the bottom of an error, without the address.
fn reason(error: &reqwest::Error) -> String {
    let mut found: &dyn std::error::Error = error;
    while let Some(source) = found.source() {
        found = source;
    }
    found.to_string()
}
