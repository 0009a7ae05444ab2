//! Why a call of the engine didn't work, cut by what can be done about it.

use std::error::Error as StdError;
use std::future::Future;
use std::io;
use std::time::Duration;

use bollard::errors::Error as ApiError;

use crate::error::Error;

/// What an engine says at most in one of our messages, in characters.
const SAID_CHARS_MAX: usize = 600;

/// A call that didn't work.
#[derive(Debug)]
pub(super) enum Fault {
    /// The engine refused it, with this HTTP status.
    Refused { status: u16, message: String },
    /// Nobody could be reached, or the connection broke.
    Unreachable(io::ErrorKind),
    /// No answer within this time.
    Silent(Duration),
    /// Whatever answers isn't a Docker engine, or says something that none says.
    Odd(String),
}

/// Makes a call that ends within this time.
pub(super) async fn call<T>(
    most: Duration,
    call: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, Fault> {
    match tokio::time::timeout(most, call).await {
        Ok(done) => done.map_err(Fault::from),
        Err(_) => Err(Fault::Silent(most)),
    }
}

impl From<ApiError> for Fault {
    fn from(error: ApiError) -> Self {
        match error {
            ApiError::DockerResponseServerError { status_code, message } => {
                Self::Refused { status: status_code, message: said(&message) }
            }
            ApiError::DockerStreamError { error } => {
                Self::Refused { status: 500, message: said(&error) }
            }
            ApiError::SocketNotFoundError(_) => Self::Unreachable(io::ErrorKind::NotFound),
            ApiError::RequestTimeoutError => Self::Unreachable(io::ErrorKind::TimedOut),
            error => match io_kind(&error) {
                Some(kind) => Self::Unreachable(kind),
                None => Self::Odd(said(&innermost(&error).to_string())),
            },
        }
    }
}

impl Fault {
    pub(super) fn is_missing(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }

    /// In words, without what was asked for.
    pub(super) fn reason(&self) -> String {
        match self {
            Self::Refused { message, .. } => message.clone(),
            Self::Unreachable(kind) => kind.to_string(),
            Self::Silent(most) => format!("it did not answer within {} s", most.as_secs_f64()),
            Self::Odd(what) => format!("it answered what no engine answers: {what}"),
        }
    }

    /// The fault as an error about the engine itself.
    pub(super) fn of_engine(self, host: &str) -> Error {
        let remedy = match &self {
            Self::Refused { status, message } => {
                return Error::unavailable(
                    engine_at(host),
                    format!("it refused with {status}: {message}"),
                );
            }
            Self::Odd(what) => {
                return Error::Incompatible {
                    what: format!("what listens at {host}"),
                    expected: "the API of a Docker engine".into(),
                    found: what.clone(),
                };
            }
            Self::Unreachable(io::ErrorKind::NotFound) => {
                "there is no such socket; start the engine, or name the socket of another one"
            }
            Self::Unreachable(io::ErrorKind::PermissionDenied) => {
                "this user may not open the socket; join the group that owns it (often `docker`, and \
                 membership is as good as root), or use a rootless engine"
            }
            Self::Unreachable(io::ErrorKind::ConnectionRefused) => {
                "nobody listens there; start the engine"
            }
            Self::Unreachable(kind) => {
                let reason = format!("{kind}; look whether it runs and can be reached");
                return Error::unavailable(engine_at(host), reason);
            }
            Self::Silent(_) => {
                let reason = format!("{}; look whether it hangs, and restart it", self.reason());
                return Error::unavailable(engine_at(host), reason);
            }
        };
        Error::unavailable(engine_at(host), remedy)
    }
}

pub(super) fn engine_at(host: &str) -> String {
    format!("the Docker engine at {host}")
}

/// What somebody else said, without what would change a terminal, and not too long.
pub(super) fn said(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let mut said: String = text.trim().chars().take(SAID_CHARS_MAX).map(plain).collect();
    if text.trim().chars().nth(SAID_CHARS_MAX).is_some() {
        said.push_str("...");
    }
    said
}

/// The system's answer, if one led to this error.
fn io_kind(error: &ApiError) -> Option<io::ErrorKind> {
    let mut next: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        next = error.source();
    }
    None
}

fn innermost(error: &ApiError) -> &(dyn StdError + 'static) {
    let mut found: &(dyn StdError + 'static) = error;
    while let Some(source) = found.source() {
        found = source;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_an_engine_comes_with_what_to_do() {
        let silent = Fault::Silent(Duration::from_secs(5));
        for (fault, part) in [
            (Fault::Unreachable(io::ErrorKind::NotFound), "no such socket; start the engine"),
            (Fault::Unreachable(io::ErrorKind::PermissionDenied), "join the group"),
            (Fault::Unreachable(io::ErrorKind::ConnectionRefused), "nobody listens"),
            (Fault::Unreachable(io::ErrorKind::ConnectionReset), "look whether it runs"),
            (silent, "within 5 s; look whether it hangs"),
            (Fault::Refused { status: 500, message: "no".into() }, "refused with 500: no"),
            (Fault::Odd("<html>".into()), "expected the API of a Docker engine, found <html>"),
        ] {
            let error = fault.of_engine("unix:///run/d.sock").to_string();
            assert!(error.contains(part) && error.contains("unix:///run/d.sock"), "{error}");
        }
    }

    #[test]
    fn what_others_say_is_cut_and_has_no_control_characters() {
        assert_eq!(said(" a\x1b[2Jb\nc "), "a [2Jb c");
        let long = said(&"x".repeat(10_000));
        assert_eq!((long.len(), long.ends_with("x...")), (SAID_CHARS_MAX + 3, true));
    }
}
