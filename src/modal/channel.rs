//! Connections to Modal's servers and workers.

use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Uri};

use super::fault::Fault;

/// Largest message in either direction, as Modal's own clients have it.
pub(super) const MESSAGE_BYTES_MAX: usize = 100 << 20;
/// How much may be on its way unread, of one stream and of all. A context has to get across a long line,
/// and a stream that nobody reads may not hold up the others.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
const WINDOW_BYTES: u32 = 64 << 20;
/// How often a quiet connection is tried, and how long an answer may take.
const KEEPALIVE_TIME: Duration = Duration::from_secs(30);
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(10);
const CONNECT_TIME: Duration = Duration::from_secs(15);
/// How long the next server of a list waits for the one before it.
const STAGGER: Duration = Duration::from_secs(3);

/// How a server is connected to.
///
/// # Errors
///
/// A fault for an address that is none.
pub(super) fn endpoint(url: &str, roots: Option<&[u8]>) -> Result<Endpoint, Fault> {
    let invalid = |e: tonic::transport::Error| Fault::new(Code::InvalidArgument, describe(&e));
    let mut endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(invalid)?
        .user_agent(concat!("kaa-rs/", env!("CARGO_PKG_VERSION")))
        .map_err(invalid)?
        .connect_timeout(CONNECT_TIME)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_TIME)
        .keep_alive_timeout(KEEPALIVE_ANSWER)
        .keep_alive_while_idle(true);
    // Without this, `https` would be spoken in plain text.
    if endpoint.uri().scheme_str() == Some("https") {
        let mut tls = ClientTlsConfig::new().with_native_roots();
        if let Some(roots) = roots {
            tls = tls.ca_certificate(Certificate::from_pem(roots));
        }
        endpoint = endpoint.tls_config(tls).map_err(invalid)?;
    }
    Ok(endpoint)
}

/// Connects to the first server that can be reached. The next one is tried when the one before it
/// failed, or has taken long.
///
/// # Errors
///
/// The fault of the last one.
pub(super) async fn connect(
    urls: &[String],
    roots: Option<&[u8]>,
) -> Result<(Channel, String), Fault> {
    let mut left = urls.iter();
    let mut attempts = FuturesUnordered::new();
    let mut last = Fault::new(Code::InvalidArgument, "there is no address of a server");
    loop {
        let next = left.next();
        if let Some(url) = next {
            let endpoint = endpoint(url, roots)?;
            attempts.push(async move { (url, endpoint.connect().await) });
        }
        tokio::select! {
            Some((url, connected)) = attempts.next() => match connected {
                Ok(channel) => return Ok((channel, url.clone())),
                Err(error) => {
                    last = Fault::new(Code::Unavailable, format!("{url}: {}", describe(&error)));
                }
            },
            () = tokio::time::sleep(STAGGER), if next.is_some() && left.len() > 0 => {}
            else => return Err(last),
        }
    }
}

/// The innermost cause: what is above it is `transport error`.
fn describe(error: &tonic::transport::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// The host of an address, with the port that it names.
pub(super) fn host(url: &str) -> String {
    let authority = url.parse::<Uri>().ok().and_then(|uri| uri.authority().cloned());
    authority.map(|authority| authority.to_string()).unwrap_or_default()
}

/// Whether an address is this machine's own.
pub(super) fn is_loopback(url: &str) -> bool {
    let uri = url.parse::<Uri>().ok();
    crate::broker::is_loopback(uri.as_ref().and_then(Uri::host).unwrap_or_default())
}

/// When a token of three parts ends, in seconds of Unix time, if it says so. Its signature is the
/// server's affair.
pub(super) fn expiry(token: &str) -> Option<f64> {
    let mut parts = token.split('.');
    let (_, payload, _) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() {
        return None;
    }
    let payload = BASE64_URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?;
    let payload: serde_json::Value = serde_json::from_slice(&payload).ok()?;
    payload.get("exp")?.as_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_loopback() {
        for (url, expected) in [
            ("http://127.0.0.1:5000", true),
            ("http://localhost:5000", true),
            ("http://[::1]:5000", true),
            ("https://localhost.example.org", false),
            ("http://10.0.0.1:80", false),
            ("https://api.modal.com", false),
            ("nothing", false),
        ] {
            assert_eq!(is_loopback(url), expected, "{url}");
        }
    }

    #[test]
    fn the_end_of_a_token_is_read_and_nothing_else() {
        let token = |payload: &str| format!("h.{}.s", BASE64_URL_SAFE_NO_PAD.encode(payload));
        assert_eq!(expiry(&token(r#"{"exp": 17.5}"#)), Some(17.5));
        assert_eq!(expiry(&token(r#"{"exp": "soon"}"#)), None);
        assert_eq!(expiry(&token("no JSON")), None);
        for odd in ["", "a.b", "a.!.c", "a.b.c.d", &format!("{}.x", token(r#"{"exp": 1}"#))] {
            assert_eq!(expiry(odd), None, "{odd}");
        }
    }

    #[tokio::test]
    async fn a_list_of_servers_is_tried_in_turn() {
        let closed = "http://127.0.0.1:1".to_owned();
        let fault = connect(&[closed.clone(), closed], None).await.unwrap_err();
        assert_eq!(fault.code, Code::Unavailable);
        assert!(fault.message.contains("http://127.0.0.1:1"), "{}", fault.message);
        assert!(connect(&[], None).await.is_err());
        assert!(connect(&["not an address".to_owned()], None).await.is_err());
    }
}
