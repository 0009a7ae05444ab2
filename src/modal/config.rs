//! Where Modal is, and as whom it is asked: what its own clients read.

use std::path::PathBuf;

use crate::error::Result;

/// Where Modal is, and as whom it is asked.
#[derive(Clone, PartialEq, Eq)]
pub struct ModalConfig {
    /// The servers, of which the first that can be reached is taken. Default: Modal's own.
    pub server_urls: Vec<String>,
    /// `ak-…`.
    pub token_id: String,
    /// `as-…`; no debug output shows it.
    pub token_secret: String,
    /// The environment of the workspace. Default: empty, the workspace's default.
    pub environment: String,
    /// The version of Modal's image builder. Default: what the environment says.
    pub image_builder_version: Option<String>,
    /// How long a throttled request waits at most, in seconds. Default: as long as Modal says.
    pub max_throttle_wait: Option<u64>,
    /// A file of PEM certificates that connections to tunnels trust beside the system's. Default: none.
    pub root_certificates: Option<PathBuf>,
}

impl std::fmt::Debug for ModalConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModalConfig")
            .field("server_urls", &self.server_urls)
            .field("token_id", &self.token_id)
            .field("environment", &self.environment)
            .field("image_builder_version", &self.image_builder_version)
            .finish_non_exhaustive()
    }
}

impl ModalConfig {
    /// What Modal's clients of this user would use: variables whose values `variable` gives, then the
    /// profile in `~/.modal.toml`.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`](crate::Error::Unavailable) without credentials,
    /// [`Error::Invalid`](crate::Error::Invalid) for a file or variable that can't be used.
    pub fn load(_variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        Err(crate::Error::unavailable("Modal", "not yet"))
    }
}
