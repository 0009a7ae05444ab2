//! Where Modal is, and as whom it is asked: what its own clients read.

mod file;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use tonic::transport::Uri;

use self::file::Profile;
use super::channel;
use crate::error::{Error, Result};

/// Where Modal's own clients look, in their order.
const SERVER_URLS: &str = "https://api.modal.com,https://api.modal2.com";
/// What other programs of Modal's integrations sign in with.
const OAUTH: [&str; 4] =
    ["oauth_refresh_token", "oauth_client_id", "oauth_client_secret", "oauth_jwt_key"];
const ROOTS: &str = "KAA_MODAL_ROOTS";

/// Where Modal is, and as whom it is asked.
#[derive(Clone, PartialEq, Eq)]
pub struct ModalConfig {
    /// The servers, of which the first that can be reached is taken; `http://` on loopback only. Default:
    /// Modal's own.
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
    /// The version of Modal's Python client whose settings, requests and retries are mirrored here.
    pub const PYTHON_CLIENT: &str = "1.6.4";
    /// The version of Modal's JavaScript client that the same holds for.
    pub const JS_CLIENT: &str = "0.11.1";

    /// What Modal's clients of this user would use: variables whose values `variable` gives, then the
    /// profile in `~/.modal.toml`. A variable that is empty counts as one that isn't set.
    ///
    /// | variable | key in the file | sets |
    /// |---|---|---|
    /// | `MODAL_TOKEN_ID`, `MODAL_TOKEN_SECRET` | `token_id`, `token_secret` | the token |
    /// | `MODAL_SERVER_URL` | `server_url` | [`server_urls`](Self::server_urls), with commas between them; `http://` on loopback only |
    /// | `MODAL_ENVIRONMENT` | `environment` | [`environment`](Self::environment) |
    /// | `MODAL_IMAGE_BUILDER_VERSION` | `image_builder_version` | [`image_builder_version`](Self::image_builder_version) |
    /// | `MODAL_MAX_THROTTLE_WAIT` | `max_throttle_wait` | [`max_throttle_wait`](Self::max_throttle_wait) |
    /// | `MODAL_CONFIG_PATH` | – | the file; without it `.modal.toml` in the directory of `HOME` |
    /// | `MODAL_PROFILE` | `active = true` | the table of the file; without both `default` |
    /// | `KAA_MODAL_ROOTS` | – | [`root_certificates`](Self::root_certificates) |
    ///
    /// Other settings of theirs mean nothing here, and `MODAL_OAUTH_…` is refused.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`](crate::Error::Unavailable) without credentials,
    /// [`Error::Invalid`](crate::Error::Invalid) for a file or variable that can't be used.
    ///
    /// # Example
    ///
    /// ```
    /// use kaa::modal::ModalConfig;
    ///
    /// let config = ModalConfig::load(|name| match name {
    ///     "MODAL_TOKEN_ID" => Some("ak-1".into()),
    ///     "MODAL_TOKEN_SECRET" => Some("as-1".into()),
    ///     _ => None,
    /// })?;
    /// assert_eq!(config.server_urls[0], "https://api.modal.com");
    /// # Ok::<_, kaa::Error>(())
    /// ```
    pub fn load(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        Self::find(variable).map(|(config, _)| config)
    }

    /// As [`load`](Self::load), and in words where the token was found, without a part of it.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    pub fn find(variable: impl Fn(&str) -> Option<String>) -> Result<(Self, String)> {
        let variable = |name: &str| {
            let value = variable(name)?;
            let value = value.trim();
            (!value.is_empty()).then(|| value.to_owned())
        };
        let profile = Profile::find(&variable)?;
        let settings = Settings { variable: &variable, profile };
        settings.refuse_oauth()?;
        let Token { id, secret, place } = settings.token()?;
        let config = Self {
            server_urls: settings.server_urls()?,
            token_id: id,
            token_secret: secret,
            environment: settings.text("environment")?.map_or_else(String::new, |it| it.value),
            image_builder_version: settings.text("image_builder_version")?.map(|it| it.value),
            max_throttle_wait: settings.max_throttle_wait()?,
            root_certificates: variable(ROOTS).map(PathBuf::from),
        };
        if let Some(path) = &config.root_certificates {
            check_roots(path)?;
        }
        Ok((config, place))
    }

    /// This, with the addresses as they are connected to. Anybody may have written them into the field.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for an address that the token must not be sent to.
    pub(super) fn checked(mut self) -> Result<Self> {
        let urls = self.server_urls.iter().map(|url| check_url("server_urls", url));
        self.server_urls = urls.collect::<Result<_>>()?;
        Ok(self)
    }
}

/// The variables over the profile.
struct Settings<'a> {
    variable: &'a dyn Fn(&str) -> Option<String>,
    profile: Profile,
}

/// A value, and where it is.
struct Setting {
    value: String,
    place: String,
}

struct Token {
    id: String,
    secret: String,
    place: String,
}

impl Settings<'_> {
    /// The value of a key of the file, or of its variable, which beats it.
    fn text(&self, key: &str) -> Result<Option<Setting>> {
        let name = variable_of(key);
        match (self.variable)(&name) {
            Some(value) => Ok(Some(Setting { value, place: name })),
            None => self.profile.text(key),
        }
    }

    fn refuse_oauth(&self) -> Result<()> {
        for key in OAUTH {
            if let Some(found) = self.text(key)? {
                let reason = "signing in by OAuth isn't supported here; leave it out, and use a token: \
                              MODAL_TOKEN_ID and MODAL_TOKEN_SECRET";
                return Err(Error::invalid(found.place, reason));
            }
        }
        Ok(())
    }

    fn token(&self) -> Result<Token> {
        let half = |found: Setting, has: &str, lacks: &str, key: &str| {
            let file = self.profile.place(key);
            let reason = format!(
                "it is the {has} of a token, and its {lacks} is missing: set {}, or write {file}",
                variable_of(key)
            );
            Err(Error::invalid(found.place, reason))
        };
        let (id, secret) = match (self.text("token_id")?, self.text("token_secret")?) {
            (Some(id), Some(secret)) => (id, secret),
            (Some(id), None) => return half(id, "id", "secret", "token_secret"),
            (None, Some(secret)) => return half(secret, "secret", "id", "token_id"),
            (None, None) => {
                let reason = format!(
                    "there is no token: MODAL_TOKEN_ID and MODAL_TOKEN_SECRET are not set, and {}; make \
                     one with `modal token new`, or at https://modal.com/settings/tokens and set both \
                     variables",
                    self.profile.absence()
                );
                return Err(Error::unavailable("Modal", reason));
            }
        };
        for part in [&id, &secret] {
            // It travels in a header. What is wrong with it is not shown: it may be the secret.
            if !part.value.bytes().all(|byte| byte.is_ascii_graphic()) {
                let reason = "it has characters that no token has; copy it again";
                return Err(Error::invalid(&part.place, reason));
            }
        }
        let profile = self.profile.to_string();
        let place = match [&id, &secret].map(|part| part.place.starts_with("MODAL_")) {
            [true, true] => "MODAL_TOKEN_ID and MODAL_TOKEN_SECRET".to_owned(),
            [false, false] => profile,
            [true, false] => format!("MODAL_TOKEN_ID and {profile}"),
            [false, true] => format!("{profile} and MODAL_TOKEN_SECRET"),
        };
        Ok(Token { id: id.value, secret: secret.value, place })
    }

    fn server_urls(&self) -> Result<Vec<String>> {
        let found = self.text("server_url")?;
        let (text, place) = match &found {
            Some(Setting { value, place }) => (value.as_str(), place.as_str()),
            None => (SERVER_URLS, "server_url"),
        };
        let urls = text.split(',').map(str::trim).filter(|url| !url.is_empty());
        let urls = urls.map(|url| check_url(place, url)).collect::<Result<Vec<_>>>()?;
        if urls.is_empty() {
            return Err(Error::invalid(place, "there is no address in it; write https://HOST"));
        }
        Ok(urls)
    }

    fn max_throttle_wait(&self) -> Result<Option<u64>> {
        let Some(Setting { value, place }) = self.text("max_throttle_wait")? else {
            return Ok(None);
        };
        let seconds = value.parse().map_err(|_| {
            Error::invalid(place, format!("{value:?} is no whole number of seconds, such as 60"))
        })?;
        Ok(Some(seconds))
    }
}

fn variable_of(key: &str) -> String {
    format!("MODAL_{}", key.to_uppercase())
}

/// A server's address without the slash at its end.
fn check_url(place: &str, url: &str) -> Result<String> {
    let refuse = |reason: &str| Err(Error::invalid(place, format!("{url:?}: {reason}")));
    if url.contains('@') {
        // What is before that sign may be a password.
        return Err(Error::invalid(place, "an address has no user name and no password in it"));
    }
    if url.starts_with("unix:") {
        return refuse("sockets of this machine aren't spoken here; name http://127.0.0.1:PORT");
    }
    let Ok(uri) = url.parse::<Uri>() else {
        return refuse("it is no address; write https://HOST or https://HOST:PORT");
    };
    let host = uri.host().unwrap_or_default();
    let is_bare = matches!(uri.path(), "" | "/") && uri.query().is_none();
    match uri.scheme_str() {
        Some("https" | "http") if host.is_empty() || !is_bare => {
            refuse("write it as https://HOST or https://HOST:PORT, with nothing after it")
        }
        Some("https") => Ok(url.trim_end_matches('/').to_owned()),
        Some("http") if channel::is_loopback(url) => Ok(url.trim_end_matches('/').to_owned()),
        Some("http") => refuse(
            "http:// would show the token to everybody on the way, so it is only taken for localhost, \
             127.0.0.1 and [::1]; write https://",
        ),
        _ => refuse("write it as https://HOST or https://HOST:PORT"),
    }
}

/// Said here, since it would otherwise come to light when a tunnel is opened.
fn check_roots(path: &Path) -> Result<()> {
    if path.is_file() {
        return Ok(());
    }
    let reason = format!("{} is no file; name one of PEM certificates", path.display());
    Err(Error::invalid(ROOTS, reason))
}
