//! One try of a request over HTTP, and why it failed.

use std::error::Error as StdError;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION};
use reqwest::{Client, Request, Response, StatusCode, Url};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use rustls_platform_verifier::Verifier;
use serde_json::Value as Json;
use tokio::time::{Instant, timeout_at};

use super::options::{Secret, UpstreamOptions};
use super::retry;
use crate::error::{Error, Result};

/// Bytes of an error's body that are looked at.
const ERROR_BYTES_MAX: usize = 64 << 10;
/// How long the body of an error is waited for: its status and headers say what to do.
const ERROR_TIME: Duration = Duration::from_secs(3);
/// Characters of what a server says that go into a message.
const SAID_CHARS_MAX: usize = 500;
/// What is shorter is no key, and would be found in any text.
const SECRET_BYTES_MIN: usize = 8;
/// A quiet connection is given up after this; servers do so after a minute or more.
const POOL_IDLE: Duration = Duration::from_secs(50);

/// Why a try got no answer.
pub(super) struct Fault {
    pub(super) reason: String,
    /// Whether another try may go better.
    pub(super) again: bool,
    /// How long the server asks to wait before.
    pub(super) after: Option<Duration>,
    /// Whether the server has too many requests.
    pub(super) limited: bool,
}

impl Fault {
    fn last(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), again: false, after: None, limited: false }
    }

    pub(super) fn passing(reason: impl Into<String>) -> Self {
        Self { again: true, ..Self::last(reason) }
    }
}

/// The way to one interface of one server. Its connections are kept for the next request.
#[derive(Debug)]
pub(super) struct Transport {
    client: Client,
    url: Url,
    /// What connections are made to, as errors name it: the server or a proxy.
    contact: String,
    headers: HeaderMap,
    connect_timeout: Duration,
    answer_bytes_max: usize,
    key_hint: String,
    secrets: Vec<Secret>,
}

impl Transport {
    /// To `path` under the base URL, with the provider's headers and those of the options.
    pub(super) fn new(
        options: &UpstreamOptions,
        base_url: &str,
        path: &str,
        headers: &[(&str, Secret)],
    ) -> Result<Self> {
        let url = endpoint(base_url, path)?;
        let own = headers.iter().map(|(name, value)| (*name, value));
        let more = options.headers.iter().map(|(name, value)| (name.as_str(), value));
        let mut map = HeaderMap::new();
        map.insert(ACCEPT, HeaderValue::from_static("application/json"));
        map.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        for (name, value) in own.chain(more) {
            let (name, value) = header(name, value)?;
            map.insert(name, value);
        }
        let way = options.proxy.as_ref().map(|proxy| proxy.way_to(&url)).transpose()?.flatten();
        let proxy_is_secure = way.as_ref().is_some_and(|way| way.is_secure);
        let tls = tls(url.scheme() == "https" || proxy_is_secure, Vec::new())?;
        let contact = way.as_ref().map_or(url.authority(), |way| &way.name).to_owned();
        let mut client = Client::builder()
            .user_agent(concat!("kaa/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(options.connect_timeout)
            .tcp_nodelay(true)
            .pool_idle_timeout(POOL_IDLE)
            .pool_max_idle_per_host(options.concurrency)
            // Otherwise the variables of the environment would name one.
            .no_proxy()
            .tls_backend_preconfigured(tls);
        if let Some(way) = way {
            client = client.proxy(way.proxy);
        }
        let client = client
            .build()
            .map_err(|e| Error::unavailable("an HTTP client", format!("{}", e.without_url())))?;
        Ok(Self {
            client,
            url,
            contact,
            headers: map,
            connect_timeout: options.connect_timeout,
            answer_bytes_max: options.answer_bytes_max,
            key_hint: options.key_hint.clone(),
            secrets: options
                .key
                .iter()
                .chain(options.headers.iter().map(|(_, value)| value))
                .filter(|secret| secret.expose().len() >= SECRET_BYTES_MIN)
                .cloned()
                .collect(),
        })
    }

    /// A text that came from the server, fit for a message: a server may quote the key that it
    /// refuses, so secrets are taken out before the text is cut.
    pub(super) fn quote(&self, text: &str) -> String {
        let hide = |text: String, secret: &Secret| text.replace(secret.expose(), "[secret]");
        plain(&self.secrets.iter().fold(text.to_owned(), hide))
    }

    /// The provider's own message in the body of an error; the body itself if it's of another form.
    pub(super) fn said(&self, body: &[u8]) -> String {
        let json: Option<Json> = serde_json::from_slice(body).ok();
        let places = ["/error/message", "/error", "/message", "/detail"];
        let message = json.as_ref().and_then(|json| {
            places.iter().find_map(|place| json.pointer(place).and_then(Json::as_str))
        });
        match message {
            Some(message) => self.quote(message),
            None => self.quote(&String::from_utf8_lossy(body)),
        }
    }

    /// A request with this body; its clones share it.
    pub(super) fn request(&self, body: Vec<u8>) -> Request {
        let mut request = Request::new(reqwest::Method::POST, self.url.clone());
        *request.headers_mut() = self.headers.clone();
        *request.body_mut() = Some(body.into());
        request
    }

    /// Sends a request and reads its answer; `None` if neither an answer nor a fault is there by
    /// `until`. Dropping the future closes the connection.
    pub(super) async fn send(
        &self,
        request: Request,
        until: Instant,
    ) -> Option<Result<Vec<u8>, Fault>> {
        let response = match timeout_at(until, self.client.execute(request)).await.ok()? {
            Ok(response) => response,
            Err(error) => return Some(Err(self.unsent(&error))),
        };
        let status = response.status();
        if status.is_success() {
            return timeout_at(until, self.read_answer(response)).await.ok();
        }
        Some(Err(match status.is_redirection() {
            true => self.redirected(&response),
            false => self.refused(response, until).await,
        }))
    }

    async fn read_answer(&self, mut response: Response) -> Result<Vec<u8>, Fault> {
        let bytes_max = self.answer_bytes_max;
        let too_large = || Fault::last(format!("the answer is larger than {bytes_max} bytes"));
        let declared = response.content_length().unwrap_or_default();
        if declared > bytes_max as u64 {
            return Err(too_large());
        }
        // The server has only said so yet: what is taken in advance is little.
        let mut answer = Vec::with_capacity((declared as usize).min(ERROR_BYTES_MAX));
        while let Some(chunk) = response.chunk().await.map_err(|e| self.broken_off(&e))? {
            if chunk.len() > bytes_max - answer.len() {
                return Err(too_large());
            }
            answer.extend_from_slice(&chunk);
        }
        Ok(answer)
    }

    /// The server answered, but not with an answer. What it says of that is waited for until then at
    /// most, and not for long.
    async fn refused(&self, mut response: Response, until: Instant) -> Fault {
        let status = response.status();
        let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok());
        let after = retry::retry_after(header, SystemTime::now());
        let said_again = match header("x-should-retry") {
            Some("true") => Some(true),
            Some("false") => Some(false),
            _ => None,
        };
        let mut body = Vec::new();
        let until = until.min(Instant::now() + ERROR_TIME);
        // What can't be read isn't needed: the status says enough.
        while let Ok(Ok(Some(chunk))) = timeout_at(until, response.chunk()).await {
            let room = ERROR_BYTES_MAX - body.len();
            body.extend_from_slice(&chunk[..chunk.len().min(room)]);
            if body.len() == ERROR_BYTES_MAX {
                break;
            }
        }
        let is_spent = said_code(&body).is_some_and(|code| code == "insufficient_quota");
        let worth_it = matches!(status.as_u16(), 408 | 409 | 429 | 500..=599);
        let mut reason = format!("HTTP {}", status.as_u16());
        if status == StatusCode::NOT_FOUND {
            reason += &format!(" at {}", self.url);
        }
        let said = self.said(&body);
        if !said.is_empty() {
            reason += &format!(": {said}");
        }
        let is_key = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
        if is_key && !self.key_hint.is_empty() {
            reason += &format!(" ({})", self.key_hint);
        }
        Fault {
            reason,
            again: said_again.unwrap_or(worth_it && !is_spent),
            after,
            limited: status == StatusCode::TOO_MANY_REQUESTS && !is_spent,
        }
    }

    fn redirected(&self, response: &Response) -> Fault {
        let to = response.headers().get(LOCATION).and_then(|to| to.to_str().ok());
        let to = to.and_then(|to| self.url.join(to).ok());
        let host = to.as_ref().map_or("nowhere", |to| to.authority());
        // What stands before an `@` may be a password.
        let host = host.rsplit('@').next().unwrap_or_default();
        Fault::last(format!(
            "HTTP {}: redirected to {}; redirects are not followed, so that the key stays here: \
             if that is right, write the new address as the base URL",
            response.status().as_u16(),
            self.quote(host)
        ))
    }

    /// No head of an answer came.
    fn unsent(&self, error: &reqwest::Error) -> Fault {
        let Self { contact, .. } = self;
        if let Some(tls) = cause::<rustls::Error>(error) {
            // Certificates are those of the server, whatever is in between.
            let host = self.url.authority();
            let reason = format!("no secure connection to {host}: {}", plain(&tls.to_string()));
            return Fault::last(reason);
        }
        if error.is_connect() {
            let reason = match cause::<io::Error>(error) {
                _ if error.is_dns() => {
                    return Fault::passing(format!(
                        "no address of {contact} was found; is the name right?"
                    ));
                }
                _ if error.is_timeout() => format!("not within {:?}", self.connect_timeout),
                Some(io) if io.kind() == io::ErrorKind::ConnectionRefused => {
                    "connection refused; does the server run?".to_owned()
                }
                Some(io) => plain(&io.to_string()),
                None => plain(&root(error).to_string()),
            };
            return Fault::passing(format!("no connection to {contact}: {reason}"));
        }
        match cause::<io::Error>(error) {
            Some(io) if is_reset(io) => Fault::passing(format!("{contact} reset the connection")),
            Some(io) => Fault::passing(format!("{contact}: {}", plain(&io.to_string()))),
            None => Fault::passing(format!(
                "{contact} ended the connection without an answer: {}",
                plain(&root(error).to_string())
            )),
        }
    }

    /// The answer's body did not come to its end.
    fn broken_off(&self, error: &reqwest::Error) -> Fault {
        let host = self.url.authority();
        match cause::<io::Error>(error) {
            Some(io) if is_reset(io) => {
                Fault::passing(format!("{host} reset the connection in the middle of the answer"))
            }
            _ => Fault::passing("the answer broke off in the middle"),
        }
    }
}

fn is_reset(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

/// `path` under a base URL that is fit for it.
fn endpoint(base_url: &str, path: &str) -> Result<Url> {
    let refuse = |reason: &str| Err(Error::invalid("base_url", reason));
    // The text isn't quoted: it may hold what should be a key.
    let Ok(base) = Url::parse(base_url) else {
        return refuse("it is no URL; write it as https://HOST/v1");
    };
    if !matches!(base.scheme(), "http" | "https") || !base.has_host() {
        return refuse("it must begin with https:// or http:// and a host");
    }
    if !base.username().is_empty() || base.password().is_some() {
        return refuse("a user and a password don't belong there; give the key as a key");
    }
    if base.query().is_some() || base.fragment().is_some() {
        return refuse("leave out what begins with `?` or `#`");
    }
    let text = format!("{}{path}", base.as_str().trim_end_matches('/'));
    Url::parse(&text).map_err(|e| Error::invalid("base_url", e.to_string()))
}

fn header(name: &str, value: &Secret) -> Result<(HeaderName, HeaderValue)> {
    let Ok(header) = HeaderName::from_bytes(name.as_bytes()) else {
        return Err(Error::invalid("headers", format!("{name:?} can't be the name of a header")));
    };
    let Ok(mut value) = HeaderValue::from_str(value.expose()) else {
        let what = format!("header {name}");
        let reason = "the key or value has characters that a header can't hold, such as a newline";
        return Err(Error::invalid(what, reason));
    };
    value.set_sensitive(true);
    Ok((header, value))
}

/// The certificates in a file in PEM; none without a file.
pub(crate) fn trusted_roots(path: Option<&Path>) -> Result<Vec<CertificateDer<'static>>> {
    let Some(path) = path else { return Ok(Vec::new()) };
    let pem = std::fs::read(path)
        .map_err(|e| Error::io(format!("reading the certificates in {}", path.display()), e))?;
    let refuse = |reason: String| Error::invalid(format!("{}", path.display()), reason);
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|e| refuse(format!("it must hold certificates in PEM: {e}")))?;
    match found.is_empty() {
        true => Err(refuse("it holds no certificate in PEM".into())),
        false => Ok(found),
    }
}

/// TLS with the certificates that the system trusts, and more. A machine without any can still use plain
/// HTTP.
pub(crate) fn tls(is_used: bool, more: Vec<CertificateDer<'static>>) -> Result<ClientConfig> {
    let unavailable = |e: rustls::Error| Error::unavailable("TLS", e.to_string());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(unavailable)?;
    if !is_used {
        return Ok(builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth());
    }
    let verifier = Verifier::new_with_extra_roots(more, provider).map_err(|e| {
        let reason = format!("{e}; install the system's certificates (package ca-certificates)");
        Error::unavailable("TLS", reason)
    })?;
    // Nothing of the check is left out: it is done as the system does it.
    let mut config = builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// The first error of this type that led to `error`.
fn cause<T: StdError + 'static>(error: &reqwest::Error) -> Option<&T> {
    let mut next = error.source();
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        // An I/O error that wraps another passes over it in its sources.
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// What lies at the bottom of an error.
fn root(error: &reqwest::Error) -> &dyn StdError {
    let mut found: &dyn StdError = error;
    while let Some(source) = found.source() {
        found = source;
    }
    found
}

fn said_code(body: &[u8]) -> Option<String> {
    let json: Json = serde_json::from_slice(body).ok()?;
    json.pointer("/error/code").and_then(Json::as_str).map(str::to_owned)
}

/// One line, without control characters, of at most 500 characters.
fn plain(text: &str) -> String {
    let text = text.trim();
    let mut chars = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut plain: String = chars.by_ref().take(SAID_CHARS_MAX).collect();
    if chars.next().is_some() {
        plain.push('…');
    }
    plain
}
