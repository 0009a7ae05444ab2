//! The shared secret between a server of the LM handler protocol and its clients.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Whoever guesses has to be hopeless.
const BYTES_MIN: usize = 16;
const BYTES_MAX: usize = 4096;

/// A shared secret: [`LmServer`](super::LmServer) asks for it, and
/// [`SocketHandler`](super::SocketHandler) sends it.
///
/// It has 16 to 4096 bytes. It travels as it is, so a network in between has to be trusted or a
/// tunnel. Neither `Debug` nor any error shows it.
///
/// ```
/// use kaa::lm::LmToken;
///
/// let token = LmToken::new("b9f3c0a1d27e4856").unwrap();
/// assert_eq!(format!("{token:?}"), "LmToken(hidden)");
/// assert_eq!(
///     LmToken::new("short").unwrap_err().to_string(),
///     "token: it has 5 bytes; take 16 to 4096, for example from `openssl rand -hex 32`"
/// );
/// ```
#[derive(Clone)]
pub struct LmToken(String);

impl LmToken {
    /// A token of this text.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if it is shorter than 16 bytes or longer than 4096.
    pub fn new(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        if !(BYTES_MIN..=BYTES_MAX).contains(&text.len()) {
            let reason = format!(
                "it has {} bytes; take {BYTES_MIN} to {BYTES_MAX}, for example from \
                 `openssl rand -hex 32`",
                text.len()
            );
            return Err(Error::invalid("token", reason));
        }
        Ok(Self(text))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is what a client sent.
    pub(super) fn is(&self, sent: &str) -> bool {
        // How long a comparison takes tells how much of it is equal. Digests are equally long, and
        // all of them is compared; what little their timing may tell is not about the token.
        let (ours, theirs) = (Sha256::digest(&self.0), Sha256::digest(sent));
        ours.iter().zip(&theirs).fold(0, |differing, (a, b)| differing | (a ^ b)) == 0
    }
}

impl fmt::Debug for LmToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LmToken(hidden)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_token_fits() {
        let token = LmToken::new("0123456789abcdef").unwrap();
        assert!(token.is("0123456789abcdef"));
        for other in ["", "0", "0123456789abcde", "0123456789abcdef ", "0123456789ABCDEF"] {
            assert!(!token.is(other), "{other}");
        }
    }

    #[test]
    fn its_length_is_bounded_both_ways() {
        for (bytes, fits) in [(0, false), (15, false), (16, true), (4096, true), (4097, false)] {
            assert_eq!(LmToken::new("x".repeat(bytes)).is_ok(), fits, "{bytes}");
        }
    }
}
