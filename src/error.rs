//! The one error type, cut by what the caller can do next.

use std::io;

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an environment, an image or a handler could not do its job.
///
/// What the guest's code did (an exception, `sys.exit`, a limit) is never an `Error`: it is an
/// [`Outcome`](crate::Outcome). The doc of each variant ends with what is still usable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The caller passed something that can't be used; `what` names it and `reason` says what to do.
    /// Nothing was changed: everything stays usable.
    #[error("{what}: {reason}")]
    Invalid {
        /// The argument, flag or field.
        what: String,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// The environment lost its state and can't go back by itself.
    /// Only `reset` and `close` still work on it; other environments are untouched.
    #[error("the environment is poisoned ({reason}); reset it or close it")]
    Poisoned {
        /// What happened.
        reason: String,
    },
    /// The environment was closed. Open another one; nothing else is affected.
    #[error("the environment is closed")]
    Closed,
    /// The backend can't do this at all. The environment stays usable for everything else.
    #[error("the {backend} backend does not support {operation}")]
    Unsupported {
        /// The backend's name.
        backend: &'static str,
        /// The operation's name, as in [`Capabilities`](crate::Capabilities).
        operation: &'static str,
    },
    /// The tenant has all that it may have of something. Everything that was open stays usable; ask
    /// again when some of it was given back, or raise the quota.
    #[error("tenant `{tenant}` is over its quota of {quota}: {reason}")]
    Quota {
        /// The tenant's name.
        tenant: String,
        /// The field of [`Quotas`](crate::Quotas).
        quota: &'static str,
        /// How much it has, and what helps.
        reason: String,
    },
    /// Something outside Kaa that the operation needs isn't there: pip, a network, an LM handler.
    /// The message says what to install or start. Everything that was open stays usable.
    #[error("{what} is not available: {reason}")]
    Unavailable {
        /// The missing thing.
        what: String,
        /// Why it's missing and what to do.
        reason: String,
    },
    /// A file or a peer is of another version, another image, or damaged; it was not used.
    /// Everything that was open stays usable.
    #[error("{what} can't be used: expected {expected}, found {found}")]
    Incompatible {
        /// The file or peer.
        what: String,
        /// What would fit.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The guest sent something that its agent never sends. The cell was rolled back where the
    /// backend can; the status tells whether the environment is ready or poisoned.
    #[error("the guest broke the protocol: {reason}")]
    Protocol {
        /// What was wrong with it.
        reason: String,
    },
    /// The operating system refused something. Everything that was open stays usable.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, with the path.
        context: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A fault in Kaa or in the engine under it; please report it. The environment is poisoned.
    #[error("internal fault: {0}")]
    Internal(String),
}

impl Error {
    /// Whether the environment that returned this needs a `reset` before it's used again.
    ///
    /// The match names every variant, so that a new one has to decide.
    #[must_use]
    pub fn poisons(&self) -> bool {
        match self {
            Self::Poisoned { .. } | Self::Internal(_) => true,
            Self::Invalid { .. }
            | Self::Closed
            | Self::Unsupported { .. }
            | Self::Quota { .. }
            | Self::Unavailable { .. }
            | Self::Incompatible { .. }
            | Self::Protocol { .. }
            | Self::Io { .. } => false,
        }
    }

    pub(crate) fn invalid(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { what: what.into(), reason: reason.into() }
    }

    pub(crate) fn unavailable(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unavailable { what: what.into(), reason: reason.into() }
    }

    pub(crate) fn protocol(reason: impl Into<String>) -> Self {
        Self::Protocol { reason: reason.into() }
    }

    pub(crate) fn io(context: impl Into<String>, source: io::Error) -> Self {
        Self::Io { context: context.into(), source }
    }
}
