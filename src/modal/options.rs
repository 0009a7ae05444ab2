//! How sessions in Modal's sandboxes are set up.

use std::time::Duration;

use super::image::ModalImage;
use crate::error::{Error, Result};

/// What Modal takes as a share of a processor at least.
const CPU_MIN: f64 = 0.125;
const CPU_MAX: f64 = 64.0;
/// How long Modal lets a sandbox live at most.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
const TIMEOUT_MIN: Duration = Duration::from_secs(10);
/// Tags, secrets, domains and the like of one sandbox.
const ENTRIES_MAX: usize = 100;

/// What network the guest has. Calls of language models don't need any.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Network {
    /// None.
    #[default]
    Blocked,
    /// The internet.
    Open,
    /// These addresses and no others.
    Allow {
        /// Ranges, such as `10.0.0.0/8`.
        cidrs: Vec<String>,
        /// Names, such as `example.org`.
        domains: Vec<String>,
    },
}

/// The way of model calls from a session to the host. All else takes the streams of its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Carrier {
    /// The streams of the session's process, too: no address is public.
    #[default]
    Stdio,
    /// A [broker](crate::broker) in the sandbox, which the host reaches through a tunnel of Modal's, by
    /// HTTPS and with a token. For networks that break long streams, and for comparisons.
    ///
    /// Modal has no tunnels where the network is blocked: [`Network::Blocked`] then is a network that
    /// lets nothing out, and only the tunnel in.
    Broker {
        /// Where it listens in the sandbox. RLM's is 8080.
        port: u16,
    },
}

/// Environment variables that Modal puts into a sandbox.
#[derive(Clone, PartialEq, Eq)]
pub enum Secret {
    /// A secret that the account has, by its name.
    Named(String),
    /// One variable. It's sent with the sandbox and kept nowhere.
    Variable {
        /// The variable's name.
        name: String,
        /// Its value, which no debug output shows.
        value: String,
    },
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Named(name) => f.debug_tuple("Named").field(name).finish(),
            Self::Variable { name, .. } => {
                f.debug_struct("Variable").field("name", name).finish_non_exhaustive()
            }
        }
    }
}

/// How sessions in sandboxes are set up. The defaults are safe: no network, a life of an hour.
///
/// ```
/// use kaa::modal::{ModalImage, ModalOptions};
///
/// let image = ModalImage::from_registry("python:3.11-slim").pip_install(["dill", "numpy"]);
/// let options = ModalOptions { image, cpu: 2.0, ..ModalOptions::default() };
/// assert!(options.validate().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct ModalOptions {
    /// The app that the sandboxes belong to; it's made if the account has none of this name. Default:
    /// `kaa`.
    pub app: String,
    /// What is in the sandbox: any image with Python 3.9 or newer. Default: `python:3.11-slim`.
    pub image: ModalImage,
    /// How long building an image may take in all. Default: 30 min.
    pub build_timeout: Duration,
    /// Processors that a session may use at a time, in parts of one. Default: 1.
    pub cpu: f64,
    /// How long a sandbox lives at most, whatever becomes of the host: 10 s to 24 h. Default: 1 h.
    pub timeout: Duration,
    /// What network the guest has. Default: none.
    pub network: Network,
    /// The way of model calls. Default: [`Carrier::Stdio`].
    pub carrier: Carrier,
    /// Variables that Modal puts into the sandbox. Default: none.
    pub secrets: Vec<Secret>,
    /// Tags of the sandboxes, beside those that Kaa gives them. Default: none.
    pub tags: Vec<(String, String)>,
    /// How long a connection that broke in the middle of a cell is tried again before the session is
    /// given up. Default: 2 min.
    pub patience: Duration,
    /// Who runs the cells, as the number of a user; the supervisor stays what the image's user is.
    /// Nothing changes where that isn't root, or where others than root can't read the interpreter's
    /// own files. Default: 65534, nobody.
    pub user: u32,
    /// Python that runs once when a session is opened, before its first cell. Default: none.
    pub setup_code: Option<String>,
    /// The interpreter: a path in the image, or a name on its `PATH`. Default: `python3`.
    pub python: String,
}

impl Default for ModalOptions {
    fn default() -> Self {
        Self {
            app: "kaa".into(),
            image: ModalImage::default(),
            build_timeout: Duration::from_secs(30 * 60),
            cpu: 1.0,
            timeout: Duration::from_secs(60 * 60),
            network: Network::default(),
            carrier: Carrier::default(),
            secrets: Vec::new(),
            tags: Vec::new(),
            patience: Duration::from_secs(120),
            user: 65_534,
            setup_code: None,
            python: "python3".into(),
        }
    }
}

impl ModalOptions {
    /// Checks every field that can be checked here.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names the field and what would be right.
    pub fn validate(&self) -> Result<()> {
        self.image.validate()?;
        check_app(&self.app)?;
        if self.python.is_empty() || self.python.contains(char::is_control) {
            let reason = format!("{:?} is no name of a program", self.python);
            return Err(Error::invalid("modal.python", reason));
        }
        check_cpu(self.cpu)?;
        check_timeout(self.timeout, TIMEOUT_MIN)?;
        if self.carrier == (Carrier::Broker { port: 0 }) {
            return Err(Error::invalid("modal.carrier", "the port must be 1 to 65535"));
        }
        check_network(&self.network)?;
        check_secrets(&self.secrets)?;
        check_tags(&self.tags)
    }
}

/// What Modal takes as a share of processors.
pub(super) fn check_cpu(cpu: f64) -> Result<()> {
    if !(CPU_MIN..=CPU_MAX).contains(&cpu) {
        let reason = format!("must be {CPU_MIN} to {CPU_MAX}, not {cpu}");
        return Err(Error::invalid("modal.cpu", reason));
    }
    Ok(())
}

/// How long a sandbox may live.
pub(super) fn check_timeout(timeout: Duration, least: Duration) -> Result<()> {
    if !(least..=TIMEOUT_MAX).contains(&timeout) {
        let reason = format!("must be {} s to 24 h, not {timeout:?}", least.as_secs());
        return Err(Error::invalid("modal.timeout", reason));
    }
    Ok(())
}

pub(super) fn check_count(field: &str, count: usize) -> Result<()> {
    if count > ENTRIES_MAX {
        let reason = format!("has {count} entries; at most {ENTRIES_MAX} are taken");
        return Err(Error::invalid(field, reason));
    }
    Ok(())
}

pub(super) fn check_network(network: &Network) -> Result<()> {
    match network {
        Network::Blocked | Network::Open => Ok(()),
        Network::Allow { cidrs, domains } => {
            check_count("modal.network", cidrs.len() + domains.len())
        }
    }
}

pub(super) fn check_secrets(secrets: &[Secret]) -> Result<()> {
    check_count("modal.secrets", secrets.len())?;
    for secret in secrets {
        match secret {
            Secret::Named(name) if name.is_empty() => {
                return Err(Error::invalid("modal.secrets", "a secret has no name"));
            }
            Secret::Variable { name, .. } => check_variable("modal.secrets", name)?,
            Secret::Named(_) => {}
        }
    }
    Ok(())
}

pub(super) fn check_tags(tags: &[(String, String)]) -> Result<()> {
    check_count("modal.tags", tags.len())?;
    for (name, _) in tags {
        if name.is_empty() || name.starts_with(super::TAG_PREFIX) {
            let reason = format!("{name:?} is empty or one of Kaa's own; name it otherwise");
            return Err(Error::invalid("modal.tags", reason));
        }
    }
    Ok(())
}

/// What Modal takes as the name of an app, as its clients check it.
pub(super) fn check_app(name: &str) -> Result<()> {
    let is_fine = |c: char| c.is_ascii_alphanumeric() || ['-', '_', '.'].contains(&c);
    if name.is_empty() || name.len() > 64 || !name.chars().all(is_fine) {
        let reason = format!("{name:?} isn't 1 to 64 letters, digits, dashes, dots or underscores");
        return Err(Error::invalid("modal.app", reason));
    }
    Ok(())
}

/// What Modal takes as the name of a variable.
pub(super) fn check_variable(field: &str, name: &str) -> Result<()> {
    let is_fine = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if name.is_empty()
        || name.starts_with(|c: char| c.is_ascii_digit())
        || !name.chars().all(is_fine)
    {
        let reason = format!("{name:?} isn't a variable's name: letters, digits and underscores");
        return Err(Error::invalid(field, reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_refused_by_name() {
        let fine = ModalOptions::default;
        let variable = |name: &str| Secret::Variable { name: name.into(), value: "v".into() };
        for (field, options) in [
            ("modal.app", ModalOptions { app: "a b".into(), ..fine() }),
            ("modal.app", ModalOptions { app: String::new(), ..fine() }),
            ("modal.image", ModalOptions { image: ModalImage::from_registry(""), ..fine() }),
            ("modal.cpu", ModalOptions { cpu: f64::NAN, ..fine() }),
            ("modal.cpu", ModalOptions { cpu: 0.0, ..fine() }),
            ("modal.timeout", ModalOptions { timeout: Duration::from_secs(90_000), ..fine() }),
            ("modal.timeout", ModalOptions { timeout: Duration::ZERO, ..fine() }),
            ("modal.python", ModalOptions { python: String::new(), ..fine() }),
            ("modal.carrier", ModalOptions { carrier: Carrier::Broker { port: 0 }, ..fine() }),
            ("modal.secrets", ModalOptions { secrets: vec![variable("1A")], ..fine() }),
            ("modal.secrets", ModalOptions { secrets: vec![variable("A=B")], ..fine() }),
            ("modal.tags", ModalOptions { tags: vec![("kaa-x".into(), String::new())], ..fine() }),
            ("modal.tags", ModalOptions { tags: vec![("t".into(), String::new()); 101], ..fine() }),
        ] {
            let error = options.validate().unwrap_err();
            assert!(error.to_string().starts_with(field), "{error}");
        }
        assert!(fine().validate().is_ok());
    }

    #[test]
    fn a_secret_is_not_shown() {
        let secret = Secret::Variable { name: "KEY".into(), value: "hunter2".into() };
        let shown = format!("{secret:?}");
        assert!(shown.contains("KEY") && !shown.contains("hunter2"), "{shown}");
    }
}
