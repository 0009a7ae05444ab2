//! Why a call of Modal's didn't work, cut by what can be done about it.

use std::time::Duration;

use prost::Message;
use tonic::{Code, Status};

use super::proto::client::{RpcRetryPolicy, RpcStatus};
use crate::error::Error;

/// What Modal says at most in one of our messages, in characters.
const SAID_CHARS_MAX: usize = 600;
/// The type of the detail that tells when to come again, whatever stands before it.
const RETRY_POLICY: &str = "/modal.client.RPCRetryPolicy";
/// Modal is never asked again sooner.
const RETRY_MIN: f32 = 0.1;
/// What it can ask for at most.
const RETRY_MAX: f32 = 24.0 * 60.0 * 60.0;

/// A call that didn't work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) code: Code,
    pub(super) message: String,
    /// When Modal wants to be asked again, if it said so.
    pub(super) retry_after: Option<Duration>,
}

impl Fault {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: None }
    }

    /// Whether the same call may work if it's made again, as Modal's own clients see it.
    pub(super) fn is_transient(&self) -> bool {
        matches!(
            self.code,
            Code::DeadlineExceeded
                | Code::Unavailable
                | Code::Cancelled
                | Code::Internal
                | Code::Unknown
        )
    }

    /// What it means for whoever wanted `what`. `token` is the public half of the credentials.
    pub(super) fn about(&self, what: &str, token: &str) -> Error {
        let message = &self.message;
        let reason = match self.code {
            Code::Unauthenticated | Code::PermissionDenied => format!(
                "it refused the token `{token}`: {message}; make a new one with `modal token new`, and \
                 look at MODAL_TOKEN_ID, MODAL_TOKEN_SECRET and MODAL_PROFILE"
            ),
            Code::ResourceExhausted => format!(
                "the workspace is over one of its limits: {message}; end sandboxes that aren't needed \
                 (`kaa modal list`, `kaa modal clean`), or raise the limit in Modal's settings"
            ),
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => format!(
                "it can't be reached: {message}; look at the network and MODAL_SERVER_URL, or try \
                 again later"
            ),
            Code::Unimplemented | Code::FailedPrecondition => format!(
                "Modal refused it: {message}; if that is about the client's version, which is that of \
                 {} of its own for Python, look for a newer Kaa",
                super::ModalConfig::PYTHON_CLIENT
            ),
            Code::NotFound => format!("it isn't there: {message}"),
            Code::InvalidArgument | Code::AlreadyExists | Code::OutOfRange => {
                format!("Modal refused it: {message}")
            }
            code => format!("Modal failed ({code:?}): {message}; try again later"),
        };
        Error::unavailable(what, reason)
    }
}

impl From<Status> for Fault {
    fn from(status: Status) -> Self {
        // What is below a broken connection says more than the connection.
        let cause = std::error::Error::source(&status).map(innermost);
        let message = match cause {
            Some(cause) if !status.message().contains(&cause) => {
                format!("{}: {cause}", status.message())
            }
            _ => status.message().to_owned(),
        };
        Self {
            code: status.code(),
            message: said(&message),
            retry_after: retry_after(status.details()),
        }
    }
}

fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// A text of Modal's, of bounded length and on one line.
pub(super) fn said(text: &str) -> String {
    let text: String = text.trim().chars().take(SAID_CHARS_MAX).collect();
    text.replace(|c: char| c.is_control(), " ")
}

/// What `grpc-status-details-bin` tells about coming again.
fn retry_after(details: &[u8]) -> Option<Duration> {
    let status = RpcStatus::decode(details).ok()?;
    let detail = status.details.iter().find(|detail| detail.type_url.ends_with(RETRY_POLICY))?;
    let seconds = RpcRetryPolicy::decode(&*detail.value).ok()?.retry_after_secs;
    let seconds = if seconds.is_nan() { RETRY_MIN } else { seconds.clamp(RETRY_MIN, RETRY_MAX) };
    Some(Duration::from_secs_f32(seconds))
}

#[cfg(test)]
mod tests {
    use super::super::proto::client::RpcStatusDetail;
    use super::*;

    fn details(type_url: &str, seconds: f32) -> Vec<u8> {
        let value = RpcRetryPolicy { retry_after_secs: seconds }.encode_to_vec().into();
        let details = vec![RpcStatusDetail { type_url: type_url.into(), value }];
        RpcStatus { code: 8, message: "slow down".into(), details }.encode_to_vec()
    }

    #[test]
    fn what_modal_says_about_coming_again_is_read_whatever_it_says() {
        let policy = "type.googleapis.com/modal.client.RPCRetryPolicy";
        for (details, expected) in [
            (details(policy, 2.5), Some(Duration::from_secs_f32(2.5))),
            (details(policy, 0.0), Some(Duration::from_secs_f32(RETRY_MIN))),
            (details(policy, -3.0), Some(Duration::from_secs_f32(RETRY_MIN))),
            (details(policy, f32::NAN), Some(Duration::from_secs_f32(RETRY_MIN))),
            (details(policy, f32::INFINITY), Some(Duration::from_secs_f32(RETRY_MAX))),
            (details("type.googleapis.com/modal.client.Other", 2.5), None),
            (b"\xff\xff\xff".to_vec(), None),
            (Vec::new(), None),
        ] {
            assert_eq!(retry_after(&details), expected, "{details:?}");
        }
    }

    #[test]
    fn what_is_said_is_bounded_and_on_one_line() {
        let fault = Fault::from(Status::internal(format!("a\nb\x1b[31m{}", "x".repeat(5000))));
        assert_eq!(fault.message.chars().count(), SAID_CHARS_MAX);
        assert!(!fault.message.contains(char::is_control));
    }

    #[test]
    fn every_code_says_what_to_do() {
        for (code, part) in [
            (Code::Unauthenticated, "modal token new"),
            (Code::ResourceExhausted, "kaa modal clean"),
            (Code::Unavailable, "MODAL_SERVER_URL"),
            (Code::FailedPrecondition, super::super::ModalConfig::PYTHON_CLIENT),
            (Code::NotFound, "isn't there"),
            (Code::Internal, "try again"),
        ] {
            let error = Fault::new(code, "no").about("a thing", "ak-1").to_string();
            assert!(
                error.starts_with("a thing is not available") && error.contains(part),
                "{error}"
            );
        }
    }
}
